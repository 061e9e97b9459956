"""What several test files, and the long form in stress.py, share."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import common
import q1_split
import q2_train_ce
from tools import synthetic

posix = pytest.mark.skipif(os.name != "posix", reason="signals, links and locks of POSIX systems")
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "q1": "q1_split.py",
    "q2": "q2_train_ce.py",
    "q3": "q3_attack.py",
    "q4": "q4_adv_train.py",
    "q6": "q6_angular.py",
}
# The imagenet stem does a quarter of the default's work, which is what counts in a suite.
TRAINING_FLAGS = {"q2": ["--stem", "imagenet"], "q4": [], "q6": ["--init", "scratch"]}


# ---- Data --------------------------------------------------------------------------------------


PUBLISHED = {
    kind: getattr(torchvision.datasets.CIFAR10, kind) for kind in ("train_list", "test_list")
}


def accept_as_published(patch, root):
    """Let torchvision and load_cifar10 take these files for the published ones. patch: a
    MonkeyPatch."""
    for kind, names in synthetic.published(root).items():
        patch.setattr(torchvision.datasets.CIFAR10, kind, names)


def tiny_data():
    """Parts of 160, 40 and 40 random images in the form of common.load_data."""
    rng = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randint(0, 256, (number, 3, 32, 32), generator=rng).byte(),
            torch.arange(number) % 10,
        )
        for name, number in (("train", 160), ("val", 40), ("test", 40))
    }


def tiny_args(**changes):
    """Flags as common.parse_arguments returns them, for folders that a test makes."""
    flags = {
        "data": Path("data"),
        "results": Path("results"),
        "seed": 0,
        "device": "cpu",
        "precision": "float32",
        "quick": True,
        "fresh": False,
        "init": "q2",
        "purpose": "A test.",
    }
    return SimpleNamespace(**{**flags, **changes})


def tiny_recipe(**changes):
    """What common.choose_recipe returns for a training that takes seconds, with what any question
    needs."""
    return {
        "question": "test",
        "stem": "imagenet",
        "epochs": 2,
        "batch_size": 40,
        "lr": 0.05,
        "trivial_augment": True,
        "cutout": 12,
        "label_smoothing": 0.1,
        "noise": 2.0,
        "eps": common.EPSILON["linf"],
        "alpha": 40,
        **common.OPTIMIZER,
        "seed": 0,
        "precision": "float32",
        "device": "cpu",
        "split_sha256": "tiny",
        **changes,
    }


def tiny_split():
    """Arguments of q1_split.save_split for a valid quick split of 20, 10 and 10 images."""
    train, val, test = np.split(
        np.random.default_rng(0).permutation(common.NUM_IMAGES)[:40], [20, 30]
    )
    return {
        "train": train,
        "val": val,
        "test": test,
        "protocol": "pooled",
        "seed": 0,
        "quick": True,
    }


def small_checkpoint(**changes):
    """Content of a checkpoint whose tensors are views of single zeros: valid, but 40 kB instead of
    45 MB."""
    weights = {
        name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in common.resnet18(10, "imagenet").state_dict().items()
    }
    return {
        "stem": "imagenet",
        "num_outputs": 10,
        "weights": weights,
        "provenance": {"question": "q2", "split_sha256": "0" * 64},
        **changes,
    }


def torch_bytes(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class CreatesFile:
    """A malicious pickle: whoever loads it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


# ---- Processes ---------------------------------------------------------------------------------


def script(name, *flags):
    """Command line of a script."""
    return [sys.executable, str(ROOT / name), *map(str, flags)]


def run_code(code, **variables):
    """A CompletedProcess of Python code in a process of its own, with these environment
    variables."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)


def quick_script(question, data, results):
    """Command line of a question's quick run on synthetic data."""
    words = ["-m", "tools.synthetic", data, ROOT / SCRIPTS[question]]
    return [sys.executable, *map(str, words), *quick_flags(question, data, results)]


def quick_flags(question, data, results):
    return [
        str(word)
        for word in (
            "--quick",
            "--device",
            "cpu",
            "--precision",
            "float32",
            "--data",
            data,
            "--results",
            results,
            *TRAINING_FLAGS.get(question, []),
        )
    ]


