"""What more than one question needs, in the order in which the questions need it.

    Question 1    the images of CIFAR-10 and their split; random numbers
    Question 2    ResNet-18, evaluation, training, maps and other figures
    Question 3    the perturbation, attacks, accuracy under them
    Housekeeping  command line and recipe, files, checkpoints, metrics, tables

Unless something else is said:

    images     float32 N x 3 x 32 x 32 in [0, 1], unless uint8 is said; the network normalises
               inside, so that an attack's epsilon is in pixel units
    labels     int64 N
    generator  a torch.Generator on the CPU: the same numbers on every device
    model      maps images to outputs and can be differentiated; a Network or any other
    loss       loss(model(images), labels): the scalar that an attack raises, a sum over the images
    decide     decide(model(images)): int64 N, the classes that count
    right      bool N: which images are classified correctly

Slow imports (torchvision, matplotlib, umap) stand in the functions that need them, so that `--help`
waits for torch alone.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import pickle
import platform
import shlex
import stat
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ---- Question 1: images, split, random numbers --------------------------------------------------

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CHANCE = 1 / len(CLASSES)  # accuracy of guessing
NUM_IMAGES = 60_000
NUM_OFFICIAL_TRAIN = 50_000  # indices below are torchvision's training file, others its test file
STREAMS = ("perturbed train", "perturbed val", "perturbed test", "noise", "epoch")


def load_cifar10(root):
    """The 60,000 images (uint8) and labels: torchvision's training file in order, then its test.

    torchvision fetches what `root` lacks, and unpickles a file only if its MD5 is right. Raises
    UserError for data that are missing or damaged and cannot be fetched.
    """
    from torchvision.datasets import CIFAR10

    try:
        parts = [CIFAR10(root, train=True, download=True), CIFAR10(root, train=False)]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 is not complete in {root} and cannot be fetched ({error}); connect to the "
            f"network, put {CIFAR10.filename} from any mirror into {root}, or give --data the "
            f"folder that holds {CIFAR10.base_folder}"
        ) from error
    images = np.concatenate([part.data for part in parts])
    labels = torch.tensor([label for part in parts for label in part.targets])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def load_split(path):
    """Question 1's split, read from its file.

    A dict: `train`, `val`, `test` (int64 indices into load_cifar10's images), `protocol`, `seed`,
    `quick`, and `sha256` over all of these, which every later result carries. Raises UserError
    when the file is missing, damaged, or its parts are not disjoint.
    """
    with opened(path) as content, np.load(content, allow_pickle=False) as arrays:
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
    drawn = [*how.values(), *map(len, parts.values())]
    digest = sha256(*(part.tobytes() for part in parts.values()), repr(drawn).encode())
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    return {**tensors, **how, "sha256": digest}


def load_data(args):
    """Question 1's split, and a dict from `train`, `val`, `test` to images (uint8) and labels.

    On args.device. Says what the script is about to do. Raises UserError when the split was made in
    the other mode, quick or full.
    """
    path = args.results / "q1" / "split.npz"
    split = load_split(path)
    if split["quick"] != args.quick:
        made = "with --quick" if split["quick"] else "without --quick"
        raise UserError(f"{path} was made {made}; run this script so, or give another --results")
    images, labels = load_cifar10(args.data)
    print(f"{args.purpose} ({args.device}, {args.precision}; {one_line(args.results)})", flush=True)
    return split, parts_of(images, labels, split, args.device)


def parts_of(images, labels, split, device):
    """A dict from `train`, `val`, `test` to that part's images (uint8) and labels."""
    return {
        name: (images[split[name]].to(device), labels[split[name]].to(device))
        for name in ("train", "val", "test")
    }


def as_float(images):
    """uint8 images in 0..255 as float32 in [0, 1]."""
    return images.float() / 255


def _refuse_integers(images):
    """Raise ValueError for uint8 images, which would count as very bright ones."""
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, not floats in [0, 1]: use as_float")


def _refuse_outside(images):
    """The same, and for values outside [0, 1]. Not for training: it makes a GPU wait."""
    _refuse_integers(images)
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("images have values outside [0, 1]")


def generator_for(seed, stream, index=0):
    """A generator of its own for each use of random numbers: none depends on what ran before.

    stream: one of STREAMS; index: for instance the epoch.
    """
    entropy = np.random.SeedSequence([seed, STREAMS.index(stream), index])
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
        with_matrix_products(backbone, stem)
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

EVALUATION_BATCH = 250  # a larger one fits a processor's cache and memory less well
GPU_BATCH = 500  # so that a GPU has enough to do


def in_batches(function, *tensors, size=None, title=""):
    """`function` of the tensors batch by batch, without gradients; its results concatenated.

    `function` returns a tensor or a tuple of them. title: of the bar that a terminal shows.
    """
    size = size or batch_size_for(tensors[0])
    batches = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
    with torch.no_grad():
        results = [function(*batch) for batch in with_bar(batches, title)]
    if isinstance(results[0], tuple):
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
    return torch.cat(results)


def batch_size_for(tensor):
    """How many images to evaluate or attack at once on the tensor's device."""
    return EVALUATION_BATCH if tensor.device.type == "cpu" else GPU_BATCH


def predict(model, images):
    """Most likely class of each image, int64 N. Raises ValueError for images not in [0, 1]."""
    _refuse_outside(images)
    return in_batches(lambda batch: model(batch).argmax(1), images)


def accuracy(predicted, labels):
    """Share of equal entries, as a float."""
    return share(predicted == labels)


def share(right):
    """Share of the entries of a bool tensor that are true, as a float."""
    return right.sum().item() / len(right)


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
VALIDATION_SUBSET = 2_000  # the first validation images (q1 has shuffled them), scored every epoch
STATE_SUFFIX = ".training.pt"  # instead of .pt
STATE_EVERY = 10  # seconds: writing the state takes a good part of a GPU's epoch
EXPLODED = 1_000  # times its first loss: no training comes back from there


def crop_and_flip(images, generator):
    """The usual augmentation: a shift of up to 4 pixels, borders reflected, and a random mirror."""
    count, _, height, width = images.shape
    top, left = torch.randint(0, 9, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
    rows, columns = send(rows, images.device), send(columns, images.device)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect").permute(0, 2, 3, 1)
    image = torch.arange(count, device=images.device)[:, None, None]
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


def train(model, data, step, batches, evaluate, recipe, origin, path, fresh=False, guard=None):
    """Train `model` in place, resumably, at a one-cycle rate; it ends in eval mode.

    data: images (uint8) and labels of the training part; recipe: see choose_recipe; origin: see
    provenance; step(model, images, labels, generator, recipe): a batch's differentiable loss and
    number of correct predictions; batches(labels, batch_size, generator): an epoch's index tensors;
    evaluate(model): dict of numbers to note after each epoch; guard: the name of one of them, at
    whose collapse training stops and goes back to the weights of its best epoch (see kept_epoch).

    path: where the model will be written. The state of the training stands beside it. It is written
    after the last epoch, and after any other that ends STATE_EVERY seconds or more after the last
    time. A later call goes on from there, unless `fresh`, and ends bit for bit where an
    uninterrupted one does (on the CPU): an epoch's random numbers come from the seed and the epoch
    alone.

    Returns a dict: `recipe` and `origin` as they were when the training began; `history`, one dict
    per epoch (loss, accuracy, seconds and what `evaluate` gave); `epoch_kept` (see kept_epoch);
    `notes`, a list of sentences. Raises UserError for a state of another recipe, for a model
    without state, and for a loss that explodes.
    """
    model.precision = recipe["precision"]
    optimizer = optimizer_for(model, recipe)
    state = {"recipe": recipe, "origin": origin, "history": [], "best": None}
    if not fresh:
        state = _resumed(path, model, optimizer, state, guard)
    history, written = state["history"], time.perf_counter()
    with _telling_how_to_go_on(path, fresh):
        while not _ended(history, recipe, guard):
            epoch, started = len(history), time.perf_counter()
            losses, fitted = train_epoch(model, optimizer, data, step, batches, recipe, epoch)
            seconds = time.perf_counter() - started
            scores = {"loss": losses.mean().item(), "accuracy": fitted, "seconds": seconds}
            scores |= evaluate(model)
            _refuse_explosion(losses, scores, history, recipe)
            history.append(scores)
            if guard and scores[guard] == max(each[guard] for each in history):
                state["best"] = copy.deepcopy(model.state_dict())
            if _ended(history, recipe, guard) or time.perf_counter() - written >= STATE_EVERY:
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                write_torch(state_file_of(path), {**state, **parts})
                written = time.perf_counter()
            _print_epoch(history, recipe["epochs"], time.perf_counter() - started)
    kept = kept_epoch(history, guard)
    if kept < len(history):
        model.load_state_dict(state["best"])
        print(f"{guard} collapsed in epoch {len(history)}: back to the weights of epoch {kept}")
    model.eval()
    notes = _notes_on_code(path, state["origin"], origin)
    made = {key: state[key] for key in ("recipe", "origin", "history")}
    return {**made, "epoch_kept": kept, "notes": notes}


def state_file_of(path):
    """Where the state of a model's training stands: beside the model."""
    return Path(path).with_suffix(STATE_SUFFIX)


def _resumed(path, model, optimizer, new, guard):
    """The state of the training that ends in `path`; `new` where there is none.

    Its weights and moments go into model and optimizer.
    """
    file = state_file_of(path)
    if not file.exists():
        if path.exists():
            raise UserError(
                f"{path} is here without the state of its training, as in a folder that was handed "
                f"in; to replace it by a new training, run: {command_for(file)}"
            )
        return new
    with opened(file) as content:
        state = load_torch(content)
        _refuse_other_recipe(file, state, new["recipe"], guard)
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    print(f"Going on after epoch {len(state['history'])} from {one_line(file)}", file=sys.stderr)
    return state


def _refuse_other_recipe(file, state, recipe, guard):
    """Raise UserError if the recipe differs; once training has ended, the machine may."""
    before = state["recipe"]
    if _ended(state["history"], recipe, guard):
        before = {**before, **{key: recipe[key] for key in ("torch", "device", "precision")}}
    changed = [
        f"{key} {before.get(key)!r}, now {recipe.get(key)!r}"
        for key in sorted({*before, *recipe})
        if before.get(key) != recipe.get(key)
    ]
    if changed:
        raise UserError(
            f"{file} was made with other settings ({'; '.join(changed)}); use those again, "
            f"or start over with: {command_for(file)}"
        )


def _notes_on_code(path, before, now):
    """If the code has changed since training began: print a sentence, and return it in a list."""
    if before["code_sha256"] == now["code_sha256"]:
        return []
    note = (
        f"{path} was trained by other code than today's: if your change concerns training, "
        f"start over with: {command_for(state_file_of(path))}"
    )
    print(one_line(note), file=sys.stderr)
    return [note]


@contextlib.contextmanager
def _telling_how_to_go_on(path, fresh):
    """Say after Ctrl-C in training what is kept. fresh: a state of before does not count."""
    file = state_file_of(path)
    before = file.stat().st_mtime_ns if fresh and file.exists() else None
    try:
        yield
    except KeyboardInterrupt:
        if file.exists() and file.stat().st_mtime_ns != before:
            what = f"to go on after the last epoch that was saved, run: {command_for(path)}"
        else:
            what = f"to begin again, run: {command_for(file if fresh else path)}"
        print(f"\nTraining stopped; {what}", file=sys.stderr)
        raise


def _print_epoch(history, epochs, seconds):
    """A line with the last epoch's numbers, and how long the others take if they take as long."""
    numbers = "  ".join(f"{name} {value:.3f}" for name, value in history[-1].items())
    left = (epochs - len(history)) * seconds / 60
    line = f"epoch {len(history)}/{epochs}  {numbers}  {left:.0f} min left"
    print(line, file=sys.stderr, flush=True)


def _ended(history, recipe, guard):
    """Whether all epochs are done, or the guarded score has collapsed."""
    return len(history) >= recipe["epochs"] or kept_epoch(history, guard) < len(history)


def kept_epoch(history, guard):
    """Which epoch's weights training ends with, counted from 1: the last, or the best by `guard`.

    The best, if that is above 0.1 and the last score is below half of it.
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
    for position, batch in enumerate(with_bar(indices, f"epoch {epoch + 1}/{recipe['epochs']}")):
        progress = (epoch + position / len(indices)) / recipe["epochs"]
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * one_cycle(progress, recipe["warmup"])
        batch = send(batch, images.device)
        loss, hits = step(model, images[batch], labels[batch], generator, recipe)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # Tensors are collected, not numbers: reading one would make a GPU wait at every step.
        losses.append(loss.detach())
        correct, seen = correct + hits, seen + len(batch)
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


def _refuse_explosion(losses, scores, history, recipe):
    """Raise UserError for a number that is not finite or a loss EXPLODED times the first."""
    epoch, first = len(history) + 1, history[0]["loss"] if history else losses[0].item()
    wrong = [
        f"the loss became {loss:g} in epoch {epoch}, step {step}"
        for step, loss in enumerate(losses.tolist(), start=1)
        if not abs(loss) <= EXPLODED * max(first, 1)
    ]
    wrong += [
        f"{name} became {value} at the end of epoch {epoch}"
        for name, value in scores.items()
        if not math.isfinite(value)
    ]
    if wrong:
        raise UserError(
            f"{wrong[0]}; lower the peak learning rate, now {recipe['lr']:g}, "
            "and start over with --fresh"
        )


# ---- Question 2: maps and other figures ---------------------------------------------------------

DPI = 150
UMAP_NEIGHBOURS = 15
SEARCH_BATCH = 1000  # queries at once: their matrix product is faster than that of fewer


def fit_umap(features, seed):
    """A map of the features by UMAP (McInnes et al. 2018), fitted on them alone, without labels.

    features float32 N x D. Returns its points, an array float32 N x 2, and a function that places
    other features in it: M x D to M x 2. The same features and seed give the same map on the same
    machine. UMAP is given the exact neighbours, since compiling its own search for them takes
    longer than everything else. Raises ValueError for features that are too few, not finite or all
    equal.
    """
    _give_numba_a_cache()
    if len(features) <= UMAP_NEIGHBOURS or not features.isfinite().all():
        raise ValueError(f"a map needs more than {UMAP_NEIGHBOURS} points, all of them finite")
    if (features == features[0]).all():
        raise ValueError("a map of equal points has no form: has the model collapsed?")
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
        warnings.simplefilter("ignore", UserWarning)  # UMAP warns of a search that it did not make
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


def nearest_neighbours(queries, k, reference):
    """Exact Euclidean k-NN, nearest first: distances N x k and indices N x k into `reference`."""
    centre = reference.mean(0)  # far from zero, the squares below would swamp the distances
    reference = reference - centre
    lengths, found = reference.square().sum(1), []
    for batch in (queries - centre).split(SEARCH_BATCH):
        # |q - r|^2 = |r|^2 - 2 q r + |q|^2, of which the last does not change the order.
        squares, indices = torch.addmm(lengths, batch, reference.T, alpha=-2).topk(k, largest=False)
        own = batch.square().sum(1, keepdim=True)
        found.append(((squares + own).clamp_min(0).sqrt(), indices))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _give_numba_a_cache():
    """Let UMAP's compiler keep its work in a temporary folder where it may write nowhere else."""
    import importlib.util

    places = Path(importlib.util.find_spec("umap").origin).parent, os.path.expanduser("~")
    if not any(os.access(place, os.W_OK) for place in places):
        os.environ.setdefault("NUMBA_CACHE_DIR", tempfile.mkdtemp(prefix="numba-"))


@contextlib.contextmanager
def drawing(path, size):
    """A new matplotlib figure of this size in inches, written as PNG at the end of the block.

    It is drawn under matplotlib's own defaults, whatever the user's settings file says.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with style.context("default", after_reset=True):
        figure = Figure(figsize=size)
        yield figure
        figure.savefig(buffer, dpi=DPI, format="png", bbox_inches="tight")
    write_file(path, buffer.getvalue())


def plot_lines(path, x, lines, xlabel, ylabel):
    """Lines over a common x. lines: dict from label to as many numbers as x has."""
    with drawing(path, (6, 4)) as figure:
        axes = figure.subplots()
        for label, values in lines.items():
            axes.plot(x, values, marker="." if len(values) < 30 else None, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()


def plot_history(path, history, names, ylabel, xlabel="epoch"):
    """Curves over the epochs of a training's history. names: dict from its keys to labels."""
    lines = {label: [epoch[key] for epoch in history] for key, label in names.items()}
    plot_lines(path, range(1, len(history) + 1), lines, xlabel, ylabel)


def plot_maps(path, panels, limits_of):
    """Scatter plots of 2-D maps side by side, a colour per class, with the extent of `limits_of`.

    panels: dict from title to (points N x 2, labels); limits_of: points M x 2, the training map.
    """
    low, high = limits_of.min(0), limits_of.max(0)
    (left, bottom), (right, top) = low - 0.08 * (high - low), high + 0.08 * (high - low)
    dots = {"cmap": "tab10", "vmin": -0.5, "vmax": 9.5, "s": 2, "alpha": 0.5, "linewidths": 0}
    with drawing(path, (6.5 * len(panels), 6)) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, (points, labels)) in zip(grid, panels.items(), strict=True):
            drawn = axes.scatter(*points.T, c=labels.cpu(), **dots)
            axes.set(title=title, xticks=[], yticks=[], xlim=(left, right), ylim=(bottom, top))
        handles, _ = drawn.legend_elements(num=range(10))
        figure.legend(handles, CLASSES, loc="lower center", ncols=5)


# ---- Question 3: the perturbation ---------------------------------------------------------------

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}  # as in MoCo v2
MAX_ROTATION = 5.0  # degrees
NUM_PIXELS = 10  # of the 32 x 32, in each of which one random channel becomes 1
PERTURBATION = {**JITTER, "rotation": MAX_ROTATION, "pixels": NUM_PIXELS}  # for the record


