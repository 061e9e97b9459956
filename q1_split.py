"""Question 1: split CIFAR-10 into few images to train and many to validate and test.

The 60,000 images are pooled and split with the classes in proportion: 20 % (12,000) to train, 40 %
(24,000) to validate and 40 % (24,000) to test. `--protocol official` keeps CIFAR-10's own test file
instead: 10,000 of its 50,000 training images to train, the other 40,000 to validate, the official
10,000 to test.

CIFAR-10 is known to hold the same picture more than once. How many test images have an exact or a
near duplicate among the training images is counted, so that a reader can judge how much leaks.

Reads   data/cifar-10-batches-py (fetched if absent)
Writes  results/q1: split.npz, figure01_train_labels.png, figure02_held_out_labels.png, metrics.json
Run     python q1_split.py
"""

import io

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
        save_split(
            folder / "split.npz", **parts, protocol=args.protocol, seed=args.seed, quick=args.quick
        )
    split = common.load_split(folder / "split.npz")
    counts = {name: torch.bincount(labels[split[name]], minlength=10).tolist() for name in parts}
    plot_label_counts(folder / "figure01_train_labels.png", {"train": counts["train"]})
    plot_label_counts(
        folder / "figure02_held_out_labels.png",
        {"validation": counts["val"], "test": counts["test"]},
    )
    with common.timed(seconds, "duplicates"):
        images = images.to(args.device)
        exact, near = count_duplicates(images[split["train"]], images[split["test"]])

    common.write_metrics(
        folder,
        common.provenance(args, "q1", split),
        {
            "protocol": split["protocol"],
            "counts": counts,
            "n_train": len(split["train"]),
            "n_val": len(split["val"]),
            "n_test": len(split["test"]),
            "test_images_with_duplicate_in_train": {
                "exact": exact,
                "near": near,
                "near_means_correlation_from": NEAR_DUPLICATE,
            },
            "seconds": seconds,
        },
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
            file_of = indices < common.NUM_OFFICIAL_TRAIN
            size = QUICK_PER_CLASS["train"] if quick else OFFICIAL_TRAIN_PER_CLASS
            train, val = np.split(indices[file_of], [size])
            test = indices[~file_of]
            if quick:
                val, test = val[: sizes["val"]], test[: sizes["test"]]
        else:
            train, val, test, _ = np.split(indices, np.cumsum(list(sizes.values())))
        for name, chosen in zip(parts, (train, val, test), strict=True):
            parts[name].append(chosen)
    return {name: rng.permutation(np.concatenate(chosen)) for name, chosen in parts.items()}


def save_split(path, *, train, val, test, protocol, seed, quick):
    """Write the three int64 index arrays and how they were drawn, for common.load_split."""
    buffer = io.BytesIO()
    np.savez(buffer, train=train, val=val, test=test, protocol=protocol, seed=seed, quick=quick)
    common.write_file(path, buffer.getvalue())


def count_duplicates(train, test):
    """How many test images equal a training image, and how many correlate by NEAR_DUPLICATE with
    one.

    train, test: uint8 N x 3 x 32 x 32. The correlation of the pixels ignores brightness and
    contrast."""
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
    common.print_table(
        "Question 1: images per part and class",
        ["part", "images", "fewest of a class", "most of a class"],
        [[part, *(str(of(count)) for of in (sum, min, max))] for part, count in counts.items()],
    )
    print(
        f"Test images with a duplicate in train: {exact} exact, {near} near "
        f"(correlation of at least {NEAR_DUPLICATE})"
    )


def plot_label_counts(path, counts):
    """Bar chart of images per class. counts: dict from part to a list of ten."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    width = 0.8 / len(counts)
    for position, (name, values) in enumerate(counts.items()):
        centres = np.arange(10) + (position - (len(counts) - 1) / 2) * width
        axes.bar_label(
            axes.bar(centres, values, width, label=name), fontsize=7, rotation=90, padding=2
        )
    axes.set_xticks(range(10), common.CLASSES, rotation=30, ha="right")
    axes.set_ylabel("images")
    axes.margins(y=0.35)
    axes.legend(loc="upper right", ncols=len(counts))
    common.save_figure(figure, path)


if __name__ == "__main__":
    common.run(main)
