"""Question 2: train ResNet-18 from random weights with cross-entropy on the 12,000 images.

Reports accuracy on validation and test (per class too, with the confusion matrix), the calibration of the
predicted probabilities, the curves of accuracy and loss, and a UMAP of the 512 numbers that the convolutional
part ends in: fitted on train without labels, then applied to test.

Reaches 85.04 % on test (three seeds, standard deviation 0.16) in 26 minutes of training on two cores of a Zen 4 EPYC;
`--stem cifar --epochs 150 --trivial-augment` 92.23 % (one run) in 301 minutes.

Reads   results/q1/split.npz, CIFAR-10
Writes  results/q2: model.pt, figure03 to figure06, confusion and reliability figures, metrics.json
Run     python q2_train_ce.py
"""

import numpy as np
import torch
import torch.nn.functional as F

import common

CUTOUT = 12  # side of the square, in pixels
CUTMIX = 0.5  # share of every batch that --cutmix mixes; the rest gets the cutout
LABEL_SMOOTHING = 0.1  # keeps the network from growing over-confident on so few images
CALIBRATION_BINS = 15  # as in Guo et al. 2017


def main():
    parser = common.argument_parser(__doc__)
    common.add_training_flags(parser, epochs=40, batch_size=64, lr=0.1, stem="stride2")
    parser.add_argument("--cutmix", action="store_true",
                        help="mix half of every batch with other images, for runs long enough to overfit without")
    parser.add_argument("--trivial-augment", action="store_true",
                        help="change colour or geometry of every image at random, for the same; stronger than --cutmix")
    args = common.parse_arguments(parser)
    folder = args.results / "q2"
    split, data = common.load_data(args)
    origin = common.provenance(args, "q2", split)
    seconds = {}

    model, history = train_on_clean_images(data, args, split, folder / "training.pt")
    seconds["train"] = round(sum(epoch["seconds"] for epoch in history), 2)
    model_sha256 = common.save_checkpoint(folder / "model.pt", model, stem=args.stem, provenance=origin)
    common.plot_history(folder / "figure03_accuracy.png", history,
                        {"accuracy": "train (augmented)", "val_accuracy": "validation"}, "accuracy")
    common.plot_history(folder / "figure04_loss.png", history,
                        {"loss": "train (augmented, smoothed labels)", "val_loss": "validation"}, "cross-entropy")

    trained = common.frozen(model, args.precision)
    with common.timed(seconds, "evaluate"):
        scores = {name: class_scores(trained, *data[name], folder, name) for name in ("val", "test")}
    with common.timed(seconds, "umap"):
        train_labels, test_labels = data["train"][1], data["test"][1]
        train_features, test_features = (common.backbone_features(trained, common.as_float(data[name][0]))
                                         for name in ("train", "test"))
        reducer = common.fit_umap(train_features, args.seed)
        common.plot_maps(folder / "figure05_umap_train.png",
                         {"train": (reducer.embedding_, train_labels)}, reducer.embedding_)
        common.plot_maps(folder / "figure06_umap_test.png",
                         {"test, in the map of train": (common.map_into(reducer, test_features), test_labels)},
                         reducer.embedding_)

    common.write_metrics(folder, origin, {
        "model_sha256": {"model.pt": model_sha256},
        "accuracy": {"clean": scores["test"]["accuracy"]},
        "n_test": len(test_labels),
        "val": scores["val"], "test": scores["test"],
        "umap_sha256": common.sha256(reducer.embedding_.tobytes()),
        "history": history,
        "seconds": seconds,
    })
    common.print_table(
        "Question 2: ResNet-18 with cross-entropy",
        ["part", "images", "accuracy", "calibration error (ECE)"],
        [[name, str(len(data[name][1])), common.percent(score["accuracy"]), common.percent(score["ece"])]
         for name, score in scores.items()],
    )


def train_on_clean_images(data, args, split, state_file):
    """A trained model in eval mode, and the history of its training."""
    images, labels = data["train"]
    val_images, val_labels = (part[: common.VALIDATION_SUBSET] for part in data["val"])

    def batches(generator):
        return common.shuffled_batches(len(images), args.batch_size, generator)

    def batch_loss(model, indices, generator):
        batch, targets = images[indices], labels[indices]
        if args.trivial_augment:
            batch = trivial_augment(batch, generator)
        batch = common.crop_and_flip(common.as_float(batch), generator)
        if args.cutmix:
            batch, targets = cut_and_mix(batch, targets, generator)
        else:
            batch = cut_out(batch, generator)
        logits = model(batch).float()
        loss = F.cross_entropy(logits, targets, label_smoothing=LABEL_SMOOTHING)
        return loss, (logits.argmax(1) == labels[indices]).sum()

    def evaluate(model):
        return common.validation_scores(common.frozen(model, args.precision), common.as_float(val_images), val_labels)

    torch.manual_seed(args.seed)
    model = common.resnet18(len(common.CLASSES), args.stem).to(args.device)
    recipe = common.training_recipe(args, "q2", split, label_smoothing=LABEL_SMOOTHING, cutout=CUTOUT,
                                    cutmix=CUTMIX if args.cutmix else 0.0, trivial_augment=args.trivial_augment)
    history = common.train(model, batches, batch_loss, evaluate, args, recipe, state_file)
    return model, history


def trivial_augment(images, generator):
    """TrivialAugment (Müller & Hutter 2021): for each image one of 14 changes of colour or geometry, of random strength.

    images uint8 N x 3 x H x W. What a change leaves empty takes the mean colour of CIFAR-10. Draws from the CPU
    generator: torchvision draws from the global one, which is seeded from it here and is afterwards as it was.
    """
    from torchvision.transforms.v2 import TrivialAugmentWide

    policy = TrivialAugmentWide(fill=[round(255 * mean) for mean in common.CIFAR10_MEAN])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
        return torch.stack([policy(image) for image in images])


