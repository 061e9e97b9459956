"""Is a results folder what it says? Measures it again, without training, for whoever grades it.

The split is drawn anew. Each model is measured on --images random test images, others every time,
under every condition, and compared image by image with what was reported. Other hardware decides
up to 0.4 % of the images otherwise; so 2 % may differ, and always a handful. Every file must belong
to those that it was made from. What is never checked stands below the table.

Exit status 0: what is there holds; missing questions are named. 1: something does not hold. 2:
nothing was found wrong, but something could not be checked, such as a model that was left out.
About seven minutes for the default on two cores of a Zen 3 EPYC.

Reads   a results folder, or the only one in the given folder; CIFAR-10
Writes  nothing; only CIFAR-10 is fetched if absent
Run     python verify.py --results FOLDER
"""

import argparse
import math
import re
import sys
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

import common
import q1_split
import q2_train_ce
import q3_attack
import q4_adv_train
import q6_angular
import report

MODELS = {  # the only files of weights that are opened
    ("q2", common.CROSS_ENTROPY): "q2/model.pt",
    ("q3", common.CROSS_ENTROPY): "q2/model.pt",
    ("q4", "perturbed (q4)"): "q4/perturbed.pt",
    ("q4", "perturbed + FGM (q4)"): "q4/perturbed_fgm_trained.pt",
    ("q6", q6_angular.MODEL): "q6/model.pt",
}
OUTPUTS = {"q2": 10, "q3": 10, "q4": 10, "q6": q6_angular.EMBEDDING}
FIGURES = {"q1": (1, 2), "q2": range(3, 7), "q3": (7, 8), "q4": range(9, 13), "q6": range(13, 17)}
UNCHECKED, ASK = "not checked", "to be asked about"  # where a row neither holds nor not

DIFFERING = 0.02  # share of the images that may be decided otherwise
POINTS = 0.005  # by which a share of the same images may differ: most of those cancel out
HANDFUL = 5  # images may differ in any case
ERRORS = 3  # standard errors are allowed where a share is of other images
SAMPLE = 2_000  # images of train, of validation, and of test for the parts of the perturbation
TOO_GOOD = 0.96  # nobody has reached more from 12,000 labels
UNMOVED = 0.001  # relative distance of weights that no training has moved
LARGEST, LONGEST = 100_000, 10_000  # words and numbers in a file, letters in one of them
VERDICTS = (  # by exit status
    "Everything that is there holds.",
    "Something does not hold.",
    "Nothing was found wrong, but not everything could be checked.",
)
NEVER_CHECKED = (
    "Never checked: whether a model was trained as its checkpoint says; the curves of the "
    "trainings, but for their length; times and machines; PGD at an epsilon other than 8/255; the "
    "attacks' check in float32; question 6's retrieval and its accuracy before training; what "
    "figures show; report.html (make report renders it anew), and of report.md what stands above "
    "the contents. Nor can this show that a folder is a friend's (equal seeds give equal files; "
    "equal seconds per epoch betray a copy), that all of validation and test was trained on, that "
    "a split's seed was chosen by trying, that a condition is off by a point or two, or an "
    "accuracy in L2 or after some steps of PGD by seven (more --images show that)."
)


def main():
    args = common.parse_arguments(parser())
    results, rows = folder_of(args.results), []
    split = attempt(rows, "q1", "the split", read, results, "q1/split.npz", common.load_split)
    if split is None:
        sys.exit(tell(rows, []))
    images, labels = common.load_cifar10(args.data)
    data = common.parts_of(images, labels, split, args.device)
    found, rights, checkpoints = read_folder(rows, results)
    missing = [part for part in (*FIGURES, "report.md") if not (results / part).exists()]
    q2 = found.get("q2", {})
    known = {"q2/model.pt": q2.get("q2_sha256")}  # where it was left out
    known |= {file: checkpoint["sha256"] for file, checkpoint in checkpoints.items()}
    say_how_long(checkpoints, args)

    q1 = split_rows(split, images, labels, found.get("q1"))
    attempt(rows, "q1", "the split", rows.extend, q1)
    for question, metrics in found.items():
        whole = question_rows(question, metrics, split, known, q2)
        attempt(rows, question, "metrics.json", rows.extend, whole)
        attempt(rows, question, "figures", rows.extend, figure_rows(question, metrics, results))
    rows += distance_rows(checkpoints)
    for (question, name), file in MODELS.items():
        if name in found.get(question, {}).get("models", {}):
            given = found[question], rights.get(question), checkpoints.get(file), known
            rows += model_rows(question, name, file, *given, data, args)
    referee = autoattack_rows(results, checkpoints, rights)
    attempt(rows, "all", "autoattack.json", rows.extend, referee)
    attempt(rows, "report", "report.md", rows.extend, report_rows(results))
    status = tell(rows, missing)
    print(f"Seed of the split: {split['seed']}; of the trainings: {q2.get('seed', 'unknown')}")
    sys.exit(status)


