"""verify.py passes what is honest, and names each forgery."""

import copy
import json
import math
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
import helpers
import q1_split
import q2_train_ce
import q6_angular
import verify

PERTURBED, WITH_FGM = "perturbed (q4)", "perturbed + FGM (q4)"
FILES = {name: file for (_, name), file in verify.MODELS.items()}


@pytest.fixture
def handed_in(quick_run, tmp_path):
    """A copy of the quick run's results folder, without the states of the trainings."""
    states = shutil.ignore_patterns("*.training.pt")
    return shutil.copytree(quick_run.results, tmp_path / "results", ignore=states)


@pytest.fixture(scope="module")
def read_once(quick_run):
    """What verify.py reads of the quick run: `split`, `found`, `rights`, `checkpoints`, `known`."""
    rows = []
    found, rights, checkpoints = verify.read_folder(rows, quick_run.results)
    assert rows == []
    return SimpleNamespace(
        split=common.load_split(quick_run.results / "q1" / "split.npz"),
        found=found,
        rights=rights,
        checkpoints=checkpoints,
        known={file: checkpoint["sha256"] for file, checkpoint in checkpoints.items()},
    )


@pytest.fixture
def folder(read_once):
    """The same, with metrics and right.npz that a test may forge."""
    given = {name: copy.deepcopy(getattr(read_once, name)) for name in ("found", "rights", "known")}
    return SimpleNamespace(split=read_once.split, checkpoints=dict(read_once.checkpoints), **given)


@pytest.fixture
def verified(monkeypatch, capsys, loaded):
    """Function that runs verify.py on a results folder and returns its status and output."""

    def run(results, *flags):
        monkeypatch.setattr(common, "load_cifar10", lambda root: loaded)
        monkeypatch.setattr(verify, "SAMPLE", 100)
        command = ["verify.py", "--device", "cpu", "--precision", "float32", "--images", "20"]
        monkeypatch.setattr(sys, "argv", [*command, *flags, "--results", str(results)])
        with pytest.raises(SystemExit) as end:
            common.run(verify.main)
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    return run


def answers(rows):
    """The last cell of each row."""
    return [row[-1] for row in rows]


def training_rows(folder, name):
    """verify.py's rows of a trained model."""
    file = FILES[name]
    question = file[:2]
    given = folder.found[question], folder.checkpoints[file], folder.known
    return list(verify.training_rows(question, name, file, *given))


def accuracies(folder, question, name):
    """verify.py's rows of the accuracies of a model."""
    model = folder.found[question]["models"][name]
    rights = folder.rights.get(question)
    return list(verify.accuracy_rows(question, name, model, rights, len(folder.split["test"])))


# ---- Whole folders -------------------------------------------------------------------------------


def test_an_honest_folder_holds_moved_renamed_read_only_and_in_another(verified, handed_in):
    outside = handed_in.parent / "unpacked"
    shutil.move(handed_in, outside / "by A. Student")
    (outside / "__MACOSX" / "q1").mkdir(parents=True)
    for path in (*outside.rglob("*"), outside):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in outside.parent.rglob("*")}
    status, output = verified(outside)
    assert status == 0 and "Everything that is there holds." in output, output
    assert {path: path.stat().st_mtime_ns for path in outside.parent.rglob("*")} == before
    for path in (*outside.rglob("*"), outside):
        path.chmod(0o755)


def test_a_folder_without_question_2s_weights_is_looked_at_and_what_is_missing_named(
    verified, handed_in
):
    (handed_in / "q2" / "model.pt").unlink()
    shutil.rmtree(handed_in / "q4")
    shutil.rmtree(handed_in / "q6")
    status, output = verified(handed_in)
    assert status == 2 and "Nothing was found wrong" in output
    assert "not checked: q2, q2/model.pt: is not there" in output
    assert "not checked: q3, cross-entropy (q2): measured again: needs q2/model.pt" in output
    assert "Missing, and not looked at: q4, q6" in output


