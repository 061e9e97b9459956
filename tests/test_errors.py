"""Bad input of every kind: one line that begins with "error: ", exit status 2, and nothing executed
or lost."""

import contextlib
import errno
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
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
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))


@pytest.fixture
def random_images(monkeypatch):
    """60,000 images that need no file: the same noise again and again."""
    noise = torch.randint(
        0, 256, (100, 3, 32, 32), generator=torch.Generator().manual_seed(0)
    ).byte()
    monkeypatch.setattr(
        common, "load_cifar10", lambda root: (noise.repeat(600, 1, 1, 1), torch.arange(60_000) % 10)
    )


@pytest.fixture
def split(tmp_path):
    """A quick split in tmp_path/q1, read back."""
    q1_split.save_split(tmp_path / "q1" / "split.npz", **helpers.tiny_split())
    return common.load_split(tmp_path / "q1" / "split.npz")


@pytest.fixture
def question_2(tmp_path, split):
    """A checkpoint of question 2 for that split, in its place."""
    origin = {"question": "q2", "split_sha256": split["sha256"]}
    common.write_file(
        tmp_path / "q2" / "model.pt",
        helpers.torch_bytes(helpers.small_checkpoint(provenance=origin)),
    )
    return tmp_path / "q2" / "model.pt"


def one_line(error):
    return "\n" not in str(error.value)


