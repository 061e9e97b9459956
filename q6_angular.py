"""Question 6: the angular loss instead of cross-entropy, on clean data only; then questions 2 and 3 again.

ResNet-18 with an L2-normalised embedding of 128 numbers, trained with pytorch-metric-learning's AngularLoss on
batches of MPerClassSampler (all ten classes, many images of each). Accuracy is that of a vote of the 100 nearest
training embeddings. See q5_angular_loss.md for the loss.

Attacking a k-NN vote: the vote has no gradient, so FGM and PGD raise a soft k-NN loss, as the ASK attack does
(Wang, Wang & Xu 2021, "Adversarial Soft K-nearest Neighbors"; here with all training images as neighbours), and the
vote itself decides what the attack achieved. Random noise of the same size is measured beside it.

The first weights: torchvision's ImageNet ones when they are in its cache or can be fetched, otherwise with a warning
those of question 2, which are pretrained too, though on the same 12,000 images; `--init imagenet`, `--init scratch` or
`--init FILE` (a model.pt from the same split) to choose. What they are worth by themselves is measured, too: accuracy
on validation before training, through the last layer's random weights.

Reaches 84.80 % on test from question 2's weights, which reached 85.15 % by their own classifier, in one run of 14
minutes of training on two cores of a Zen 3 EPYC, in float32. With `--stem cifar --lr 0.003`, from question 2's 150 epochs
with TrivialAugment, which reached 92.23 %, 91.92 % (one run).

Reads   results/q1/split.npz, results/q2/model.pt, CIFAR-10; results of q3 and q4 for the comparison, if they are there
Writes  results/q6: model.pt, figure13 to figure16, angular_loss.png (the figure of question 5), metrics.json
Run     python q6_angular.py
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

import common

EMBEDDING = 128
ALPHA = 40  # degrees
NEIGHBOURS = 100
TEMPERATURE = 0.1  # of the soft k-NN loss that attacks raise
QUERIES = 1_000  # test images whose retrieval is scored at once, to spare memory
REFERENCE_IMAGES = 2_000  # training images that vote after each epoch; all of them vote at the end


def main():
    parser = common.argument_parser(__doc__)
    common.add_training_flags(parser, epochs=8, batch_size=120, lr=0.01, stem="stride2")
    parser.add_argument("--init", default="auto",
                        help="first weights: imagenet, scratch, a checkpoint FILE, or auto (imagenet, else question 2's)")
    args = common.parse_arguments(parser)
    folder = args.results / "q6"
    split, data = common.load_data(args)
    model, init, parents = first_model(args, split)
    origin = {**common.provenance(args, "q6", split, parents), "init": init}
    seconds = {}

    untrained = common.frozen(model, args.precision)
    history = train_embedding(model, data, args, split, init, folder / "training.pt")
    seconds["train"] = round(sum(epoch["seconds"] for epoch in history), 2)
    model_sha256 = common.save_checkpoint(folder / "model.pt", model, stem=args.stem, provenance=origin)
    draw_curves(folder, history)
    plot_angular_geometry(folder / "angular_loss.png")

    (train_images, train_labels), _, (test_images, labels) = data.values()
    trained, images = common.frozen(model, args.precision), common.as_float(test_images)
    perturbed = common.perturbed_images(test_images, "test", args.seed)
    with common.timed(seconds, "embed"):
        train = embed(trained, common.as_float(train_images))
        test = embed(trained, images)
        val_accuracy = validation_accuracy(trained, train, data)
        val_before = validation_accuracy(untrained, embed(untrained, common.as_float(train_images)), data)
        del untrained  # the attack needs the memory
        retrieval = retrieval_quality(train, train_labels, test, labels)
    loss, decide = soft_knn_loss(train, train_labels), knn_decision(train, train_labels)
    with common.timed(seconds, "attack"):
        measured = common.robustness(trained, common.frozen(model), images, perturbed, labels, args.seed, loss, decide)
    common.plot_examples(folder / "figure15_examples.png", trained, images[:8], perturbed[:8], labels[:8], loss, decide)
    with common.timed(seconds, "umap"):
        shifted = embed(trained, perturbed)
        attacked = common.under_fgm(lambda changed: embed(trained, changed), trained, images, labels, loss)
        del images, perturbed  # the map needs the memory
        draw_umap(folder, train, train_labels, test, shifted, attacked, labels, args.seed)

    metrics = {**measured, "n_test": len(labels), "epsilon": common.EPSILON, "neighbours": NEIGHBOURS,
               "val": {"accuracy": val_accuracy, "accuracy_before_training": val_before}, "retrieval": retrieval,
               "model_sha256": {"model.pt": model_sha256}, "history": history, "seconds": seconds}
    common.write_metrics(folder, origin, metrics)
    print(f"Started from: {init}")
    print(f"Accuracy on validation: {common.percent(val_before)} before training, {common.percent(val_accuracy)} after it")
    common.print_conditions("Question 6: all models on test", {**common.measured_before(args, split),
                                                               **common.models_of("q6", metrics)})


def first_model(args, split):
    """The model to train, where its weights come from, and the SHA-256 of the checkpoint behind them in a list.

    Where they come from is "scratch" or "imagenet", for which that list is empty, or "FILE (sha256)". A backbone keeps its
    first layer random where the stem differs from that of the given weights.
    """
    torch.manual_seed(args.seed)
    model = common.resnet18(EMBEDDING, args.stem).to(args.device)
    if args.init == "scratch":
        return model, "scratch", []
    checkpoint = None if args.init in ("auto", "imagenet") else args.init
    if checkpoint is None:
        try:
            weights, source, parents = imagenet_weights(), "imagenet", []
        except (OSError, RuntimeError) as error:
            if args.init == "imagenet":
                raise common.UserError(f"torchvision's ImageNet weights cannot be fetched ({error}); connect to the "
                                       "network, or use --init scratch") from error
            checkpoint = args.results / "q2" / "model.pt"
            print("WARNING: torchvision's ImageNet weights are neither in its cache nor to be fetched: "
                  f"STARTING FROM {checkpoint}, WHICH WAS TRAINED ON THE SAME FEW IMAGES.", file=sys.stderr)
    if checkpoint is not None:
        weights, sha256 = backbone_weights(checkpoint, args, split)
        source, parents = f"{checkpoint} ({sha256})", [sha256]
    if weights["conv1.weight"].shape != model.backbone.conv1.weight.shape:
        weights["conv1.weight"] = model.backbone.conv1.weight.detach()
    model.backbone.load_state_dict(weights)
    return model, source, parents


def imagenet_weights():
    """torchvision's ResNet-18 weights without the last layer, from its cache or the network."""
    from torchvision.models import ResNet18_Weights

    weights = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    return {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}


