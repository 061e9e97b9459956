"""Bad input and awkward machines: a line that begins with "error: ", and nothing lost or run."""

import errno
import io
import os
import pickle
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import helpers
import q1_split
import q2_train_ce
import q3_attack
import q4_adv_train
import q6_angular
import report


@pytest.fixture
def random_images(monkeypatch):
    """60,000 images that need no file: the same noise again and again."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (100, 3, 32, 32), generator=generator).byte()
    images, labels = noise.repeat(600, 1, 1, 1), torch.arange(60_000) % 10
    monkeypatch.setattr(common, "load_cifar10", lambda root: (images, labels))


@pytest.fixture
def split(tmp_path):
    """A quick split in tmp_path/q1, read back."""
    common.write_npz(tmp_path / "q1" / "split.npz", helpers.tiny_split())
    return common.load_split(tmp_path / "q1" / "split.npz")


@pytest.fixture
def question_2(tmp_path, split):
    """A checkpoint of question 2 for that split, in its place."""
    origin = {"question": "q2", "split_sha256": split["sha256"], "seed": 0}
    path = tmp_path / "q2" / "model.pt"
    common.write_file(path, helpers.torch_bytes(helpers.small_checkpoint(provenance=origin)))
    return path


def one_line(error):
    return "\n" not in str(error.value)


# ---- Flags ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags, named",
    [
        (q1_split, ["--seed", "-1"], "--seed"),
        (q1_split, ["--seed", "1e3"], "--seed"),
        (q2_train_ce, ["--epochs", "0"], "--epochs"),
        (q2_train_ce, ["--lr", "nan"], "--lr"),
        (q4_adv_train, ["--noise", "-1"], "--noise"),
    ],
)
def test_a_flag_with_a_wrong_value_is_named(error_line, tmp_path, script, flags, named):
    assert named in error_line(script.main, "--results", tmp_path, *flags)


def test_a_flag_of_any_length_ends_in_one_short_line(error_line, tmp_path):
    line = error_line(q1_split.main, "--results", tmp_path, "--seed", "9" * 200_000)
    assert "--seed" in line and len(line) < 1000


@pytest.fixture
def broken_gpu(monkeypatch):
    """Function that lets PyTorch see a GPU at whose first use it raises a given error."""

    def break_with(error):
        def ones(*size, device):
            assert device == "cuda"
            raise error

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "ones", ones)

    return break_with


@pytest.mark.parametrize("asked", [False, True])
def test_a_gpu_too_old_for_pytorch_stays_unused_or_is_refused(
    broken_gpu, monkeypatch, capsys, asked
):
    broken_gpu(torch.AcceleratorError("CUDA error: no kernel image is available\nFor debugging..."))
    monkeypatch.setattr("sys.argv", ["script.py", *(["--device", "cuda"] if asked else [])])
    if asked:
        with pytest.raises(common.UserError, match="--device auto"):
            common.parse_arguments(common.argument_parser("A script."))
    else:
        args = common.parse_arguments(common.argument_parser("A script."))
        assert args.device == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("no kernel image is available")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ],
)
def test_a_full_main_memory_ends_in_one_line(error_line, error):
    def fill():
        raise error

    assert "main memory is full" in error_line(fill)


def test_other_mistakes_keep_their_traceback():
    def fail():
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        common.run(fail)


def test_a_pytorch_that_is_too_old_is_named_and_requirements_agree(error_line, monkeypatch):
    oldest = ".".join(map(str, common.OLDEST_TORCH))
    assert f"torch>={oldest}\n" in (helpers.ROOT / "requirements.txt").read_text()
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    assert f"PyTorch {oldest} or newer is needed, this is 2.8.1" in error_line(q1_split.main)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)."),
    ],
)
def test_a_gpu_whose_memory_is_full_ends_in_one_line(error_line, error):
    def fill():
        raise error

    assert "--device cpu" in error_line(fill)


def test_a_gpu_that_is_full_at_its_first_use_is_not_taken_for_none(
    broken_gpu, error_line, tmp_path
):
    broken_gpu(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert "--device cpu" in error_line(q1_split.main, "--results", tmp_path)


@pytest.mark.parametrize("flags, device", [((), "cpu"), (("--device", "mps"), "mps")])
def test_apples_gpu_is_used_only_where_it_is_asked_for(monkeypatch, flags, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["script.py", *flags])
    assert common.parse_arguments(common.argument_parser("A script.")).device == device


@pytest.mark.parametrize(
    "script", [q1_split, q2_train_ce, q3_attack, q4_adv_train, q6_angular, report]
)
def test_help_is_the_scripts_docstring_and_all_flags(script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script.main()
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert script.__doc__.strip() in shown and "--results" in shown and "--seed" in shown


@pytest.mark.parametrize(
    "script, flags",
    [
        (q2_train_ce, ["--batch-size", "21"]),  # the split has 20 training images
        (q2_train_ce, ["--batch-size", "1"]),  # batch-norm of one image whose map is 1 x 1
        (q6_angular, ["--batch-size", "25"]),  # not as many of each class
        (q6_angular, ["--batch-size", "10"]),  # no pairs
        (q6_angular, ["--batch-size", "1000"]),  # more than there are
    ],
)
def test_a_batch_size_that_cannot_work_is_refused(
    error_line, tmp_path, question_2, random_images, script, flags
):
    flags = ["--quick", "--fresh", "--results", tmp_path, *flags]
    assert "--batch-size" in error_line(script.main, *flags)


# ---- What an error advises -----------------------------------------------------------------------


@pytest.fixture
def advised(monkeypatch):
    """Function: the words of command_for(path) while a script runs with these flags."""

    def words(running, flags, path):
        monkeypatch.setattr("sys.argv", [running, *map(str, flags)])
        return shlex.split(common.command_for(path))

    return words


@helpers.posix
def test_advice_names_the_interpreter_and_flags_so_that_it_can_be_pasted(
    advised, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "my data", "--results", "my res", "--seed", 3, "--quick", "--device", "cpu"]
    python, script, *rest = advised("q3_attack.py", flags, Path("my res/q2/model.pt"))
    assert python == sys.executable and Path(script) == helpers.ROOT / "q2_train_ce.py"
    assert rest == list(map(str, flags))
    rest = advised("q3_attack.py", flags, Path("my res/q1/split.npz"))[2:]
    assert "--seed" not in rest  # the split is seed 0's


# ---- Files that are missing ----------------------------------------------------------------------


def test_a_script_run_from_a_shell_ends_with_one_line_and_status_2(tmp_path):
    command = helpers.script("q2_train_ce.py", "--results", tmp_path)
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert "q1_split.py" in finished.stderr


@pytest.mark.parametrize("script", [q2_train_ce, q3_attack, q4_adv_train, q6_angular])
@pytest.mark.parametrize("mode", [[], ["--quick"]], ids=["full", "quick"])
def test_a_missing_split_is_explained(error_line, tmp_path, script, mode):
    line = error_line(script.main, "--results", tmp_path / "absent", *mode)
    assert line.endswith(" ".join(["q1_split.py --results", str(tmp_path / "absent"), *mode]))
    assert not (tmp_path / "absent").exists()  # a mistyped folder is not made


@pytest.mark.parametrize("content", [None, b"", b"PK", b"broken"])
def test_imagenet_weights_that_cannot_be_had_are_explained(
    error_line, tmp_path, question_2, random_images, no_network, content
):
    cached = tmp_path / "cache" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    if content is not None:
        common.write_file(cached, content)
    line = error_line(q6_angular.main, "--quick", "--results", tmp_path, "--init", "imagenet")
    assert "--init q2" in line and str(cached) in line
    assert ("no network" in line) == (content is None)


@pytest.mark.parametrize("script", [q4_adv_train, q6_angular])
@pytest.mark.parametrize("init", ["q2", "scratch"])
def test_questions_4_and_6_begin_with_question_2_or_its_stem(
    split, question_2, tmp_path, script, init
):
    args = helpers.tiny_args(init=init, results=tmp_path)
    model, about, *_ = script.first_model(args, split)
    assert about["stem"] == "imagenet"
    own = common.read_checkpoint(question_2)["sha256"]
    assert about.get("q2_sha256") == (own if init == "q2" else None)
    assert (model.backbone.layer1[0].conv1.weight == 0).all() == (init == "q2")


def test_a_model_of_another_seed_is_refused_before_hours_are_spent_on_it(
    error_line, tmp_path, question_2, random_images
):
    """The report could not compare what is made from it."""
    line = error_line(q4_adv_train.main, "--quick", "--results", tmp_path, "--seed", "3")
    assert "trained with seed 0" in line and line.endswith("--seed 0")


def test_a_checkpoint_to_start_from_must_be_of_this_split(
    error_line, tmp_path, question_2, random_images
):
    (tmp_path / "other.pt").write_bytes(helpers.torch_bytes(helpers.small_checkpoint()))
    flags = ("--quick", "--results", tmp_path, "--init", tmp_path / "other.pt")
    assert "another split" in error_line(q6_angular.main, *flags)


# ---- Files that are damaged ----------------------------------------------------------------------


@pytest.mark.parametrize("seed, target", list(enumerate(helpers.FUZZ_TARGETS)))
def test_randomly_damaged_files_are_noticed(tmp_path, seed, target):
    helpers.assert_survives_fuzzing(target, tmp_path, count=15, seed=seed)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        {"test": helpers.tiny_split()["train"]},  # tests on training images
        {"train": np.array([1, 1, 2])},
        {"train": np.arange(20.0)},
        {"train": np.array([], dtype=np.int64)},
        {"train": np.array([-1, 3])},
        {"train": np.array([3, 60_000])},
        {"seed": 0.5},
    ],
)
def test_an_array_file_that_is_no_split_is_refused(tmp_path, change):
    (tmp_path / "split.npz").write_bytes(npz(**{**helpers.tiny_split(), **change}))
    with pytest.raises(common.UserError, match="damaged") as error:
        common.load_split(tmp_path / "split.npz")
    assert one_line(error)


def test_a_list_of_right_images_of_another_form_is_refused(tmp_path):
    for found in (np.ones(3), np.ones((2, 2), bool), np.array(True)):
        (tmp_path / "right.npz").write_bytes(npz(**{"m/clean": found}))
        with pytest.raises(common.UserError, match="damaged"):
            common.read_right(tmp_path / "right.npz")


@pytest.mark.parametrize("read", [common.load_split, common.read_right])
def test_a_pickle_inside_an_array_file_is_refused_and_not_executed(tmp_path, read):
    trap = np.array([helpers.CreatesFile(tmp_path / "executed")], dtype=object)
    (tmp_path / "file.npz").write_bytes(npz(**{**helpers.tiny_split(), "train": trap, "m/c": trap}))
    with pytest.raises(common.UserError):
        read(tmp_path / "file.npz")
    assert not (tmp_path / "executed").exists()


def test_a_quick_split_is_not_mixed_with_full_results(error_line, tmp_path, split):
    assert "was made with --quick" in error_line(q2_train_ce.main, "--results", tmp_path)


@pytest.mark.parametrize(
    "provenance, reason",
    [
        ({"question": "q2", "split_sha256": "0" * 64}, "another split"),
        ({"question": "q6"}, "belongs to question q6"),
    ],
)
def test_a_model_of_another_split_or_question_is_refused(
    error_line, tmp_path, split, random_images, provenance, reason
):
    provenance = {"split_sha256": split["sha256"], **provenance}
    content = helpers.torch_bytes(helpers.small_checkpoint(provenance=provenance))
    common.write_file(tmp_path / "q2" / "model.pt", content)
    line = error_line(q3_attack.main, "--quick", "--results", tmp_path)
    assert reason in line and "q2_train_ce.py" in line and "--quick" in line


def changed_weights(**changes):
    return {"weights": {**helpers.small_checkpoint()["weights"], **changes}}


@pytest.mark.parametrize(
    "change",
    [
        {"stem": "vgg"},
        {"num_outputs": 10**9},  # building it would fill the memory
        {"provenance": None},
        {"weights": {}},
        changed_weights(**{"head.bias": torch.full((10,), torch.nan)}),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_network_is_refused(tmp_path, change):
    (tmp_path / "model.pt").write_bytes(helpers.torch_bytes(helpers.small_checkpoint(**change)))
    with pytest.raises(common.UserError, match="model.pt is damaged") as error:
        common.load_checkpoint(tmp_path / "model.pt")
    assert one_line(error)


def test_a_changed_letter_inside_a_checkpoint_is_noticed(tmp_path):
    content = helpers.torch_bytes(helpers.small_checkpoint())
    assert content.count(b"split_sha256") == 1
    (tmp_path / "model.pt").write_bytes(content.replace(b"split_sha256", b"split_sha255"))
    with pytest.raises(common.UserError, match="wrong checksum"):
        common.load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("write", [pickle.dumps, helpers.torch_bytes])
def test_a_malicious_checkpoint_or_state_is_refused_and_not_executed(tmp_path, write):
    trap = {"provenance": helpers.CreatesFile(tmp_path / "executed")}
    model = tmp_path / "model.pt"
    for path in (model, common.state_file_of(model)):
        path.write_bytes(write({**helpers.small_checkpoint(), **trap, "recipe": trap}))
    with pytest.raises(common.UserError, match="damaged or not ours"):
        common.load_checkpoint(model)
    with pytest.raises(common.UserError, match="damaged or not ours"):
        helpers.train_linear(model)
    assert not (tmp_path / "executed").exists()


def test_an_archive_that_declares_more_than_our_files_hold_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "MAX_BYTES", 10**6)
    with zipfile.ZipFile(tmp_path / "split.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.npy", bytes(2 * 10**6))
    with pytest.raises(common.UserError, match="more than our files ever hold"):
        common.load_split(tmp_path / "split.npz")


@helpers.posix
@pytest.mark.parametrize("kind", ["fifo", "device", "large"])
def test_only_regular_files_of_a_possible_size_are_read(tmp_path, kind):
    path = tmp_path / "model.pt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 10**9)  # takes no space
    with pytest.raises(common.UserError, match="too large, or no regular file"):
        common.load_checkpoint(path)


@pytest.mark.parametrize("mistake", [NameError, torch.OutOfMemoryError])
def test_our_own_mistakes_and_a_full_gpu_are_not_called_damage(tmp_path, mistake):
    (tmp_path / "metrics.json").write_bytes(b"{}")
    with pytest.raises(mistake), common.opened(tmp_path / "metrics.json"):
        raise mistake


# ---- Writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, reason", [("file", "is no folder, or a link"), ("file/below", "cannot write")]
)
def test_a_results_folder_that_cannot_be_written_is_named(tmp_path, place, reason):
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / place / "split.npz"
    with pytest.raises(common.UserError, match=reason) as error:
        common.write_file(path, b"content")
    assert str(path) in str(error.value) and one_line(error)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("function, number", [("fsync", errno.ENOSPC), ("replace", errno.EACCES)])
def test_a_full_disk_or_a_held_file_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, function, number
):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    common.write_file(tmp_path / "metrics.json", b"old")
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(common.UserError, match=os.strerror(number)) as error:
        common.write_file(tmp_path / "metrics.json", b"new")
    assert one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_bytes() == b"old"


def test_a_file_that_a_virus_scanner_holds_is_tried_again_for_a_while(tmp_path, monkeypatch):
    original, waited = os.replace, []

    def refuse(source, target):
        if len(waited) < 3:
            raise PermissionError(errno.EACCES, "held")
        original(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(common.time, "sleep", waited.append)
    common.write_file(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"


@helpers.posix
def test_a_planted_link_is_neither_followed_nor_left(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "file.part").symlink_to(tmp_path / "victim")
    common.write_file(tmp_path / "file", b"content")
    assert (tmp_path / "victim").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "victim"]
    assert not (tmp_path / "file").is_symlink()


# ---- Training ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_epochs_before(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(common, "STATE_EVERY", 0)
    factors = iter([1, 1, 1, 1, torch.nan, 1])

    def step(model, points, labels, generator, recipe):
        return model(points).sum() * next(factors), torch.tensor(0)

    with pytest.raises(common.UserError, match="nan in epoch 2, step 2") as error:
        helpers.train_linear(tmp_path / "model.pt", step=step, lr=0.25)
    assert one_line(error) and "rate, now 0.25" in str(error.value)
    state = torch.load(common.state_file_of(tmp_path / "model.pt"), weights_only=True)
    assert len(state["history"]) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_a_training_loss_out_of_all_proportion_to_the_first_stops(tmp_path, sign):
    factors = iter([0.5, 0.5, 0.5, 0.5, sign * 2e3, 0.5])

    def step(model, points, labels, generator, recipe):
        return next(factors) + 0 * model(points).sum(), torch.tensor(0)

    with pytest.raises(common.UserError, match="in epoch 2, step 2"):
        helpers.train_linear(tmp_path / "model.pt", step=step)


def test_a_large_loss_from_the_first_step_on_does_not_stop(tmp_path):
    def step(model, points, labels, generator, recipe):
        return 1e6 + 0 * model(points).sum(), torch.tensor(0)

    assert helpers.train_linear(tmp_path / "model.pt", step=step)["history"][1]["loss"] == 1e6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_validation_loss_stops_where_it_is_not_finite(tmp_path, value):
    """Otherwise it would end hours later as a traceback: metrics.json holds no NaN."""
    with pytest.raises(common.UserError, match="epoch 1"):
        helpers.train_linear(tmp_path / "model.pt", evaluate=lambda model: {"val_loss": value})


def test_old_numbers_go_before_a_new_model_comes(tmp_path):
    common.write_metrics(tmp_path, {}, {"models": {}})
    training = {**helpers.train_linear(tmp_path / "linear.pt"), "notes": []}
    common.save_trained(tmp_path / "model.pt", common.resnet18(10, "imagenet"), training)
    assert not (tmp_path / "metrics.json").exists()


# ---- The awkward machine -------------------------------------------------------------------------


def test_what_files_say_reaches_the_terminal_escaped(capsys):
    accuracy = dict.fromkeys(common.CONDITIONS, 0.5)
    model = {"accuracy": accuracy, "strongest_images": 100, "warnings": ["bad\x07"]}
    common.print_conditions("A title", {"a\x1b[31m": model})
    assert capsys.readouterr().out.replace("\n", "").isprintable()


@helpers.posix
def test_the_home_folder_is_found_behind_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["script.py", "--data=~/cifar", "--results=~/out"])
    args = common.parse_arguments(common.argument_parser("A script."))
    assert (args.data, args.results) == (tmp_path / "cifar", tmp_path / "out")


def test_the_callers_settings_of_matplotlib_change_no_figure_and_are_not_changed(tmp_path):
    """Those of a settings file, and those of a notebook that runs a script in its process."""
    settings = {"text.usetex": True, "axes.facecolor": "black", "savefig.dpi": 9, "axes.grid": True}
    lines = [f"{name}: {value}\n" for name, value in settings.items()]
    (tmp_path / "matplotlibrc").write_text("".join(lines))
    code = (
        "import matplotlib, common\n"
        "matplotlib.rcParams['font.size'] = 30\n"
        "before = dict(matplotlib.rcParams)\n"
        "assert before['text.usetex'] and before['savefig.dpi'] == 9\n"
        "common.plot_lines('own.png', [0, 1], {'a': [1, 2]}, 'x', 'y')\n"
        "assert dict(matplotlib.rcParams) == before\n"
    )
    backend = "module://not_installed.inline"  # as where a notebook's kernel has left it
    finished = helpers.run_code(code, tmp_path, MPLBACKEND=backend)
    assert finished.returncode == 0, finished.stderr
    common.plot_lines(tmp_path / "plain.png", [0, 1], {"a": [1, 2]}, "x", "y")
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


@pytest.mark.parametrize("known", [True, False])
def test_umaps_compiler_has_a_place_to_write_also_for_an_unknown_user(monkeypatch, tmp_path, known):
    """As in a container, where the folder of the packages cannot be written either."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")  # so that monkeypatch puts back what there was
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    home = str(tmp_path) if known else "~"  # which expanduser leaves as it is, if HOME is unset
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", home))
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) == str(tmp_path))
    common._give_numba_a_cache()
    assert ("NUMBA_CACHE_DIR" in os.environ) != known
    if not known:
        assert Path(os.environ["NUMBA_CACHE_DIR"]).is_dir()


@pytest.mark.parametrize(
    "features, said",
    [
        (torch.rand(15, 8), "more than 15 points"),
        (torch.full((40, 8), torch.nan), "more than 15 points"),
        (torch.full((40, 8), torch.inf), "more than 15 points"),
        (torch.ones(40, 8), "collapsed"),
    ],
)
def test_features_of_which_there_is_no_map_are_a_value_error(features, said):
    with pytest.raises(ValueError, match=said):
        common.fit_umap(features, 0)


def test_a_map_leaves_torch_the_threads_it_had(monkeypatch):
    """With more of them than processors, what follows takes ten times as long."""

    class Compiled:
        embedding_ = None

        def __init__(self, **settings):
            pass

        def fit(self, features):
            torch.set_num_threads(torch.get_num_threads() + 1)

    monkeypatch.setattr("umap.UMAP", Compiled)
    before = torch.get_num_threads()
    common.fit_umap(torch.rand(20, 4), 0)
    assert torch.get_num_threads() == before
