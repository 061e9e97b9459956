"""Every script from end to end with --quick on the synthetic data: what it writes, prints and leaves out."""

import json
import re
import shutil
import struct
import subprocess

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import common
import helpers
import q4_adv_train
import q6_angular

FILES = {
    "q1": {"split.npz", "figure01_train_labels.png", "figure02_held_out_labels.png"},
    "q2": {"model.pt", "training.pt", "figure03_accuracy.png", "figure04_loss.png", "figure05_umap_train.png",
           "figure06_umap_test.png", "confusion_val.png", "confusion_test.png", "reliability_val.png", "reliability_test.png"},
    "q3": {"figure07_examples.png", "figure08_umap.png", "fgm_by_epsilon.png", "pgd_by_step.png"},
    "q4": {f"{stem}{name}{end}" for name in ("perturbed", "perturbed_fgm_trained")
           for stem, end in (("", ".pt"), ("training_", ".pt"), ("figure09_accuracy_", ".png"), ("figure10_loss_", ".png"),
                             ("figure11_umap_train_", ".png"), ("figure12_umap_test_", ".png"))},
    "q6": {"model.pt", "training.pt", "angular_loss.png", "figure13_accuracy.png", "figure13_loss.png", "figure14_umap.png",
           "figure15_examples.png", "figure16_umap.png"},
}
CONDITIONS = {"clean", "perturbed", "fgm", "perturbed_fgm", "pgd"}
EPOCHS = {"q1": 0, "q2": 2, "q3": 0, "q4": 4, "q6": 2}  # in all trainings of a script

each_question = pytest.mark.parametrize("question", helpers.SCRIPTS)


@pytest.fixture(scope="module")
def metrics(quick_run):
    return {question: json.loads((quick_run.results / question / "metrics.json").read_text()) for question in helpers.SCRIPTS}


@pytest.fixture(scope="module")
def data(quick_run, loaded):
    """Images as float32 and labels of each part of the quick split."""
    images, labels = loaded
    split = common.load_split(quick_run.results / "q1" / "split.npz")
    return {name: (images[split[name]] / 255, labels[split[name]]) for name in ("train", "val", "test")}


@pytest.fixture(scope="module")
def measured(metrics):
    """The part of the metrics that stands for a model under all conditions: dict by model name."""
    models = {name: {key: metrics["q4"][key][name] for key in ("accuracy", "pgd_by_step", "seconds", "checks")}
              for name in ("perturbed", "perturbed_fgm_trained")}
    return {"q3": metrics["q3"], **models, "q6": metrics["q6"]}


@pytest.mark.parametrize("name", [*helpers.SCRIPTS, "report"])
def test_a_quick_run_succeeds(quick_run, name):
    assert quick_run.finished[name].returncode == 0, quick_run.finished[name].stderr


@each_question
def test_a_script_writes_its_files_and_no_others(quick_run, question):
    found = {path.name for path in (quick_run.results / question).iterdir()}
    assert found == FILES[question] | {"metrics.json"}


def test_figures_have_at_least_150_dots_per_inch(quick_run):
    figures = sorted(quick_run.results.rglob("*.png"))
    assert len(figures) == sum(name.endswith(".png") for names in FILES.values() for name in names)
    for path in figures:
        content = path.read_bytes()
        across, down, unit = struct.unpack_from(">IIB", content, content.index(b"pHYs") + 4)
        assert unit == 1 and min(across, down) >= 150 / 0.0254, path  # unit 1 is the metre


@each_question
def test_metrics_say_what_they_were_made_from(quick_run, metrics, question):
    found = metrics[question]
    split = common.load_split(quick_run.results / "q1" / "split.npz")
    assert found["question"] == question and found["quick"] is True
    assert found["split_sha256"] == split["sha256"]
    assert found["n_test"] == len(split["test"])
    assert found["settings"]["seed"] == 0 and found["settings"]["device"] == "cpu" and found["settings"]["quick"] is True
    assert found["versions"]["torch"] == str(torch.__version__)
    assert {"python", "torchvision", "numpy"} <= found["versions"].keys()
    assert found["peak_memory_mib"] > 0