def perturb(images, generator):
    """The assignment's perturbation: colour jitter, a small rotation, ten pixels, one channel full.

    Every image draws its own values, from the distributions of torchvision's ColorJitter (the order
    of its four steps included) and RandomRotation (nearest neighbour, black corners).
    """
    _refuse_integers(images)
    jitter, angles, full = draw_perturbation(len(images), images[0, 0].numel(), generator)
    return set_to_full(rotate(color_jitter(images, *jitter), angles), *full)


def draw_perturbation(count, pixels_per_image, generator):
    """What `perturb` draws for so many images, as arguments of its three parts.

    (factors, order) for color_jitter, angles for rotate, (channels, pixels) for set_to_full.
    """

    def uniform(low, high):
        return torch.empty(count).uniform_(low, high, generator=generator)

    factors = {name: uniform(1 - size, 1 + size) for name, size in JITTER.items() if name != "hue"}
    factors["hue"] = uniform(-JITTER["hue"], JITTER["hue"])
    order = torch.rand(count, 4, generator=generator).argsort(1)
    angles = uniform(-MAX_ROTATION, MAX_ROTATION)
    pixels = torch.rand(count, pixels_per_image, generator=generator).topk(NUM_PIXELS).indices
    channels = torch.randint(0, 3, (count, NUM_PIXELS), generator=generator)
    return (factors, order), angles, (channels, pixels)


