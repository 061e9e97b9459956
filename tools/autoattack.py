"""The referee: AutoAttack (Croce & Hein 2020), standard version, on a results folder's classifiers.

In L-infinity with epsilon 8/255, on the first 1,000 test images, in float32. It takes an hour or
more for a robust model on two cores, and goes on after the last finished batch if interrupted.

Reads   results/q1/split.npz, results/q2/model.pt, results/q4/*.pt, CIFAR-10
Writes  results/autoattack.json: each model's SHA-256, the images attacked and those still right
Run     make autoattack
"""

import contextlib
import io
import json

import torch

import common

IMAGES = 1_000
BATCH = 100  # after each of which the numbers are kept


def main():
    args = common.parse_arguments(common.argument_parser(__doc__))
    split, data = common.load_data(args)
    images, labels = common.as_float(data["test"][0][:IMAGES]), data["test"][1][:IMAGES]
    path = args.results / "autoattack.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = {}
    for name, checkpoint in classifiers(args, split).items():
        model = common.frozen(checkpoint["model"].to(args.device))
        before = kept.get(name, {})
        found[name] = (
            before
            if before.get("sha256") == checkpoint["sha256"]
            else {"sha256": checkpoint["sha256"], "images": 0, "right": 0}
        )
        batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
        for batch, target in common.with_bar(batches[found[name]["images"] // BATCH :], name):
            found[name]["right"] += int(survivors(model, batch, target, args).sum())
            found[name]["images"] += len(batch)
            common.write_file(path, json.dumps({**kept, **found}, indent=1).encode())
        right, number = found[name]["right"], found[name]["images"]
        error = 100 * common.standard_error(right / number, number)
        print(f"{name}: {common.percent(right / number)} ± {error:.1f} of {number} images")


def classifiers(args, split):
    """The checkpoints of questions 2 and 4 by the names that tables show."""
    models = {}
    for question in ("q2", "q4"):
        path = args.results / question / "metrics.json"
        made_by = common.script_command(question, args)
        if path.exists():
            for name, model in common.read_metrics(path, made_by)["models"].items():
                file = args.results / question / model["file"]
                models[name] = common.read_checkpoint(file, made_by, split)
    if not models:
        raise common.UserError(
            f"{args.results} holds no classifiers; make one with: "
            + common.script_command("q2", args)
        )
    return models


def survivors(model, images, labels, args):
    """Which images AutoAttack does not fool the model on: bool N."""
    from pyautoattack import AutoAttack

    attack = AutoAttack(
        model,
        norm="Linf",
        eps=common.EPSILON["linf"],
        seed=args.seed,
        version="standard",
        device=args.device,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    change = (adversarial - images).abs().amax()
    if change > common.EPSILON["linf"] + 1e-6:
        raise AssertionError(f"AutoAttack moved a value by {change:.6f}")
    return common.predict(model, adversarial) == labels


if __name__ == "__main__":
    torch.manual_seed(0)
    common.run(main)
