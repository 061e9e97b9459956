"""Question 3: perturb unseen images, attack the model of question 2, and measure again.

Perturbation: colour jitter, rotation of at most 5 degrees and ten pixels with one channel at full; every image
draws its own values, and the seed makes them the same images in every question. Attack: the Fast Gradient
Method in pixel space, with epsilon 8/255 in L-infinity and 0.5 in L2. PGD with 20 steps is the check that
FGM's number is not an artefact of masked gradients.

Reads   results/q1/split.npz, results/q2/model.pt, CIFAR-10
Writes  results/q3: figure07_examples.png, figure08_umap.png, curves of FGM over epsilon and PGD over steps,
        metrics.json
Run     python q3_attack.py
"""

import common

EXAMPLES = 8
CURVE_IMAGES = 4_000  # the first test images, for the curve over epsilon
CURVE_EPSILONS = [steps / 255 for steps in range(2, 17, 2)]


def main():
    parser = common.argument_parser(__doc__)
    common.add_precision_flag(parser)
    args = common.parse_arguments(parser)
    folder = args.results / "q3"
    split, data = common.load_data(args)
    network, checkpoint = common.require_model(args, split, "q2")
    model = common.frozen(network, args.precision)
    origin = common.provenance(args, "q3", split, [checkpoint["sha256"]])
    seconds = {}

    with common.timed(seconds, "perturb"):
        images, labels = common.as_float(data["test"][0]), data["test"][1]
        perturbed = common.perturbed_images(data["test"][0], "test", args.seed)
    with common.timed(seconds, "attack"):
        measured = common.robustness(model, common.frozen(network), images, perturbed, labels, args.seed)
    with common.timed(seconds, "curve"):
        attacks = [("linf", eps) for eps in CURVE_EPSILONS]
        by_eps = common.fgm_accuracies(model, images[:CURVE_IMAGES], labels[:CURVE_IMAGES], attacks)

    common.plot_examples(folder / "figure07_examples.png", model, images[:EXAMPLES], perturbed[:EXAMPLES], labels[:EXAMPLES])
    common.plot_lines(folder / "fgm_by_epsilon.png", [0, *(255 * eps for eps in CURVE_EPSILONS)], {"FGM": by_eps},
                      "epsilon (L-infinity) in 1/255", "accuracy")
    common.plot_lines(folder / "pgd_by_step.png", range(common.PGD_STEPS + 1), {"PGD": measured["pgd_by_step"]},
                      "PGD steps", "accuracy")
    with common.timed(seconds, "umap"):
        umap_sha256 = draw_umap(folder, model, data, images, perturbed, labels, args.seed)

    common.write_metrics(folder, origin, {
        **measured,
        "n_test": len(labels),
        "epsilon": common.EPSILON,
        "fgm_by_eps": {"eps": [0, *CURVE_EPSILONS], "accuracy": by_eps, "images": min(CURVE_IMAGES, len(labels))},
        "umap_sha256": umap_sha256,
        "seconds": seconds,
    })
    common.print_conditions("Question 3: the model of question 2 on unseen images", {"cross-entropy (q2)": measured})


def draw_umap(folder, model, data, images, perturbed, labels, seed):
    """Figure 8: perturbed and attacked test images in question 2's map. Returns the SHA-256 of that map.

    The map is fitted again from the same features with the same seed: cheaper to trust than a pickled reducer.
    """
    def features(changed):
        return common.backbone_features(model, changed)

    train = features(common.as_float(data["train"][0]))
    shifted = features(perturbed)
    attacked = common.under_fgm(features, model, images, labels)
    reducer = common.fit_umap(train, seed)
    common.plot_maps(folder / "figure08_umap.png",
                     {"perturbed test": (common.map_into(reducer, shifted), labels),
                      "test under FGM, eps = 8/255": (common.map_into(reducer, attacked), labels)}, reducer.embedding_)
    return common.sha256(reducer.embedding_.tobytes())


if __name__ == "__main__":
    common.run(main)