def perturbed_images(images, part, seed):
    """The uint8 images of "train", "val" or "test" perturbed, the same way in every question.

    The batches have one size on every device: what an image draws depends on its place in a batch.
    """
    generator = generator_for(seed, f"perturbed {part}")
    return in_batches(
        lambda batch: perturb(as_float(batch), generator), images, size=EVALUATION_BATCH
    )


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
PGD_STEP_SIZE = EPSILON["linf"] / 4  # on the curves a quarter of each eps, too


def summed_cross_entropy(logits, labels):
    """The loss that attacks on a classifier raise. A sum: no gradient depends on the batch."""
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
    [0, 1]; leaves the model's mode and weights alone. Raises ValueError for images not in [0, 1],
    more or fewer labels, a model in training mode, an unknown norm, and an epsilon like 8.
    """
    _refuse_misuse(model, images, labels, eps, norm)
    _, gradient = input_gradient(model, images, labels, loss)
    return fgm_step(images.detach(), gradient, eps, norm)


def fgm_step(images, gradient, eps, norm):
    """FGM's images for a gradient that is known: one serves every eps and norm."""
    return project(ascend(images, gradient, eps, norm), images, eps, norm)


def fgm_images(images, gradient):
    """All images under L-infinity FGM at EPSILON, by the gradient that `robustness` returns."""
    return in_batches(partial(fgm_step, eps=EPSILON["linf"], norm="linf"), images, gradient)