def send_signal(command, number, delay, after=""):
    """Start a command and send it a signal `delay` seconds after its first stderr line that begins
    with `after`.

    Returns its exit status and all of its stderr.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a suite in the background ignores it
    )
    with process:
        seen = []
        while (
            after
            and not (seen and seen[-1].startswith(after))
            and (line := process.stderr.readline())
        ):
            seen.append(line)
        time.sleep(delay)
        process.send_signal(number)
        seen.append(process.stderr.read())
    return process.returncode, "".join(seen)


# ---- Training states ---------------------------------------------------------------------------


def without_seconds(history):
    return [
        {name: value for name, value in epoch.items() if name != "seconds"} for epoch in history
    ]


def assert_same_bits(found, expected):
    """Equality of nested dicts and lists, their tensors bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_same_bits(found[name], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_same_bits(*pair)
    else:
        assert found == expected


def assert_same_training(found_file, expected_file):
    """Two training states agree bit for bit in weights, optimizer and history, except for the time
    taken."""
    found, expected = (torch.load(path, weights_only=True) for path in (found_file, expected_file))
    for state in (found, expected):
        state["history"] = without_seconds(state["history"])
    assert_same_bits(found, expected)


# ---- Fuzzing -----------------------------------------------------------------------------------
# Each target writes a small valid file and returns its path and a function that reads it as the
# scripts do.


def split_target(folder):
    path = folder / "q1" / "split.npz"
    q1_split.save_split(path, **tiny_split())
    return path, lambda: common.load_split(path)["sha256"]


def checkpoint_target(folder):
    path = folder / "q2" / "model.pt"
    common.write_file(path, torch_bytes(small_checkpoint()))

    def read():
        checkpoint = common.read_checkpoint(path)
        total = sum(
            float(tensor.double().abs().sum())
            for tensor in checkpoint["model"].state_dict().values()
        )
        return checkpoint["stem"], checkpoint["provenance"], total

    return path, read


def state_target(folder):
    path = folder / "q2" / "training.pt"

    def read():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        history = train_linear(model, path)
        return history, {name: tensor.tolist() for name, tensor in model.state_dict().items()}

    read()
    return path, read


def linear_problem():
    """12 points with 4 coordinates, and their classes 0 and 1."""
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


def train_linear(model, state_file, step=None, evaluate=None, guard=None, **changes):
    """common.train on `linear_problem`: three steps per epoch."""

    def cross_entropy(model, points, labels, generator, recipe):
        return F.cross_entropy(model(points), labels), torch.tensor(0)

    return common.train(
        model,
        linear_problem(),
        step or cross_entropy,
        common.shuffled_batches,
        evaluate or (lambda model: {"val_accuracy": 0.5}),
        tiny_recipe(batch_size=4, **changes),
        state_file,
        guard=guard,
    )


def data_target(folder):
    synthetic.write_synthetic_cifar10(folder, per_file=20)
    sound = synthetic.published(folder)

    def read():
        with pytest.MonkeyPatch.context() as patch:
            for kind, names in sound.items():
                patch.setattr(torchvision.datasets.CIFAR10, kind, names)
            images, labels = common.load_cifar10(folder)
        return images.tolist(), labels.tolist()

    return folder / "cifar-10-batches-py" / "data_batch_3", read


FUZZ_TARGETS = {
    "split": split_target,
    "checkpoint": checkpoint_target,
    "training state": state_target,
    "data": data_target,
}


def assert_survives_fuzzing(target, folder, number, seed):
    """Each of `number` mutations of the target's file ends in a UserError or in what the sound file
    holds."""
    path, read = FUZZ_TARGETS[target](folder)
    content, expected = path.read_bytes(), read()
    rng = random.Random(seed)
    for attempt in range(number):
        path.write_bytes(mutated(content, rng))
        try:
            found = read()
        except common.UserError as error:
            assert "\n" not in str(error)
        else:
            assert found == expected, (
                f"mutation {attempt} of the {target} was read as if it were sound"
            )


def assert_flags_survive_fuzzing(monkeypatch, folder, number, seed):
    """Each of `number` command lines with mutated values ends in one line and status 2, or in
    values of their kind."""
    rng = random.Random(seed)
    sound = {
        "--seed": "3",
        "--epochs": "12",
        "--batch-size": "64",
        "--lr": "0.1",
        "--stem": "cifar",
        "--precision": "float32",
        "--device": "cpu",
    }
    for _ in range(number):
        words = [
            word
            for flag in rng.sample(list(sound), 2)
            for word in (flag, mutated(sound[flag].encode(), rng).decode("utf-8", "replace"))
        ]
        monkeypatch.setattr(sys, "argv", ["script.py", "--results", str(folder), *words])
        parser = common.argument_parser("A script.", q2_train_ce.RECIPES)
        parser.add_argument("--stem", choices=common.STEMS, default="stride2")
        try:
            args = common.parse_arguments(parser)
            recipe = common.choose_recipe(
                args, q2_train_ce.RECIPES, args.stem, "q2", {"sha256": "tiny"}
            )
        except common.UserError as error:
            assert "\n" not in str(error)
        except SystemExit as end:
            assert end.code == 2, words
        else:
            assert (
                args.seed >= 0
                and recipe["epochs"] >= 1
                and recipe["batch_size"] >= 1
                and 0 < recipe["lr"] < float("inf")
            ), words
            assert (
                recipe["stem"] in common.STEMS
                and recipe["precision"] in ("float32", "bfloat16")
                and recipe["device"] == "cpu"
            ), words


def mutated(content, rng):
    """Bytes with one random change: most often a flipped bit, else a cut end, or bytes put in or
    left out."""
    content = bytearray(content)
    place = rng.randrange(len(content))
    kind = rng.choice(("flip", "flip", "flip", "cut", "insert", "remove"))
    if kind == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind == "insert":
        content[place:place] = rng.randbytes(rng.randint(1, 20))
    else:
        del content[place : place + rng.randint(1, 20)]
    return bytes(content)
