"""Is this submission what it says? Measures a results folder again, without training anything.

The split is drawn anew from its protocol and seed. Every checkpoint is measured on all test
images, clean and perturbed, under FGM on the first 2,000 and under PGD-20 on the first 500. What
was reported on the same images must agree within 0.2 points, since other hardware rounds
differently, and on other images within three standard errors. Every file must belong to those that
it was made from. A model that is better on test than on its training images has seen the wrong
ones. Missing questions are named.

Exit status 0 when everything holds, 1 when something does not, with the sentence to write beside
the mark. About four minutes for the default on two cores.

Reads   results/q1 ... q6, CIFAR-10
Run     python verify.py --results FOLDER
"""

import sys

import numpy as np

import common
import q1_split
import q6_angular

TOLERANCE = 0.002
FGM_IMAGES, PGD_IMAGES = 2_000, 500
QUESTIONS = ("q2", "q3", "q4", "q6")  # those that tell of models


def main():
    args = common.parse_arguments(common.argument_parser(__doc__))
    split, data = common.load_data(args)
    found = common.metrics_found(args, ("q1", *QUESTIONS))
    rows = split_rows(split, common.load_cifar10(args.data)[1].numpy())
    try:
        rows += model_rows(found, split, data, args)
    except common.MALFORMED as error:
        raise common.UserError(
            f"a metrics.json in {args.results} lacks something or holds what it "
            f"should not ({error})"
        ) from error
    sys.exit(tell(rows, [question for question in ("q1", *QUESTIONS) if question not in found]))


def model_rows(found, split, data, args):
    """All rows of questions 2, 3, 4 and 6. found: dict from question to its metrics."""
    rows, measured = [], {}
    for question in QUESTIONS:
        metrics = found.get(question, {"models": {}})
        made_by = common.script_command(question, args)
        for name, model in common.with_bar(list(metrics["models"].items()), question):
            if "file" in model:
                path = args.results / question / model["file"]
                checkpoint = common.read_checkpoint(path, made_by, split)
                measured[name] = measure(question, checkpoint, data, metrics["seed"], args)
                rows += file_rows(question, name, model, checkpoint)
            rows += accuracy_rows(question, name, model, measured.get(name), metrics["n_test"])
        rows += parent_rows(question, metrics, found.get("q2"), split)
    return rows


def tell(rows, missing):
    """Print the table, what is missing, what to write beside the mark; returns the exit status."""
    common.print_table(
        "What was reported, and what the files handed in give",
        ["question", "what", "reported", "measured", "holds"],
        [[*cells, "yes" if holds else "NO"] for *cells, holds in rows],
    )
    if missing:
        print(f"Missing, and not looked at: {', '.join(missing)}.")
    wrong = [row for row in rows if not row[-1]]
    if rows and not wrong:
        print("Everything that is there holds.")
    for question, what, reported, measured, _ in wrong:
        print(
            common.one_line(
                f"{question}: {what} does not hold: {reported} is reported, {measured} was found."
            )
        )
    return 1 if wrong else 0


# ---- The rows: question, what, reported, measured, whether it holds ------------------------------


def split_rows(split, labels):
    """The split against the one that its protocol and seed draw, and its balance.

    labels: of all 60,000 images, an int64 array.
    """
    drawn = q1_split.draw_split(labels, split["protocol"], split["seed"], split["quick"])
    same = all(np.array_equal(split[part].numpy(), indices) for part, indices in drawn.items())
    counts = [np.bincount(labels[split[part].numpy()], minlength=10) for part in drawn]
    how = f"protocol {split['protocol']}, seed {split['seed']}"
    return [
        ("q1", "the split", how, "the same" if same else "another", same),
        (
            "q1",
            "balance of the classes",
            "equal",
            " ".join(f"{count.min()}-{count.max()}" for count in counts),
            all(count.min() == count.max() for count in counts),
        ),
    ]