def cut_out(images, generator):
    """Cutout (DeVries & Taylor 2017): a square of each image, partly outside perhaps, takes the mean colour of CIFAR-10.

    images N x 3 x H x W float32. Draws from the CPU generator.
    """
    number, _, height, width = images.shape
    top = torch.randint(height, (number, 1, 1, 1), generator=generator) - CUTOUT // 2
    left = torch.randint(width, (number, 1, 1, 1), generator=generator) - CUTOUT // 2
    inside = common.send(squares(top, left, CUTOUT, height, width), images.device)
    mean = torch.tensor(common.CIFAR10_MEAN).view(1, 3, 1, 1)
    return torch.where(inside, common.send(mean, images.device), images)


def cut_mix(images, labels, generator):
    """CutMix (Yun et al. 2019): a square of each image comes from the next one, and so does that share of its label.

    images N x 3 x H x H float32 in random order, labels int64 N. The square covers up to half of the image, evenly
    distributed: more would be the same with the two images exchanged. Draws from the CPU generator.
    Returns images of the same shape and the classes' shares, float32 N x 10.
    """
    number, _, size, _ = images.shape
    area, down, right = torch.rand(3, number, 1, 1, 1, generator=generator)
    side = (size * (area / 2).sqrt()).floor()
    top, left = (((size - side + 1) * offset).floor() for offset in (down, right))
    inside = common.send(squares(top, left, side, size, size), images.device)
    own = F.one_hot(labels, len(common.CLASSES)).float()
    share = inside.float().mean((2, 3))
    return torch.where(inside, images.roll(1, 0), images), torch.lerp(own, own.roll(1, 0), share)


def cut_and_mix(images, labels, generator):
    """`cut_mix` for the first CUTMIX of a batch, `cut_out` for the rest. Takes and returns what `cut_mix` does."""
    mixed = round(CUTMIX * len(images))
    first, shares = cut_mix(images[:mixed], labels[:mixed], generator)
    rest = cut_out(images[mixed:], generator)
    return torch.cat([first, rest]), torch.cat([shares, F.one_hot(labels[mixed:], shares.shape[1])])


def squares(top, left, side, height, width):
    """Which pixels lie in the square of each image: bool N x 1 x height x width. top, left, side broadcast from N x 1 x 1 x 1."""
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    return (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)


def class_scores(model, images, labels, folder, name):
    """Accuracy, overall and per class, confusion matrix and calibration on one part, with their two figures.

    model `frozen`, images uint8, labels int64, name "val" or "test". Returns a dict of plain values.
    """
    logits = common.in_batches(model, common.as_float(images)).cpu()
    labels = labels.cpu()
    confidence, predicted = logits.softmax(1).max(1)
    confusion = torch.zeros(10, 10, dtype=torch.long).index_put_((labels, predicted), torch.tensor(1), accumulate=True)
    bins = reliability(confidence, predicted == labels)
    plot_confusion(folder / f"confusion_{name}.png", confusion.numpy())
    plot_reliability(folder / f"reliability_{name}.png", bins)
    return {
        "accuracy": common.accuracy(predicted, labels),
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy_per_class": dict(zip(common.CLASSES, (confusion.diag() / confusion.sum(1)).tolist())),
        "confusion": confusion.tolist(),
        "ece": expected_calibration_error(bins),
    }


def reliability(confidence, correct):
    """Calibration by equally wide bins of confidence (Guo et al. 2017).

    confidence float N in [0, 1], correct bool N. Returns an array of CALIBRATION_BINS rows: share of the images
    in the bin, their mean confidence, their accuracy; zeros for an empty bin.
    """
    number = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    counts = torch.bincount(number, minlength=CALIBRATION_BINS).double()
    sums = [torch.zeros(CALIBRATION_BINS, dtype=torch.double).index_add_(0, number, values.double())
            for values in (confidence, correct)]
    return torch.stack([counts / len(number), *(total / counts.clamp_min(1) for total in sums)], dim=1).numpy()


def expected_calibration_error(bins):
    """Mean gap between confidence and accuracy, each bin weighted by its share of the images."""
    share, confidence, accuracy = bins.T
    return float((share * np.abs(confidence - accuracy)).sum())


def plot_reliability(path, bins):
    """Reliability diagram: accuracy over confidence. On the diagonal the probabilities mean what they say."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5))
    axes = figure.subplots()
    share, _, accuracy = bins.T
    centres = (np.arange(CALIBRATION_BINS) + 0.5) / CALIBRATION_BINS
    axes.bar(centres, accuracy, 0.9 / CALIBRATION_BINS, color="tab:blue", alpha=0.8, label="accuracy in the bin")
    axes.plot([0, 1], [0, 1], "k--", label="perfect calibration")
    axes.plot(centres, share, "o-", color="tab:orange", label="share of images")
    axes.set(xlabel="confidence", ylabel="accuracy", title=f"ECE {common.percent(expected_calibration_error(bins))}",
             xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    common.save_figure(figure, path)


def plot_confusion(path, confusion):
    """Confusion matrix (int 10 x 10, rows are the true classes) with its counts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6))
    axes = figure.subplots()
    axes.imshow(confusion, cmap="Blues")
    for true, predicted in np.ndindex(confusion.shape):
        dark = confusion[true, predicted] > confusion.max() / 2
        axes.text(predicted, true, confusion[true, predicted], ha="center", va="center", fontsize=7,
                  color="white" if dark else "black")
    axes.set_xticks(range(10), common.CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), common.CLASSES)
    axes.set(xlabel="predicted", ylabel="true")
    common.save_figure(figure, path)


if __name__ == "__main__":
    common.run(main)
