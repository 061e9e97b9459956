"""The report: its sentences on made-up results, its two forms, its look."""

import functools
import io
import json
import re
import shutil
import subprocess

import mistune
import numpy as np
import pytest
from matplotlib.figure import Figure

import common
import helpers
import report

N_TEST, STRONGEST, CHECKED = 24_000, 2_000, 1_000
Q2, PERTURBED, ATTACKED = common.CROSS_ENTROPY, "perturbed (q4)", "perturbed + FGM (q4)"
ANGULAR = "angular loss (q6)"
ACCURACY = {  # by model, in the order of common.CONDITIONS
    Q2: (0.8517, 0.7685, 0.3396, 0.2160, 0.0340, 0.0115),
    PERTURBED: (0.8462, 0.8274, 0.3162, 0.2743, 0.0293, 0.0065),
    ATTACKED: (0.6623, 0.6234, 0.4215, 0.3765, 0.3752, 0.3220),
    ANGULAR: (0.8449, 0.7557, 0.1476, 0.0834, 0.0003, 0.0),
}
RECIPE = {
    "question": "q2",
    "stem": "stride2",
    "optimizer": "sgd",
    "epochs": 16,
    "batch_size": 64,
    "lr": 0.1,
    "label_smoothing": 0.1,
    "precision": "float32",
    "device": "cpu",
    "torch": "2.9.0",
}


# ---- Made-up results -----------------------------------------------------------------------------


def measured_model(shares, **changes):
    """What metrics.json says of a model with these accuracies."""
    accuracy = dict(zip(common.CONDITIONS, shares, strict=True))
    by_eps = {"eps": [0, 4 / 255, 8 / 255], "images": 1000}
    return {
        "accuracy": accuracy,
        "accuracy_l2": {"fgm": 0.42, "perturbed_fgm": 0.28},
        "strongest_images": STRONGEST,
        "by_eps": {
            **by_eps,
            "fgm": [shares[0], 0.5, shares[2]],
            "pgd": [shares[0], 0.2, shares[4]],
        },
        "checks": {
            "noise": 0.95 * shares[0],
            "pgd_eps_1": 0.0,
            "fgm": shares[2],
            "fgm_float32": shares[2],
            "pgd": shares[4],
            "pgd_float32": shares[4],
            "images": CHECKED,
        },
        "warnings": [],
        **changes,
    }


def trained_model(shares, file, **changes):
    """The same of a model that its question has trained."""
    shares_of_pgd = [0.2] * 14 + [0.34, 0.33]
    noted = {"accuracy": 0.9, "val_accuracy": 0.8, "seconds": 20.0}
    history = [{**noted, "val_pgd": share} for share in shares_of_pgd]
    return {
        **measured_model(shares),
        "file": f"{file}.pt",
        "sha256": f"hash of {file}",
        "recipe": {**RECIPE, "noise": 2.0},
        "history": history,
        "epoch_kept": 16,
        "git_commit": "0123456789" * 4,
        "training_seconds": 300,
        **changes,
    }


def question_2():
    """Question 2's model, which is measured without attacks."""
    scores = {
        "accuracy": 0.85,
        "loss": 0.65,
        "ece": 0.05,
        "accuracy_per_class": dict(zip(common.CLASSES, np.linspace(0.7, 0.94, 10), strict=True)),
        "reliability": [[0.5, 0.8, 0.85], [0.5, 0.8, 0.85]],
    }
    recipe = {**RECIPE, "epochs": 40, "trivial_augment": False}
    changes = {"val": scores, "test": scores, "recipe": recipe, "epoch_kept": 40}
    changes["history"] = [{"accuracy": 0.9, "seconds": 20.0}] * 40
    model = trained_model(ACCURACY[Q2], "model", **changes)
    return {key: value for key, value in model.items() if key not in measured_model(ACCURACY[Q2])}


