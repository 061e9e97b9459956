"""What more than one question needs, in the order in which a run meets it.

    1. Errors and the command line       7. Evaluation
    2. Files                             8. Attacks
    3. CIFAR-10 and its split            9. Accuracy under attack
    4. Perturbation and augmentation    10. Training
    5. Random numbers                   11. UMAP and figures
    6. The network and its checkpoints  12. Results

Images are float32 in [0, 1], N x 3 x 32 x 32, wherever a function takes or returns them; labels are
int64. The network normalises inside its own forward, so an attack's epsilon is in pixel units.
Slow imports (torchvision, matplotlib, umap) stand in the functions that need them: `--help` is instant.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUM_IMAGES = 60_000
NUM_OFFICIAL_TRAIN = 50_000  # indices below are torchvision's training file, the others its test file


# ---- 1. Errors and the command line ------------------------------------------------------------


class UserError(Exception):
    """Something the user can put right. Its text is one line: what is wrong, where, and what to do."""


def run(main):
    """Call `main()` and end the process as a user expects: no traceback for a user's mistake.

    Exit status 2 with one line on stderr after a UserError, 130 with the way to go on after Ctrl-C.
    """
    try:
        main()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        command = " ".join(["python", *sys.argv])
        print(f"\nInterrupted. Finished epochs are kept; go on with: {command}", file=sys.stderr)
        sys.exit(130)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; see python {self.prog} --help\n")


def argument_parser(docstring):
    """Parser with the flags that every script has; its --help shows the script's own docstring."""
    parser = _OneLineParser(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"),
        help="folder that holds cifar-10-batches-py; fetched if absent (data)")
    add("--results", type=Path,
        help="folder for everything written (results, or results-quick with --quick)")
    add("--seed", type=_whole_number(0, 2**31 - 1), default=0, help="seed of every random number (0)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
        help="where to compute (auto: the best there is)")
    add("--quick", action="store_true",
        help="tiny subset, few epochs: shows that everything works, its numbers mean nothing")
    return parser


def add_training_flags(parser, *, epochs, batch_size, lr, stem):
    """Add the flags of the scripts that train; the arguments are their defaults."""
    add = parser.add_argument
    add("--epochs", type=_whole_number(1, 10_000), help=f"passes over the training images ({epochs}; 2 with --quick)")
    add("--batch-size", type=_whole_number(2, 100_000), default=batch_size, help=f"images per step ({batch_size})")
    add("--lr", type=positive_number, default=lr, help=f"peak learning rate ({lr})")
    add("--stem", choices=STEMS, default=stem, help=f"first layer of the ResNet-18, see common.resnet18 ({stem})")
    add_precision_flag(parser)
    add("--fresh", action="store_true", help="start training again instead of going on from the last finished epoch")
    parser.set_defaults(full_epochs=epochs)


def add_precision_flag(parser):
    """Add the flag of the scripts that compute with a network."""
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="of the convolutions (auto: bfloat16 where the processor has instructions for it)")


def parse_arguments(parser):
    """Parse sys.argv and fill in what depends on other flags: results folder, device, epochs, precision.

    Raises UserError for a device that this machine lacks or a results folder that cannot be written.
    """
    args = parser.parse_args()
    if args.results is None:
        args.results = Path("results-quick" if args.quick else "results")
    args.device = _pick_device(args.device)
    if hasattr(args, "epochs"):
        args.epochs = args.epochs or (2 if args.quick else args.full_epochs)
        del args.full_epochs
    if hasattr(args, "precision"):
        args.precision = pick_precision(args.precision, args.device)
    write_file(args.results / ".writable", b"")  # an hour's training must not end at a full or read-only disk
    (args.results / ".writable").unlink()
    return args


def pick_precision(name, device):
    """What --precision means on a device: name, or for "auto" bfloat16 where the processor has instructions for it."""
    if name != "auto":
        return name
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch lack it
        native = device == "cpu" and capabilities.get("avx512_bf16", False)
    return "bfloat16" if native else "float32"


def with_bar(batches, title):
    """The same batches, on a terminal with a tqdm bar once they have taken two seconds."""
    if not sys.stderr.isatty():
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc=title, leave=False, delay=2)


def _pick_device(name):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in available.items() if present)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch sees no such device here; use --device auto")
    return name


def _whole_number(low, high):
    """An argparse type."""
    def parse(text):
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)
    return parse


def positive_number(text):
    """An argparse type."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


# ---- 2. Files ----------------------------------------------------------------------------------


def write_file(path, content):
    """Write bytes such that `path` holds all of them or what it held before, whenever the power goes.

    Raises UserError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        if os.name == "posix":  # the new name, too, must be on the disk
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; make room or give another --results, "
                        "then run the same command again") from error


def sha256(*contents):
    """Hexadecimal SHA-256 of the bytes, one after the other."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()


def read_file(path, *, made_by, max_bytes=200_000_000):
    """The bytes of a file that an earlier command has made.

    Raises UserError when it is missing, unreadable or larger than anything these scripts write.
    """
    path = Path(path)
    try:
        if path.stat().st_size > max_bytes:
            raise UserError(f"{path} is too large to be one of ours; make it again with: {made_by}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it with: {made_by}") from error


def script_command(question, results, quick=False):
    """The command line that makes a question's results, for error messages."""
    script = {"q1": "q1_split.py", "q2": "q2_train_ce.py", "q3": "q3_attack.py", "q4": "q4_adv_train.py",
              "q6": "q6_angular.py"}[question]
    return f"python {script} --results {results}" + (" --quick" if quick else "")


# ---- 3. CIFAR-10 and its split -----------------------------------------------------------------


def load_cifar10(root):
    """The 60,000 images of CIFAR-10: torchvision's training file in its order, then its test file.

    Returns images uint8 60000 x 3 x 32 x 32 and labels int64 60000. Downloads them when `root` holds no
    `cifar-10-batches-py`. The files are pickles, so they are opened only after their checksums are right.
    Raises UserError for missing data without network and for a damaged file.
    """
    from torchvision.datasets.utils import check_integrity

    dataset = _cifar10_dataset(root)
    folder = Path(root) / dataset.base_folder
    if not folder.exists():
        _download(dataset, root)
    try:
        for name, md5 in [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]:
            if not check_integrity(str(folder / name), md5):
                raise UserError(f"{folder / name} is missing or damaged (wrong MD5); delete {folder} "
                                "and run again to fetch it anew, or give --data a good copy")
        parts = [dataset(root, train=True), dataset(root, train=False)]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; give --data a folder that you may read") from error
    images = torch.from_numpy(np.concatenate([part.data for part in parts])).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(parts[0].targets + parts[1].targets)
    return images, labels


