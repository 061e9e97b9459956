"""Question 3: perturb unseen images, attack the model of question 2, and measure again.

Perturbation: colour jitter, rotation of at most 5 degrees and ten pixels with one channel at full;
every image draws its own values, and the seed makes them the same images in every question. Attack:
the Fast Gradient Method in pixel space, with epsilon 8/255 in L-infinity and 0.5 in L2. PGD with 20
steps is the check that FGM's number is not an artefact of masked gradients.

The attack called strongest raises the margin of the best wrong class where cross-entropy fails.

Reads   results/q1/split.npz, results/q2/model.pt, CIFAR-10
Writes  results/q3: figure07_examples.png, figure08_umap.png, curves over epsilon and over PGD's
        steps, metrics.json
Run     python q3_attack.py
"""

import common

EXAMPLES = 8


def main():
    args = common.parse_arguments(common.argument_parser(__doc__))
    folder, seconds = args.results / "q3", {}
    split, data = common.load_data(args)
    checkpoint = common.require_model(args, split)
    origin = common.provenance(args, "q3", split, [checkpoint["sha256"]])
    model = common.frozen(checkpoint["model"], args.precision)
    images, labels = common.as_float(data["test"][0]), data["test"][1]
    perturbed = common.perturbed_images(data["test"][0], "test", args.seed)

    common.plot_examples(
        folder / "figure07_examples.png",
        model,
        images[:EXAMPLES],
        perturbed[:EXAMPLES],
        labels[:EXAMPLES],
    )
    with common.timed(seconds, "attack"):
        measured = common.measured_on_test(checkpoint["model"], data["test"], args)
        by_part = accuracy_by_part(model, *data["test"], args.seed)
    draw_curves(folder, measured["by_eps"], measured["pgd_by_step"])
    with common.timed(seconds, "umap"):
        map_sha256 = draw_maps(folder, model, data, images, perturbed, args.seed)

    models = {common.CROSS_ENTROPY: {**measured, "by_part": by_part, "stem": checkpoint["stem"]}}
    common.write_metrics(
        folder,
        origin,
        {
            "models": models,
            "n_test": len(labels),
            "epsilon": common.EPSILON,
            "umap_sha256": map_sha256,
            "seconds": seconds,
        },
    )
    common.print_conditions("Question 3: the model of question 2 on unseen images", models)
    print(
        "Under each part of the perturbation alone: "
        + ", ".join(f"{part} {common.percent(share)}" for part, share in by_part.items())
    )


def accuracy_by_part(model, images, labels, seed):
    """Accuracy under each part of the perturbation alone, with the values that the mixture has.

    images uint8. Returns a dict from part to a share.
    """
    generator = common.generator_for(seed, "perturbed test")
    right = {"colour jitter": 0, "rotation": 0, "pixels": 0}
    size = common.EVALUATION_BATCH
    for batch, target in zip(images.split(size), labels.split(size), strict=True):
        batch = common.as_float(batch)
        jitter, angles, full = common.draw_perturbation(len(batch), batch[0, 0].numel(), generator)
        parts = {
            "colour jitter": common.color_jitter(batch, *jitter),
            "rotation": common.rotate(batch, angles),
            "pixels": common.set_to_full(batch, *full),
        }
        for part, changed in parts.items():
            right[part] += (common.predict(model, changed) == target).sum()
    return {part: number.item() / len(labels) for part, number in right.items()}


def draw_curves(folder, by_eps, by_step):
    """Accuracy under FGM and PGD over epsilon, and under PGD over the number of steps."""
    common.plot_lines(
        folder / "by_epsilon.png",
        [255 * eps for eps in by_eps["eps"]],
        {"FGM": by_eps["fgm"], "PGD-20": by_eps["pgd"]},
        "epsilon (L-infinity) in 1/255",
        "accuracy",
    )
    common.plot_lines(
        folder / "pgd_by_step.png", range(len(by_step)), {"PGD": by_step}, "PGD steps", "accuracy"
    )


def draw_maps(folder, model, data, images, perturbed, seed):
    """Figure 8: perturbed and attacked test images in question 2's map. Returns that map's SHA-256.

    The map is fitted again, on the same features with the same seed: no pickle has to be trusted.
    """
    labels = data["test"][1]
    train = common.backbone_features(model, common.as_float(data["train"][0]))
    shifted = common.backbone_features(model, perturbed)
    attacked = common.under_fgm(model.features, model, images, labels)
    points, place = common.fit_umap(train, seed)
    common.plot_maps(
        folder / "figure08_umap.png",
        {
            "perturbed test": (place(shifted), labels),
            "test under FGM, eps = 8/255": (place(attacked), labels),
        },
        points,
    )
    return common.sha256(points.tobytes())


if __name__ == "__main__":
    common.run(main)
