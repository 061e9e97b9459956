"""What several test files, and the long form in stress.py, share."""

import contextlib
import importlib
import io
import os
import random
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.datasets import CIFAR10

import common
from tools import synthetic

posix = pytest.mark.skipif(os.name != "posix", reason="signals and links of POSIX systems")
ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {question: name for question, name in common.SCRIPTS.items() if question != "q5"}
# The imagenet stem does a quarter of the default's work, which is what counts in a suite.
TRAINING_FLAGS = {"q2": ["--stem", "imagenet"], "q6": ["--init", "scratch"]}


# ---- Data ----------------------------------------------------------------------------------------


PUBLISHED = {kind: getattr(CIFAR10, kind) for kind in ("train_list", "test_list", "meta")}


def accept_as_published(patch, root):
    """Let torchvision take the files in `root` for the published ones. patch: a MonkeyPatch."""
    for kind, files in synthetic.published(root).items():
        patch.setattr(CIFAR10, kind, files)


def tiny_data():
    """Parts of 80, 40 and 40 random images in the form of common.load_data."""
    generator = torch.Generator().manual_seed(0)
    return {
        part: (
            torch.randint(0, 256, (count, 3, 32, 32), generator=generator).byte(),
            torch.arange(count) % 10,
        )
        for part, count in (("train", 80), ("val", 40), ("test", 40))
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
    """A recipe as common.choose_recipe returns it, of seconds, with what any question needs."""
    return {
        "question": "test",
        "stem": "imagenet",
        **common.OPTIMIZER,
        "epochs": 2,
        "batch_size": 40,
        "lr": 0.05,
        "trivial_augment": True,
        "cutout": 12,
        "label_smoothing": 0.1,
        "noise": 2.0,
        "eps": common.EPSILON["linf"],
        "alpha": 40,
        "seed": 0,
        "precision": "float32",
        "device": "cpu",
        "split_sha256": "tiny",
        "torch": "2.9.0",
        **changes,
    }


def tiny_origin(**changes):
    """Of what common.provenance returns, what a training looks at."""
    return {"question": "test", "git_commit": "abc", "code_sha256": "0" * 64, **changes}


def tiny_split():
    """What split.npz holds for a valid quick split of 20, 10 and 10 images."""
    indices = np.random.default_rng(0).permutation(common.NUM_IMAGES)[:40]
    parts = zip(("train", "val", "test"), np.split(indices, [20, 30]), strict=True)
    return {**dict(parts), "protocol": "pooled", "seed": 0, "quick": True}


def small_checkpoint(**changes):
    """A checkpoint whose tensors are views of single zeros: valid, but 40 kB instead of 45 MB."""
    weights = {
        name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        for name, tensor in common.resnet18(10, "imagenet").state_dict().items()
    }
    return {
        "stem": "imagenet",
        "num_outputs": 10,
        "weights": weights,
        "provenance": {"question": "q2", "split_sha256": "0" * 64, "seed": 0},
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


# ---- Processes -----------------------------------------------------------------------------------


def script(name, *flags):
    """Command line of a script."""
    return [sys.executable, str(ROOT / name), *map(str, flags)]


def run_code(code, folder=None, **variables):
    """Python code in a process of its own with these environment variables: CompletedProcess."""
    environment = os.environ | variables
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def quick_flags(question, data, results):
    """Flags of a question's quick run: list of strings."""
    flags = ["--quick", "--device", "cpu", "--precision", "float32", "--data", data]
    return [str(word) for word in (*flags, "--results", results, *TRAINING_FLAGS.get(question, []))]


def quick_script(question, data, results):
    """Command line of a question's quick run on synthetic data."""
    words = ["-m", "tools.synthetic", data, ROOT / SCRIPTS[question]]
    return [sys.executable, *map(str, words), *quick_flags(question, data, results)]


def run_here(name, flags):
    """A script in this process, where UMAP need not be compiled anew: like a CompletedProcess.

    Its stderr ends in the warnings that the script gave.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    main = importlib.import_module(Path(name).stem).main
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(record=True) as given,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [name, *flags])
        try:
            common.run(main)
        except SystemExit as end:
            status = end.code
        except Exception:
            traceback.print_exc()
            status = 1
    told = err.getvalue() + "".join(f"{warning.message}\n" for warning in given)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=told)


def killed(command, delay, after=""):
    """Exit status of a command that is killed, `delay` seconds after a line of stderr.

    after: how that line begins; "" for its start.
    """
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **quiet) as process:
        if after:
            next((line for line in process.stderr if line.startswith(after)), None)
        time.sleep(delay)
        process.kill()
    return process.returncode


# ---- Trainings -----------------------------------------------------------------------------------


def linear_problem():
    """12 points with 4 coordinates, and their classes 0 and 1."""
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


def train_linear(
    path, model=None, step=None, evaluate=None, origin=None, fresh=False, guard=None, **changes
):
    """common.train on `linear_problem`: three steps an epoch. changes: of tiny_recipe."""

    def cross_entropy(model, points, labels, generator, recipe):
        return F.cross_entropy(model(points), labels), torch.tensor(0)

    torch.manual_seed(0)
    return common.train(
        model or torch.nn.Linear(4, 2),
        linear_problem(),
        step or cross_entropy,
        common.shuffled_batches,
        evaluate or (lambda model: {"val_accuracy": 0.5}),
        tiny_recipe(batch_size=4, **changes),
        origin or tiny_origin(),
        path,
        fresh,
        guard,
    )


def without_seconds(history):
    return [{key: epoch[key] for key in epoch if key != "seconds"} for epoch in history]


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
    """Two training states agree bit for bit, except for the time taken."""
    found, expected = (torch.load(path, weights_only=True) for path in (found_file, expected_file))
    for state in (found, expected):
        state["history"] = without_seconds(state["history"])
    assert_same_bits(found, expected)


# ---- Fuzzing -------------------------------------------------------------------------------------
# Each target writes a small valid file and returns its path and a function that reads it as the
# scripts do.


def split_target(folder):
    path = folder / "q1" / "split.npz"
    common.write_npz(path, tiny_split())
    return path, lambda: common.load_split(path)["sha256"]


def checkpoint_target(folder):
    path = folder / "q2" / "model.pt"
    common.write_file(path, torch_bytes(small_checkpoint()))

    def read():
        checkpoint = common.read_checkpoint(path)
        return checkpoint["stem"], checkpoint["provenance"], checkpoint["sha256"]

    return path, read


def state_target(folder):
    path = folder / "q2" / "model.pt"

    def read():
        model = torch.nn.Linear(4, 2)
        training = train_linear(path, model)
        return training, {name: tensor.tolist() for name, tensor in model.state_dict().items()}

    read()
    return common.state_file_of(path), read


def right_target(folder):
    common.write_right(folder / "q3", {"m": {"clean": torch.arange(50) % 3 == 0}})
    path = folder / "q3" / "right.npz"
    return path, lambda: common.read_right(path)["m"]["clean"].tolist()


FUZZ_TARGETS = {
    "split": split_target,
    "checkpoint": checkpoint_target,
    "training state": state_target,
    "right": right_target,
}


def assert_survives_fuzzing(target, folder, count, seed):
    """Each of `count` mutations of a file is a UserError or is read as the sound file is."""
    path, read = FUZZ_TARGETS[target](folder)
    content, expected = path.read_bytes(), read()
    rng = random.Random(seed)
    for attempt in range(count):
        path.write_bytes(mutated(content, rng))
        try:
            found = read()
        except common.UserError as error:
            assert "\n" not in str(error)
        else:
            assert found == expected, f"mutation {attempt} of the {target} was read as sound"


def mutated(content, rng):
    """Bytes with one random change: a flipped bit, a cut end, or some bytes more or fewer."""
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
