"""What more than one question needs, in the order in which the questions need it.

    Question 1    the images of CIFAR-10 and their split; random numbers
    Question 2    ResNet-18, evaluation, training, maps and other figures
    Question 3    the perturbation, attacks, accuracy under them
    Question 6    the k-NN vote
    Housekeeping  command line, files, checkpoints, metrics, tables: changes no number

A name means the same everywhere:

    images     float32 N x 3 x 32 x 32 in [0, 1], unless uint8 is said; the network normalises
               inside, so that an attack's epsilon is in pixel units
    labels     int64 N
    generator  a torch.Generator on the CPU: the same numbers on every device
    model      maps images to outputs and can be differentiated; a Network or any other
    loss       loss(model(images), labels): the scalar that an attack raises, a sum over the images
    decide     decide(model(images)): int64 N, the classes that count
    made_by    the command that makes a file, for the error line when it is missing or damaged

Slow imports (torchvision, matplotlib, umap) stand in the functions that need them: `--help` is
instant.
"""

import contextlib
import os
import signal

INTERRUPT = signal.getsignal(signal.SIGINT)
with contextlib.suppress(ValueError):  # raised outside the main thread, where it is not needed
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a quiet end while modules load
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs lack, the CPU does

import argparse
import copy
import glob
import hashlib
import io
import json
import math
import pickle
import platform
import shlex
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

with contextlib.suppress(ValueError, TypeError):
    signal.signal(signal.SIGINT, INTERRUPT)

# ---- Question 1: images, split, random numbers --------------------------------------------------

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUM_IMAGES = 60_000
NUM_OFFICIAL_TRAIN = 50_000  # indices below are torchvision's training file, others its test file
STREAMS = ("perturbed train", "perturbed val", "perturbed test", "noise", "epoch")


