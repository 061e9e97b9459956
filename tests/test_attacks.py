"""The attacks and what is measured with them."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import helpers
import q4_adv_train

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 20


@pytest.fixture(scope="module")
def linear():
    """A linear classifier of ten classes, in eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()


@pytest.fixture(scope="module")
def network():
    """A small network that is not linear and resists an attack on some images, in eval mode."""
    torch.manual_seed(1)
    layers = nn.AvgPool2d(4), nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Flatten(), nn.Linear(512, 10)
    layers[1].weight.data *= 3  # so that FGM and PGD part
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def images():
    """Images of coarse noise in which many values are 0 or 1, so that clipping matters."""
    noise = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return (1.4 * noise - 0.2).clamp(0, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.fixture(scope="module")
def labels():
    return torch.arange(200) % 10


@pytest.fixture(scope="module")
def mostly_right(network, images, labels):
    """Labels of which four fifths are what the network says."""
    return common.predict(network, images).where(torch.arange(200) % 5 > 0, labels)


def pgd_to_the_end(model, images, labels, *settings):
    """PGD's images after all steps: no image ever counts as fooled."""
    return common.pgd(model, images, labels, *settings, decide=lambda output: labels)[0]


def gradient_of_linear(model, images, labels):
    """Cross-entropy's gradient at the images by its formula, (softmax - one-hot) W."""
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    probabilities = (images.flatten(1) @ weight.T + bias).softmax(1)
    return ((probabilities - F.one_hot(labels, 10)) @ weight).view_as(images)


# ---- FGM and PGD --------------------------------------------------------------------------------


def test_fgm_in_linf_is_a_step_along_the_gradients_sign(linear, images, labels):
    expected = (images + EPS * gradient_of_linear(linear, images, labels).sign()).clamp(0, 1)
    assert torch.allclose(common.fgm(linear, images, labels, EPS), expected, atol=1e-6)


def test_fgm_in_l2_is_a_step_along_the_gradient_of_length_eps(linear, images, labels):
    gradient = gradient_of_linear(linear, images, labels)
    length = gradient.square().sum((1, 2, 3), keepdim=True).sqrt()
    expected = (images + 0.5 * gradient / length).clamp(0, 1)
    assert torch.allclose(common.fgm(linear, images, labels, 0.5, "l2"), expected, atol=1e-6)


@pytest.fixture(scope="module")
def two_classes():
    """A linear classifier of two classes, and the direction of its gradient for label 0.

    It is the same everywhere, and the opposite for label 1.
    """
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)).eval()
    return model, (model[1].weight[1] - model[1].weight[0]).detach().view(1, 3, 32, 32)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_pgd_in_linf_walks_straight_to_the_edge_of_the_ball(two_classes, images, steps):
    model, towards_class_1 = two_classes
    labels = torch.arange(len(images)) % 2
    direction = towards_class_1.sign() * (1 - 2 * labels).view(-1, 1, 1, 1)
    expected = (images + min(steps * STEP_SIZE, EPS) * direction).clamp(0, 1)
    found = pgd_to_the_end(model, images, labels, EPS, STEP_SIZE, steps)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_pgd_in_l2_walks_straight_to_the_edge_of_the_ball(two_classes, images, steps):
    model, towards_class_1 = two_classes
    inner = 0.3 + 0.4 * images  # so far from 0 and 1 that nothing is clipped
    labels = torch.zeros(len(images), dtype=torch.long)
    expected = inner + min(steps * 0.1, 0.5) * towards_class_1 / towards_class_1.norm()
    found = pgd_to_the_end(model, inner, labels, 0.5, 0.1, steps, "l2")
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("norm, eps, step_size", [("linf", EPS, 5 / 255), ("l2", 0.5, 0.4)])
def test_pgd_stays_in_the_ball_and_among_images(network, images, labels, norm, eps, step_size):
    adversarial = pgd_to_the_end(network, images, labels, eps, step_size, 7, norm)
    change = (adversarial - images).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= eps + 1e-6 and size.max() > 0.9 * eps
    assert adversarial.min() >= 0 and adversarial.max() <= 1


