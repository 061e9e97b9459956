"""Fixtures that every test file may use."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Sums depend on how they are shared out among threads, and some tests compare them bit for bit
# across processes.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["PYTHONPATH"] = str(
    Path(__file__).resolve().parent.parent
)  # for the scripts that tests start

import pytest  # noqa: E402  (the lines above must come before torch is imported)
import torch  # noqa: E402

import common  # noqa: E402
import helpers  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """Folder with a synthetic CIFAR-10, which common.load_cifar10 takes for the published one."""
    root = tmp_path_factory.mktemp("data")
    helpers.write_synthetic_cifar10(root)
    with pytest.MonkeyPatch.context() as patch:
        helpers.accept_as_published(patch, root)
        yield root


@pytest.fixture(scope="session")
def loaded(cifar10):
    """Its images and labels as common.load_cifar10 returns them."""
    return common.load_cifar10(cifar10)


@pytest.fixture(scope="session")
def quick_run(cifar10, tmp_path_factory):
    """All scripts once with --quick: `results`, their folder, and `finished`, a CompletedProcess by
    question."""
    results = tmp_path_factory.mktemp("quick") / "results"
    commands = {
        question: helpers.quick_script(question, cifar10, results) for question in helpers.SCRIPTS
    }
    commands["report"] = helpers.script("report.py", "--quick", "--results", results)
    finished = {
        name: subprocess.run(command, capture_output=True, text=True)
        for name, command in commands.items()
    }
    return SimpleNamespace(results=results, finished=finished)


@pytest.fixture
def error_line(monkeypatch, capsys):
    """Function that runs a script's main() for a user's mistake and returns the one line it leaves
    on stderr."""

    def run(main, *flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            common.run(main)
        lines = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return run