def load_cifar10(root):
    """The 60,000 images (uint8) and labels: torchvision's training file in order, then its test.

    Downloads them when `root` holds no `cifar-10-batches-py`. The files are pickles: each is opened
    only after its checksum. Raises UserError for missing data without network or a damaged file.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    folder, batches = Path(root) / CIFAR10.base_folder, []
    try:
        if not folder.exists():
            download_url(CIFAR10.url, root, CIFAR10.filename, CIFAR10.tgz_md5)
            with tarfile.open(folder.with_name(CIFAR10.filename)) as archive:
                archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from 3.10.12
                for member in with_bar(archive, "unpacking"):
                    archive.extract(member, root)
        for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list]:
            content = (folder / name).read_bytes()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
                raise UserError(
                    f"{folder / name} is damaged (wrong MD5); delete {folder} and run "
                    "again to fetch it anew, or give --data a good copy"
                )
            batches.append(pickle.loads(content, encoding="latin1"))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 is not in {root} and cannot be fetched, or cannot be read "
            f"({error}); connect to the network, put {CIFAR10.filename} from any "
            f"mirror into {root}, or give --data the folder that holds "
            f"{CIFAR10.base_folder}, complete"
        ) from error
    images = torch.from_numpy(np.concatenate([batch["data"] for batch in batches]))
    labels = torch.tensor([label for batch in batches for label in batch["labels"]])
    return images.view(-1, 3, 32, 32), labels


def load_split(path, made_by="python q1_split.py"):
    """Question 1's split, read from its file.

    A dict: `train`, `val`, `test` (int64 indices into load_cifar10's images), `protocol`, `seed`,
    `quick`, and `sha256` over all of these, which every later artefact carries. Raises UserError
    when the file is missing, damaged, or its parts are not disjoint.
    """
    with opened(path, made_by) as content, np.load(content, allow_pickle=False) as arrays:
        parts = {name: arrays[name] for name in ("train", "val", "test")}
        how = {name: arrays[name].item() for name in ("protocol", "seed", "quick")}
        indices = np.concatenate(list(parts.values()))
        if not (
            all(part.dtype == np.int64 and len(part) for part in parts.values())
            and indices.ndim == 1
            and indices.min() >= 0
            and indices.max() < NUM_IMAGES
            and len(np.unique(indices)) == len(indices)
            and [type(value) for value in how.values()] == [str, int, bool]
        ):
            raise ValueError("no split into disjoint parts of CIFAR-10")
    digest = sha256(
        *(part.tobytes() for part in parts.values()),
        "{protocol} {seed} {quick}".format(**how).encode(),
    )
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    return {**tensors, **how, "sha256": digest}


def load_data(args):
    """Question 1's split, and a dict from `train`, `val`, `test` to images (uint8) and labels.

    On args.device. Says what the script is about to do. Raises UserError when the split was made in
    the other mode, quick or full.
    """
    path, made_by = args.results / "q1" / "split.npz", script_command("q1", args)
    split = load_split(path, made_by)
    if split["quick"] != args.quick:
        made = "with --quick" if split["quick"] else "without --quick"
        raise UserError(f"{path} was made {made}; run this script so, or first: {made_by}")
    images, labels = load_cifar10(args.data)
    print(f"{args.purpose} ({args.device}, {args.precision}; {one_line(args.results)})", flush=True)
    return split, {
        name: (images[split[name]].to(args.device), labels[split[name]].to(args.device))
        for name in ("train", "val", "test")
    }


def as_float(images):
    """uint8 images in 0..255 as float32 in [0, 1]."""
    return images.float() / 255


def generator_for(seed, stream, number=0):
    """A generator of its own for each use of random numbers: none depends on what ran before.

    stream: one of STREAMS; number: for instance the epoch.
    """
    entropy = np.random.SeedSequence([seed, STREAMS.index(stream), number])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def send(tensor, device):
    """A CPU tensor on the device, without making a GPU wait for the copy."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---- Question 2: the network --------------------------------------------------------------------

STEMS = ("imagenet", "stride2", "cifar")
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # of the official training file, per channel
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CROSS_ENTROPY = "cross-entropy (q2)"  # what tables call question 2's model


class Network(nn.Module):
    """ResNet-18: normalisation, `backbone` (512 numbers an image), linear `head`.

    precision "bfloat16" computes the backbone, and nothing else, in bfloat16: images, features,
    outputs and gradients are float32 all the same.
    """

    def __init__(self, backbone, num_outputs):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(512, num_outputs)
        self.precision = "float32"
        self.register_buffer("mean", torch.tensor(CIFAR10_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CIFAR10_STD).view(1, 3, 1, 1), persistent=False)

    def features(self, images):
        """What the convolutional part ends in: float32 N x 512."""
        # Channels last is the layout in which convolutions run fastest, on a CPU as on a GPU.
        maps = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if self.precision == "float32":
            return self.backbone(maps)
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.backbone(maps).float()

    def forward(self, images):
        return self.head(self.features(images))


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 or 2 and padding 1 as a matrix product: small maps on a CPU.

    The same function of the same weights. Where one pixel comes out, the weights that would meet
    only padding are left out. Where 2 x 2 come out, training goes by im2col: without AVX-512,
    PyTorch's library takes the weights' gradient image by image, slow where images are small.
    """

    def forward(self, maps):
        side, stride = maps.shape[-1], self.stride[0]
        if maps.device.type != "cpu" or side > (2 * stride if self.training else stride):
            return super().forward(maps)
        if side <= stride:
            met = self.weight[:, :, 1 : 1 + side, 1 : 1 + side]
            return F.linear(maps.flatten(1), met.flatten(1), self.bias)[:, :, None, None]
        padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # N x H x W x C, as in memory
        taps = [
            padded[:, top : top + side : stride, left : left + side : stride]
            for top in range(3)
            for left in range(3)
        ]
        weights = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(torch.cat(taps, dim=3), weights, self.bias).permute(0, 3, 1, 2)


def resnet18(num_outputs, stem):
    """ResNet-18 (He et al. 2016), a Network with random weights from torch's global generator.

    stem "imagenet" is torchvision's network unchanged: a 7x7 convolution of stride 2, a max-pool,
    which leave the first stage an 8 x 8 map of an image. "cifar" has a 3x3 convolution of stride 1
    and no max-pool (32 x 32, the usual CIFAR network, 15 times the work), "stride2" a 3x3
    convolution of stride 2 and no max-pool (16 x 16, a quarter of the work of "cifar").
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    backbone = torchvision_resnet18()
    backbone.fc = nn.Identity()
    if stem != "imagenet":
        stride = {"stride2": 2, "cifar": 1}[stem]
        backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        small = {"imagenet": ("layer3", "layer4"), "stride2": ("layer4",), "cifar": ()}[stem]
        for block in (block for stage in small for block in getattr(backbone, stage)):
            for name in ("conv1", "conv2"):
                conv = getattr(block, name)
                fast = Conv3x3(
                    conv.in_channels,
                    conv.out_channels,
                    3,
                    conv.stride,
                    padding=1,
                    bias=False,
                    device="meta",
                )  # where it draws no random numbers
                fast.weight = conv.weight
                setattr(block, name, fast)
    return Network(backbone, num_outputs).to(memory_format=torch.channels_last)


def frozen(model, precision="float32"):
    """A copy of a Network for evaluation and attacks, without gradients for the weights.

    Each batch-norm is folded into the convolution before it, which saves a pass over every map.
    precision "bfloat16" is twice as fast where the processor has instructions for it.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        children = list(module.named_children())
        for (name, conv), (next_name, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(conv, norm))
                setattr(module, next_name, nn.Identity())
    model.backbone.to(getattr(torch, precision))
    model.precision = precision
    return model.to(memory_format=torch.channels_last)


# ---- Question 2: evaluation ---------------------------------------------------------------------

EVALUATION_BATCH = 250  # fits a processor's cache better than more, and its memory
GPU_BATCH = 1_000  # so that a GPU has enough to do


def in_batches(function, inputs, size=None):
    """`function` over a tensor in batches, without gradients; its results concatenated."""
    with torch.no_grad():
        return torch.cat([function(batch) for batch in inputs.split(size or batch_for(inputs))])


def batch_for(tensor):
    """How many images to evaluate or attack at once where this tensor is."""
    return EVALUATION_BATCH if tensor.device.type == "cpu" else GPU_BATCH


def predict(model, images):
    """Most likely class of each image, int64 N."""
    return in_batches(lambda batch: model(batch).argmax(1), images)


def accuracy(predicted, labels):
    """Share of equal entries, as a float."""
    return (predicted == labels).sum().item() / len(labels)


def backbone_features(model, images):
    """The 512 numbers per image that a Network's convolutional part ends in: float32 N x 512."""
    return in_batches(model.features, images)


def validation_scores(model, images, labels):
    """Loss and accuracy of a `frozen` classifier, to be noted after an epoch: dict of floats."""
    logits = in_batches(model, images)
    return {
        "val_loss": F.cross_entropy(logits, labels).item(),
        "val_accuracy": accuracy(logits.argmax(1), labels),
    }


# ---- Question 2: training -----------------------------------------------------------------------

OPTIMIZER = {
    "optimizer": "sgd",
    "momentum": 0.9,
    "weight_decay": 5e-4,  # of weights only, not of batch-norms and biases
    "warmup": 0.2,  # share of the steps in which the rate rises linearly; then it falls to 0
}
ABSURD = 1e6  # a loss from which no training comes back
VALIDATION_SUBSET = 2_000  # the first validation images (q1 has shuffled them), scored every epoch
STATE_EVERY = 10  # seconds: writing the state takes a good part of a GPU's epoch


def crop_and_flip(images, generator):
    """The usual augmentation: a shift of up to 4 pixels, borders reflected, and a random mirror."""
    number, _, height, width = images.shape
    top, left = torch.randint(0, 9, (2, number, 1), generator=generator)
    mirrored = torch.rand(number, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
    rows, columns = send(rows, images.device), send(columns, images.device)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect").permute(0, 2, 3, 1)
    image = torch.arange(number, device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def loss_and_correct(model, images, labels, recipe):
    """Cross-entropy with smoothed labels, and the number of correct predictions, of a batch."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe["label_smoothing"])
    return loss, (logits.argmax(1) == labels).sum()


def shuffled_batches(labels, batch_size, generator):
    """An epoch in random order: int64 index tensors, without the incomplete last one.

    Raises UserError for a batch of one, which batch-norm cannot use, or of more than all images.
    """
    if not 2 <= batch_size <= len(labels):
        raise UserError(
            f"--batch-size {batch_size}: give one from 2 to {len(labels)}, "
            "the number of training images"
        )
    batches = torch.randperm(len(labels), generator=generator).split(batch_size)
    return [batch for batch in batches if len(batch) == batch_size]


def train(model, data, step, batches, evaluate, recipe, state_file, fresh=False, guard=None):
    """Train `model` in place, resumably, at a one-cycle rate.

    data: images (uint8) and labels of the training part; recipe: see choose_recipe;
    step(model, images, labels, generator, recipe): a batch's differentiable loss and number of
    correct predictions; batches(labels, batch_size, generator): an epoch's index tensors;
    evaluate(model): dict of numbers to note after each epoch; guard: the name of one of them, at
    whose collapse training stops and goes back to the weights of its best epoch (see kept_epoch).
    The whole state goes to `state_file` after the last epoch, and after any other that ends
    STATE_EVERY seconds or more after it was written. A later call goes on from there, unless
    `fresh`, and ends bit for bit where an uninterrupted one does (on the CPU), because an epoch's
    random numbers come from the seed and the epoch alone. Returns one dict per epoch: loss,
    accuracy, seconds and what `evaluate` gave. Raises UserError for a state of another recipe and
    for a loss that is no longer finite.
    """
    model.precision = recipe["precision"]
    optimizer = optimizer_for(model, recipe)
    history, best = ([], None) if fresh else _resume(state_file, model, optimizer, recipe)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    require_room(Path(state_file).parent, 4 * weights)  # with the best ones and the moments
    with only_one(Path(state_file).parent):
        written = time.perf_counter()
        while not _ended(history, recipe, guard):
            epoch, started = len(history), time.perf_counter()
            losses, share = train_epoch(model, optimizer, data, step, batches, recipe, epoch)
            seconds = time.perf_counter() - started
            scores = {
                "loss": losses.mean().item(),
                "accuracy": share,
                "seconds": seconds,
                **evaluate(model),
            }
            _refuse_infinite(losses, scores, epoch, recipe)
            history.append(scores)
            if guard and scores[guard] == max(epoch[guard] for epoch in history):
                best = copy.deepcopy(model.state_dict())
            if _ended(history, recipe, guard) or time.perf_counter() - written >= STATE_EVERY:
                write_torch(
                    state_file,
                    {
                        "recipe": recipe,
                        "history": history,
                        "best": best,
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                    },
                )
                written = time.perf_counter()
            _print_epoch(history, recipe["epochs"], time.perf_counter() - started)
    kept = kept_epoch(history, guard)
    if kept < len(history):
        model.load_state_dict(best)
        print(f"{guard} collapsed in epoch {len(history)}: back to the weights of epoch {kept}")
    model.eval()
    return history


def _print_epoch(history, epochs, seconds):
    """A line with the last epoch's numbers, and how long the others take if they take as long."""
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in history[-1].items())
    left = (epochs - len(history)) * seconds / 60
    print(
        f"epoch {len(history)}/{epochs}  {numbers}  {left:.0f} min left",
        file=sys.stderr,
        flush=True,
    )


def _ended(history, recipe, guard):
    """Whether all epochs are done, or the guarded score has collapsed."""
    return len(history) >= recipe["epochs"] or kept_epoch(history, guard) < len(history)


def kept_epoch(history, guard):
    """Number of the epoch whose weights training ends with: the last, or the best by `guard`.

    The best, where the guarded score has fallen below half of its best, and that was above a tenth.
    """
    scores = [epoch[guard] for epoch in history] if guard else []
    if scores and max(scores) > 0.1 and scores[-1] < max(scores) / 2:
        return len(scores) - scores[::-1].index(max(scores))
    return len(history)


def train_epoch(model, optimizer, data, step, batches, recipe, epoch):
    """One pass over the images; see `train`. Returns all losses and the accuracy on the way."""
    images, labels = data
    generator = generator_for(recipe["seed"], "epoch", epoch)
    indices = batches(labels, recipe["batch_size"], generator)
    losses, correct, seen = [], 0, 0
    model.train()
    for number, batch in enumerate(with_bar(indices, f"epoch {epoch + 1}/{recipe['epochs']}")):
        progress = (epoch + number / len(indices)) / recipe["epochs"]
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * one_cycle(progress, recipe["warmup"])
        batch = send(batch, images.device)
        loss, right = step(model, images[batch], labels[batch], generator, recipe)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # Tensors are collected, not numbers: reading one would make a GPU wait at every step.
        losses.append(loss.detach())
        correct, seen = correct + right, seen + len(batch)
    return torch.stack(losses).cpu(), float(correct) / seen


def optimizer_for(model, recipe):
    """SGD with Nesterov momentum, or AdamW; only weights decay, batch-norms and biases do not."""
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": recipe["weight_decay"]},
        {"params": others, "weight_decay": 0.0},
    ]
    fused, momentum = recipe["device"] != "mps", recipe["momentum"]
    if recipe["optimizer"] == "adamw":
        return torch.optim.AdamW(groups, recipe["lr"], betas=(momentum, 0.999), fused=fused)
    return torch.optim.SGD(groups, recipe["lr"], momentum, nesterov=True, fused=fused)


def one_cycle(progress, warmup):
    """Factor of the peak rate at `progress` in [0, 1]: linearly up, then linearly down to 0."""
    return progress / warmup if progress < warmup else (1 - progress) / (1 - warmup)


def _refuse_infinite(losses, scores, epoch, recipe):
    wrong = [
        f"the loss became {loss} in epoch {epoch + 1}, step {step}"
        for step, loss in enumerate(losses.tolist(), start=1)
        if not abs(loss) < ABSURD
    ]
    wrong += [
        f"{name} became {value} at the end of epoch {epoch + 1}"
        for name, value in scores.items()
        if not abs(value) < ABSURD
    ]
    if wrong:
        raise UserError(
            f"{wrong[0]}; lower the peak learning rate, now {recipe['lr']:g}, "
            "and start over with --fresh"
        )


def _resume(state_file, model, optimizer, recipe):
    """History and best weights in the state file, whose rest goes to model and optimizer."""
    if not Path(state_file).exists():
        return [], None
    with opened(state_file, "the same command with --fresh") as content:
        state = load_torch(content)
        before = state["recipe"]
        changed = [
            f"{key} {before.get(key)!r}, now {recipe.get(key)!r}"
            for key in sorted({*before, *recipe})
            if before.get(key) != recipe.get(key)
        ]
        if changed:
            raise UserError(
                f"{state_file} was made with other settings ({'; '.join(changed)}); "
                "use those again, or start over with --fresh"
            )
        refuse_unlike(state["model"], model.state_dict())
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for weight, kept in optimizer.state.items():  # it would write past a smaller one
            if any(value.shape not in ((), weight.shape) for value in kept.values()):
                raise ValueError("momentum of another shape")
        history, best = [dict(epoch) for epoch in state["history"]], state["best"]
        if not all(math.isfinite(value) for epoch in history for value in epoch.values()):
            raise ValueError("a history that is not finite")
    print(f"Going on after epoch {len(history)} from {one_line(state_file)}", file=sys.stderr)
    return history, best


# ---- Question 2: maps and other figures ---------------------------------------------------------

DPI = 150
UMAP_NEIGHBOURS = 15


def fit_umap(features, seed):
    """A map of the features by UMAP (McInnes et al. 2018), fitted on them alone, without labels.

    features float32 N x D. Returns its points, an array float32 N x 2, and a function that places
    other features in it: M x D to M x 2. The same features and seed give the same map on the same
    machine. UMAP is given the exact neighbours, since compiling its own search for them takes
    longer than everything else.
    """
    _let_numba_cache()
    if len(features) <= UMAP_NEIGHBOURS or not features.isfinite().all():
        raise ValueError(f"a map needs more than {UMAP_NEIGHBOURS} points, all of them finite")
    from umap import UMAP

    search, array = _ExactSearch(features), features.cpu().numpy()
    indices, distances = search.query(array, UMAP_NEIGHBOURS)
    indices[:, 0], distances[:, 0] = np.arange(len(features)), 0  # also where features are equal
    reducer = UMAP(
        n_neighbors=UMAP_NEIGHBOURS,
        min_dist=0.1,
        random_state=seed,
        n_jobs=1,
        precomputed_knn=(indices, distances, search),
    )
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the search is none of its own
        reducer.fit(array)
    torch.set_num_threads(threads)  # UMAP's compiler gives OpenMP, which both use, all processors
    return reducer.embedding_, lambda others: reducer.transform(others.cpu().numpy())


class _ExactSearch:
    """Finds neighbours among the features, in the place of UMAP's search, which approximates."""

    _angular_trees = False

    def __init__(self, features):
        self.features = features

    def query(self, points, k, epsilon=None):
        points = torch.from_numpy(points).to(self.features.device)
        distances, indices = nearest_neighbours(points, k, self.features)
        return indices.int().cpu().numpy(), distances.cpu().numpy()


def _let_numba_cache():
    """Let UMAP's compiler keep what takes longest, in a temporary folder if there is no other."""
    import importlib.util

    places = Path(importlib.util.find_spec("umap").origin).parent, Path.home()
    if not any(os.access(place, os.W_OK) for place in places):
        os.environ.setdefault("NUMBA_CACHE_DIR", tempfile.mkdtemp(prefix="numba-"))
    from umap import umap_

    for function in (umap_.smooth_knn_dist, umap_.compute_membership_strengths):
        function.enable_caching()


def save_figure(figure, path):
    """Write a matplotlib figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png", bbox_inches="tight")
    write_file(path, buffer.getvalue())


def plot_lines(path, x, lines, xlabel, ylabel):
    """Lines over a common x. lines: dict from label to as many numbers as x has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for label, values in lines.items():
        axes.plot(x, values, marker="." if len(values) < 30 else None, label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def plot_history(path, history, names, ylabel, xlabel="epoch"):
    """Curves over the epochs of what `train` returns. names: dict from its keys to labels."""
    lines = {label: [epoch[key] for epoch in history] for key, label in names.items()}
    plot_lines(path, range(1, len(history) + 1), lines, xlabel, ylabel)


def plot_maps(path, panels, limits_of):
    """Scatter plots of 2-D maps side by side, a colour per class, with the extent of `limits_of`.

    panels: dict from title to (points N x 2, labels); limits_of: points M x 2, the training map.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(panels), 6))
    low, high = limits_of.min(0), limits_of.max(0)
    (left, bottom), (right, top) = low - 0.08 * (high - low), high + 0.08 * (high - low)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, (points, labels)) in zip(grid, panels.items(), strict=True):
        drawn = axes.scatter(
            *points.T,
            c=labels.cpu(),
            cmap="tab10",
            vmin=-0.5,
            vmax=9.5,
            s=2,
            alpha=0.5,
            linewidths=0,
        )
        axes.set(title=title, xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
    handles, _ = drawn.legend_elements(num=range(10))
    figure.legend(handles, CLASSES, loc="outside lower center", ncols=5)
    save_figure(figure, path)


# ---- Question 3: the perturbation ---------------------------------------------------------------

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}  # as in MoCo v2
MAX_ROTATION = 5.0  # degrees
NUM_PIXELS = 10  # of the 32 x 32, in each of which one random channel becomes 1


def perturb(images, generator):
    """The assignment's perturbation: colour jitter, a small rotation, ten pixels, one channel full.

    Every image draws its own values, from the distributions of torchvision's ColorJitter (the order
    of its four steps included) and RandomRotation (nearest neighbour, black corners).
    """
    jitter, angles, full = draw_perturbation(len(images), images[0, 0].numel(), generator)
    return set_to_full(rotate(color_jitter(images, *jitter), angles), *full)


def draw_perturbation(number, pixels_per_image, generator):
    """What `perturb` draws for so many images, as arguments of its three parts.

    (factors, order) for color_jitter, angles for rotate, (channels, pixels) for set_to_full.
    """
    low = {name: -size if name == "hue" else 1 - size for name, size in JITTER.items()}
    factors = {
        name: torch.empty(number).uniform_(
            low[name], low[name] + 2 * JITTER[name], generator=generator
        )
        for name in JITTER
    }
    order = torch.rand(number, 4, generator=generator).argsort(1)
    angles = torch.empty(number).uniform_(-MAX_ROTATION, MAX_ROTATION, generator=generator)
    pixels = torch.rand(number, pixels_per_image, generator=generator).topk(NUM_PIXELS).indices
    channels = torch.randint(0, 3, (number, NUM_PIXELS), generator=generator)
    return (factors, order), angles, (channels, pixels)


def perturbed_images(images, part, seed):
    """The uint8 images of "train", "val" or "test" perturbed, the same way in every question.

    In batches of one size on every device, since a batch draws its numbers together.
    """
    generator = generator_for(seed, f"perturbed {part}")
    return in_batches(lambda batch: perturb(as_float(batch), generator), images, EVALUATION_BATCH)


def color_jitter(images, factors, order):
    """Brightness, contrast, saturation and hue of each image by its own factors, in its own order.

    On the CPU: factors, dict of four float N tensors in the sense of torchvision's adjust_*, and
    order, int64 N x 4, each row a permutation of 0..3, the positions in JITTER.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    for step in range(4):
        for kind, name in enumerate(JITTER):
            chosen = (order[:, step] == kind).nonzero()[:, 0]
            factor = send(factors[name][chosen].view(-1, 1, 1, 1), images.device)
            chosen = send(chosen, images.device)
            changed = adjust_color(name, images.index_select(0, chosen), factor)
            images.index_copy_(0, chosen, changed)
    return images


def adjust_color(name, images, factor):
    """torchvision's adjust_brightness, adjust_contrast and so on, with a factor N x 1 x 1 x 1."""
    red, green, blue = images.split(1, dim=1)
    if name == "brightness":
        return (factor * images).clamp_(0, 1)
    if name == "hue":  # to HSV, a turn by `factor` of a circle, back by HSV's closed formula
        value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
        chroma = value - low
        divisor = torch.where(chroma == 0, 1.0, chroma)
        sector = torch.where(
            value == red,
            (green - blue) / divisor,
            torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
        )
        k = torch.cat([5 + sector, 3 + sector, 1 + sector], dim=1) + 6 * factor
        k -= 6 * (k / 6).floor()  # k % 6, which takes several times as long
        return (value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)).clamp_(0, 1)
    grey = 0.2989 * red + 0.587 * green + 0.114 * blue
    if name == "contrast":
        grey = grey.mean((1, 2, 3), keepdim=True)
    return torch.lerp(grey, images, factor).clamp_(0, 1)


