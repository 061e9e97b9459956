"""Question 4: train on perturbed data, without and with the Fast Gradient Method in the training loop.

Two models, both from question 2's weights, so that these epochs come on top of that question's (`--init scratch`: from
random ones). `perturbed` sees every image with a new perturbation as in question 3 in every epoch;
`perturbed_fgm_trained` sees such images under attack. Plain FGM training overfits catastrophically: after some epochs
it resists FGM and nothing else (Wong et al. 2020; Andriushchenko & Flammarion 2020). N-FGSM (de Jorge et al. 2022)
prevents that at no cost, by uniform noise of twice epsilon before the step and no projection after it. Whether it does
is shown by PGD-20 accuracy on validation images after every epoch; where that collapses, raise `--noise`.

Reaches, in one run of 10 and 16 minutes of training on two cores of a Zen 4 EPYC: `perturbed` 82.79 % on perturbed
test; `perturbed_fgm_trained` 37.49 % on perturbed test under FGM and 37.26 % on clean test under PGD-20, epsilon 8/255.
Weights from a long training bear less. From question 2's 150 epochs with `--stem cifar`, `perturbed` reaches 89.77 % at
a peak rate of 0.005, at which `perturbed_fgm_trained` overfits catastrophically: hence `--lr-perturbed`. At the default
rate that one did so after 8 of 16 epochs with the default noise; with `--noise 4` it reaches 42.05 and 37.84 %.

Reads   results/q1/split.npz, results/q2/model.pt, CIFAR-10; results of q3 for the comparison, if they are there
Writes  results/q4: a .pt file per model, figure09 to figure12 for each, metrics.json
Run     python q4_adv_train.py
"""

import copy
from argparse import Namespace

import torch
import torch.nn.functional as F

import common

LABEL_SMOOTHING = 0.1
PGD_IMAGES = 250  # the first validation images, attacked after every epoch


def main():
    parser = common.argument_parser(__doc__)
    common.add_training_flags(parser, epochs=16, batch_size=64, lr=0.1, stem="stride2")
    parser.add_argument("--init", choices=("q2", "scratch"), default="q2",
                        help="first weights: those of question 2's model or random ones (q2)")
    parser.add_argument("--lr-perturbed", type=common.positive_number,
                        help="peak learning rate of the model trained without FGM (that of --lr)")
    parser.add_argument("--noise", type=common.positive_number, default=2.0,
                        help="noise before the FGM step in training, in epsilons (2); more where val_pgd collapses")
    args = common.parse_arguments(parser)
    folder = args.results / "q4"
    split, data = common.load_data(args)
    first, parents = first_model(args, split)
    origin = common.provenance(args, "q4", split, parents)

    trained = {}
    for name, prepare, settings in (
            ("perturbed", perturb_only, {"lr": args.lr_perturbed or args.lr, "noise": None}),
            ("perturbed_fgm_trained", perturb_and_attack, {})):
        model = copy.deepcopy(first)
        history = train_on(prepare, name, model, data, Namespace(**{**vars(args), **settings}), split, origin,
                           folder / f"training_{name}.pt")
        model_sha256 = common.save_checkpoint(folder / f"{name}.pt", model, stem=args.stem, provenance=origin)
        draw_curves(folder, name, history)
        trained[name] = model, model_sha256, history

    # The test images come only now: training needs the memory.
    images, labels = common.as_float(data["test"][0]), data["test"][1]
    perturbed = common.perturbed_images(data["test"][0], "test", args.seed)
    results = {}
    for name, (model, model_sha256, history) in trained.items():
        seconds = {"train": round(sum(epoch["seconds"] for epoch in history), 2)}
        with common.timed(seconds, "attack"):
            measured = common.robustness(common.frozen(model, args.precision), common.frozen(model), images, perturbed,
                                         labels, args.seed)
        results[name] = {**measured, "model_sha256": model_sha256, "history": history, "seconds": seconds}
    del images  # the maps need the memory
    for name, (model, *_) in trained.items():
        with common.timed(results[name]["seconds"], "umap"):
            draw_umap(folder, name, common.frozen(model, args.precision), data, perturbed, args.seed)

    metrics = {key: {name: result[key] for name, result in results.items()} for key in results["perturbed"]}
    common.write_metrics(folder, origin, {**metrics, "n_test": len(labels), "epsilon": common.EPSILON})
    common.print_conditions("Question 4: accuracy on test, compared with questions 2 and 3",
                            {**common.measured_before(args, split), **common.models_of("q4", metrics)})


