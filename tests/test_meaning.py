"""What is trained on, scored on and attacked is what the assignment and the record say."""

import inspect
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import helpers
import q1_split
import q2_train_ce
import q3_attack
import q4_adv_train
import q6_angular


class Noted(Exception):
    """Ends a function once what it does has been seen."""


@pytest.fixture
def arguments_of(monkeypatch):
    """A function that calls `call` until it calls module.name: with which arguments, by name."""

    def noted(module, name, call):
        signature, seen = inspect.signature(getattr(module, name)), {}

        def note(*arguments, **options):
            bound = signature.bind(*arguments, **options)
            bound.apply_defaults()
            seen.update(bound.arguments)
            raise Noted

        with monkeypatch.context() as patch, pytest.raises(Noted):
            patch.setattr(module, name, note)
            call()
        return seen

    return noted


@pytest.fixture
def network():
    """The smallest Network."""
    torch.manual_seed(0)
    return common.Network(nn.Sequential(nn.Flatten(), nn.Linear(3072, 512)), 10)


def test_near_duplicates_are_those_that_differ_in_brightness_and_contrast_alone():
    rng = torch.Generator().manual_seed(0)
    train = torch.randint(60, 200, (5, 3, 32, 32), generator=rng).byte()
    dimmed = (0.5 * train[0] + 100).byte()  # only a centred product recognises it
    noise = 40 * torch.randn(3, 32, 32, generator=rng)
    resembling = (train[1] + noise).clamp(0, 255).byte()
    correlation = torch.corrcoef(torch.stack([train[1].flatten(), resembling.flatten()]).float())
    assert 0.6 < correlation[0, 1] < 0.9
    assert q1_split.count_duplicates(train, torch.stack([dimmed, resembling])) == (0, 1)


# ---- What is trained on -------------------------------------------------------------------------


def question_2_sees(monkeypatch, images, trivial_augment):
    """What the network gets in a step on these images."""
    seen = []
    monkeypatch.setattr(common, "loss_and_correct", lambda model, images, *_: seen.append(images))
    recipe = helpers.tiny_recipe(trivial_augment=trivial_augment)
    q2_train_ce.training_step(None, images, None, torch.Generator().manual_seed(0), recipe)
    return seen[0]


def test_question_2_trains_on_shifted_mirrored_and_cut_images(monkeypatch):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = (255 * image).byte().expand(64, -1, -1, -1)
    seen = question_2_sees(monkeypatch, images, trivial_augment=False)
    mean = torch.tensor(common.CIFAR10_MEAN).view(1, 3, 1, 1)
    cut = (seen == mean).all(1).sum((1, 2))
    assert cut.min() >= 36 and cut.max() <= 144 and cut.max() >= 100
    uncut = seen.where(seen != mean, common.as_float(images))
    assert len(uncut.flatten(1).unique(dim=0)) > 40


@pytest.mark.parametrize("chosen", [True, False])
def test_question_2_uses_trivial_augment_where_its_recipe_says_so(monkeypatch, chosen):
    calls = []
    monkeypatch.setattr(q2_train_ce, "trivial_augment", lambda images, _: calls.append(1) or images)
    question_2_sees(monkeypatch, helpers.tiny_data()["val"][0], chosen)
    assert bool(calls) == chosen


