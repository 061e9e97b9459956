"""Every script from end to end with --quick on the synthetic data: what it writes, prints and
leaves out."""

import json
import re
import struct
import subprocess
from types import SimpleNamespace

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import common
import demo
import helpers
import q2_train_ce
import q4_adv_train
import q6_angular

FILES = {
    "q1": {"split.npz", "figure01_train_labels.png", "figure02_held_out_labels.png"},
    "q2": {
        "model.pt",
        "training.pt",
        "figure03_accuracy.png",
        "figure04_loss.png",
        "figure05_umap_train.png",
        "figure06_umap_test.png",
        "confusion_val.png",
        "confusion_test.png",
        "reliability_val.png",
        "reliability_test.png",
    },
    "q3": {"figure07_examples.png", "figure08_umap.png", "by_epsilon.png", "pgd_by_step.png"},
    "q4": {
        f"{stem}{name}{end}"
        for name in ("perturbed", "perturbed_fgm_trained")
        for stem, end in (
            ("", ".pt"),
            ("training_", ".pt"),
            ("figure09_accuracy_", ".png"),
            ("figure10_loss_", ".png"),
            ("figure11_umap_train_", ".png"),
            ("figure12_umap_test_", ".png"),
        )
    },
    "q6": {
        "model.pt",
        "training.pt",
        "figure13_accuracy.png",
        "figure13_loss.png",
        "figure14_umap.png",
        "figure15_examples.png",
        "figure16_umap.png",
        "all_models.png",
    },
}
CONDITIONS = {"clean", "perturbed", "fgm", "perturbed_fgm", "pgd", "strongest"}
EPOCHS = {"q1": 0, "q2": 2, "q3": 0, "q4": 4, "q6": 2}  # in all trainings of a script

each_question = pytest.mark.parametrize("question", helpers.SCRIPTS)


@pytest.fixture(scope="module")
def metrics(quick_run):
    return {
        question: json.loads((quick_run.results / question / "metrics.json").read_text())
        for question in helpers.SCRIPTS
    }


@pytest.fixture(scope="module")
def data(quick_run, loaded):
    """Images as float32 and labels of each part of the quick split."""
    images, labels = loaded
    split = common.load_split(quick_run.results / "q1" / "split.npz")
    return {
        name: (images[split[name]] / 255, labels[split[name]]) for name in ("train", "val", "test")
    }


@pytest.fixture(scope="module")
def measured(metrics):
    """The part of the metrics that stands for a model under all conditions: dict by model name."""
    return {
        name: model
        for question in ("q3", "q4", "q6")
        for name, model in metrics[question]["models"].items()
    }


@pytest.mark.parametrize("name", [*helpers.SCRIPTS, "report"])
def test_a_quick_run_succeeds(quick_run, name):
    assert quick_run.finished[name].returncode == 0, quick_run.finished[name].stderr


@each_question
def test_a_script_writes_its_files_and_no_others(quick_run, question):
    found = {path.name for path in (quick_run.results / question).iterdir()}
    assert found == FILES[question] | {"metrics.json"}


def test_figures_have_at_least_150_dots_per_inch(quick_run):
    figures = sorted(quick_run.results.rglob("*.png"))
    drawn = sum(name.endswith(".png") for names in FILES.values() for name in names)
    assert len(figures) == drawn + 1  # question 5's, which the report brings
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
    assert (
        found["seed"] == 0
        and found["device"] == "cpu"
        and found["precision"] in ("float32", "bfloat16")
    )
    assert found["versions"]["torch"] == str(torch.__version__)
    assert {"python", "torchvision", "numpy"} <= found["versions"].keys()
    assert found["peak_memory_mib"] > 0


@each_question
def test_metrics_tell_the_time_of_every_stage(metrics, question):
    stages = metrics[question]["seconds"]
    assert len(stages) >= 2
    assert all(value >= 0 for value in stages.values())