def rotate(images, degrees):
    """Rotate each image about its centre by its own angle (float N on the CPU, counter-clockwise).

    Nearest neighbour, black outside. The coordinates are made without a matrix product, which a
    caller's autocast would round to bfloat16.
    """
    height, width = images.shape[2:]
    radians = send(degrees * math.pi / 180, images.device).view(-1, 1, 1)
    cosine, sine = radians.cos(), radians.sin()
    x = (2 * torch.arange(width, device=images.device) + 1).view(1, 1, -1) / width - 1
    y = (2 * torch.arange(height, device=images.device) + 1).view(1, -1, 1) / height - 1
    grid = torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=3)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def set_to_full(images, channels, pixels):
    """Set channels[n, i] of the pixel pixels[n, i] (row * width + column) of image n to 1."""
    index = send(channels * images[0, 0].numel() + pixels, images.device)
    return images.flatten(1).scatter(1, index, 1.0).view_as(images)


# ---- Question 3: attacks ------------------------------------------------------------------------

EPSILON = {"linf": 8 / 255, "l2": 0.5}  # the usual threat models (RobustBench, Croce et al. 2021)
PGD_STEPS = 20
PGD_STEP_SIZE = 2 / 255


def summed_cross_entropy(logits, labels):
    """The loss that attacks on a classifier raise. Summed: no gradient depends on the batch."""
    return F.cross_entropy(logits, labels, reduction="sum")