def test_damaged_files_are_rows_and_the_rest_is_measured(verified, handed_in):
    (handed_in / "q2" / "model.pt").unlink()
    (handed_in / "q3" / "metrics.json").write_text("[" * 100_000)
    (handed_in / "q4" / "perturbed.pt").write_bytes(b"no checkpoint")
    (handed_in / "q4" / "right.npz").write_bytes(b"")
    shutil.rmtree(handed_in / "q6")
    status, output = verified(handed_in)
    assert status == 1 and "Something does not hold." in output
    for file in ("q3/metrics.json", "q4/perturbed.pt", "q4/right.npz"):
        assert f"NO: {file[:2]}, {file}: cannot be read" in output
    assert f"q4        {WITH_FGM}: means" in output


def test_without_a_split_there_is_one_row(verified, handed_in):
    (handed_in / "q1" / "split.npz").write_bytes(b"no split")
    status, output = verified(handed_in)
    assert status == 1 and "NO: q1, the split: cannot be read" in output


def test_a_folder_without_results_and_one_with_several_are_mistakes(error_line, handed_in):
    assert "no q1/split.npz" in error_line(verify.main, "--results", handed_in / "q2")
    shutil.copytree(handed_in / "q1", handed_in.parent / "other" / "q1")
    line = error_line(verify.main, "--results", handed_in.parent)
    assert f"give one of: {handed_in.parent / 'other'}, {handed_in}" in line


# ---- Files that are not as they ought ------------------------------------------------------------


def rows_of_reading(results):
    rows = []
    verify.read_folder(rows, results)
    return rows


@pytest.mark.parametrize(
    "content",
    [
        "[1]",
        '{"models": []}',
        '{"models": {"cross-entropy (q2)": 7}}',
        '{"seed": "zero"}',
        '{"seed": -1}',
        json.dumps({"note": "a" * 10**5}),
        json.dumps({"many": [0] * 10**5}),
        f'{{"seed": 1{"0" * 5000}}}',
    ],
)
def test_metrics_of_another_form_are_a_row(tmp_path, content):
    (tmp_path / "q2").mkdir()
    (tmp_path / "q2" / "metrics.json").write_text(content)
    ((question, what, _, _, holds),) = rows_of_reading(tmp_path)
    assert (question, what, holds) == ("q2", "q2/metrics.json", False)


def endless():
    """Lists that hold each other: a few bytes in a checkpoint, 2^60 words when they are shown."""
    value = ["word"]
    for _ in range(60):
        value = [value, value]
    return value


@pytest.mark.parametrize("note", [endless(), "a" * 10**5, [0] * 10**5, (1,)])
def test_a_checkpoint_that_says_too_much_of_itself_is_a_row(tmp_path, note):
    provenance = {"question": "q2", "split_sha256": "0" * 64, "note": note}
    content = helpers.torch_bytes(helpers.small_checkpoint(provenance=provenance))
    common.write_file(tmp_path / "q2" / "model.pt", content)
    (tmp_path / "q2" / "metrics.json").write_text("{}")
    ((_, what, _, _, holds),) = rows_of_reading(tmp_path)
    assert (what, holds) == ("q2/model.pt", False)


@helpers.posix
def test_a_link_out_of_the_folder_is_not_opened(tmp_path, handed_in):
    shutil.move(handed_in / "q2" / "model.pt", tmp_path / "x.pt")
    os.symlink(tmp_path / "x.pt", handed_in / "q2" / "model.pt")
    ((_, what, _, found, holds),) = rows_of_reading(handed_in)
    assert what == "q2/model.pt" and "out of the folder" in found and not holds


@pytest.mark.parametrize("content", [{}, {"recipe": 7, "history": 7}, {"history": [{}]}])
def test_numbers_of_another_form_are_a_row(folder, content):
    folder.found["q4"]["models"][WITH_FGM] = content
    file, rows = FILES[WITH_FGM], []
    given = folder.found["q4"], folder.checkpoints[file], folder.known
    checks = verify.training_rows("q4", WITH_FGM, file, *given)
    verify.attempt(rows, "q4", "numbers", rows.extend, checks)
    assert answers(rows) == [False] and "has another form" in rows[0][3]


# ---- Complete ------------------------------------------------------------------------------------


def question_rows(folder, question):
    metrics = folder.found[question]
    q2 = folder.found["q2"]
    return list(verify.question_rows(question, metrics, folder.split, folder.known, q2))