def test_question_4_trains_each_model_by_its_own_rate_and_only_one_under_attack(metrics):
    without, with_fgm = (model["recipe"] for model in metrics["q4"]["models"].values())
    row = q4_adv_train.RECIPES["imagenet"]
    assert without["lr"] == row["lr_perturbed"] and "noise" not in without and "eps" not in without
    assert (with_fgm["lr"], with_fgm["noise"], with_fgm["eps"]) == (
        row["lr"],
        row["noise"],
        common.EPSILON["linf"],
    )
    recipe = {"lr": 0.02, "lr_perturbed": 0.003, "noise": 3.0, "eps": 0.1}
    assert [
        (own["lr"], own.get("noise")) for *_, own in q4_adv_train.variants(recipe).values()
    ] == [
        (0.003, None),
        (0.02, 3.0),
    ]


@pytest.mark.parametrize(
    "question, recipes",
    [("q2", q2_train_ce.RECIPES), ("q4", q4_adv_train.RECIPES), ("q6", q6_angular.RECIPES)],
)
def test_a_recipe_is_the_stems_row_and_a_flag_overrides_its_entry(
    monkeypatch, tmp_path, question, recipes
):
    for stem, row in recipes.items():
        for name, value in row.items():
            flag = "--" + name.replace("_", "-")
            words = (
                [flag if not value else f"--no-{name.replace('_', '-')}"]
                if isinstance(value, bool)
                else [flag, str(value + 1)]
            )
            monkeypatch.setattr("sys.argv", ["script.py", "--results", str(tmp_path), *words])
            args = common.parse_arguments(common.argument_parser("A script.", recipes))
            recipe = common.choose_recipe(
                args, recipes, stem, question, {"sha256": "tiny"}, alpha=40
            )
            changed = {**row, name: not value if isinstance(value, bool) else value + 1}
            assert (
                recipe.items()
                >= {**changed, **common.OPTIMIZER, "stem": stem, "alpha": 40, "seed": 0}.items()
            )


def test_adamw_brings_its_batch_size_rate_and_decay_which_flags_override(monkeypatch, tmp_path):
    for stem, row in q2_train_ce.RECIPES.items():
        for words, changed in ([], {}), (["--lr", "0.02"], {"lr": 0.02}):
            monkeypatch.setattr("sys.argv", ["script.py", "--results", str(tmp_path), *words])
            args = common.parse_arguments(common.argument_parser("A script.", q2_train_ce.RECIPES))
            recipes = q2_train_ce.recipes_with("adamw")
            recipe = common.choose_recipe(args, recipes, stem, "q2", {"sha256": "tiny"})
            expected = {**row, "optimizer": "adamw", "weight_decay": 0.01, "batch_size": 128}
            assert recipe.items() >= {**expected, "lr": q2_train_ce.ADAMW["lr"], **changed}.items()
    assert q2_train_ce.recipes_with("sgd") == q2_train_ce.RECIPES


def test_the_stem_is_that_of_question_2_everywhere(metrics):
    stems = {
        model.get("recipe", model)["stem"]
        for found in metrics.values()
        for model in found.get("models", {}).values()
    }
    assert stems == {"imagenet"}


@pytest.mark.parametrize(
    "flag, device, stem",
    [
        ("auto", "cuda", "cifar"),
        ("auto", "cpu", "stride2"),
        ("auto", "mps", "stride2"),
        ("imagenet", "cuda", "imagenet"),
    ],
)
def test_question_2_takes_the_stem_that_suits_the_device_unless_one_is_named(
    capsys, flag, device, stem
):
    assert q2_train_ce.choose_stem(SimpleNamespace(stem=flag, device=device)) == stem
    assert capsys.readouterr().out.count("\n") == (flag == "auto")


def test_the_recipe_travels_unchanged_into_checkpoint_state_and_metrics(quick_run, metrics):
    for question in ("q2", "q4", "q6"):
        for model in metrics[question]["models"].values():
            name = model["file"].removesuffix(".pt")
            folder = quick_run.results / question
            state = folder / ("training.pt" if name == "model" else f"training_{name}.pt")
            for kept in (
                torch.load(state, weights_only=True),
                common.read_checkpoint(folder / f"{name}.pt")["provenance"],
            ):
                assert kept["recipe"] == model["recipe"]


