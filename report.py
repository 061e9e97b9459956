"""Assemble what the questions have written into one report: results/report.md and a self-contained report.html.

Questions that have not been run are left out. Results of different splits, seeds or models are refused: in one
table they would compare what cannot be compared.

Reads   results/q1 ... q6
Writes  results/report.md, results/report.html
Run     python report.py
"""

import base64
import html

import common

QUESTIONS = ("q1", "q2", "q3", "q4", "q6")


def main():
    args = common.parse_arguments(common.argument_parser(__doc__))
    found = read_results(args)
    try:
        refuse_mixtures(found, args)
        blocks = assemble(found)
    except (KeyError, TypeError) as error:
        questions = "; ".join(common.script_command(question, args.results, args.quick) for question in found)
        raise common.UserError(f"a metrics.json in {args.results} lacks {error}; make them again with: {questions}") from error
    page = html_page(blocks, args.results, args.quick)  # first, since a missing figure must leave both as they were
    common.write_file(args.results / "report.md", markdown(blocks).encode())
    common.write_file(args.results / "report.html", page.encode())
    print(f"Report: {args.results / 'report.html'} (self-contained) and {args.results / 'report.md'}")


def assemble(found):
    """The whole report as a list of blocks (see the sections below). found: dict from question to its metrics."""
    blocks = introduction(found)
    for question, section in {"q1": split_section, "q2": training_section, "q3": attack_section,
                              "q4": adversarial_section, "q6": angular_section}.items():
        if question in found:
            blocks += section(found[question])
        if question == "q4":
            blocks += [("heading", "Question 5: the angular loss"),
                       ("text", "Explained in q5_angular_loss.md, which lies beside the scripts.")]
    return blocks + comparison(found) + origin_section(found)


def read_results(args):
    """The metrics of the questions that have been run: dict from question to its metrics.json."""
    found = {}
    for question in QUESTIONS:
        path = args.results / question / "metrics.json"
        if path.exists():
            found[question] = common.read_metrics(path, common.script_command(question, args.results, args.quick))
    if not found:
        raise common.UserError(f"{args.results} holds no results; begin with: "
                               + common.script_command("q1", args.results, args.quick))
    return found


def refuse_mixtures(found, args):
    """Raise UserError unless all results have one split, seed and mode, and began with q2's present model if with q2's.

    What the user has chosen for question 6 to begin with may be any model of this split.
    """
    def command(question):
        return common.script_command(question, args.results, args.quick)

    first, *others = found
    for question in others:
        for key, of in {"split": lambda m: m["split_sha256"], "seed": lambda m: m["settings"]["seed"],
                        "mode (--quick or not)": lambda m: m["quick"]}.items():
            if of(found[question]) != of(found[first]):
                raise common.UserError(f"{args.results}: {question} and {first} are of a different {key}; "
                                       f"make {question} again with: {command(question)}")
        chosen = question == "q6" and found["q6"]["settings"]["init"] != "auto"
        if "q2" in found and not chosen and found[question]["parent_sha256"] not in ([], [found["q2"]["model_sha256"]["model.pt"]]):
            raise common.UserError(f"{args.results}: {question} began with another model than q2's present one; "
                                   f"make {question} again with: {command(question)}")


# ---- The sections: lists of ("heading", text), ("text", text), ("table", header, rows), ("figure", path, caption)


def introduction(found):
    blocks = [("title", "Generalization and Robustness: ResNet-18 on 20 % of CIFAR-10")]
    if any(metrics["quick"] for metrics in found.values()):
        blocks.append(("text", "MADE WITH --quick: A TINY SUBSET AND A FEW EPOCHS. THE NUMBERS MEAN NOTHING; "
                               "they only show that everything works."))
    blocks.append(("text", "Accuracies are on the test part, which no choice was made on. FGM and PGD act in pixel space "
                           "on [0, 1] images, in L-infinity with epsilon = 8/255 unless another is named."))
    return blocks


