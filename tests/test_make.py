"""What `make` runs, with which words, and what it leaves alone.

A shell script stands in for Python: it notes how it was called and writes what a script of ours
would.
"""

import os
import shutil
import subprocess

import pytest

import helpers

pytestmark = pytest.mark.skipif(
    os.name != "posix" or shutil.which("make") is None, reason="there is no make, or no POSIX shell"
)
TRAINING = {"q2", "q4", "q6"}
OLD, EDITED = 1_000_000_000, 1_200_000_000  # times of files, in seconds

# Notes each call on a line, each of its words in brackets. Like question 2 it refuses a wrong stem.
VENV_PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit
for word; do printf '[%s]' "$word"; done >>calls
echo >>calls
echo "$PYTORCH_ENABLE_MPS_FALLBACK" >fallback
case "$* " in *"--stem stride "*) exit 2;; esac
results=$5
folder=$results/${1%%_*}
case $1 in
    q*) mkdir -p "$folder"
        for name in model.training.pt model.pt metrics.json; do echo new >"$folder/$name"; done
        echo new >"$results/q1/split.npz";;
    report.py) echo new >"$results/report.html";;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A folder with our Makefile, empty scripts and a .venv that is ready, all of an old date."""
    names = ["common.py", "report.py", *helpers.SCRIPTS.values()]
    for name in names:
        (tmp_path / name).touch()
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(helpers.ROOT / name, tmp_path)
    stand_in(tmp_path / ".venv" / "bin" / "python", VENV_PYTHON)
    (tmp_path / ".venv" / "installed").touch()
    date(tmp_path, OLD)
    return tmp_path


def stand_in(path, text):
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def date(path, seconds):
    """Give a file, or all files of a folder, this time of their last change."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        os.utime(file, (seconds, seconds))


def make(folder, *words):
    """Run make in a folder, whatever make runs this test with."""
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["make", *words], cwd=folder, capture_output=True, text=True, env=environment
    )


def calls(folder, *words):
    """Run make, which must succeed; returns what the stand-in noted: dict from script to call."""
    (folder / "calls").write_text("")
    finished = make(folder, *words)
    assert finished.returncode == 0, finished.stderr
    lines = (folder / "calls").read_text().splitlines()
    return {line[1:].partition("]")[0]: line for line in lines}


def questions(called):
    """The questions among the scripts that were called, in their order."""
    return [name[:2] for name in called if name in helpers.SCRIPTS.values()]


# ---- What is made ------------------------------------------------------------------------------


def test_make_hands_its_variables_to_the_scripts_that_know_them(project):
    words = ("DATA=some where", "RESULTS=nowhere", "STEM=cifar", "SEED=3", "FLAGS=--quick")
    called = calls(project, *words)
    for question, script in helpers.SCRIPTS.items():
        assert "[--data][some where][--results][nowhere][--quick]" in called[script]
        assert ("[--seed][3]" in called[script]) == (question != "q1")  # the split keeps its own
        assert ("[--stem][cifar]" in called[script]) == (question == "q2")  # others follow q2


def test_a_second_make_runs_nothing_and_an_edit_only_what_follows_from_it(project):
    assert questions(calls(project)) == list(helpers.SCRIPTS)
    assert calls(project) == {}
    date(project / "results", OLD)
    date(project / "q4_adv_train.py", EDITED)
    assert list(calls(project)) == ["q4_adv_train.py", "report.py"]


def test_an_edited_answer_to_question_5_makes_a_new_report(project):
    calls(project)
    (project / "q5_angular_loss.md").touch()
    date(project / "results", OLD)
    assert list(calls(project)) == ["report.py"]


@pytest.mark.parametrize("words, folder", [([], "results-quick"), (["RESULTS=foo"], "foo")])
def test_make_quick_writes_where_it_is_told(project, words, folder):
    called = calls(project, "quick", *words)
    assert f"[--results][{folder}][--quick]" in called["q1_split.py"]
    assert calls(project, "FLAGS=--quick", f"RESULTS={folder}") == {}


