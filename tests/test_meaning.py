"""What is trained on, scored on and attacked is what the assignment and the record say."""

import re
from types import SimpleNamespace

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


def noting(seen):
    """A function that keeps its arguments and ends the caller."""

    def note(*arguments, **options):
        seen.append(arguments)
        raise Noted

    return note


# ---- Constants ---------------------------------------------------------------------------------


def test_the_constants_are_those_of_assignment_and_literature():
    assert common.EPSILON == {"linf": 8 / 255, "l2": 0.5}
    assert (common.PGD_STEPS, common.PGD_STEP_SIZE) == (20, 2 / 255)
    assert common.JITTER == {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    assert (common.MAX_ROTATION, common.NUM_PIXELS) == (5, 10)
    assert common.OPTIMIZER == {
        "optimizer": "sgd",
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "warmup": 0.2,
    }
    assert (q2_train_ce.LABEL_SMOOTHING, q2_train_ce.CUTOUT, q4_adv_train.LABEL_SMOOTHING) == (
        0.1,
        12,
        0.1,
    )
    assert (q6_angular.ALPHA, q6_angular.EMBEDDING, q6_angular.NEIGHBOURS) == (40, 128, 100)
    assert q1_split.PER_CLASS == {"train": 1200, "val": 2400, "test": 2400}
    assert q1_split.NEAR_DUPLICATE == 0.95


def test_the_recipes_are_those_of_the_record():
    record = (helpers.ROOT / "docs" / "recipes.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in record.split("\n")]
    rows = {cells[0]: cells[1:4] for cells in rows if len(cells) == 5}
    two, four, six = q2_train_ce.RECIPES, q4_adv_train.RECIPES, q6_angular.RECIPES
    for position, stem in enumerate(common.STEMS):
        found = {name: cells[position] for name, cells in rows.items()}
        assert found["question 2: epochs"] == str(two[stem]["epochs"])
        rate = f"{two[stem]['batch_size']}, {two[stem]['lr']:g}"
        assert found["batch, peak rate"] == rate
        assert ("TrivialAugment" in found["augmentation"]) == two[stem]["trivial_augment"]
        assert found["question 4: epochs"] == str(four[stem]["epochs"])
        rates = f"{four[stem]['lr']:g} / {four[stem]['lr_perturbed']:g}"
        assert found["rate with FGM / without"] == rates
        assert found["noise, in ε"] == f"{four[stem]['noise']:g}"
        assert found["question 6: epochs, rate"] == f"{six[stem]['epochs']}, {six[stem]['lr']:g}"


# ---- Question 1 --------------------------------------------------------------------------------


def test_near_duplicates_are_those_that_differ_in_brightness_and_contrast_alone():
    rng = torch.Generator().manual_seed(0)
    train = torch.randint(60, 200, (5, 3, 32, 32), generator=rng).byte()
    dimmed = (0.5 * train[0] + 100).byte()  # only a centred product recognises it
    noise = 40 * torch.randn(3, 32, 32, generator=rng)
    resembling = (train[1] + noise).clamp(0, 255).byte()
    correlation = torch.corrcoef(torch.stack([train[1].flatten(), resembling.flatten()]).float())
    assert 0.6 < correlation[0, 1] < 0.9
    assert q1_split.count_duplicates(train, torch.stack([dimmed, resembling])) == (0, 1)


# ---- What is trained on ------------------------------------------------------------------------


def test_question_2_trains_on_shifted_mirrored_and_cut_images():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = (255 * image).byte().expand(64, -1, -1, -1)
    seen = []

    def model(batch):
        seen.append(batch)
        return torch.zeros(len(batch), 10, requires_grad=True)

    recipe = helpers.tiny_recipe(trivial_augment=False)
    labels = torch.zeros(64, dtype=torch.long)
    q2_train_ce.training_step(model, images, labels, torch.Generator().manual_seed(0), recipe)
    mean = torch.tensor(common.CIFAR10_MEAN).view(1, 3, 1, 1)
    cut = (seen[0] == mean).all(1).sum((1, 2))
    assert cut.min() >= 36 and cut.max() <= 144 and cut.max() >= 100
    uncut = seen[0].where(seen[0] != mean, common.as_float(images))
    assert len(uncut.flatten(1).unique(dim=0)) > 40


@pytest.mark.parametrize("chosen", [True, False])
def test_question_2_uses_trivial_augment_where_its_recipe_says_so(monkeypatch, chosen):
    seen = []
    monkeypatch.setattr(
        q2_train_ce, "trivial_augment", lambda images, generator: seen.append(1) or images
    )
    images, labels = helpers.tiny_data()["val"]
    model = common.resnet18(10, "imagenet")
    recipe = helpers.tiny_recipe(trivial_augment=chosen)
    q2_train_ce.training_step(model, images, labels, torch.Generator().manual_seed(0), recipe)
    assert bool(seen) == chosen


def test_the_angular_loss_is_of_normalised_embeddings():
    images, labels = helpers.tiny_data()["val"]
    torch.manual_seed(0)
    output = torch.randn(len(images), 128)
    losses = [
        q6_angular.training_step(
            lambda batch, scale=scale: scale * output,
            images,
            labels,
            torch.Generator().manual_seed(0),
            helpers.tiny_recipe(),
        )[0]
        for scale in (1, 50)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-4)
    expected = q6_angular.angular_loss(F.normalize(output), labels, q6_angular.ALPHA)
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-5)


# ---- What is scored on -------------------------------------------------------------------------


def evaluated(monkeypatch, train):
    """What `train` hands to common.train for scoring after an epoch."""
    seen = []
    monkeypatch.setattr(common, "train", noting(seen))
    with pytest.raises(Noted):
        train()
    return seen[0][4]


def test_question_2_is_scored_on_clean_validation_images(monkeypatch):
    data, recipe = helpers.tiny_data(), helpers.tiny_recipe()
    evaluate = evaluated(
        monkeypatch, lambda: q2_train_ce.train_classifier(data, recipe, None, False)
    )
    seen = []
    monkeypatch.setattr(common, "validation_scores", noting(seen))
    with pytest.raises(Noted):
        evaluate(common.resnet18(10, "imagenet"))
    assert torch.equal(seen[0][1], common.as_float(data["val"][0]))
    assert torch.equal(seen[0][2], data["val"][1])


def test_question_4_is_scored_on_perturbed_validation_images_and_under_pgd(monkeypatch):
    data, recipe = helpers.tiny_data(), helpers.tiny_recipe()
    evaluate = evaluated(
        monkeypatch, lambda: q4_adv_train.train_variant(None, None, data, recipe, None, False)
    )
    seen = []
    monkeypatch.setattr(common, "pgd_accuracy_by_step", noting(seen))
    with pytest.raises(Noted):
        evaluate(common.resnet18(10, "imagenet"))
    _, images, labels, eps, step_size, steps = seen[0]
    perturbed = common.perturbed_images(data["val"][0], "val", 0)
    assert torch.equal(images, perturbed) and torch.equal(labels, data["val"][1])
    assert not torch.equal(images, common.as_float(data["val"][0]))
    assert (eps, step_size, steps) == (8 / 255, 2 / 255, 20)


def test_question_6_is_scored_on_validation_images(monkeypatch):
    data, recipe = helpers.tiny_data(), helpers.tiny_recipe()
    evaluate = evaluated(
        monkeypatch, lambda: q6_angular.train_embedding(None, None, data, recipe, None, False)
    )
    seen = []
    original = q6_angular.embed
    monkeypatch.setattr(
        q6_angular, "embed", lambda model, images: seen.append(images) or original(model, images)
    )
    evaluate(common.resnet18(128, "imagenet"))
    assert torch.equal(seen[0], common.as_float(data["train"][0]))
    assert torch.equal(seen[1], common.as_float(data["val"][0]))


def test_all_questions_measure_on_the_test_part_and_on_its_perturbed_version(monkeypatch):
    seen = []
    monkeypatch.setattr(common, "robustness", noting(seen))
    test = helpers.tiny_data()["test"]
    args = SimpleNamespace(seed=5, precision="bfloat16")
    with pytest.raises(Noted):
        common.measured_on_test(common.resnet18(10, "imagenet"), test, args)
    model, exact, images, perturbed, labels, seed, losses, _ = seen[0]
    assert losses == (common.summed_cross_entropy, common.summed_margin)
    assert (model.precision, exact.precision, seed) == ("bfloat16", "float32", 5)
    assert torch.equal(images, common.as_float(test[0])) and torch.equal(labels, test[1])
    assert torch.equal(perturbed, common.perturbed_images(test[0], "test", 5))


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
    assert common.batch_for(images) < common.batch_for(images.to("meta"))
    monkeypatch.setattr(common, "batch_for", lambda tensor: 17)
    assert torch.equal(common.perturbed_images(images, "test", 0), expected)


# ---- What is warned of -------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch):
    """attack_checks of a constant model for given accuracies; and what it was measured under."""
    noted = {}

    def noise(images, eps, generator):
        noted["noise"] = eps
        return images

    def pgd(model, images, labels, eps, *others):
        noted["unbounded"] = eps
        return [0.0]

    monkeypatch.setattr(common, "random_noise", noise)
    monkeypatch.setattr(common, "pgd_accuracy_by_step", pgd)

    def check(**values):
        model, images = nn.Flatten(), torch.zeros(4, 10, 1, 1)
        labels = torch.zeros(4, dtype=torch.long)
        values = {"clean": 0.9, "fgm": 0.3, "pgd": 0.1, **values}
        arguments = (values, 0, common.summed_cross_entropy, common.most_likely)
        return common.attack_checks(model, model, images, labels, *arguments)[1]

    return check, noted


def test_noise_and_the_unbounded_attack_have_the_size_that_is_said(checked):
    check, noted = checked
    check()
    assert noted == {"noise": 8 / 255, "unbounded": 1.0}


@pytest.mark.parametrize("pgd, warned", [(0.31, True), (0.29, False)])
def test_pgd_that_is_no_stronger_than_fgm_is_warned_of(checked, pgd, warned):
    assert any("is no stronger than FGM" in each for each in checked[0](pgd=pgd)) == warned


def test_the_readme_names_only_commands_that_there_are():
    readme = (helpers.ROOT / "README.md").read_text()
    makefile = (helpers.ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)\b(?!=)", readme)):
        assert f"\n{target}:" in makefile, target
    for script in set(re.findall(r"python ([a-z0-9_/]+\.py)", readme)):
        assert (helpers.ROOT / script).is_file(), script