def file_rows(question, name, model, checkpoint):
    """The checkpoint against the metrics that tell of it."""
    origin = checkpoint["provenance"]
    recipe = (
        model["recipe"] == origin.get("recipe") and model["recipe"]["stem"] == checkpoint["stem"]
    )
    return [
        (
            question,
            f"{name}: the file",
            model["sha256"][:8],
            checkpoint["sha256"][:8],
            model["sha256"] == checkpoint["sha256"],
        ),
        (
            question,
            f"{name}: its question",
            question,
            str(origin.get("question"))[:8],
            origin.get("question") == question,
        ),
        (
            question,
            f"{name}: its recipe",
            "as in metrics.json",
            "the same" if recipe else "another",
            recipe,
        ),
    ]


def parent_rows(question, metrics, q2, split):
    """The split and the first weights against what lies in the folder."""
    if not metrics["models"]:
        return []
    rows = [
        (
            question,
            "made from the split",
            metrics["split_sha256"][:8],
            split["sha256"][:8],
            metrics["split_sha256"] == split["sha256"],
        )
    ]
    if q2 and question != "q2" and metrics.get("init", "q2") == "q2":
        (parent,) = (model["sha256"] for model in q2["models"].values())
        rows.append(
            (
                question,
                "made from question 2's model",
                " ".join(sha[:8] for sha in metrics["parent_sha256"]),
                parent[:8],
                metrics["parent_sha256"] == [parent],
            )
        )
    return rows


def accuracy_rows(question, name, model, measured, number):
    """Each reported accuracy that was measured again. number: images behind the reported one."""
    if measured is None:
        return [(question, f"{name}: a checkpoint", "reported on", "none", False)]
    rows = []
    for condition, (share, images) in measured.items():
        reported = model["accuracy"].get(condition)
        if reported is not None:
            error = 0 if images == number else 3 * common.standard_error(share, images)
            rows.append(
                (
                    question,
                    f"{name}: {common.CONDITIONS[condition]}, {images} images",
                    common.percent(reported),
                    common.percent(share),
                    abs(reported - share) <= TOLERANCE + error,
                )
            )
    test, (train, seen) = measured["clean"][0], measured["train"]
    error = 3 * np.hypot(common.standard_error(test, number), common.standard_error(train, seen))
    rows.append(
        (
            question,
            f"{name}: not better on test than on train",
            common.percent(test),
            common.percent(train),
            bool(test - train <= error),
        )
    )
    return rows


def measure(question, checkpoint, data, seed, args):
    """What a checkpoint reaches: dict from condition to (share, images that it is of)."""
    model = common.frozen(checkpoint["model"].to(args.device), args.precision)
    loss, decide = common.summed_cross_entropy, common.most_likely
    if question == "q6":
        embeddings = q6_angular.embed(model, common.as_float(data["train"][0]))
        loss = q6_angular.soft_knn_loss(embeddings, data["train"][1])
        decide = q6_angular.knn_decision(embeddings, data["train"][1])

    def share(images, labels):
        decided = common.in_batches(lambda batch: decide(model(batch)), images)
        return common.accuracy(decided, labels)

    (train, train_labels), (test, labels) = data["train"], data["test"]
    images, perturbed = common.as_float(test), common.perturbed_images(test, "test", seed)
    linf = common.EPSILON["linf"]
    fgm = common.fgm_accuracies(
        model, images[:FGM_IMAGES], labels[:FGM_IMAGES], [("linf", linf)], loss, decide
    )[1]
    pgd = common.pgd_accuracy_by_step(
        model,
        images[:PGD_IMAGES],
        labels[:PGD_IMAGES],
        linf,
        common.PGD_STEP_SIZE,
        common.PGD_STEPS,
        loss,
        decide,
    )[-1]
    return {
        "clean": (share(images, labels), len(images)),
        "perturbed": (share(perturbed, labels), len(images)),
        "fgm": (fgm, len(images[:FGM_IMAGES])),
        "pgd": (pgd, len(images[:PGD_IMAGES])),
        "train": (share(common.as_float(train), train_labels), len(train)),
    }


if __name__ == "__main__":
    common.run(main)