def test_the_angular_loss_is_of_normalised_embeddings():
    images, labels = helpers.tiny_data()["val"]
    output = torch.randn(len(images), 128, generator=torch.Generator().manual_seed(0))
    expected = q6_angular.angular_loss(F.normalize(output), labels, q6_angular.ALPHA)
    for scale in (1, 50):
        loss, _ = q6_angular.training_step(
            lambda batch, scale=scale: scale * output,
            images,
            labels,
            torch.Generator().manual_seed(0),
            helpers.tiny_recipe(),
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


# ---- What is scored on --------------------------------------------------------------------------


def test_question_2_is_scored_on_clean_validation_images(arguments_of, network):
    data, recipe = helpers.tiny_data(), helpers.tiny_recipe()
    train = partial(q2_train_ce.train_classifier, data, recipe, {}, None, False)
    evaluate = arguments_of(common, "train", train)["evaluate"]
    seen = arguments_of(common, "validation_scores", partial(evaluate, network))
    assert torch.equal(seen["images"], common.as_float(data["val"][0]))
    assert torch.equal(seen["labels"], data["val"][1])


def test_question_4_is_scored_on_perturbed_validation_images_and_under_pgd(
    arguments_of, monkeypatch, network
):
    data, recipe = helpers.tiny_data(), helpers.tiny_recipe()
    train = partial(q4_adv_train.train_variant, None, None, data, recipe, {}, None, False)
    given = arguments_of(common, "train", train)
    evaluate = partial(given["evaluate"], network)
    perturbed = common.perturbed_images(data["val"][0], "val", 0)
    assert not torch.equal(perturbed, common.as_float(data["val"][0]))
    scored = arguments_of(common, "validation_scores", evaluate)
    monkeypatch.setattr(common, "validation_scores", lambda *arguments: {})
    attacked = arguments_of(common, "pgd", evaluate)
    for seen in (scored, attacked):
        assert torch.equal(seen["images"], perturbed)
        assert torch.equal(seen["labels"], data["val"][1])
    settings = [attacked[name] for name in ("eps", "step_size", "steps", "norm", "start")]
    assert settings == [8 / 255, 2 / 255, 20, "linf", None]
    monkeypatch.setattr(common, "pgd", lambda *arguments: (None, torch.tensor([20, 21, 21, 0])))
    assert evaluate() == {given["guard"]: 0.5}


@pytest.mark.parametrize("under_fgm", [True, False])
def test_only_training_with_fgm_stops_at_a_collapse(arguments_of, under_fgm):
    recipe = helpers.tiny_recipe()
    if not under_fgm:
        del recipe["eps"]
    data = helpers.tiny_data()
    train = partial(q4_adv_train.train_variant, None, None, data, recipe, {}, None, False)
    guard = arguments_of(common, "train", train)["guard"]
    assert guard == (q4_adv_train.GUARD if under_fgm else None)


def test_question_6_is_scored_on_validation_images(arguments_of, monkeypatch, network):
    data, recipe = helpers.tiny_data(), helpers.tiny_recipe()
    train = partial(q6_angular.train_embedding, None, None, data, recipe, {}, None, False)
    evaluate = arguments_of(common, "train", train)["evaluate"]
    monkeypatch.setattr(q6_angular, "embed", lambda model, images: images.flatten(1))
    seen = arguments_of(q6_angular, "vote", partial(evaluate, network))
    assert torch.equal(seen["train"], common.as_float(data["train"][0]).flatten(1))
    assert torch.equal(seen["train_labels"], data["train"][1])
    assert torch.equal(seen["embeddings"], common.as_float(data["val"][0]).flatten(1))


@pytest.mark.parametrize("script", [q3_attack, q4_adv_train, q6_angular])
def test_a_question_measures_on_the_test_part_and_on_its_perturbed_version(
    arguments_of, monkeypatch, tmp_path, network, script
):
    data, words = helpers.tiny_data(), ["--seed", "5", "--device", "cpu", "--results", tmp_path]
    model = {"model": network, "stem": "imagenet", "sha256": ""}
    monkeypatch.setattr("sys.argv", ["script.py", "--precision", "bfloat16", *map(str, words)])
    monkeypatch.setattr(common, "load_data", lambda args: ({"sha256": ""}, data))
    monkeypatch.setattr(common, "require_model", lambda args, split: model)
    monkeypatch.setattr(common, "train", lambda *arguments: {"history": []})
    monkeypatch.setattr(common, "save_trained", lambda *arguments: {})
    monkeypatch.setattr(script, "draw_curves", lambda *arguments: None)
    monkeypatch.setattr(q6_angular, "first_model", lambda *arguments: (network, model, None))
    monkeypatch.setattr(q6_angular, "measured_votes", lambda *arguments: {})
    seen = arguments_of(common, "robustness", script.main)
    assert torch.equal(seen["images"], common.as_float(data["test"][0]))
    assert torch.equal(seen["perturbed"], common.perturbed_images(data["test"][0], "test", 5))
    assert torch.equal(seen["labels"], data["test"][1])
    assert (seen["seed"], seen["precision"]) == (5, "bfloat16")
    ours = seen["losses"] == (common.summed_cross_entropy, common.summed_margin)
    assert ours == (seen["decide"] is common.most_likely) == (script is not q6_angular)


PARTS = {"colour jitter": "color_jitter", "rotation": "rotate", "pixels": "set_to_full"}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_perturbation_alone_has_the_values_that_the_mixture_has(monkeypatch, part):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).eval()
    images = torch.randint(256, (600, 3, 32, 32), dtype=torch.uint8)
    labels = common.predict(model, common.as_float(images))
    found = q3_attack.accuracy_by_part(model, images, labels, 6)
    for function in set(PARTS.values()) - {PARTS[part]}:
        monkeypatch.setattr(common, function, lambda images, *drawn: images)
    changed = common.predict(model, common.perturbed_images(images, "test", 6))
    assert found[part] == common.accuracy(changed, labels)
    assert set(found) == set(PARTS) and len(set(found.values())) == 3


def test_perturbed_images_are_the_same_whatever_batch_a_device_is_given(monkeypatch):
    images = torch.randint(256, (600, 3, 8, 8), dtype=torch.uint8)
    expected = common.perturbed_images(images, "test", 0)
    assert common.batch_size_for(images) < common.batch_size_for(images.to("meta"))
    monkeypatch.setattr(common, "batch_size_for", lambda tensor: 17)
    assert torch.equal(common.perturbed_images(images, "test", 0), expected)


def test_the_checks_are_under_noise_of_fgms_size_and_under_pgd_without_bounds(monkeypatch):
    images, labels = torch.full((4, 10, 1, 1), 0.5), torch.zeros(4, dtype=torch.long)
    right = dict.fromkeys(("fgm", "pgd"), torch.tensor([True, False, False, False]))
    moved, sizes = [], []

    def model(images):
        moved.append((images - 0.5).abs())
        return torch.eye(10)[:4]

    def fooled_after(eps, step_size, count):
        sizes.append(eps)
        return torch.tensor([20, 21, 21, 0])

    rest = common.summed_cross_entropy, common.most_likely
    found = common.attack_checks(model, model, images, labels, right, fooled_after, 0, *rest)
    assert torch.allclose(moved[0], torch.tensor(8 / 255)) and sizes == [1]
    assert (found["noise"], found["pgd_eps_1"], found["fgm_float32"]) == (0.25, 0.5, 0.25)


def test_the_readme_names_only_commands_that_there_are():
    readme = (helpers.ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (helpers.ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z]+)\b(?!=)", readme)):
        assert f"\n{target}:" in makefile, target
    for script in set(re.findall(r"python ([a-z0-9_/]+\.py)", readme)):
        assert (helpers.ROOT / script).is_file(), script
