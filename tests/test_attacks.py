"""The attacks and what is measured with them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import helpers
import q4_adv_train

EPS = 8 / 255


@pytest.fixture(scope="module")
def linear():
    """A linear classifier of ten classes, in eval mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()


@pytest.fixture(scope="module")
def network():
    """A small network that is not linear, in eval mode."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(512, 10)
    ).eval()


@pytest.fixture(scope="module")
def images():
    """Images of noise in which many values are 0 or 1, so that clipping matters."""
    return (
        1.4 * torch.rand(600, 3, 32, 32, generator=torch.Generator().manual_seed(2)) - 0.2
    ).clamp(0, 1)


@pytest.fixture(scope="module")
def labels():
    return torch.arange(600) % 10


def gradient_of_linear(model, images, labels):
    """Cross-entropy's gradient at the images by its formula, (softmax - one-hot) W."""
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    probabilities = (images.flatten(1) @ weight.T + bias).softmax(1)
    return ((probabilities - F.one_hot(labels, 10)) @ weight).view_as(images)


# ---- FGM and PGD -------------------------------------------------------------------------------


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
    """A linear classifier of two classes: its gradient has the same direction everywhere, for each
    label."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)).eval()
    towards_class_1 = (model[1].weight[1] - model[1].weight[0]).detach().view(1, 3, 32, 32)
    return model, towards_class_1


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_pgd_in_linf_walks_straight_to_the_edge_of_the_ball(two_classes, images, steps):
    model, towards_class_1 = two_classes
    labels = torch.arange(len(images)) % 2
    direction = towards_class_1.sign() * (1 - 2 * labels).view(-1, 1, 1, 1)
    expected = (images + min(steps * 2 / 255, EPS) * direction).clamp(0, 1)
    assert torch.allclose(
        common.pgd(model, images, labels, EPS, 2 / 255, steps), expected, atol=1e-6
    )


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_pgd_in_l2_walks_straight_to_the_edge_of_the_ball(two_classes, images, steps):
    model, towards_class_1 = two_classes
    inner = 0.3 + 0.4 * images  # so far from 0 and 1 that nothing is clipped
    labels = torch.zeros(len(images), dtype=torch.long)
    expected = inner + min(steps * 0.1, 0.5) * towards_class_1 / towards_class_1.norm()
    assert torch.allclose(
        common.pgd(model, inner, labels, 0.5, 0.1, steps, "l2"), expected, atol=1e-5
    )


@pytest.mark.parametrize("norm, eps, step_size", [("linf", EPS, 5 / 255), ("l2", 0.5, 0.4)])
def test_pgd_stays_in_the_ball_and_among_images(network, images, labels, norm, eps, step_size):
    adversarial = common.pgd(network, images, labels, eps, step_size, 7, norm)
    change = (adversarial - images).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert size.max() <= eps + 1e-6 and size.max() > 0.9 * eps
    assert adversarial.min() >= 0 and adversarial.max() <= 1


def test_pgd_raises_the_loss_more_than_fgm(network, images, labels):
    clean, fgm, pgd = (
        F.cross_entropy(network(each), labels)
        for each in (
            images,
            common.fgm(network, images, labels, EPS),
            common.pgd(network, images, labels, EPS, 2 / 255, 20),
        )
    )
    assert clean < fgm < pgd


def test_an_l2_attack_keeps_its_bounds_where_the_squared_gradient_underflows(
    linear, images, labels
):
    """A classifier that is sure of itself has gradients whose squares are below float32's smallest
    number."""
    correct = linear(images).argmax(1)
    sure = copy.deepcopy(linear)
    with torch.no_grad():
        margin = linear(images).topk(2).values.diff().abs()
        chosen = margin[:, 0] > margin.median()
        sure[1].weight *= 60 / margin.median()
        sure[1].bias *= 60 / margin.median()
    adversarial = common.fgm(sure, images[chosen], correct[chosen], 0.5, "l2")
    assert (adversarial - images[chosen]).flatten(1).norm(dim=1).max() <= 0.5 + 1e-5


def test_an_unknown_norm_is_refused(linear, images, labels):
    with pytest.raises(ValueError, match="l1"):
        common.fgm(linear, images, labels, EPS, "l1")


def test_attacks_leave_the_model_as_it_is(images, labels):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 8, stride=8), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10)
    ).eval()
    before = copy.deepcopy(model.state_dict())
    common.robustness(model, model, images[:50], images[50:100], labels[:50], seed=0)
    common.fgm(model, images, labels, EPS)
    common.pgd(model, images, labels, EPS, 2 / 255, 2)
    assert not model.training
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_random_noise_moves_every_value_by_eps_or_to_the_edge(images):
    noisy = common.random_noise(images, EPS, torch.Generator().manual_seed(0))
    up, down = (images + EPS).clamp(0, 1), (images - EPS).clamp(0, 1)
    went_up, went_down = noisy == up, noisy == down
    assert (went_up | went_down).all()
    assert went_up.double().mean() == pytest.approx(0.5, abs=0.01)


# ---- Accuracy under attack ---------------------------------------------------------------------


def test_fgm_accuracies_are_those_of_the_attacked_images(network, images, labels):
    labels = network(images).argmax(1).where(torch.arange(600) % 5 > 0, labels)  # four fifths right
    attacks = [("linf", 1 / 255), ("linf", EPS), ("l2", 0.2)]
    expected = [common.accuracy(network(images).argmax(1), labels)]
    expected += [
        common.accuracy(network(common.fgm(network, images, labels, eps, norm)).argmax(1), labels)
        for norm, eps in attacks
    ]
    assert common.fgm_accuracies(network, images, labels, attacks) == expected
    assert expected[0] > expected[1] > expected[2]


def test_a_function_of_the_attacked_images_sees_a_batch_at_a_time(network, images, labels):
    sizes = []

    def logits(attacked):
        sizes.append(len(attacked))
        return network(attacked)

    found = common.under_fgm(logits, network, images, labels)
    assert sizes == [250, 250, 100]
    assert torch.allclose(found, network(common.fgm(network, images, labels, EPS)), atol=1e-5)


def test_pgd_by_step_counts_the_images_that_no_step_so_far_has_fooled():
    def wavy(images):
        """Class 0 where a wave over the mean brightness is positive: steps of over half its length
        jump back and forth."""
        wave = (2 * math.pi * images.mean((1, 2, 3)) / 0.05).cos()
        return torch.stack([wave, torch.zeros_like(wave)], dim=1)

    images, labels = (
        torch.linspace(0.3, 0.7, 199).view(-1, 1, 1, 1).expand(-1, 3, 4, 4),
        torch.zeros(199, dtype=torch.long),
    )
    alive, expected = torch.ones(199, dtype=torch.bool), []
    for steps in range(6):
        right = (
            wavy(common.pgd(wavy, images, labels, 0.2, 0.03, steps) if steps else images).argmax(1)
            == labels
        )
        alive &= right
        expected.append(alive.double().mean().item())
    assert common.pgd_accuracy_by_step(wavy, images, labels, 0.2, 0.03, 5) == expected
    assert expected[0] > expected[-1] > 0
    assert (right & ~alive).any()  # some images recover, and stay counted as lost


class Quantise(nn.Module):
    """Rounds its input to five levels, which leaves no gradient: the simplest defence that only
    masks gradients."""

    def forward(self, images):
        return (4 * images).round() / 4


@pytest.fixture(scope="module")
def matched():
    """A linear classifier that is right about images of faint patterns in noise, and those images
    with their labels."""
    torch.manual_seed(5)
    patterns = torch.randn(10, 3072).sign()
    labels = torch.arange(500) % 10
    images = (
        (0.5 + 0.02 * patterns[labels] + 0.1 * torch.randn(500, 3072))
        .clamp(0, 1)
        .view(-1, 3, 32, 32)
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    model[1].weight.data = 0.1 * patterns
    model[1].bias.data = -0.05 * patterns.sum(
        1
    )  # so that mid-grey, on which the patterns lie, counts for no class
    return model, images, labels


def test_a_plain_model_gives_no_warning(matched):
    model, images, labels = matched
    measured = common.robustness(model, model, images, images, labels, seed=0)
    assert measured["accuracy"]["clean"] > 0.99 and measured["accuracy"]["fgm"] < 0.01
    assert measured["checks"]["noise"] > 0.99
    assert measured["warnings"] == []


def test_masked_gradients_give_warnings(matched):
    model, images, labels = matched
    masked = nn.Sequential(Quantise(), model)
    measured = common.robustness(masked, masked, images, images, labels, seed=0)
    assert measured["accuracy"]["pgd"] == measured["accuracy"]["clean"] > 0.5
    text = " ".join(measured["warnings"])
    assert "Random noise" in text and "eps = 1" in text


def test_an_attack_that_is_stronger_in_float32_gives_a_warning(matched):
    model, images, labels = matched
    measured = common.robustness(
        nn.Sequential(Quantise(), model), model, images, images, labels, seed=0
    )
    assert measured["checks"]["fgm"] > measured["checks"]["fgm_float32"] + 0.5
    assert any("--precision float32" in warning for warning in measured["warnings"])


def test_catastrophic_overfitting_gives_a_warning():
    values = {"clean": 0.9, "fgm": 0.8, "pgd": 0.0}
    model, image = nn.Flatten(), torch.zeros(1, 10, 1, 1)
    _, warnings = common.attack_checks(
        model,
        model,
        image,
        torch.tensor([0]),
        values,
        0,
        common.summed_cross_entropy,
        common.most_likely,
    )
    assert any("far weaker than PGD" in warning for warning in warnings)


def test_the_strongest_attack_fools_what_any_of_its_losses_fools(network, images, labels):
    sure = nn.Sequential(network, Scaled(1e5))  # cross-entropy is flat: its gradients are 0
    labels = network(images).argmax(1)
    losses = [common.summed_cross_entropy, common.summed_margin]
    step = common.EPSILON["linf"], common.PGD_STEP_SIZE, common.PGD_STEPS
    survives = torch.ones(600, dtype=torch.bool)
    for loss in losses:
        found = common.attack(sure, images, labels, *step, loss=loss, decide=common.most_likely)[1]
        survives &= found > common.PGD_STEPS
    together, alone = (
        common.strongest_accuracy(sure, images, labels, tried, common.most_likely)
        for tried in (losses, losses[:1])
    )
    assert together == survives.float().mean().item() < alone - 0.1


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return self.factor * logits


def test_the_margin_is_how_far_the_best_other_class_is_ahead():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0]], requires_grad=True)
    margin = common.summed_margin(logits, torch.tensor([0, 2]))
    assert margin.item() == (2 - 3) + (5 + 1)
    margin.backward()
    assert logits.grad.tolist() == [[-1, 0, 1], [0, 1, -1]]


def test_robustness_counts_the_strongest_attack_on_the_first_images(matched, monkeypatch):
    model, images, labels = matched
    monkeypatch.setattr(common, "STRONGEST_IMAGES", 100)
    measured = common.robustness(model, model, images, images, labels, seed=0)
    assert measured["strongest_images"] == 100
    assert measured["accuracy"]["strongest"] <= measured["accuracy"]["pgd"] + 0.05


def test_the_curves_over_epsilon_are_those_of_the_first_images_attacked(matched, monkeypatch):
    model, images, labels = matched
    monkeypatch.setattr(common, "CURVE_IMAGES", 200)
    found = common.robustness(model, model, images, images, labels, seed=0)["by_eps"]
    images, labels = images[:200], labels[:200]
    assert found["images"] == 200
    assert [round(255 * eps) for eps in found["eps"]] == [0, 2, 4, 8, 12, 16]
    for eps, fgm, pgd in zip(found["eps"], found["fgm"], found["pgd"], strict=True):
        attacked = common.fgm(model, images, labels, eps)
        assert fgm == common.accuracy(model(attacked).argmax(1), labels)
        by_step = common.pgd_accuracy_by_step(model, images, labels, eps, eps / 4, 20)
        assert pgd == pytest.approx(by_step[-1])
    assert found["fgm"][0] > found["fgm"][3]


def test_the_attacks_take_no_longer_than_is_said(monkeypatch):
    """On images that no attack fools, in gradients: a minute each by a stopped clock."""
    images, labels = torch.rand(2500, 3, 4, 4), torch.zeros(2500, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    taken, original = [], common.input_gradient

    def counted(model, images, *arguments):
        taken.append(len(images))
        return original(model, images, *arguments)

    monkeypatch.setattr(common, "input_gradient", counted)

    def never_fooled(logits):
        return torch.zeros(len(logits), dtype=torch.long)

    common.robustness(model, model, images, images, labels, 0, decide=never_fooled)
    gradients = sum(taken)
    clock = iter([0, 900 * 250, 0, 60 * 250, 0, 120 * 250])  # two of them are disturbed
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    said = common.minutes_of_attacks(model, images, labels, common.summed_cross_entropy)
    assert gradients <= said < 1.5 * gradients


# ---- The attack in question 4's training -------------------------------------------------------


@pytest.mark.parametrize("noise", [1, 2, 4])
def test_n_fgsm_goes_up_the_loss_from_noise_of_so_many_eps(network, images, labels, noise):
    attacked = q4_adv_train.n_fgsm(
        network, images, labels, EPS, noise, torch.Generator().manual_seed(0)
    )
    change = (attacked - images) / EPS
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert noise + 0.9 < change.max() <= noise + 1 + 1e-4  # noise on both sides
    assert noise + 0.9 < -change.min() <= noise + 1 + 1e-4
    noisy = (images + noise * EPS * (2 * torch.rand_like(images) - 1)).clamp(0, 1)
    assert (
        F.cross_entropy(network(attacked), labels) > F.cross_entropy(network(noisy), labels) + 0.01
    )
    assert all(weight.grad is None for weight in network.parameters())


def test_n_fgsm_is_one_fgm_step_from_noise_without_projection(network, images, labels):
    start = torch.empty(images.shape).uniform_(
        -2 * EPS, 2 * EPS, generator=torch.Generator().manual_seed(0)
    )
    noisy = (images + start).clamp(0, 1)
    expected = common.fgm(network, noisy, labels, EPS)
    found = q4_adv_train.n_fgsm(network, images, labels, EPS, 2, torch.Generator().manual_seed(0))
    assert torch.allclose(found, expected, atol=1e-7)


@pytest.mark.parametrize("noise, eps", [(2.0, EPS), (3.5, 4 / 255)])
def test_training_attacks_with_the_noise_and_epsilon_of_its_recipe(monkeypatch, noise, eps):
    def noted(model, images, labels, eps, noise, generator):
        seen.append((eps, noise))
        return images

    seen = []
    monkeypatch.setattr(q4_adv_train, "n_fgsm", noted)
    images, labels = helpers.tiny_data()["val"]
    model = common.resnet18(10, "imagenet")
    for step in (q4_adv_train.step_on_perturbed, q4_adv_train.step_on_attacked):
        step(
            model,
            images,
            labels,
            torch.Generator().manual_seed(0),
            helpers.tiny_recipe(noise=noise, eps=eps),
        )
    assert seen == [(eps, noise)]


@pytest.mark.parametrize("step", [q4_adv_train.step_on_perturbed, q4_adv_train.step_on_attacked])
def test_question_4_trains_on_perturbed_images(monkeypatch, step):
    """With ten pixels at full it sees them; without the perturbation it would not."""
    seen = []
    monkeypatch.setattr(
        common, "loss_and_correct", lambda model, images, labels, recipe: seen.append(images)
    )
    monkeypatch.setattr(q4_adv_train, "n_fgsm", lambda model, images, *others: images)
    step(
        None,
        torch.zeros(50, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(50, dtype=torch.long),
        torch.Generator().manual_seed(0),
        helpers.tiny_recipe(),
    )
    assert (seen[0].sum((1, 2, 3)) == common.NUM_PIXELS).all()


# ---- At the edges ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_epsilon_of_0_changes_nothing_even_where_the_gradient_is_0(images, labels, norm):
    def constant(images):
        return (0 * images).flatten(1)[:, :10]

    for model in (constant, lambda images: images.flatten(1)[:, :10]):
        assert torch.equal(common.fgm(model, images, labels, 0.0, norm), images)
        assert torch.equal(common.pgd(model, images, labels, 0.0, 0.1, 3, norm), images)
    assert torch.equal(common.fgm(constant, images, labels, 0.5, norm), images)


@pytest.mark.parametrize("number", [0, 1, 599, 601])
def test_labels_of_another_length_than_the_images_are_refused(linear, images, number):
    labels = torch.zeros(number, dtype=torch.long)
    for call in (
        lambda: common.fgm(linear, images, labels, EPS),
        lambda: common.pgd(linear, images, labels, EPS, EPS, 2),
        lambda: common.fgm_accuracies(linear, images, labels, [("linf", EPS)]),
    ):
        with pytest.raises(ValueError, match="600 images"):
            call()


def test_images_that_require_gradients_and_a_callers_no_grad_change_nothing(
    network, images, labels
):
    expected = common.pgd(network, images, labels, EPS, 2 / 255, 3)
    given = images.clone().requires_grad_()
    found = common.pgd(network, given, labels, EPS, 2 / 255, 3)
    assert torch.equal(found, expected) and not found.requires_grad and given.grad is None
    with torch.no_grad():
        assert torch.equal(common.pgd(network, images, labels, EPS, 2 / 255, 3), expected)


def test_an_attack_that_decides_stops_at_the_first_step_that_fools(network, images, labels):
    """What is counted are the images that pgd makes, step by step."""
    labels = network(images).argmax(1).where(torch.arange(600) % 5 > 0, labels)
    found, fooled_after = common.attack(
        network, images, labels, EPS, 0.3 / 255, 4, decide=common.most_likely
    )
    alive = torch.ones(600, dtype=torch.bool)
    for steps in range(5):
        made = common.pgd(network, images, labels, EPS, 0.3 / 255, steps) if steps else images
        fooled = alive & (network(made).argmax(1) != labels)
        assert torch.equal(fooled, fooled_after == steps)
        assert torch.equal(found[fooled], made[fooled])
        alive &= ~fooled
    assert torch.equal(alive, fooled_after == 5) and alive.any()