def backbone_weights(path, args, split):
    """A checkpoint's weights without normalisation and head, and its SHA-256.

    Raises UserError for another split.
    """
    checkpoint = common.read_checkpoint(path, common.script_command("q2", args.results, args.quick))
    common.refuse_other_split(path, checkpoint, split,
                              f"use one from {args.results}, for instance {args.results / 'q2/model.pt'}")
    weights = {name.removeprefix("backbone."): tensor for name, tensor in checkpoint["weights"].items()
               if name.startswith("backbone.")}
    return weights, checkpoint["sha256"]


def train_embedding(model, data, args, split, init, state_file):
    """Train the model in place with the angular loss; returns the history."""
    from pytorch_metric_learning.losses import AngularLoss
    from pytorch_metric_learning.samplers import MPerClassSampler
    from pytorch_metric_learning.utils import common_functions

    images, labels = data["train"]
    val_images, val_labels = (part[: common.VALIDATION_SUBSET] for part in data["val"])
    if args.batch_size % len(common.CLASSES) or args.batch_size < 2 * len(common.CLASSES):
        raise common.UserError(f"--batch-size {args.batch_size}: must be a multiple of {len(common.CLASSES)} and at least "
                               "twice that, for as many images of each class and a positive pair; for instance 120")
    angular_loss = AngularLoss(alpha=ALPHA)
    per_class = args.batch_size // len(common.CLASSES)
    epoch_length = max(len(images), args.batch_size)

    def batches(generator):
        # The sampler draws from a global of its library and remembers the order of its classes from epoch to epoch:
        # a fresh one with its own seed makes an epoch the same whether or not training was interrupted before it.
        common_functions.NUMPY_RANDOM = np.random.RandomState(generator.initial_seed() % 2**32)
        sampler = MPerClassSampler(labels.cpu(), per_class, args.batch_size, epoch_length)
        return list(torch.tensor(list(sampler)).split(args.batch_size))

    def batch_loss(model, indices, generator):
        batch = common.crop_and_flip(common.as_float(images[indices]), generator)
        embeddings = F.normalize(model(batch).float())
        return angular_loss(embeddings, labels[indices]), nearest_is_same_class(embeddings, labels[indices])

    def evaluate(model):
        model = common.frozen(model, args.precision)
        train, val = (embed(model, common.as_float(part)) for part in (images[:REFERENCE_IMAGES], val_images))
        predicted = vote(train, labels[:REFERENCE_IMAGES], val)
        val_batches = zip(val.split(args.batch_size), val_labels.split(args.batch_size))
        losses = [angular_loss(*batch).item() for batch in val_batches]
        return {"val_loss": float(np.mean(losses)), "val_accuracy": common.accuracy(predicted, val_labels)}

    recipe = common.training_recipe(args, "q6", split, init=init, alpha=ALPHA, embedding=EMBEDDING)
    return common.train(model, batches, batch_loss, evaluate, args, recipe, state_file)


