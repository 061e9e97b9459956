"""Question 2: train ResNet-18 from random weights with cross-entropy.

Reports accuracy on validation and test (per class too, with the confusion matrix), the calibration
of the predicted probabilities, the curves of accuracy and loss, and a UMAP of the 512 numbers that
the convolutional part ends in: fitted on train without labels, then applied to test.

Reaches 85.16 % on test (three seeds, standard deviation 0.13) in 18 minutes of training on two
cores of a Zen 4 EPYC; with `--stem cifar` 92.23 % (one run) in 301 minutes.

Reads   results/q1/split.npz, CIFAR-10
Writes  results/q2: model.pt and the state of its training, figure03 to figure06, confusion and
        reliability figures, metrics.json
Run     python q2_train_ce.py
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F

import common

RECIPES = {  # searched on validation: docs/recipes.md
    # For slow processors, as in most laptops; the values are those of stride2.
    "imagenet": {"epochs": 40, "batch_size": 64, "lr": 0.1, "trivial_augment": False},
    # Batch 128 and rate 0.2 are a point worse; TrivialAugment harms so short a training.
    "stride2": {"epochs": 40, "batch_size": 64, "lr": 0.1, "trivial_augment": False},
    # For a GPU. A run as long would learn its images by heart without TrivialAugment.
    "cifar": {"epochs": 150, "batch_size": 64, "lr": 0.1, "trivial_augment": True},
}
# For --optimizer adamw, as in the original report. It names no weight decay: PyTorch's default. Its
# rate is hard to read, 0.01 or 0.001: the first is better on validation.
ADAMW = {"optimizer": "adamw", "batch_size": 128, "lr": 0.01, "weight_decay": 0.01}
LABEL_SMOOTHING = 0.1  # keeps the network from growing over-confident on so few images
CUTOUT = 12  # side of the square, in pixels
AUGMENTED_TOGETHER = 8  # images that share what TrivialAugment draws: image by image is slow
CALIBRATION_BINS = 15  # as in Guo et al. 2017


def main():
    args = common.parse_arguments(parser())
    folder, seconds = args.results / "q2", {}
    split, data = common.load_data(args)
    stem = choose_stem(args)
    origin = common.provenance(args, "q2", split, seed=args.seed, stem=stem)
    recipes = recipes_with(args.optimizer)
    constants = {"label_smoothing": LABEL_SMOOTHING, "cutout": CUTOUT}
    recipe = common.choose_recipe(args, recipes, stem, "q2", split, **constants)

    model, training = train_classifier(data, recipe, origin, folder / "model.pt", args.fresh)
    made = common.save_trained(folder / "model.pt", model, training)
    draw_curves(folder, training["history"])
    trained = common.frozen(model, args.precision)
    with common.timed(seconds, "evaluate"):
        scores = {part: class_scores(trained, *data[part]) for part in ("val", "test")}
    draw_scores(folder, scores)
    with common.timed(seconds, "umap"):
        map_sha256 = draw_maps(folder, trained, data, args.seed)

    clean = {"clean": scores["test"]["accuracy"]}
    models = {common.CROSS_ENTROPY: {**made, **scores, "accuracy": clean}}
    found = {"models": models, "n_test": len(data["test"][1]), "umap_sha256": map_sha256}
    origin = {**origin, "q2_sha256": made["sha256"]}
    common.write_metrics(folder, origin, {**found, "seconds": seconds})
    print_scores(scores, data)


def parser():
    """This script's flags."""
    flags = common.training_parser(__doc__, RECIPES)
    flags.add_argument(
        "--stem",
        choices=("auto", *common.STEMS),
        default="auto",
        help="first layer of the network (auto: cifar on a CUDA GPU, else stride2)",
    )
    flags.add_argument(
        "--optimizer",
        choices=("sgd", "adamw"),
        default="sgd",
        help="adamw: as in the original report, with batch size and rate for it",
    )
    flags.add_argument(
        "--trivial-augment",
        action=argparse.BooleanOptionalAction,
        help="change colour or geometry of the training images at random",
    )
    return flags


def recipes_with(optimizer):
    """RECIPES, or for "adamw" the same with what that optimiser needs."""
    changes = ADAMW if optimizer == "adamw" else {}
    return {stem: {**row, **changes} for stem, row in RECIPES.items()}


