"""Our attacks against four libraries that others rely on.

pip install -r tests/requirements-peers.txt brings them.
"""

import numpy as np
import pytest
import torch
from torch import nn

import common

# Norm, eps, step size and number of steps; one step of size eps is FGM.
THREATS = {
    "FGM linf": ("linf", 8 / 255, 8 / 255, 1),
    "FGM l2": ("l2", 0.5, 0.5, 1),
    "PGD linf": ("linf", 8 / 255, 2 / 255, 10),
    "PGD l2": ("l2", 0.5, 0.1, 10),
}


def by_art(model, images, labels, norm, eps, step_size, steps):
    pytest.importorskip("art", reason="adversarial-robustness-toolbox is not installed")
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    estimator = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    options = {
        "norm": {"linf": np.inf, "l2": 2}[norm],
        "eps": eps,
        "eps_step": step_size,
        "batch_size": len(images),
    }
    if steps == 1:
        attack = FastGradientMethod(estimator, **options)
    else:
        attack = ProjectedGradientDescentPyTorch(
            estimator, **options, max_iter=steps, num_random_init=0, verbose=False
        )
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


def by_cleverhans(model, images, labels, norm, eps, step_size, steps):
    pytest.importorskip("cleverhans")
    from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent

    bounds = {"clip_min": 0, "clip_max": 1, "y": labels}
    norm = {"linf": np.inf, "l2": 2}[norm]
    if steps == 1:
        return fast_gradient_method(model, images, eps, norm, **bounds).detach()
    settings, options = (eps, step_size, steps, norm), {"rand_init": False, "sanity_checks": False}
    return projected_gradient_descent(model, images, *settings, **bounds, **options).detach()


def by_foolbox(model, images, labels, norm, eps, step_size, steps):
    foolbox = pytest.importorskip("foolbox")
    attacks = {
        "linf": foolbox.attacks.LinfProjectedGradientDescentAttack,
        "l2": foolbox.attacks.L2ProjectedGradientDescentAttack,
    }
    attack = attacks[norm](abs_stepsize=step_size, steps=steps, random_start=False)
    model = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return attack(model, images, labels, epsilons=eps)[1]


def by_torchattacks(model, images, labels, norm, eps, step_size, steps):
    torchattacks = pytest.importorskip("torchattacks")
    if norm == "linf" and steps == 1:
        return torchattacks.FGSM(model, eps=eps)(images, labels)
    attack = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[norm]
    return attack(model, eps=eps, alpha=step_size, steps=steps, random_start=False)(images, labels)


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("by_peer", [by_art, by_cleverhans, by_foolbox, by_torchattacks])
def test_our_attack_and_the_librarys_give_the_same_images(by_peer, threat):
    norm, eps, step_size, steps = THREATS[threat]
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 4, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(512, 10)
    model = nn.Sequential(*layers).eval()
    images, labels = (1.2 * torch.rand(8, 3, 32, 32) - 0.1).clamp(0, 1), torch.arange(8)
    if threat == "PGD l2":
        # Some project before they clip, some after: compared where nothing is clipped.
        images = 0.3 + 0.4 * images
    theirs = by_peer(model, images, labels, norm, eps, step_size, steps)
    ours = common.fgm(model, images, labels, eps, norm)
    if steps > 1:  # all of them, as theirs take: no image counts as fooled
        settings = eps, step_size, steps, norm
        ours, _ = common.pgd(model, images, labels, *settings, decide=lambda output: labels)
    assert (ours - images).abs().max() > 0.4 * eps / (1 if norm == "linf" else 10)
    assert (ours - theirs).abs().max() <= 1e-6