def nearest_is_same_class(embeddings, labels):
    """Number of images whose nearest other image of the batch is of their class."""
    similarity = (embeddings @ embeddings.T).detach().fill_diagonal_(-2)
    return (labels[similarity.argmax(1)] == labels).sum()


def embed(model, images):
    """L2-normalised embeddings by a `frozen` model, float32 N x EMBEDDING."""
    return F.normalize(common.in_batches(model, images))


def vote(train, train_labels, embeddings):
    """The class of each embedding by its nearest training embeddings."""
    return common.knn_predict(train, train_labels, embeddings, min(NEIGHBOURS, len(train)))


def validation_accuracy(model, train, data):
    """Accuracy on validation of the vote of the training images, whose embeddings are `train`. model: `frozen`."""
    images, labels = data["val"]
    return common.accuracy(vote(train, data["train"][1], embed(model, common.as_float(images))), labels)


def knn_decision(train, train_labels):
    """The k-NN vote as a function of the model's output, for common.robustness."""
    return lambda output: vote(train, train_labels, F.normalize(output))


def soft_knn_loss(train, train_labels):
    """Minus log of the share that the true class has among all training images, weighted by exp(cosine / TEMPERATURE).

    Returns a function of the model's output N x EMBEDDING and labels N, summed over the batch.
    """
    same_class = F.one_hot(train_labels).bool().T

    def loss(output, labels):
        logits = F.normalize(output) @ train.T / TEMPERATURE
        of_true_class = logits.masked_fill(~same_class[labels], -torch.inf)
        return (logits.logsumexp(1) - of_true_class.logsumexp(1)).sum()

    return loss


def retrieval_quality(train, train_labels, test, test_labels):
    """Precision at 1, R-precision and MAP@R of test queries among training embeddings (Musgrave et al. 2020)."""
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    largest_class = int(torch.bincount(train_labels).max())
    calculator = AccuracyCalculator(include=names, k=largest_class, device=train.device, knn_func=nearest_neighbours)
    batches = zip(test.split(QUERIES), test_labels.split(QUERIES))
    scores = [(len(labels), calculator.get_accuracy(queries, labels, train, train_labels)) for queries, labels in batches]
    return {name: sum(number * score[name] for number, score in scores) / len(test) for name in names}


def nearest_neighbours(query, k, reference, ref_includes_query=False):
    """Exact k-NN in the form that AccuracyCalculator asks for, without faiss: squared distances and indices."""
    nearest = (2 - 2 * query @ reference.T).topk(k, largest=False)
    return nearest.values, nearest.indices


def draw_curves(folder, history):
    """Figure 13: accuracy and loss per epoch."""
    common.plot_history(folder / "figure13_accuracy.png", history,
                        {"accuracy": "train: nearest image of the batch",
                         "val_accuracy": f"validation: {NEIGHBOURS}-NN among {REFERENCE_IMAGES} training images"},
                        "accuracy")
    common.plot_history(folder / "figure13_loss.png", history,
                        {"loss": "train (augmented)", "val_loss": "validation"}, "angular loss")