# ---- Flags -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, flags, named",
    [
        (q1_split, ["--protocol", "random"], "--protocol"),
        (q1_split, ["--seed", "-1"], "--seed"),
        (q1_split, ["--seed", "1e3"], "--seed"),
        (q1_split, ["--device", "tpu"], "--device"),
        (q2_train_ce, ["--epochs", "0"], "--epochs"),
        (q2_train_ce, ["--epochs", "many"], "--epochs"),
        (q2_train_ce, ["--batch-size", "-5"], "--batch-size"),
        (q2_train_ce, ["--lr", "nan"], "--lr"),
        (q2_train_ce, ["--lr", "0"], "--lr"),
        (q2_train_ce, ["--lr", "inf"], "--lr"),
        (q2_train_ce, ["--stem", "vgg"], "--stem"),
        (q4_adv_train, ["--lr-perturbed", "0"], "--lr-perturbed"),
        (q4_adv_train, ["--noise", "0"], "--noise"),
        (q6_angular, ["--precision", "int8"], "--precision"),
        (q3_attack, ["--epochs", "3"], "--epochs"),
        (q3_attack, ["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_flag_with_a_wrong_value_is_named(error_line, tmp_path, script, flags, named):
    assert named in error_line(script.main, "--results", tmp_path, *flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_device_is_named(error_line, tmp_path):
    assert "--device auto" in error_line(q1_split.main, "--results", tmp_path, "--device", "cuda")


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


NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nFor debugging..."


def test_a_gpu_too_old_for_pytorch_stays_unused_with_a_line_that_says_so(
    broken_gpu, monkeypatch, tmp_path, capsys
):
    broken_gpu(torch.AcceleratorError(NO_KERNEL))
    monkeypatch.setattr("sys.argv", ["script.py", "--results", str(tmp_path)])
    args = common.parse_arguments(common.argument_parser("A script."))
    assert args.device == "cpu"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("no kernel image is available for execution on the device")


def test_a_gpu_too_old_that_is_asked_for_is_refused(broken_gpu, monkeypatch, tmp_path, capsys):
    broken_gpu(torch.AcceleratorError(NO_KERNEL))
    monkeypatch.setattr("sys.argv", ["script.py", "--results", str(tmp_path), "--device", "cuda"])
    with pytest.raises(common.UserError, match="--device auto"):
        common.parse_arguments(common.argument_parser("A script."))


def test_a_gpu_whose_memory_is_full_ends_in_one_line(broken_gpu, error_line, tmp_path):
    broken_gpu(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert "--device cpu" in error_line(q1_split.main, "--results", tmp_path)


def test_the_report_needs_no_gpu(broken_gpu, error_line, tmp_path):
    broken_gpu(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert "holds no results" in error_line(report.main, "--results", tmp_path)


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


def test_a_script_run_from_a_shell_ends_with_one_line_and_status_2(tmp_path):
    finished = subprocess.run(
        helpers.script("q2_train_ce.py", "--results", tmp_path), capture_output=True, text=True
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert "python q1_split.py" in finished.stderr


@pytest.mark.parametrize(
    "script, flags",
    [
        (q2_train_ce, ["--batch-size", "21"]),  # the split has 20 training images
        (q2_train_ce, ["--batch-size", "1"]),  # batch-norm of one image whose map is 1 x 1
        (q4_adv_train, ["--batch-size", "21"]),
        (q6_angular, ["--batch-size", "25"]),  # not as many of each class
        (q6_angular, ["--batch-size", "10"]),  # no pairs
        (q6_angular, ["--batch-size", "1000"]),  # more than there are
    ],
)
def test_a_batch_size_that_cannot_work_is_refused(
    error_line, tmp_path, question_2, random_images, script, flags
):
    assert "--batch-size" in error_line(script.main, "--quick", "--results", tmp_path, *flags)


# ---- Files that are missing --------------------------------------------------------------------


def test_missing_data_without_network_is_explained(error_line, tmp_path, no_network):
    line = error_line(q1_split.main, "--results", tmp_path / "results", "--data", tmp_path / "data")
    assert str(tmp_path / "data") in line and "no network" in line and "--data" in line


@pytest.mark.parametrize("script", [q2_train_ce, q3_attack, q4_adv_train, q6_angular])
@pytest.mark.parametrize("mode", [[], ["--quick"]], ids=["full", "quick"])
def test_a_missing_split_is_explained(error_line, tmp_path, script, mode):
    line = error_line(script.main, "--results", tmp_path, *mode)
    assert line.endswith(" ".join(["python q1_split.py --results", str(tmp_path), *mode]))


def test_a_missing_model_is_explained(error_line, tmp_path, split, random_images):
    assert "python q2_train_ce.py --results" in error_line(
        q3_attack.main, "--quick", "--results", tmp_path
    )


def test_imagenet_weights_without_network_are_explained(
    error_line, tmp_path, question_2, random_images, no_network
):
    line = error_line(q6_angular.main, "--quick", "--results", tmp_path, "--init", "imagenet")
    assert "no network" in line and "--init q2" in line


@pytest.mark.parametrize("content", [b"", b"PK", b"broken"])
def test_a_damaged_file_in_the_cache_of_imagenet_weights_is_named(
    error_line, tmp_path, question_2, random_images, no_network, content
):
    cached = tmp_path / "cache" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    common.write_file(cached, content)
    assert str(cached) in error_line(
        q6_angular.main, "--quick", "--results", tmp_path, "--init", "imagenet"
    )


@pytest.mark.parametrize("script", [q4_adv_train, q6_angular])
@pytest.mark.parametrize("init", ["q2", "scratch"])
def test_questions_4_and_6_begin_with_question_2_or_its_stem(
    split, question_2, tmp_path, script, init
):
    model, stem, parents = script.first_model(helpers.tiny_args(init=init, results=tmp_path), split)
    assert stem == "imagenet"
    assert parents == ([common.sha256(question_2.read_bytes())] if init == "q2" else [])
    assert (model.backbone.layer1[0].conv1.weight == 0).all() == (init == "q2")


def test_a_checkpoint_to_start_from_must_exist_and_be_of_this_split(
    error_line, tmp_path, question_2, random_images
):
    flags = ("--quick", "--results", tmp_path, "--init", tmp_path / "other.pt")
    assert "other.pt" in error_line(q6_angular.main, *flags)
    (tmp_path / "other.pt").write_bytes(helpers.torch_bytes(helpers.small_checkpoint()))
    assert "another split" in error_line(q6_angular.main, *flags)


# ---- Files that are damaged --------------------------------------------------------------------


def test_truncated_data_is_refused(error_line, cifar10, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for path in (cifar10 / folder.name).iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "test_batch").unlink()
    (folder / "test_batch").write_bytes((cifar10 / folder.name / "test_batch").read_bytes()[:-1000])
    assert str(folder) in error_line(
        q1_split.main, "--results", tmp_path / "results", "--data", tmp_path
    )


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
        {"train": np.arange(20, dtype=np.int32)},
        {"train": np.array([], dtype=np.int64)},
        {"train": np.arange(20).reshape(4, 5)},
        {"train": np.array([-1, 3])},
        {"train": np.array([3, 60_000])},
        {"seed": 0.5},
        {"quick": 1},
        {"seed": np.arange(2)},
    ],
    ids=[
        "overlap",
        "twice",
        "float",
        "int32",
        "empty",
        "2-D",
        "negative",
        "too large",
        "seed",
        "quick",
        "two seeds",
    ],
)
def test_an_array_file_that_is_no_split_is_refused(tmp_path, change):
    (tmp_path / "split.npz").write_bytes(npz(**{**helpers.tiny_split(), **change}))
    with pytest.raises(common.UserError, match="q1_split.py") as error:
        common.load_split(tmp_path / "split.npz")
    assert one_line(error)


def test_a_split_that_is_cut_off_or_empty_or_lacks_a_part_is_refused(tmp_path):
    whole = npz(**helpers.tiny_split())
    lacking = npz(**{name: value for name, value in helpers.tiny_split().items() if name != "val"})
    for content in (whole[:-1], whole[: len(whole) // 2], b"", b"PK", lacking):
        (tmp_path / "split.npz").write_bytes(content)
        with pytest.raises(common.UserError, match="damaged") as error:
            common.load_split(tmp_path / "split.npz")
        assert one_line(error)


def test_a_split_with_a_pickle_inside_is_refused_and_not_executed(tmp_path):
    trap = np.array([helpers.CreatesFile(tmp_path / "executed")], dtype=object)
    (tmp_path / "split.npz").write_bytes(npz(**{**helpers.tiny_split(), "train": trap}))
    with pytest.raises(common.UserError):
        common.load_split(tmp_path / "split.npz")
    assert not (tmp_path / "executed").exists()


def test_a_quick_split_is_not_mixed_with_full_results(error_line, tmp_path, split):
    assert "was made with --quick" in error_line(q2_train_ce.main, "--results", tmp_path)


@pytest.mark.parametrize(
    "provenance, reason",
    [
        ({"question": "q2", "split_sha256": "0" * 64}, "another split"),
        ({"question": "q6"}, "belongs to question q6"),
        ({}, "belongs to question None"),
    ],
)
def test_a_model_of_another_split_or_question_is_refused(
    error_line, tmp_path, split, random_images, provenance, reason
):
    provenance = {"split_sha256": split["sha256"], **provenance}
    common.write_file(
        tmp_path / "q2" / "model.pt",
        helpers.torch_bytes(helpers.small_checkpoint(provenance=provenance)),
    )
    line = error_line(q3_attack.main, "--quick", "--results", tmp_path)
    assert reason in line and "q2_train_ce.py" in line and "--quick" in line


def changed_weights(**changes):
    return {"weights": {**helpers.small_checkpoint()["weights"], **changes}}


@pytest.mark.parametrize(
    "change",
    [
        {"stem": "vgg"},
        {"num_outputs": 11},
        {"num_outputs": 0},
        {"provenance": None},
        {"weights": {}},
        changed_weights(extra=torch.zeros(1)),
        changed_weights(**{"head.bias": torch.full((10,), torch.nan)}),
        changed_weights(**{"head.bias": torch.zeros(10, dtype=torch.float64)}),
        changed_weights(**{"head.bias": torch.zeros(9)}),
        changed_weights(**{"head.bias": "zero"}),
    ],
    ids=[
        "stem",
        "outputs",
        "no outputs",
        "provenance",
        "no weights",
        "more weights",
        "nan",
        "dtype",
        "shape",
        "text",
    ],
)
def test_a_checkpoint_that_does_not_fit_its_network_is_refused(tmp_path, change):
    (tmp_path / "model.pt").write_bytes(helpers.torch_bytes(helpers.small_checkpoint(**change)))
    with pytest.raises(common.UserError, match="model.pt") as error:
        common.load_checkpoint(tmp_path / "model.pt")
    assert one_line(error)


def test_a_checkpoint_cannot_make_us_build_a_network_that_fills_the_memory(tmp_path, monkeypatch):
    (tmp_path / "model.pt").write_bytes(
        helpers.torch_bytes({**helpers.small_checkpoint(), "num_outputs": 10**9})
    )
    built = []
    monkeypatch.setattr(common, "resnet18", lambda num_outputs, stem: built.append(num_outputs))
    with pytest.raises(common.UserError):
        common.load_checkpoint(tmp_path / "model.pt")
    assert built == []


def test_a_changed_letter_inside_a_checkpoint_is_noticed(tmp_path):
    content = helpers.torch_bytes(helpers.small_checkpoint())
    assert content.count(b"split_sha256") == 1
    (tmp_path / "model.pt").write_bytes(content.replace(b"split_sha256", b"split_sha255"))
    with pytest.raises(common.UserError, match="damaged"):
        common.load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("write", [pickle.dumps, helpers.torch_bytes])
def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path, write):
    (tmp_path / "model.pt").write_bytes(
        write(
            {**helpers.small_checkpoint(), "provenance": helpers.CreatesFile(tmp_path / "executed")}
        )
    )
    with pytest.raises(common.UserError, match="damaged or not ours"):
        common.load_checkpoint(tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()


def test_a_malicious_training_state_is_refused_and_not_executed(tmp_path):
    (tmp_path / "training.pt").write_bytes(
        helpers.torch_bytes({"recipe": helpers.CreatesFile(tmp_path / "executed")})
    )
    with pytest.raises(common.UserError, match="--fresh"):
        helpers.train_linear(torch.nn.Linear(4, 2), tmp_path / "training.pt")
    assert not (tmp_path / "executed").exists()


def test_a_file_far_too_large_is_not_read(tmp_path):
    with open(tmp_path / "model.pt", "wb") as file:
        file.truncate(10**9)  # takes no space
    with pytest.raises(common.UserError, match="too large"):
        common.load_checkpoint(tmp_path / "model.pt")


def test_metrics_of_another_split_are_not_compared(tmp_path):
    common.write_metrics(tmp_path / "q4", {"split_sha256": "0" * 64}, {"models": {}})
    assert common.measured_before(helpers.tiny_args(results=tmp_path), {"sha256": "0" * 64}) == {}
    with pytest.raises(common.UserError, match="another split"):
        common.measured_before(helpers.tiny_args(results=tmp_path), {"sha256": "1" * 64})


@pytest.mark.parametrize("content", [b"", b"[3]", b"{", b"\xff", b"7"])
def test_metrics_that_are_no_metrics_are_refused(tmp_path, content):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(common.UserError, match="q4_adv_train.py") as error:
        common.read_metrics(tmp_path / "metrics.json", "python q4_adv_train.py")
    assert one_line(error)


def test_a_report_without_results_is_refused(error_line, tmp_path):
    assert "python q1_split.py" in error_line(report.main, "--results", tmp_path)


def test_a_report_on_metrics_that_lack_something_is_refused(error_line, tmp_path):
    common.write_metrics(tmp_path / "q2", {"split_sha256": "0" * 64}, {})
    assert "python q2_train_ce.py" in error_line(report.main, "--results", tmp_path)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"split_sha256": "1" * 64}, "different split"),
        ({"seed": 1}, "different seed"),
        ({"quick": True}, "different mode"),
        ({"parent_sha256": ["2" * 64]}, "began with another model"),
        ({"models": {"m": {"stem": "cifar"}}}, "different stem"),
    ],
)
def test_a_report_does_not_mix_what_cannot_be_compared(error_line, tmp_path, change, reason):
    origin = {"split_sha256": "0" * 64, "seed": 0, "quick": False, "parent_sha256": ["1" * 64]}
    common.write_metrics(tmp_path / "q1", origin, {})
    common.write_metrics(
        tmp_path / "q2",
        origin,
        {"models": {"m": {"sha256": "1" * 64, "recipe": {"stem": "stride2"}}}},
    )
    common.write_metrics(
        tmp_path / "q3", {**origin, "models": {"m": {"stem": "stride2"}}, **change}, {}
    )
    line = error_line(report.main, "--results", tmp_path)
    assert reason in line and "python q3_attack.py" in line


@pytest.mark.parametrize("init, refused", [("q2", True), ("chosen.pt", False)])
def test_a_report_wants_question_6_to_begin_with_the_present_question_2_unless_a_file_was_chosen(
    tmp_path, init, refused
):
    origin = {"split_sha256": "0" * 64, "seed": 0, "quick": False}
    found = {
        "q2": {**origin, "models": {"m": {"sha256": "1" * 64, "recipe": {"stem": "stride2"}}}},
        "q6": {**origin, "init": init, "parent_sha256": ["2" * 64]},
    }
    with (
        pytest.raises(common.UserError, match="python q6_angular.py")
        if refused
        else contextlib.nullcontext()
    ):
        report.refuse_mixtures(found, helpers.tiny_args(results=tmp_path))


def test_a_report_that_lacks_a_figure_leaves_the_old_one(error_line, tmp_path, monkeypatch):
    (tmp_path / "report.md").write_text("old")
    monkeypatch.setattr(report, "read_results", lambda args: {})
    monkeypatch.setattr(
        report,
        "assemble",
        lambda *arguments: [("title", "Report"), ("figure", "q3/figure08_umap.png", "Figure 8")],
    )
    monkeypatch.setattr(report, "refuse_mixtures", lambda found, args: None)
    line = error_line(report.main, "--results", tmp_path, "--quick")
    assert line.endswith(f"python q3_attack.py --results {tmp_path} --quick")
    assert (tmp_path / "report.md").read_text() == "old"
    assert not list(tmp_path.glob("report.html*"))


@pytest.mark.parametrize("seed, target", list(enumerate(helpers.FUZZ_TARGETS)))
def test_randomly_damaged_files_are_noticed(tmp_path, seed, target):
    helpers.assert_survives_fuzzing(target, tmp_path, number=25, seed=seed)


def test_randomly_damaged_flags_are_noticed(monkeypatch, tmp_path, capsys):
    helpers.assert_flags_survive_fuzzing(monkeypatch, tmp_path, number=50, seed=0)
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


# ---- Writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_a_results_folder_that_cannot_be_written_is_noticed_at_once(error_line, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in error_line(q1_split.main, "--results", tmp_path / place)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    common.write_file(tmp_path / "metrics.json", b"old")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(common.UserError, match="No space left on device") as error:
        common.write_file(tmp_path / "metrics.json", b"new")
    assert one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_bytes() == b"old"


@helpers.posix
def test_a_disk_without_room_for_a_trainings_state_is_noticed_before_its_first_epoch(tmp_path):
    import resource

    def step(*args):
        raise AssertionError("training has begun")

    (tmp_path / "model.pt").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 10**6, hard))
    try:
        with pytest.raises(common.UserError, match="cannot write 179 MB.*make room") as error:
            common.train(
                common.resnet18(10, "imagenet"),
                helpers.tiny_data()["train"],
                step,
                common.shuffled_batches,
                None,
                helpers.tiny_recipe(),
                tmp_path / "training.pt",
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(error)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


# ---- Training ----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_its_epoch_and_step_and_keeps_the_epochs_before(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(common, "STATE_EVERY", 0)
    steps = []

    def step(model, images, labels, generator, recipe):
        steps.append(None)
        return model(torch.ones(1, 4)).sum() * (torch.nan if len(steps) == 5 else 1), torch.tensor(
            0
        )

    with pytest.raises(common.UserError, match="nan in epoch 2, step 2") as error:
        helpers.train_linear(torch.nn.Linear(4, 2), tmp_path / "training.pt", step, lr=0.25)
    assert one_line(error) and "rate, now 0.25" in str(error.value)
    assert len(torch.load(tmp_path / "training.pt", weights_only=True)["history"]) == 1


def test_a_validation_loss_that_is_not_finite_stops_too(tmp_path):
    """Otherwise it would end hours later as a traceback: metrics.json holds no NaN."""
    with pytest.raises(common.UserError, match="epoch 1"):
        helpers.train_linear(
            torch.nn.Linear(4, 2),
            tmp_path / "training.pt",
            evaluate=lambda model: {"val_loss": float("nan")},
        )


# ---- The awkward machine -----------------------------------------------------------------------


def test_what_files_say_reaches_the_terminal_escaped(capsys):
    name = "a\x1b[31m"
    common.print_conditions("A title", {name: {**SOUND, "warnings": ["bad\x07"]}})
    assert capsys.readouterr().out.replace("\n", "").isprintable()


def test_ctrl_c_advises_a_command_for_a_shell_that_keeps_the_finished_epochs(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["q2_train_ce.py", "--fresh", "--results", "my res"])
    with pytest.raises(SystemExit) as end:
        common.run(interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith("python q2_train_ce.py --results 'my res'\n")


def test_the_command_that_makes_a_file_is_quoted_and_names_data_and_seed():
    args = helpers.tiny_args(data=Path("my data"), results=Path("my res"), seed=3)
    expected = "--data 'my data' --results 'my res' --seed 3 --quick"
    assert common.script_command("q3", args) == f"python q3_attack.py {expected}"
    assert "--seed" not in common.script_command("q1", args)  # the split is seed 0's


@helpers.posix
def test_the_home_folder_is_found_behind_an_equals_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["script.py", "--data=~/cifar", "--results=~/out"])
    args = common.parse_arguments(common.argument_parser("A script."))
    assert (args.data, args.results) == (tmp_path / "cifar", tmp_path / "out")


def test_figures_need_no_backend(tmp_path):
    code = (
        "import common\n"
        f"common.run(lambda: common.plot_lines({str(tmp_path / 'a.png')!r}, [0, 1], "
        "{'a': [1, 2]}, 'x', 'y'))"
    )
    finished = helpers.run_code(code, MPLBACKEND="module://not_installed.backend_inline")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@helpers.posix
def test_a_file_system_that_cannot_flush_folders_is_written_to(tmp_path, monkeypatch):
    original = os.open

    def refuse_folders(path, *arguments, **options):
        if Path(path).is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse_folders)
    common.write_file(tmp_path / "file", b"content")
    with common.only_one(tmp_path):
        pass
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("flag", ["--data", "--results"])
def test_a_name_too_long_for_the_file_system_ends_in_a_line(error_line, tmp_path, flag):
    flags = {"--data": tmp_path / "data", "--results": tmp_path / "results", flag: "x" * 300}
    words = [word for pair in flags.items() for word in pair]
    assert error_line(q1_split.main, *words)


@pytest.mark.parametrize("value", ["9" * 200_000, "1\n2\n3", "\x1b[31m7"])
def test_flags_of_any_kind_end_in_one_short_line_that_a_terminal_can_show(
    error_line, tmp_path, value
):
    line = error_line(q1_split.main, "--results", tmp_path, "--seed", value)
    assert "--seed" in line and len(line) < 1000 and line.isprintable()


@helpers.posix
def test_output_that_ends_early_ends_quietly(tmp_path):
    code = "import common\ncommon.run(lambda: [print('x' * 1000) for _ in range(1000)])"
    command = f'"{sys.executable}" -c "{code}" | head -n 1'
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert finished.stderr == "" and finished.stdout == "x" * 1000 + "\n"


def test_output_in_ascii_shows_other_letters_as_well_as_it_can():
    code = "import common\ncommon.run(lambda: print('\\u03b5'))"
    finished = helpers.run_code(code, PYTHONIOENCODING="ascii")
    assert finished.returncode == 0 and finished.stdout == "\\u03b5\n"


@helpers.posix
def test_two_trainings_in_one_folder_are_refused_in_a_line(tmp_path):
    with common.only_one(tmp_path):
        with pytest.raises(common.UserError, match="another process is training") as error:
            helpers.train_linear(torch.nn.Linear(4, 2), tmp_path / "training.pt")
        with common.only_one(tmp_path / "q4"):  # another question may
            pass
    assert one_line(error)
    helpers.train_linear(torch.nn.Linear(4, 2), tmp_path / "training.pt")


@helpers.posix
def test_a_planted_link_is_neither_followed_nor_left(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / f"file.{os.getpid()}.part").symlink_to(tmp_path / "victim")
    (tmp_path / "file.1.part").write_text("of a process that was killed")
    common.write_file(tmp_path / "file", b"content")
    assert (tmp_path / "victim").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "victim"]