def summed_margin(logits, labels):
    """By how much the best other class is ahead (Carlini & Wagner 2017), summed over the images."""
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (others.amax(1, keepdim=True) - true).sum()


def most_likely(logits):
    """A classifier's decision."""
    return logits.argmax(1)


def fgm(model, images, labels, eps, norm="linf", loss=summed_cross_entropy):
    """Fast Gradient Method (Goodfellow et al. 2015): one step of length eps up the loss.

    eps in pixel units, norm "linf" or "l2". Returns images within eps of the given ones and in
    [0, 1]; leaves the model's mode and weights alone. Raises ValueError for an unknown norm and for
    more or fewer labels than images.
    """
    return attack(model, images, labels, eps, eps, 1, norm, loss)[0]


def pgd(model, images, labels, eps, step_size, steps, norm="linf", loss=summed_cross_entropy):
    """Projected Gradient Descent (Madry et al. 2018): FGM steps, each projected back to eps.

    It starts at the image itself, not at a random point, and so is deterministic. Else as `fgm`.
    """
    return attack(model, images, labels, eps, step_size, steps, norm, loss)[0]


def attack(
    model,
    images,
    labels,
    eps,
    step_size,
    steps,
    norm="linf",
    loss=summed_cross_entropy,
    decide=None,
):
    """PGD, of which FGM is one step of length eps: adversarial images, and who was fooled when.

    With `decide`, an image is attacked no further once it is misclassified, as in AutoAttack (Croce
    & Hein 2020): sharper than looking at the last step alone, and several times cheaper. Without it
    every image takes every step. The second result is int64 N: after how many steps an image was
    first misclassified, steps + 1 if it never was or nothing decides.
    """
    adversarial, fooled_after = images.detach().clone(), torch.full_like(labels, steps + 1)
    batches = _matching_batches(images.detach(), labels, adversarial, fooled_after)
    for start, target, result, fooled in with_bar(batches, "attack"):
        alive = torch.arange(len(start), device=start.device)
        for step in range(steps + 1 if decide else steps):
            output, gradient = input_gradient(model, result[alive], target[alive], loss)
            if decide:
                right = decide(output) == target[alive]
                fooled[alive[~right]] = step
                alive, gradient = alive[right], gradient[right]
            if step == steps or len(alive) == 0:
                break
            moved = ascend(result[alive], gradient, step_size, norm)
            result[alive] = project(moved, start[alive], eps, norm)
    return adversarial, fooled_after