def made_up():
    """Metrics of all questions as report.read_results returns them; figures are left out."""
    origin = {
        "quick": False,
        "split_sha256": "0123456789abcdef" * 4,
        "device": "cpu",
        "hardware": "x86_64, AVX512, 2 of 2 processors",
        "precision": "float32",
        "versions": {"torch": "2.9.0"},
        "git_commit": "0123456789" * 4 + "-dirty",
        "n_test": N_TEST,
        "seconds": {"attack": 120.0},
        "figures": {},
        "peak_memory_mib": 1500,
    }
    later = {**origin, "seed": 0, "stem": "stride2", "q2_sha256": "hash of model"}
    split = {
        "split_seed": 0,
        "protocol": "pooled",
        "n_train": 12_000,
        "n_val": 24_000,
        "test_images_with_duplicate_in_train": {
            "exact": 12,
            "near": 300,
            "near_means_correlation_from": 0.95,
        },
    }
    parts = {"colour jitter": 0.80, "rotation": 0.82, "pixels": 0.84}
    retrieval = {"precision_at_1": 0.8, "r_precision": 0.7, "mean_average_precision_at_r": 0.65}
    angular = trained_model(
        ACCURACY[ANGULAR],
        "angular",
        val={"accuracy": 0.845, "accuracy_before_training": 0.85},
        retrieval=retrieval,
        neighbours=100,
    )
    models = {
        "q2": {Q2: question_2()},
        "q3": {Q2: measured_model(ACCURACY[Q2], by_part=parts)},
        "q4": {
            PERTURBED: trained_model(ACCURACY[PERTURBED], "perturbed"),
            ATTACKED: trained_model(ACCURACY[ATTACKED], "perturbed_fgm_trained"),
        },
        "q6": {ANGULAR: angular},
    }
    found = {
        question: {"question": question, **later, "init": "q2", "models": by_name}
        for question, by_name in models.items()
    }
    found["q4"]["n_val_pgd"] = 250
    return {"q1": {"question": "q1", **origin, **split}, **found}


def right_of(found):
    """Which images each model got right, in the form of report.read_right: shares as in `found`."""
    return {
        name: {
            condition: drawn(
                share, STRONGEST if condition == "strongest" else N_TEST, name + condition
            )
            for condition, share in model["accuracy"].items()
        }
        for _, name, model in report.measured(found)
    }


@functools.cache
def drawn(share, images, name):
    """This share of images, bool: what is hard for one model is hard for others, as in reality."""
    hardness = np.random.default_rng(0).random(images)
    order = np.argsort(hardness + 0.2 * np.random.default_rng(list(name.encode())).random(images))
    right = np.zeros(images, bool)
    right[order[: round(share * images)]] = True
    return right


def written(folder, found=None):
    """Results on disk as the scripts leave them, with blank figures. Returns their folder."""
    found, right = found or made_up(), right_of(found or made_up())
    for question, metrics in found.items():
        names = [line.split(" | ")[1] for line in report.FIGURES.strip().splitlines()]
        figures = {
            path.format(file).split("/")[1]: png(
                wide="examples" in path
                or path[-11:] in ("08_umap.png", "14_umap.png", "16_umap.png")
            )
            for path in names
            if path.startswith(question)
            for file in ("perturbed", "perturbed_fgm_trained")
        }
        for name, content in figures.items():
            common.write_file(folder / question / name, content)
        hashes = {name: common.sha256(content) for name, content in figures.items()}
        content = json.dumps({**metrics, "figures": hashes}).encode()
        common.write_file(folder / question / "metrics.json", content)
        members = {
            f"{name}/{condition}": images
            for name in metrics.get("models", {})
            for condition, images in right.get(name, {}).items()
        }
        if question in report.MEASURED:
            np.savez(folder / question / "right.npz", **members)
    return folder


@functools.cache
def png(wide):
    """A blank figure of the size that the questions' have."""
    buffer = io.BytesIO()
    Figure(figsize=(13, 6) if wide else (6, 4)).savefig(buffer, dpi=150)
    return buffer.getvalue()


def text_of(found, right=None):
    """The whole report as one line of Markdown."""
    return " ".join(report.assemble(found, right_of(found) if right is None else right).split())


def section(found, question):
    """One question's section as one line."""
    make = {"q2": report.training_section, "q3": report.attack_section}
    make |= {"q4": report.adversarial_section, "q6": report.angular_section}
    return " ".join(make[question](found, right_of(found)).split())


def change(found, question, name, accuracy=None, **changes):
    """Change a model in made-up metrics; accuracy: dict from condition to share."""
    model = found[question]["models"][name]
    model["accuracy"] = {**model.get("accuracy", {}), **(accuracy or {})}
    model.update(changes)
    return found


# ---- Sentences -----------------------------------------------------------------------------------


def test_the_perturbation_is_said_to_help_little_only_where_the_numbers_say_so():
    sentence = "the perturbation alone gained little or nothing"
    assert sentence in section(made_up(), "q4")
    for name, accuracy, changes in (
        (PERTURBED, {"pgd": 0.08}, {}),
        (PERTURBED, {"strongest": 0.06}, {}),
        (ATTACKED, {"pgd": 0.15}, {}),
        (ATTACKED, {"strongest": 0.15}, {}),
        (ATTACKED, {"clean": 0.15}, {}),
        (ATTACKED, {}, {"warnings": ["The gradients may be masked."]}),
    ):
        assert sentence not in section(change(made_up(), "q4", name, accuracy, **changes), "q4")
    from_scratch = made_up()
    from_scratch["q4"]["init"] = "scratch"
    assert sentence not in section(from_scratch, "q4")