def split_section(q1):
    duplicates = q1["test_images_with_duplicate_in_train"]
    return [
        ("heading", "Question 1: the split"),
        ("text", f"Asked: a small training part, the rest to validate and test, classes in proportion. Done: protocol "
                 f"{q1['settings']['protocol']}, seed {q1['settings']['seed']}, {q1['n_train']} images to train, "
                 f"{q1['n_val']} to validate, {q1['n_test']} to test."),
        ("figure", "q1/figure01_train_labels.png", "Figure 1: labels of the training part."),
        ("figure", "q1/figure02_held_out_labels.png", "Figure 2: labels of the validation and test parts."),
        ("text", f"Leakage: {duplicates['exact']} test images are in train to the byte, {duplicates['near']} as a near "
                 f"duplicate (pixel correlation of at least {duplicates['near_means_correlation_from']}), "
                 f"{common.percent(duplicates['near'] / q1['n_test'])} of the test part."),
    ]


def training_section(q2):
    chosen = [name for flag, name in (("trivial_augment", "TrivialAugment"), ("cutmix", "cutmix")) if q2["settings"][flag]]
    per_class = q2["test"]["accuracy_per_class"]
    hardest, easiest = min(per_class, key=per_class.get), max(per_class, key=per_class.get)
    return [
        ("heading", "Question 2: cross-entropy"),
        ("text", f"Asked: train ResNet-18 from random weights with cross-entropy. Done: {training_settings(q2)}, "
                 f"augmentation by {', '.join(['shifts', 'mirroring', *chosen, 'cutout'])}."),
        ("table", ["part", "accuracy", "cross-entropy", "calibration error (ECE)"],
         [[name, common.percent(q2[key]["accuracy"]), f"{q2[key]['loss']:.3f}", common.percent(q2[key]["ece"])]
          for name, key in (("validation", "val"), ("test", "test"))]),
        ("figure", "q2/figure03_accuracy.png", "Figure 3: accuracy per epoch."),
        ("figure", "q2/figure04_loss.png", "Figure 4: loss per epoch."),
        ("text", f"The hardest class on test is {hardest} ({common.percent(per_class[hardest])}), the easiest {easiest} "
                 f"({common.percent(per_class[easiest])})."),
        ("table", ["class", "test accuracy"], [[name, common.percent(value)] for name, value in per_class.items()]),
        ("figure", "q2/confusion_test.png", "Confusion matrix on test."),
        ("figure", "q2/reliability_test.png", "Reliability diagram on test."),
        ("figure", "q2/figure05_umap_train.png", "Figure 5: UMAP of the backbone output, fitted on train without labels. "
         "Colours are true classes, in all maps."),
        ("figure", "q2/figure06_umap_test.png", "Figure 6: the test part in the map of figure 5."),
    ]


def attack_section(q3):
    value, checks = q3["accuracy"], q3["checks"]
    return [
        ("heading", "Question 3: perturbation and attack"),
        ("text", "Asked: perturb unseen images, attack with the Fast Gradient Method, compare. Done: colour jitter, rotation "
                 "up to 5 degrees and ten pixels with one channel at full; FGM on the model of question 2."),
        ("figure", "q3/figure07_examples.png", "Figure 7: original, perturbed and attacked test images with the predicted class."),
        conditions_table({"cross-entropy (q2)": q3}),
        ("text", f"Perturbation costs {points(value['clean'] - value['perturbed'])}, FGM {points(value['clean'] - value['fgm'])}, "
                 f"both together {points(value['clean'] - value['perturbed_fgm'])}. In L2 with epsilon = 0.5, FGM leaves "
                 f"{common.percent(q3['accuracy_l2']['fgm'])}. Random noise of FGM's size leaves {common.percent(checks['noise'])} "
                 f"({checks['images']} images): the direction matters, not the size. PGD-20 leaves "
                 f"{common.percent(value['pgd'])}, {points(value['fgm'] - value['pgd'])} below FGM: that gap is what one step "
                 "misses, and FGM alone would flatter the model by it."),
        ("text", f"Precision: on the first {checks['images']} images FGM leaves {common.percent(checks['fgm'])} as measured and "
                 f"{common.percent(checks['fgm_float32'])} with float32 arithmetic throughout."),
        *warnings_of({"cross-entropy (q2)": q3}),
        ("figure", "q3/fgm_by_epsilon.png", f"FGM over epsilon, on {q3['fgm_by_eps']['images']} test images."),
        ("figure", "q3/pgd_by_step.png", "PGD over its number of steps, on all test images."),
        ("figure", "q3/figure08_umap.png", "Figure 8: perturbed and attacked test images in the map of figure 5. "
         "A colour on another colour's island is an image that the change has moved into the wrong class."),
    ]