def choose_stem(args):
    """The stem that --stem names; for "auto" the one that suits the device, said in a line."""
    if args.stem != "auto":
        return args.stem
    stem = "cifar" if args.device == "cuda" else "stride2"
    print(f"Stem {stem}, since this runs on {args.device}; --stem chooses another")
    return stem


# ---- Training ------------------------------------------------------------------------------------


def train_classifier(data, recipe, origin, path, fresh):
    """A trained model in eval mode, and its training as common.train returns it."""
    val_images, val_labels = (part[: common.VALIDATION_SUBSET] for part in data["val"])

    def evaluate(model):
        model = common.frozen(model, recipe["precision"])
        return common.validation_scores(model, common.as_float(val_images), val_labels)

    torch.manual_seed(recipe["seed"])
    model = common.resnet18(len(common.CLASSES), recipe["stem"]).to(recipe["device"])
    training = common.train(
        model,
        data["train"],
        training_step,
        common.shuffled_batches,
        evaluate,
        recipe,
        origin,
        path,
        fresh,
    )
    return model, training


def training_step(model, images, labels, generator, recipe):
    """Loss and number of correct predictions on a batch of uint8 images."""
    return common.loss_and_correct(model, augmented(images, generator, recipe), labels, recipe)


def augmented(images, generator, recipe):
    """uint8 images as the network sees them in training, float32: another version every time."""
    if recipe["trivial_augment"]:
        images = trivial_augment(images, generator)
    images = common.crop_and_flip(common.as_float(images), generator)
    return cut_out(images, recipe["cutout"], generator)


def trivial_augment(images, generator):
    """TrivialAugment (Müller & Hutter 2021) by torchvision: one of 14 changes, of random strength.

    images uint8 N x 3 x H x W, in random order: AUGMENTED_TOGETHER of them share a draw. What a
    change of geometry leaves empty takes CIFAR-10's mean colour. torchvision draws from PyTorch's
    global CPU generator, which is seeded by ours for it and then put back.
    """
    from torchvision.transforms.v2 import TrivialAugmentWide

    change = TrivialAugmentWide(fill=[round(255 * mean) for mean in common.CIFAR10_MEAN])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.cat([change(group) for group in images.split(AUGMENTED_TOGETHER)])


def cut_out(images, side, generator):
    """Cutout (DeVries & Taylor 2017): a square, perhaps partly outside, takes CIFAR-10's mean
    colour.

    images N x 3 x H x W float32, side in pixels. Draws from the CPU generator.
    """
    count, _, height, width = images.shape
    top = torch.randint(height, (count, 1, 1, 1), generator=generator) - side // 2
    left = torch.randint(width, (count, 1, 1, 1), generator=generator) - side // 2
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    mean = torch.tensor(common.CIFAR10_MEAN).view(1, 3, 1, 1)
    inside, mean = common.send(inside, images.device), common.send(mean, images.device)
    return torch.where(inside, mean, images)


# ---- Evaluation ----------------------------------------------------------------------------------


