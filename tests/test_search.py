"""The search's variants train what they say."""

import pytest
import torch

import common
import helpers
import q2_train_ce
import q4_adv_train
import search


@pytest.mark.parametrize("name", ["q2 twice the decay", "q4 noise 3"])
def test_a_variant_is_trained_and_measured_with_its_mean(tmp_path, monkeypatch, name):
    data = helpers.tiny_data()
    data = {part: (images[:20], labels[:20]) for part, (images, labels) in data.items()}
    monkeypatch.setattr(search, "ATTACKED", 10)
    first = common.resnet18(10, "imagenet")
    monkeypatch.setattr(common, "require_model", lambda args, split: {"model": first})
    args = helpers.tiny_args(results=tmp_path)
    recipe = search.recipe_of(name, "imagenet", args, {"sha256": "tiny"})
    recipe |= {"epochs": 1, "batch_size": 20, "lr": 1e-4}
    models = search.trained(name, recipe, args, {"sha256": "tiny"}, data)
    assert list(models) == ["", ", mean of the last fifth"]
    for model in models.values():
        assert not model.training
        shares, number = search.measured(common.frozen(model), data["val"], 0)
        assert number == 10 and len(shares) == 5 and all(0 <= share <= 1 for share in shares)


STEPS = dict.fromkeys(step for _, step, _ in search.VARIANTS.values())


@pytest.mark.parametrize("step", STEPS)
def test_every_step_gives_a_loss_that_trains(step):
    torch.manual_seed(0)
    model = common.resnet18(10, "imagenet")
    images, labels = (part[:20] for part in helpers.tiny_data()["train"])
    generator = torch.Generator().manual_seed(0)
    loss, correct = step(model, images, labels, generator, helpers.tiny_recipe())
    loss.backward()
    assert 0.1 < loss.item() < 100 and 0 <= correct <= 20
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize("name", search.VARIANTS)
def test_the_recipe_of_a_variant_is_the_scripts_own_but_for_its_changes(name):
    args = helpers.tiny_args(quick=False, epochs=77)
    module = q2_train_ce if name.startswith("q2") else q4_adv_train
    for stem, row in module.RECIPES.items():
        expected = {**common.OPTIMIZER, **row, "stem": stem, "epochs": 77, "variant": name}
        expected |= search.VARIANTS[name][0]
        found = search.recipe_of(name, stem, args, {"sha256": "tiny"})
        assert {key: found[key] for key in expected} == expected


def test_a_whitened_first_layer_gives_uncorrelated_numbers():
    torch.manual_seed(0)
    images = (255 * torch.rand(500, 3, 8, 8).cumsum(3) / 8).byte()  # neighbours are alike
    model = common.resnet18(10, "cifar")
    search.whiten_first_layer(model, images)
    weight = model.backbone.conv1.weight
    normalised = (common.as_float(images) - model.mean) / model.std
    patches = torch.nn.functional.unfold(normalised, 3, stride=3).transpose(1, 2).flatten(0, 1)
    numbers = patches @ weight[:27].flatten(1).T
    products = numbers.T @ numbers / len(numbers)
    assert (products - products.diag().diag()).abs().max() < 1e-3
    assert not weight.requires_grad


def test_perturbed_weights_are_put_back():
    model = common.resnet18(10, "imagenet")
    before = [weight.detach().clone() for weight in model.parameters()]
    images, labels = (part[:20] for part in helpers.tiny_data()["train"])
    generator = torch.Generator().manual_seed(0)
    search.adversarial_weights(model, images, labels, generator, helpers.tiny_recipe())
    for weight, kept in zip(model.parameters(), before, strict=True):
        assert torch.allclose(weight, kept, atol=1e-6)


def test_centralised_gradients_have_mean_0():
    model = common.resnet18(10, "imagenet")
    search.centralise_gradients(model, None)
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    gradient = model.backbone.layer1[0].conv1.weight.grad
    assert gradient.abs().max() > 0
    assert gradient.mean((1, 2, 3)).abs().max() < 1e-6 * gradient.abs().max()
