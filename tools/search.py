"""Variants of the recipes of questions 2 and 4, each trained once and measured on validation.

Made for a GPU, where a variant of `cifar` should take minutes. Of each variant two models are
measured: the last, and the mean of the weights of the last fifth of the epochs, with its batch-norm
statistics made anew. A variant that has its rows is not trained again. Question 4's variants are of
the model that is trained with FGM. Several searches can share a GPU, each with its own --results.

Reads   results/q1/split.npz, results/q2/model.pt for question 4's, CIFAR-10
Writes  results/search.csv, results/search
Run     python -m tools.search --stem cifar
        python -m tools.search --stem cifar --only "q2 mixup" "q2 recipe" --epochs 300 --seed 1
"""

import collections
import copy
import csv
import io
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import common
import q2_train_ce
import q4_adv_train

ATTACKED = 2_000  # validation images for FGM, PGD-20 and the strongest attack
HEADER = [
    "variant",
    "stem",
    "epochs",
    "seed",
    "minutes",
    "clean",
    "perturbed",
    "fgm",
    "pgd",
    "strongest",
    "images_attacked",
    "hardware",
]
BETA = 6.0  # weight of TRADES's second term (Zhang et al. 2019)
AWP = 0.005  # by how much of their own length weights are perturbed (Wu et al. 2020)


def main():
    args = common.parse_arguments(parser())
    path = args.results / "search.csv"
    split, data = common.load_data(args)
    stem = q2_train_ce.choose_stem(args)
    rows = list(csv.reader(path.read_text().splitlines())) if path.exists() else [HEADER]
    for name in args.only:
        recipe = recipe_of(name, stem, args, split)
        key = [name, stem, str(recipe["epochs"]), str(args.seed)]
        if key in [row[:4] for row in rows]:
            continue
        started = time.perf_counter()
        origin = common.provenance(args, recipe["question"], split, seed=args.seed, stem=stem)
        try:
            models = trained(name, recipe, origin, args, split, data)
        except common.UserError as error:  # such as a loss that became infinite
            print(f"{name}: {error}", file=sys.stderr)
            continue
        minutes = f"{(time.perf_counter() - started) / 60:.1f}"
        for end, model in models.items():
            shares = measured(common.frozen(model, args.precision), data["val"], args.seed)
            cells = [f"{100 * share:.2f}" for share in shares]
            attacked = str(len(data["val"][1][:ATTACKED]))
            rows.append([name + end, *key[1:], minutes, *cells, attacked, origin["hardware"]])
        write_rows(path, rows)


def parser():
    """This tool's flags."""
    flags = common.argument_parser(__doc__)
    flags.add_argument("--stem", choices=("auto", *common.STEMS), default="auto")
    whole = common.between(int, 1, 10**6)
    flags.add_argument("--epochs", type=whole, help="of every variant (its question's recipe)")
    flags.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    return flags


def recipe_of(name, stem, args, split):
    """What the question's script would train with, and the variant's changes."""
    module = {"q2": q2_train_ce, "q4": q4_adv_train}[name[:2]]
    constants = {
        "label_smoothing": module.LABEL_SMOOTHING,
        "cutout": q2_train_ce.CUTOUT,
        "eps": common.EPSILON["linf"],
    }
    recipe = common.choose_recipe(args, module.RECIPES, stem, name[:2], split, **constants)
    return {**recipe, "variant": name, **VARIANTS[name][0]}