@pytest.mark.parametrize(
    "changes",
    [
        {"models": {}},
        {"models": {PERTURBED: {}}},
        {"models": {PERTURBED: {}, WITH_FGM: {}, "best": {}}},
        {"n_test": 99},
        {"split_sha256": "0" * 64},
        {"quick": False},
        {"seed": 5},
        {"stem": "cifar"},
        {"q2_sha256": "0" * 64},
    ],
)
def test_a_question_that_is_not_complete_or_of_something_else_does_not_hold(folder, changes):
    folder.found["q4"].update(changes)
    assert answers(question_rows(folder, "q4")) == [False]


@pytest.mark.parametrize("condition", common.CONDITIONS)
def test_an_accuracy_that_is_null_left_out_or_no_mean_does_not_hold(folder, condition):
    accuracy = folder.found["q4"]["models"][WITH_FGM]["accuracy"]
    before = accuracy[condition]
    for forged in (None, before + 0.01, math.nan):
        accuracy[condition] = forged
        assert answers(accuracies(folder, "q4", WITH_FGM)) == [False]
    del accuracy[condition]
    assert answers(accuracies(folder, "q4", WITH_FGM)) == [False]


def test_an_accuracy_beside_the_right_one_does_not_replace_it(folder):
    model = folder.found["q4"]["models"][WITH_FGM]
    model["accuracy clean"] = model["accuracy"].pop("clean")
    assert answers(accuracies(folder, "q4", WITH_FGM)) == [False]


@pytest.mark.parametrize("key, forged", [("images", 1), ("fgm", 0.99), ("pgd", 0.99)])
def test_checks_of_an_attack_are_on_the_images_that_are_said(folder, key, forged):
    folder.found["q4"]["models"][WITH_FGM]["checks"][key] = forged
    assert answers(accuracies(folder, "q4", WITH_FGM)) == [False]


def test_question_2s_accuracy_is_that_of_its_test_scores(folder):
    folder.found["q2"]["models"][common.CROSS_ENTROPY]["test"]["accuracy"] += 0.01
    assert answers(accuracies(folder, "q2", common.CROSS_ENTROPY)) == [False]


def test_a_right_npz_of_fewer_images_does_not_hold(folder):
    right = folder.rights["q4"][WITH_FGM]
    right["clean"] = right["clean"][:-1]
    with pytest.raises(ValueError, match="other images"):
        accuracies(folder, "q4", WITH_FGM)


# ---- The same ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, value",
    [
        (("seed",), 1),
        (("init",), "scratch"),
        (("stem",), "cifar"),
        (("q2_sha256",), "0" * 64),
        (("models", WITH_FGM, "git_commit"), "0" * 40),
        (("models", WITH_FGM, "code_sha256"), "0" * 64),
        (("models", WITH_FGM, "sha256"), "0" * 64),
        (("models", WITH_FGM, "file"), "/elsewhere/x.pt"),
        (("models", WITH_FGM, "file"), "../q4/perturbed_fgm_trained.pt"),
        (("models", WITH_FGM, "recipe", "lr"), 0.2),
        (("models", WITH_FGM, "recipe", "epochs"), 16),
        (("models", WITH_FGM, "recipe", "first_weights"), "0" * 64),
        (("models", WITH_FGM, "epoch_kept"), 1),
        (("models", WITH_FGM, "history"), [{"val_pgd": 0.1}]),
    ],
)
def test_a_training_that_is_another_than_its_checkpoint_does_not_hold(folder, place, value):
    inner = folder.found["q4"]
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert answers(training_rows(folder, WITH_FGM)) == [False]


def test_two_models_under_each_others_name_do_not_hold(folder):
    models = folder.found["q4"]["models"]
    models[PERTURBED], models[WITH_FGM] = models[WITH_FGM], models[PERTURBED]
    first, second = FILES[PERTURBED], FILES[WITH_FGM]
    checkpoints = folder.checkpoints
    checkpoints[first], checkpoints[second] = checkpoints[second], checkpoints[first]
    for model in models.values():
        model["file"] = {"perturbed.pt": "perturbed_fgm_trained.pt"}.get(model["file"], first[3:])
    for name in models:
        ((*_, reported, found, holds),) = training_rows(folder, name)
        assert "recipe noise" in reported and "recipe noise" in found and not holds


