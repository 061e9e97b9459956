"""What a GPU would refuse, wait for or round, shown without one."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import helpers
import q2_train_ce
import q4_adv_train
import q6_angular

COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class OneDevicePerOperation(TorchDispatchMode):
    """Fail where an operation takes tensors of two devices; numbers (no dimensions) may go along.

    That forbids copies from the CPU, too: a GPU waits for one that does not go through common.send.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        given = tensors_of((args, kwargs))
        if operation.overloadpacket in COPIES:
            given += tensors_of(found)
        devices = {tensor.device for tensor in given if tensor.dim()}
        assert len(devices) < 2, f"{operation} takes tensors of {devices}"
        return found


class NoTensorsFromNumbers(TorchFunctionMode):
    """Fail where numbers in main memory become a tensor elsewhere, which is a copy, too."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device = torch.device((kwargs or {}).get("device") or "cpu")
        assert function is not torch.tensor or device.type == "cpu", "numbers are copied to a GPU"
        return function(*args, **(kwargs or {}))


class NoFloat64(TorchDispatchMode):
    """Fail where an operation gives float64, which Apple's GPUs lack."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        doubles = [tensor for tensor in tensors_of(found) if tensor.dtype == torch.float64]
        assert not any(tensor.dim() for tensor in doubles), operation  # numbers stay on the CPU
        return found


def network(device="cpu", precision="float32"):
    torch.manual_seed(0)
    model = common.resnet18(10, "imagenet").to(device)
    model.precision = precision
    return model


# ---- Copies and waits ---------------------------------------------------------------------------

FAR_NETWORK = network("meta")
FAR_LABELS = torch.empty(20, dtype=torch.long, device="meta")
PREPARATIONS = {
    "crop and flip": common.crop_and_flip,
    "cutout": lambda images, generator: q2_train_ce.cut_out(images, 12, generator),
    "perturb": common.perturb,
    "noise": lambda images, generator: common.random_noise(images, 0.1, generator),
    "attack": lambda images, generator: q4_adv_train.n_fgsm(
        FAR_NETWORK, images, FAR_LABELS, 0.1, 2, generator
    ),
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_training_images_are_made_on_their_device_without_waiting_for_it(monkeypatch, name):
    """The meta device's numbers cannot be read back at all."""
    monkeypatch.setattr(common, "send", lambda *given: torch.empty_like(given[0], device=given[1]))
    images = torch.empty(20, 3, 32, 32, device="meta")
    with NoTensorsFromNumbers(), OneDevicePerOperation():
        made = PREPARATIONS[name](images, torch.Generator().manual_seed(0))
    assert made.device == images.device and made.shape == images.shape


# ---- float64 ------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """The data of a training that has one step, and whose state is not written."""
    monkeypatch.setattr(common, "write_torch", lambda *arguments: None)
    return {
        name: (images[:20], labels[:20]) for name, (images, labels) in helpers.tiny_data().items()
    }


@pytest.fixture(scope="module")
def parts():
    """Images, their perturbed versions and labels of a tiny test part."""
    images, labels = (part[:10] for part in helpers.tiny_data()["test"])
    return common.as_float(images), common.perturbed_images(images, "test", 0), labels


TRAININGS = {
    "q2": lambda *given: q2_train_ce.train_classifier(*given, True),
    "q4": lambda *given: q4_adv_train.train_variant(
        network(), q4_adv_train.step_on_attacked, *given, True
    ),
    "q6": lambda *given: q6_angular.train_embedding(
        network(), q6_angular.training_step, *given, True
    ),
}


@pytest.mark.parametrize("question", TRAININGS)
def test_training_needs_no_float64(few, tmp_path, question):
    recipe = helpers.tiny_recipe(epochs=1, batch_size=20)
    with NoFloat64():
        TRAININGS[question](few, recipe, {"code_sha256": ""}, tmp_path / "model.pt")


def test_evaluation_and_attacks_need_no_float64(parts):
    images, perturbed, labels = parts
    model = common.Network(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 512)), 10)
    train = F.normalize(torch.randn(60, 10)), torch.arange(60) % 10
    losses, decide = q6_angular.attacked_losses(*train), q6_angular.knn_decision(*train)
    with NoFloat64():
        common.robustness(model, images, perturbed, labels, 0, "float32", losses, decide)
        common.backbone_features(network().eval(), images)