def parser():
    """This script's flags: what others must be told besides, the split tells."""
    layout = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    flags.set_defaults(quick=False, seed=0)
    add, devices = flags.add_argument, ("auto", "cuda", "mps", "cpu")
    precisions, count = ("auto", "float32", "bfloat16"), common.between(int, 1, 10**6)
    data = "folder of cifar-10-batches-py (data)"
    add("--data", type=common.folder, default=Path("data"), help=data)
    add("--results", type=common.folder, help="folder to check (results)")
    add("--device", choices=devices, default="auto", help="where to compute (auto)")
    add("--precision", choices=precisions, default="auto", help="of the backbone (auto)")
    add("--images", type=count, default=500, help="test images for each condition (500)")
    return flags


def folder_of(path):
    """The results folder: the given one, or the only one in it, where a zip has one too many."""
    inside = sorted(path.iterdir()) if path.is_dir() else []
    fitting = [place for place in (path, *inside) if (place / "q1" / "split.npz").exists()]
    if fitting and (fitting[0] == path or len(fitting) == 1):
        return fitting[0]
    several = f"; give one of: {', '.join(map(str, fitting))}" if fitting else ""
    raise common.UserError(f"{path} is no results folder: it has no q1/split.npz{several}")


def attempt(rows, question, what, function, *args):
    """What function(*args) returns; None, and a row that says why, where a file is not as it ought.

    With rows.extend and a generator, the rows before the first that cannot be made are kept.
    """
    try:
        return function(*args)
    except common.UserError as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        reason = "is not there" if missing else f"cannot be read ({error.__cause__ or error})"
        rows.append((question, what, "", reason, UNCHECKED if missing else False))
    except (*common.DAMAGE, OSError) as error:
        reason = f"has another form ({type(error).__name__}: {error})"
        rows.append((question, what, "", reason, False))


# ---- Reading ------------------------------------------------------------------------------------


def read_folder(rows, results):
    """metrics.json and right.npz by question, and checkpoints by file: those that can be read."""
    files = {key: f"{key}/metrics.json" for key in FIGURES if (results / key).exists()}
    found = read_all(rows, results, files, read_metrics)
    files = {key: f"{key}/right.npz" for key in found if key in ("q3", "q4", "q6")}
    rights = read_all(rows, results, files, common.read_right)
    files = {file: file for (question, _), file in MODELS.items() if question in found}
    return found, rights, read_all(rows, results, files, read_checkpoint)


def read_all(rows, results, files, reader):
    """What the reader makes of those files that it can read. files: dict from key to file."""
    contents = {
        key: attempt(rows, file[:2], file, read, results, file, reader)
        for key, file in files.items()
    }
    return {key: content for key, content in contents.items() if content is not None}


def read(results, file, reader):
    """What the reader makes of a file in the results folder. ValueError for one elsewhere."""
    if not (results / file).resolve().is_relative_to(results.resolve()):
        raise ValueError("a link out of the folder")
    return reader(results / file)


def read_metrics(path):
    """A metrics.json as a dict: `models` is a dict of dicts, `seed` a seed of ours."""
    metrics = {"models": {}, "seed": 0, **plain(common.read_metrics(path))}
    if not all(isinstance(model, dict) for model in metrics["models"].values()):
        raise ValueError("a model without numbers")
    if type(metrics["seed"]) is not int or not 0 <= metrics["seed"] < 2**31:
        raise ValueError("a seed that is none")
    return metrics