def first_model(args, split):
    """The model that training starts from, and the SHA-256 of its checkpoint in a list, which is empty for random weights."""
    if args.init == "scratch":
        torch.manual_seed(args.seed)
        return common.resnet18(len(common.CLASSES), args.stem).to(args.device), []
    model, checkpoint = common.require_model(args, split, "q2")
    if checkpoint["stem"] != args.stem:
        raise common.UserError(f"question 2's model has the stem {checkpoint['stem']}; give --stem {checkpoint['stem']}, "
                               "or --init scratch")
    return model, [checkpoint["sha256"]]


def perturb_only(model, images, labels, noise, generator):
    """New perturbed versions of clean images; takes the arguments of `perturb_and_attack`, to stand in its place."""
    return common.perturb(common.crop_and_flip(images, generator), generator)


def perturb_and_attack(model, images, labels, noise, generator):
    """New perturbed versions of clean images, attacked by N-FGSM (de Jorge et al. 2022, algorithm 1).

    Noise uniform within `noise` times eps, one FGM step of eps from there; neither is projected back to eps.
    """
    eps = common.EPSILON["linf"]
    images = perturb_only(model, images, labels, noise, generator)
    start = torch.empty(images.shape).uniform_(-noise * eps, noise * eps, generator=generator)
    noisy = (images + common.send(start, images.device)).clamp(0, 1).requires_grad_()
    gradient, = torch.autograd.grad(F.cross_entropy(model(noisy).float(), labels), noisy)
    return (noisy.detach() + eps * gradient.sign()).clamp(0, 1)


def train_on(prepare, name, model, data, args, split, origin, state_file):
    """Train the model in place on the images that `prepare` makes, under noise of `args.noise`; returns the history."""
    images, labels = data["train"]
    val_images, val_labels = (part[: common.VALIDATION_SUBSET] for part in data["val"])
    val_images = common.perturbed_images(val_images, "val", args.seed)

    def batches(generator):
        return common.shuffled_batches(len(images), args.batch_size, generator)

    def batch_loss(model, indices, generator):
        target = labels[indices]
        prepared = prepare(model, common.as_float(images[indices]), target, args.noise, generator)
        logits = model(prepared).float()
        return F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING), (logits.argmax(1) == target).sum()

    def evaluate(model):
        model = common.frozen(model, args.precision)
        pgd = common.pgd_accuracy_by_step(model, val_images[:PGD_IMAGES], val_labels[:PGD_IMAGES],
                                          common.EPSILON["linf"], common.PGD_STEP_SIZE, common.PGD_STEPS)
        return {**common.validation_scores(model, val_images, val_labels), "val_pgd": pgd[-1]}

    recipe = common.training_recipe(args, f"q4 {name}", split, label_smoothing=LABEL_SMOOTHING, noise=args.noise,
                                    eps=common.EPSILON["linf"], first_weights=origin["parent_sha256"])
    return common.train(model, batches, batch_loss, evaluate, args, recipe, state_file)


def draw_curves(folder, name, history):
    """Figures 9 and 10: accuracy, with PGD-20's, and loss per epoch."""
    common.plot_history(folder / f"figure09_accuracy_{name}.png", history,
                        {"accuracy": "train, as trained on", "val_accuracy": "perturbed validation",
                         "val_pgd": "perturbed validation, PGD-20"}, "accuracy")
    common.plot_history(folder / f"figure10_loss_{name}.png", history,
                        {"loss": "train, as trained on", "val_loss": "perturbed validation"}, "cross-entropy")


def draw_umap(folder, name, model, data, perturbed_test, seed):
    """Figures 11 and 12: UMAP fitted on perturbed train, and perturbed test in that map."""
    train, test = (common.backbone_features(model, images)
                   for images in (common.perturbed_images(data["train"][0], "train", seed), perturbed_test))
    reducer = common.fit_umap(train, seed)
    common.plot_maps(folder / f"figure11_umap_train_{name}.png",
                     {"perturbed train": (reducer.embedding_, data["train"][1])}, reducer.embedding_)
    common.plot_maps(folder / f"figure12_umap_test_{name}.png",
                     {"perturbed test, in the map of train": (common.map_into(reducer, test), data["test"][1])},
                     reducer.embedding_)


if __name__ == "__main__":
    common.run(main)
