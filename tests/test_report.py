"""The sentences of the report: each is chosen by the sign, size and error of its numbers."""

import copy
import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest

import common
import helpers
import report
import seeds

CLEAN = {
    "clean": 0.85,
    "perturbed": 0.76,
    "fgm": 0.31,
    "perturbed_fgm": 0.19,
    "pgd": 0.03,
    "strongest": 0.02,
}
ROBUST = {
    "clean": 0.66,
    "perturbed": 0.62,
    "fgm": 0.42,
    "perturbed_fgm": 0.37,
    "pgd": 0.37,
    "strongest": 0.33,
}
RECIPE = {
    "epochs": 16,
    "batch_size": 64,
    "lr": 0.1,
    "optimizer": "sgd",
    "stem": "stride2",
    "precision": "float32",
    "device": "cpu",
    "noise": 2.0,
}


def model(accuracy, **changes):
    """What metrics.json tells of a model with these accuracies."""
    return {
        "accuracy": dict(accuracy),
        "accuracy_l2": {"fgm": 0.4, "perturbed_fgm": 0.3},
        "strongest_images": 2000,
        "checks": {"noise": 0.8, "fgm": 0.31, "fgm_float32": 0.31, "images": 1000},
        "warnings": [],
        "recipe": RECIPE,
        "history": [{"val_pgd": 0.2}, {"val_pgd": 0.34}, {"val_pgd": 0.33}],
        "epoch_kept": 3,
        "file": "model.pt",
        **changes,
    }


def text_of(blocks):
    return "\n".join(
        block[1] for block in blocks if block[0] == "text" and isinstance(block[1], str)
    )


def question_3(accuracy=CLEAN, **changes):
    by_part = {"colour jitter": 0.8, "rotation": 0.82, "pixels": 0.84}
    extra = {"by_part": by_part, "by_eps": {"images": 1000}}
    return {"n_test": 24_000, "models": {"m": model(accuracy, **extra, **changes)}}


def question_4(robust=ROBUST, **changes):
    models = {"without": model(CLEAN), "with": model(robust, **changes)}
    return {"n_test": 24_000, "init": "q2", "models": models}


def changed(accuracy, **values):
    return {**accuracy, **values}


@pytest.mark.parametrize(
    "perturbed, sentence",
    [
        (0.76, "Perturbation costs 9.0 points."),
        (0.87, "Perturbation gains 2.0 points."),
        (0.849, "Perturbation changes it by -0.1 points, which does not show."),
    ],
)
def test_what_perturbation_does_is_said_by_sign_and_error(perturbed, sentence):
    assert sentence in text_of(
        report.attack_section(question_3(changed(CLEAN, perturbed=perturbed)))
    )


@pytest.mark.parametrize("errors, shown", [(0, False), (1.5, False), (2.5, True), (-2.5, True)])
def test_a_difference_shows_from_two_standard_errors_on(errors, shown):
    error = (2 * 0.5 * 0.5 / 10_000) ** 0.5
    assert report.shows(0.5, 0.5 + errors * error, 10_000) == shown


@pytest.mark.parametrize(
    "noise, said, not_said",
    [
        (0.8, "the direction matters, not the size", "does not show"),
        (0.32, "that the direction matters does not show", "not the size"),
        (0.2, "noise is the stronger", "the direction matters"),
    ],
)
def test_that_the_direction_matters_is_said_only_where_noise_is_weaker(noise, said, not_said):
    checks = {"noise": noise, "fgm": 0.31, "fgm_float32": 0.31, "images": 1000}
    for text in (
        text_of(report.attack_section(question_3(checks=checks))),
        text_of(report.attack_sentences(model(CLEAN, checks=checks), 24_000)),
    ):
        assert said in text and not_said not in text.split("PGD-20 leaves")[0].split("Random")[1]


@pytest.mark.parametrize(
    "pgd, said",
    [
        (0.03, "28.0 points below FGM: that gap is what one step misses"),
        (0.301, "0.9 points below FGM: that gap is what one step misses"),
        (0.312, "-0.2 points from FGM's, which does not show"),
        (0.35, "4.0 points more than FGM: more steps attack less well"),
    ],
)
def test_pgd_beside_fgm(pgd, said):
    assert said in text_of(report.attack_section(question_3(changed(CLEAN, pgd=pgd))))