def test_question_2s_file_as_question_6s_does_not_hold(folder):
    folder.checkpoints["q6/model.pt"] = folder.checkpoints["q2/model.pt"]
    ((*_, reported, found, holds),) = training_rows(folder, q6_angular.MODEL)
    assert "outputs 128" in reported and "outputs 10" in found and not holds


def with_history(folder, val_pgd, kept):
    """The answers for the model trained with FGM: 16 epochs in its recipes, this in its history."""
    model, file = folder.found["q4"]["models"][WITH_FGM], FILES[WITH_FGM]
    checkpoint = copy.deepcopy(folder.checkpoints[file])
    for recipe in (model["recipe"], checkpoint["provenance"]["recipe"]):
        recipe["epochs"] = 16
    model["history"], model["epoch_kept"] = [{"val_pgd": share} for share in val_pgd], kept
    folder.checkpoints[file] = checkpoint
    return answers(training_rows(folder, WITH_FGM))


def test_another_perturbation_than_ours_is_named(folder, monkeypatch):
    """A student may change it; then the accuracies differ, and a grader must see why."""
    monkeypatch.setitem(common.PERTURBATION, "rotation", 30.0)
    *_, row = training_rows(folder, PERTURBED)[:1]
    assert row[1:] == (
        f"{PERTURBED}: perturbation, by our constants",
        "rotation 5.0",
        "rotation 30.0",
        False,
    )


def test_a_history_is_as_long_as_the_recipe_or_ends_in_a_collapse(folder):
    assert with_history(folder, [0.3] * 16, kept=16) == [True]
    assert with_history(folder, [0.3] * 12, kept=12) == [False]
    assert with_history(folder, [0.2, 0.4, 0.1], kept=2) == [True]
    assert with_history(folder, [0.2, 0.4, 0.1], kept=3) == [False]


@pytest.mark.parametrize(
    "init, first, holds",
    [
        ("q2", "parent", [True]),
        ("q2", None, [False]),
        ("q2", "elsewhere", [False]),
        ("scratch", None, [True]),
        ("imagenet", None, [True]),
        ("scratch", "parent", [False]),
        ("results/q2/model.pt", "parent", [True]),
        ("downloads/model.pt", "elsewhere", [verify.ASK, True]),
    ],
)
def test_what_a_training_began_with_counts_by_the_weights(folder, init, first, holds):
    name, parent = q6_angular.MODEL, folder.known["q2/model.pt"]
    checkpoint = copy.deepcopy(folder.checkpoints["q6/model.pt"])
    metrics, origin = folder.found["q6"], checkpoint["provenance"]
    for each in (metrics, origin, metrics["models"][name]["recipe"], origin["recipe"]):
        each["init"] = init
    for recipe in (metrics["models"][name]["recipe"], origin["recipe"]):
        recipe["first_weights"] = {"parent": parent}.get(first, first)
    for each in (metrics, origin):
        each["q2_sha256"] = parent if init == "q2" else None
    folder.checkpoints["q6/model.pt"] = checkpoint
    assert answers(training_rows(folder, name)) == holds


def test_weights_that_no_training_has_moved_do_not_hold(folder):
    first = folder.checkpoints["q2/model.pt"]
    copied = copy.deepcopy(first["model"])
    with torch.no_grad():
        copied.backbone.conv1.weight += 1e-5  # so that the hash is another
    random_head = common.resnet18(q6_angular.EMBEDDING, "imagenet")
    random_head.backbone.load_state_dict(first["model"].backbone.state_dict())
    others = {"q4/perturbed.pt": {"model": copied}, "q6/model.pt": {"model": random_head}}
    rows = list(verify.distance_rows({"q2/model.pt": first, **others}))
    assert [row[:2] for row in rows[:2]] == [
        ("q4", "weights of q4/perturbed.pt"),
        ("q6", "weights of q6/model.pt"),
    ]
    assert answers(rows) == [False, False, False]
    assert set(answers(verify.distance_rows(folder.checkpoints))) == {True}
    assert (
        list(verify.distance_rows({"a": first, "b": {"model": common.resnet18(10, "cifar")}})) == []
    )