def pgd(
    model,
    images,
    labels,
    eps,
    step_size,
    steps,
    norm="linf",
    loss=summed_cross_entropy,
    decide=most_likely,
    start=None,
):
    """Projected Gradient Descent (Madry et al. 2018): FGM steps, each projected back to eps.

    An image is attacked no further once it is misclassified, as in AutoAttack (Croce & Hein 2020):
    sharper than looking at the last step alone, and several times cheaper. start: the images at
    which the attack begins; by default those given, not random points, so that it is deterministic.

    Returns the adversarial images, and int64 N: after how many steps an image was first
    misclassified, steps + 1 if it never was. Else as `fgm`.
    """
    _refuse_misuse(model, images, labels, eps, norm)
    images = images.detach()
    adversarial = (images if start is None else start).clone()
    fooled_after = torch.full_like(labels, steps + 1)
    alive = torch.arange(len(images), device=images.device)
    for step in range(steps):
        output, gradient = input_gradient(model, adversarial[alive], labels[alive], loss)
        right = decide(output) == labels[alive]
        fooled_after[alive[~right]] = step
        alive, gradient = alive[right], gradient[right]
        if len(alive) == 0:
            return adversarial, fooled_after
        moved = ascend(adversarial[alive], gradient, step_size, norm)
        adversarial[alive] = project(moved, images[alive], eps, norm)
    with torch.no_grad():
        right = decide(model(adversarial[alive])) == labels[alive]
    fooled_after[alive[~right]] = steps
    return adversarial, fooled_after


def _refuse_misuse(model, images, labels, eps, norm):
    """Raise ValueError for what would give an attack's numbers another meaning."""
    _refuse_outside(images)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images, but {len(labels)} labels")
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode: call model.eval() before an attack")
    if eps < 0 or (norm == "linf" and eps > 1):
        raise ValueError(f"eps is {eps}: give one from 0 to 1 (L2: or more), such as 8 / 255")


def input_gradient(model, images, labels, loss=summed_cross_entropy):
    """model(images), and the loss's gradient at the images alone: the weights' are not computed."""
    # A caller's inference_mode would otherwise forbid gradients, also those of the tensors it made.
    with torch.inference_mode(False), torch.enable_grad():
        images, labels = images.detach().clone().requires_grad_(), labels.clone()
        output = model(images)
        return output.detach(), torch.autograd.grad(loss(output, labels), images)[0]


def ascend(images, gradient, length, norm):
    """A step of this length, in the given norm, in the direction in which the loss rises most."""
    if norm == "linf":
        return images + length * gradient.sign()
    if norm == "l2":
        # Where a model is sure, its gradients are so small that float32 squares them to 0.
        # Divided by its largest value, a gradient keeps its direction, and its squares count.
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


# ---- Question 3: accuracy under attack ----------------------------------------------------------

EXAMPLES = 8  # images in a figure
CHECKED_IMAGES = 1_000  # on which the checks for a flawed attack are made
CURVE_IMAGES = 1_000  # for the curves over epsilon
CURVE_EPSILONS = [size / 255 for size in (2, 4, 8, 12, 16)]
STRONGEST_IMAGES = 2_000  # which are attacked on more than one loss


def robustness(
    network,
    images,
    perturbed,
    labels,
    seed,
    precision,
    losses=(summed_cross_entropy, summed_margin),
    decide=most_likely,
):
    """How a Network does under every test condition, each attack at EPSILON of its norm.

    losses: FGM and PGD raise the first, the strongest attack raises one after the other. Returns
    three things. A dict of plain values: `accuracy` by CONDITIONS (L-infinity), `accuracy_l2` (fgm,
    perturbed_fgm), `strongest_images`, `pgd_by_step` (the share that no PGD step has fooled after
    0, 1, ... steps), `by_eps` (accuracy_by_epsilon), `checks` (attack_checks), `warnings`
    (attack_warnings). A dict from CONDITIONS to which images are right, "strongest" of the first
    STRONGEST_IMAGES. And the gradient at the images, from which fgm_images makes FGM's images.
    """
    model, eps, loss = frozen(network, precision), EPSILON["linf"], losses[0]
    clean, gradient, under_fgm, steps_to_fool = attacks_on(model, images, labels, loss, decide)
    shifted, _, both, _ = attacks_on(model, perturbed, labels, loss, decide)
    after = steps_to_fool(eps, PGD_STEP_SIZE)
    right = {
        "clean": clean,
        "perturbed": shifted,
        "fgm": under_fgm(eps),
        "perturbed_fgm": both(eps),
        "pgd": after > PGD_STEPS,
    }
    right["strongest"] = right_under_strongest(
        model, images, labels, right["pgd"][:STRONGEST_IMAGES], losses[1:], decide
    )
    exact = model if precision == "float32" else frozen(network)
    checks = attack_checks(model, exact, images, labels, right, steps_to_fool, seed, loss, decide)
    accuracies = {name: share(found) for name, found in right.items()}
    l2 = {"fgm": under_fgm(EPSILON["l2"], "l2"), "perturbed_fgm": both(EPSILON["l2"], "l2")}
    measured = {
        "accuracy": accuracies,
        "accuracy_l2": {name: share(found) for name, found in l2.items()},
        "strongest_images": len(right["strongest"]),
        "pgd_by_step": [share(after > step) for step in range(PGD_STEPS + 1)],
        "by_eps": accuracy_by_epsilon(right, under_fgm, steps_to_fool),
        "checks": checks,
        "warnings": attack_warnings(accuracies, checks),
    }
    return measured, right, gradient