def input_gradient(model, images, labels, loss=summed_cross_entropy):
    """model(images), and the loss's gradient at the images alone: the weights' are not computed."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        output = model(images)
        return output.detach(), torch.autograd.grad(loss(output, labels), images)[0]


def ascend(images, gradient, length, norm):
    """A step of this length, in the given norm, in the direction in which the loss rises most."""
    if norm == "linf":
        return images + length * gradient.sign()
    if norm == "l2":
        # A sure model's gradients are so small that float32 squares them to 0: to size 1 first.
        largest = gradient.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
        gradient = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        return images + length * (gradient / _l2_norm(gradient).clamp_min(1e-12))
    raise ValueError(f"norm is {norm!r}, not 'linf' or 'l2'")


def project(moved, images, eps, norm):
    """The nearest points to `moved` that lie within eps of `images`, clipped to [0, 1]."""
    if norm == "linf":
        return torch.minimum(torch.maximum(moved, images - eps), images + eps).clamp(0, 1)
    change = moved - images
    return (images + change * (eps / _l2_norm(change).clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)


def _l2_norm(images):
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def under_fgm(function, model, images, labels, loss=summed_cross_entropy):
    """`function` of the images under L-infinity FGM at EPSILON, batch by batch to spare memory."""
    return torch.cat(
        [
            function(fgm(model, batch, target, EPSILON["linf"], loss=loss))
            for batch, target in _matching_batches(images, labels)
        ]
    )


def _matching_batches(*tensors):
    """List of batches of all tensors together; they are views, through which one can write."""
    if len({len(tensor) for tensor in tensors}) > 1:
        raise ValueError(f"{len(tensors[0])} images, but {len(tensors[1])} labels")
    size = batch_for(tensors[0])
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


# ---- Question 3: accuracy under attack ----------------------------------------------------------

CHECKED_IMAGES = 1_000  # on which the checks for a flawed attack are made
CURVE_IMAGES = 1_000  # for the curves over epsilon
CURVE_EPSILONS = [size / 255 for size in (2, 4, 8, 12, 16)]
STRONGEST_IMAGES = 2_000  # which are attacked on more than one loss


def robustness(
    model,
    exact,
    images,
    perturbed,
    labels,
    seed,
    losses=(summed_cross_entropy, summed_margin),
    decide=most_likely,
):
    """A model's accuracy under every test condition, each attack at EPSILON of its norm.

    model and exact: the network, `frozen` in the precision to measure in and, to check that, in
    float32; losses: FGM and PGD raise the first, the strongest attack raises one after the other.
    Returns a dict: `accuracy` (by CONDITIONS; L-infinity), `accuracy_l2` (fgm, perturbed_fgm),
    `pgd_by_step` (see pgd_accuracy_by_step), `by_eps` (accuracy_by_epsilon), `checks`, `warnings`
    (attack_checks).
    """
    attacks, loss = list(EPSILON.items()), losses[0]
    clean, fgm, fgm_l2 = fgm_accuracies(model, images, labels, attacks, loss, decide)
    shifted, both, both_l2 = fgm_accuracies(model, perturbed, labels, attacks, loss, decide)
    by_step = pgd_accuracy_by_step(
        model, images, labels, EPSILON["linf"], PGD_STEP_SIZE, PGD_STEPS, loss, decide
    )
    strongest = strongest_accuracy(
        model, images[:STRONGEST_IMAGES], labels[:STRONGEST_IMAGES], losses, decide
    )
    values = {
        "clean": clean,
        "perturbed": shifted,
        "fgm": fgm,
        "perturbed_fgm": both,
        "pgd": by_step[-1],
        "strongest": strongest,
    }
    checks, warnings = attack_checks(model, exact, images, labels, values, seed, loss, decide)
    by_eps = accuracy_by_epsilon(model, images, labels, loss, decide)
    return {
        "accuracy": values,
        "accuracy_l2": {"fgm": fgm_l2, "perturbed_fgm": both_l2},
        "strongest_images": min(STRONGEST_IMAGES, len(images)),
        "pgd_by_step": by_step,
        "by_eps": by_eps,
        "checks": checks,
        "warnings": warnings,
    }


def measured_on_test(
    network, test, args, losses=(summed_cross_entropy, summed_margin), decide=most_likely
):
    """`robustness` of a Network on the test part: uint8 images and labels."""
    images, perturbed = as_float(test[0]), perturbed_images(test[0], "test", args.seed)
    model, exact = (frozen(network, precision) for precision in (args.precision, "float32"))
    print(
        f"Attacks on {len(images)} images: at most "
        f"{minutes_of_attacks(model, images, test[1], losses[0]):.0f} min",
        flush=True,
    )
    return robustness(model, exact, images, perturbed, test[1], args.seed, losses, decide)


def minutes_of_attacks(model, images, labels, loss):
    """How long `robustness` takes at most, from the time of one batch's gradient."""
    size, times = batch_for(images), []
    for _ in range(3):  # the first one prepares the machine, and another program may disturb one
        started = time.perf_counter()
        input_gradient(model, images[:size], labels[:size], loss)[1].sum().item()
        times.append(time.perf_counter() - started)
    per_image = min(times) / len(images[:size])
    # On all images FGM, worth five gradients, and PGD; on few the other attacks, all of them PGD.
    few = 2 * STRONGEST_IMAGES + 3 * CHECKED_IMAGES + len(CURVE_EPSILONS) * CURVE_IMAGES
    gradients = (5 + PGD_STEPS) * len(images) + PGD_STEPS * min(few, 10 * len(images))
    return per_image * gradients / 60


def fgm_accuracies(model, images, labels, attacks, loss=summed_cross_entropy, decide=most_likely):
    """Accuracy on the images as they are, then under FGM for each (norm, eps) of `attacks`: a list.

    One gradient serves all of them, since its direction does not depend on eps.
    """
    correct = [0] * (1 + len(attacks))
    for batch, target in with_bar(_matching_batches(images, labels), "FGM"):
        output, gradient = input_gradient(model, batch, target, loss)
        correct[0] += (decide(output) == target).sum()
        for number, (norm, eps) in enumerate(attacks, start=1):
            adversarial = project(ascend(batch, gradient, eps, norm), batch, eps, norm)
            with torch.no_grad():
                correct[number] += (decide(model(adversarial)) == target).sum()
    return [count.item() / len(images) for count in correct]


def pgd_accuracy_by_step(
    model, images, labels, eps, step_size, steps, loss=summed_cross_entropy, decide=most_likely
):
    """Share of images that no L-infinity PGD step has fooled after 0, 1, ..., `steps`: a list."""
    _, fooled_after = attack(model, images, labels, eps, step_size, steps, "linf", loss, decide)
    return [(fooled_after > step).sum().item() / len(images) for step in range(steps + 1)]


def accuracy_by_epsilon(model, images, labels, loss, decide):
    """Accuracy on the first CURVE_IMAGES under L-infinity FGM and PGD at 0 and CURVE_EPSILONS.

    PGD's step stays the same share of epsilon. Returns a dict of lists `eps`, `fgm` and `pgd`, and
    `images`, their number.
    """
    images, labels = images[:CURVE_IMAGES], labels[:CURVE_IMAGES]
    attacks = [("linf", eps) for eps in CURVE_EPSILONS]
    fgm = fgm_accuracies(model, images, labels, attacks, loss, decide)
    share = PGD_STEP_SIZE / EPSILON["linf"]
    pgd = [
        pgd_accuracy_by_step(model, images, labels, eps, share * eps, PGD_STEPS, loss, decide)
        for eps in CURVE_EPSILONS
    ]
    return {
        "eps": [0, *CURVE_EPSILONS],
        "fgm": fgm,
        "pgd": [fgm[0], *(by[-1] for by in pgd)],
        "images": len(images),
    }