def test_lost_accuracy_on_clean_images_is_explained_only_where_it_is_lost():
    assert "Tsipras" in section(made_up(), "q4")
    assert "Tsipras" not in section(change(made_up(), "q4", ATTACKED, {"clean": 0.85}), "q4")
    assert "Tsipras" not in section(change(made_up(), "q4", ATTACKED, epoch_kept=3), "q4")


def bold_rows(found):
    """Table 1's cells in bold: dict from condition to the names of models."""
    lines = report.assemble(found, right_of(found)).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| model | epochs"))
    header, _, *rows = (
        [cell.strip() for cell in line.split("|")] for line in lines[start : start + 6]
    )
    return {
        title: [row[1] for row in rows if row[column].startswith("**")]
        for column, title in enumerate(header)
    }


def test_nobody_is_called_the_best_where_nobody_is_better_than_chance():
    found = change(made_up(), "q4", ATTACKED, {"strongest": 0.10})
    assert bold_rows(found)["strongest"] == []
    assert "chance under the strongest attack: none of the models." in text_of(found)
    assert bold_rows(made_up())["strongest"] == [ATTACKED]
    assert f"{ATTACKED} with 32.20 % (clean: 66.23 %)." in text_of(made_up())


def test_a_single_model_is_not_called_the_best():
    found = {key: metrics for key, metrics in made_up().items() if key in ("q1", "q2", "q3")}
    summary = report.summary_section(found, right_of(found))
    assert "| **" not in summary and "bold" not in summary


def test_models_whose_attacks_give_warnings_are_named_at_once():
    found = change(made_up(), "q4", ATTACKED, warnings=["The gradients may be masked."])
    assert f"warn, as the questions say, of the numbers of: {ATTACKED}." in text_of(found)
    assert "warn, as the questions say" not in text_of(made_up())


def test_the_best_are_all_that_are_within_two_standard_errors():
    bold = bold_rows(change(made_up(), "q4", PERTURBED, {"clean": 0.8512}))
    assert bold["clean"] == [Q2, PERTURBED] and bold["perturbed"] == [PERTURBED]


def test_a_hardest_class_is_named_only_where_one_is():
    assert "the lowest on test is that of airplane" in section(made_up(), "q2")
    found = made_up()
    found["q2"]["models"][Q2]["test"]["accuracy_per_class"] = dict.fromkeys(common.CLASSES, 0.85)
    assert "do not differ by more than chance" in section(found, "q2")
    assert "airplane" not in section(found, "q2")


def test_ten_classes_of_one_true_accuracy_differ_in_about_one_test_of_twenty():
    shares = np.random.default_rng(0).binomial(2400, 0.85, (1000, 10)) / 2400
    differ = [report.classes_differ(dict(enumerate(row)), 2400) for row in shares]
    assert 0.03 < np.mean(differ) < 0.07


def test_differences_of_models_are_those_on_the_same_images():
    found = made_up()
    right = right_of(found)
    before, after = right[Q2]["pgd"], right[ATTACKED]["pgd"]
    points = 100 * (after.mean() - before.mean())
    error = 100 * (after.astype(float) - before).std() / len(after) ** 0.5
    assert report.paired(before, after)[:2] == pytest.approx((points, error))
    assert f"| **{points:+.1f} ± {error:.1f}** |" in text_of(found)
    before, after = right[PERTURBED]["pgd"], right[ATTACKED]["pgd"]
    points = 100 * (after.mean() - before.mean())
    assert "differs from perturbed (q4) by" in text_of(found)
    assert f", {points:+.1f} ± 0.3 points (PGD-20); another seed" in text_of(found)


@pytest.mark.parametrize("lost", [0, 3, 40, 400])
def test_a_paired_difference_is_beyond_chance_where_the_exact_test_says_so(lost):
    from scipy.stats import binomtest

    for gained in range(lost, lost + 80, 2):
        before, after = np.zeros(5000, bool), np.zeros(5000, bool)
        before[:lost], after[lost : lost + gained] = True, True
        p = binomtest(gained, gained + lost).pvalue if gained + lost else 1
        if not 0.03 < p < 0.06:  # where the approximation may differ
            sign = report.paired(before, after).sign
            assert sign == (p < 0.045) * (1 if gained > lost else -1)