def test_pgd_stops_at_the_first_step_that_fools_even_if_a_later_one_would_be_right_again():
    def wavy(images):
        """Class 0 where a wave over the mean brightness is positive.

        Steps of over half its length jump back and forth.
        """
        wave = (2 * math.pi * images.mean((1, 2, 3)) / 0.05).cos()
        return torch.stack([wave, torch.zeros_like(wave)], dim=1)

    images = torch.linspace(0.3, 0.7, 199).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    labels = torch.zeros(199, dtype=torch.long)
    found, fooled_after = common.pgd(wavy, images, labels, 0.2, 0.03, 5)
    alive, recovered = torch.ones(199, dtype=torch.bool), 0
    for steps in range(6):
        made = pgd_to_the_end(wavy, images, labels, 0.2, 0.03, steps)
        wrong = wavy(made).argmax(1) != labels
        assert torch.equal(alive & wrong, fooled_after == steps)
        assert torch.equal(found[alive & wrong], made[alive & wrong])
        recovered += (~alive & ~wrong).sum()
        alive &= ~wrong
    assert torch.equal(alive, fooled_after == 6)
    assert alive.any() and recovered > 0


def test_an_l2_attack_keeps_its_bounds_where_the_squared_gradient_underflows(linear, images):
    """A sure classifier's gradients have squares below float32's smallest number."""
    two_best, classes = linear(images).topk(2)
    margin = (two_best[:, 0] - two_best[:, 1]).detach()
    chosen, sure = margin > margin.median(), copy.deepcopy(linear)
    with torch.no_grad():
        sure[1].weight *= 60 / margin.median()
        sure[1].bias *= 60 / margin.median()
    adversarial = common.fgm(sure, images[chosen], classes[chosen, 0], 0.5, "l2")
    length = (adversarial - images[chosen]).flatten(1).norm(dim=1)
    assert 0.1 < length.max() <= 0.5 + 1e-5


def test_attacks_leave_the_model_as_it_is(images, labels):
    layers = nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10)
    model = nn.Sequential(*layers).eval()
    before = copy.deepcopy(model.state_dict())
    common.fgm(model, images, labels, EPS)
    common.pgd(model, images, labels, EPS, STEP_SIZE, 2)
    assert not model.training
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_images_that_require_gradients_and_a_callers_mode_change_nothing(
    network, images, labels, mode
):
    expected, _ = common.pgd(network, images, labels, EPS, STEP_SIZE, 3)
    given = images.clone().requires_grad_()
    found, _ = common.pgd(network, given, labels, EPS, STEP_SIZE, 3)
    assert torch.equal(found, expected) and not found.requires_grad and given.grad is None
    with mode():
        given = images.clone(), labels.clone()  # made in that mode
        found, _ = common.pgd(network, *given, EPS, STEP_SIZE, 3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgm_changes_nothing_where_the_gradient_is_0(images, labels, norm):
    def constant(images):
        return (0 * images).flatten(1)[:, :10]

    assert torch.equal(common.fgm(constant, images, labels, 0.5, norm), images)


def test_random_noise_moves_every_value_by_eps_or_to_the_edge(images):
    noisy = common.random_noise(images, EPS, torch.Generator().manual_seed(0))
    went_up = noisy == (images + EPS).clamp(0, 1)
    assert (went_up | (noisy == (images - EPS).clamp(0, 1))).all()
    assert went_up.double().mean() == pytest.approx(0.5, abs=0.01)


# ---- What is refused ----------------------------------------------------------------------------

MISUSES = {  # changes of a sound call, and what the error says
    "bytes": (lambda given: {"images": (255 * given["images"]).byte()}, "as_float"),
    "0 to 255": (lambda given: {"images": 255 * given["images"]}, "outside"),
    "below 0": (lambda given: {"images": given["images"] - 0.01}, "outside"),
    "not a number": (lambda given: {"images": math.nan * given["images"]}, "outside"),
    "few labels": (lambda given: {"labels": given["labels"][:1]}, "200 images, but 1 labels"),
    "training": (lambda given: {"model": copy.deepcopy(given["model"]).train()}, r"eval\(\)"),
    "eps 8": (lambda given: {"eps": 8}, "8 / 255"),
    "eps below 0": (lambda given: {"eps": -0.1, "norm": "l2"}, "from 0"),
    "norm": (lambda given: {"norm": "l1"}, "l1"),
}


@pytest.mark.parametrize("kind", MISUSES)
def test_a_misused_attack_says_what_is_wrong(linear, images, labels, kind):
    change, said = MISUSES[kind]
    given = {"model": linear, "images": images, "labels": labels, "eps": EPS}
    for attack in common.fgm, partial(common.pgd, step_size=STEP_SIZE, steps=2):
        attack(**given)
        with pytest.raises(ValueError, match=said):
            attack(**{**given, **change(given)})


@pytest.mark.parametrize("factor", [255, -1])
def test_predict_refuses_images_outside_0_to_1_and_perturb_no_more_than_bytes(linear, factor):
    given = factor * torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match="outside"):
        common.predict(linear, given)
    common.perturb(given, torch.Generator())  # in training, a look at the values would cost time
    for function in partial(common.predict, linear), partial(common.perturb, generator=None):
        with pytest.raises(ValueError, match="as_float"):
            function(given.byte())


