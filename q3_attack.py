"""Question 3: perturb unseen images, attack the model of question 2, and measure again.

Perturbation: colour jitter, rotation of at most 5 degrees and ten pixels with one channel at full;
every image draws its own values, and the seed makes them the same images in every question. Attack:
the Fast Gradient Method in pixel space, with epsilon 8/255 in L-infinity and 0.5 in L2. PGD with 20
steps is the check that accuracy under FGM is not an artefact of masked gradients.

The attack called strongest: images that PGD on cross-entropy does not fool are attacked by PGD on
the margin, the best wrong class's score minus the right one's. Of 2,000 images.

Reads   results/q1/split.npz, results/q2/model.pt, CIFAR-10
Writes  results/q3: figure07_examples.png, figure08_umap.png, curves over epsilon and over PGD's
        steps, right.npz, metrics.json
Run     python q3_attack.py
"""

import common


def main():
    args = common.parse_arguments(common.argument_parser(__doc__))
    folder, seconds = args.results / "q3", {}
    split, data = common.load_data(args)
    checkpoint = common.require_model(args, split)
    about = {"seed": args.seed, "stem": checkpoint["stem"], "q2_sha256": checkpoint["sha256"]}
    origin = common.provenance(args, "q3", split, **about)
    network, labels = checkpoint["model"], data["test"][1]
    images = common.as_float(data["test"][0])
    perturbed = common.perturbed_images(data["test"][0], "test", args.seed)

    with common.timed(seconds, "attack"):
        measured, right, gradient = common.robustness(
            network, images, perturbed, labels, args.seed, args.precision
        )
        model = common.frozen(network, args.precision)
        by_part = accuracy_by_part(model, *data["test"], args.seed)
    examples = images, perturbed, labels, right["clean"]
    common.plot_examples(folder / "figure07_examples.png", model, *examples)
    draw_curves(folder, measured["by_eps"], measured["pgd_by_step"])
    with common.timed(seconds, "umap"):
        map_sha256 = draw_maps(folder, model, data, images, perturbed, gradient, args.seed)

    models = {common.CROSS_ENTROPY: {**measured, "by_part": by_part}}
    found = {"models": models, "n_test": len(labels), "epsilon": common.EPSILON}
    common.write_right(folder, {common.CROSS_ENTROPY: right})
    common.write_metrics(folder, origin, {**found, "umap_sha256": map_sha256, "seconds": seconds})
    common.print_conditions("Question 3: the model of question 2 on unseen images", models)
    parts = (f"{part} {common.percent(share)}" for part, share in by_part.items())
    print(f"Under each part of the perturbation alone: {', '.join(parts)}")


def accuracy_by_part(model, images, labels, seed):
    """Accuracy under each part of the perturbation alone, with the full perturbation's values.

    images uint8. Returns a dict from part to a share.
    """
    generator = common.generator_for(seed, "perturbed test")
    names = "colour jitter", "rotation", "pixels"

    def right(batch, target):
        batch = common.as_float(batch)
        jitter, angles, full = common.draw_perturbation(len(batch), batch[0, 0].numel(), generator)
        changed = (
            common.color_jitter(batch, *jitter),
            common.rotate(batch, angles),
            common.set_to_full(batch, *full),
        )
        return tuple(model(each).argmax(1) == target for each in changed)

    size = common.EVALUATION_BATCH  # that of perturbed_images
    found = common.in_batches(right, images, labels, size=size, title="parts")
    return {name: common.share(each) for name, each in zip(names, found, strict=True)}


def draw_curves(folder, by_eps, by_step):
    """Accuracy under FGM and PGD over epsilon, and under PGD over the number of steps."""
    sizes, curves = [255 * eps for eps in by_eps["eps"]], {"FGM": "fgm", "PGD-20": "pgd"}
    lines = {title: by_eps[key] for title, key in curves.items()}
    label = "epsilon (L-infinity) in 1/255"
    common.plot_lines(folder / "by_epsilon.png", sizes, lines, label, "accuracy")
    steps = range(len(by_step))
    common.plot_lines(folder / "pgd_by_step.png", steps, {"PGD": by_step}, "PGD steps", "accuracy")


def draw_maps(folder, model, data, images, perturbed, gradient, seed):
    """Figure 8: perturbed and attacked test images in question 2's map. Returns that map's SHA-256.

    The map is fitted again, on the same features with the same seed: no pickle has to be trusted.
    """
    labels = data["test"][1]
    train = common.backbone_features(model, common.as_float(data["train"][0]))
    attacked = common.fgm_images(images, gradient)
    points, place = common.fit_umap(train, seed)
    under_fgm = f"test under FGM, eps = {255 * common.EPSILON['linf']:g}/255"
    panels = {"perturbed test": perturbed, under_fgm: attacked}
    placed = {
        title: (place(common.backbone_features(model, changed)), labels)
        for title, changed in panels.items()
    }
    common.plot_maps(folder / "figure08_umap.png", placed, points)
    return common.sha256(points.tobytes())


if __name__ == "__main__":
    common.run(main)
