"""Every script from end to end with --quick on the synthetic data: what it writes and prints."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import common
import helpers
import q2_train_ce
import q3_attack
import q4_adv_train
import q6_angular

EPOCHS = {"q1": 0, "q2": 2, "q3": 0, "q4": 4, "q6": 2}  # in all trainings of a script
TRAINING = {"q2": q2_train_ce, "q4": q4_adv_train, "q6": q6_angular}

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
    split = common.load_split(quick_run.results / "q1" / "split.npz")
    parts = common.parts_of(*loaded, split, "cpu")
    return {name: (images / 255, labels) for name, (images, labels) in parts.items()}


# ---- Files and what they say of themselves -------------------------------------------------------


@pytest.mark.parametrize("name", [*helpers.SCRIPTS, "report"])
def test_a_quick_run_succeeds(quick_run, name):
    assert quick_run.finished[name].returncode == 0, quick_run.finished[name].stderr


@each_question
def test_metrics_say_what_they_were_made_from_and_on(quick_run, metrics, question):
    found = metrics[question]
    split = common.load_split(quick_run.results / "q1" / "split.npz")
    assert (found["question"], found["quick"]) == (question, True)
    assert found["split_sha256"] == split["sha256"] and found["n_test"] == len(split["test"])
    assert found["seed" if question != "q1" else "split_seed"] == 0
    assert ("seed" in found) == (question != "q1")  # the split's is another than a training's
    assert (found["device"], found["precision"]) == ("cpu", "float32")
    assert found["versions"]["torch"] == str(torch.__version__)
    assert {"python", "torchvision", "numpy"} <= found["versions"].keys()
    assert found["code_sha256"] == common.code_sha256(helpers.SCRIPTS[question])
    assert found["peak_memory_mib"] > 0 or sys.platform == "win32"
    stages = found["seconds"]
    assert len(stages) >= 2 and all(value >= 0 for value in stages.values())


def test_the_commit_is_the_one_of_the_repository_that_tracks_the_scripts(monkeypatch, tmp_path):
    shutil.copy(common.__file__, tmp_path / "common.py")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    settings = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]

    def git(*words):
        command = ["git", "-C", str(tmp_path), *settings, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "other").write_text("someone else's")
    git("add", "other")
    git("commit", "--quiet", "-m", "theirs")
    assert common._git_commit() == ""
    git("add", "common.py")
    git("commit", "--quiet", "-m", "ours")
    commit = git("rev-parse", "HEAD")
    assert common._git_commit() == commit
    with open(tmp_path / "common.py", "a") as file:
        file.write("\n")
    assert common._git_commit() == f"{commit}-dirty"


@pytest.fixture
def run_again(quick_run, cifar10, loaded, tmp_path, monkeypatch):
    """Function that runs a script in a copy of the quick run, with some functions replaced.

    Returns the copy, a results folder without the other questions that train.
    """

    def run(question, script, module, change=lambda results: None, **stand_ins):
        results = tmp_path / "results"
        for needed in {"q1", "q2", question}:
            shutil.copytree(quick_run.results / needed, results / needed)
        change(results)
        for name, function in stand_ins.items():
            monkeypatch.setattr(module, name, function)
        flags = helpers.quick_flags(question, cifar10, results)
        monkeypatch.setattr("sys.argv", [helpers.SCRIPTS[question], *flags])
        monkeypatch.setattr(common, "load_cifar10", lambda root: loaded)
        script.main()
        return results

    return run


def test_a_change_of_code_is_in_the_metrics_and_trains_nothing(run_again, metrics, capsys):
    def trained_by_other_code(results):
        file = results / "q2" / "model.training.pt"
        state = torch.load(file, weights_only=True)
        state["origin"]["code_sha256"] = "0" * 64
        common.write_torch(file, state)

    undrawn = dict.fromkeys(("draw_maps", "draw_scores", "draw_curves"), lambda *rest: "")
    results = run_again("q2", q2_train_ce, q2_train_ce, trained_by_other_code, **undrawn)
    (model,) = common.read_metrics(results / "q2" / "metrics.json")["models"].values()
    (before,) = metrics["q2"]["models"].values()
    assert model["sha256"] == before["sha256"] and model["code_sha256"] == "0" * 64
    (note,) = model["notes"]
    printed = capsys.readouterr().err
    assert note in printed and "--fresh" in note and str(results) in note
    assert not re.search("^epoch ", printed, re.MULTILINE)


# ---- Recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", TRAINING)
def test_a_recipe_is_the_stems_row_and_each_of_its_entries_has_a_flag(monkeypatch, question):
    script = TRAINING[question]
    for stem, row in script.RECIPES.items():
        for name, value in row.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words, changed = [f"--no-{flag}" if value else f"--{flag}"], not value
            else:
                words, changed = [f"--{flag}", str(value + 1)], value + 1
            monkeypatch.setattr("sys.argv", ["script.py", *words])
            args, split = common.parse_arguments(script.parser()), {"sha256": "tiny"}
            recipe = common.choose_recipe(args, script.RECIPES, stem, question, split, alpha=40)
            expected = {**common.OPTIMIZER, **row, name: changed, "stem": stem, "alpha": 40}
            assert recipe.items() >= {**expected, "seed": 0, "split_sha256": "tiny"}.items()
            assert type(recipe[name]) is type(value)


def test_a_quick_run_has_few_epochs_unless_a_flag_says_more(monkeypatch):
    for words, epochs in ([], 2), (["--epochs", "8"], 8):
        monkeypatch.setattr("sys.argv", ["script.py", "--quick", *words])
        args, rows = common.parse_arguments(q2_train_ce.parser()), q2_train_ce.RECIPES
        recipe = common.choose_recipe(args, rows, "cifar", "q2", {"sha256": "tiny"})
        assert recipe["epochs"] == epochs


@pytest.mark.parametrize("words, changes", [([], {}), (["--lr", "0.02"], {"lr": 0.02})])
def test_adamw_brings_its_batch_size_rate_and_decay_which_flags_override(
    monkeypatch, words, changes
):
    monkeypatch.setattr("sys.argv", ["script.py", "--optimizer", "adamw", *words])
    args = common.parse_arguments(q2_train_ce.parser())
    rows = q2_train_ce.recipes_with(args.optimizer)
    for stem, row in q2_train_ce.RECIPES.items():
        recipe = common.choose_recipe(args, rows, stem, "q2", {"sha256": "tiny"})
        assert recipe.items() >= {**row, **q2_train_ce.ADAMW, **changes}.items()
    assert q2_train_ce.recipes_with("sgd") == q2_train_ce.RECIPES


@pytest.mark.parametrize(
    "words, rate",
    [([], None), (["--init", "scratch"], 0.3), (["--init", "scratch", "--lr", "0.02"], 0.02)],
)
def test_question_6_from_scratch_has_a_rate_of_its_own(monkeypatch, words, rate):
    monkeypatch.setattr("sys.argv", ["script.py", *words])
    args = common.parse_arguments(q6_angular.parser())
    for stem, row in q6_angular.RECIPES.items():
        recipe = q6_angular.choose_recipe(args, {"sha256": "tiny"}, stem, None)
        assert recipe["lr"] == (rate or row["lr"]) and recipe["init"] == args.init


def test_question_4_trains_each_model_by_its_own_rate_and_only_one_under_attack(
    monkeypatch, metrics
):
    flags = ["--lr", "0.02", "--lr-perturbed", "0.003", "--noise", "0"]
    monkeypatch.setattr("sys.argv", ["script.py", *flags])
    args = common.parse_arguments(q4_adv_train.parser())
    recipe = q4_adv_train.choose_recipe(args, {"sha256": "tiny"}, {"stem": "cifar"})
    (_, _, without), (_, _, with_fgm) = q4_adv_train.variants(recipe).values()
    assert without["lr"] == 0.003 and not {"noise", "eps", "lr_perturbed"} & without.keys()
    assert (with_fgm["lr"], with_fgm["noise"]) == (0.02, 0)
    assert with_fgm["eps"] == common.EPSILON["linf"] and "lr_perturbed" not in with_fgm
    assert recipe["perturbation"] == common.PERTURBATION
    trained = [model["recipe"] for model in metrics["q4"]["models"].values()]
    assert [own.keys() for own in trained] == [without.keys(), with_fgm.keys()]


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


# ---- Numbers -------------------------------------------------------------------------------------


def test_the_right_images_of_question_3_are_those_that_question_2s_model_gets_right(
    quick_run, data
):
    model = common.load_checkpoint(quick_run.results / "q2" / "model.pt")
    images, labels = data["test"]
    with torch.no_grad():
        expected = (model(images).argmax(1) == labels).numpy()
    right = common.read_right(quick_run.results / "q3" / "right.npz")
    assert (right[common.CROSS_ENTROPY]["clean"] != expected).mean() <= 0.01  # rounding


def scikit_learns_vote(model, part, data, neighbours):
    """Accuracy of the vote of the training embeddings on a part, as scikit-learn counts it."""
    train, queries = (q6_angular.embed(model, data[name][0]).numpy() for name in ("train", part))
    peer = KNeighborsClassifier(neighbours).fit(train, data["train"][1])
    return peer.score(queries, data[part][1])


def test_question_6_reports_the_vote_that_scikit_learn_counts(quick_run, metrics, data):
    model = common.load_checkpoint(quick_run.results / "q6" / "model.pt")
    (found,) = metrics["q6"]["models"].values()
    for part, reported in (("test", found["accuracy"]["clean"]), ("val", found["val"]["accuracy"])):
        expected = scikit_learns_vote(model, part, data, found["neighbours"])
        assert reported == pytest.approx(expected, abs=0.01), part


def test_question_6_tells_what_the_vote_was_before_training(metrics, data):
    (found,) = metrics["q6"]["models"].values()
    torch.manual_seed(found["recipe"]["seed"])
    model = common.resnet18(q6_angular.EMBEDDING, found["recipe"]["stem"]).eval()
    expected = scikit_learns_vote(model, "val", data, found["neighbours"])
    assert found["val"]["accuracy_before_training"] == pytest.approx(expected, abs=0.01)


def test_the_numbers_of_question_2_agree_with_each_other_and_with_question_3s(metrics):
    (model,), (attacked,) = (metrics[question]["models"].values() for question in ("q2", "q3"))
    assert model["accuracy"]["clean"] == model["test"]["accuracy"] == attacked["accuracy"]["clean"]
    for part in ("val", "test"):
        scores, confusion = model[part], torch.tensor(model[part]["confusion"])
        assert confusion.sum(1).tolist() == metrics["q1"]["counts"][part]
        assert confusion.diag().sum() / confusion.sum() == pytest.approx(scores["accuracy"])
        per_class = confusion.diag() / confusion.sum(1)
        assert list(scores["accuracy_per_class"].values()) == pytest.approx(per_class.tolist())


def test_question_3_refits_the_map_of_question_2(metrics):
    assert metrics["q3"]["umap_sha256"] == metrics["q2"]["umap_sha256"]


def test_the_examples_are_images_that_the_model_gets_right(run_again, data):
    """So that a reader sees attacks turn them."""

    class Attacked(Exception):
        pass

    def attack(model, images, labels, *rest, **settings):
        raise Attacked(images, labels)

    right = torch.arange(len(data["test"][1])) % 3 == 1
    stand_ins = {"robustness": lambda *rest: ({}, {"clean": right}, None), "fgm": attack}
    with pytest.raises(Attacked) as attacked:
        run_again("q3", q3_attack, common, **stand_ins)
    chosen = right.nonzero()[: common.EXAMPLES, 0]
    for found, expected in zip(attacked.value.args, data["test"], strict=True):
        assert torch.allclose(found, expected[chosen])


# ---- What is printed -----------------------------------------------------------------------------


@each_question
def test_without_a_terminal_stderr_has_one_line_per_epoch_and_one_per_stage(quick_run, question):
    lines = quick_run.finished[question].stderr.splitlines()
    stages = [line for line in lines if re.fullmatch(r"[a-z_ ]+: \d+ s", line)]
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == EPOCHS[question]
    assert stages and len(stages) + len(epochs) == len(lines), lines


@each_question
def test_a_table_with_the_results_is_printed(quick_run, metrics, question):
    printed = quick_run.finished[question].stdout
    assert f"Question {question[1]}" in printed
    found = metrics[question]
    if question == "q1":
        expected = [[str(found[key])] for key in ("n_train", "n_val", "n_test")]
    elif question == "q2":
        (model,) = found["models"].values()
        expected = [
            [common.percent(model[part][key]) for key in ("accuracy", "ece")]
            for part in ("val", "test")
        ]
    else:
        expected = [
            [name, *(common.percent(model["accuracy"][key]) for key in common.CONDITIONS)]
            for name, model in found["models"].items()
        ]
    for cells in expected:
        assert any(all(cell in line for cell in cells) for line in printed.splitlines()), cells


def test_a_folder_whose_name_holds_anything_works_and_leaves_the_terminal_alone(
    quick_run, tmp_path
):
    results = tmp_path / "a\nb|c \x1b[31m"
    for question in ("q1", "q2"):
        shutil.copytree(quick_run.results / question, results / question)
    finished = [
        helpers.run_here("report.py", ["--quick", "--results", str(results)]),
        helpers.run_here("q3_attack.py", ["--results", str(results)]),
    ]
    assert [each.returncode for each in finished] == [0, 2], finished
    assert (results / "report.html").exists()
    printed = "".join(each.stdout + each.stderr for each in finished)
    assert printed.replace("\n", "").isprintable()
    assert len(finished[1].stderr.splitlines()) == 1