def _download(dataset, root):
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        dataset(root, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"CIFAR-10 is not in {root} and cannot be fetched ({reason}); connect to the network, "
                        "or give --data the folder that holds cifar-10-batches-py") from error


def _cifar10_dataset(root):
    """torchvision's CIFAR10, or in our tests the same class with the checksums of synthetic files.

    The tests reach it by naming the SHA-256 of exactly these files in the environment: whoever can do
    that has made the files, and nobody does it by accident.
    """
    from torchvision.datasets import CIFAR10

    expected = os.environ.get("SYNTHETIC_CIFAR10_SHA256")
    if expected is None:
        return CIFAR10
    folder = Path(root) / CIFAR10.base_folder
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list] + [CIFAR10.meta["filename"]]
    contents = {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if sha256(*contents.values()) != expected:
        raise UserError(f"{folder} is not the data that SYNTHETIC_CIFAR10_SHA256 names; unset that variable")

    class SyntheticCIFAR10(CIFAR10):
        train_list = [[name, hashlib.md5(contents[name]).hexdigest()] for name, _ in CIFAR10.train_list]
        test_list = [[name, hashlib.md5(contents[name]).hexdigest()] for name, _ in CIFAR10.test_list]
        meta = {**CIFAR10.meta, "md5": hashlib.md5(contents[CIFAR10.meta["filename"]]).hexdigest()}

    return SyntheticCIFAR10


def send(tensor, device):
    """A CPU tensor on the device, without making a GPU wait for the copy."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def as_float(images):
    """uint8 images in 0..255 as float32 in [0, 1]."""
    return images.float() / 255


def save_split(path, *, train, val, test, protocol, seed, quick):
    """Write the three int64 index arrays and how they were drawn as an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, train=train, val=val, test=test, protocol=protocol, seed=seed, quick=quick)
    write_file(path, buffer.getvalue())


def load_split(path, made_by="python q1_split.py"):
    """Read `split.npz` and check it.

    Returns a dict: `train`, `val`, `test` (int64 tensors of indices into load_cifar10's images, disjoint),
    `protocol`, `seed`, `quick`, and `sha256` over all of these, which every later artefact carries.
    Raises UserError when the file is missing, damaged or not a split.
    """
    content = read_file(path, made_by=made_by)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            parts = {name: arrays[name] for name in ("train", "val", "test")}
            protocol, seed, quick = (arrays[name].item() for name in ("protocol", "seed", "quick"))
        indices = np.concatenate(list(parts.values()))
        valid = (
            all(part.dtype == np.int64 and part.ndim == 1 and len(part) for part in parts.values())
            and indices.min() >= 0 and indices.max() < NUM_IMAGES and len(np.unique(indices)) == len(indices)
            and protocol in ("pooled", "official") and type(seed) is int and type(quick) is bool
        )
    except Exception as error:  # numpy raises a dozen kinds for a damaged archive
        raise UserError(f"{path} is damaged ({type(error).__name__}); make it again with: {made_by}") from error
    if not valid:
        raise UserError(f"{path} is no split into disjoint parts of CIFAR-10; make it again with: {made_by}")
    digest = sha256(*(part.tobytes() for part in parts.values()), f"{protocol} {seed} {quick}".encode())
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    return {**tensors, "protocol": protocol, "seed": seed, "quick": quick, "sha256": digest}


def load_data(args):
    """Images and labels of each part of q1's split.

    Returns the split (see load_split) and a dict from `train`, `val`, `test` to (images uint8, labels int64),
    on args.device. Raises UserError when the split was made in the other of the two modes, quick and full.
    """
    path, made_by = args.results / "q1" / "split.npz", script_command("q1", args.results, args.quick)
    split = load_split(path, made_by)
    if split["quick"] != args.quick:
        made = "with --quick" if split["quick"] else "without --quick"
        raise UserError(f"{path} was made {made}; run this script the same way, or first: {made_by}")
    images, labels = load_cifar10(args.data)
    parts = {name: (images[split[name]].to(args.device), labels[split[name]].to(args.device))
             for name in ("train", "val", "test")}
    return split, parts


# ---- 4. Perturbation and augmentation ----------------------------------------------------------

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}  # as in MoCo v2 (Chen et al. 2020)
MAX_ROTATION = 5.0  # degrees
NUM_PIXELS = 10  # of the 32 x 32, in each of which one random channel becomes 1


def perturb(images, generator):
    """The assignment's perturbation: colour jitter, a small rotation, ten pixels with one channel at full.

    images N x 3 x H x W float32 in [0, 1]; generator a CPU torch.Generator. Returns the same shape and range.
    Every image draws its own values, from the distributions of torchvision's ColorJitter (the order of its
    four steps included) and RandomRotation (nearest neighbour, black corners). All draws are made on the CPU:
    the same generator gives the same images on every device, and a GPU never has to wait for an index.
    """
    number, _, height, width = images.shape
    factors = {name: torch.empty(number).uniform_(1 - JITTER[name], 1 + JITTER[name], generator=generator)
               for name in ("brightness", "contrast", "saturation")}
    factors["hue"] = torch.empty(number).uniform_(-JITTER["hue"], JITTER["hue"], generator=generator)
    order = torch.rand(number, 4, generator=generator).argsort(1)
    angles = torch.empty(number).uniform_(-MAX_ROTATION, MAX_ROTATION, generator=generator)
    pixels = torch.rand(number, height * width, generator=generator).topk(NUM_PIXELS, dim=1).indices
    channels = torch.randint(0, 3, (number, NUM_PIXELS), generator=generator)

    images = color_jitter(images, factors, order)
    images = rotate(images, angles)
    return set_to_full(images, channels, pixels)


