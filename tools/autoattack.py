"""The referee: AutoAttack (Croce & Hein 2020), standard version, on a results folder's classifiers.

In L-infinity with epsilon 8/255, on the first 1,000 test images, in float32. It takes an hour or
more for a robust model on two cores, and goes on after the last finished batch if interrupted.

Reads   results/q1/split.npz, results/q2/model.pt, results/q4/*.pt, CIFAR-10
Writes  results/autoattack.json: each model's SHA-256, the images attacked and those still right
Run     make autoattack, or python -m tools.autoattack
"""

import contextlib
import io
import json

import common

IMAGES = 1_000
BATCH = 100  # after each of which the counts are written


def main():
    args = common.parse_arguments(common.argument_parser(__doc__))
    args.precision, path = "float32", args.results / "autoattack.json"
    split, data = common.load_data(args)
    images, labels = common.as_float(data["test"][0][:IMAGES]), data["test"][1][:IMAGES]
    checkpoints = classifiers(args.results, split)
    counts = counts_so_far(path, checkpoints)
    for name, checkpoint in checkpoints.items():
        model = common.frozen(checkpoint["model"].to(args.device))
        attack_others(model, images, labels, counts, name, path, args.seed)
        print_count(name, counts[name])


def classifiers(results, split):
    """The checkpoints of questions 2 and 4 by the names that tables show."""
    models = {
        name: common.read_checkpoint(results / question / model["file"], split)
        for question, metrics in common.metrics_found(results, ("q2", "q4")).items()
        for name, model in metrics["models"].items()
    }
    if not models:
        command = common.command_for(results / "q2" / "model.pt")
        raise common.UserError(f"{results} holds no classifiers; make one with: {command}")
    return models


def counts_so_far(path, checkpoints):
    """What earlier runs have counted for the same weights: dict from model to its counts."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    counts = {}
    for name, checkpoint in checkpoints.items():
        counts[name] = {"sha256": checkpoint["sha256"], "images": 0, "right": 0}
        if kept.get(name, {}).get("sha256") == checkpoint["sha256"]:
            counts[name] = kept[name]
    return counts


def attack_others(model, images, labels, counts, name, path, seed):
    """Attack the batches that are left, and write the counts so far after each."""
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    for batch, target in common.with_bar(batches[counts[name]["images"] // BATCH :], name):
        counts[name]["right"] += int(survivors(model, batch, target, seed).sum())
        counts[name]["images"] += len(batch)
        begun = {model: count for model, count in counts.items() if count["images"]}
        common.write_file(path, json.dumps(begun, indent=1).encode())


def survivors(model, images, labels, seed):
    """Which images AutoAttack does not fool the model on: bool N."""
    from pyautoattack import AutoAttack

    eps, device = common.EPSILON["linf"], images.device
    threat = {"norm": "Linf", "eps": eps, "version": "standard"}
    attack = AutoAttack(model, **threat, seed=seed, device=device)
    with contextlib.redirect_stdout(io.StringIO()):
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    change = (adversarial - images).abs().amax()
    if change > eps + 1e-6:
        raise AssertionError(f"AutoAttack moved a value by {change:.6f}")
    return common.predict(model, adversarial) == labels


def print_count(name, count):
    """A model's accuracy under AutoAttack."""
    right, images = count["right"], count["images"]
    print(f"{name}: {right} of {images} images, {common.percent(right / images)}")


if __name__ == "__main__":
    common.run(main)