def adversarial_section(q4):
    models = common.models_of("q4", q4)
    clean, robust = (q4["accuracy"][name] for name in ("perturbed", "perturbed_fgm_trained"))
    blocks = [
        ("heading", "Question 4: training on perturbed and attacked data"),
        ("text", f"Asked: train on data perturbed as in question 3, without and with FGM in the loop. Done: "
                 f"{training_settings(q4)}; first weights: {q4['settings']['init']}; the attack in the loop is N-FGSM "
                 "(de Jorge et al. 2022), which prevents catastrophic overfitting."),
        conditions_table(models),
        ("text", f"FGM in the loop moves accuracy on perturbed images under FGM from {common.percent(clean['perturbed_fgm'])} to "
                 f"{common.percent(robust['perturbed_fgm'])} and costs {points(clean['clean'] - robust['clean'])} on clean "
                 f"images. PGD-20 leaves {common.percent(robust['pgd'])}, {points(robust['fgm'] - robust['pgd'])} below FGM."),
        *warnings_of(models),
    ]
    for name, title in (("perturbed", "trained on perturbed data"), ("perturbed_fgm_trained", "trained with FGM too")):
        blocks += [
            ("figure", f"q4/figure09_accuracy_{name}.png", f"Figure 9, {title}: accuracy per epoch, with PGD-20's."),
            ("figure", f"q4/figure10_loss_{name}.png", f"Figure 10, {title}: loss per epoch."),
            ("figure", f"q4/figure11_umap_train_{name}.png", f"Figure 11, {title}: UMAP of perturbed train."),
            ("figure", f"q4/figure12_umap_test_{name}.png", f"Figure 12, {title}: perturbed test in that map."),
        ]
    return blocks


def angular_section(q6):
    value = q6["accuracy"]
    return [
        ("heading", "Question 6: the angular loss"),
        ("text", f"Asked: the same with the angular loss and a pretrained ResNet-18, on clean data only. Done: "
                 f"{training_settings(q6)}; first weights: {q6['init']}. Accuracy is a vote of the {q6['neighbours']} nearest "
                 f"training embeddings; on validation it is {common.percent(q6['val']['accuracy'])}. With the first "
                 f"weights and a random last layer, before training, it is {common.percent(q6['val']['accuracy_before_training'])}."),
        conditions_table({"angular loss (q6)": q6}),
        ("text", f"Random noise of FGM's size leaves {common.percent(q6['checks']['noise'])} ({q6['checks']['images']} images), "
                 f"FGM on the soft k-NN loss {common.percent(value['fgm'])}: the attack acts on the vote."),
        *warnings_of({"angular loss (q6)": q6}),
        ("table", ["retrieval among the training embeddings", "test"],
         [[name.replace("_", " "), f"{number:.4f}"] for name, number in q6["retrieval"].items()]),
        ("figure", "q6/figure13_accuracy.png", "Figure 13: accuracy per epoch."),
        ("figure", "q6/figure13_loss.png", "Figure 13, continued: loss per epoch."),
        ("figure", "q6/figure14_umap.png", "Figure 14: UMAP of the embeddings, fitted on train; the test part in that map."),
        ("figure", "q6/figure15_examples.png", "Figure 15: original, perturbed and attacked test images with the class voted."),
        ("figure", "q6/figure16_umap.png", "Figure 16: perturbed and attacked test images in the map of figure 14."),
    ]


