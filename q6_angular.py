"""Question 6: train with the angular loss on clean data; measure as in questions 2 and 3.

ResNet-18 with an L2-normalised embedding of 128 numbers, trained with pytorch-metric-learning's
AngularLoss on batches with many images of each of the ten classes. Accuracy is that of a vote of
the 100 nearest training embeddings. See q5_angular_loss.md for the loss.

Attacking a k-NN vote: the vote has no gradient, so FGM and PGD raise a soft k-NN loss, as the ASK
attack does (Wang, Chen, Yao, Liu, Rajapakse & Hero, "ASK: Adversarial Soft k-Nearest Neighbor
Attack and Defense", arXiv 2106.14300; here with all training images as neighbours), and the vote
itself decides what the attack achieved. Random noise of the same size is measured beside it.

The first weights are those of question 2, so that this shows what the angular loss does to them;
`--init imagenet` takes torchvision's, as the original report did, `--init scratch` random ones and
`--init FILE` those of a model.pt from the same split. What they are worth by themselves is
measured, too: accuracy on validation before training, through the last layer's random weights.

Reaches 84.51 % on test from question 2's weights, which reached 85.16 % by their own classifier, in
3 minutes of training on two cores of a Zen 4 EPYC, in bfloat16 (means of three seeds; standard
deviations 0.10 and 0.13).

Reads   results/q1/split.npz, results/q2/model.pt, CIFAR-10
Writes  results/q6: model.pt and the state of its training, figure13 to figure16, right.npz,
        metrics.json
Run     python q6_angular.py
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import common

RECIPES = {  # searched on validation, from question 2's weights: docs/recipes.md
    "imagenet": {"epochs": 8, "batch_size": 120, "lr": 0.01},
    "stride2": {"epochs": 8, "batch_size": 120, "lr": 0.01},
    # 0.01 undoes in three epochs what question 2's 150 have learned.
    "cifar": {"epochs": 8, "batch_size": 120, "lr": 0.003},
}
LR_FROM_SCRATCH = 0.3  # the best from random weights (stride2); from ImageNet's none was tried
MODEL = "angular loss (q6)"
EMBEDDING = 128
ALPHA = 40  # degrees
NEIGHBOURS = 100
TEMPERATURE = 0.1  # of the soft k-NN loss that attacks raise
QUERIES = 1_000  # test images whose retrieval is scored at once, to spare memory
REFERENCE_IMAGES = 2_000  # training images that vote after each epoch; all of them vote at the end


def main():
    args = common.parse_arguments(parser())
    folder, seconds = args.results / "q6", {}
    split, data = common.load_data(args)
    model, about, first_weights = first_model(args, split)
    origin = common.provenance(args, "q6", split, seed=args.seed, init=args.init, **about)
    recipe = choose_recipe(args, split, about["stem"], first_weights)

    untrained = common.frozen(model, args.precision)
    path = folder / "model.pt"
    training = train_embedding(model, training_step, data, recipe, origin, path, args.fresh)
    made = common.save_trained(path, model, training)
    draw_curves(folder, training["history"], len(data["train"][1]))
    trained = common.frozen(model, args.precision)
    with common.timed(seconds, "vote"):
        train, test = (embed(trained, common.as_float(data[part][0])) for part in ("train", "test"))
        votes = measured_votes(untrained, trained, train, test, data)
    images, labels = common.as_float(data["test"][0]), data["test"][1]
    perturbed = common.perturbed_images(data["test"][0], "test", args.seed)
    losses, decide = attacked_losses(train, data["train"][1]), knn_decision(train, data["train"][1])
    with common.timed(seconds, "attack"):
        measured, right, gradient = common.robustness(
            model, images, perturbed, labels, args.seed, args.precision, losses, decide
        )
    examples = images, perturbed, labels, right["clean"], losses[0], decide
    common.plot_examples(folder / "figure15_examples.png", trained, *examples)
    with common.timed(seconds, "umap"):
        attacked = common.fgm_images(images, gradient)
        changed = (embed(trained, given) for given in (perturbed, attacked))
        draw_maps(folder, data, train, test, *changed, args.seed)

    models = {MODEL: {**made, **votes, **measured}}
    found = {"models": models, "n_test": len(labels), "epsilon": common.EPSILON}
    common.write_right(folder, {MODEL: right})
    common.write_metrics(folder, origin, {**found, "seconds": seconds})
    print_vote(args.init, votes["val"])
    common.print_conditions("Question 6: the vote on test", models)


def parser():
    """This script's flags."""
    flags = common.training_parser(__doc__, RECIPES)
    flags.add_argument(
        "--init",
        default="q2",
        help="first weights: q2, imagenet, scratch (whose peak learning rate is "
        f"{LR_FROM_SCRATCH:g}) or a checkpoint FILE (q2)",
    )
    return flags