# ---- True ----------------------------------------------------------------------------------------


def compared(images, otherwise):
    """The answer where so many images of a condition are decided otherwise."""
    reported = np.arange(images) % 2 == 0
    found = torch.from_numpy(np.arange(images) < otherwise) ^ torch.from_numpy(reported)
    rights, index = {"m": {"strongest": reported}}, torch.arange(images)
    return answers(verify.image_rows("q4", "m", rights, {"strongest": (index, found)}))


@pytest.mark.parametrize(
    "images, otherwise, holds",
    [(500, 10, True), (500, 11, False), (100, 5, True), (100, 6, False)],
)
def test_two_in_a_hundred_images_or_a_handful_may_be_decided_otherwise(images, otherwise, holds):
    assert compared(images, otherwise) == [holds]


@pytest.mark.parametrize(
    "condition, points", [("perturbed_fgm", 10), ("strongest", 10), ("pgd", 6)]
)
def test_a_condition_that_is_forged_by_points_is_found_image_by_image(condition, points):
    generator = np.random.default_rng(0)
    true = generator.random(24_000) < 0.3
    forged = true.copy()
    forged[generator.choice(np.flatnonzero(~true), 240 * points, replace=False)] = True
    index = verify.drawn(24_000, 500)
    found = {condition: (index, torch.from_numpy(true)[index])}
    assert answers(verify.image_rows("q4", "m", {"m": {condition: true}}, found)) == [True]
    assert answers(verify.image_rows("q4", "m", {"m": {condition: forged}}, found)) == [False]


def test_no_survivor_among_500_holds_where_half_a_percent_is_reported():
    row = verify.shares_row("q3", "m", {"pgd": 0.005}, {"pgd": 0.0}, 500, verify.ERRORS)
    assert row[-1]


@pytest.mark.parametrize(
    "reported, errors, holds",
    [
        (0.3, 0, True),
        (0.32, 0, False),
        (0.32, 3, True),
        (0.4, 3, False),
        (None, 3, False),
        (math.nan, 3, False),
        (1.3, 3, False),
    ],
)
def test_shares_of_other_images_may_be_three_standard_errors_off(reported, errors, holds):
    row = verify.shares_row("q3", "m", {"by": [reported]}, {"by": [0.3]}, 1000, errors)
    assert row[-1] == holds


def test_random_images_are_others_every_time():
    first, second = verify.drawn(24_000, 500), verify.drawn(24_000, 500)
    assert len(first.unique()) == 500 and not torch.equal(first, second)
    assert sorted(verify.drawn(5, 500).tolist()) == [0, 1, 2, 3, 4]


@pytest.fixture(scope="module")
def too_sure():
    """A classifier with its last layer times 10,000, as `attacked` measures it on 20 images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 32, 32), generator=generator).byte()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).eval()
    model.requires_grad_(False)[1].weight *= 1e4
    labels = model(common.as_float(images)).argmax(1)  # all right, as long as nothing attacks it
    losses, decide = verify.attack_on("q4", model, None)
    return verify.attacked(model, (images, labels), losses, decide, 0, 500)


def claimed(numbers, right, strongest):
    """What a forger's metrics.json would say of these: with another strongest, without warnings."""
    accuracy = {condition: common.share(which) for condition, (_, which) in right.items()}
    (some, *_), (first, *_) = numbers.values()
    checks = {**first["checks"], "fgm": accuracy["fgm"], "pgd": accuracy["pgd"]}
    checks |= {"fgm_float32": accuracy["fgm"], "pgd_float32": accuracy["pgd"], "images": 20}
    told = {**some, **first, "accuracy": {**accuracy, "strongest": strongest}}
    return {**told, "checks": checks, "warnings": []}