@helpers.posix
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "model.pt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(common.UserError, match="model.pt"):
        common.load_checkpoint(path)


def test_an_archive_that_declares_gigabytes_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "split.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("train", "val", "test"):
            with archive.open(f"{part}.npy", "w") as member:
                for _ in range(100):
                    member.write(bytes(10**6))
    with pytest.raises(common.UserError, match="more than our files ever hold"):
        common.load_split(tmp_path / "split.npz")


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["model"]["weight"].fill_(torch.nan),
        lambda state: state["model"].update(weight=state["model"]["weight"].to_sparse()),
        lambda state: state["model"].update(weight=torch.zeros(()).expand(40_000, 40_000)),
        lambda state: state["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(1)),
        lambda state: state.update(history=[{"loss": "low"}]),
        lambda state: state.update(history=7),
        lambda state: state.update(history=[{"loss": float("inf")}]),
        lambda state: state.pop("best"),
    ],
    ids=["nan", "sparse", "huge", "momentum", "word", "number", "infinite", "lacking"],
)
def test_a_state_that_is_sound_as_a_file_but_not_in_content_is_refused(tmp_path, damage):
    path = tmp_path / "training.pt"
    helpers.train_linear(torch.nn.Linear(4, 2), path)
    state = torch.load(path, weights_only=True)
    damage(state)
    torch.save(state, path)
    with pytest.raises(common.UserError, match="--fresh") as error:
        helpers.train_linear(torch.nn.Linear(4, 2), path, epochs=2)
    assert one_line(error)