def choose_recipe(args, split, stem, first_weights):
    """What shapes this training. first_weights: SHA-256 of those it begins with, or None."""
    recipes = RECIPES
    if args.init == "scratch":
        recipes = {name: {**row, "lr": LR_FROM_SCRATCH} for name, row in RECIPES.items()}
    constants = {"alpha": ALPHA, "embedding": EMBEDDING, "init": args.init}
    constants["first_weights"] = first_weights
    return common.choose_recipe(args, recipes, stem, "q6", split, **constants)


# ---- The first weights ---------------------------------------------------------------------------


def first_model(args, split):
    """The model to train, a dict that says where it comes from, and its first weights' SHA-256.

    The dict holds `stem`, which is that of question 2's model, so that all can be compared,
    and `q2_sha256` where the weights are that model's. A first layer of another shape stays random.
    The third is None with imagenet and scratch.
    """
    checkpoint = common.require_model(args, split)
    about = {"stem": checkpoint["stem"]}
    torch.manual_seed(args.seed)
    model = common.resnet18(EMBEDDING, checkpoint["stem"])
    if args.init == "scratch":
        return model.to(args.device), about, None
    if args.init == "imagenet":
        weights, first_weights = imagenet_weights(), None
    else:
        if args.init == "q2":
            about["q2_sha256"] = checkpoint["sha256"]
        else:
            checkpoint = common.read_checkpoint(Path(args.init).expanduser(), split)
        weights, first_weights = checkpoint["model"].backbone.state_dict(), checkpoint["sha256"]
    if weights["conv1.weight"].shape != model.backbone.conv1.weight.shape:
        weights["conv1.weight"] = model.backbone.conv1.weight.detach()
    model.backbone.load_state_dict(weights)
    return model.to(args.device), about, first_weights


def imagenet_weights():
    """torchvision's ResNet-18 weights without the last layer, from its cache or the network."""
    from torchvision.models import ResNet18_Weights

    weights = ResNet18_Weights.IMAGENET1K_V1
    try:
        tensors = weights.get_state_dict(progress=sys.stderr.isatty(), check_hash=True)
    except Exception as error:  # no network; or a damaged file, for which torch raises any kind
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        raise common.UserError(
            f"torchvision's ImageNet weights cannot be loaded ({error}); "
            f"connect to the network, delete {cached} if it is there and "
            "damaged, or use --init q2"
        ) from error
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}


# ---- Training ------------------------------------------------------------------------------------


def train_embedding(model, step, data, recipe, origin, path, fresh):
    """Train the model in place by `step` on batches of every class; returns common.train's dict."""
    images, labels = (part[:REFERENCE_IMAGES] for part in data["train"])
    val_images, val_labels = (part[: common.VALIDATION_SUBSET] for part in data["val"])

    def evaluate(model):
        model = common.frozen(model, recipe["precision"])
        train, val = (embed(model, common.as_float(part)) for part in (images, val_images))
        batches = zip(
            val.split(recipe["batch_size"]), val_labels.split(recipe["batch_size"]), strict=True
        )
        losses = [angular_loss(*batch, recipe["alpha"]).item() for batch in batches]
        return {
            "val_loss": float(np.mean(losses)),
            "val_accuracy": common.accuracy(vote(train, labels, val), val_labels),
        }

    return common.train(
        model,
        data["train"],
        step,
        class_balanced_batches,
        evaluate,
        recipe,
        origin,
        path,
        fresh,
    )