@each_question
def test_metrics_tell_the_time_of_every_stage(metrics, question):
    stages = metrics[question]["seconds"]
    if question == "q4":
        assert stages.keys() == {"perturbed", "perturbed_fgm_trained"}
        stages = {(model, stage): value for model, each in stages.items() for stage, value in each.items()}
    assert len(stages) >= 3
    assert all(value >= 0 for value in stages.values())


@pytest.mark.parametrize("flags, expected", [
    (["--lr", "0.02"], [(0.02, None), (0.02, 2.0)]),
    (["--lr", "0.02", "--lr-perturbed", "0.003", "--noise", "3"], [(0.003, None), (0.02, 3.0)]),
])
def test_question_4_trains_each_model_with_its_own_rate_and_noise(cifar10, quick_run, monkeypatch, flags, expected):
    def noted(prepare, name, model, data, args, *others):
        seen.append((args.lr, args.noise))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return []

    seen = []
    monkeypatch.setattr(q4_adv_train, "train_on", noted)
    monkeypatch.setattr(q4_adv_train, "draw_curves", lambda *arguments: None)
    monkeypatch.setattr(common, "save_checkpoint", lambda *arguments, **others: "")
    monkeypatch.setattr("sys.argv", helpers.quick_script("q4", cifar10, quick_run.results)[1:] + flags)
    with pytest.raises(KeyboardInterrupt):
        q4_adv_train.main()
    assert seen == expected


def test_accuracies_are_fractions_under_every_condition(measured):
    for name, model in measured.items():
        assert model["accuracy"].keys() == CONDITIONS, name
        assert all(0 <= value <= 1 for value in model["accuracy"].values()), name


def test_more_pgd_steps_never_raise_accuracy(measured):
    for model in measured.values():
        by_step = model["pgd_by_step"]
        assert len(by_step) == common.PGD_STEPS + 1
        assert by_step == sorted(by_step, reverse=True)
        assert by_step[0] == pytest.approx(model["accuracy"]["clean"], abs=0.01)  # rounding may move an image
        assert by_step[-1] == model["accuracy"]["pgd"]


def test_question_2_reports_the_accuracy_of_the_model_it_saved(quick_run, metrics, data):
    model = common.load_checkpoint(quick_run.results / "q2" / "model.pt")
    images, labels = data["test"]
    with torch.no_grad():
        share = (model(images).argmax(1) == labels).float().mean()
    for reported in (metrics["q2"]["accuracy"]["clean"], metrics["q2"]["test"]["accuracy"], metrics["q3"]["accuracy"]["clean"]):
        assert reported == pytest.approx(share.item(), abs=0.01)


def scikit_learns_vote(model, part, data, neighbours):
    """Accuracy of the vote of the training embeddings on a part, as scikit-learn counts it."""
    train, queries = (q6_angular.embed(model, data[name][0]).numpy() for name in ("train", part))
    return KNeighborsClassifier(neighbours).fit(train, data["train"][1]).score(queries, data[part][1])


def test_question_6_reports_the_vote_that_scikit_learn_counts(quick_run, metrics, data):
    model = common.load_checkpoint(quick_run.results / "q6" / "model.pt")
    found = metrics["q6"]
    for part, reported in (("test", found["accuracy"]["clean"]), ("val", found["val"]["accuracy"])):
        assert reported == pytest.approx(scikit_learns_vote(model, part, data, found["neighbours"]), abs=0.01), part


def test_question_6_tells_what_the_vote_was_before_training(metrics, data):
    found = metrics["q6"]
    torch.manual_seed(found["settings"]["seed"])
    model = common.resnet18(q6_angular.EMBEDDING, found["settings"]["stem"]).eval()
    expected = scikit_learns_vote(model, "val", data, found["neighbours"])
    assert found["val"]["accuracy_before_training"] == pytest.approx(expected, abs=0.01)