@pytest.mark.parametrize("errors, sign", [(0, 0), (1.9, 0), (2.1, 1), (-2.1, -1)])
def test_shares_of_other_images_differ_from_two_standard_errors_on(errors, sign):
    error = (0.25 / 10_000 + 0.25 / 40_000) ** 0.5
    assert report.unpaired(0.5, 0.5 + errors * error, 10_000, 40_000).sign == sign


@pytest.mark.parametrize(
    "share, images, shown",
    [
        (0.0, 2000, "under 0.15 %"),
        (0.0, 24_000, "under 0.02 %"),  # 0.0125 %, rounded outwards
        (1.0, 2000, "over 99.85 %"),
        (0.002, 2000, "0.20 % (0.08 to 0.51 %)"),
        (0.322, 2000, "32.20 % ± 1.0"),
    ],
)
def test_an_error_near_zero_or_one_is_no_standard_error(share, images, shown):
    assert report.with_error(share, images) == shown


@pytest.mark.parametrize("right, images", [(1, 50), (4, 2000), (1996, 2000), (30, 100)])
def test_the_interval_is_wilsons(right, images):
    from scipy.stats import binomtest

    expected = binomtest(right, images).proportion_ci(0.95, method="wilson")
    assert report.wilson(right / images, images) == pytest.approx(list(expected), abs=1e-5)


def test_a_vote_is_no_defence_only_where_it_is_not_better_than_question_2():
    assert "Sitawarin & Wagner 2019" in section(made_up(), "q6")
    for accuracy in ({"pgd": 0.15}, {"clean": 0.15}):
        assert "Sitawarin" not in section(change(made_up(), "q6", ANGULAR, accuracy), "q6")
    resists = change(made_up(), "q6", ANGULAR, {"pgd": 0.3})
    assert "Sitawarin" not in section(change(resists, "q3", Q2, {"pgd": 0.35}), "q6")


def test_the_loss_is_said_to_gain_nothing_by_the_number_of_validation_images():
    sentence = "asks only that images of a class lie together"
    val = {"accuracy_before_training": 0.840, "accuracy": 0.846}
    for n_val, n_test, said in ((40_000, 10_000, False), (10_000, 40_000, True)):
        found = change(made_up(), "q6", ANGULAR, val=val)
        right = right_of(found)
        found["q1"] |= {"n_val": n_val, "n_test": n_test}
        assert (sentence in " ".join(report.angular_section(found, right).split())) == said


@pytest.mark.parametrize("before, after", [(0.25, 0.10), (0.85, 0.75), (0.10, 0.10)])
def test_a_vote_that_training_harmed_or_that_knew_nothing_is_not_excused(before, after):
    val = {"accuracy_before_training": before, "accuracy": after}
    assert "the loss asks only" not in section(change(made_up(), "q6", ANGULAR, val=val), "q6")


@pytest.mark.parametrize(
    "noise, said",
    [
        (0.8, "more to its direction than to its size"),
        (0.45, "FGM's direction costs more than a random one"),
        (0.34, "a difference within two standard errors"),
        (0.2, "noise is the stronger"),
    ],
)
def test_that_the_direction_matters_is_said_only_where_noise_is_weaker(noise, said):
    found = made_up()
    found["q3"]["models"][Q2]["checks"]["noise"] = noise
    text = section(found, "q3")
    assert said in text
    assert ("Ilyas" in text) == ("Fawzi" in text) == (noise == 0.8)


@pytest.mark.parametrize(
    "pgd, said",
    [
        (0.0340, "PGD-20 in place of FGM costs 30.6 points."),
        (0.3390, "in place of FGM changes accuracy by -0.1 points, within two standard errors."),
        (0.3796, "PGD-20 in place of FGM gains 4.0 points."),
    ],
)
def test_pgd_beside_fgm(pgd, said):
    text = section(change(made_up(), "q3", Q2, {"pgd": pgd, "perturbed": 0.76}), "q3")
    assert said in text and "Perturbation costs 9.2 points." in text
    assert ("Goodfellow" in text) == (pgd < 0.3)


def test_a_difference_that_counts_is_never_shown_as_zero():
    before, after = np.ones(24_000, bool), np.arange(24_000) >= 10
    difference = report.paired(before, after)
    assert report.cell(difference) == "**-0.04 ± 0.01**"
    assert report.effect("It", difference) == "It costs 0.04 points."
    assert report.cell(report.paired(before, before)) == "+0.0 ± 0.0"