def test_a_last_layer_times_10000_is_found_by_the_strongest_attack_and_the_warnings(too_sure):
    right, numbers = too_sure
    pgd, strongest = (common.share(right[key][1]) for key in ("pgd", "strongest"))
    assert pgd > strongest + 0.1  # what the forgery lives on
    order = right["pgd"][0].argsort()
    rights = {key: which[index.argsort()].numpy() for key, (index, which) in right.items()}
    rights["strongest"] = right["pgd"][1][order].numpy()
    rows = list(verify.image_rows("q4", "m", {"m": rights}, right))
    assert [row[1] for row in rows if not row[-1]] == ["m: strongest"]
    *_, warned = verify.number_rows("q4", "m", claimed(numbers, right, pgd), numbers)
    assert "PGD with eps = 1" in warned[3] and warned[-1] is False


def test_warnings_that_are_due_and_told_are_to_be_asked_about(too_sure):
    right, numbers = too_sure
    model = claimed(numbers, right, common.share(right["strongest"][1]))
    model["warnings"] = common.attack_warnings(model["accuracy"], model["checks"])
    assert answers(verify.number_rows("q4", "m", model, numbers)) == [True, True, verify.ASK]


@pytest.mark.parametrize(
    "place",
    [
        ("accuracy_l2", "fgm"),
        ("pgd_by_step", 7),
        ("by_eps", "fgm", 2),
        ("checks", "noise"),
        ("accuracy", "pgd"),
    ],
)
def test_invented_numbers_of_an_attack_do_not_hold(too_sure, place):
    right, numbers = too_sure
    model = inner = copy.deepcopy(claimed(numbers, right, 0.0))
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = 0.0 if inner[place[-1]] > 0.5 else 1.0
    assert answers(verify.number_rows("q4", "m", model, numbers)).count(False) >= 2