def training_step(model, images, labels, generator, recipe):
    """Angular loss of uint8 images, and how many nearest other images are of their class."""
    images = common.crop_and_flip(common.as_float(images), generator)
    return loss_and_correct(model, images, labels, recipe)


def loss_and_correct(model, images, labels, recipe):
    """The same for float32 images, unchanged."""
    embeddings = F.normalize(model(images))
    loss = angular_loss(embeddings, labels, recipe["alpha"])
    return loss, nearest_is_same_class(embeddings.detach(), labels)


def angular_loss(embeddings, labels, alpha):
    """The library's angular loss (Wang et al. 2017) of normalised embeddings, alpha in degrees."""
    from pytorch_metric_learning.losses import AngularLoss

    return AngularLoss(alpha=alpha)(embeddings, labels)


def class_balanced_batches(labels, batch_size, generator):
    """An epoch of batches with as many images of each class; an image comes once or not at all.

    The library's MPerClassSampler draws from a global generator and keeps state between epochs, so
    that a resumed training would end differently. Raises UserError for a batch size that is no
    multiple of the number of classes, is without pairs, or exceeds the images.
    """
    classes = len(common.CLASSES)
    per_class = batch_size // classes
    indices = [(labels.cpu() == label).nonzero()[:, 0] for label in range(classes)]
    batches = min(map(len, indices)) // max(per_class, 1)
    if batch_size % classes or per_class < 2 or batches < 1:
        raise common.UserError(
            f"--batch-size {batch_size}: must be a multiple of {classes}, at least twice that for "
            f"a pair of each class, and at most {classes * min(map(len, indices))}, like 120"
        )
    shuffled = [own[torch.randperm(len(own), generator=generator)] for own in indices]
    chosen = [own[: batches * per_class].view(batches, per_class) for own in shuffled]
    return list(torch.cat(chosen, dim=1))


def nearest_is_same_class(embeddings, labels):
    """Number of images whose nearest other image of the batch is of their class."""
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
    return (labels[similarity.argmax(1)] == labels).sum()


# ---- The vote ------------------------------------------------------------------------------------


def embed(model, images):
    """L2-normalised embeddings by a `frozen` model, float32 N x EMBEDDING."""
    return F.normalize(common.in_batches(model, images))


def vote(train, train_labels, embeddings, k=NEIGHBOURS):
    """Majority vote of the k nearest training embeddings (Euclidean): int64 N; ties: smaller label.

    train M x D, train_labels int64 M, embeddings N x D. Where M is below k, all vote.
    """
    _, nearest = common.nearest_neighbours(embeddings, min(k, len(train)), train)
    votes = torch.zeros(len(nearest), int(train_labels.max()) + 1, device=nearest.device)
    one_each = torch.ones_like(nearest, dtype=votes.dtype)
    return votes.scatter_add_(1, train_labels[nearest], one_each).argmax(1)


def validation_accuracy(model, train, data):
    """Accuracy on validation of the vote of the training images.

    model: `frozen`; train: its embeddings of those.
    """
    val = embed(model, common.as_float(data["val"][0]))
    return common.accuracy(vote(train, data["train"][1], val), data["val"][1])


def measured_votes(untrained, trained, train, test, data):
    """What is measured without attack: a dict of plain values.

    untrained, trained: `frozen` models; train, test: the second's embeddings.
    """
    before = embed(untrained, common.as_float(data["train"][0]))
    return {
        "val": {
            "accuracy": validation_accuracy(trained, train, data),
            "accuracy_before_training": validation_accuracy(untrained, before, data),
        },
        "retrieval": retrieval_quality(train, data["train"][1], test, data["test"][1]),
        "neighbours": NEIGHBOURS,
    }


