"""Trainings that are interrupted, finished, changed, handed in or begun by other code.

One that goes on ends bit for bit where an uninterrupted one does.
"""

import random
import signal
from functools import partial

import pytest
import torch
from torch.torch_version import TorchVersion

import common
import helpers
import q4_adv_train
import q6_angular
import tiny_training

STATE = "model.training.pt"


@pytest.fixture
def every_epoch(monkeypatch):
    """The state is written after every epoch."""
    monkeypatch.setattr(common, "STATE_EVERY", 0)


def history_of(state_file):
    return torch.load(state_file, weights_only=True)["history"] if state_file.exists() else []


def interrupt_in_the_second_epoch(train, ends_with=KeyboardInterrupt):
    original = common.generator_for

    def interrupted(seed, stream, index=0):
        if (stream, index) == ("epoch", 1):
            raise KeyboardInterrupt
        return original(seed, stream, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ends_with):
        patch.setattr(common, "generator_for", interrupted)
        train()


# ---- Interrupted ---------------------------------------------------------------------------------


@helpers.posix
def test_a_training_that_was_killed_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setattr("sys.argv", ["tiny_training.py", "--results", str(whole)])
    tiny_training.main()
    seconds = min(epoch["seconds"] for epoch in history_of(whole / STATE))
    command = helpers.script("tests/tiny_training.py", "--results", killed)
    delay = random.Random(0).uniform(0, seconds)  # while the state is written, or thereafter
    assert helpers.killed(command, delay, after="epoch 1") == -signal.SIGKILL
    assert 1 <= len(history_of(killed / STATE)) < 3
    monkeypatch.setattr("sys.argv", ["tiny_training.py", "--results", str(killed)])
    tiny_training.main()
    helpers.assert_same_training(killed / STATE, whole / STATE)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("seconds", [0, 10**6])
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch, capsys, seconds, fresh):
    path = tmp_path / "q2" / "model.pt"
    if fresh:
        helpers.train_linear(path)  # of which nothing is to be used
    monkeypatch.setattr(common, "STATE_EVERY", seconds)
    flags = ["--results", "res", *(["--fresh"] if fresh else [])]
    monkeypatch.setattr("sys.argv", ["q2_train_ce.py", *flags])
    train = partial(helpers.train_linear, path, fresh=fresh)
    interrupt_in_the_second_epoch(lambda: common.run(train), SystemExit)
    *_, told, last = filter(None, capsys.readouterr().err.splitlines())
    assert ("after the last epoch that was saved" if seconds == 0 else "to begin again") in told
    again = " --fresh" if fresh and seconds else ""
    assert told.endswith("q2_train_ce.py --results res" + again) and last == "Interrupted"


@pytest.mark.parametrize("seconds, epochs_kept", [(0, 1), (10**6, 0)])
def test_the_state_is_written_when_so_many_seconds_have_passed(
    tmp_path, monkeypatch, seconds, epochs_kept
):
    """Writing takes a good part of a GPU's epoch."""
    monkeypatch.setattr(common, "STATE_EVERY", seconds)
    path = tmp_path / "model.pt"
    interrupt_in_the_second_epoch(lambda: helpers.train_linear(path, epochs=3))
    assert len(history_of(tmp_path / STATE)) == epochs_kept
    helpers.train_linear(path, epochs=3)
    assert len(history_of(tmp_path / STATE)) == 3  # after the last one it is


def adversarial_training(path):
    torch.manual_seed(0)
    model, data = common.resnet18(10, "imagenet"), helpers.tiny_data()
    step, recipe, origin = (
        q4_adv_train.step_on_attacked,
        helpers.tiny_recipe(),
        helpers.tiny_origin(),
    )
    return q4_adv_train.train_variant(model, step, data, recipe, origin, path, fresh=False)


def angular_training(path):
    torch.manual_seed(0)
    model, data = common.resnet18(q6_angular.EMBEDDING, "imagenet"), helpers.tiny_data()
    step, recipe, origin = q6_angular.training_step, helpers.tiny_recipe(), helpers.tiny_origin()
    return q6_angular.train_embedding(model, step, data, recipe, origin, path, fresh=False)


@pytest.mark.parametrize("train", [adversarial_training, angular_training])
def test_the_other_trainings_go_on_exactly_after_an_interruption(
    tmp_path, monkeypatch, every_epoch, train
):
    monkeypatch.setattr(q4_adv_train, "PGD_IMAGES", 10)
    whole = train(tmp_path / "whole.pt")
    interrupt_in_the_second_epoch(lambda: train(tmp_path / "resumed.pt"))
    resumed = train(tmp_path / "resumed.pt")
    assert helpers.without_seconds(resumed["history"]) == helpers.without_seconds(whole["history"])
    helpers.assert_same_training(tmp_path / "resumed.training.pt", tmp_path / "whole.training.pt")


# ---- Finished, or of another recipe --------------------------------------------------------------