@pytest.fixture
def scores():
    """q2_train_ce.class_scores of a model that is right on four in five of 1,000 images."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1000, 10, generator=generator)
    labels = torch.arange(1000) % 10
    logits[torch.arange(1000), labels] += 3 * (torch.arange(1000) % 5 > 0)
    images = torch.zeros(1000, 1, dtype=torch.uint8)
    rows = iter(logits.split(common.EVALUATION_BATCH))
    return q2_train_ce.class_scores(lambda batch: next(rows), images, labels)


@pytest.mark.parametrize(
    "forge",
    [
        lambda told: told.update(accuracy=told["accuracy"] + 0.01),
        lambda told: told.update(ece=0.0),
        lambda told: told.update(loss=told["loss"] / 2),
        lambda told: told["accuracy_per_class"].update(cat=1.0, dog=0.5),
        lambda told: told["confusion"].reverse(),
        lambda told: told["reliability"].reverse(),
    ],
)
def test_an_invented_score_of_question_2_does_not_hold(scores, forge):
    told = copy.deepcopy(scores)
    forge(told)
    assert answers(verify.score_rows("m", {"test": told}, {"test": scores})) == [False]


# ---- Clean ---------------------------------------------------------------------------------------


def clean(test, train, val, quick=False):
    model = {"accuracy": {"clean": test}}
    shares = (train, 2_000), (val, 2_000)
    return list(verify.clean_rows("q2", "m", model, 24_000, *shares, quick))


def test_an_ordinary_model_is_clean():
    assert answers(clean(0.8516, 0.99, 0.85)) == [True, True]
    assert answers(clean(0.66, 0.70, 0.67)) == [True, True]


def test_a_model_that_was_trained_on_test_is_better_there_than_on_validation():
    against_val, against_train, _ = clean(1.0, 0.995, 0.43)
    assert against_val[-1] is False and "43.00 % on validation" in against_val[3]
    _, against_train, _ = clean(1.0, 0.66, 1.0)
    assert against_train[-1] is False
    assert "is better on test, 100.00 %, than on its training images, 66.00 %" in against_train[3]


def test_what_is_too_good_is_to_be_asked_about_but_in_a_quick_run():
    assert answers(clean(0.85, 0.86, 0.85)) == [True, verify.ASK]
    assert answers(clean(0.97, 1.0, 0.97)) == [True, True, verify.ASK]
    assert answers(clean(0.97, 0.97, 0.97, quick=True)) == [True, True]


# ---- The split, figures, AutoAttack, the report --------------------------------------------------


def split_rows(tmp_path, loaded, drawn_by, **told):
    """verify.py's rows of a quick split, drawn as `drawn_by` says, that says `told` of itself."""
    how = {"protocol": "pooled", "seed": 0, "quick": True}
    parts = q1_split.draw_split(loaded[1].numpy(), **{**how, **drawn_by})
    common.write_npz(tmp_path / "split.npz", {**parts, **how, **told})
    split = common.load_split(tmp_path / "split.npz")
    metrics = {
        "protocol": split["protocol"],
        "split_seed": split["seed"],
        **{f"n_{part}": len(split[part]) for part in parts},
        "counts": {part: [len(split[part]) // 10] * 10 for part in parts},
        "test_images_with_duplicate_in_train": {"exact": 0, "near": 0},
    }
    return split, metrics


@pytest.mark.parametrize("how", [{}, {"seed": 7}, {"protocol": "official"}])
def test_a_split_of_any_seed_and_protocol_holds(tmp_path, loaded, how):
    split, metrics = split_rows(tmp_path, loaded, how, **how)
    assert answers(verify.split_rows(split, *loaded, metrics)) == [True, True, True]


def test_a_split_that_its_seed_does_not_draw_does_not_hold(tmp_path, loaded):
    split, _ = split_rows(tmp_path, loaded, {"seed": 7}, seed=0)
    assert answers(verify.split_rows(split, *loaded, None)) == [False]


def test_invented_counts_and_duplicates_do_not_hold(tmp_path, loaded):
    split, metrics = split_rows(tmp_path, loaded, {})
    metrics["counts"]["train"][3] += 1
    metrics["test_images_with_duplicate_in_train"]["near"] = 40
    assert answers(verify.split_rows(split, *loaded, metrics)) == [True, False, False]


def figures(results, told, question="q3"):
    return answers(verify.figure_rows(question, {"figures": told}, results))


def test_figures_hold_by_their_hashes_and_must_be_there(handed_in, folder):
    told = folder.found["q3"]["figures"]
    assert figures(handed_in, told) == [True]
    place = handed_in / "q3" / "figure08_umap.png"
    ours = place.read_bytes()
    place.write_bytes((handed_in / "q2" / "figure05_umap_train.png").read_bytes())
    assert figures(handed_in, told) == [False]
    place.unlink()
    assert figures(handed_in, told) == [False]
    assert figures(handed_in, {name: told[name] for name in told if name != place.name}) == [False]
    place.write_bytes(ours)
    assert figures(handed_in, {**told, "by_noise.png": "0" * 64}) == [False]
    (handed_in / "q3" / "figure99.png").write_bytes(b"foreign")
    assert figures(handed_in, told) == [False]


def test_autoattack_leaves_no_more_than_the_strongest_attack(tmp_path, folder):
    def holds(**changes):
        told = {"sha256": folder.known[FILES[WITH_FGM]], "images": 100, "right": left, **changes}
        (tmp_path / "autoattack.json").write_text(json.dumps({WITH_FGM: told}))
        return answers(verify.autoattack_rows(tmp_path, folder.checkpoints, folder.rights))

    left = int(folder.rights["q4"][WITH_FGM]["strongest"].sum())
    assert holds() == [True]
    assert holds(right=left + 10) == holds(right=-1) == holds(images=10**6) == [False]
    assert holds(sha256="0" * 64) == [verify.ASK]
    del folder.rights["q4"]
    assert holds() == [verify.UNCHECKED]


def test_a_report_holds_but_for_author_date_and_question_5():
    body = "\nContents: all\n\nclean 85.16 %\n\n## Question 5: {}\n\n## Question 6: more"
    handed_in = "A. Student · made 2026-01-02\n" + body.format("my own words")
    assembled = "made 2026-11-28\n" + body.format("the reference")
    assert verify.report_row(handed_in, assembled)[-1]
    for forged in ("85.16", "more", "all"):
        assert not verify.report_row(handed_in.replace(forged, "another"), assembled)[-1]
    assert not verify.report_row("\nContents: forged\n" + assembled, assembled)[-1]


# ---- The verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize("holds, status", [([True, verify.ASK], 0), ([verify.UNCHECKED, False], 1)])
def test_the_exit_status_says_what_was_found(holds, status):
    rows = [("q2", "clean", "85 %", "84 %", each) for each in holds]
    assert verify.tell(rows, []) == status
