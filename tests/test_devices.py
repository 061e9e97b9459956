"""What a GPU would refuse or have to wait for, shown without one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import q2_train_ce
import q4_adv_train


COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)


class OneDevicePerOperation(TorchDispatchMode):
    """Fail where an operation other than a copy takes tensors of two devices; numbers (no dimensions) may go along."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        devices = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()}
        assert len(devices) < 2 or operation.overloadpacket in COPIES, f"{operation} takes tensors of {devices}"
        return operation(*args, **(kwargs or {}))


def network():
    return common.resnet18(10, "imagenet").to("meta")


@pytest.mark.parametrize("prepare", [
    lambda images, labels, generator: common.crop_and_flip(images, generator),
    lambda images, labels, generator: q2_train_ce.trivial_augment(images.to(torch.uint8), generator),
    lambda images, labels, generator: q2_train_ce.cut_out(images, generator),
    lambda images, labels, generator: q2_train_ce.cut_and_mix(images, labels, generator)[0],
    lambda images, labels, generator: q4_adv_train.perturb_only(None, images, labels, None, generator),
    lambda images, labels, generator: q4_adv_train.perturb_and_attack(network(), images, labels, 2, generator),
], ids=["crop and flip", "trivial augment", "cutout", "cutmix", "perturb", "perturb and attack"])
def test_training_images_are_made_on_their_device_without_waiting_for_it(prepare):
    images = torch.empty(20, 3, 32, 32, device="meta")  # a device whose numbers cannot be read back at all
    labels = torch.empty(20, dtype=torch.long, device="meta")
    with OneDevicePerOperation():
        made = prepare(images, labels, torch.Generator().manual_seed(0))
    assert made.device == images.device and made.shape == images.shape
