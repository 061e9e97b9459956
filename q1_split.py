"""Question 1: split CIFAR-10 into few images to train and many to validate and test.

The 60,000 images are pooled and split with the classes in proportion: 20 % (12,000) to train, 40 %
(24,000) to validate and 40 % (24,000) to test. `--protocol official` keeps CIFAR-10's own test file
instead: 10,000 of its 50,000 training images to train, the other 40,000 to validate, the official
10,000 to test.

CIFAR-10 is known to hold the same picture more than once. How many test images have an exact or a
near duplicate among the training images is counted, so that a reader can judge how much leaks.

Takes ten seconds on two cores.

Reads   data/cifar-10-batches-py (fetched if absent)
Writes  results/q1: split.npz, figure01_train_labels.png, figure02_held_out_labels.png, metrics.json
Run     python q1_split.py
"""

import numpy as np
import torch

import common

PER_CLASS = {"train": 1200, "val": 2400, "test": 2400}
QUICK_PER_CLASS = {"train": 100, "val": 10, "test": 10}
OFFICIAL_TRAIN_PER_CLASS = 1000
NEAR_DUPLICATE = 0.95  # correlation of the pixels from which two images, looked at, are one picture


def main():
    parser = common.argument_parser(__doc__)
    parser.add_argument(
        "--protocol",
        choices=("pooled", "official"),
        default="pooled",
        help="pooled: of all images; official: CIFAR-10's own test file (pooled)",
    )
    args = common.parse_arguments(parser)
    folder, seconds = args.results / "q1", {}

    with common.timed(seconds, "load"):
        images, labels = common.load_cifar10(args.data)
    with common.timed(seconds, "split"):
        parts = draw_split(labels.numpy(), args.protocol, args.seed, args.quick)
        how = {"protocol": args.protocol, "seed": args.seed, "quick": args.quick}
        common.write_npz(folder / "split.npz", {**parts, **how})
    split = common.load_split(folder / "split.npz")
    counts = {name: torch.bincount(labels[split[name]], minlength=10).tolist() for name in parts}
    train_counts = {"train": counts["train"]}
    held_out_counts = {"validation": counts["val"], "test": counts["test"]}
    plot_label_counts(folder / "figure01_train_labels.png", train_counts)
    plot_label_counts(folder / "figure02_held_out_labels.png", held_out_counts)
    with common.timed(seconds, "duplicates"):
        images = images.to(args.device)
        exact, near = count_duplicates(images[split["train"]], images[split["test"]])

    origin = common.provenance(args, "q1", split, split_seed=args.seed)
    duplicates = {"exact": exact, "near": near, "near_means_correlation_from": NEAR_DUPLICATE}
    sizes = {f"n_{name}": len(split[name]) for name in parts}
    found = {"counts": counts, "test_images_with_duplicate_in_train": duplicates}
    common.write_metrics(
        folder, origin, {"protocol": args.protocol, **sizes, **found, "seconds": seconds}
    )
    print_split(counts, exact, near)


def draw_split(labels, protocol, seed, quick):
    """Indices of the three parts as a dict of shuffled int64 arrays, the classes in proportion.

    labels: int64 array of all 60,000 labels in the order of common.load_cifar10.
    """
    rng = np.random.default_rng(seed)
    sizes = QUICK_PER_CLASS if quick else PER_CLASS
    parts = {"train": [], "val": [], "test": []}
    for label in range(len(common.CLASSES)):
        indices = rng.permutation(np.flatnonzero(labels == label))
        if protocol == "official":
            in_training_file = indices < common.NUM_OFFICIAL_TRAIN
            size = QUICK_PER_CLASS["train"] if quick else OFFICIAL_TRAIN_PER_CLASS
            train, val = np.split(indices[in_training_file], [size])
            test = indices[~in_training_file]
            if quick:
                val, test = val[: sizes["val"]], test[: sizes["test"]]
        else:
            train, val, test, _ = np.split(indices, np.cumsum(list(sizes.values())))
        for name, chosen in zip(parts, (train, val, test), strict=True):
            parts[name].append(chosen)
    return {name: rng.permutation(np.concatenate(chosen)) for name, chosen in parts.items()}


def count_duplicates(train, test):
    """How many test images equal a training image, and how many are nearly equal to one.

    train, test: uint8 N x 3 x 32 x 32. Nearly equal are those that correlate by NEAR_DUPLICATE or
    more, the exact ones included. The correlation of the pixels ignores brightness and contrast.
    """
    equal = {image.numpy().tobytes() for image in train.cpu()}
    exact = sum(image.numpy().tobytes() in equal for image in test.cpu())
    train = standardised(train)
    near = sum(
        int(((standardised(batch) @ train.T).amax(1) >= NEAR_DUPLICATE).sum())
        for batch in test.split(1000)
    )
    return exact, near


def standardised(images):
    """uint8 images as float32 vectors of mean 0 and length 1, whose products are correlations."""
    vectors = common.as_float(images).flatten(1)
    vectors = vectors - vectors.mean(1, keepdim=True)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-6)


def print_split(counts, exact, near):
    """The sizes of the parts, and the duplicates between train and test. counts: part to ten."""
    rows = [
        [part, str(sum(count)), str(min(count)), str(max(count))] for part, count in counts.items()
    ]
    header = ["part", "images", "fewest of a class", "most of a class"]
    common.print_table("Question 1: images per part and class", header, rows)
    print(
        f"Test images with a duplicate in train: {exact} exact, {near} near "
        f"(correlation of at least {NEAR_DUPLICATE}, the exact ones included)"
    )


def plot_label_counts(path, counts):
    """Bar chart of images per class. counts: dict from part to a list of ten."""
    width = 0.8 / len(counts)
    with common.drawing(path, (6, 4)) as figure:
        axes = figure.subplots()
        for position, (name, values) in enumerate(counts.items()):
            centres = np.arange(10) + (position - (len(counts) - 1) / 2) * width
            bars = axes.bar(centres, values, width, label=name)
            axes.bar_label(bars, fontsize=7, rotation=90, padding=2)
        axes.set_xticks(range(10), common.CLASSES, rotation=30, ha="right")
        axes.set_ylabel("images")
        axes.margins(y=0.35)
        axes.legend(loc="upper right", ncols=len(counts))


if __name__ == "__main__":
    common.run(main)
