"""verify.py passes on a real run and fails on each kind of forgery."""

import json
import shutil
import sys

import pytest

import common
import q1_split
import verify


@pytest.fixture
def handed_in(quick_run, tmp_path):
    """A copy of the quick run's results folder."""
    return shutil.copytree(quick_run.results, tmp_path / "results")


def verified(monkeypatch, capsys, data, results):
    """Exit status and output of verify.py on a results folder."""
    flags = ["--quick", "--device", "cpu", "--precision", "float32", "--data", str(data)]
    monkeypatch.setattr(sys, "argv", ["verify.py", *flags, "--results", str(results)])
    with pytest.raises(SystemExit) as end:
        common.run(verify.main)
    captured = capsys.readouterr()
    return end.value.code, captured.out + captured.err


def edit_metrics(results, question, change):
    path = results / question / "metrics.json"
    metrics = json.loads(path.read_text())
    change(metrics)
    path.write_text(json.dumps(metrics))


def test_a_real_run_holds(monkeypatch, capsys, cifar10, quick_run):
    status, output = verified(monkeypatch, capsys, cifar10, quick_run.results)
    assert status == 0, output
    assert "Everything that is there holds." in output and "NO" not in output
    for name in (
        "cross-entropy (q2)",
        "perturbed (q4)",
        "perturbed + FGM (q4)",
        "angular loss (q6)",
    ):
        assert f"{name}: clean, 100 images" in output


def test_missing_questions_are_named_and_no_error(monkeypatch, capsys, cifar10, handed_in):
    shutil.rmtree(handed_in / "q4")
    shutil.rmtree(handed_in / "q6")
    status, output = verified(monkeypatch, capsys, cifar10, handed_in)
    assert status == 0 and "Missing, and not looked at: q4, q6." in output


@pytest.mark.parametrize("question", ["q2", "q3", "q4", "q6"])
def test_numbers_edited_by_hand_are_caught(monkeypatch, capsys, cifar10, handed_in, question):
    def improve(metrics):
        name = list(metrics["models"])[-1]
        metrics["models"][name]["accuracy"]["clean"] += 0.01

    for other in {"q2", "q4", "q6"} - {question, "q2"}:
        shutil.rmtree(handed_in / other)  # only for speed
    edit_metrics(handed_in, question, improve)
    status, output = verified(monkeypatch, capsys, cifar10, handed_in)
    assert status == 1
    assert f"{question}: " in output and "clean, 100 images does not hold" in output


def test_a_swapped_checkpoint_is_caught(monkeypatch, capsys, cifar10, handed_in):
    first, second = (
        handed_in / "q4" / f"{name}.pt" for name in ("perturbed", "perturbed_fgm_trained")
    )
    first.write_bytes(second.read_bytes())
    shutil.rmtree(handed_in / "q6")
    status, output = verified(monkeypatch, capsys, cifar10, handed_in)
    assert status == 1 and "q4: perturbed (q4): the file does not hold" in output
    assert "q4: perturbed (q4): its recipe does not hold" in output


def test_another_model_of_question_2_is_caught(monkeypatch, capsys, cifar10, handed_in):
    shutil.rmtree(handed_in / "q4")
    shutil.rmtree(handed_in / "q6")
    checkpoint = common.read_checkpoint(handed_in / "q2" / "model.pt")
    digest = common.save_checkpoint(
        handed_in / "q2" / "model.pt",
        common.resnet18(10, "imagenet"),
        stem="imagenet",
        provenance=checkpoint["provenance"],
    )
    edit_metrics(
        handed_in,
        "q2",
        lambda metrics: next(iter(metrics["models"].values())).update(sha256=digest),
    )
    status, output = verified(monkeypatch, capsys, cifar10, handed_in)
    assert status == 1 and "q3: made from question 2's model does not hold" in output


def test_a_split_that_its_seed_does_not_draw_is_caught(monkeypatch, capsys, cifar10, handed_in):
    for question in ("q2", "q3", "q4", "q6"):
        shutil.rmtree(handed_in / question)
    labels = common.load_cifar10(cifar10)[1].numpy()
    parts = q1_split.draw_split(labels, "pooled", seed=7, quick=True)
    path = handed_in / "q1" / "split.npz"
    q1_split.save_split(path, **parts, protocol="pooled", seed=0, quick=True)
    status, output = verified(monkeypatch, capsys, cifar10, handed_in)
    assert status == 1 and "q1: the split does not hold" in output


def test_models_of_another_split_are_caught(error_line, cifar10, handed_in):
    labels = common.load_cifar10(cifar10)[1].numpy()
    parts = q1_split.draw_split(labels, "pooled", seed=7, quick=True)
    path = handed_in / "q1" / "split.npz"
    q1_split.save_split(path, **parts, protocol="pooled", seed=7, quick=True)
    line = error_line(verify.main, "--quick", "--data", cifar10, "--results", handed_in)
    assert "was trained on another split" in line


@pytest.mark.parametrize("train, holds", [(0.95, True), (0.898, True), (0.85, False)])
def test_a_model_that_is_better_on_test_than_on_its_training_images_is_caught(train, holds):
    measured = {"clean": (0.9, 24_000), "train": (train, 12_000)}
    model = {"accuracy": {"clean": 0.9}}
    rows = verify.accuracy_rows("q2", "m", model, measured, 24_000)
    assert rows[-1][1] == "m: not better on test than on train"
    assert rows[-1][-1] == holds


@pytest.mark.parametrize(
    "reported, holds", [(0.30, True), (0.33, True), (0.34, False), (0.2, False)]
)
def test_on_other_images_three_standard_errors_are_allowed(reported, holds):
    measured = {"fgm": (0.3, 2000), "clean": (0.9, 24_000), "train": (0.95, 12_000)}
    rows = verify.accuracy_rows("q2", "m", {"accuracy": {"fgm": reported}}, measured, 24_000)
    assert rows[0][-1] == holds


def test_metrics_of_another_form_end_in_a_line(error_line, cifar10, handed_in):
    edit_metrics(handed_in, "q2", lambda metrics: metrics.update(models={"m": 7}))
    line = error_line(verify.main, "--quick", "--data", cifar10, "--results", handed_in)
    assert "metrics.json" in line