@pytest.mark.parametrize("perturbed", [0.86, 0.20])
def test_the_perturbation_is_called_blind_only_where_it_costs_something_and_less(perturbed):
    assert "knows nothing of the network" in section(made_up(), "q3")
    text = section(change(made_up(), "q3", Q2, {"perturbed": perturbed}), "q3")
    assert "knows nothing of the network" not in text


def test_accuracy_under_fgm_is_explained_where_pgd_leaves_far_less():
    text = section(made_up(), "q3")
    assert "Fu et al. 2020" in text and "says little about robustness" in text
    found = made_up()
    found["q2"]["models"][Q2]["recipe"]["label_smoothing"] = 0
    assert "Fu et al." not in section(found, "q3")
    near = change(made_up(), "q3", Q2, {"pgd": 0.30})
    assert "says little about robustness" not in section(near, "q3")


@pytest.mark.parametrize(
    "parts, named",
    [((0.80, 0.82, 0.84), True), ((0.80, 0.801, 0.84), False), ((0.86, 0.88, 0.90), False)],
)
def test_the_part_that_costs_most_is_named_only_where_one_does(parts, named):
    names = ("colour jitter", "rotation", "pixels")
    by_part = dict(zip(names, parts, strict=True))
    text = section(change(made_up(), "q3", Q2, by_part=by_part), "q3")
    assert ("colour jitter costs most" in text) == named
    assert ("does not show that one part costs more" in text) != named


@pytest.mark.parametrize(
    "confidence, smoothing, said, source",
    [
        (0.90, 0.1, "5.0 points too high", "Guo et al. 2017"),
        (0.80, 0.1, "5.0 points too low", "Müller et al. 2019"),
        (0.80, 0.0, "5.0 points too low on average", None),
        (0.855, 0.1, "matches the accuracy, within 1.0 points", None),
    ],
)
def test_a_cause_of_wrong_probabilities_is_named_where_it_can_be_one(
    confidence, smoothing, said, source
):
    found = made_up()
    model = found["q2"]["models"][Q2]
    model["test"]["reliability"] = [[1.0, confidence, 0.85]]
    model["recipe"]["label_smoothing"] = smoothing
    text = section(found, "q2")
    assert said in text
    assert [name for name in ("Guo et al. 2017", "Müller et al. 2019") if name in text] == (
        [source] if source else []
    )


@pytest.mark.parametrize("fitted, said", [(0.9, True), (0.852, False), (0.7, False)])
def test_learning_by_heart_is_named_where_training_images_are_classified_better(fitted, said):
    found = change(made_up(), "q2", Q2, history=[{"accuracy": fitted, "seconds": 1.0}])
    assert ("Zhang et al. 2017" in section(found, "q2")) == said


def test_accuracy_on_validation_comes_with_its_images_and_its_error():
    text = section(made_up(), "q4")
    assert "250 perturbed validation images was 33.00 % ± 3.0, 34.00 % ± 3.0 at best" in text
    assert "left 80.00 % on perturbed validation images" in text
    history = [{"val_pgd": 0.33, "seconds": 1.0}, {"val_pgd": 0.0, "seconds": 1.0}]
    history.insert(1, {"val_pgd": 0.25, "seconds": 1.0})
    collapsed = change(made_up(), "q4", ATTACKED, history=history, epoch_kept=1)
    assert f"| {ATTACKED} | 40 + 1 |" in text_of(collapsed)
    text = section(collapsed, "q4")
    assert "training was stopped after epoch 3" in text and "epochs: 3 of 16" in text
    assert "was under 1.20 %, less than half of the 33.00 % ± 3.0 of epoch 1." in text


def test_rounding_is_checked_under_fgm_and_pgd():
    for key in ("fgm", "fgm_float32", "pgd", "pgd_float32"):
        found = made_up()
        found["q3"]["precision"] = "bfloat16"
        found["q3"]["models"][Q2]["checks"][key] = 0.0123
        assert "1.23 %" in section(found, "q3").split("Rounding:")[1]
    assert "Rounding:" not in section(made_up(), "q3")


def test_exact_duplicates_are_among_the_near_ones():
    text = text_of(made_up())
    assert "0.95: 300 (1.25 %). Among them, with an exact copy there: 12." in text


def reasons_in(text):
    """The names of the reasons that a text gives."""
    named = (entry.split(" | ") for entry in report.REASONS.split("\n\n"))
    return {name.strip() for name, reason in named if " ".join(reason.split()) in text}