def attacks_on(model, images, labels, loss, decide):
    """Which images are right, the gradient at them, and two functions that attack them with it.

    under_fgm(eps, norm, count): which of the first `count` images (all by default) are right under
    FGM. steps_to_fool(eps, step_size, count): int64, after how many of PGD_STEPS L-infinity steps
    they are first misclassified, PGD_STEPS + 1 if never. One gradient serves FGM in every size and
    norm, and PGD's first step.
    """
    output, gradient = in_batches(
        partial(input_gradient, model, loss=loss), images, labels, title="gradients"
    )
    clean = decide(output) == labels

    def under_fgm(eps, norm="linf", count=None):
        def right(batch, direction, target):
            return decide(model(fgm_step(batch, direction, eps, norm))) == target

        return in_batches(right, images[:count], gradient[:count], labels[:count], title="FGM")

    def steps_to_fool(eps, step_size, count=None):
        def of(index):
            start = fgm_step(images[index], gradient[index], step_size, "linf")
            rest = eps, step_size, PGD_STEPS - 1, "linf", loss, decide, start
            return 1 + pgd(model, images[index], labels[index], *rest)[1]

        after = torch.zeros_like(labels[:count])
        index = clean[:count].nonzero()[:, 0]
        after[index] = in_batches(of, index, size=batch_size_for(images), title="PGD")
        return after

    return clean, gradient, under_fgm, steps_to_fool


def right_under_strongest(model, images, labels, survivors, losses, decide):
    """Which of the first images PGD in L-infinity at EPSILON fools on none of the losses: bool.

    survivors: which of them are still right; each loss attacks those that the ones before it left.
    Cross-entropy alone overstates accuracy: its gradient vanishes where the model is sure, that of
    a margin does not (Carlini & Wagner 2017).
    """
    survivors = survivors.clone()
    settings = {"eps": EPSILON["linf"], "step_size": PGD_STEP_SIZE, "steps": PGD_STEPS}
    for loss in losses:
        attack = partial(pgd, model, **settings, loss=loss, decide=decide)
        left = survivors.nonzero()[:, 0]
        _, fooled_after = in_batches(attack, images[left], labels[left], title="strongest")
        survivors[left] = fooled_after > PGD_STEPS
    return survivors


def accuracy_by_epsilon(right, under_fgm, steps_to_fool):
    """Accuracy on the first CURVE_IMAGES under L-infinity FGM and PGD at 0 and CURVE_EPSILONS.

    right: as `robustness` returns it; the functions: of attacks_on. PGD's step stays the same share
    of epsilon. Returns a dict of lists `eps`, `fgm` and `pgd`, and `images`, their number.
    """
    clean = share(right["clean"][:CURVE_IMAGES])
    curve = {"eps": [0, *CURVE_EPSILONS], "fgm": [clean], "pgd": [clean]}
    for eps in CURVE_EPSILONS:
        if eps == EPSILON["linf"]:
            found = {name: right[name][:CURVE_IMAGES] for name in ("fgm", "pgd")}
        else:
            after = steps_to_fool(eps, eps * PGD_STEP_SIZE / EPSILON["linf"], CURVE_IMAGES)
            found = {"fgm": under_fgm(eps, count=CURVE_IMAGES), "pgd": after > PGD_STEPS}
        for name in found:
            curve[name].append(share(found[name]))
    return {**curve, "images": len(right["clean"][:CURVE_IMAGES])}


def attack_checks(model, exact, images, labels, right, steps_to_fool, seed, loss, decide):
    """What tells whether an attack is flawed, on the first CHECKED_IMAGES images: accuracies.

    Under noise of FGM's size; under PGD with eps = 1; under FGM and PGD, as measured and in
    float32. exact: the model in float32; the model itself if that is float32 already. right: as
    `robustness` returns it; steps_to_fool: of attacks_on.
    """
    images, labels = images[:CHECKED_IMAGES], labels[:CHECKED_IMAGES]
    noisy = random_noise(images, EPSILON["linf"], generator_for(seed, "noise"))
    unbounded = steps_to_fool(1.0, 0.1, CHECKED_IMAGES) > PGD_STEPS
    found = {name: share(right[name][:CHECKED_IMAGES]) for name in ("fgm", "pgd")}
    in_float32 = found
    if exact is not model:
        *_, under_fgm, steps_to_fool = attacks_on(exact, images, labels, loss, decide)
        after = steps_to_fool(EPSILON["linf"], PGD_STEP_SIZE)
        in_float32 = {"fgm": share(under_fgm(EPSILON["linf"])), "pgd": share(after > PGD_STEPS)}
    return {
        "images": len(images),
        "noise": accuracy(decide(in_batches(model, noisy)), labels),
        "pgd_eps_1": share(unbounded),
        **found,
        **{f"{name}_float32": value for name, value in in_float32.items()},
    }


def attack_warnings(accuracies, checks):
    """Signs that robust accuracy is too good to be true (Athalye et al. 2018; Carlini et al. 2019).

    accuracies: by CONDITIONS; checks: see attack_checks. Returns a list of sentences.
    """
    clean, fgm, pgd = (accuracies[name] for name in ("clean", "fgm", "pgd"))
    signs = [
        (
            pgd > fgm,
            f"PGD ({percent(pgd)}) is no stronger than FGM ({percent(fgm)}): "
            "the gradients may be masked.",
        ),
        (
            fgm - pgd > 0.1 and fgm > 0.5 * clean,
            f"FGM ({percent(fgm)}) is far weaker than PGD ({percent(pgd)}): its accuracy says "
            "little about robustness (catastrophic overfitting looks like this).",
        ),
        (
            checks["noise"] <= checks["fgm"],
            f"Random noise (accuracy {percent(checks['noise'])}) costs no less than FGM "
            f"({percent(checks['fgm'])}) on the same images.",
        ),
        (
            is_above_chance(checks["pgd_eps_1"], checks["images"]),
            f"Accuracy is {percent(checks['pgd_eps_1'])} under PGD with eps = 1, where none should "
            "be above chance.",
        ),
    ]
    for name, title in (("fgm", "FGM"), ("pgd", "PGD")):
        found, in_float32 = checks[name], checks[f"{name}_float32"]
        signs.append(
            (
                found - in_float32 > 0.01,
                f"{title} leaves {percent(found)}, but {percent(in_float32)} with gradients in "
                "float32: rounding weakens the attack; measure again with --precision float32.",
            )
        )
    return [sentence for suspicious, sentence in signs if suspicious]


def random_noise(images, eps, generator):
    """Every value moved by eps up or down at random, in [0, 1]: the yardstick of an attack."""
    signs = torch.randint(0, 2, images.shape, generator=generator, dtype=torch.int8)
    return (images + eps * (2.0 * send(signs, images.device) - 1)).clamp(0, 1)


