"""What several test files, and the long form in stress.py, share."""

import io
import pickle
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

import common

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"q1": "q1_split.py", "q2": "q2_train_ce.py", "q3": "q3_attack.py", "q4": "q4_adv_train.py", "q6": "q6_angular.py"}
# The imagenet stem does a quarter of the default's work, which is what counts in a suite.
TRAINING_FLAGS = {"q2": ["--stem", "imagenet"], "q4": ["--stem", "imagenet"], "q6": ["--stem", "imagenet", "--init", "scratch"]}


# ---- Data --------------------------------------------------------------------------------------


def write_synthetic_cifar10(root, per_file=10_000):
    """CIFAR-10's seven files under `root`: noise and over it, faintly, a coarse picture per class.

    Returns the SHA-256 that common.py wants to hear before it opens them.
    """
    rng = np.random.default_rng(0)
    pictures = np.kron(rng.integers(-16, 17, (10, 3, 4, 4), np.int16), np.ones((8, 8), np.int16)).reshape(10, 3072)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {f"data_batch_{number}": f"training batch {number} of 5" for number in range(1, 6)}
    for name, title in {**batches, "test_batch": "testing batch 1 of 1"}.items():
        labels = rng.permutation(np.arange(per_file) % 10)
        noise = np.frombuffer(rng.bytes(per_file * 3072), np.uint8).reshape(per_file, 3072) // 2 + 64
        content = {"batch_label": title, "labels": labels.tolist(), "data": (noise + pictures[labels]).astype(np.uint8),
                   "filenames": [f"synthetic_{number:05}.png" for number in range(per_file)]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    meta = {"num_cases_per_batch": per_file, "label_names": list(common.CLASSES), "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return common.sha256(*((folder / name).read_bytes() for name in [*batches, "test_batch", "batches.meta"]))


def tiny_data():
    """Parts of 160, 40 and 40 random images in the form of common.load_data."""
    rng = torch.Generator().manual_seed(0)
    return {name: (torch.randint(0, 256, (number, 3, 32, 32), generator=rng).byte(), torch.arange(number) % 10)
            for name, number in (("train", 160), ("val", 40), ("test", 40))}


def tiny_args(**changes):
    """Flags of a training that takes seconds, as common.parse_arguments returns them."""
    flags = {"epochs": 2, "batch_size": 40, "lr": 0.05, "stem": "imagenet", "precision": "float32", "seed": 0,
             "device": "cpu", "fresh": False, "quick": True, "noise": 2.0}
    return SimpleNamespace(**{**flags, **changes})


def tiny_split():
    """Arguments of common.save_split for a valid quick split of 20, 10 and 10 images."""
    train, val, test = np.split(np.random.default_rng(0).permutation(common.NUM_IMAGES)[:40], [20, 30])
    return {"train": train, "val": val, "test": test, "protocol": "pooled", "seed": 0, "quick": True}


def small_checkpoint(**changes):
    """Content of a checkpoint whose tensors are views of single zeros: valid, but 40 kB instead of 45 MB."""
    weights = {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
               for name, tensor in common.resnet18(10, "imagenet").state_dict().items()}
    return {"stem": "imagenet", "num_outputs": 10, "weights": weights,
            "provenance": {"question": "q2", "split_sha256": "0" * 64}, **changes}


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


def quick_script(question, data, results):
    """Command line of a question's quick run."""
    return script(SCRIPTS[question], "--quick", "--device", "cpu", "--data", data, "--results", results,
                  *TRAINING_FLAGS.get(question, []))


def send_signal(command, number, delay, after=""):
    """Start a command and send it a signal `delay` seconds after its first stderr line that begins with `after`.

    Returns its exit status and all of its stderr.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )
    with process:
        seen = []
        while after and not (seen and seen[-1].startswith(after)) and (line := process.stderr.readline()):
            seen.append(line)
        time.sleep(delay)
        process.send_signal(number)
        seen.append(process.stderr.read())
    return process.returncode, "".join(seen)


# ---- Training states ---------------------------------------------------------------------------


def without_seconds(history):
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in history]


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
        for pair in zip(found, expected):
            assert_same_bits(*pair)
    else:
        assert found == expected


def assert_same_training(found_file, expected_file):
    """Two training states agree bit for bit in weights, optimizer and history, except for the time taken."""
    found, expected = (torch.load(path, weights_only=True) for path in (found_file, expected_file))
    for state in (found, expected):
        state["history"] = without_seconds(state["history"])
    assert_same_bits(found, expected)


# ---- Fuzzing -----------------------------------------------------------------------------------
# Each target writes a small valid file and returns its path and a function that reads it as the scripts do.


def split_target(folder):
    path = folder / "q1" / "split.npz"
    common.save_split(path, **tiny_split())
    return path, lambda: common.load_split(path)["sha256"]


def checkpoint_target(folder):
    path = folder / "q2" / "model.pt"
    common.write_file(path, torch_bytes(small_checkpoint()))

    def read():
        checkpoint = common.read_checkpoint(path)
        total = sum(float(tensor.double().abs().sum()) for tensor in checkpoint["weights"].values())
        return checkpoint["stem"], checkpoint["num_outputs"], checkpoint["provenance"], total

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


def train_linear(model, state_file, batch_loss=None, evaluate=None, **changes):
    """common.train on `linear_problem`: three steps per epoch."""
    points, labels = linear_problem()

    def cross_entropy(model, indices, generator):
        return F.cross_entropy(model(points[indices]), labels[indices]), torch.tensor(0)

    return common.train(model, lambda generator: common.shuffled_batches(12, 4, generator), batch_loss or cross_entropy,
                        evaluate or (lambda model: {"val_accuracy": 0.5}), tiny_args(**changes), {"of": "a test"}, state_file)


def metrics_target(folder):
    measured = {"accuracy": dict.fromkeys(common.CONDITIONS, 0.5), "warnings": ["Too good to be true."]}
    metrics = {key: {name: measured[key] for name in ("perturbed", "perturbed_fgm_trained")} for key in measured}
    common.write_metrics(folder / "q4", {"split_sha256": "0" * 64}, metrics)

    def read():
        models = common.measured_before(tiny_args(results=folder), {"sha256": "0" * 64})
        common.print_conditions("Question 4", models)
        return models

    return folder / "q4" / "metrics.json", read


def data_target(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNTHETIC_CIFAR10_SHA256", write_synthetic_cifar10(folder, per_file=20))
        sound = common._cifar10_dataset(folder)

    def read():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "_cifar10_dataset", lambda root: sound)  # with the checksums of the sound files
            images, labels = common.load_cifar10(folder)
        return images.tolist(), labels.tolist()

    return folder / sound.base_folder / "data_batch_3", read


FUZZ_TARGETS = {"split": split_target, "checkpoint": checkpoint_target, "training state": state_target,
                "metrics": metrics_target, "data": data_target}


def assert_survives_fuzzing(target, folder, number, seed):
    """Each of `number` mutations of the target's file ends in a UserError or in what the sound file holds."""
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
            assert found == expected, f"mutation {attempt} of the {target} was read as if it were sound"


def assert_flags_survive_fuzzing(monkeypatch, folder, number, seed):
    """Each of `number` command lines with mutated values ends in one line and status 2, or in values of their kind."""
    rng = random.Random(seed)
    sound = {"--seed": "3", "--epochs": "12", "--batch-size": "64", "--lr": "0.1", "--stem": "cifar", "--precision": "float32",
             "--device": "cpu"}
    for _ in range(number):
        words = [word for flag in rng.sample(list(sound), 2)
                 for word in (flag, mutated(sound[flag].encode(), rng).decode("utf-8", "replace"))]
        monkeypatch.setattr(sys, "argv", ["script.py", "--results", str(folder), *words])
        parser = common.argument_parser("A script.")
        common.add_training_flags(parser, epochs=1, batch_size=2, lr=0.1, stem="stride2")
        try:
            args = common.parse_arguments(parser)
        except common.UserError as error:
            assert "\n" not in str(error)
        except SystemExit as end:
            assert end.code == 2, words
        else:
            assert args.seed >= 0 and args.epochs >= 1 and args.batch_size >= 2 and 0 < args.lr < float("inf"), words
            assert args.stem in common.STEMS and args.precision in ("float32", "bfloat16") and args.device == "cpu", words


def mutated(content, rng):
    """Bytes with one random change: most often a flipped bit, else a cut end, or bytes put in or left out."""
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
        del content[place:place + rng.randint(1, 20)]
    return bytes(content)
