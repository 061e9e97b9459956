"""The search's variants train what they say."""

import pytest
import torch

import common
import helpers
import q2_train_ce
import q4_adv_train
from tools import search

SPLIT = {"sha256": "tiny"}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return common.resnet18(10, "imagenet")


@pytest.fixture(scope="module")
def batch():
    """Ten images and their labels."""
    return [part[:10] for part in helpers.tiny_data()["train"]]


@pytest.mark.parametrize("name", ["q2 twice the decay", "q4 noise 3"])
def test_a_variant_is_trained_and_measured_with_its_mean(tmp_path, monkeypatch, model, batch, name):
    data, args = {"train": batch, "val": batch}, helpers.tiny_args(results=tmp_path)
    monkeypatch.setattr(search, "ATTACKED", 5)
    checkpoint = {"model": model, "stem": "imagenet"}
    monkeypatch.setattr(common, "read_checkpoint", lambda path, split: checkpoint)
    monkeypatch.setattr(common, "write_torch", lambda *arguments: None)
    recipe = search.recipe_of(name, "imagenet", args, SPLIT)
    recipe |= {"epochs": 1, "batch_size": 10, "lr": 1e-4}
    models = search.trained(name, recipe, {"code_sha256": ""}, args, SPLIT, data)
    assert list(models) == ["", ", mean of the last fifth"]
    for trained in models.values():
        assert not trained.training
        shares = search.measured(common.frozen(trained), data["val"], 0)
        assert len(shares) == 5 and all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("step", dict.fromkeys(step for _, step, _ in search.VARIANTS.values()))
def test_every_step_gives_a_loss_that_trains(model, batch, step):
    generator = torch.Generator().manual_seed(0)
    loss, correct = step(model, *batch, generator, helpers.tiny_recipe())
    loss.backward()
    assert 0.1 < loss.item() < 100 and 0 <= correct <= 10
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize("name", search.VARIANTS)
def test_the_recipe_of_a_variant_is_the_scripts_own_but_for_its_changes(name):
    args = helpers.tiny_args(quick=False, epochs=77)
    module = q2_train_ce if name.startswith("q2") else q4_adv_train
    for stem, row in module.RECIPES.items():
        expected = {**common.OPTIMIZER, **row, "stem": stem, "epochs": 77, "variant": name}
        expected |= search.VARIANTS[name][0]
        assert search.recipe_of(name, stem, args, SPLIT).items() >= expected.items()


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


def test_perturbed_weights_are_put_back(model, batch):
    before = [weight.detach().clone() for weight in model.parameters()]
    generator = torch.Generator().manual_seed(0)
    search.adversarial_weights(model, *batch, generator, helpers.tiny_recipe())
    for weight, kept in zip(model.parameters(), before, strict=True):
        assert torch.allclose(weight, kept, atol=1e-6)


def test_centralised_gradients_have_mean_0(model):
    search.centralise_gradients(model, None)
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    gradient = model.backbone.layer1[0].conv1.weight.grad
    assert gradient.abs().max() > 0
    assert gradient.mean((1, 2, 3)).abs().max() < 1e-6 * gradient.abs().max()