def plot_examples(
    path, model, images, perturbed, labels, right, loss=summed_cross_entropy, decide=most_likely
):
    """A column per image: original, perturbed, under FGM at EPSILON, both, and FGM's change.

    The first EXAMPLES that are right when clean, by `right`. model: `frozen`. Above each image
    stands its predicted class, green when right, red when wrong.
    """
    eps, scale, chosen = EPSILON["linf"], 8, right.nonzero()[:EXAMPLES, 0]
    images, perturbed, labels = images[chosen], perturbed[chosen], labels[chosen]
    attacked, both = (fgm(model, given, labels, eps, loss=loss) for given in (images, perturbed))
    rows = {"original": images, "perturbed": perturbed, "FGM": attacked, "perturbed\n+ FGM": both}
    predictions = {title: decide(in_batches(model, row)) for title, row in rows.items()}
    rows[f"FGM's change\n({scale} times)"] = (0.5 + scale * (attacked - images)).clamp(0, 1)
    with drawing(path, (1.25 * len(labels), 1.45 * len(rows))) as figure:
        grid = figure.subplots(len(rows), len(labels), squeeze=False)
        for line, (title, row) in zip(grid, rows.items(), strict=True):
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
            for column, axes in enumerate(line):
                axes.imshow(row[column].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                if title in predictions:
                    predicted, true = int(predictions[title][column]), int(labels[column])
                    colour = "tab:green" if predicted == true else "tab:red"
                    axes.set_title(CLASSES[predicted], fontsize=8, color=colour)


# ==== Housekeeping ================================================================================


class UserError(Exception):
    """Something the user can put right. One line: what is wrong, where, and what to do."""


def run(main):
    """Call `main()`; a user's mistake ends in one line and status 2, Ctrl-C in one and 130."""
    try:
        main()
    except UserError as error:
        stop(error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "MPS backend out of memory" in str(error):
            stop("the GPU's memory is full; close what else uses it, or give --device cpu")
        full = "allocate memory", "not enough memory"
        if isinstance(error, MemoryError) or any(words in str(error) for words in full):
            stop("the main memory is full; close other programs (README says how much is needed)")
        raise
    except KeyboardInterrupt:
        print("\nInterrupted", file=sys.stderr)
        sys.exit(130)


def stop(message):
    """End with one line on stderr and status 2."""
    print("error:", one_line(message), file=sys.stderr)
    sys.exit(2)


# ---- Command line -------------------------------------------------------------------------------


def one_line(text, limit=800):
    """Text that may hold anything as one line that a terminal can show."""
    words = " ".join(str(text).split())
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)
    return shown if len(shown) <= limit else f"{shown[: limit // 2]} ... {shown[-limit // 2 :]}"


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {one_line(message)}; see python {self.prog} --help\n")


def folder(text):
    """An argparse type: a path. In `--data=~/cifar` the shell leaves ~ as it is."""
    return Path(os.path.expanduser(text))


def argument_parser(docstring):
    """Parser with the flags of every script; its --help shows the docstring."""

    parser = _OneLineParser(
        description=docstring,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(purpose=docstring.partition("\n")[0])
    add, seeds = parser.add_argument, between(int, 0, 2**31 - 1)
    devices, precisions = ("auto", "cuda", "mps", "cpu"), ("auto", "float32", "bfloat16")
    best = (
        "auto: a CUDA GPU, of which CUDA_VISIBLE_DEVICES chooses, or the CPU; mps is Apple's GPU, "
        "for which PyTorch had wrong gradients until 2026"
    )
    exact = "float32 is IEEE's, not TF32; auto: bfloat16 where it is fast"
    tiny = "tiny subset, few epochs: shows that everything works, its numbers mean nothing"
    add(
        "--data",
        type=folder,
        default=Path("data"),
        help="folder that holds or gets CIFAR-10 (data)",
    )
    add("--results", type=folder, help="folder to write in (results; with --quick results-quick)")
    add("--seed", type=seeds, default=0, help="seed of all random numbers (0)")
    add("--device", choices=devices, default="auto", help=f"where to compute ({best})")
    add("--precision", choices=precisions, default="auto", help=f"of the backbone ({exact})")
    add("--quick", action="store_true", help=tiny)
    return parser


def training_parser(docstring, recipes):
    """The same with the flags of every training; its --help shows the recipes, too.

    recipes: dict from stem to a dict of settings.
    """
    parser = argument_parser(docstring)
    add = parser.add_argument
    add("--fresh", action="store_true", help="start over instead of going on where it ended")
    add("--epochs", type=between(int, 1, 10**6), help="passes over the training images")
    add("--batch-size", type=between(int, 1, 10**6), help="images per step")
    add("--lr", type=between(float, 1e-9, 1e9), help="peak learning rate")
    rows = [[stem, *map(str, recipe.values())] for stem, recipe in recipes.items()]
    table = table_lines(["stem", *recipes["stride2"]], rows)
    parser.epilog = "\n".join(["What a flag leaves open is as in the stem's recipe:", *table])
    return parser


OLDEST_TORCH = (2, 9)  # as in requirements.txt


def parse_arguments(parser):
    """Parse sys.argv and settle what depends on the machine: results folder, device, precision.

    Raises UserError for a device that this machine lacks, and for a PyTorch that is too old.
    """
    args = parser.parse_args()
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        raise UserError(
            f"PyTorch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer is needed, this is "
            f"{torch.__version__}; install it with: pip install -r requirements.txt"
        )
    torch.backends.fp32_precision = "ieee"  # not TF32, to which cuDNN rounds of its own accord
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # torch 2.9 does not derive it
    args.results = args.results or Path("results-quick" if args.quick else "results")
    usable = {"cuda": _cuda_works, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if args.device == "auto":
        args.device = "cuda" if _cuda_works() else "cpu"
    elif not usable[args.device]():
        raise UserError(f"--device {args.device}: PyTorch can use none here; give --device auto")
    if args.precision == "auto":
        args.precision = best_precision(args.device)
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


def best_precision(device):
    """The precision that is fast here: "bfloat16" if there are instructions for it."""
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
    `train`, to the check before a training goes on, into the checkpoint and into metrics.json.
    """
    row = {**recipes[stem], **({"epochs": 2} if args.quick else {})}
    flags = {name: getattr(args, name) for name in row if getattr(args, name, None) is not None}
    machine = {"seed": args.seed, "precision": args.precision, "device": args.device}
    return {
        "question": question,
        "stem": stem,
        **OPTIMIZER,
        **row,
        **flags,
        **constants,
        **machine,
        "split_sha256": split["sha256"],
        "torch": str(torch.__version__).partition("+")[0],  # without its build, such as +cpu
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


SCRIPTS = {
    "q1": "q1_split.py",
    "q2": "q2_train_ce.py",
    "q3": "q3_attack.py",
    "q4": "q4_adv_train.py",
    "q5": "report.py",
    "q6": "q6_angular.py",
}


def command_for(path):
    """The command that makes a file of a results folder, such as results/q2/model.pt.

    It names the Python that runs, and can be pasted. For a file of the running script it is the
    command that runs, with --fresh for the state of a training; for another's, that script with
    the running one's folders, seed, mode and machine. A file in no question's folder is of an
    unknown script.
    """
    path = Path(path)
    script = SCRIPTS.get(path.parent.name)
    if script is None:
        return "the script of its question"
    if Path(sys.argv[0]).name == script:
        fresh = ["--fresh"] if path.name.endswith(STATE_SUFFIX) else []
        words = [*(word for word in sys.argv[1:] if word != "--fresh"), *fresh]
    else:
        parser = argument_parser("")
        args, _ = parser.parse_known_args()

        def given(name):
            value = getattr(args, name)
            return [] if value == parser.get_default(name) else [f"--{name}", value]

        seed = given("seed") if script != SCRIPTS["q1"] else []
        quick = ["--quick"] if args.quick else []
        machine = [*given("device"), *given("precision")]
        words = [*given("data"), "--results", path.parent.parent, *seed, *quick, *machine]
    here = [_from_here(sys.executable), _from_here(Path(__file__).with_name(script))]
    return _quoted([*here, *words])


def _from_here(path):
    """A path as it is shortest from the present folder."""
    with contextlib.suppress(ValueError):
        return Path(path).relative_to(Path.cwd())
    return path


def _quoted(words):
    """Words as a command line that the user's shell takes back."""
    words = list(map(str, words))
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def with_bar(batches, title):
    """The same batches, on a terminal with a tqdm bar once they have taken two seconds."""
    if not sys.stderr.isatty():
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc=title, leave=False, delay=2)


# ---- Files --------------------------------------------------------------------------------------


def write_file(path, content):
    """Write bytes so that `path` holds all of them or what it held before.

    Raises UserError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    partial_file = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file.unlink(missing_ok=True)  # of a process that was killed
        with open(partial_file, "xb") as file:  # exclusively: never through a link that lies there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _replace(partial_file, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial_file.unlink(missing_ok=True)
        reason = error.strerror
        if isinstance(error, FileExistsError):
            reason = f"{error.filename} is no folder, or a link to a place that is not there"
        raise UserError(
            f"cannot write {path}: {reason}; make room or make the folder writable, then run the "
            "same command again, without --fresh"
        ) from error


def _replace(source, target):
    """os.replace, for some seconds: on Windows a virus scanner may hold a file for a moment."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.2)
    os.replace(source, target)


MAX_BYTES = 250_000_000  # a training's state, the largest of our files, has up to 135 MB
DAMAGE = (  # what numpy, torch and json raise for a file that is not what it should be
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, EOFError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error),
)


@contextlib.contextmanager
def opened(path):
    """A file of a results folder, as a stream of its bytes.

    A file that is missing, too large, or not what the block takes it for ends in a UserError with
    the command that makes it.
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
        raise UserError(
            f"cannot read {path}: {error.strerror}; make it with: {command_for(path)}"
        ) from error
    except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the file
        raise
    except DAMAGE as error:
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(
            f"{path} is damaged or not ours ({reason}); make it again with: {command_for(path)}"
        ) from error


def sha256(*contents):
    """Hexadecimal SHA-256 of the bytes, one after the other."""
    return hashlib.sha256(b"".join(contents)).hexdigest()


def write_npz(path, arrays):
    """Write a dict of arrays in numpy's format."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_file(path, buffer.getbuffer())


def write_torch(path, content):
    """Write tensors and plain values in torch's format."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getbuffer())


def load_torch(content):
    """What is in a stream of such bytes: tensors and plain values, nothing that runs."""
    if zipfile.ZipFile(content).testzip():  # checksums, at which torch.load does not look
        raise ValueError("wrong checksum")
    content.seek(0)
    return torch.load(content, map_location="cpu", weights_only=True)


# ---- Checkpoints --------------------------------------------------------------------------------


def weights_sha256(weights):
    """SHA-256 over names, types, shapes and bytes of a state dict.

    It stands for the model in all results, whatever file holds the weights.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path, model, *, stem, provenance):
    """Write a model's weights, what `load_checkpoint` needs to build it, and where it comes from.

    provenance: dict of plain values as `provenance()` returns it. A file that holds the same stays
    as it is. Returns the SHA-256 of the weights.
    """
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    head = {"stem": stem, "num_outputs": model.head.out_features, "provenance": provenance}
    digest = weights_sha256(weights)
    with contextlib.suppress(UserError):
        before = read_checkpoint(path)
        if (before["sha256"], before["provenance"]) == (digest, provenance):
            return digest
    write_torch(path, {**head, "weights": weights})
    return digest