def test_no_cause_is_named_beside_a_warning_that_denies_it():
    for question, name in (("q3", Q2), ("q4", ATTACKED)):
        found = change(made_up(), question, name, warnings=["FGM is far weaker than PGD."])
        text = section(found, question)
        assert "Warning, " + name in text and "FGM is far weaker than PGD." in text
        assert not reasons_in(text)


def test_notes_on_a_model_stand_where_warnings_do():
    found = change(made_up(), "q2", Q2, notes=["Trained by other code."])
    assert "Note, cross-entropy (q2): Trained by other code." in section(found, "q2")


def test_a_quick_run_gives_no_reasons_and_says_what_it_is():
    found = made_up()
    for metrics in found.values():
        metrics["quick"] = True
    text = text_of(found)
    assert text.startswith("> Made with `--quick`") and "numbers mean nothing" in text
    assert not reasons_in(text) and "Better than chance" not in text
    assert len(reasons_in(text_of(made_up()))) == len(report.REASONS.split("\n\n"))


def test_the_commits_that_ran_and_that_trained_are_shown_with_their_mark():
    text = text_of(made_up())
    assert "| 0123456789-dirty |" in text and "| trained by commit | 0123456789 |" in text


def test_epochs_before_a_training_are_counted_where_it_began_with_question_2():
    found = made_up()
    del found["q6"]["q2_sha256"]
    for init, epochs in (("scratch", "16"), ("other/model.pt", "? + 16")):
        found["q6"]["init"] = init
        text = text_of(found)
        assert "| perturbed (q4) | 40 + 16 |" in text and f"| {ANGULAR} | {epochs} |" in text
    del found["q2"]
    assert f"| {Q2} | ? |" in text_of(found) and f"| {PERTURBED} | ? + 16 |" in text_of(found)


def test_without_right_npz_nothing_is_compared_image_by_image(monkeypatch, tmp_path):
    results = written(tmp_path)
    (results / "q3" / "right.npz").unlink()
    text, _ = run_report(monkeypatch, results)
    assert "right.npz is missing for: cross-entropy (q2)" in text
    assert "Table 2" not in text and "bold" not in text
    assert "differs from cross-entropy" not in text
    assert "differs from perturbed (q4)" in text and "Table 1" in text


def test_autoattack_stands_beside_the_strongest_attack_on_the_same_images(tmp_path):
    written(tmp_path)
    hashes = {Q2: "hash of model", PERTURBED: "of another model"}
    numbers = {name: {"sha256": each, "images": 100, "right": 30} for name, each in hashes.items()}
    (tmp_path / "autoattack.json").write_text(json.dumps(numbers))
    found = report.read_results(tmp_path)
    right = report.read_right(found, tmp_path)
    share = common.percent(right[Q2]["strongest"][:100].mean())
    text = text_of(found, right)
    assert f"{Q2} 30.00 % ± 4.6 on 100 test images (under table 1's *strongest* {share}" in text
    assert "perturbed (q4) 30.00 %" not in text


def test_a_questions_minutes_are_those_of_its_stages_and_trainings():
    models = {"a": {"training_seconds": 60}, "b": {"training_seconds": 90}, "measured": {}}
    assert report.minutes({"seconds": {"attack": 20, "umap": 10}, "models": models}) == 3


def test_a_recipe_is_that_of_the_model():
    recipe = {**RECIPE, "perturbation": {"hue": 0.1, "pixels": 10}}
    text = text_of(change(made_up(), "q4", PERTURBED, recipe=recipe))
    assert "| pixels | | 10 | | |" in text and "| perturbation |" not in text
    found = change(made_up(), "q4", PERTURBED, recipe={**RECIPE, "optimizer": "adamw", "lr": 0.005})
    text = section(found, "q4")
    assert "N-FGSM (de Jorge et al. 2022) with uniform noise of up to 2 times epsilon" in text
    found["q4"]["models"][ATTACKED]["recipe"]["noise"] = 0
    assert "The attack in the loop is plain FGM, without noise." in section(found, "q4")
    assert "AdamW, one-cycle learning rate up to 0.005" in text
    assert "SGD with Nesterov momentum, one-cycle learning rate up to 0.1" in text


# ---- Sources, figures and tables -----------------------------------------------------------------


def test_every_source_in_the_code_is_listed():
    code = (helpers.ROOT / "report.py").read_text(encoding="utf-8").split("REASONS =")[1]
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    name = r"[A-Z][A-Za-zé-ü]+(?:\s+et\s+al\.|\s+&\s+[A-Z][a-z]+)?\s+(?:19|20)\d\d"
    cited = {" ".join(each.split()) for each in re.findall(name, code)}
    assert len(cited) >= 18 and all(each in report.SOURCES for each in cited), cited