# ---- Accuracy under attack ----------------------------------------------------------------------


def right_under(attack, model, images, labels, *settings):
    return common.predict(model, attack(model, images, labels, *settings)) == labels


def test_one_gradient_attacks_as_fgm_and_pgd_do_by_themselves(network, images, mostly_right):
    labels, loss = mostly_right, common.summed_cross_entropy
    clean, gradient, under_fgm, fooled_after = common.attacks_on(
        network, images, labels, loss, common.most_likely
    )
    assert torch.equal(clean, common.predict(network, images) == labels)
    assert torch.allclose(gradient, common.input_gradient(network, images, labels)[1])
    for eps, norm, count in (EPS, "linf", None), (1 / 255, "linf", 50), (0.2, "l2", 50):
        expected = right_under(common.fgm, network, images, labels, eps, norm)[:count]
        assert torch.equal(under_fgm(eps, norm, count), expected)
    for eps, count in (EPS, None), (1 / 255, 50):
        _, expected = common.pgd(network, images, labels, eps, eps / 4, STEPS)
        assert torch.equal(fooled_after(eps, eps / 4, count), expected[:count])
    assert 0 < under_fgm(EPS).sum() < clean.sum()


@pytest.fixture
def unfrozen(monkeypatch):
    """Lets robustness measure a small model as it is."""
    monkeypatch.setattr(common, "frozen", lambda model, precision="float32": model)


@pytest.fixture
def measured(unfrozen, monkeypatch, network, images, mostly_right):
    """What robustness returns of 100 images, the last 40 of which are not attacked by all means."""
    for name in ("STRONGEST_IMAGES", "CURVE_IMAGES", "CHECKED_IMAGES"):
        monkeypatch.setattr(common, name, 60)
    perturbed = common.perturb(images[:100], torch.Generator().manual_seed(0))
    given = images[:100], perturbed, mostly_right[:100]
    return given, common.robustness(network, *given, seed=0, precision="float32")


def test_robustness_has_each_condition_as_its_name_says(measured, network):
    (images, perturbed, labels), (found, right, _) = measured
    pgd = common.pgd(network, images, labels, EPS, STEP_SIZE, STEPS)[1] > STEPS
    losses = [common.summed_margin]
    expected = {
        "clean": common.predict(network, images) == labels,
        "perturbed": common.predict(network, perturbed) == labels,
        "fgm": right_under(common.fgm, network, images, labels, EPS),
        "perturbed_fgm": right_under(common.fgm, network, perturbed, labels, EPS),
        "pgd": pgd,
        "strongest": common.right_under_strongest(
            network, images[:60], labels[:60], pgd[:60], losses, common.most_likely
        ),
    }
    assert right.keys() == found["accuracy"].keys() == expected.keys()
    for name, which in expected.items():
        assert torch.equal(right[name], which), name
        assert found["accuracy"][name] == pytest.approx(which.float().mean().item())
    for name, given in ("fgm", images), ("perturbed_fgm", perturbed):
        in_l2 = right_under(common.fgm, network, given, labels, 0.5, "l2")
        assert found["accuracy_l2"][name] == pytest.approx(in_l2.float().mean().item())
    assert found["strongest_images"] == 60