def test_confusion_matrix_and_accuracies_agree(metrics):
    for part in ("val", "test"):
        scores = metrics["q2"][part]
        confusion = torch.tensor(scores["confusion"])
        assert confusion.sum(1).tolist() == [metrics["q1"]["counts"][part][label] for label in range(10)]
        assert confusion.diag().sum() / confusion.sum() == pytest.approx(scores["accuracy"])
        per_class = confusion.diag() / confusion.sum(1)
        assert list(scores["accuracy_per_class"].values()) == pytest.approx(per_class.tolist())


def test_metrics_name_the_model_files_by_their_checksum(quick_run, metrics):
    named = {**{question: metrics[question]["model_sha256"] for question in ("q2", "q6")},
             "q4": {f"{name}.pt": digest for name, digest in metrics["q4"]["model_sha256"].items()}}
    for question, digests in named.items():
        for file, digest in digests.items():
            assert digest == common.sha256((quick_run.results / question / file).read_bytes())
    for question in ("q3", "q4"):
        assert metrics[question]["parent_sha256"] == list(metrics["q2"]["model_sha256"].values())


def test_question_3_refits_the_map_of_question_2(metrics):
    assert metrics["q3"]["umap_sha256"] == metrics["q2"]["umap_sha256"]


@each_question
def test_without_a_terminal_stderr_has_one_line_per_epoch_and_one_per_stage(quick_run, question):
    lines = quick_run.finished[question].stderr.splitlines()
    stages = [line for line in lines if re.fullmatch(r"[a-z]+: \d+ s", line)]
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == EPOCHS[question]
    assert stages and len(stages) + len(epochs) == len(lines), lines


@each_question
def test_a_table_with_the_results_is_printed(quick_run, metrics, measured, question):
    printed = quick_run.finished[question].stdout
    assert f"Question {question[1]}" in printed
    found = metrics[question]
    if question == "q1":
        expected = [[str(found[key])] for key in ("n_train", "n_val", "n_test")]
    elif question == "q2":
        expected = [[common.percent(found[part]["accuracy"]), common.percent(found[part]["ece"])] for part in ("val", "test")]
    else:
        models = {"q3": ["q3"], "q4": ["q3", "perturbed", "perturbed_fgm_trained"], "q6": list(measured)}[question]
        expected = [[common.percent(measured[model]["accuracy"][key]) for key in common.CONDITIONS] for model in models]
    for cells in expected:
        assert any(all(cell in line for cell in cells) for line in printed.splitlines()), cells


@pytest.mark.parametrize("kind", ["md", "html"])
def test_the_report_holds_every_model_under_every_condition(quick_run, measured, kind):
    report = (quick_run.results / f"report.{kind}").read_text()
    for model in measured.values():
        assert all(common.percent(value) in report for value in model["accuracy"].values())


def test_the_report_needs_no_other_file_and_names_no_missing_one(quick_run):
    page = (quick_run.results / "report.html").read_text()
    assert page.count("<img src='data:image/png;base64,") == page.count("<img")
    targets = [line.split("](")[1].rstrip(")") for line in (quick_run.results / "report.md").read_text().splitlines()
               if line.startswith("![")]
    assert len(targets) >= 16
    assert all((quick_run.results / target).is_file() for target in targets)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_hands_its_variables_to_the_scripts_that_know_them():
    command = ["make", "--dry-run", "DATA=somewhere", "RESULTS=nowhere", "STEM=cifar", "FLAGS=--seed 3"]
    lines = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for question, script in helpers.SCRIPTS.items():
        line, = (line for line in lines if f" {script} " in line)
        assert "--data somewhere --results nowhere --seed 3" in line
        assert ("--stem cifar" in line) == (question in helpers.TRAINING_FLAGS)
