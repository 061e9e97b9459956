"""Training that is interrupted goes on where it was and ends bit for bit where an uninterrupted one
does."""

import random
import shutil
import signal

import pytest
import torch

import common
import helpers
import q4_adv_train
import q6_angular
import tiny_training


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Results folder of the tiny training after a run without interruption."""
    results = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tiny_training.py", "--results", str(results)])
        tiny_training.main()
    return results


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "copy")


def history_of(results):
    return torch.load(results / "training.pt", weights_only=True)["history"]


@helpers.posix
def test_training_killed_at_random_moments_ends_as_if_it_had_not_been(finished, tmp_path):
    rng = random.Random(0)
    seconds = min(epoch["seconds"] for epoch in history_of(finished))
    command = helpers.script("tests/tiny_training.py", "--results", tmp_path)
    for _ in range(
        3
    ):  # each time after an epoch's line: its state is being written, or the next epoch has begun
        status, _ = helpers.send_signal(
            command, signal.SIGKILL, rng.uniform(0, seconds), after="epoch"
        )
        assert status == -signal.SIGKILL
    status, seen = helpers.send_signal(command, 0, 0)
    assert status == 0, seen
    helpers.assert_same_training(tmp_path / "training.pt", finished / "training.pt")


@helpers.posix
def test_ctrl_c_ends_with_one_line_that_tells_how_to_go_on(tmp_path):
    command = helpers.script("tests/tiny_training.py", "--results", tmp_path)
    status, seen = helpers.send_signal(command, signal.SIGINT, 0.2, after="epoch")
    lines = [line for line in seen.splitlines() if line and not line.startswith("epoch ")]
    assert status == 130
    assert len(lines) == 1 and lines[0].endswith(f"tests/tiny_training.py --results {tmp_path}")


def trainings():
    """The trainings of questions 4 and 6 as functions of the state file; that of question 2 is
    killed above."""

    def angular(state_file):
        torch.manual_seed(0)
        model = common.resnet18(q6_angular.EMBEDDING, "imagenet")
        return q6_angular.train_embedding(
            model,
            q6_angular.training_step,
            helpers.tiny_data(),
            helpers.tiny_recipe(),
            state_file,
            fresh=False,
        )

    def adversarial(step):
        def train(state_file):
            torch.manual_seed(0)
            model = common.resnet18(10, "imagenet")
            return q4_adv_train.train_variant(
                model, step, helpers.tiny_data(), helpers.tiny_recipe(), state_file, fresh=False
            )

        return train

    return {
        "q4 perturbed": adversarial(q4_adv_train.step_on_perturbed),
        "q4 perturbed and attacked": adversarial(q4_adv_train.step_on_attacked),
        "q6": angular,
    }


def interrupt_in_the_second_epoch(train):
    original = common.generator_for

    def interrupted(seed, stream, number=0):
        if (stream, number) == ("epoch", 1):
            raise KeyboardInterrupt
        return original(seed, stream, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "generator_for", interrupted)
        train()


@pytest.mark.parametrize("seconds, epochs_kept", [(0, 1), (10**6, 0)])
def test_the_state_is_written_when_so_many_seconds_have_passed(
    tmp_path, monkeypatch, seconds, epochs_kept
):
    """Writing takes a good part of a GPU's epoch."""
    monkeypatch.setattr(common, "STATE_EVERY", seconds)
    train = trainings()["q4 perturbed"]
    interrupt_in_the_second_epoch(lambda: train(tmp_path / "training.pt"))
    kept = history_of(tmp_path) if (tmp_path / "training.pt").exists() else []
    assert len(kept) == epochs_kept
    train(tmp_path / "training.pt")
    assert len(history_of(tmp_path)) == 2  # after the last one it is


@pytest.mark.parametrize("name", trainings())
def test_the_other_trainings_go_on_exactly_after_an_interruption(tmp_path, monkeypatch, name):
    train = trainings()[name]
    whole = train(tmp_path / "whole.pt")
    monkeypatch.setattr(common, "STATE_EVERY", 0)
    interrupt_in_the_second_epoch(lambda: train(tmp_path / "resumed.pt"))
    resumed = train(tmp_path / "resumed.pt")

    assert helpers.without_seconds(resumed) == helpers.without_seconds(whole)
    helpers.assert_same_training(tmp_path / "resumed.pt", tmp_path / "whole.pt")


def test_a_finished_training_is_not_repeated(copy, monkeypatch, capsys):
    before = (copy / "training.pt").read_bytes()
    monkeypatch.setattr("sys.argv", ["tiny_training.py", "--results", str(copy)])
    tiny_training.main()
    assert (copy / "training.pt").read_bytes() == before
    assert capsys.readouterr().err.splitlines() == [
        f"Going on after epoch 4 from {copy / 'training.pt'}"
    ]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--lr", "0.1"], "lr 0.05, now 0.1"),
        (["--epochs", "5"], "epochs 4, now 5"),
        (["--seed", "1"], "seed 0, now 1"),
        (["--stem", "stride2"], "stem 'imagenet', now 'stride2'"),
    ],
)
def test_a_training_with_other_settings_is_refused_by_naming_them(copy, error_line, flags, named):
    line = error_line(tiny_training.main, "--results", copy, *flags)
    assert named in line and "--fresh" in line
    assert line.count(", now ") == 1


def test_fresh_starts_over(copy, finished, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tiny_training.py", "--results", str(copy), "--fresh"])
    tiny_training.main()
    assert [line[:9] for line in capsys.readouterr().err.splitlines()] == [
        "epoch 1/4",
        "epoch 2/4",
        "epoch 3/4",
        "epoch 4/4",
    ]
    helpers.assert_same_training(copy / "training.pt", finished / "training.pt")
