"""The published CIFAR-10, for those who have it: CIFAR10_DATA=FOLDER make test"""

import os

import pytest
import torch
from torchvision.datasets import CIFAR10

import common
import helpers

pytestmark = pytest.mark.skipif(
    "CIFAR10_DATA" not in os.environ, reason="CIFAR10_DATA does not name a folder with CIFAR-10"
)


@pytest.fixture(scope="module")
def loaded():
    with pytest.MonkeyPatch.context() as patch:  # other tests may have put synthetic ones there
        for kind, names in helpers.PUBLISHED.items():
            patch.setattr(CIFAR10, kind, names)
        return common.load_cifar10(os.environ["CIFAR10_DATA"])


def test_there_are_60_000_images_and_6_000_of_each_class(loaded):
    images, labels = loaded
    assert images.shape == (60_000, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.bincount(labels).tolist() == [6_000] * 10


def test_the_first_training_image_is_a_frog(loaded):
    assert common.CLASSES[loaded[1][0]] == "frog"


def test_mean_and_spread_are_those_by_which_the_network_normalises(loaded):
    levels = torch.arange(256).double() / 255
    for channel, (mean, spread) in enumerate(
        zip(common.CIFAR10_MEAN, common.CIFAR10_STD, strict=True)
    ):
        pixels = loaded[0][: common.NUM_OFFICIAL_TRAIN, channel].flatten()
        share = torch.bincount(pixels, minlength=256).double() / len(pixels)
        assert share @ levels == pytest.approx(mean, abs=5e-5)
        assert (share @ (levels - share @ levels) ** 2).sqrt() == pytest.approx(spread, abs=5e-5)