def numbers_named(text, word):
    """The numbers of figures or tables that a text names, `14 to 16` being three of them."""
    found = set()
    text = re.sub(r" \(on [^)]*\)", "", text)
    for first, joint, last in re.findall(
        rf"{word}s? (S?\d+)(?: (and|to) (S?\d+))?", text, re.IGNORECASE
    ):
        found |= {first, last} - {""}
        if joint == "to":
            found |= {str(each) for each in range(int(first), int(last))}
    return found


@pytest.mark.parametrize("word", ["Figure", "Table"])
def test_every_figure_and_table_has_a_number_that_the_text_names(word):
    text = report.assemble(made_up(), right_of(made_up()))
    captions = re.findall(rf"^\*{word} (S?\d+|Q5)", text, re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith(("*", "!"))]
    named = numbers_named(" ".join(lines), word)
    expected = set(captions) - {"Q5"}
    assert len(expected) >= 7 and named == expected


# ---- Two forms -----------------------------------------------------------------------------------

FORMULAS = re.findall(r"\$\$([^$]+)\$\$|\$([^$]+)\$", report.answer_5())


def run_report(monkeypatch, results, *flags):
    monkeypatch.setattr("sys.argv", ["report.py", "--results", str(results), *flags])
    report.main()
    return [(results / f"report.{kind}").read_text(encoding="utf-8") for kind in ("md", "html")]


def test_both_forms_hold_every_number_and_every_figure(monkeypatch, tmp_path):
    text, page = run_report(monkeypatch, written(tmp_path))
    for _, _, model in report.measured(made_up()):
        for share in filter(None, model["accuracy"].values()):
            assert common.percent(share) in text and common.percent(share) in page
    paths = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(paths) >= 25 and all((tmp_path / path).is_file() for path in paths)
    assert page.count("<figure>") == page.count("src='data:image/png;base64,") == len(paths)


def test_paragraphs_and_items_are_unwrapped_tables_and_captions_are_not():
    wrapped = "a\nb\n\n- c\n  d\n- e\n\n\n| f |\n| g |\n\n![h](i)\\\n*j*\n"
    assert report.unwrapped(wrapped) == "a b\n\n- c d\n- e\n\n| f |\n| g |\n\n![h](i)\\\n*j*"


def test_question_5s_answer_is_in_both_forms(monkeypatch, tmp_path):
    text, page = run_report(monkeypatch, written(tmp_path))
    page = re.sub("<pre>.*?</pre>", "<pre></pre>", page, flags=re.DOTALL)
    assert page.count("<math") == len(FORMULAS) > 150
    assert "$" not in page and "**" not in page and "```" not in page
    assert "<h3 id='1-what-the-loss-is-for'>1. What the loss is for</h3>" in page
    assert report.answer_5() in text


def test_commonmark_finds_no_emphasis_in_a_formula():
    parsed = mistune.create_markdown(plugins=["table"])(report.answer_5())
    parsed = re.sub("<(pre|code)>.*?</(pre|code)>", "", parsed, flags=re.DOTALL)
    for formula in re.findall(r"\$\$?[^$]+\$\$?", parsed):
        assert "<em>" not in formula and "<strong>" not in formula, formula


HOSTILE = r"$\frac$ <b>*x*</b> [a](b) | `c` & \ # ~~d~~ ![e](f)"


def test_what_comes_from_a_file_or_a_flag_is_text(monkeypatch, tmp_path):
    found = made_up()
    for metrics in found.values():
        for model in metrics.get("models", {}).values():
            model["warnings"] = model["notes"] = [HOSTILE]
            recipe = {key: HOSTILE for key in ("stem", "precision", "device", "torch")}
            if "recipe" in model:
                model["recipe"] = {**model["recipe"], **recipe, HOSTILE: HOSTILE}
        metrics |= {"hardware": HOSTILE, "device": HOSTILE, "precision": HOSTILE, "init": HOSTILE}
        metrics["versions"] = {"torch": HOSTILE}
    found["q1"]["protocol"] = HOSTILE
    found["q6"]["models"] = {HOSTILE: found["q6"]["models"][ANGULAR]}
    flags = ("--author", HOSTILE, "--student-id", HOSTILE, "--note", HOSTILE)
    _, page = run_report(monkeypatch, written(tmp_path, found), *flags)
    assert page.count(mistune.escape(HOSTILE)) > 40
    assert page.count("<math") == len(FORMULAS) and page.count("<img") == 27
    assert page.count("<table>") == 9  # 7 and question 5's
    assert all(read not in page for read in ("<b>", "<em>x", 'href="b"', "<code>c"))