def test_the_curves_are_over_pgds_steps_and_over_epsilon_on_the_first_images(measured, network):
    (images, _, labels), (found, right, _) = measured
    _, after = common.pgd(network, images, labels, EPS, STEP_SIZE, STEPS)
    by_step = [(after > steps).float().mean().item() for steps in range(STEPS + 1)]
    assert found["pgd_by_step"] == pytest.approx(by_step)
    curve, at_eps = found["by_eps"], common.CURVE_EPSILONS.index(EPS) + 1
    for place, names in {0: ("clean", "clean"), at_eps: ("fgm", "pgd")}.items():
        shares = [right[name][:60].float().mean().item() for name in names]
        assert [curve["fgm"][place], curve["pgd"][place]] == pytest.approx(shares)
    assert curve["images"] == 60


def test_the_curves_over_epsilon_attack_with_each_size_and_a_quarter_of_it_as_pgds_step():
    seen = {"fgm": [], "pgd": []}

    def under_fgm(eps, count):
        seen["fgm"].append(eps)
        return torch.tensor([True, False])

    def fooled_after(eps, step_size, count):
        seen["pgd"].append(pytest.approx(4 * step_size))
        return torch.tensor([20, 20])

    right = dict.fromkeys(("clean", "fgm", "pgd"), torch.tensor([True, True]))
    curve = common.accuracy_by_epsilon(right, under_fgm, fooled_after)
    others = [eps for eps in common.CURVE_EPSILONS if eps != EPS]
    assert seen == {"fgm": others, "pgd": others} and curve["eps"] == [0, *common.CURVE_EPSILONS]
    assert curve["fgm"] == [1 if eps in (0, EPS) else 0.5 for eps in curve["eps"]]
    assert curve["pgd"] == [1 if eps in (0, EPS) else 0 for eps in curve["eps"]]


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


def test_the_strongest_attack_leaves_what_neither_it_nor_one_before_it_fools(network, images):
    sure = nn.Sequential(network, Scaled(1e5)).eval()  # cross-entropy is flat: its gradients are 0
    labels, settings = common.predict(network, images), (EPS, STEP_SIZE, STEPS)
    by_entropy, by_margin = (
        common.pgd(sure, images, labels, *settings, loss=loss)[1] > STEPS
        for loss in (common.summed_cross_entropy, common.summed_margin)
    )
    before, losses = by_entropy & (torch.arange(200) % 3 > 0), [common.summed_margin]
    found = common.right_under_strongest(sure, images, labels, before, losses, common.most_likely)
    assert torch.equal(found, before & by_margin)
    assert by_margin.sum() < by_entropy.sum() - 20


def test_the_margin_is_how_far_the_best_other_class_is_ahead():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]], requires_grad=True)
    margin = common.summed_margin(logits, torch.tensor([0, 2]))
    assert margin.item() == (2 - 3) + (5 + 1)
    margin.backward()
    assert logits.grad.tolist() == [[-1, 0, 1], [0, 1, -1]]


# ---- Signs of a flawed attack -------------------------------------------------------------------


class Quantise(nn.Module):
    """Five levels, which leave no gradient: the simplest defence that only masks gradients."""

    def forward(self, images):
        return (4 * images).round() / 4


@pytest.fixture(scope="module")
def matched():
    """A linear classifier that is right about faint patterns in noise; such images, labels."""
    torch.manual_seed(5)
    patterns, labels = torch.randn(10, 3072).sign(), torch.arange(60) % 10
    images = 0.5 + 0.02 * patterns[labels] + 0.1 * torch.randn(60, 3072)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    model[1].weight.data = 0.1 * patterns
    model[1].bias.data = -0.05 * patterns.sum(1)  # so that mid-grey counts for no class
    return model, images.clamp(0, 1).view(-1, 3, 32, 32), labels


def checks_of(model, exact, images, labels):
    """attack_checks as robustness makes them, and the text of the warnings."""
    loss, decide = common.summed_cross_entropy, common.most_likely
    clean, _, under_fgm, fooled_after = common.attacks_on(model, images, labels, loss, decide)
    pgd = fooled_after(EPS, STEP_SIZE) > STEPS
    right = {"clean": clean, "fgm": under_fgm(EPS), "pgd": pgd}
    checks = common.attack_checks(
        model, exact, images, labels, right, fooled_after, 0, loss, decide
    )
    accuracies = {name: common.share(which) for name, which in right.items()}
    return accuracies, checks, " ".join(common.attack_warnings(accuracies, checks))


def test_a_plain_model_gives_no_warning(matched):
    model, images, labels = matched
    accuracies, checks, warnings = checks_of(model, model, images, labels)
    assert accuracies["clean"] == checks["noise"] == 1 and accuracies["fgm"] == 0
    assert warnings == ""