def save_trained(path, model, training):
    """Write a trained model's checkpoint; returns what metrics.json says of how it was made.

    training: what `train` returns. The numbers of an older model go first, so that they never stand
    beside the new one's curves.
    """
    path.with_name("metrics.json").unlink(missing_ok=True)
    recipe, history = training["recipe"], training["history"]
    provenance = {**training["origin"], "recipe": recipe}
    digest = save_checkpoint(path, model, stem=recipe["stem"], provenance=provenance)
    return {
        "file": path.name,
        "sha256": digest,
        "recipe": recipe,
        "history": history,
        "epoch_kept": training["epoch_kept"],
        "training_seconds": round(sum(epoch["seconds"] for epoch in history), 2),
        **{key: training["origin"][key] for key in ("git_commit", "code_sha256")},
        "notes": training["notes"],
    }


def read_checkpoint(path, split=None):
    """A checkpoint as a dict: `model` (a Network in eval mode), `stem`, `provenance`, `sha256`.

    The last is that of the weights. Raises UserError when the file is missing, damaged, not a
    checkpoint of ours, or of another split than the given one.
    """
    with opened(path) as content:
        checkpoint = load_torch(content)
        if not 1 <= checkpoint["num_outputs"] <= 1000:
            raise ValueError("a network of that size could fill the memory")
        with torch.random.fork_rng(devices=[]):
            model = resnet18(checkpoint["num_outputs"], checkpoint["stem"]).eval()
        model.load_state_dict(checkpoint["weights"])
        if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
            raise ValueError("weights that are not finite")
        origin = dict(checkpoint["provenance"])
    if split and origin.get("split_sha256") != split["sha256"]:
        raise UserError(
            f"{path} was trained on another split, so test images may be among its training "
            f"images; make the right one with: {command_for(path)}"
        )
    digest = weights_sha256(model.state_dict())
    return {"model": model, "stem": checkpoint["stem"], "provenance": origin, "sha256": digest}