def strongest_accuracy(model, images, labels, losses, decide):
    """Share of images that PGD in L-infinity at EPSILON fools on none of the losses.

    Each loss attacks what the ones before have left. Cross-entropy alone overstates: its gradient
    vanishes where the model is sure, that of a margin does not (Carlini & Wagner 2017).
    """
    number = len(images)
    for loss in losses:
        _, fooled_after = attack(
            model, images, labels, EPSILON["linf"], PGD_STEP_SIZE, PGD_STEPS, "linf", loss, decide
        )
        images, labels = images[fooled_after > PGD_STEPS], labels[fooled_after > PGD_STEPS]
    return len(images) / number


def attack_checks(model, exact, images, labels, values, seed, loss, decide):
    """Signs that robust accuracy is too good to be true (Athalye et al. 2018; Carlini et al. 2019).

    values: `accuracy` on all images; else as in `robustness`. Returns a dict of accuracies on the
    first CHECKED_IMAGES images: under noise of FGM's size, under PGD with eps = 1, under FGM as
    measured and with gradients of the exact model; and a list of warnings, one sentence each.
    """
    images, labels = images[:CHECKED_IMAGES], labels[:CHECKED_IMAGES]
    noisy = random_noise(images, EPSILON["linf"], generator_for(seed, "noise"))
    noise = accuracy(decide(in_batches(model, noisy)), labels)
    unbounded = pgd_accuracy_by_step(model, images, labels, 1.0, 0.1, PGD_STEPS, loss, decide)[-1]
    linf = [("linf", EPSILON["linf"])]
    measured, in_float32 = (
        fgm_accuracies(network, images, labels, linf, loss, decide)[1] for network in (model, exact)
    )
    fgm, pgd = values["fgm"], values["pgd"]
    signs = [
        (
            pgd > fgm,
            f"PGD ({percent(pgd)}) is no stronger than FGM ({percent(fgm)}): "
            "the gradients may be masked.",
        ),
        (
            fgm - pgd > 0.1 and fgm > 0.5 * values["clean"],
            f"FGM ({percent(fgm)}) is far weaker than PGD ({percent(pgd)}): its accuracy says little "
            "about robustness (catastrophic overfitting looks like this).",
        ),
        (
            noise <= measured,
            f"Random noise (accuracy {percent(noise)}) hurts as much as FGM "
            f"({percent(measured)}) on the same images.",
        ),
        (
            unbounded > 1 / len(CLASSES),
            f"Accuracy is {percent(unbounded)} under PGD with eps = 1, "
            "where none should be above chance.",
        ),
        (
            measured - in_float32 > 0.01,
            f"FGM leaves {percent(measured)}, but {percent(in_float32)} with gradients in float32: "
            "rounding weakens the attack; measure again with --precision float32.",
        ),
    ]
    checks = {
        "noise": noise,
        "pgd_eps_1": unbounded,
        "fgm": measured,
        "fgm_float32": in_float32,
        "images": len(images),
    }
    return checks, [sentence for suspicious, sentence in signs if suspicious]


def random_noise(images, eps, generator):
    """Every value moved by eps up or down at random, in [0, 1]: the yardstick of an attack."""
    signs = torch.randint(0, 2, images.shape, generator=generator, dtype=torch.int8)
    return (images + eps * (2.0 * send(signs, images.device) - 1)).clamp(0, 1)