def test_masked_gradients_give_warnings(matched):
    model, images, labels = matched
    masked = nn.Sequential(Quantise(), model).eval()
    accuracies, _, warnings = checks_of(masked, masked, images, labels)
    assert accuracies["pgd"] == accuracies["clean"] > 0.5
    assert "Random noise" in warnings and "eps = 1" in warnings


def test_an_attack_that_is_stronger_in_float32_gives_a_warning(matched):
    model, images, labels = matched
    masked = nn.Sequential(Quantise(), model).eval()
    _, checks, warnings = checks_of(masked, model, images, labels)
    assert checks["fgm"] > checks["fgm_float32"] + 0.5
    assert "--precision float32" in warnings


CHECKS = {"images": 1000, "noise": 0.9, "pgd_eps_1": 0.0, "fgm": 0.3, "pgd": 0.1}
CHECKS |= {"fgm_float32": 0.3, "pgd_float32": 0.1}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, ""),
        ({"pgd": 0.31}, "PGD (31.00 %) is no stronger than FGM"),
        ({"pgd": 0.29}, ""),
        ({"fgm": 0.8, "pgd": 0.0}, "far weaker than PGD"),
        ({"fgm": 0.8, "pgd": 0.75}, ""),
    ],
)
def test_fgm_and_pgd_are_warned_of_where_they_do_not_fit_together(changes, said):
    warnings = common.attack_warnings({"clean": 0.9, "fgm": 0.3, "pgd": 0.1, **changes}, CHECKS)
    assert len(warnings) == bool(said) and said in "".join(warnings)


@pytest.mark.parametrize("share, said", [(0.10, False), (0.115, False), (0.12, True)])
def test_accuracy_under_unlimited_pgd_is_warned_of_where_it_is_above_chance(share, said):
    accuracies, checks = {"clean": 0.9, "fgm": 0.3, "pgd": 0.1}, {**CHECKS, "pgd_eps_1": share}
    assert ("eps = 1" in "".join(common.attack_warnings(accuracies, checks))) == said


# ---- The attack in question 4's training --------------------------------------------------------


@pytest.mark.parametrize("noise", [1, 4])
def test_n_fgsm_is_one_fgm_step_from_noise_without_projection(network, images, labels, noise):
    generator, size = torch.Generator().manual_seed(0), noise * EPS
    start = torch.empty(images.shape).uniform_(-size, size, generator=generator)
    expected = common.fgm(network, (images + start).clamp(0, 1), labels, EPS)
    found = q4_adv_train.n_fgsm(network, images, labels, EPS, noise, generator.manual_seed(0))
    assert torch.allclose(found, expected, atol=1e-7)
    assert all(weight.grad is None for weight in network.parameters())


@pytest.fixture
def trained_on(monkeypatch, network):
    """What a step of question 4 trains on: a function of step, images and changes of a recipe."""

    def run(step, images, **changes):
        seen, labels = [], torch.zeros(len(images), dtype=torch.long)
        generator, recipe = torch.Generator().manual_seed(0), helpers.tiny_recipe(**changes)

        def noted(model, images, *others):
            seen.append(images)

        monkeypatch.setattr(common, "loss_and_correct", noted)
        step(network, images, labels, generator, recipe)
        return seen[0]

    return run


def test_question_4_trains_on_perturbed_images(trained_on):
    """Black images with ten pixels at full; without the perturbation there would be none."""
    found = trained_on(q4_adv_train.step_on_perturbed, torch.zeros(50, 3, 32, 32).byte())
    assert (found.sum((1, 2, 3)) == common.NUM_PIXELS).all()


@pytest.mark.parametrize("noise, eps", [(2.0, EPS), (3.5, 4 / 255)])
def test_question_4_attacks_perturbed_images_with_the_noise_and_epsilon_of_its_recipe(
    trained_on, noise, eps
):
    images = helpers.tiny_data()["val"][0]
    perturbed = trained_on(q4_adv_train.step_on_perturbed, images)
    attacked = trained_on(q4_adv_train.step_on_attacked, images, noise=noise, eps=eps)
    change = (attacked - perturbed) / eps
    assert noise + 0.9 < change.max() <= noise + 1 + 1e-4