def test_accuracies_are_fractions_under_every_condition(measured):
    for name, model in measured.items():
        assert model["accuracy"].keys() == CONDITIONS, name
        assert all(0 <= value <= 1 for value in model["accuracy"].values()), name


def test_more_pgd_steps_never_raise_accuracy(measured):
    for model in measured.values():
        by_step = model["pgd_by_step"]
        assert len(by_step) == common.PGD_STEPS + 1
        assert by_step == sorted(by_step, reverse=True)
        assert by_step[0] == pytest.approx(
            model["accuracy"]["clean"], abs=0.01
        )  # rounding may move an image
        assert by_step[-1] == model["accuracy"]["pgd"]


def test_the_curves_over_epsilon_pass_through_the_reported_accuracies(measured):
    for model in measured.values():
        curve = model["by_eps"]
        at = {round(255 * eps): number for number, eps in enumerate(curve["eps"])}
        for key in "fgm", "pgd":
            assert curve[key][at[0]] == pytest.approx(model["accuracy"]["clean"], abs=0.01)
            assert curve[key][at[8]] == pytest.approx(model["accuracy"][key], abs=0.01)


def test_question_2_reports_the_accuracy_of_the_model_it_saved(quick_run, metrics, data):
    model = common.load_checkpoint(quick_run.results / "q2" / "model.pt")
    images, labels = data["test"]
    with torch.no_grad():
        share = (model(images).argmax(1) == labels).float().mean()
    (trained,), (attacked,) = (metrics[question]["models"].values() for question in ("q2", "q3"))
    for reported in (
        trained["accuracy"]["clean"],
        trained["test"]["accuracy"],
        attacked["accuracy"]["clean"],
    ):
        assert reported == pytest.approx(share.item(), abs=0.01)


def scikit_learns_vote(model, part, data, neighbours):
    """Accuracy of the vote of the training embeddings on a part, as scikit-learn counts it."""
    train, queries = (q6_angular.embed(model, data[name][0]).numpy() for name in ("train", part))
    return (
        KNeighborsClassifier(neighbours).fit(train, data["train"][1]).score(queries, data[part][1])
    )


def test_question_6_reports_the_vote_that_scikit_learn_counts(quick_run, metrics, data):
    model = common.load_checkpoint(quick_run.results / "q6" / "model.pt")
    (found,) = metrics["q6"]["models"].values()
    for part, reported in (("test", found["accuracy"]["clean"]), ("val", found["val"]["accuracy"])):
        assert reported == pytest.approx(
            scikit_learns_vote(model, part, data, found["neighbours"]), abs=0.01
        ), part


def test_question_6_tells_what_the_vote_was_before_training(metrics, data):
    (found,) = metrics["q6"]["models"].values()
    torch.manual_seed(found["recipe"]["seed"])
    model = common.resnet18(q6_angular.EMBEDDING, found["recipe"]["stem"]).eval()
    expected = scikit_learns_vote(model, "val", data, found["neighbours"])
    assert found["val"]["accuracy_before_training"] == pytest.approx(expected, abs=0.01)


def test_confusion_matrix_and_accuracies_agree(metrics):
    (model,) = metrics["q2"]["models"].values()
    for part in ("val", "test"):
        scores = model[part]
        confusion = torch.tensor(scores["confusion"])
        assert confusion.sum(1).tolist() == [
            metrics["q1"]["counts"][part][label] for label in range(10)
        ]
        assert confusion.diag().sum() / confusion.sum() == pytest.approx(scores["accuracy"])
        per_class = confusion.diag() / confusion.sum(1)
        assert list(scores["accuracy_per_class"].values()) == pytest.approx(per_class.tolist())