def test_pytorch_is_told_to_compute_on_the_cpu_what_apples_gpus_lack(project):
    calls(project)
    assert (project / "fallback").read_text() == "1\n"


def test_autoattacks_numbers_reach_the_report(project):
    calls(project)
    date(project / "results", OLD)
    (project / "results" / "autoattack.json").touch()
    assert list(calls(project)) == ["report.py"]
    assert "report.py" in calls(project, "autoattack")


@pytest.mark.parametrize("target", ["demo", "autoattack", "seeds", "bench"])
def test_what_is_no_test_lies_in_tools(project, target):
    (project / "results").mkdir()
    assert f"[-m][tools.{target}]" in calls(project, target)["-m"]


# ---- Training anew -----------------------------------------------------------------------------


def test_fresh_reaches_only_the_trainings_that_are_out_of_date(project):
    calls(project)
    date(project / "results", OLD)
    date(project / "q4_adv_train.py", EDITED)
    assert "[--fresh]" not in calls(project)["q4_adv_train.py"]
    date(project / "results", OLD)
    called = calls(project, "FRESH=1")
    assert list(called) == ["q4_adv_train.py", "report.py"]
    assert "[--fresh]" in called["q4_adv_train.py"]


def test_fresh_reaches_every_script_that_trains_and_no_other(project):
    called = calls(project, "FRESH=1")
    fresh = {
        question
        for question in questions(called)
        if "[--fresh]" in called[helpers.SCRIPTS[question]]
    }
    assert fresh == TRAINING and "[--fresh]" not in called["report.py"]


def test_fresh_0_starts_nothing_over(project):
    assert not any("[--fresh]" in call for call in calls(project, "FRESH=0").values())


@pytest.mark.parametrize("words", [["STEM=imagenet"], ["FLAGS=--seed 1"], ["SEED=1"]])
def test_results_of_other_flags_are_not_taken_for_these(project, words):
    calls(project)
    date(project / "results", OLD)
    date(project / "common.py", EDITED)
    (project / "calls").write_text("")
    finished = make(project, *words)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert "results was made by: make." in finished.stderr
    assert (project / "calls").read_text() == ""
    assert questions(calls(project, *words, "RESULTS=other")) == list(helpers.SCRIPTS)
    assert questions(calls(project)) == list(helpers.SCRIPTS)


def test_the_command_that_made_a_folder_is_named_and_makes_nothing_again(project):
    calls(project, "STEM=imagenet", "SEED=1", "FLAGS= --precision  float32 ")
    named = make(project).stderr.partition("was made by: ")[2].partition(". Give")[0]
    assert named == 'make STEM=imagenet SEED=1 FLAGS="--precision float32"'
    (project / "calls").write_text("")
    assert (
        subprocess.run(named, shell=True, cwd=project, env={"PATH": os.environ["PATH"]}).returncode
        == 0
    )
    assert (project / "calls").read_text() == ""


def test_flags_may_hold_quotes_of_both_kinds(project):
    flags = """FLAGS=--note 'one "word"'"""
    assert """[--note][one "word"]""" in calls(project, flags)["q2_train_ce.py"]
    assert calls(project, flags) == {}


def test_a_mistyped_stem_leaves_no_trace(project):
    finished = make(project, "STEM=stride")
    assert finished.returncode == 2 and (project / "results" / "q1" / "metrics.json").exists()
    assert questions(calls(project, "STEM=stride2")) == ["q2", "q3", "q4", "q6"]


def test_with_fresh_other_flags_replace_all_results(project):
    calls(project)
    assert questions(calls(project, "FRESH=1", "SEED=1")) == list(helpers.SCRIPTS)
    assert calls(project, "SEED=1") == {}
    assert "results was made by: make SEED=1." in make(project).stderr


def test_a_change_of_flags_that_was_interrupted_at_once_still_replaces_all_results(project):
    calls(project)
    assert make(project, "FRESH=1", "SEED=1", "asked").returncode == 0
    assert questions(calls(project, "SEED=1")) == list(helpers.SCRIPTS)