def knn_decision(train, train_labels):
    """The k-NN vote as a function of the model's output, for common.robustness."""
    return lambda output: vote(train, train_labels, F.normalize(output))


def attacked_losses(train, train_labels):
    """What attacks raise: the soft vote's cross-entropy and, for the strongest, its margin."""
    losses = common.summed_cross_entropy, common.summed_margin
    return [soft_knn_loss(train, train_labels, loss) for loss in losses]


def soft_knn_loss(train, train_labels, loss=common.summed_cross_entropy):
    """A loss of the soft vote: every training image counts exp(cosine / TEMPERATURE) for its class.

    loss: of the logarithms of the ten sums; their cross-entropy is minus the logarithm of the true
    class's share. Returns a function of the model's output N x EMBEDDING and labels.
    """
    one_hot = F.one_hot(train_labels).float()

    def of_output(output, labels):
        weights = (F.normalize(output) @ train.T / TEMPERATURE).exp()  # at most exp(10)
        return loss((weights @ one_hot).log(), labels)

    return of_output


def retrieval_quality(train, train_labels, test, test_labels):
    """Precision at 1, R-precision and MAP@R of test queries among training embeddings.

    As in Musgrave et al. 2020. On the CPU, since the library's calculator needs float64, which
    Apple's GPUs lack.
    """
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    train, train_labels, test, test_labels = (
        tensor.cpu() for tensor in (train, train_labels, test, test_labels)
    )
    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")

    def neighbours(query, k, reference, ref_includes_query):
        return common.nearest_neighbours(query, k, reference)

    calculator = AccuracyCalculator(
        include=names,
        k=int(torch.bincount(train_labels).max()),
        device=torch.device("cpu"),
        knn_func=neighbours,
    )
    totals = dict.fromkeys(names, 0.0)
    for query, labels in zip(test.split(QUERIES), test_labels.split(QUERIES), strict=True):
        scores = calculator.get_accuracy(query, labels, train, train_labels)
        for name in names:
            totals[name] += len(labels) * scores[name] / len(test)
    return totals


# ---- Figures -------------------------------------------------------------------------------------


def draw_curves(folder, history, n_train):
    """Figure 13: accuracy and loss per epoch. n_train: number of training images."""
    voters = min(REFERENCE_IMAGES, n_train)
    voters = f"validation: {NEIGHBOURS}-NN among {voters} training images"
    accuracies = {"accuracy": "train: nearest image of the batch", "val_accuracy": voters}
    losses = {"loss": "train (augmented)", "val_loss": "validation"}
    common.plot_history(folder / "figure13_accuracy.png", history, accuracies, "accuracy")
    common.plot_history(folder / "figure13_loss.png", history, losses, "angular loss")


def draw_maps(folder, data, train, test, perturbed, attacked, seed):
    """Figures 14 and 16: the UMAP of the embeddings, fitted on those of train."""
    labels = data["test"][1]
    points, place = common.fit_umap(train, seed)
    clean = {
        "train": (points, data["train"][1]),
        "test, in the map of train": (place(test), labels),
    }
    changed = {
        "perturbed test": (place(perturbed), labels),
        f"test under FGM, eps = {255 * common.EPSILON['linf']:g}/255": (place(attacked), labels),
    }
    common.plot_maps(folder / "figure14_umap.png", clean, points)
    common.plot_maps(folder / "figure16_umap.png", changed, points)


def print_vote(init, val):
    """What training adds to what the first weights are worth. val: accuracies of the vote."""
    before, after = (common.percent(val[key]) for key in ("accuracy_before_training", "accuracy"))
    print(
        f"Accuracy on validation: {before} before training (weights of {common.one_line(init)}), "
        f"{after} after"
    )


if __name__ == "__main__":
    common.run(main)