def test_a_finished_training_is_not_repeated_unless_fresh(tmp_path, capsys):
    path, state = tmp_path / "model.pt", tmp_path / STATE
    first = helpers.train_linear(path)
    before = state.stat().st_ino  # of another file, where it is written again
    capsys.readouterr()
    assert helpers.train_linear(path) == first and state.stat().st_ino == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Going on after epoch 2") and line.endswith(str(state))
    again = helpers.train_linear(path, fresh=True)
    assert helpers.without_seconds(again["history"]) == helpers.without_seconds(first["history"])
    begun = [line.split()[:2] for line in capsys.readouterr().err.splitlines()]
    assert begun == [["epoch", "1/2"], ["epoch", "2/2"]] and state.stat().st_ino != before


@pytest.mark.parametrize("name, value", [("lr", 0.1), ("epochs", 5), ("seed", 1), ("cutout", 0)])
def test_a_state_of_other_settings_is_refused_by_naming_them_and_stays(tmp_path, name, value):
    path = tmp_path / "q2" / "model.pt"
    helpers.train_linear(path)
    before = common.state_file_of(path).read_bytes()
    with pytest.raises(common.UserError, match="made with other settings") as error:
        helpers.train_linear(path, **{name: value})
    assert f"({name} {helpers.tiny_recipe()[name]!r}, now {value!r})" in str(error.value)
    assert "start over with: " in str(error.value)
    assert common.state_file_of(path).read_bytes() == before


@pytest.mark.parametrize("epochs, accepted", [(1, True), (2, False)])
def test_another_pytorch_may_measure_a_training_but_not_go_on_with_it(
    tmp_path, every_epoch, epochs, accepted
):
    path = tmp_path / "model.pt"
    if accepted:
        first = helpers.train_linear(path)
        again = helpers.train_linear(path, torch="2.10.0", device="cuda", precision="bfloat16")
        assert again["recipe"] == first["recipe"]
    else:
        interrupt_in_the_second_epoch(lambda: helpers.train_linear(path, torch="2.9.0"))
        with pytest.raises(common.UserError, match="torch '2.9.0', now '2.10.0'"):
            helpers.train_linear(path, torch="2.10.0")


def test_the_build_of_pytorch_is_no_part_of_a_recipe(monkeypatch):
    recipes = []
    for version in ("2.9.0+cpu", "2.9.0+cu130", "2.9.0"):
        monkeypatch.setattr(torch, "__version__", TorchVersion(version))
        rows, args = q6_angular.RECIPES, helpers.tiny_args()
        recipes.append(common.choose_recipe(args, rows, "cifar", "q6", {"sha256": "tiny"}))
    assert recipes[0] == recipes[1] == recipes[2]
    assert {type(recipe["torch"]) for recipe in recipes} == {str}  # no other can be read again


# ---- A model without state, a state of other code ------------------------------------------------


def test_a_model_without_state_is_not_replaced_unless_fresh(tmp_path):
    path = tmp_path / "q2" / "model.pt"
    common.write_file(path, b"handed in")
    with pytest.raises(common.UserError, match="without the state of its training"):
        helpers.train_linear(path)
    assert [(file.name, file.read_bytes()) for file in path.parent.iterdir()] == [
        ("model.pt", b"handed in")
    ]
    assert len(helpers.train_linear(path, fresh=True)["history"]) == 2


@pytest.mark.parametrize("epochs_left", [0, 1])
def test_a_training_of_other_code_goes_on_and_says_so(tmp_path, every_epoch, capsys, epochs_left):
    path = tmp_path / "model.pt"
    before = helpers.tiny_origin(code_sha256="1" * 64, git_commit="before")

    def train(origin):
        return helpers.train_linear(path, origin=origin)

    if epochs_left:
        interrupt_in_the_second_epoch(lambda: train(before))
    else:
        train(before)
    capsys.readouterr()
    training = train(helpers.tiny_origin(git_commit="now"))
    (note,) = training["notes"]
    assert "was trained by other code than today's" in note
    assert common.one_line(note) in capsys.readouterr().err.splitlines()
    assert training["origin"] == before and len(training["history"]) == 2
    made = common.save_trained(path, common.resnet18(10, "imagenet"), training)
    assert made["notes"] == [note] and made["git_commit"] == "before"
    assert made["code_sha256"] == "1" * 64
    assert train(before)["notes"] == []


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Function that writes common.py's text and a script's, and returns common.code_sha256."""
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))

    def digest(shared, own):
        (tmp_path / "common.py").write_text(shared)
        (tmp_path / "q2_train_ce.py").write_text(own)
        return common.code_sha256("q2_train_ce.py")

    return digest


SHARED = '"""Shared."""\n\nRATE = 0.1\n\n\ndef f(x):\n    """Doc."""\n    return x + RATE\n'
OWN = "import common\n\nprint(common.f(1))\n"


def test_comments_docstrings_and_layout_are_no_change_of_code_but_values_are(code):
    before = code(SHARED, OWN)
    assert before == code(SHARED.replace("Doc.", "Other words."), OWN)
    assert before == code(SHARED.replace("0.1", "0.1  # a rate"), "# first\n" + OWN)
    assert before == code(SHARED.replace("(x):", "(\n    x,\n):").replace("Shared", "All"), OWN)
    assert before == code(SHARED.replace('    """Doc."""\n', ""), OWN)
    assert before != code(SHARED.replace("0.1", "0.2"), OWN)
    assert before != code(SHARED, OWN.replace("f(1)", "f(2)"))