def plot_examples(
    path, model, images, perturbed, labels, loss=summed_cross_entropy, decide=most_likely
):
    """A column per image: original, perturbed, under FGM at EPSILON, both, and FGM's change.

    model: `frozen`. Above each image stands its predicted class, green when right, red when wrong.
    """
    from matplotlib.figure import Figure

    attacked, both = (
        fgm(model, given, labels, EPSILON["linf"], loss=loss) for given in (images, perturbed)
    )
    rows = {"original": images, "perturbed": perturbed, "FGM": attacked, "perturbed\n+ FGM": both}
    predictions = {title: decide(in_batches(model, row)) for title, row in rows.items()}
    rows["FGM's change\n(16 times)"] = (0.5 + 16 * (attacked - images)).clamp(0, 1)
    figure = Figure(figsize=(1.25 * len(labels), 1.45 * len(rows)))
    grid = figure.subplots(len(rows), len(labels), squeeze=False)
    for line, (title, row) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for column, axes in enumerate(line):
            axes.imshow(row[column].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if title in predictions:
                predicted, true = int(predictions[title][column]), int(labels[column])
                axes.set_title(
                    CLASSES[predicted],
                    fontsize=8,
                    color="tab:green" if predicted == true else "tab:red",
                )
    save_figure(figure, path)


# ---- Question 6: the k-NN vote ------------------------------------------------------------------

KNN_BATCH = 1000  # embeddings at once: their matrix product is faster than that of fewer


def knn_predict(train_embeddings, train_labels, embeddings, k):
    """Majority vote of the k nearest training embeddings (Euclidean): int64 N; ties: smaller label.

    train_embeddings M x D, train_labels int64 M, embeddings N x D. Raises ValueError unless
    1 <= k <= M.
    """
    if not 1 <= k <= len(train_embeddings):
        raise ValueError(f"k is {k}, but there are {len(train_embeddings)} training embeddings")
    _, nearest = nearest_neighbours(embeddings, k, train_embeddings)
    votes = torch.zeros(len(nearest), int(train_labels.max()) + 1, device=nearest.device)
    one_each = torch.ones_like(nearest, dtype=votes.dtype)
    return votes.scatter_add_(1, train_labels[nearest], one_each).argmax(1)


def nearest_neighbours(queries, k, reference):
    """Exact Euclidean k-NN, nearest first: distances N x k and indices N x k into `reference`."""
    centre = reference.mean(0)  # far from the origin, the squares below would swamp the distances
    reference = reference - centre
    lengths, found = reference.square().sum(1), []
    for batch in (queries - centre).split(KNN_BATCH):
        # |q - r|^2 = |r|^2 - 2 q r + |q|^2, of which the last does not change the order.
        squares, indices = torch.addmm(lengths, batch, reference.T, alpha=-2).topk(k, largest=False)
        own = batch.square().sum(1, keepdim=True)
        found.append(((squares + own).clamp_min(0).sqrt(), indices))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


# ==== Housekeeping: nothing below changes a number ===============================================


# What reading metrics of another form than ours may raise.
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class UserError(Exception):
    """Something the user can put right. One line: what is wrong, where, and what to do."""


def run(main):
    """Call `main()`; a user's mistake ends in one line and status 2, Ctrl-C in one and 130."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's may not be installed here
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's, or one that was closed
            stream.reconfigure(errors="backslashreplace")  # names beyond what it can show
    try:
        main()
        if sys.stdout:  # None where it was closed
            sys.stdout.flush()
    except UserError as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print(
            "error: the GPU's memory is full; close what else uses it (nvidia-smi lists that), "
            "or give --device cpu",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        again = shlex.join(["python", *(word for word in sys.argv if word != "--fresh")])
        print(
            "\nInterrupted. Training is kept but for its last seconds; go on with:",
            one_line(again),
            file=sys.stderr,
        )
        sys.exit(130)


# ---- Command line -------------------------------------------------------------------------------


def one_line(text, limit=800):
    """Text that may hold anything as one line that a terminal can show."""
    words = " ".join(str(text).split())
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]} ... {shown[-limit // 2 :]}"


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {one_line(message)}; see python {self.prog} --help\n")


RECIPE_HELP = {
    "epochs": "passes over the training images (by stem, below)",
    "batch_size": "images per step",
    "lr": "peak learning rate",
    "lr_perturbed": "that of the model trained without FGM",
    "noise": "before the FGM step in training, in epsilons; more where val_pgd collapses",
    "trivial_augment": "change colour or geometry of every training image at random",
}


def argument_parser(docstring, recipes=None):
    """Parser with the flags of every script; its --help shows the docstring and the recipes.

    recipes: for a script that trains, a dict from stem to a dict of settings, each of which gets a
    flag to override it.
    """

    def folder(text):
        return Path(os.path.expanduser(text))  # in `--data=~/cifar` the shell leaves ~ as it is

    parser = _OneLineParser(
        description=docstring,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(purpose=" ".join(docstring.split("\n\n")[0].split()))
    add = parser.add_argument
    add(
        "--data",
        type=folder,
        default=Path("data"),
        help="folder that holds cifar-10-batches-py; fetched if absent (data)",
    )
    add(
        "--results",
        type=folder,
        help="folder for everything written (results, or results-quick with --quick)",
    )
    add("--seed", type=between(int, 0, 2**31 - 1), default=0, help="seed of all random numbers (0)")
    add(
        "--device",
        choices=("auto", "cuda", "mps", "cpu"),
        default="auto",
        help="where to compute; CUDA_VISIBLE_DEVICES chooses among GPUs (auto: the best there is)",
    )
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the backbone: float32 is IEEE's, not TF32 (auto: bfloat16 where it is fast)",
    )
    add(
        "--quick",
        action="store_true",
        help="tiny subset, few epochs: shows that everything works, its numbers mean nothing",
    )
    if recipes:
        add("--fresh", action="store_true", help="start over instead of going on where it ended")
        for name, value in recipes["stride2"].items():
            kind = (
                {"action": argparse.BooleanOptionalAction}
                if isinstance(value, bool)
                else {
                    "type": between(int, 1, 10**6)
                    if isinstance(value, int)
                    else between(float, 1e-9, 1e9)
                }
            )
            add("--" + name.replace("_", "-"), **kind, help=RECIPE_HELP[name])
        rows = [[stem, *map(str, recipe.values())] for stem, recipe in recipes.items()]
        table = table_lines(["stem", *recipes["stride2"]], rows)
        parser.epilog = "\n".join(["The recipe of each stem:", *table])
    return parser


def parse_arguments(parser):
    """Parse sys.argv and settle what depends on the machine: results folder, device, precision.

    Raises UserError for a device that this machine lacks or a results folder that is read-only.
    """
    args = parser.parse_args()
    torch.backends.fp32_precision = "ieee"  # not TF32, to which cuDNN rounds of its own accord
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # torch 2.9 does not derive it
    args.results = args.results or Path("results-quick" if args.quick else "results")
    present = {
        "cuda": args.device in ("auto", "cuda") and _cuda_works(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
        "auto": True,
    }
    if not present[args.device]:
        raise UserError(f"--device {args.device}: PyTorch can use none here; give --device auto")
    if args.device == "auto":
        args.device = next(device for device in present if present[device])
    if args.precision == "auto":
        args.precision = best_precision(args.device)
    require_room(args.results, 10**6)
    return args


def _cuda_works():
    """Whether there is a CUDA GPU that computes. Says why where there is one that does not."""
    try:
        return torch.cuda.is_available() and torch.ones(1, device="cuda").add(1).item() == 2
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # such as no kernels for a GPU so old in this build of PyTorch
        reason = str(error).partition("\n")[0]
        print(one_line(f"The GPU stays unused, since PyTorch cannot: {reason}"), file=sys.stderr)
        return False


def require_room(folder, number_of_bytes):
    """Raise UserError unless so much can be written there: not found out after an hour's work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(number_of_bytes))
            probe.flush()
    except OSError as error:
        raise UserError(
            f"cannot write {number_of_bytes / 1e6:.0f} MB in {folder}: "
            f"{error.strerror}; make room or give another --results"
        ) from error


def best_precision(device):
    """ "bfloat16" where there are instructions for it, else "float32"."""
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older torch lacks it
        native = device == "cpu" and capabilities.get("avx512_bf16", False)
    return "bfloat16" if native else "float32"


def choose_recipe(args, recipes, stem, question, split, **constants):
    """Everything that shapes a training's result, as one dict of plain values.

    The row of `recipes` for the stem, its entries overridden by the flags of their names; the
    script's own constants; the optimiser's; and seed, precision and device. It goes as it is to
    `train`, to the resume check, into the checkpoint and into metrics.json.
    """
    row = {**recipes[stem], **({"epochs": 2} if args.quick else {})}
    flags = {name: getattr(args, name) for name in row if getattr(args, name, None) is not None}
    return {
        "question": question,
        "stem": stem,
        **OPTIMIZER,
        **row,
        **flags,
        **constants,
        "seed": args.seed,
        "precision": args.precision,
        "device": args.device,
        "split_sha256": split["sha256"],
        "torch": str(torch.__version__),
    }


def between(kind, low, high):
    """An argparse type: an int or a float from low to high."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        whole = "whole " if kind is int else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a {whole}number from {low} to {high}")

    return parse


def script_command(question, args):
    """The command line that makes a question's results with these flags, for error messages."""
    script = {
        "q1": "q1_split.py",
        "q2": "q2_train_ce.py",
        "q3": "q3_attack.py",
        "q4": "q4_adv_train.py",
        "q6": "q6_angular.py",
    }[question]
    data = [] if args.data == Path("data") else ["--data", str(args.data)]
    seed = ["--seed", str(args.seed)] if args.seed and question != "q1" else []
    quick = ["--quick"] if args.quick else []
    return shlex.join(["python", script, *data, "--results", str(args.results), *seed, *quick])


def with_bar(batches, title):
    """The same batches, on a terminal with a tqdm bar once they have taken two seconds."""
    if not sys.stderr.isatty():
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc=title, leave=False, delay=2)


# ---- Files --------------------------------------------------------------------------------------


def write_file(path, content):
    """Write bytes so that `path` holds all of them or what it held before, whenever the power goes.

    Raises UserError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            stale.unlink()  # of a process that was killed
        with open(partial, "xb") as file:  # exclusively: never through a link that lies there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room or give another "
            "--results, then run the same command again"
        ) from error
    with contextlib.suppress(OSError):  # some systems cannot, and need not, flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


MAX_BYTES = 250_000_000  # a training's state, the largest of our files, has 180 MB


@contextlib.contextmanager
def opened(path, made_by):
    """A file that one of our commands has made, as a stream of its bytes.

    Whatever goes wrong while it is read and looked at ends in a UserError with that command.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_BYTES:
            raise ValueError("too large, or no regular file")
        content = io.BytesIO(Path(path).read_bytes())
        if zipfile.is_zipfile(content):
            members = zipfile.ZipFile(content).infolist()
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise ValueError("an archive of more than our files ever hold")
        content.seek(0)
        yield content
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it with: {made_by}") from error
    except UserError:
        raise
    except Exception as error:  # numpy and torch raise dozens of kinds for damaged files
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(
            f"{path} is damaged or not ours ({reason}); make it again with: {made_by}"
        ) from error


@contextlib.contextmanager
def only_one(folder):
    """Hold a lock on the folder. Raises UserError when another process holds it.

    Nothing is locked where the system has no such locks (Windows, some network shares).
    """
    with contextlib.ExitStack() as held:
        try:
            import fcntl

            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            held.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {folder}; wait for it, or give another --results"
            ) from error
        except (ImportError, OSError):
            pass
        yield


def sha256(*contents):
    """Hexadecimal SHA-256 of the bytes, one after the other."""
    return hashlib.sha256(b"".join(contents)).hexdigest()