def test_a_state_of_adamw_with_moments_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "training.pt"
    helpers.train_linear(torch.nn.Linear(4, 2), path, optimizer="adamw")
    state = torch.load(path, weights_only=True)
    state["optimizer"]["state"][0].update(exp_avg_sq=torch.zeros(1))
    torch.save(state, path)
    with pytest.raises(common.UserError, match="another shape"):
        helpers.train_linear(torch.nn.Linear(4, 2), path, optimizer="adamw", epochs=2)


def test_a_loss_that_is_finite_but_absurd_stops_too(tmp_path):
    def step(model, points, labels, generator, recipe):
        return 1e7 + model(points).sum(), torch.tensor(0)

    with pytest.raises(common.UserError, match="in epoch 1, step 1"):
        helpers.train_linear(torch.nn.Linear(4, 2), tmp_path / "training.pt", step)


SOUND = {
    "accuracy": dict.fromkeys(common.CONDITIONS, 0.5),
    "strongest_images": 100,
    "warnings": [],
    "by_eps": {"eps": [0, 0.1], "fgm": [0.8, 0.5], "pgd": [0.8, 0.4]},
}


@pytest.mark.parametrize(
    "model",
    [
        {"accuracy": "high"},
        {"accuracy": {"clean": "high"}},
        {},
        7,
        {**SOUND, "accuracy": {}},
        {**SOUND, "by_eps": {}},
        {**SOUND, "by_eps": {**SOUND["by_eps"], "pgd": [0.8]}},
        {**SOUND, "by_eps": {**SOUND["by_eps"], "fgm": ["high", "low"]}},
    ],
)
def test_metrics_to_compare_with_are_tried_before_training(tmp_path, model):
    metrics = {"models": {"m": model}}
    common.write_metrics(tmp_path / "q4", {"split_sha256": "0" * 64}, {"models": {"m": SOUND}})
    args = helpers.tiny_args(results=tmp_path)
    assert common.measured_before(args, {"sha256": "0" * 64}) == {"m": SOUND}
    common.write_metrics(tmp_path / "q3", {"split_sha256": "0" * 64}, metrics)
    with pytest.raises(common.UserError, match="q3_attack.py") as error:
        common.measured_before(helpers.tiny_args(results=tmp_path), {"sha256": "0" * 64})
    assert one_line(error)