# ---- bfloat16 and TF32 --------------------------------------------------------------------------


def test_perturb_is_the_same_inside_a_callers_autocast(parts):
    images = parts[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = common.perturb(images, torch.Generator().manual_seed(0))
    assert torch.equal(found, common.perturb(images, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "step",
    [q2_train_ce.training_step, q4_adv_train.step_on_attacked, q6_angular.training_step],
)
def test_a_step_in_bfloat16_has_float32_outputs_loss_and_gradients(step):
    images, labels = helpers.tiny_data()["val"][0][:8], torch.arange(8) % 2
    model, generator = network(precision="bfloat16"), torch.Generator().manual_seed(0)
    inside, given = [], []
    model.backbone.layer1.register_forward_hook(lambda *call: inside.append(call[2].dtype))
    model.register_forward_hook(lambda *call: given.append(call[2].dtype))
    loss, _ = step(model, images, labels, generator, helpers.tiny_recipe())
    loss.backward()
    assert set(inside) == {torch.bfloat16} and set(given) == {torch.float32}
    assert loss.dtype == torch.float32
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())


def test_float32_is_not_tf32_once_the_flags_are_read(monkeypatch, tmp_path):
    before = torch.backends.fp32_precision
    monkeypatch.setattr("sys.argv", ["script.py", "--results", str(tmp_path)])
    try:
        for backend in (torch.backends, torch.backends.cudnn.conv):
            backend.fp32_precision = "tf32"
        common.parse_arguments(common.argument_parser("A script."))
        for backend in (torch.backends.cudnn.conv, torch.backends.cuda.matmul):
            assert backend.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


# ---- On a GPU -----------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@contextlib.contextmanager
def no_waiting():
    """PyTorch raises where the processor would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_tf32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@on_gpu
@pytest.mark.parametrize("name", [name for name in PREPARATIONS if name != "attack"])
def test_a_gpu_makes_the_training_images_of_the_cpu_without_being_waited_for(name):
    images = common.as_float(helpers.tiny_data()["train"][0])
    expected = PREPARATIONS[name](images, torch.Generator().manual_seed(0))
    there = images.cuda()
    with no_waiting():
        found = PREPARATIONS[name](there, torch.Generator().manual_seed(0))
    near = (found.cpu() - expected).abs() <= 1e-5
    assert near.double().mean() > 0.99  # rounding may choose another pixel as the nearest


@on_gpu
@pytest.mark.parametrize(
    "step",
    [q2_train_ce.training_step, q4_adv_train.step_on_perturbed, q4_adv_train.step_on_attacked],
)
def test_a_gpu_is_not_waited_for_in_training(step):
    precision = common.best_precision("cuda")
    model = network("cuda", precision).train()
    recipe = helpers.tiny_recipe(device="cuda", precision=precision, trivial_augment=False)
    optimizer = common.optimizer_for(model, recipe)
    images, labels = (part.cuda() for part in helpers.tiny_data()["train"])
    generator = torch.Generator().manual_seed(0)

    def train():
        loss, _ = step(model, images, labels, generator, recipe)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    train()  # prepares the GPU
    with no_waiting():
        train()
        loss = train()
    assert loss.isfinite()


@on_gpu
def test_a_gpu_attacks_as_the_cpu_does(parts, no_tf32):
    images, _, labels = parts
    here = common.frozen(network()), images, labels
    there = common.frozen(network("cuda")), images.cuda(), labels.cuda()
    expected, found = (common.fgm(*given, 8 / 255).cpu() for given in (here, there))
    assert ((found - expected).abs() < 1e-5).double().mean() > 0.99  # where a gradient is almost 0
    expected, found = (common.pgd(*given, 8 / 255, 2 / 255, 5)[1].cpu() for given in (here, there))
    assert (found != expected).sum() <= 1