def test_metrics_name_the_model_files_by_their_checksum(quick_run, metrics):
    for question in ("q2", "q4", "q6"):
        for model in metrics[question]["models"].values():
            file = quick_run.results / question / model["file"]
            assert model["sha256"] == common.sha256(file.read_bytes())
    (trained,) = metrics["q2"]["models"].values()
    for question in ("q3", "q4"):
        assert metrics[question]["parent_sha256"] == [trained["sha256"]]


def test_question_3_refits_the_map_of_question_2(metrics):
    assert metrics["q3"]["umap_sha256"] == metrics["q2"]["umap_sha256"]


@each_question
def test_without_a_terminal_stderr_has_one_line_per_epoch_and_one_per_stage(quick_run, question):
    lines = quick_run.finished[question].stderr.splitlines()
    stages = [line for line in lines if re.fullmatch(r"[a-z_ ]+: \d+ s", line)]
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == EPOCHS[question]
    assert stages and len(stages) + len(epochs) == len(lines), lines


def test_a_script_says_first_what_it_does_and_before_the_attacks_how_long_they_take(quick_run):
    for question, attacked in {"q2": 0, "q3": 1, "q4": 2, "q6": 1}.items():
        first, *others = quick_run.finished[question].stdout.splitlines()
        assert first.startswith(f"Question {question[1]}: ")
        assert first.endswith(f"; {quick_run.results})") and "(cpu, " in first
        lines = [line for line in others if line.startswith("Attacks on ")]
        assert len(lines) == attacked
        assert all(re.fullmatch(r"Attacks on \d+ images: at most \d+ min", line) for line in lines)


def test_a_folder_whose_name_holds_anything_works_and_leaves_the_terminal_alone(cifar10, tmp_path):
    results = tmp_path / "a\nb|c \x1b[31m"
    commands = [
        helpers.quick_script("q1", cifar10, results),
        helpers.script("report.py", "--quick", "--results", results),
        helpers.script("q3_attack.py", "--quick", "--data", cifar10, "--results", results),
    ]
    finished = [subprocess.run(each, capture_output=True, text=True) for each in commands]
    assert [each.returncode for each in finished] == [0, 0, 2]
    assert (results / "report.html").exists()
    printed = "".join(each.stdout + each.stderr for each in finished)
    assert printed.replace("\n", "").isprintable()
    assert len(finished[2].stderr.splitlines()) == 1


@each_question
def test_a_table_with_the_results_is_printed(quick_run, metrics, measured, question):
    printed = quick_run.finished[question].stdout
    assert f"Question {question[1]}" in printed
    found = metrics[question]
    if question == "q1":
        expected = [[str(found[key])] for key in ("n_train", "n_val", "n_test")]
    elif question == "q2":
        (model,) = found["models"].values()
        expected = [
            [common.percent(model[part]["accuracy"]), common.percent(model[part]["ece"])]
            for part in ("val", "test")
        ]
    else:
        models = list(measured)[: {"q3": 1, "q4": 3, "q6": 4}[question]]
        expected = [
            [common.percent(measured[model]["accuracy"][key]) for key in common.CONDITIONS]
            for model in models
        ]
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
    targets = [
        line.split("](")[1].rstrip(")")
        for line in (quick_run.results / "report.md").read_text().splitlines()
        if line.startswith("![")
    ]
    assert len(targets) >= 16
    assert all((quick_run.results / target).is_file() for target in targets)


def test_the_demo_runs_every_script_on_its_own_pictures_and_says_so(monkeypatch, tmp_path):
    commands = []
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    monkeypatch.setattr(demo, "run", lambda command: commands.append(list(map(str, command))))
    demo.main()
    assert (tmp_path / "data" / "cifar-10-batches-py" / "test_batch").exists()
    *questions, made = commands
    for (question, script), command in zip(helpers.SCRIPTS.items(), questions, strict=True):
        assert str(helpers.ROOT / script) in command and str(tmp_path / "data") in command
        assert command[-2:] == demo.FLAGS.get(question, command)[-2:]
    assert any(word.endswith("report.py") for word in made) and demo.NOTE in made