def comparison(found):
    """All models under all conditions, and for each condition in words which is best."""
    models = {}
    for question in ("q3", "q4", "q6"):
        if question in found:
            models.update(common.models_of(question, found[question]))
    if len(models) < 2:
        return []
    best = []
    for key, title in common.CONDITIONS.items():
        name = max(models, key=lambda model: models[model]["accuracy"][key])
        best.append(f"{title}: {name}, {common.percent(models[name]['accuracy'][key])}")
    first_weights = {"q2": lambda metrics: "random weights", "q4": lambda metrics: metrics["settings"]["init"],
                     "q6": lambda metrics: metrics["init"].split(" (")[0]}
    epochs = ", ".join(f"{question} {found[question]['settings']['epochs']} from {first(found[question])}"
                       for question, first in first_weights.items() if question in found)
    blocks = [("heading", "Comparison of all models"), conditions_table(models),
              ("text", f"Epochs of training behind these numbers: {epochs}. Those of a model that began with another's weights "
                       "come on top of that model's."),
              ("text", "Best under each condition: " + "; ".join(best) + ".")]
    reference, *others = models
    for name in others:
        changes = [f"{title} {100 * (models[name]['accuracy'][key] - models[reference]['accuracy'][key]):+.1f}"
                   for key, title in common.CONDITIONS.items()]
        blocks.append(("text", f"{name} against {reference}, in points: {', '.join(changes)}."))
    return blocks


def origin_section(found):
    rows = [[question, " ".join(f"{name}={value}" for name, value in metrics["settings"].items()),
             str(metrics["git_commit"])[:19], str(metrics["versions"]["torch"]), duration(metrics)]
            for question, metrics in found.items()]
    split = next(iter(found.values()))["split_sha256"]
    return [("heading", "How these results were made"), ("text", f"SHA-256 of the split: {split}"),
            ("table", ["question", "settings", "commit", "torch", "minutes"], rows)]


def training_settings(metrics):
    used = metrics["settings"]
    return (f"{used['epochs']} epochs, batch {used['batch_size']}, SGD with Nesterov momentum, one-cycle learning rate up to "
            f"{used['lr']}, stem {used['stem']}, {used['precision']} on {used['device']}")


def conditions_table(models):
    return ("table", *common.condition_rows(models))


def warnings_of(models):
    return [("text", f"Warning, {name}: {warning}") for name, model in models.items() for warning in model["warnings"]]


def points(difference):
    return f"{100 * difference:.1f} points"


def duration(metrics):
    """Minutes of all stages of a question, those of q4's two models together."""
    stages = metrics["seconds"].values()
    seconds = sum(sum(stage.values()) if isinstance(stage, dict) else stage for stage in stages)
    return f"{seconds / 60:.1f}"


# ---- The two forms -----------------------------------------------------------------------------


def markdown(blocks):
    """Blocks as Markdown; figures stay files beside it."""
    lines = []
    for kind, *content in blocks:
        if kind == "table":
            header, rows = content
            lines.append("\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)))
        elif kind == "figure":
            lines.append(f"![{content[1]}]({content[0]})\n\n*{content[1]}*")
        else:
            lines.append({"title": "# ", "heading": "## ", "text": ""}[kind] + content[0])
    return "\n\n".join(lines) + "\n"


def html_page(blocks, results, quick):
    """Blocks as one HTML page with the figures inside. Raises UserError for a figure that is missing."""
    parts = []
    for kind, *content in blocks:
        if kind == "table":
            header, rows = content
            cells = [html_row("th", header), *(html_row("td", row) for row in rows)]
            parts.append(f"<table>{''.join(cells)}</table>")
        elif kind == "figure":
            path, caption = content
            image = common.read_file(results / path, made_by=common.script_command(path[:2], results, quick))
            parts.append(f"<figure><img src='data:image/png;base64,{base64.b64encode(image).decode()}' "
                         f"alt='{html.escape(caption, quote=True)}'><figcaption>{html.escape(caption)}</figcaption></figure>")
        else:
            tag = {"title": "h1", "heading": "h2", "text": "p"}[kind]
            parts.append(f"<{tag}>{html.escape(content[0])}</{tag}>")
    style = ("body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
             "img{max-width:100%}figure{margin:1.5rem 0}figcaption{color:#555}"
             "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left}")
    return (f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'><title>{html.escape(blocks[0][1])}</title>"
            f"<style>{style}</style><body>{''.join(parts)}</body></html>\n")


def html_row(tag, cells):
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


if __name__ == "__main__":
    common.run(main)