def write_torch(path, content):
    """Write tensors and plain values in torch's format; returns the file's SHA-256."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())
    return sha256(buffer.getbuffer())


def load_torch(content):
    """What is in a stream of such bytes: tensors and plain values, nothing that runs."""
    if zipfile.ZipFile(content).testzip():  # checksums, at which torch.load does not look
        raise ValueError("wrong checksum")
    content.seek(0)
    return torch.load(content, map_location="cpu", weights_only=True)


def refuse_unlike(weights, expected):
    """Raise ValueError unless the weights have expected names, types and shapes, and are finite."""
    for name, tensor in expected.items():
        found = weights[name]
        if (found.dtype, found.layout, found.shape) != (tensor.dtype, tensor.layout, tensor.shape):
            raise ValueError(f"{name} is of another type or shape")
        if not found.isfinite().all():
            raise ValueError(f"{name} is not finite")


# ---- Checkpoints --------------------------------------------------------------------------------


def save_checkpoint(path, model, *, stem, provenance):
    """Write a model's weights, what `load_checkpoint` needs to build it, and where it comes from.

    provenance: dict of plain values as `provenance()` returns it. Returns the file's SHA-256.
    """
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    return write_torch(
        path,
        {
            "stem": stem,
            "num_outputs": model.head.out_features,
            "provenance": provenance,
            "weights": weights,
        },
    )


def save_trained(folder, name, model, history, recipe, origin, guard=None):
    """Write a trained model's checkpoint; returns what metrics.json says of how it was made.

    The numbers of an older model go first, so that they never stand beside the new one's curves.
    """
    (folder / "metrics.json").unlink(missing_ok=True)
    digest = save_checkpoint(
        folder / f"{name}.pt", model, stem=recipe["stem"], provenance={**origin, "recipe": recipe}
    )
    seconds = round(sum(epoch["seconds"] for epoch in history), 2)
    return {
        "file": f"{name}.pt",
        "sha256": digest,
        "recipe": recipe,
        "history": history,
        "epoch_kept": kept_epoch(history, guard),
        "training_seconds": seconds,
    }


def read_checkpoint(path, made_by="the script of its question", split=None):
    """A checkpoint as a dict: `model` (a Network in eval mode), `stem`, `provenance`, `sha256`.

    Raises UserError when the file is missing, damaged, not a checkpoint of ours, or of another
    split than the given one.
    """
    with opened(path, made_by) as content:
        checkpoint = load_torch(content)
        if not 1 <= checkpoint["num_outputs"] <= 1000:
            raise ValueError("a network of that size could fill the memory")
        with torch.random.fork_rng(devices=[]):
            model = resnet18(checkpoint["num_outputs"], checkpoint["stem"]).eval()
        refuse_unlike(checkpoint["weights"], model.state_dict())
        model.load_state_dict(checkpoint["weights"])
        origin, digest = dict(checkpoint["provenance"]), sha256(content.getbuffer())
        if split and origin.get("split_sha256") != split["sha256"]:
            raise UserError(
                f"{path} was trained on another split, so test images may be among its "
                f"training images; make the right one with: {made_by}"
            )
    return {"model": model, "stem": checkpoint["stem"], "provenance": origin, "sha256": digest}


def load_checkpoint(path):
    """The model in a checkpoint file, in eval mode; it takes [0, 1] images and normalises inside.

    Raises UserError when the file is missing, damaged, or not a checkpoint of ours.
    """
    return read_checkpoint(path)["model"]


def require_model(args, split):
    """Question 2's checkpoint, as read_checkpoint returns it, with its model on args.device."""
    path, made_by = args.results / "q2" / "model.pt", script_command("q2", args)
    checkpoint = read_checkpoint(path, made_by, split)
    question = checkpoint["provenance"].get("question")
    if question != "q2":
        raise UserError(
            f"{path} belongs to question {question}; make the right one with: {made_by}"
        )
    checkpoint["model"].to(args.device)
    return checkpoint


# ---- Metrics ------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed(seconds, stage):
    """Note in the dict `seconds`, and on stderr, how long the block took."""
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 2)
    print(f"{stage}: {seconds[stage]:.0f} s", file=sys.stderr, flush=True)


def provenance(args, question, split, parents=()):
    """What an artefact was made from, parents (SHA-256 of checkpoints) included: plain values."""
    import torchvision

    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    versions = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }
    hardware = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    )
    return {
        "question": question,
        "quick": args.quick,
        "seed": args.seed,
        "device": args.device,
        "hardware": hardware,
        "precision": args.precision,
        "split_sha256": split["sha256"],
        "parent_sha256": list(parents),
        "versions": versions,
        "git_commit": commit,
    }


def write_metrics(folder, origin, metrics):
    """Write metrics.json, a script's last file: provenance first, then the question's own numbers.

    With them the SHA-256 of the question's figures, so that no others come to stand beside them.
    A question that measures models has them under `models`: a dict from the name that tables show
    to a dict with `accuracy` by condition and whatever else was measured.
    """
    figures = {path.name: sha256(path.read_bytes()) for path in sorted(folder.glob("*.png"))}
    metrics = {**origin, **metrics, "figures": figures, "peak_memory_mib": _peak_memory_mib()}
    if origin.get("device") == "cuda":
        metrics["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    write_file(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False).encode())


def _peak_memory_mib():
    """The most main memory that this process has held; None on Windows, which does not tell."""
    with contextlib.suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def read_metrics(path, made_by):
    """A question's metrics.json as a dict. Raises UserError when it is missing or damaged."""
    with opened(path, made_by) as content:
        return dict(json.load(content))


def metrics_found(args, questions):
    """The metrics of those of the questions that have been run: dict from question to metrics."""
    paths = {question: args.results / question / "metrics.json" for question in questions}
    return {
        question: read_metrics(path, script_command(question, args))
        for question, path in paths.items()
        if path.exists()
    }


def measured_before(args, split):
    """What questions 3 and 4 measured under the same conditions: dict from model to its numbers.

    Questions that have not been run are left out. Raises UserError for results of another split.
    """
    models = {}
    for question in ("q3", "q4"):
        path, made_by = args.results / question / "metrics.json", script_command(question, args)
        if path.exists():
            with opened(path, made_by) as content:
                metrics = json.load(content)
                if metrics.get("split_sha256") != split["sha256"]:
                    raise UserError(f"{path} is of another split; make it again with: {made_by}")
                # What will be printed and drawn in an hour is tried now.
                condition_rows(metrics["models"])
                for name, model in metrics["models"].items():
                    torch.tensor([model["by_eps"][key] for key in ("eps", "fgm", "pgd")]).float()
                    models[name] = {**model, "warnings": list(map(str, model["warnings"]))}
    return models


# ---- Tables -------------------------------------------------------------------------------------

CONDITIONS = {
    "clean": "clean",
    "perturbed": "perturbed",
    "fgm": "FGM",
    "perturbed_fgm": "perturbed + FGM",
    "pgd": "PGD-20",
    "strongest": "strongest",
}


def percent(share):
    """0.8412 as '84.12 %'."""
    return f"{100 * share:.2f} %"


def condition_rows(models):
    """Header and rows of the table of accuracies. models: as under `models` in metrics.json."""
    header, rows = ["model", *CONDITIONS.values()], []
    for name, model in models.items():
        cells = {key: percent(model["accuracy"][key]) for key in CONDITIONS}
        error = standard_error(model["accuracy"]["strongest"], model["strongest_images"])
        cells["strongest"] += f" ± {100 * error:.1f}"
        rows.append([name, *cells.values()])
    return header, rows


def standard_error(share, number):
    """Of an accuracy on so many images (binomial)."""
    return math.sqrt(share * (1 - share) / number)


def print_conditions(title, models):
    """Print that table, and below it every warning that the attacks' checks gave."""
    title = f"{title} (FGM and PGD in L-infinity, eps = {255 * EPSILON['linf']:.0f}/255)"
    print_table(title, *condition_rows(models))
    for name, measured in models.items():
        for warning in measured["warnings"]:
            print(one_line(f"warning: {name}: {warning}"))


def print_table(title, header, rows):
    """A plain-text table; all cells are strings."""
    print("", title, *table_lines(header, rows), sep="\n")


def table_lines(header, rows):
    """The lines of a plain-text table; all cells are strings, perhaps from a file."""
    header, *rows = [[one_line(cell, 100) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (header, ["-" * width for width in widths], *rows)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