def class_scores(model, images, labels):
    """Accuracy, overall and per class, confusion matrix and calibration: a dict of plain values.

    model `frozen`, images uint8, labels int64.
    """
    logits, labels = common.in_batches(model, common.as_float(images)).cpu(), labels.cpu()
    confidence, predicted = logits.softmax(1).max(1)
    pairs = torch.bincount(10 * labels + predicted, minlength=100)
    confusion = pairs.view(10, 10)  # rows are the true classes
    bins = reliability(confidence, predicted == labels)
    per_class = (confusion.diag() / confusion.sum(1)).tolist()
    return {
        "accuracy": common.accuracy(predicted, labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy_per_class": dict(zip(common.CLASSES, per_class, strict=True)),
        "confusion": confusion.tolist(),
        "reliability": bins.tolist(),
        "ece": expected_calibration_error(bins),
    }


def print_scores(scores, data):
    """Accuracy and calibration of each part. scores: dict from part to class_scores'."""
    rows = [
        [
            part,
            str(len(data[part][1])),
            *(common.percent(score[key]) for key in ("accuracy", "ece")),
        ]
        for part, score in scores.items()
    ]
    header = ["part", "images", "accuracy", "calibration error (ECE)"]
    common.print_table("Question 2: ResNet-18 with cross-entropy", header, rows)


def reliability(confidence, correct):
    """Calibration by equally wide bins of confidence (Guo et al. 2017).

    confidence float N in [0, 1], correct bool N. Returns an array of CALIBRATION_BINS rows: share
    of the images in the bin, their mean confidence, their accuracy; zeros for an empty bin.
    """
    bin_of = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    counts = torch.bincount(bin_of, minlength=CALIBRATION_BINS).double()
    means = [
        torch.bincount(bin_of, values.double(), CALIBRATION_BINS) / counts.clamp_min(1)
        for values in (confidence, correct)
    ]
    return torch.stack([counts / len(bin_of), *means], dim=1).numpy()


def expected_calibration_error(bins):
    """Mean gap between confidence and accuracy, each bin weighted by its share of the images."""
    share, confidence, accuracy = bins.T
    return float((share * np.abs(confidence - accuracy)).sum())


# ---- Figures -------------------------------------------------------------------------------------


def draw_curves(folder, history):
    """Figures 3 and 4: accuracy and loss per epoch."""
    accuracies = {"accuracy": "train (augmented)", "val_accuracy": "validation"}
    losses = {"loss": "train (augmented, smoothed labels)", "val_loss": "validation"}
    common.plot_history(folder / "figure03_accuracy.png", history, accuracies, "accuracy")
    common.plot_history(folder / "figure04_loss.png", history, losses, "cross-entropy")


def draw_scores(folder, scores):
    """Confusion matrix and reliability diagram of each part, by class_scores."""
    for part, score in scores.items():
        plot_confusion(folder / f"confusion_{part}.png", np.array(score["confusion"]))
        plot_reliability(folder / f"reliability_{part}.png", np.array(score["reliability"]))


def draw_maps(folder, model, data, seed):
    """Figures 5 and 6: UMAP fitted on train, and test in that map. Returns the map's SHA-256."""
    train, test = (
        common.backbone_features(model, common.as_float(data[part][0]))
        for part in ("train", "test")
    )
    points, place = common.fit_umap(train, seed)
    fitted = {"train": (points, data["train"][1])}
    placed = {"test, in the map of train": (place(test), data["test"][1])}
    common.plot_maps(folder / "figure05_umap_train.png", fitted, points)
    common.plot_maps(folder / "figure06_umap_test.png", placed, points)
    return common.sha256(points.tobytes())


def plot_reliability(path, bins):
    """Reliability diagram: accuracy over confidence. On the diagonal the probabilities are true."""
    share, _, accuracy = bins.T
    centres = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
    error = common.percent(expected_calibration_error(bins))
    with common.drawing(path, (5, 4.5)) as figure:
        axes = figure.subplots()
        bars = {"color": "tab:blue", "alpha": 0.8, "label": "accuracy in the bin"}
        axes.bar(centres, accuracy, 0.9 / CALIBRATION_BINS, **bars)
        axes.plot([0, 1], [0, 1], "k--", label="perfect calibration")
        axes.plot(centres, share, "o-", color="tab:orange", label="share of images")
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.set_title(f"ECE {error}")
        axes.legend()


def plot_confusion(path, confusion):
    """Confusion matrix (int 10 x 10, rows are the true classes) with counts and accuracies."""
    shares = 100 * confusion.diagonal() / confusion.sum(1).clip(1)
    names = [f"{name} {share:.1f} %" for name, share in zip(common.CLASSES, shares, strict=True)]
    with common.drawing(path, (7, 6)) as figure:
        axes = figure.subplots()
        axes.imshow(confusion, cmap="Blues")
        for true, predicted in np.ndindex(confusion.shape):
            count = confusion[true, predicted]
            colour = "white" if count > confusion.max() / 2 else "black"
            place = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(predicted, true, count, color=colour, **place)
        axes.set_xticks(range(10), common.CLASSES, rotation=45, ha="right")
        axes.set_yticks(range(10), names)
        axes.set(xlabel="predicted", ylabel="true class and its accuracy")


if __name__ == "__main__":
    common.run(main)