def test_old_numbers_go_before_a_new_model_comes(tmp_path):
    common.write_metrics(tmp_path, {}, {"models": {}})
    model = common.resnet18(10, "imagenet")
    common.save_trained(tmp_path, "model", model, [], helpers.tiny_recipe(), {})
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    "features", [torch.rand(15, 8), torch.full((40, 8), torch.nan), torch.full((40, 8), torch.inf)]
)
def test_features_of_which_there_is_no_map_are_a_value_error(features):
    with pytest.raises(ValueError, match="a map needs more than 15 points"):
        common.fit_umap(features, 0)


def test_figures_of_another_run_do_not_go_into_the_report(error_line, quick_run, tmp_path):
    results = shutil.copytree(quick_run.results, tmp_path / "results")
    figure = results / "q2" / "figure03_accuracy.png"
    for content in ((results / "q2" / "figure04_loss.png").read_bytes(), b""):
        figure.write_bytes(content)
        line = error_line(report.main, "--quick", "--results", results)
        assert "figure03_accuracy.png" in line and "of another run" in line
        assert "python q2_train_ce.py" in line


@helpers.posix
def test_ctrl_c_while_the_modules_load_ends_quietly():
    command = helpers.script("q1_split.py", "--help")
    status, seen = helpers.send_signal(command, signal.SIGINT, 0.4)
    assert status == -signal.SIGINT and seen == ""


@pytest.mark.parametrize("writable", [True, False])
def test_umaps_compiler_has_a_place_to_write(monkeypatch, writable):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    common._let_numba_cache()
    assert ("NUMBA_CACHE_DIR" in os.environ) != writable
    if not writable:
        assert Path(os.environ["NUMBA_CACHE_DIR"]).is_dir()


def test_a_map_leaves_torch_the_threads_it_had():
    """With more of them than processors, what follows takes ten times as long."""
    code = (
        "import torch, common\n"
        "points, place = common.fit_umap(torch.rand(20, 4), 0)\n"
        "place(torch.rand(3, 4)), print(torch.get_num_threads())"
    )
    finished = helpers.run_code(code, OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="3")
    assert finished.stdout == "1\n", finished.stderr


def test_common_can_be_imported_outside_the_main_thread():
    code = (
        "import threading\n"
        "thread = threading.Thread(target=lambda: print(__import__('common').CLASSES[0]))\n"
        "thread.start(), thread.join()"
    )
    finished = helpers.run_code(code)
    assert (finished.stdout, finished.stderr) == ("airplane\n", "")