# ---- Results that were handed in -----------------------------------------------------------------


def hand_in(project):
    """Results as they come out of an archive: older than the scripts, no state of a training."""
    calls(project)
    results = (project / "results").rename(project / "handed-in")
    for path in results.glob("*/*.training.pt"):
        path.unlink()
    date(results, OLD)
    for script in helpers.SCRIPTS.values():
        date(project / script, EDITED)
    return results


def test_what_was_handed_in_is_not_trained_again_and_make_says_so(project):
    results = hand_in(project)
    models = [results / question / "model.pt" for question in ("q1", *TRAINING)]
    finished = make(project, "RESULTS=handed-in")
    assert finished.returncode == 0
    assert all(path.stat().st_mtime == OLD for path in models)
    for question in ("q1", *TRAINING):
        assert f"handed-in/{question} is left as it is" in finished.stdout


def test_what_was_handed_in_is_trained_anew_with_fresh(project):
    hand_in(project)
    called = calls(project, "RESULTS=handed-in", "FRESH=1")
    assert questions(called) == list(helpers.SCRIPTS)


def test_what_was_made_elsewhere_is_completed(project):
    results = hand_in(project)
    shutil.rmtree(results / "q4")
    assert "q4_adv_train.py" in calls(project, "RESULTS=handed-in")


def test_verify_is_told_where_to_look_and_nothing_of_the_training(project):
    called = calls(project, "verify", "RESULTS=handed-in", "SEED=1", "STEM=cifar")
    assert called == {"verify.py": "[verify.py][--data][data][--results][handed-in]"}


# ---- The report --------------------------------------------------------------------------------

WORDS = ['AUTHOR=Zoë O\'Neil, "Z"', "ID=-17 b", "NOTE=*; `ls` # 100 %"]
HANDED_ON = """[--author=Zoë O'Neil, "Z"][--student-id=-17 b][--note=*; `ls` # 100 %]"""


def test_make_report_assembles_what_is_there_and_makes_nothing_else(project):
    (project / "results").mkdir()
    assert list(calls(project, "report")) == ["report.py"]


@pytest.mark.parametrize("target", ["report", "all"])
def test_words_reach_the_report_as_they_were_given_even_when_it_is_up_to_date(project, target):
    calls(project)
    called = calls(project, target, *WORDS)
    assert list(called) == ["report.py"] and called["report.py"].endswith(HANDED_ON)


def test_words_that_are_not_given_are_no_flags(project):
    assert calls(project)["report.py"] == "[report.py][--data][data][--results][results]"


# ---- Deleting ----------------------------------------------------------------------------------


def test_clean_deletes_what_the_scripts_write_and_names_it(project):
    calls(project)
    (project / "results" / "q3" / "figure 7.png").touch()
    made = [
        str(path.relative_to(project)) for path in project.glob("results/**/*") if path.is_file()
    ]
    finished = make(project, "clean")
    assert finished.returncode == 0 and not (project / "results").exists()
    assert sorted(finished.stdout.splitlines()) == sorted(f"deleted {name}" for name in made)


def test_clean_leaves_what_the_scripts_did_not_write(project):
    calls(project)
    own = [project / "results" / name for name in ("q2/my notes.txt", "q2/old/model.pt", "me.png")]
    own[1].parent.mkdir()
    for path in own:
        path.touch()
    make(project, "clean")
    assert sorted(path for path in project.glob("results/**/*") if path.is_file()) == sorted(own)


def test_clean_leaves_a_folder_alone_that_is_no_results_folder(project):
    files = [project / "mine" / name for name in ("q2/model.pt", "report.md", "q3/empty")]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    files[2].unlink()
    finished = make(project, "clean", "RESULTS=mine")
    assert finished.returncode == 0 and "mine is left alone" in finished.stdout
    assert finished.stdout.count("\n") == 1
    assert files[0].exists() and files[1].exists() and files[2].parent.exists()