def read_checkpoint(path):
    """A checkpoint as common.read_checkpoint returns it, if what it says of itself is `plain`."""
    checkpoint = common.read_checkpoint(path)
    plain(checkpoint["provenance"])
    return checkpoint


def plain(value):
    """The value itself, if it is words and numbers in dicts and lists, and not endlessly many.

    In a checkpoint, lists that hold the next one twice make a small file fill any memory.
    """
    left, seen = [value], 0
    while left:
        part = left.pop()
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list):
            left += part
        elif not isinstance(part, (str, int, float, type(None))) or len(str(part)) > LONGEST:
            raise ValueError("neither words nor numbers")
        seen += 1
        if seen + len(left) > LARGEST:
            raise ValueError("more words and numbers than our files hold")
    return value


def say_how_long(checkpoints, args):
    """A line with an estimate, by the network."""
    minutes = {"imagenet": 2, "stride2": 7, "cifar": 20}
    for stem in sorted({checkpoint["stem"] for checkpoint in checkpoints.values()}):
        about = math.ceil(minutes[stem] * (0.5 + args.images / 1000))
        print(f"This takes about {about} minutes on two cores for a full run with stem {stem}")


# ---- Rows: question, what, what is reported, what was found, whether it holds -------------------


def differences(question, what, reported, found):
    """The row of what must be equal: two nested dicts and lists; the reported may hold more."""
    reported, found = leaves(reported), leaves(found)
    keys = [key for key in found if reported.get(key) != found[key]]
    told, seen = (
        "; ".join(shown(key, each.get(key)) for key in keys[:10]) for each in (reported, found)
    )
    return (question, what, told, seen or "the same", not keys)


def shares_row(question, what, reported, found, images, errors=0):
    """The row of shares that must be close: those that are furthest off, of all in `found`.

    images: of the found ones; errors: how many standard errors they may be off besides, where the
    reported ones are of other images.
    """
    reported, found, gaps = leaves(reported), leaves(found), {}
    for key, share in found.items():
        told = reported.get(key)
        if type(told) not in (int, float) or not 0 <= told <= 1:
            return (question, what, shown(key, told), "that is no share", False)
        room = max(POINTS, HANDFUL / images) + errors * common.standard_error(told, images)
        gaps[key] = abs(told - share) - room
    worst = max(gaps, key=gaps.get)
    cells = (shown(worst, common.percent(each[worst])) for each in (reported, found))
    return (question, what, *cells, gaps[worst] <= 0)