def test_letters_that_utf_8_cannot_hold_are_shown_as_well_as_can_be(monkeypatch, tmp_path):
    text, page = run_report(monkeypatch, written(tmp_path), "--author", "Jos\udce9")
    assert "Jos\\\\udce9" in text and "Jos\\udce9 · made" in page


def test_a_note_stands_on_top_of_both_forms(monkeypatch, tmp_path):
    text, page = run_report(monkeypatch, written(tmp_path), "--note", "A DRAFT")
    assert text.startswith("> A DRAFT\n") and "<blockquote>\n<p>A DRAFT</p>" in page


def test_a_report_of_question_1_alone_works(monkeypatch, tmp_path):
    text, _ = run_report(monkeypatch, written(tmp_path, {"q1": made_up()["q1"]}))
    assert "Question 1" in text and "Table 1" not in text and "Question 5" in text


@pytest.mark.parametrize(
    "missing, said",
    [
        ("q5_angular_loss.md", "The answer is left out: q5_angular_loss.md"),
        ("docs", "The figure is left out: docs/angular_loss.png"),
    ],
)
def test_what_question_5_lacks_is_said_in_a_line(monkeypatch, tmp_path, missing, said):
    beside = tmp_path / "scripts"
    (beside / "docs").mkdir(parents=True)
    for name in {"q5_angular_loss.md", "docs/angular_loss.png"}:
        if not name.startswith(missing):
            shutil.copy(helpers.ROOT / name, beside / name)
    monkeypatch.setattr(report, "HERE", beside)
    text, page = run_report(monkeypatch, written(tmp_path / "results"))
    assert said in text and said in page and "## Question 6" in text


# ---- Refusals ------------------------------------------------------------------------------------


def test_a_report_without_results_is_refused(error_line, tmp_path):
    line = error_line(report.main, "--results", tmp_path)
    assert "holds no results" in line and "python q1_split.py" in line


@pytest.mark.parametrize(
    "question, key, meaning",
    [
        ("q3", "split_sha256", "split"),
        ("q3", "quick", "mode"),
        ("q4", "seed", "seed"),
        ("q4", "stem", "stem"),
        ("q6", "q2_sha256", "model of question 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(error_line, tmp_path, question, key, meaning):
    found = made_up()
    found[question][key] = "another"
    line = error_line(report.main, "--results", written(tmp_path, found))
    assert f"different {meaning}" in line and f"python {helpers.SCRIPTS[question]}" in line


@pytest.mark.parametrize("content", [None, b"", png(wide=True)])
def test_a_figure_that_is_missing_or_of_another_run_leaves_the_old_report(
    error_line, tmp_path, content
):
    results = written(tmp_path)
    figure = results / "q2" / "figure03_accuracy.png"
    figure.unlink()
    if content is not None:
        figure.write_bytes(content)
    for kind in ("md", "html"):
        (results / f"report.{kind}").write_text("old")
    line = error_line(report.main, "--results", results)
    assert "figure03_accuracy.png" in line and "python q2_train_ce.py" in line
    assert all((results / f"report.{kind}").read_text() == "old" for kind in ("md", "html"))


# ---- Look ----------------------------------------------------------------------------------------

BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason=f"none of {BROWSERS} is installed")


def browse(page, *flags):
    """What headless Chromium prints for a page."""
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command = [CHROMIUM, *quiet, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


@needs_chromium
def test_the_report_prints_on_at_most_14_pages_of_a4_with_every_figure(monkeypatch, tmp_path):
    _, page = run_report(monkeypatch, written(tmp_path))
    printed = tmp_path / "report.pdf"
    browse(tmp_path / "report.html", "--no-pdf-header-footer", f"--print-to-pdf={printed}")
    content = printed.read_bytes()
    sizes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert 6 <= len(sizes) <= 14
    assert {(round(float(width)), round(float(height))) for width, height in sizes} == {(595, 842)}


@needs_chromium
def test_the_report_fits_a_telephone(monkeypatch, tmp_path):
    _, page = run_report(monkeypatch, written(tmp_path))
    script = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    (tmp_path / "inner.html").write_text(page + script, encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<body><script>onmessage = event => document.title = event.data</script>"
        "<iframe src='inner.html' width='360' height='640' style='border: 0'></iframe>"
    )
    title = re.search(r"<title>(\d+)</title>", browse(outer, "--dump-dom"))
    assert title, "the page inside has said nothing"
    assert 300 < int(title[1]) <= 360