def load_checkpoint(path):
    """The model in a checkpoint file, in eval mode; it takes [0, 1] images and normalises inside.

    Raises UserError when the file is missing, damaged, or not a checkpoint of ours.
    """
    return read_checkpoint(path)["model"]


def require_model(args, split):
    """Question 2's checkpoint, as read_checkpoint returns it, with its model on args.device.

    Raises UserError for another question's, and for one of another seed: the report could not
    compare what is made from it.
    """
    path = args.results / "q2" / "model.pt"
    checkpoint = read_checkpoint(path, split)
    question, seed = (checkpoint["provenance"].get(key) for key in ("question", "seed"))
    if question != "q2":
        raise UserError(
            f"{path} belongs to question {question}; make the right one with: {command_for(path)}"
        )
    if seed != args.seed:
        raise UserError(f"{path} was trained with seed {seed}: give this script --seed {seed}")
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


def provenance(args, question, split, **more):
    """What results were made from and on: a dict of plain values, with those of `more`.

    Results in one report must agree in `quick`, `split_sha256` and, where they have them, in
    `seed`, `stem` and `q2_sha256` (the weights of question 2 that they are about).
    """
    import torchvision

    cpu = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, "
    cpu += f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    return {
        "question": question,
        "quick": args.quick,
        "split_sha256": split["sha256"],
        **more,
        "device": args.device,
        "hardware": torch.cuda.get_device_name() if args.device == "cuda" else cpu,
        "precision": args.precision,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
        "git_commit": _git_commit(),
        "code_sha256": code_sha256(SCRIPTS[question]),
    }


def _git_commit():
    """The commit of the repository that tracks this file, "-dirty" where it has changed; or ""."""
    here = Path(__file__)
    git = ["git", "-C", here.parent]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", here.name], capture_output=True
        )
        if tracked.returncode:
            return ""
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def code_sha256(script):
    """SHA-256 of a script and of this file: of their syntax trees without docstrings.

    So comments and layout do not count either.
    """
    trees = []
    for name in (script, Path(__file__).name):
        tree = ast.parse(Path(__file__).with_name(name).read_bytes())
        for node in ast.walk(tree):
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            if isinstance(node, documented) and ast.get_docstring(node) is not None:
                del node.body[0]
        trees.append(ast.unparse(tree).encode())
    return sha256(*trees)


def write_metrics(folder, origin, metrics):
    """Write metrics.json, a script's last file: provenance first, then the question's own numbers.

    With them the SHA-256 of the question's figures, which tell whether a figure is of this run. A
    question that measures models has them under `models`: a dict from the name that tables show to
    a dict with `accuracy` by condition and whatever else was measured.
    """
    figures = {path.name: sha256(path.read_bytes()) for path in figures_in(folder)}
    metrics = {**origin, **metrics, "figures": figures, "peak_memory_mib": _peak_memory_mib()}
    if origin.get("device") == "cuda":
        metrics["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    write_file(folder / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False).encode())


def figures_in(folder):
    """The paths of a question's figures, without the ._ files that a Mac puts beside them."""
    return sorted(folder.glob("[!.]*.png"))


def _peak_memory_mib():
    """The most main memory that this process has held; None on Windows, which does not tell."""
    with contextlib.suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def read_metrics(path):
    """A question's metrics.json as a dict. Raises UserError when it is missing or damaged."""
    with opened(path) as content:
        return dict(json.load(content))


def metrics_found(results, questions):
    """The metrics of those of the questions that have been run: dict from question to metrics."""
    paths = {question: results / question / "metrics.json" for question in questions}
    return {question: read_metrics(path) for question, path in paths.items() if path.exists()}


def write_right(folder, models):
    """Write right.npz: under which conditions a model was right about which test images.

    models: dict from model to a dict from CONDITIONS to bool tensors, in the order of the split.
    """
    arrays = {
        f"{name}/{condition}": found.cpu().numpy()
        for name, right in models.items()
        for condition, found in right.items()
    }
    write_npz(folder / "right.npz", arrays)


def read_right(path):
    """What write_right has written, with bool arrays. Raises UserError for any other file."""
    models = {}
    with opened(path) as content, np.load(content, allow_pickle=False) as arrays:
        for key in arrays:
            name, condition = key.rsplit("/", 1)
            found = arrays[key]
            if found.dtype != bool or found.ndim != 1:
                raise ValueError(f"{key} is no list of yes and no")
            models.setdefault(name, {})[condition] = found
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


def standard_error(share, images):
    """Of an accuracy on so many images (binomial)."""
    return math.sqrt(share * (1 - share) / images)


def is_above_chance(share, images):
    """Whether an accuracy is above that of guessing by more than two standard errors."""
    return share - CHANCE > 2 * standard_error(CHANCE, images)


def print_conditions(title, models):
    """A table of accuracies by condition, and below it every warning that the attacks' checks gave.

    models: as under `models` in metrics.json.
    """
    eps, images = 255 * EPSILON["linf"], min(each["strongest_images"] for each in models.values())
    title = f"{title} (L-infinity, eps = {eps:.0f}/255; strongest: {images:,} images)"
    rows = [
        [name, *(percent(model["accuracy"][condition]) for condition in CONDITIONS)]
        for name, model in models.items()
    ]
    print_table(title, ["model", *CONDITIONS.values()], rows)
    for name, model in models.items():
        for warning in model["warnings"]:
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


# ---- Convolutions on a CPU -----------------------------------------------------------------------


def with_matrix_products(backbone, stem):
    """Let a ResNet-18 compute the convolutions of its smallest maps as matrix products.

    Same weights, same function; a third less time in training on processors without AVX-512.
    """
    stages = {"imagenet": ("layer3", "layer4"), "stride2": ("layer4",), "cifar": ()}[stem]
    for block in (block for stage in stages for block in getattr(backbone, stage)):
        for name in ("conv1", "conv2"):
            conv = getattr(block, name)
            shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
            product = Conv3x3(*shape, padding=1, bias=False, device="meta")  # no random weights
            product.weight = conv.weight
            setattr(block, name, product)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 or 2 and padding 1 as a matrix product: small maps on a CPU.

    The same function of the same weights. For an output of 1 x 1, the weights that would meet
    only padding are left out. Where 2 x 2 come out, training goes by im2col: without AVX-512,
    PyTorch's library takes the weights' gradient image by image, slow where images are small.
    """

    def forward(self, maps):
        side, stride = maps.shape[-1], self.stride[0]
        outputs = math.ceil(side / stride)
        if maps.device.type != "cpu" or outputs > (2 if self.training else 1):
            return super().forward(maps)
        if outputs == 1:
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