def leaves(value, path=()):
    """Nested dicts and lists as one dict: from tuples of keys, which lead to a value, to that."""
    if not isinstance(value, (dict, list)):
        return {path: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    inner = (leaves(part, (*path, key)) for key, part in parts)
    return {key: leaf for each in inner for key, leaf in each.items()}


def shown(path, value):
    """A leaf in words."""
    return f"{' '.join(map(str, path))} {value}".strip()


# ---- Rows of a question -------------------------------------------------------------------------


def split_rows(split, images, labels, metrics):
    """The split against what its seed draws, and what question 1 says of it (or None).

    images, labels: all 60,000.
    """
    how = {name: split[name] for name in ("protocol", "seed", "quick")}
    drawn = q1_split.draw_split(labels.numpy(), **how)
    same = all(np.array_equal(split[part].numpy(), indices) for part, indices in drawn.items())
    told = ", ".join(f"{name} {value}" for name, value in how.items())
    yield ("q1", "the split", told, f"these draw {'it' if same else 'another'}", same)
    if metrics:
        exact, near = q1_split.count_duplicates(images[split["train"]], images[split["test"]])
        duplicates = metrics["test_images_with_duplicate_in_train"]
        found = {
            "protocol": split["protocol"],
            "split_seed": split["seed"],
            **{f"n_{part}": len(split[part]) for part in drawn},
            "counts": {part: labels[split[part]].bincount(minlength=10).tolist() for part in drawn},
            "test_images_with_duplicate_in_train": {"exact": exact},
        }
        yield differences("q1", "what is said of it", metrics, found)
        holds = abs(duplicates["near"] - near) <= HANDFUL
        yield ("q1", "test images nearly in train", str(duplicates["near"]), str(near), holds)


def question_rows(question, metrics, split, known, q2):
    """Whether a question is of this split, of question 2's weights, seed and stem, and complete.

    q2: question 2's metrics, or {}.
    """
    found = {"question": question, "split_sha256": split["sha256"], "quick": split["quick"]}
    if question != "q1":
        found |= {key: q2[key] for key in ("seed", "stem") if key in q2}
        found["n_test"] = len(split["test"])
        found["models"] = " and ".join(sorted(name for key, name in MODELS if key == question))
        if metrics.get("init", "q2") == "q2" and known["q2/model.pt"]:
            found["q2_sha256"] = known["q2/model.pt"]
    told = {**metrics, "models": " and ".join(sorted(metrics["models"]))}
    yield differences(question, "its split and models", told, found)


def figure_rows(question, metrics, results):
    """A question's figures by their hashes, and whether it has those of the assignment."""
    told, paths = metrics["figures"], common.figures_in(results / question)
    there = {path.name: read(results, f"{question}/{path.name}", file_sha256) for path in paths}
    found = {name: there.get(name) for name in {**told, **there}}
    lacking = [
        number
        for number in FIGURES[question]
        if not any(name.startswith(f"figure{number:02}") for name in there)
    ]
    yield differences(question, "figures", {**told, "lacking": []}, {**found, "lacking": lacking})


def file_sha256(path):
    with common.opened(path) as content:
        return common.sha256(content.getbuffer())


def distance_rows(checkpoints):
    """How far any two models' weights are from each other, relative to the first's length."""
    for (first, one), (second, other) in combinations(checkpoints.items(), 2):
        weights = (each["model"].backbone.parameters() for each in (one, other))
        pairs = list(zip(*weights, strict=True))
        if all(a.shape == b.shape for a, b in pairs):
            moved = math.hypot(*((a - b).norm().item() for a, b in pairs))
            distance = moved / max(math.hypot(*(a.norm().item() for a, _ in pairs)), 1e-9)
            found = f"{common.percent(distance)} away from those of {first}"
            yield (second[:2], f"weights of {second}", "trained", found, distance > UNMOVED)


# ---- Rows of a model ----------------------------------------------------------------------------


def model_rows(question, name, file, metrics, rights, checkpoint, known, data, args):
    """All rows of a model. rights, checkpoint: None where the file cannot be read."""
    rows, model, (test, labels) = [], metrics["models"][name], data["test"]
    add = partial(attempt, rows, question, f"{name}: numbers", rows.extend)
    add(accuracy_rows(question, name, model, rights, len(labels)))
    if checkpoint is None:
        rows.append((question, f"{name}: measured again", "", f"needs {file}", UNCHECKED))
        return rows
    if question != "q3":
        add(training_rows(question, name, file, metrics, checkpoint, known))
    if checkpoint["model"].head.out_features != OUTPUTS[question]:
        return rows
    print(f"Measuring {name} for {question}", file=sys.stderr, flush=True)
    network = common.frozen(checkpoint["model"].to(args.device), args.precision)
    losses, decide = attack_on(question, network, data["train"])
    if question != "q3":
        train, val = (share_of_some(network, decide, *data[part]) for part in ("train", "val"))
        add(clean_rows(question, name, model, len(labels), train, val, metrics.get("quick")))
    if question == "q2":
        scores = {part: q2_train_ce.class_scores(network, *data[part]) for part in ("val", "test")}
        add(score_rows(name, model, scores))
        return rows
    seed = metrics["seed"]
    right, numbers = attacked(network, data["test"], losses, decide, seed, args.images)
    if question == "q3":
        parts = q3_attack.accuracy_by_part(network, test[:SAMPLE], labels[:SAMPLE], seed)
        numbers["parts of the perturbation"] = {"by_part": parts}, len(test[:SAMPLE]), ERRORS
    if question == "q6":
        numbers["validation"] = {"val": {"accuracy": val[0]}}, val[1], ERRORS
    add(image_rows(question, name, rights, right))
    add(number_rows(question, name, model, numbers))
    return rows


def accuracy_rows(question, name, model, rights, images):
    """Every condition has its accuracy: the mean of right.npz, which is of so many images."""
    if question == "q2":
        found = {"accuracy": {"clean": model["test"]["accuracy"]}}
    elif rights is None:
        return
    else:
        right, sizes = rights[name], dict.fromkeys(common.CONDITIONS, images)
        sizes["strongest"] = min(images, common.STRONGEST_IMAGES)
        if {condition: len(which) for condition, which in right.items()} != sizes:
            raise ValueError("right.npz is of other images")
        checked = min(images, common.CHECKED_IMAGES)
        checks = {attack: common.share(right[attack][:checked]) for attack in ("fgm", "pgd")}
        found = {
            "accuracy": {condition: common.share(right[condition]) for condition in sizes},
            "strongest_images": sizes["strongest"],
            "checks": {"images": checked, **checks},
        }
    yield differences(question, f"{name}: accuracies", model, found)


def training_rows(question, name, file, metrics, checkpoint, known):
    """What metrics.json says of a training against its checkpoint, and against itself."""
    model, origin, init = metrics["models"][name], checkpoint["provenance"], metrics.get("init")
    history, shared = model["history"], ("question", "split_sha256", "seed", "stem")
    kept = common.kept_epoch(history, q4_adv_train.GUARD if "eps" in origin["recipe"] else None)
    recipe = {**origin["recipe"], **{key: metrics.get(key) for key in shared}}
    if kept == len(history):
        recipe["epochs"] = len(history)
    if question == "q4":
        recipe["noise"] = recipe.get("noise", "of some size") if "FGM" in name else None
        told, own = origin["recipe"].get("perturbation"), common.PERTURBATION
        if told != own:
            yield differences(question, f"{name}: perturbation, by our constants", told, own)
    if init in ("q2", "scratch", "imagenet"):
        q2 = known["q2/model.pt"] or metrics.get("q2_sha256")
        recipe["first_weights"] = q2 if init == "q2" else None
    elif question != "q2" and recipe["first_weights"] not in known.values():
        found = "weights that are not in this folder"
        yield (question, f"{name}: first weights", f"--init {init}", found, ASK)
    same = (*shared, "quick", *(("init", "q2_sha256") if question != "q2" else ()))
    found = {
        "file": Path(file).name,
        "sha256": checkpoint["sha256"],
        "outputs": checkpoint["model"].head.out_features,
        "epoch_kept": kept,
        "recipe": recipe,
        **{key: origin.get(key) for key in ("git_commit", "code_sha256")},
    }
    told = {"question": metrics, "model": {**model, "outputs": OUTPUTS[question]}}
    of_question = {**{key: origin.get(key) for key in same}, "stem": checkpoint["stem"]}
    seen = {"question": of_question, "model": found}
    yield differences(question, f"{name}: training", told, seen)


def score_rows(name, model, found):
    """Question 2's scores. found: dict from part to q2_train_ce.class_scores."""
    for part, scores in found.items():
        images = int(np.sum(scores["confusion"]))
        reported, shares = (as_shares(each, images) for each in (model[part], scores))
        yield shares_row("q2", f"{name}: {part}", reported, shares, images)


def as_shares(scores, images):
    """What q2_train_ce.class_scores returns as shares of all images."""
    bins = np.array(scores["reliability"])
    return {
        "accuracy": scores["accuracy"],
        "calibration error": scores["ece"],
        "probability of the true class": math.exp(-scores["loss"]),
        "right, of class": {key: share / 10 for key, share in scores["accuracy_per_class"].items()},
        "confusion": (np.array(scores["confusion"]) / images).tolist(),
        "bins of confidence": np.hstack([bins[:, :1], bins[:, :1] * bins[:, 1:]]).tolist(),
    }


def attack_on(question, network, train):
    """Losses that attacks raise, and the decision. network: `frozen`; train: images and labels."""
    if question != "q6":
        return (common.summed_cross_entropy, common.summed_margin), common.most_likely
    reference = q6_angular.embed(network, common.as_float(train[0])), train[1]
    return q6_angular.attacked_losses(*reference), q6_angular.knn_decision(*reference)


def drawn(images, count):
    """Indices of `count` random ones of so many images, or of all: others every time."""
    generator = torch.Generator()
    generator.seed()
    return torch.randperm(images, generator=generator)[:count]


def attacked(model, test, losses, decide, seed, count):
    """A `frozen` model on `count` random test images under every condition, and its other numbers.

    Returns a dict from CONDITIONS to indices and which of those images are right; and a dict to
    what shares_row takes: shares, placed as in metrics.json, their images, and errors.
    """
    images, labels = common.as_float(test[0]), test[1]
    perturbed = common.perturbed_images(test[0], "test", seed)
    eps, l2, step = common.EPSILON["linf"], common.EPSILON["l2"], common.PGD_STEP_SIZE
    share, sizes = common.share, common.CURVE_EPSILONS

    def attacks(index, given=images):
        return common.attacks_on(model, given[index], labels[index], losses[0], decide)

    chosen = drawn(len(labels), count)
    clean, _, under_fgm, steps_to_fool = attacks(chosen)
    shifted, _, both, _ = attacks(chosen, perturbed)
    after = steps_to_fool(eps, step)
    right = {"clean": clean, "perturbed": shifted, "fgm": under_fgm(eps)}
    right |= {"perturbed_fgm": both(eps), "pgd": after > common.PGD_STEPS}
    some = {
        "accuracy": {condition: share(which) for condition, which in right.items()},
        "accuracy_l2": {"fgm": share(under_fgm(l2, "l2")), "perturbed_fgm": share(both(l2, "l2"))},
        "pgd_by_step": [share(after > step) for step in range(common.PGD_STEPS + 1)],
    }

    early = drawn(min(common.STRONGEST_IMAGES, len(labels)), count)
    survivors = attacks(early)[3](eps, step) > common.PGD_STEPS
    rest = images[early], labels[early], survivors, losses[1:], decide
    strongest = common.right_under_strongest(model, *rest)

    first = slice(common.CHECKED_IMAGES)
    clean, _, under_fgm, steps_to_fool = attacks(first)
    noisy = common.random_noise(images[first], eps, common.generator_for(seed, "noise"))
    under_noise = common.in_batches(lambda batch: decide(model(batch)), noisy) == labels[first]
    same = {
        "by_eps": {"fgm": [share(clean), *(share(under_fgm(size)) for size in sizes)]},
        "checks": {
            "noise": share(under_noise),
            "pgd_eps_1": share(steps_to_fool(1.0, 0.1) > common.PGD_STEPS),
        },
    }
    numbers = {"means": (some, len(chosen), ERRORS), "on the first images": (same, len(clean), 0)}
    by_condition = {condition: (chosen, which) for condition, which in right.items()}
    return {**by_condition, "strongest": (early, strongest)}, numbers


def image_rows(question, name, rights, right):
    """Each condition, image by image. right: as `attacked` returns it."""
    for condition, (index, which) in right.items() if rights is not None else ():
        told, which = rights[name][condition][index], which.cpu().numpy()
        differing = int((told != which).sum())
        before, after = (common.percent(common.share(each)) for each in (told, which))
        cells = (
            f"{before} of {len(index)} images",
            f"{after}, {differing} of them decided otherwise",
        )
        holds = differing <= max(HANDFUL, DIFFERING * len(index))
        yield (question, f"{name}: {common.CONDITIONS[condition]}", *cells, holds)


def number_rows(question, name, model, numbers):
    """The other numbers under attack, and the warnings that these give. numbers: of `attacked`."""
    for what, found in numbers.items():
        yield shares_row(question, f"{name}: {what}", model, *found)
    due = common.attack_warnings(model["accuracy"], model["checks"])
    cells = f"{len(model['warnings'])} warnings", " ".join(due) or "none is due"
    holds = (ASK if due else True) if due == model["warnings"] else False
    yield (question, f"{name}: signs of a flawed attack", *cells, holds)


def share_of_some(model, decide, images, labels):
    """Accuracy on random images (uint8) of a part, and their number."""
    chosen = drawn(len(labels), SAMPLE)
    decided = common.in_batches(lambda batch: decide(model(common.as_float(batch))), images[chosen])
    return common.accuracy(decided, labels[chosen]), len(chosen)


def clean_rows(question, name, model, images, train, val, quick):
    """Signs that a model has seen what it must not. train, val: share and number of images."""
    share = model["accuracy"]["clean"]
    on_test, on_train, on_val = (common.percent(each) for each in (share, train[0], val[0]))
    over_train, over_val = (errors_between((share, images), part) for part in (train, val))
    found = f"{on_val} on validation"
    # An error more than elsewhere: that has no room besides, and no honest folder must fail.
    holds = abs(over_val) <= ERRORS + 1
    yield (question, f"{name}: test and validation", on_test, found, holds)
    how = "better" if over_train > ERRORS else "no worse" if over_train >= -ERRORS else "worse"
    found = f"it is {how} on test, {on_test}, than on its training images, {on_train}"
    holds = {"better": False, "no worse": quick or ASK, "worse": True}[how]
    yield (question, f"{name}: test and train", on_test, found, holds)
    if share > TOO_GOOD and not quick:
        found = f"nobody has reached {common.percent(TOO_GOOD)} from 12,000 labels"
        yield (question, f"{name}: clean", on_test, found, ASK)


def errors_between(one, other):
    """By how many standard errors a share is above another. Each: share and number of images."""
    error = math.hypot(common.standard_error(*one), common.standard_error(*other))
    return (one[0] - other[0]) / max(error, 1e-9)


# ---- AutoAttack, the report, the verdict --------------------------------------------------------


def autoattack_rows(results, checkpoints, rights):
    """autoattack.json: whose weights it is of, and that it leaves no more than the strongest."""
    if not (results / "autoattack.json").exists():
        return
    for name, told in plain(read(results, "autoattack.json", common.read_metrics)).items():
        question, measured = ("q2", "q3") if name == common.CROSS_ENTROPY else ("q4", "q4")
        what, checkpoint = f"{name}: AutoAttack", checkpoints.get(MODELS[question, name])
        claim = f"{told['right']} of {told['images']} images"
        if checkpoint and checkpoint["sha256"] != told["sha256"]:
            found = "of other weights than this folder's, so that the report leaves it out"
            yield (question, what, claim, found, ASK)
        elif name not in rights.get(measured, {}):
            yield (question, what, claim, f"needs {measured}/right.npz", UNCHECKED)
        else:
            images = rights[measured][name]["strongest"][: told["images"]]
            found = f"the strongest attack leaves {images.sum()} of {len(images)}"
            fewer = 0 <= told["right"] <= images.sum() + HANDFUL
            yield (question, what, claim, found, bool(fewer and len(images) == told["images"]))


def report_rows(results):
    """report.md as it was handed in, against the same assembled anew from the folder's numbers."""
    if (results / "report.md").exists():
        told = read(results, "report.md", file_text)
        named = [key for key in FIGURES if f"## Question {key[1]}" in told]
        needed = [f"{key}/metrics.json" for key in named]
        needed += [f"{key}/right.npz" for key in named if key in report.MEASURED]
        absent = [file for file in needed if not (results / file).exists()]
        if absent:
            yield ("report", "report.md", "", f"needs {', '.join(absent)}", UNCHECKED)
            return
        found = report.read_results(results)
        assembled = report.assemble(found, report.read_right(found, results))
        yield report_row(told, assembled)


def file_text(path):
    with common.opened(path) as content:
        return content.read().decode()


def report_row(told, assembled):
    """Two reports compared from their contents on, but for question 5, which a student writes.

    Its sources stand among the references.
    """
    free = re.compile(r"## (Question 5|References).*?(?=\n## |$)", re.DOTALL)
    told, assembled = (free.sub("", text.partition("\nContents:")[2]) for text in (told, assembled))
    found = "the same" if told == assembled else "another, by the numbers in the folder"
    return ("report", "report.md", "as handed in", found, told == assembled)


def tell(rows, missing):
    """Print the table, and a sentence for what does not simply hold; returns the exit status."""
    told = [(*row[:4], {True: "yes", False: "NO"}.get(row[4], row[4])) for row in rows]
    header = ["question", "what", "reported", "found", "holds"]
    common.print_table("What was reported, and what the folder gives", header, told)
    print()
    for question, what, reported, found, holds in sorted(told, key=lambda row: row[4] == "NO"):
        claim = f"{reported} is reported; " if reported else ""
        if holds != "yes":
            print(common.one_line(f"{holds}: {question}, {what}: {claim}{found}"))
    if missing:
        print(f"Missing, and not looked at: {', '.join(missing)}")
    print(NEVER_CHECKED)
    answers = {row[4] for row in told}
    status = 1 if "NO" in answers else 2 if UNCHECKED in answers else 0
    print(VERDICTS[status])
    return status


if __name__ == "__main__":
    common.run(main)