def trained(name, recipe, origin, args, split, data):
    """The variant's last model and the mean of its last ones: dict from a name's end to it."""
    _, step, prepare = VARIANTS[name]
    torch.manual_seed(recipe["seed"])
    model = common.resnet18(len(common.CLASSES), recipe["stem"]).to(recipe["device"])
    if name.startswith("q4") and name != "q4 random weights":
        checkpoint = common.read_checkpoint(args.results / "q2" / "model.pt", split)
        if checkpoint["stem"] != recipe["stem"]:
            raise common.UserError(f"question 2's model has the stem {checkpoint['stem']}")
        model = checkpoint["model"].to(recipe["device"])
    prepare(model, data["train"][0])
    images, labels = (part[: common.VALIDATION_SUBSET] for part in data["val"])
    weights = collections.deque(maxlen=max(1, recipe["epochs"] // 5))

    def evaluate(model):
        weights.append(copy.deepcopy(model.state_dict()))
        frozen = common.frozen(model, recipe["precision"])
        return common.validation_scores(frozen, common.as_float(images), labels)

    path, batches = args.results / "search" / "model.pt", common.shuffled_batches
    common.train(model, data["train"], step, batches, evaluate, recipe, origin, path, fresh=True)
    mean = copy.deepcopy(model)
    mean.load_state_dict(
        {key: torch.stack([each[key].float() for each in weights]).mean(0) for key in weights[0]}
    )
    renew_statistics(mean, data["train"], step, recipe)
    return {"": model, ", mean of the last fifth": mean}


def renew_statistics(model, train, step, recipe):
    """Make a mean of weights its own batch-norm statistics, over an epoch of training images."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
    model.train()
    generator = common.generator_for(recipe["seed"], "epoch", recipe["epochs"])
    for batch in common.shuffled_batches(train[1], recipe["batch_size"], generator):
        batch = common.send(batch, recipe["device"])
        step(model, train[0][batch], train[1][batch], generator, recipe)
    model.eval()


def measured(model, val, seed):
    """Accuracies of a `frozen` model by the columns of HEADER, from clean to strongest: floats.

    The attacks are on the first ATTACKED images, as they are.
    """
    images, labels = common.as_float(val[0]), val[1]
    perturbed = common.perturbed_images(val[0], "val", seed)
    clean, shifted = (
        common.accuracy(common.predict(model, part), labels) for part in (images, perturbed)
    )
    images, labels, eps = images[:ATTACKED], labels[:ATTACKED], common.EPSILON["linf"]
    attacked = common.attacks_on(
        model, images, labels, common.summed_cross_entropy, common.most_likely
    )
    _, _, under_fgm, steps_to_fool = attacked
    survivors = steps_to_fool(eps, common.PGD_STEP_SIZE) > common.PGD_STEPS
    strongest = common.right_under_strongest(
        model, images, labels, survivors, [common.summed_margin], common.most_likely
    )
    return [clean, shifted, *map(common.share, (under_fgm(eps), survivors, strongest))]


def write_rows(path, rows):
    """Write the table, and print its last row."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    common.write_file(path, buffer.getvalue().encode())
    print(dict(zip(HEADER, rows[-1], strict=True)), flush=True)


# ---- Steps and what comes before training -------------------------------------------------------


def mixup(model, images, labels, generator, recipe):
    """Question 2's step on mixtures of two images, by a uniform share (Zhang et al. 2018)."""
    images = q2_train_ce.augmented(images, generator, recipe)
    share = torch.rand((), generator=generator).item()
    other = common.send(torch.randperm(len(images), generator=generator), images.device)
    logits = model(torch.lerp(images[other], images, share))
    smoothing = recipe["label_smoothing"]
    of_each, of_other = (
        F.cross_entropy(logits, classes, label_smoothing=smoothing)
        for classes in (labels, labels[other])
    )
    return share * of_each + (1 - share) * of_other, (logits.argmax(1) == labels).sum()


def attacked_after_trivial_augment(model, images, labels, generator, recipe):
    """Question 4's step on images that TrivialAugment has changed before."""
    images = q2_train_ce.trivial_augment(images, generator)
    return q4_adv_train.step_on_attacked(model, images, labels, generator, recipe)


def pgd_training(model, images, labels, generator, recipe):
    """Madry et al. 2018 with 10 steps: a yardstick, at five times N-FGSM's cost."""
    images = q4_adv_train.perturbed_versions(images, generator)
    start = torch.empty(images.shape).uniform_(-1, 1, generator=generator) * recipe["eps"]
    moved = (images + common.send(start, images.device)).clamp(0, 1)
    for _ in range(10):
        _, gradient = common.input_gradient(model, moved, labels)
        moved = common.ascend(moved, gradient, 2 / 255, "linf")
        moved = common.project(moved, images, recipe["eps"], "linf")
    return common.loss_and_correct(model, moved, labels, recipe)


def trades(model, images, labels, generator, recipe):
    """Zhang et al. 2019: cross-entropy, and BETA times how far an attack moves the prediction."""
    images = q4_adv_train.perturbed_versions(images, generator)
    target = model(images).detach().log_softmax(1)

    def divergence(logits, target):
        return F.kl_div(logits.log_softmax(1), target, reduction="sum", log_target=True)

    noise = torch.randn(images.shape, generator=generator) * 0.001
    moved = (images + common.send(noise, images.device)).clamp(0, 1)
    for _ in range(10):
        _, gradient = common.input_gradient(model, moved, target, divergence)
        moved = common.ascend(moved, gradient, 2 / 255, "linf")
        moved = common.project(moved, images, recipe["eps"], "linf")
    logits, attacked = model(torch.cat([images, moved])).chunk(2)
    apart = divergence(attacked, logits.log_softmax(1)) / len(images)
    loss = F.cross_entropy(logits, labels, label_smoothing=recipe["label_smoothing"]) + BETA * apart
    return loss, (attacked.argmax(1) == labels).sum()


def adversarial_weights(model, images, labels, generator, recipe):
    """Question 4's step with weights perturbed up the loss by AWP of their length (Wu et al. 2020).

    The gradient is taken at the perturbed weights, which go back before the optimiser's step.
    """
    images = q4_adv_train.perturbed_versions(images, generator)
    images = q4_adv_train.n_fgsm(model, images, labels, recipe["eps"], recipe["noise"], generator)
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    loss, _ = common.loss_and_correct(model, images, labels, recipe)
    gradients = torch.autograd.grad(loss, weights)
    moves = [
        AWP * weight.detach().norm() / gradient.norm().clamp_min(1e-12) * gradient
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    with torch.no_grad():
        for weight, move in zip(weights, moves, strict=True):
            weight += move
    loss, correct = common.loss_and_correct(model, images, labels, recipe)
    loss.backward()
    with torch.no_grad():
        for weight, move in zip(weights, moves, strict=True):
            weight -= move
    return loss.detach().requires_grad_(), correct  # whose own backward adds nothing


def nothing(model, images):
    """Train the model as it is."""


def centralise_gradients(model, images):
    """Every filter's gradient has mean 0 (Yong et al. 2020)."""
    for weight in model.backbone.parameters():
        if weight.ndim == 4:
            weight.register_hook(lambda gradient: gradient - gradient.mean((1, 2, 3), keepdim=True))


def whiten_first_layer(model, images):
    """The 3 x 3 stem takes whitened patches, and stays so (Jordan 2024, airbench)."""
    weight = model.backbone.conv1.weight
    if weight.shape[2:] != (3, 3):
        raise common.UserError("--stem imagenet: whitening is for a 3 x 3 first layer")
    normalised = (common.as_float(images[:2_000]) - model.mean) / model.std
    patches = F.unfold(normalised, 3, stride=3).transpose(1, 2).flatten(0, 1)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 1e-2).sqrt()).T.view(-1, 3, 3, 3)
    with torch.no_grad():
        weight[: 2 * len(filters)] = torch.cat([filters, -filters])
    weight.requires_grad_(False)


STEP_2, STEP_4 = q2_train_ce.training_step, q4_adv_train.step_on_attacked
VARIANTS = {  # changes of the recipe, the step, what is done to the model before training
    "q2 recipe": ({}, STEP_2, nothing),
    "q2 batch 128, rate 0.2": ({"batch_size": 128, "lr": 0.2}, STEP_2, nothing),
    "q2 batch 256, rate 0.4": ({"batch_size": 256, "lr": 0.4}, STEP_2, nothing),
    "q2 twice the decay": ({"weight_decay": 1e-3}, STEP_2, nothing),
    "q2 mixup": ({}, mixup, nothing),
    "q2 centralised gradients": ({}, STEP_2, centralise_gradients),
    "q2 whitened first layer": ({}, STEP_2, whiten_first_layer),
    "q4 recipe": ({}, STEP_4, nothing),
    "q4 batch 128, rate 0.2": ({"batch_size": 128, "lr": 0.2}, STEP_4, nothing),
    "q4 batch 256, rate 0.4": ({"batch_size": 256, "lr": 0.4}, STEP_4, nothing),
    "q4 noise 3": ({"noise": 3.0}, STEP_4, nothing),
    "q4 random weights": ({}, STEP_4, nothing),
    "q4 TrivialAugment": ({}, attacked_after_trivial_augment, nothing),
    "q4 perturbed weights": ({}, adversarial_weights, nothing),
    "q4 PGD-10": ({}, pgd_training, nothing),
    "q4 TRADES": ({}, trades, nothing),
}


if __name__ == "__main__":
    common.run(main)
