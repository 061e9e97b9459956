"""The tools that no script needs: the demonstration, several seeds, AutoAttack's counts."""

import importlib
import json

import pytest
import torch

import common
import helpers
from tools import autoattack, demo, seeds

# ---- The demonstration --------------------------------------------------------------------------


def test_the_demo_runs_every_script_on_its_own_pictures_and_says_so(monkeypatch, tmp_path, capsys):
    commands = []
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    monkeypatch.setattr(demo, "run", lambda *words: commands.append([str(word) for word in words]))
    demo.main()
    *questions, made = commands
    for script, command in zip(helpers.SCRIPTS.values(), questions, strict=True):
        assert {"tools.synthetic", script, "--quick"} <= set(command)
    assert {"report.py", demo.NOTE} <= set(made) and "not CIFAR-10" in capsys.readouterr().out


@pytest.mark.parametrize("script", [script for script, flags in demo.SCRIPTS.items() if flags])
def test_a_script_knows_the_flags_that_the_demo_gives_it(script):
    parser = importlib.import_module(script.removesuffix(".py")).parser()
    parser.parse_args(demo.SCRIPTS[script])


def test_the_demo_ends_with_the_status_of_a_script_that_fails():
    with pytest.raises(SystemExit) as end:
        demo.run("-c", "raise SystemExit(3)")
    assert end.value.code == 3


# ---- Several seeds ------------------------------------------------------------------------------


def write_accuracies(folder, clean):
    """Metrics of questions 3, 4 and 6 with this clean accuracy, and others below it."""
    accuracy = {key: clean - 0.1 * place for place, key in enumerate(common.CONDITIONS)}
    for question in ("q3", "q4", "q6"):
        model = {"accuracy": accuracy, "accuracy_l2": {"fgm": 0.2, "perturbed_fgm": 0.125}}
        content = json.dumps({"models": {f"model of {question}": model}})
        common.write_file(folder / question / "metrics.json", content.encode())


def test_several_seeds_give_the_mean_and_the_deviation_of_each_accuracy(
    tmp_path, monkeypatch, capsys
):
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder, clean in zip(folders, (0.84, 0.86), strict=True):
        write_accuracies(folder, clean)
    monkeypatch.setattr("sys.argv", ["seeds.py", *map(str, folders)])
    seeds.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("  ") for line in lines if line.startswith("model of")]
    assert [row[0] for row in rows] == ["model of q3", "model of q4", "model of q6"]
    for row in rows:
        cells = [cell.strip() for cell in row[1:] if cell]
        assert cells[:2] == ["85.00 ± 1.41", "75.00 ± 1.41"]
        assert cells[-2:] == ["20.00 ± 0.00", "12.50 ± 0.00"]


def test_one_folder_alone_has_no_deviation(tmp_path, error_line):
    assert "make seeds" in error_line(seeds.main, tmp_path)


# ---- AutoAttack ---------------------------------------------------------------------------------


def test_autoattack_goes_on_where_it_ended_but_not_for_other_weights(tmp_path):
    kept = {name: {"sha256": "old", "images": 300, "right": 100} for name in ("same", "retrained")}
    path = tmp_path / "autoattack.json"
    path.write_text(json.dumps(kept))
    checkpoints = {"same": {"sha256": "old"}, "retrained": {"sha256": "new"}}
    counts = autoattack.counts_so_far(path, checkpoints)
    assert counts["same"] == kept["same"]
    assert counts["retrained"] == {"sha256": "new", "images": 0, "right": 0}


def test_an_interrupted_autoattack_tells_of_no_model_that_it_has_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(autoattack, "survivors", lambda model, images, labels, seed: labels > 0)
    counts, labels = {name: {"images": 0, "right": 0} for name in "ab"}, torch.arange(200) % 2
    path = tmp_path / "autoattack.json"
    autoattack.attack_others(None, torch.zeros(200, 1), labels, counts, "a", path, 0)
    assert json.loads(path.read_text()) == {"a": {"images": 200, "right": 100}}


def test_without_classifiers_autoattack_says_how_to_make_one(tmp_path):
    with pytest.raises(common.UserError, match="q2_train_ce.py"):
        autoattack.classifiers(tmp_path, None)