def test_no_cause_is_named_beside_a_warning_that_denies_it():
    accuracy = changed(ROBUST, fgm=0.46, pgd=0.01)
    warned = question_4(accuracy, warnings=["FGM is far weaker than PGD."])
    text = text_of(report.adversarial_section(warned))
    assert "that gap is what one step misses" not in text and "prevents" not in text
    assert "Warning, with: FGM is far weaker than PGD." in text


def test_the_strongest_attack_has_its_standard_error():
    error = 100 * common.standard_error(CLEAN["strongest"], 2000)
    text = text_of(report.attack_section(question_3()))
    assert f"2.00 % ± {error:.1f} of the first 2000 images" in text


@pytest.mark.parametrize(
    "clean, said",
    [
        (0.66, "On clean images it costs 19.0 points."),
        (0.90, "On clean images it gains 5.0 points."),
        (0.852, "On clean images it changes it by +0.2 points, which does not show."),
    ],
)
def test_what_fgm_in_the_loop_costs(clean, said):
    assert said in text_of(report.adversarial_section(question_4(changed(ROBUST, clean=clean))))


def test_a_collapse_and_the_chosen_epoch_are_said():
    history = [{"val_pgd": 0.3}, {"val_pgd": 0.33}, {"val_pgd": 0.1}]
    text = text_of(report.adversarial_section(question_4(history=history, epoch_kept=2)))
    assert "with: training collapsed in epoch 3" in text
    assert "of epoch 2, chosen on validation" in text
    other = "PGD-20 accuracy on validation was 33.00 % after the last epoch, 34.00 % at best"
    assert f"without: {other}" in text


def test_a_questions_minutes_are_those_of_its_stages_and_trainings():
    models = {"a": {"training_seconds": 60}, "b": {"training_seconds": 90}, "measured": {}}
    assert report.minutes({"seconds": {"attack": 20, "umap": 10}, "models": models}) == 3
    assert report.minutes({"seconds": {"split": 30}}) == 0.5


def question_2(per_class, confidence=0.85, fitted=0.9):
    scores = {"accuracy": 0.85, "loss": 0.5, "ece": 0.05, "accuracy_per_class": per_class}
    scores["reliability"] = [[0.5, confidence, 0.85], [0.5, confidence, 0.85]]
    recipe = {**RECIPE, "trivial_augment": False}
    history = [{"accuracy": fitted}]
    found = {"val": scores, "test": scores, "recipe": recipe, "history": history}
    return {"n_test": 24_000, "models": {"m": found}}


def test_a_hardest_class_is_named_only_where_one_is():
    apart = {name: 0.8 + 0.01 * number for number, name in enumerate(common.CLASSES)}
    text = text_of(report.training_section(question_2(apart)))
    assert "hardest on test is airplane (80.00 %), the easiest truck (89.00 %)" in text
    equal = text_of(report.training_section(question_2(dict.fromkeys(common.CLASSES, 0.8))))
    assert "That one class is harder than another does not show." in equal
    assert "airplane" not in equal


def test_reasons_are_given_where_the_numbers_bear_them():
    equal = dict.fromkeys(common.CLASSES, 0.8)
    for fitted, said in (0.9, True), (0.853, False), (0.7, False):
        text = text_of(report.training_section(question_2(equal, fitted=fitted)))
        assert ("Zhang et al. 2017" in text) == said
    for confidence, words in (0.9, "are 5.0 points too high"), (0.8, "are 5.0 points too low"):
        assert words in text_of(report.training_section(question_2(equal, confidence)))
    assert "right on average" in text_of(report.training_section(question_2(equal, 0.855)))


