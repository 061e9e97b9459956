"""The long form of other tests, twenty minutes: make stress"""

import random
import shutil
import signal
import subprocess
import time

import pytest

import common
import helpers
from tools import demo

MODELS = {
    "q2": ["model.pt"],
    "q4": ["perturbed.pt", "perturbed_fgm_trained.pt"],
    "q6": ["model.pt"],
}


@pytest.mark.parametrize("question", MODELS)
def test_a_script_killed_ten_times_ends_with_the_same_weights(cifar10, tmp_path, question):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for needed in ("q1",) if question == "q2" else ("q1", "q2"):
        subprocess.run(helpers.quick_script(needed, cifar10, whole), check=True)
    shutil.copytree(whole, killed)
    started = time.monotonic()
    subprocess.run(helpers.quick_script(question, cifar10, whole), check=True)
    seconds = time.monotonic() - started

    rng = random.Random(question)
    command = helpers.quick_script(question, cifar10, killed)
    statuses = [helpers.killed(command, rng.uniform(0, seconds)) for _ in range(10)]
    assert set(statuses) <= {-signal.SIGKILL, 0}  # 0: it ended before
    assert statuses.count(-signal.SIGKILL) >= 5
    subprocess.run(command, check=True)

    for name in MODELS[question]:
        found, expected = (
            common.read_checkpoint(results / question / name)["sha256"]
            for results in (killed, whole)
        )
        assert found == expected
    assert not list(killed.rglob("*.part"))


@pytest.mark.parametrize("seed, target", list(enumerate(helpers.FUZZ_TARGETS, start=100)))
def test_hundreds_of_randomly_damaged_files_are_noticed(tmp_path, seed, target):
    helpers.assert_survives_fuzzing(target, tmp_path, count=125, seed=seed)


def test_the_demo_shows_what_attacks_do_and_what_training_with_fgm_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(helpers.ROOT)
    monkeypatch.setattr(demo, "FOLDER", tmp_path / "results")
    demo.main()
    plain, trained = (
        common.read_metrics(tmp_path / "results" / question / "metrics.json")["models"][name]
        for question, name in (("q3", common.CROSS_ENTROPY), ("q4", "perturbed + FGM (q4)"))
    )
    plain, trained = plain["accuracy"], trained["accuracy"]
    assert plain["clean"] > 0.9
    assert plain["clean"] / 2 > plain["fgm"] > plain["pgd"]
    for attack in ("fgm", "pgd", "strongest"):
        assert trained[attack] > plain[attack] + 0.2