@pytest.mark.parametrize("name", ["res50%x", "my results", "a:b", "a;b", "$(HOME)*"])
@pytest.mark.parametrize("target", ["all", "clean"])
def test_a_folder_name_that_make_would_misread_is_refused(project, name, target):
    finished = make(project, f"RESULTS={name}", target)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert "without spaces and special characters" in finished.stderr
    assert not (project / "calls").exists()


# ---- The environment ---------------------------------------------------------------------------

# Makes .venv as `python3 -m venv .venv` does: a Python that is there already stays.
MAKES_VENV = f"""#!/bin/sh
echo "$*" >>made
[ "$1" != -m ] || [ -e .venv/bin/python ] && exit
mkdir -p .venv/bin
cat >.venv/bin/python <<'end'
{VENV_PYTHON}
end
chmod +x .venv/bin/python
"""
NO_VENV = "test $1 != -m"
NO_NETWORK = f"mkdir -p .venv/bin; ln -sf {shutil.which('false')} .venv/bin/python"


@pytest.fixture
def python(project):
    """PYTHON=... that names a stand-in; what it was asked for stands in the file `made`."""
    stand_in(project / "python", MAKES_VENV)
    return f"PYTHON={project / 'python'}"


def test_an_environment_whose_python_is_gone_is_made_anew(project, python):
    (project / ".venv" / "lost").touch()
    (project / ".venv" / "bin" / "python").unlink()
    (project / ".venv" / "bin" / "python").symlink_to(project / "gone")
    assert questions(calls(project, python)) == list(helpers.SCRIPTS)
    assert not (project / ".venv" / "lost").exists()


def test_an_environment_that_has_lost_its_packages_gets_them_and_keeps_its_other_files(
    project, python
):
    lost = VENV_PYTHON.replace(
        '[ "$1" = -c ]', 'case "$2" in import*) exit 1;; esac; [ "$1" = -c ]'
    )
    stand_in(project / ".venv" / "bin" / "python", lost)
    (project / ".venv" / "kept").touch()
    assert "[pip][install]" in calls(project, python, ".venv/installed")["-m"]
    assert (project / ".venv" / "kept").exists()


def test_the_package_that_make_looks_for_is_among_the_required_ones():
    makefile = (helpers.ROOT / "Makefile").read_text()
    package = makefile.partition("-c 'import ")[2].partition("'")[0]
    assert f"\n{package}>=" in (helpers.ROOT / "requirements.txt").read_text()


def test_torch_cpu_asks_for_the_build_without_cuda(project):
    (project / ".venv" / "installed").unlink()
    lines = make(project, "--dry-run", "TORCH=cpu", ".venv/installed").stdout
    assert "pip install --quiet torch torchvision --index-url" in lines
    assert "--index-url" not in make(project, "--dry-run", ".venv/installed").stdout


@pytest.mark.parametrize(
    "commands, beginning",
    [
        ("exit 1", "error: Python 3.10 or newer is needed; name one"),
        (NO_VENV, "error: no virtual environment can be made; on Debian and Ubuntu: sudo apt"),
        (NO_NETWORK, "error: the packages of requirements.txt cannot be installed; connect to"),
    ],
    ids=["old", "without venv", "without network"],
)
@pytest.mark.parametrize("words", [[], ["TORCH=cpu"]], ids=["", "TORCH=cpu"])
def test_make_says_what_to_do_about_a_machine_that_lacks_something(
    project, commands, beginning, words
):
    shutil.rmtree(project / ".venv")
    stand_in(project / "python", f"#!/bin/sh\n{commands}\n")
    finished = make(project, f"PYTHON={project / 'python'}", ".venv/installed", *words)
    first, *others = finished.stderr.splitlines()
    assert finished.returncode == 2 and first.startswith(beginning)
    assert all(line.startswith("make") for line in others)
    assert not (project / ".venv" / "installed").exists()


# ---- Line ends ---------------------------------------------------------------------------------