@pytest.mark.parametrize(
    "source, accuracy, checks",
    [
        ("Ilyas et al. 2019", {}, {"noise": 0.3}),
        ("Goodfellow et al. 2015", {"pgd": CLEAN["fgm"]}, {}),
        ("Fawzi et al. 2016", {"perturbed": CLEAN["fgm"]}, {}),
    ],
)
def test_question_3_gives_a_reason_only_where_its_numbers_bear_it(source, accuracy, checks):
    assert source in text_of(report.attack_section(question_3()))
    found = question_3(changed(CLEAN, **accuracy))
    found["models"]["m"]["checks"].update(checks)
    assert source not in text_of(report.attack_section(found))
    warned = question_3(warnings=["The gradients may be masked."])
    assert "Why?" not in text_of(report.attack_section(warned))


@pytest.mark.parametrize(
    "source, accuracy",
    [
        ("Geirhos et al. 2018", {"pgd": CLEAN["pgd"]}),
        ("Tsipras et al. 2019", {"clean": CLEAN["clean"]}),
    ],
)
def test_question_4_gives_a_reason_only_where_its_numbers_bear_it(source, accuracy):
    assert source in text_of(report.adversarial_section(question_4()))
    changed_model = question_4(changed(ROBUST, **accuracy))
    assert source not in text_of(report.adversarial_section(changed_model))
    warned = question_4(warnings=["The gradients may be masked."])
    assert "Why?" not in text_of(report.adversarial_section(warned))


def question_6(before, after, pgd):
    val = {"accuracy_before_training": before, "accuracy": after}
    retrieval = {"precision_at_1": 0.8}
    found = model(changed(CLEAN, pgd=pgd), val=val, retrieval=retrieval, neighbours=100)
    return {"n_test": 24_000, "init": "q2", "models": {"m": found}}


def test_question_6_gives_a_reason_only_where_its_numbers_bear_it():
    for before, after, pgd, sources in (
        (0.85, 0.85, 0.0, {"Musgrave", "Mao"}),
        (0.80, 0.85, 0.0, {"Mao"}),
        (0.85, 0.80, 0.7, {"Musgrave"}),
        (0.80, 0.85, 0.7, set()),
    ):
        text = text_of(report.angular_section(question_6(before, after, pgd)))
        assert {name for name in ("Musgrave", "Mao") if name in text} == sources


def test_the_part_that_costs_most_is_named_only_where_one_does():
    assert "colour jitter costs most" in text_of(report.attack_section(question_3()))
    equal = question_3()
    equal["models"]["m"]["by_part"] = {"colour jitter": 0.8, "rotation": 0.801, "pixels": 0.84}
    text = text_of(report.attack_section(equal))
    assert "costs most does not show" in text and "colour jitter costs" not in text


def test_the_sources_are_those_that_the_text_names():
    blocks = report.attack_section(question_3())
    heading, (_, lines) = report.sources_section(blocks)
    assert heading == ("heading", "Sources")
    named = {line.removeprefix("- ").split(":")[0] for line in lines.splitlines()}
    assert {"Ilyas et al. 2019", "Goodfellow et al. 2015", "Fawzi et al. 2016"} <= named
    assert all(name in text_of(blocks) for name in named)
    assert report.sources_section([("text", "Nothing is named.")]) == []


def test_every_source_in_the_text_is_listed():
    text = (helpers.ROOT / "report.py").read_text(encoding="utf-8").split("def main")[1]
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    cited = set(re.findall(r"[A-Z][A-Za-zé-ü]+(?: et al\.| & [A-Z][a-z]+)? (?:19|20)\d\d", text))
    listed = " ".join(report.SOURCES)
    assert len(cited) >= 15 and all(name in listed for name in cited), cited


def numbers_named(text, word):
    """The numbers of figures or tables that a text names, `3 to 5` being three of them."""
    found = set()
    for first, joint, last in re.findall(
        rf"{word}s? (S?\d+)(?: (and|to) (S?\d+))?", text, re.IGNORECASE
    ):
        found |= {first, last} - {""}
        if joint == "to":
            found |= {str(number) for number in range(int(first), int(last))}
    return found


def test_every_figure_and_table_has_a_number_that_the_text_names(quick_run):
    args = helpers.tiny_args(results=quick_run.results, quick=True)
    blocks = report.assemble(report.read_results(args))
    text = text_of(blocks)
    for kind, position in ("figure", 2), ("table", 1):
        captions = [block[position] for block in blocks if block[0] == kind]
        words = [re.match(rf"{kind.capitalize()} (S?\d+)", caption) for caption in captions]
        assert all(words), captions
        assert {word[1] for word in words} == numbers_named(text, kind)


BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason=f"none of {BROWSERS} is installed")


def browse(page, *flags):
    """What headless Chromium prints for a page."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout


@needs_chromium
def test_the_report_prints_on_at_most_14_pages_of_a4_with_every_figure(quick_run, tmp_path):
    page, printed = quick_run.results / "report.html", tmp_path / "report.pdf"
    browse(page, "--no-pdf-header-footer", f"--print-to-pdf={printed}")
    content = printed.read_bytes()
    sizes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content)
    assert 6 <= len(sizes) <= 14
    assert {(round(float(width)), round(float(height))) for width, height in sizes} == {(595, 842)}
    figures = page.read_text(encoding="utf-8").count("<img ")
    assert content.count(b"/Subtype /Image") >= figures >= 20


@needs_chromium
def test_the_report_fits_a_telephone(quick_run, tmp_path):
    text = (quick_run.results / "report.html").read_text(encoding="utf-8")
    script = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    (tmp_path / "inner.html").write_text(text + script, encoding="utf-8")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<body><script>onmessage = event => document.title = event.data</script>"
        "<iframe src='inner.html' width='360' height='640' style='border: 0'></iframe>"
    )
    title = re.search(r"<title>(\d+)</title>", browse(outer, "--dump-dom"))
    assert title, "the page inside has said nothing"
    assert 300 < int(title[1]) <= 360


def test_ties_are_not_called_the_best_and_small_differences_do_not_show():
    q4 = question_4(changed(ROBUST, clean=0.7))
    q4["models"]["without"]["accuracy"]["clean"] = 0.8502
    found = {"q3": {**question_3(), "seconds": {}}, "q4": q4}
    text = text_of(report.comparison(found))
    assert "clean: m (85.00 %) or without (85.02 %)" in text
    assert "without against m, in points: clean +0.0 (does not show)" in text
    assert "with against m, in points: clean -15.0, " in text
    assert "another seed moves accuracies, too, which one run cannot show" in text


def test_the_rate_is_that_of_the_models_own_recipe():
    q4 = question_4()
    q4["models"] = copy.deepcopy(q4["models"])
    q4["models"]["without"]["recipe"] = {**RECIPE, "lr": 0.005}
    text = text_of(report.adversarial_section(q4))
    assert "without: 16 epochs, batch 64" in text and "up to 0.005" in text and "up to 0.1" in text


def test_the_optimiser_is_that_of_the_models_own_recipe():
    assert "SGD with Nesterov momentum, one-cycle" in report.described(RECIPE)
    assert "AdamW, one-cycle" in report.described({**RECIPE, "optimizer": "adamw"})


def test_autoattacks_numbers_stand_beside_the_models_that_they_were_made_on(tmp_path):
    q3, q4 = question_3(), question_4()
    q3["parent_sha256"] = ["a"]
    q4["models"]["without"]["sha256"], q4["models"]["with"]["sha256"] = "b", "c"
    numbers = {"m": "a", "without": "b", "with": "of another model"}
    referee = {name: {"sha256": sha, "images": 100, "right": 9} for name, sha in numbers.items()}
    (tmp_path / "autoattack.json").write_text(json.dumps(referee))
    found = {"q3": q3, "q4": q4}
    report.add_referee(found, tmp_path / "autoattack.json")
    (*_, header, (row,)), (*_, (first, second)) = (
        report.conditions_table("", metrics["models"]) for metrics in found.values()
    )
    assert header[-1] == "AutoAttack"
    assert row[-1] == first[-1] == "9.00 % ± 2.9 (100 images)" and second[-1] == ""
    report.add_referee(found, tmp_path / "nothing.json")


# ---- Question 5's answer -----------------------------------------------------------------------

FORMULAS = re.findall(r"\$\$([^$]+)\$\$|\$([^$]+)\$", report.ANSWER_5)


@pytest.mark.parametrize("tex", sorted({block or inline for block, inline in FORMULAS}))
def test_every_formula_of_question_5_becomes_mathml(tex):
    math = ElementTree.fromstring(report.mathml(tex, "inline"))
    shown = "".join(math.itertext())
    assert not set(shown) & set("\\_^$")
    for letter in re.sub(r"\\[a-zA-Z]+", "", tex):
        if letter.isalnum() and letter not in "PR":
            assert letter in shown
    for element in math.iter():
        children = {"msub": 2, "msup": 2, "munder": 2, "mfrac": 2, "msubsup": 3, "munderover": 3}
        assert len(element) == children.get(element.tag, len(element)), tex


@pytest.mark.parametrize(
    "tex, expected",
    [
        ("x_a", "<msub><mi>x</mi><mi>a</mi></msub>"),
        ("r^2", "<msup><mi>r</mi><mn>2</mn></msup>"),
        ("\\tfrac12", "<mfrac><mn>1</mn><mn>2</mn></mfrac>"),
        (
            "\\tfrac{8t}{3}",
            "<mfrac><mrow><mn>8</mn><mi>t</mi></mrow><mrow><mn>3</mn></mrow></mfrac>",
        ),
        ("x_a^\\top", "<msubsup><mi>x</mi><mi>a</mi><mi>⊤</mi></msubsup>"),
        ("\\text{angle at }y", "<mtext>angle\u00a0at\u00a0</mtext><mi>y</mi>"),
        ("a < b", "<mi>a</mi><mo>&lt;</mo><mi>b</mi>"),
    ],
)
def test_latex_as_mathml(tex, expected):
    assert report.mathml(tex, "inline") == f"<math display='inline'><mrow>{expected}</mrow></math>"


def test_question_5s_answer_is_in_both_forms_of_the_report(quick_run):
    page = (quick_run.results / "report.html").read_text()
    page = re.sub("<pre>.*?</pre>", "<pre></pre>", page, flags=re.DOTALL)
    assert page.count("<math") == len(FORMULAS) and "$" not in page.split("<style>")[0]
    assert "<pre>" in page and "```" not in page
    assert "<h3>1. What the loss is for</h3>" in page and "FaceNet" in page and "**" not in page
    text = (quick_run.results / "report.md").read_text()
    assert report.ANSWER_5.strip() in text


def test_the_report_bears_its_author_and_the_date():
    title, line, *_ = report.introduction({}, "A. Student · 12345")
    assert title[0] == "title" and line[1].startswith("A. Student · 12345 · 20")
    assert report.introduction({}, "")[1][1].startswith("20")


def test_a_name_that_would_break_a_table_is_escaped():
    text = report.markdown([("table", "A title.", ["a|b", "c"], [["d\ne", "\x1b[31m"]])])
    assert text.splitlines()[2:] == ["| a\\|b | c |", "| --- | --- |", "| d e | \\x1b[31m |"]


def test_a_note_stands_in_both_forms(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "origin_section", lambda found: [])
    blocks = report.assemble({"q3": {**question_3(), "quick": False}}, note="A DRAFT")[:4]
    assert ("note", "A DRAFT") in blocks and "A DRAFT" in report.markdown(blocks)
    page = report.html_page([*blocks, ("heading", "H")], helpers.tiny_args(results=tmp_path), {})
    assert "<header>A DRAFT</header>" in page


# ---- Several seeds -------------------------------------------------------------------------------


def test_several_seeds_give_the_mean_and_the_deviation_of_each_accuracy(
    tmp_path, monkeypatch, capsys
):
    for seed, clean in enumerate((0.84, 0.86)):
        for question in ("q3", "q4", "q6"):
            metrics = {"models": {f"model of {question}": model(changed(CLEAN, clean=clean))}}
            folder = tmp_path / str(seed) / question
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr("sys.argv", ["seeds.py", str(tmp_path / "0"), str(tmp_path / "1")])
    seeds.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("  ") for line in lines if line.startswith("model of")]
    assert [row[:3] for row in rows] == [
        [f"model of {question}", "85.00 ± 1.41", "76.00 ± 0.00"] for question in ("q3", "q4", "q6")
    ]


def test_one_folder_alone_has_no_deviation(tmp_path, error_line):
    assert "make seeds" in error_line(seeds.main, tmp_path)
