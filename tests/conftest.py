"""Fixtures that every test file may use."""

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import helpers
import q1_split
from tools import synthetic

# Sums depend on how threads share them, and some tests compare them bit for bit across processes.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["PYTHONPATH"] = str(helpers.ROOT)  # for the scripts that tests start
torch.set_num_threads(2)


@pytest.fixture(scope="session", autouse=True)
def shorter_quick_run():
    """With --quick fewer images to train and validate on, fewer sizes of attack."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q1_split, "QUICK_PER_CLASS", {"train": 24, "val": 5, "test": 10})
        patch.setattr(common, "CURVE_EPSILONS", [8 / 255, 16 / 255])
        yield


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """Folder with a synthetic CIFAR-10, which common.load_cifar10 takes for the published one."""
    root = tmp_path_factory.mktemp("data")
    synthetic.write_synthetic_cifar10(root)
    with pytest.MonkeyPatch.context() as patch:
        helpers.accept_as_published(patch, root)
        yield root


@pytest.fixture(scope="session")
def loaded(cifar10):
    """Its images and labels as common.load_cifar10 returns them."""
    return common.load_cifar10(cifar10)


@pytest.fixture(scope="session")
def quick_run(cifar10, loaded, tmp_path_factory):
    """All scripts once with --quick: `results`, their folder, and `finished`.

    The second is a dict from question, and "report", to what helpers.run_here returns.
    """
    results, finished = tmp_path_factory.mktemp("quick") / "results", {}
    for question, name in helpers.SCRIPTS.items():
        with pytest.MonkeyPatch.context() as patch:
            if question != "q1":  # reading the same files again takes seconds
                patch.setattr(common, "load_cifar10", lambda root: loaded)
            flags = helpers.quick_flags(question, cifar10, results)
            finished[question] = helpers.run_here(name, flags)
    finished["report"] = helpers.run_here("report.py", ["--quick", "--results", str(results)])
    return SimpleNamespace(results=results, finished=finished)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Nothing can be fetched, and nothing was."""

    def refuse(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))


@pytest.fixture
def error_line(monkeypatch, capsys):
    """Function that runs a script's main() for a user's mistake and returns its line on stderr."""

    def run(main, *flags):
        name = Path(main.__code__.co_filename).name
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            common.run(main)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run