def draw_umap(folder, train, train_labels, test, shifted, attacked, labels, seed):
    """Figures 14 and 16: UMAP fitted on the training embeddings; those of all test images in that map."""
    reducer = common.fit_umap(train, seed)

    def placed(embeddings):
        return common.map_into(reducer, embeddings), labels

    common.plot_maps(folder / "figure14_umap.png", {"train": (reducer.embedding_, train_labels),
                                                    "test, in the map of train": placed(test)}, reducer.embedding_)
    common.plot_maps(folder / "figure16_umap.png", {"perturbed test": placed(shifted),
                                                    "test under FGM, eps = 8/255": placed(attacked)},
                     reducer.embedding_)


def plot_angular_geometry(path):
    """Draw the angle that a naive constraint bounds and, beside it, the angle that the angular loss bounds."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    alpha = 40
    p, a, n = np.array([-1, 0]), np.array([1, 0]), np.array([1.4, 1.2])
    moved = np.array([1.12, 0.08])  # a worse place for the negative: almost on top of a
    c, radius = (a + p) / 2, np.linalg.norm(a - p) / 2
    m = c + radius * np.array([c[1] - n[1], n[0] - c[0]]) / np.linalg.norm(n - c)  # n - c, turned by 90 degrees
    grid = np.stack(np.meshgrid(np.linspace(-2, 2.6, 461), np.linspace(-1.5, 1.9, 341)), axis=-1)

    def naive(x):
        """Angle in degrees that the segment from p to a fills, seen from x (one point or a grid of points)."""
        u, v = a - x, p - x
        cross = u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
        return np.degrees(np.arctan2(np.abs(cross), (u * v).sum(-1)))

    def repaired(x):
        """Angle n' in degrees: tan n' = |a - p| / (2 |x - c|)."""
        return np.degrees(np.arctan2(radius, np.linalg.norm(x - c, axis=-1)))

    def draw_point(axes, point, label, colour, offset):
        axes.plot(*point, "o", color=colour, markersize=7)
        axes.annotate(label, point, offset, textcoords="offset points")

    def mark_angle(axes, corner, first, second):
        turn = np.linspace(*(np.arctan2(*(point - corner)[::-1]) for point in (first, second)))
        axes.plot(corner[0] + 0.25 * np.cos(turn), corner[1] + 0.25 * np.sin(turn), "k", linewidth=1)

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, angle, name, triangle in ((left, naive, "n", (p, a, n)), (right, repaired, "n'", (m, c, n))):
        axes.contourf(*np.moveaxis(grid, -1, 0), angle(grid), levels=[alpha, 180], colors=["#f6dfc8"])
        axes.fill(*np.transpose(triangle), fill=False, linewidth=1.2)
        mark_angle(axes, n, *triangle[:2])
        draw_point(axes, a, "$x_a$", "tab:blue", (-20, -16))
        draw_point(axes, p, "$x_p$", "tab:blue", (-20, -16))
        draw_point(axes, n, f"$x_n$,  ${name}$ = {angle(n):.0f}°", "tab:red", (8, 7))
        draw_point(axes, moved, f"$x_n$ moved,  ${name}$ = {angle(moved):.0f}°", "tab:orange", (14, -3))
        axes.set(xlabel=f"shaded: ${name}$ > {alpha}°, the constraint is violated", aspect="equal", xticks=[], yticks=[])

    left.set_title("naive constraint: angle $n$ of the triangle $x_a, x_p, x_n$")
    left.fill(*np.transpose((p, a, moved)), fill=False, linestyle="--")
    right.set_title("angular loss: angle $n'$ of the triangle $x_m, x_c, x_n$")
    right.plot(*np.transpose((p, a)), "k:")
    right.add_patch(Circle(c, radius, fill=False, color="tab:blue"))
    mark_angle(right, c, n, m)
    draw_point(right, c, "$x_c$,  90°", "tab:green", (-8, -16))
    draw_point(right, m, "$x_m$", "tab:green", (-22, 5))
    common.save_figure(figure, path)


if __name__ == "__main__":
    common.run(main)