def color_jitter(images, factors, order):
    """Brightness, contrast, saturation and hue of each image by its own factors and in its own order.

    factors: dict of four float N tensors on the CPU, in the sense of torchvision's adjust_* functions;
    order: int64 N x 4 on the CPU, a permutation of 0..3 (brightness, contrast, saturation, hue) per row.
    """
    images = images.clone(memory_format=torch.contiguous_format)
    adjust = (_adjust_brightness, _adjust_contrast, _adjust_saturation, _adjust_hue)
    for step in range(4):
        for kind, name in enumerate(("brightness", "contrast", "saturation", "hue")):
            chosen = (order[:, step] == kind).nonzero()[:, 0]
            factor = send(factors[name][chosen].view(-1, 1, 1, 1), images.device)
            chosen = send(chosen, images.device)
            images.index_copy_(0, chosen, adjust[kind](images.index_select(0, chosen), factor))
    return images


def _grayscale(images):
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _adjust_brightness(images, factor):
    return (factor * images).clamp_(0, 1)


def _adjust_contrast(images, factor):
    mean = _grayscale(images).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, images, factor).clamp_(0, 1)


def _adjust_saturation(images, factor):
    return torch.lerp(_grayscale(images), images, factor).clamp_(0, 1)


def _adjust_hue(images, shift):
    """Turn the hue by `shift` of a full circle: RGB to HSV, add, and back by HSV's closed formula."""
    red, green, blue = images.split(1, dim=1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sector = torch.where(
        value == red, (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device).view(1, 3, 1, 1)
    k = offsets + sector + 6 * shift
    k -= 6 * (k / 6).floor()  # k % 6, which takes several times as long
    return (value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)).clamp_(0, 1)


def rotate(images, degrees):
    """Rotate each image about its centre by its own angle (float N, counter-clockwise), black outside."""
    radians = send(degrees * math.pi / 180, images.device)
    cosine, sine, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    matrices = torch.stack([cosine, -sine, zero, sine, cosine, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)


def set_to_full(images, channels, pixels):
    """Set channels[n, i] of the pixel pixels[n, i] (row * width + column) of image n to 1."""
    flat = images.flatten(1)
    index = send(channels * images[0, 0].numel() + pixels, images.device)
    return flat.scatter(1, index, 1.0).view_as(images)


def crop_and_flip(images, generator):
    """The usual augmentation of clean training images: a random shift of up to 4 pixels and a random mirror.

    images N x 3 x H x W float32. The border is filled by reflection. Draws from the CPU generator.
    """
    number, _, height, width = images.shape
    top, left = torch.randint(0, 9, (2, number, 1), generator=generator)
    mirrored = torch.rand(number, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
    rows, columns = send(rows, images.device), send(columns, images.device)
    padded = F.pad(images, (4, 4, 4, 4), mode="reflect").permute(0, 2, 3, 1)
    image = torch.arange(number, device=images.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


# ---- 5. Random numbers -------------------------------------------------------------------------

STREAMS = ("perturbed train", "perturbed val", "perturbed test", "noise", "epoch")


def generator_for(seed, stream, number=0):
    """A CPU generator of its own for each use of random numbers, so that none depends on what ran before.

    stream: one of STREAMS; number: for instance the epoch.
    """
    state = np.random.SeedSequence([seed, STREAMS.index(stream), number]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


# ---- 6. The network and its checkpoints --------------------------------------------------------

STEMS = ("imagenet", "stride2", "cifar")
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the official training file


class Normalize(nn.Module):
    """Images in [0, 1] to zero mean and unit variance per channel."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(CIFAR10_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CIFAR10_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, images):
        # Channels last is the layout in which convolutions run fastest, on a CPU as on a GPU.
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution of stride 1 or 2 and padding 1 as a matrix product, where that is faster on a processor.

    The same function of the same weights. Where only one pixel comes out, the weights that would meet nothing but
    padding are left out. Where 2 x 2 come out, training goes by im2col: without AVX-512, PyTorch's library takes the
    gradient of the weights image by image, which is slow where an image has few pixels and a convolution most of its
    weights.
    """

    def forward(self, maps):
        side, stride = maps.shape[-1], self.stride[0]
        if maps.device.type != "cpu" or side > (2 * stride if self.training else stride):
            return super().forward(maps)
        if side <= stride:
            met = self.weight[:, :, 1:1 + side, 1:1 + side]
            return F.linear(maps.flatten(1), met.flatten(1), self.bias)[:, :, None, None]
        padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # N x H x W x C, the order in memory
        taps = [padded[:, top:top + side:stride, left:left + side:stride] for top in range(3) for left in range(3)]
        weights = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(torch.cat(taps, dim=3), weights, self.bias).permute(0, 3, 1, 2)


def resnet18(num_outputs, stem):
    """ResNet-18 (He et al. 2016) with random weights from torch's global generator, for [0, 1] images.

    stem "imagenet" is torchvision's network unchanged: a 7x7 convolution of stride 2 and a max-pool, which
    leave the first stage an 8 x 8 map of a 32 x 32 image. "cifar" has a 3x3 convolution of stride 1 and no
    max-pool (32 x 32, the usual CIFAR network, 15 times the work), "stride2" a 3x3 convolution of stride 2
    and no max-pool (16 x 16, a quarter of the work of "cifar").
    Returns a Sequential of `normalize`, `backbone` (512 numbers per image) and `head` (num_outputs).
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
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.__class__ = Conv3x3  # which leaves the weights drawn above as they are
    layers = OrderedDict(normalize=Normalize(), backbone=backbone, head=nn.Linear(512, num_outputs))
    return nn.Sequential(layers).to(memory_format=torch.channels_last)


def save_checkpoint(path, model, *, stem, provenance):
    """Write a model's weights with what `load_checkpoint` needs to build it and where it comes from.

    provenance: dict of plain values as `provenance()` returns it. Returns the SHA-256 of the file.
    """
    content = {
        "stem": stem,
        "num_outputs": model.head.out_features,
        "provenance": provenance,
        "weights": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
    }
    content = _torch_bytes(content)
    write_file(path, content)
    return sha256(content)


def read_checkpoint(path, made_by="the script of its question"):
    """Checkpoint as a dict: `stem`, `num_outputs`, `provenance`, `weights`, `sha256`.

    Only tensors and plain values are read (weights_only), so a checkpoint from a stranger cannot run code.
    Raises UserError when the file is missing, damaged, or not a checkpoint of ours.
    """
    content = read_file(path, made_by=made_by)
    checkpoint = _torch_load(content, path, made_by)
    try:
        weights, num_outputs = checkpoint["weights"], checkpoint["num_outputs"]
        if type(num_outputs) is not int or not 1 <= num_outputs <= 1000:
            raise ValueError("a network of that size is none of ours, and building it could fill the memory")
        with torch.random.fork_rng(devices=[]):
            expected = resnet18(num_outputs, checkpoint["stem"]).state_dict()
        valid = (
            isinstance(checkpoint["provenance"], dict) and weights.keys() == expected.keys()
            and all(weights[name].shape == tensor.shape and weights[name].dtype == tensor.dtype
                    and bool(weights[name].isfinite().all()) for name, tensor in expected.items())
        )
    except Exception as error:  # whatever a forged file can provoke
        raise UserError(f"{path} is no checkpoint of these scripts; make it again with: {made_by}") from error
    if not valid:
        raise UserError(f"{path} does not hold the weights of its network; make it again with: {made_by}")
    return {**checkpoint, "sha256": sha256(content)}


def build_model(checkpoint):
    """The model of a dict from `read_checkpoint`, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        model = resnet18(checkpoint["num_outputs"], checkpoint["stem"])
    model.load_state_dict(checkpoint["weights"])
    return model.eval()


def load_checkpoint(path):
    """The model in a checkpoint file, in eval mode; it takes [0, 1] images and normalises inside.

    Raises UserError when the file is missing, damaged, or not a checkpoint of ours.
    """
    return build_model(read_checkpoint(path))


def refuse_other_split(path, checkpoint, split, way_out):
    """Raise UserError, with the way out in it, unless the checkpoint read from `path` was trained on this split."""
    if checkpoint["provenance"].get("split_sha256") != split["sha256"]:
        raise UserError(f"{path} was trained on another split, so test images may be among its training images; {way_out}")


def require_model(args, split, question, file="model.pt"):
    """An earlier question's model on args.device, in eval mode, and its checkpoint's dict.

    Raises UserError when it is missing, or made by another question, from another split or in quick mode.
    """
    path = args.results / question / file
    made_by = script_command(question, args.results, args.quick)
    checkpoint = read_checkpoint(path, made_by)
    origin = checkpoint["provenance"]
    if origin.get("question") != question:
        raise UserError(f"{path} belongs to question {origin.get('question')}; make the right one with: {made_by}")
    refuse_other_split(path, checkpoint, split, f"make the right one with: {made_by}")
    return build_model(checkpoint).to(args.device), checkpoint


def _torch_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def _torch_load(content, path, made_by):
    try:
        # The file is a zip archive with a checksum for each member, which torch.load does not look at.
        if zipfile.ZipFile(io.BytesIO(content)).testzip() is not None:
            raise ValueError("wrong checksum")
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged or forbidden file
        raise UserError(f"{path} is damaged or holds more than weights; make it again with: {made_by}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not one of our files; make it again with: {made_by}")
    return loaded


# ---- 7. Evaluation -----------------------------------------------------------------------------

EVALUATION_BATCH = 250  # fits a processor's cache better than more, and its memory
KNN_BATCH = 1000  # embeddings at once: their matrix product is faster than that of fewer


class Cast(nn.Module):
    """Change the dtype of a tensor on its way through a Sequential."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, tensor):
        return tensor.to(self.dtype)


def frozen(model, precision="float32"):
    """A copy for evaluation and attacks: same function as model.eval(), no gradients for the weights.

    model: what `resnet18` returns. Each batch-norm is folded into the convolution before it, which saves a pass
    over every feature map. precision "bfloat16" computes the backbone in it, twice as fast where the processor
    has the instructions; images, the features that enter the head, outputs and gradients stay float32.
    """
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in list(model.modules()):
        children = list(module.named_children())
        for (name, child), (next_name, next_child) in zip(children, children[1:]):
            if isinstance(child, nn.Conv2d) and isinstance(next_child, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(child, next_child))
                setattr(module, next_name, nn.Identity())
    dtype = getattr(torch, precision)
    layers = OrderedDict(normalize=model.normalize, lower=Cast(dtype), backbone=model.backbone.to(dtype),
                         restore=Cast(torch.float32), head=model.head)
    return nn.Sequential(layers).eval().to(memory_format=torch.channels_last)


def in_batches(function, inputs, size=EVALUATION_BATCH):
    """`function` over images or embeddings in batches of `size`, without gradients; its results one after the other."""
    with torch.no_grad():
        return torch.cat([function(batch) for batch in inputs.split(size)])


def predict(model, images):
    """Most likely class of each image, int64 N."""
    return in_batches(lambda batch: model(batch).argmax(1), images)


def accuracy(predicted, labels):
    """Share of equal entries, as a float."""
    return (predicted == labels).sum().item() / len(labels)


def backbone_features(model, images):
    """The 512 numbers per image that the convolutional part, all but the head, ends in: float32 N x 512."""
    return in_batches(model[:-1], images)


def knn_predict(train_embeddings, train_labels, embeddings, k):
    """Majority vote of the k nearest training embeddings (Euclidean), int64 N; a tie goes to the smaller label.

    train_embeddings M x D, train_labels M int64, embeddings N x D. Raises ValueError unless 1 <= k <= M.
    """
    if not 1 <= k <= len(train_embeddings):
        raise ValueError(f"k is {k}, but there are {len(train_embeddings)} training embeddings")
    half_square = train_embeddings.square().sum(1) / 2
    num_classes = int(train_labels.max()) + 1
    rows = min(KNN_BATCH, len(embeddings))
    distances = train_embeddings.new_empty(rows, len(train_embeddings))  # made once: fresh memory is slow

    def vote(batch):
        # |a - b|^2 / 2 = |b|^2 / 2 - ab + a constant of the query, which does not change the order
        torch.addmm(half_square, batch, train_embeddings.T, alpha=-1, out=distances[: len(batch)])
        nearest = distances[: len(batch)].topk(k, largest=False, sorted=False)
        return F.one_hot(train_labels[nearest.indices], num_classes).sum(1).argmax(1)

    return in_batches(vote, embeddings, KNN_BATCH)


# ---- 8. Attacks --------------------------------------------------------------------------------
# Norm and epsilon are those of the literature's usual threat models on CIFAR-10 (Croce et al. 2021,
# RobustBench). A "model" here is anything that maps images to logits or log-probabilities and can be
# differentiated; attacks leave its mode and its weights alone.

EPSILON = {"linf": 8 / 255, "l2": 0.5}
PGD_STEPS = 20
PGD_STEP_SIZE = 2 / 255


def summed_cross_entropy(logits, labels):
    """The loss that attacks on a classifier raise. Summed, so that no image's gradient depends on the batch."""
    return F.cross_entropy(logits, labels, reduction="sum")


def most_likely(logits):
    """A classifier's decision."""
    return logits.argmax(1)


def fgm(model, images, labels, eps, norm="linf", loss=summed_cross_entropy):
    """Fast Gradient Method (Goodfellow et al. 2015): one step of length eps up the loss.

    images N x 3 x H x W in [0, 1], labels int64 N, eps in pixel units, norm "linf" or "l2",
    loss(model(images), labels) a scalar. Returns images within eps of the given ones and in [0, 1].
    """
    adversarial = torch.empty_like(images)
    for batch, target, result in _matching_batches(images, labels, adversarial):
        _, gradient = _output_and_gradient(model, batch, target, loss)
        result.copy_((batch + eps * _direction(gradient, norm)).clamp(0, 1))
        _assert_allowed(result, batch, eps, norm)
    return adversarial


def under_fgm(function, model, images, labels, loss=summed_cross_entropy):
    """`function` of the images under L-infinity FGM at EPSILON, batch by batch: all of them at once would take memory.

    function: from attacked images to a tensor with as many rows. Otherwise as `fgm`.
    """
    return torch.cat([function(fgm(model, batch, target, EPSILON["linf"], loss=loss))
                      for batch, target in _matching_batches(images, labels)])


def pgd(model, images, labels, eps, step_size, steps, norm="linf", loss=summed_cross_entropy):
    """Projected Gradient Descent (Madry et al. 2018): `steps` FGM steps, each projected back into the eps ball.

    It starts at the image itself, not at a random point, and so is deterministic. Otherwise as `fgm`.
    """
    adversarial = images.clone()
    for start, target, result in _matching_batches(images, labels, adversarial):
        for _ in range(steps):
            _, gradient = _output_and_gradient(model, result, target, loss)
            result.copy_(_pgd_step(result, start, gradient, eps, step_size, norm))
        _assert_allowed(result, start, eps, norm)
    return adversarial


def random_noise(images, eps, generator):
    """Every value moved by eps up or down at random, clipped to [0, 1]: the yardstick of an L-infinity attack."""
    signs = send(torch.randint(0, 2, images.shape, generator=generator, dtype=torch.int8), images.device)
    return (images + eps * (2.0 * signs - 1)).clamp(0, 1)


def _matching_batches(*tensors):
    """List of batches of all tensors together; they are views, so writing to one writes to its tensor."""
    return list(zip(*(tensor.split(EVALUATION_BATCH) for tensor in tensors)))


def _output_and_gradient(model, images, labels, loss):
    """model(images), and the loss's gradient at the images alone: autograd skips the weights' gradients."""
    images = images.detach().requires_grad_()
    output = model(images)
    return output.detach(), torch.autograd.grad(loss(output, labels), images)[0]


def _direction(gradient, norm):
    """The step of length 1 in the given norm that raises a linear loss most."""
    if norm == "linf":
        return gradient.sign()
    if norm == "l2":
        # A confident model's gradients are so small that their squares are 0 in float32: bring them to size 1 first.
        largest = gradient.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
        gradient = gradient / largest.clamp_min(torch.finfo(gradient.dtype).tiny)
        return gradient / _l2_norm(gradient).clamp_min(1e-12)
    raise ValueError(f"norm is {norm!r}, not 'linf' or 'l2'")


def _pgd_step(adversarial, images, gradient, eps, step_size, norm):
    change = adversarial + step_size * _direction(gradient, norm) - images
    if norm == "linf":
        change = change.clamp(-eps, eps)
    else:
        change = change * (eps / _l2_norm(change).clamp_min(eps))
    return (images + change).clamp(0, 1)


def _l2_norm(images):
    return images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _assert_allowed(adversarial, images, eps, norm):
    change = adversarial - images
    size = change.abs().amax() if norm == "linf" else _l2_norm(change).amax()
    if not (size <= eps + 1e-5 and adversarial.amin() >= 0 and adversarial.amax() <= 1):
        raise AssertionError(f"attack left its bounds: size {size:.6f} for eps {eps:.6f}, or values outside [0, 1]")


# ---- 9. Accuracy under attack ------------------------------------------------------------------

CHECKED_IMAGES = 1_000  # on which the checks for a flawed attack are made


def perturbed_images(images, part, seed):
    """The perturbed images of a part ("train", "val" or "test"), the same ones in every question.

    images uint8 N x 3 x 32 x 32. Returns float32 of the same shape.
    """
    generator = generator_for(seed, f"perturbed {part}")
    return in_batches(lambda batch: perturb(as_float(batch), generator), images)


def robustness(model, exact, images, perturbed, labels, seed, loss=summed_cross_entropy, decide=most_likely):
    """A model's accuracy under every test condition, each attack at EPSILON of its norm.

    model and exact: the network, `frozen` in the precision to measure in and in float32, for a check of the former;
    images and perturbed N x 3 x 32 x 32, labels N; decide(model(images)) gives the classes that count.
    Returns a dict: `accuracy` (clean, perturbed, fgm, perturbed_fgm, pgd; L-infinity), `accuracy_l2` (fgm,
    perturbed_fgm), `pgd_by_step` (see pgd_accuracy_by_step), `checks` and `warnings` (see attack_checks).
    """
    attacks = list(EPSILON.items())
    clean, fgm_linf, fgm_l2 = fgm_accuracies(model, images, labels, attacks, loss, decide)
    shifted, shifted_fgm_linf, shifted_fgm_l2 = fgm_accuracies(model, perturbed, labels, attacks, loss, decide)
    by_step = pgd_accuracy_by_step(model, images, labels, EPSILON["linf"], PGD_STEP_SIZE, PGD_STEPS, loss, decide)
    values = {"clean": clean, "perturbed": shifted, "fgm": fgm_linf, "perturbed_fgm": shifted_fgm_linf, "pgd": by_step[-1]}
    checks, warnings = attack_checks(model, exact, images, labels, values, seed, loss, decide)
    return {"accuracy": values, "accuracy_l2": {"fgm": fgm_l2, "perturbed_fgm": shifted_fgm_l2},
            "pgd_by_step": by_step, "checks": checks, "warnings": warnings}


def fgm_accuracies(model, images, labels, attacks, loss=summed_cross_entropy, decide=most_likely):
    """Accuracy on the images as they are, then on their FGM images for each (norm, eps) of `attacks`.

    One gradient serves all of them, since its direction does not depend on eps. Returns a list of floats.
    """
    correct = torch.zeros(1 + len(attacks), dtype=torch.long)
    for batch, target in with_bar(_matching_batches(images, labels), "FGM"):
        output, gradient = _output_and_gradient(model, batch, target, loss)
        correct[0] += (decide(output) == target).sum().cpu()
        for number, (norm, eps) in enumerate(attacks, start=1):
            adversarial = (batch + eps * _direction(gradient, norm)).clamp(0, 1)
            _assert_allowed(adversarial, batch, eps, norm)
            with torch.no_grad():
                correct[number] += (decide(model(adversarial)) == target).sum().cpu()
    return (correct.double() / len(images)).tolist()


def pgd_accuracy_by_step(model, images, labels, eps, step_size, steps, loss=summed_cross_entropy, decide=most_likely):
    """Share of images still right after 0, 1, ..., `steps` L-infinity PGD steps: a list of steps + 1 floats.

    An image counts as lost from the first step that fools the model and is attacked no further, as in
    AutoAttack (Croce & Hein 2020): sharper than looking at the last step alone, and several times cheaper.
    """
    correct = torch.zeros(steps + 1, dtype=torch.long)
    for start, target in with_bar(_matching_batches(images, labels), "PGD"):
        adversarial = start
        for step in range(steps + 1):
            output, gradient = _output_and_gradient(model, adversarial, target, loss)
            alive = decide(output) == target
            correct[step] += alive.sum().cpu()
            start, target = start[alive], target[alive]
            if len(start) == 0:
                break
            adversarial = _pgd_step(adversarial[alive], start, gradient[alive], eps, step_size, "linf")
            _assert_allowed(adversarial, start, eps, "linf")
    return (correct.double() / len(images)).tolist()


def attack_checks(model, exact, images, labels, values, seed, loss, decide):
    """Signs that a robust accuracy is too good to be true (Athalye et al. 2018; Carlini et al. 2019).

    values: accuracies under clean, fgm and pgd on all images; the others as in `robustness`. Returns a dict of the
    accuracies looked at here, on the first CHECKED_IMAGES images: under noise of FGM's size, under PGD with
    eps = 1, under FGM as measured and with gradients of the exact model; and a list of warnings, one sentence
    each, empty when nothing is suspicious.
    """
    images, labels = images[:CHECKED_IMAGES], labels[:CHECKED_IMAGES]
    noisy = random_noise(images, EPSILON["linf"], generator_for(seed, "noise"))
    noise = accuracy(decide(in_batches(model, noisy)), labels)
    unbounded = pgd_accuracy_by_step(model, images, labels, 1.0, 0.1, PGD_STEPS, loss, decide)[-1]
    measured, in_float32 = (fgm_accuracies(network, images, labels, [("linf", EPSILON["linf"])], loss, decide)[1]
                            for network in (model, exact))
    warnings = []
    if values["pgd"] > values["fgm"]:
        warnings.append(f"PGD ({percent(values['pgd'])}) is no stronger than FGM ({percent(values['fgm'])}): "
                        "the gradients may be masked.")
    if values["fgm"] - values["pgd"] > 0.1 and values["fgm"] > 0.5 * values["clean"]:
        warnings.append(f"FGM ({percent(values['fgm'])}) is far weaker than PGD ({percent(values['pgd'])}): "
                        "its accuracy says little about robustness (catastrophic overfitting looks like this).")
    if noise <= values["fgm"]:
        warnings.append(f"Random noise (accuracy {percent(noise)}) hurts as much as FGM ({percent(values['fgm'])}).")
    if unbounded > 1 / len(CLASSES):
        warnings.append(f"Accuracy is {percent(unbounded)} under PGD with eps = 1, where none should be above chance.")
    if measured - in_float32 > 0.01:
        warnings.append(f"FGM leaves {percent(measured)}, but {percent(in_float32)} with gradients in float32: rounding "
                        "weakens the attack; measure again with --precision float32.")
    checks = {"noise": noise, "pgd_eps_1": unbounded, "fgm": measured, "fgm_float32": in_float32, "images": len(images)}
    return checks, warnings


# ---- 10. Training ------------------------------------------------------------------------------

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARMUP = 0.2  # share of all steps in which the learning rate rises linearly; then it falls linearly to 0
VALIDATION_SUBSET = 2_000  # the first validation images (q1 has shuffled them), scored after each epoch


def shuffled_batches(number, batch_size, generator):
    """An epoch over `number` images: int64 index tensors of batch_size each, the incomplete last one left out.

    Raises UserError when there are fewer images than one batch.
    """
    if number < batch_size:
        raise UserError(f"--batch-size {batch_size}: there are only {number} training images; give a smaller one")
    batches = torch.randperm(number, generator=generator).split(batch_size)
    return [batch for batch in batches if len(batch) == batch_size]


def train(model, batches, batch_loss, evaluate, args, recipe, state_file):
    """Train `model` in place for args.epochs, resumably: SGD with Nesterov momentum and a one-cycle schedule.

    batches(generator): the index tensors of one epoch;
    batch_loss(model, indices, generator): differentiable scalar loss and number of correct predictions;
    evaluate(model): dict of numbers to note after each epoch;
    recipe: dict of plain values, everything that shapes the result. After each epoch the whole state goes to
    `state_file`; a later call goes on from there and ends bit for bit where an uninterrupted one does (on the
    CPU), because every epoch's random numbers come from args.seed and the epoch alone.
    Returns one dict per epoch: loss, accuracy, seconds and what `evaluate` gave.
    Raises UserError for a state file of another recipe and for a loss that is no longer finite.
    """
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim <= 1]  # batch-norm and biases
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=MOMENTUM, nesterov=True, fused=args.device != "mps")
    recipe = {**recipe, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "warmup": WARMUP}
    history = [] if args.fresh else _resume(state_file, model, optimizer, recipe)
    remedy = f"lower the peak learning rate (--lr), now {args.lr:g}, and start over with --fresh"

    for epoch in range(len(history), args.epochs):
        started = time.perf_counter()
        generator = generator_for(args.seed, "epoch", epoch)
        title = f"epoch {epoch + 1}/{args.epochs}"
        losses, correct, seen = [], 0, 0
        epoch_batches = batches(generator)
        bar = with_bar(epoch_batches, title)
        model.train()
        for step, indices in enumerate(bar):
            indices = send(indices, args.device)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * one_cycle((epoch + step / len(epoch_batches)) / args.epochs)
            with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bfloat16"):
                loss, batch_correct = batch_loss(model, indices, generator)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            # Tensors are collected, not numbers: reading a number would make a GPU wait at every step.
            losses.append(loss.detach())
            correct, seen = correct + batch_correct, seen + len(indices)
            if bar is not epoch_batches and step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{float(correct) / seen:.3f}")
        mean_loss = _finite_mean(losses, epoch, remedy)
        seconds = time.perf_counter() - started
        history.append({"loss": mean_loss, "accuracy": float(correct) / seen, "seconds": seconds, **evaluate(model)})
        for name, value in history[-1].items():
            if not math.isfinite(value):
                raise UserError(f"{name} became {value} at the end of epoch {epoch + 1}; {remedy}")
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in history[-1].items())
        print(f"{title}  {numbers}", file=sys.stderr, flush=True)
        write_file(state_file, _torch_bytes({"recipe": recipe, "history": history, "model": model.state_dict(),
                                             "optimizer": optimizer.state_dict()}))
    model.eval()
    return history


def training_recipe(args, question, split, **constants):
    """Everything that shapes a training run's result, as a dict of plain values for `train`.

    constants: the script's own settings.
    """
    flags = {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "stem", "precision", "seed", "device")}
    return {"question": question, "split_sha256": split["sha256"], "torch": str(torch.__version__), **flags, **constants}


def one_cycle(progress):
    """Factor of the peak learning rate at `progress` in [0, 1] of the training: up linearly, then down to 0."""
    return progress / WARMUP if progress < WARMUP else (1 - progress) / (1 - WARMUP)


def validation_scores(model, images, labels):
    """Loss and accuracy of a `frozen` classifier, to be noted after an epoch. images float32 N x 3 x 32 x 32, labels N."""
    logits = in_batches(model, images)
    return {"val_loss": F.cross_entropy(logits, labels).item(), "val_accuracy": accuracy(logits.argmax(1), labels)}


def _resume(state_file, model, optimizer, recipe):
    """History of the epochs in the state file, loaded into model and optimizer; [] when there is none."""
    state_file = Path(state_file)
    if not state_file.exists():
        return []
    made_by = "the same command with --fresh"
    state = _torch_load(read_file(state_file, made_by=made_by), state_file, made_by)
    try:
        before = state["recipe"]
        changed = [f"{key} {before.get(key)!r}, now {recipe.get(key)!r}"
                   for key in sorted({*before, *recipe}) if before.get(key) != recipe.get(key)]
        if not changed:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            history = list(state["history"])
    except Exception as error:  # whatever a damaged file can provoke
        raise UserError(f"{state_file} is damaged; start over with: {made_by}") from error
    if changed:
        raise UserError(f"{state_file} was made with other settings ({'; '.join(changed)}); "
                        "use those again, or start over with --fresh")
    if history:
        print(f"Going on after epoch {len(history)} from {state_file}", file=sys.stderr)
    return history


def _finite_mean(losses, epoch, remedy):
    losses = torch.stack(losses).float().cpu()
    wrong = (~losses.isfinite()).nonzero()
    if len(wrong):
        step = int(wrong[0])
        raise UserError(f"the loss became {losses[step].item()} in epoch {epoch + 1}, step {step + 1}; {remedy}")
    return losses.mean().item()


# ---- 11. UMAP and figures ----------------------------------------------------------------------

DPI = 150


def fit_umap(features, seed):
    """UMAP to two dimensions (McInnes et al. 2018), fitted on these features alone, without labels.

    features float32 N x D. Returns the fitted reducer: `embedding_` is the map of the features, `transform`
    places others in it. The same features and seed give the same map on the same machine.
    """
    from umap import UMAP

    reducer = UMAP(n_neighbors=15, min_dist=0.1, random_state=seed, n_jobs=1)
    return reducer.fit(features.cpu().numpy())


def map_into(reducer, features):
    """Place features (float32 N x D) in a fitted map: float32 N x 2."""
    return reducer.transform(features.cpu().numpy())


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


def plot_history(path, history, names, ylabel):
    """Curves over epochs. history: what `train` returns; names: dict from key in it to the curve's label."""
    lines = {label: [epoch[key] for epoch in history] for key, label in names.items()}
    plot_lines(path, range(1, len(history) + 1), lines, "epoch", ylabel)


def plot_maps(path, panels, limits_of):
    """Scatter plots of 2-D maps side by side, one colour per class, all with the extent of `limits_of`.

    panels: dict from title to (points N x 2, labels N); limits_of: points M x 2, usually the training map.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(panels), 6))
    low, high = limits_of.min(0), limits_of.max(0)
    margin = 0.08 * (high - low)
    for axes, (title, (points, labels)) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items()):
        drawn = axes.scatter(*points.T, c=labels.cpu(), cmap="tab10", vmin=-0.5, vmax=9.5, s=2, alpha=0.5, linewidths=0)
        axes.set(title=title, xlim=(low[0] - margin[0], high[0] + margin[0]),
                 ylim=(low[1] - margin[1], high[1] + margin[1]), xticks=[], yticks=[])
    legend = figure.legend(*drawn.legend_elements(num=range(10)), loc="outside lower center", ncols=5)
    for text, name in zip(legend.get_texts(), CLASSES):
        text.set_text(name)
    save_figure(figure, path)


def plot_examples(path, model, images, perturbed, labels, loss=summed_cross_entropy, decide=most_likely):
    """A column per image: original, perturbed, attacked by FGM at EPSILON, both, and what FGM changed.

    model: `frozen`; images and perturbed n x 3 x 32 x 32, labels n; loss and decide as in `robustness`. Above each
    image stands its predicted class, green when right and red when wrong.
    """
    from matplotlib.figure import Figure

    eps = EPSILON["linf"]
    attacked = fgm(model, images, labels, eps, loss=loss)
    rows = {"original": images, "perturbed": perturbed, "FGM": attacked,
            "perturbed\n+ FGM": fgm(model, perturbed, labels, eps, loss=loss)}
    predictions = {title: decide(in_batches(model, row)) for title, row in rows.items()}
    rows["FGM's change\n(16 times)"] = (0.5 + 16 * (attacked - images)).clamp(0, 1)

    figure = Figure(figsize=(1.25 * len(labels), 1.45 * len(rows)))
    grid = figure.subplots(len(rows), len(labels), squeeze=False)
    for line, (title, row) in zip(grid, rows.items()):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for column, axes in enumerate(line):
            axes.imshow(row[column].permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if title in predictions:
                predicted, true = int(predictions[title][column]), int(labels[column])
                axes.set_title(CLASSES[predicted], fontsize=8, color="tab:green" if predicted == true else "tab:red")
    save_figure(figure, path)


# ---- 12. Results -------------------------------------------------------------------------------


@contextlib.contextmanager
def timed(seconds, stage):
    """Note in the dict `seconds`, and on stderr, how long the block took."""
    started = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - started, 2)
    print(f"{stage}: {seconds[stage]:.0f} s", file=sys.stderr, flush=True)


def provenance(args, question, split, parents=()):
    """What an artefact was made from: dict of plain values.

    parents: SHA-256 of the checkpoints that went into it.
    """
    import torchvision

    return {
        "question": question,
        "quick": args.quick,
        "split_sha256": split["sha256"],
        "parent_sha256": list(parents),
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__),
                     "torchvision": torchvision.__version__, "numpy": np.__version__},
        "git_commit": _git_commit(),
    }


def _git_commit():
    """Commit of these scripts, with "+changes" when they differ from it; None outside a git checkout."""
    def git(*words):
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_metrics(folder, origin, metrics):
    """Write `metrics.json`: provenance first, then the question's own numbers. It is a script's last file."""
    metrics = {**origin, **metrics, "peak_memory_mib": _peak_memory_mib()}
    metrics["checksum"] = _metrics_checksum(metrics)
    write_file(Path(folder) / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False).encode())


def _metrics_checksum(metrics):
    """SHA-256 of all entries but the checksum itself."""
    rest = {key: value for key, value in metrics.items() if key != "checksum"}
    return sha256(json.dumps(rest, sort_keys=True).encode())


def _peak_memory_mib():
    """The most main memory that this process has held, in MiB; None on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def read_metrics(path, made_by):
    """A question's metrics.json as a dict. Raises UserError when it is missing, or changed since it was written."""
    content = read_file(path, made_by=made_by)
    try:
        metrics = json.loads(content)
        valid = isinstance(metrics, dict) and metrics.get("checksum") == _metrics_checksum(metrics)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged; make it again with: {made_by}") from error
    if not valid:
        raise UserError(f"{path} is not as our scripts wrote it (wrong checksum); make it again with: {made_by}")
    return metrics


def percent(share):
    """0.8412 as '84.12 %'."""
    return f"{100 * share:.2f} %"


CONDITIONS = {"clean": "clean", "perturbed": "perturbed", "fgm": "FGM", "perturbed_fgm": "perturbed + FGM", "pgd": "PGD-20"}


def condition_rows(models):
    """Header and rows of the table of accuracies. models: dict from name to a dict that has `accuracy`."""
    header = ["model", *CONDITIONS.values()]
    return header, [[name, *(percent(measured["accuracy"][key]) for key in CONDITIONS)] for name, measured in models.items()]


def print_conditions(title, models):
    """Print that table, and below it every warning that the attacks' checks gave."""
    print_table(f"{title} (FGM and PGD in L-infinity, eps = {255 * EPSILON['linf']:.0f}/255)", *condition_rows(models))
    for name, measured in models.items():
        for warning in measured["warnings"]:
            print(f"warning: {name}: {warning}")


def measured_before(args, split):
    """What earlier questions measured under the same test conditions: dict from model name to its numbers.

    Questions that have not been run are left out. Raises UserError for results of another split.
    """
    models = {}
    for question in ("q3", "q4"):
        path = args.results / question / "metrics.json"
        if path.exists():
            made_by = script_command(question, args.results, args.quick)
            metrics = read_metrics(path, made_by)
            if metrics["split_sha256"] != split["sha256"]:
                raise UserError(f"{path} is from another split; make it again with: {made_by}")
            models.update(models_of(question, metrics))
    return models


def models_of(question, metrics):
    """The models that a question's metrics tell of: dict from name to a dict with `accuracy` and `warnings`."""
    names = {"q3": "cross-entropy (q2)", "q6": "angular loss (q6)"}
    if question in names:
        return {names[question]: metrics}
    return {name: {key: metrics[key][model] for key in ("accuracy", "warnings")}
            for model, name in (("perturbed", "perturbed (q4)"), ("perturbed_fgm_trained", "perturbed + FGM (q4)"))}


def print_table(title, header, rows):
    """A plain-text table; all cells are strings."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    print(f"\n{title}")
    for line in (header, ["-" * width for width in widths], *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
