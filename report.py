"""Assemble what the questions have written: results/report.md and a self-contained report.html.

Questions that have not been run are left out. Results of different splits, seeds, stems or models
are refused: in one table they would compare what cannot be compared.

Reads   results/q1 ... q6
Writes  results/report.md, results/report.html
Run     python report.py
"""

import base64
import datetime
import html
import itertools
import math
import re
import statistics
import struct
from pathlib import Path

import common

QUESTIONS = ("q1", "q2", "q3", "q4", "q6")
HERE = Path(__file__).parent
RETRIEVAL = {
    "precision_at_1": "precision at 1",
    "r_precision": "R-precision",
    "mean_average_precision_at_r": "mean average precision at R",
}
SOURCES = {
    "Barz & Denzler 2020": "Do we train on test data? Purging CIFAR of near-duplicates, J. Imaging",
    "de Jorge et al. 2022": "Make some noise: reliable and efficient single-step adversarial "
    "training, NeurIPS",
    "Fawzi et al. 2016": "Robustness of classifiers: from adversarial to random noise, NeurIPS",
    "Geirhos et al. 2018": "Generalisation in humans and deep neural networks, NeurIPS",
    "Goodfellow et al. 2015": "Explaining and harnessing adversarial examples, ICLR",
    "Guo et al. 2017": "On calibration of modern neural networks, ICML",
    "Ilyas et al. 2019": "Adversarial examples are not bugs, they are features, NeurIPS",
    "Kohavi 1995": "A study of cross-validation and bootstrap for accuracy estimation and model "
    "selection, IJCAI",
    "Madry et al. 2018": "Towards deep learning models resistant to adversarial attacks, ICLR",
    "Mao et al. 2019": "Metric learning for adversarial robustness, NeurIPS",
    "McInnes et al. 2018": "UMAP: uniform manifold approximation and projection for dimension "
    "reduction, arXiv:1802.03426",
    "Müller et al. 2019": "When does label smoothing help?, NeurIPS",
    "Musgrave et al. 2020": "A metric learning reality check, ECCV",
    "Tsipras et al. 2019": "Robustness may be at odds with accuracy, ICLR",
    "Zhang et al. 2017": "Understanding deep learning requires rethinking generalization, ICLR",
}
# Question 5's answer without its title, headings a level deeper, the figure among the results.
ANSWER_5 = (
    (HERE / "q5_angular_loss.md")
    .read_text(encoding="utf-8")
    .split("\n", 1)[1]
    .replace("\n##", "\n###")
    .replace("docs/angular_loss.png", "q5/angular_loss.png")
)


def main():
    parser = common.argument_parser(__doc__)
    parser.set_defaults(device="cpu")  # a GPU would have nothing to do
    parser.add_argument("--author", default="", help="whose name stands below the title")
    parser.add_argument("--student-id", default="", help="what stands beside it")
    parser.add_argument("--note", default="", help="a line for the head of every page")
    args = common.parse_arguments(parser)
    found = read_results(args)
    try:
        refuse_mixtures(found, args)
        author = " · ".join(filter(None, [args.author, args.student_id]))
        blocks = assemble(found, author, args.note)
        hashes = {
            f"{question}/{name}": digest
            for question, metrics in found.items()
            for name, digest in metrics["figures"].items()
        }
    except common.MALFORMED as error:
        commands = "; ".join(common.script_command(question, args) for question in found)
        raise common.UserError(
            f"a metrics.json in {args.results} lacks something or holds what it "
            f"should not ({error}); make them again with: {commands}"
        ) from error
    common.write_file(
        args.results / "q5" / "angular_loss.png", (HERE / "docs" / "angular_loss.png").read_bytes()
    )
    page = html_page(blocks, args, hashes)  # first: a missing figure must leave both as they were
    common.write_file(args.results / "report.md", markdown(blocks).encode())
    common.write_file(args.results / "report.html", page.encode())
    print(
        common.one_line(
            f"Report: {args.results / 'report.html'} (self-contained), {args.results / 'report.md'}"
        )
    )


def assemble(found, author="", note=""):
    """The whole report as a list of blocks (see the sections below). found: question to metrics."""
    blocks = introduction(found, author) + ([("note", note)] if note else [])
    for question, section in {
        "q1": split_section,
        "q2": training_section,
        "q3": attack_section,
        "q4": adversarial_section,
        "q6": angular_section,
    }.items():
        if question in found:
            blocks += section(found[question])
        if question == "q4":
            blocks += [("heading", "Question 5: the angular loss"), ("markdown", ANSWER_5)]
    blocks += comparison(found) + origin_section(found)
    return blocks + sources_section(blocks)


def read_results(args):
    """The metrics of the questions that have been run: dict from question to its metrics.json."""
    found = common.metrics_found(args, QUESTIONS)
    add_referee(found, args.results / "autoattack.json")
    if not found:
        raise common.UserError(
            f"{args.results} holds no results; begin with: " + common.script_command("q1", args)
        )
    return found


def add_referee(found, path):
    """Put AutoAttack's numbers, if there are any, beside those of the models they are of."""
    if path.exists():
        referee = common.read_metrics(path, "make autoattack")
        for metrics in found.values():
            for name, model in metrics.get("models", {}).items():
                digest = model.get("sha256") or metrics["parent_sha256"][0]
                if name in referee and referee[name]["sha256"] == digest:
                    model["autoattack"] = referee[name]


def refuse_mixtures(found, args):
    """Raise UserError unless all results have one split, seed, mode and stem, and q2's present
    model.

    What the user has chosen for question 6 to begin with may be any model of this split.
    """

    def stem(metrics):
        """That of its first model; None for question 1, which has none."""
        recipes = [model.get("recipe", model) for model in metrics.get("models", {}).values()]
        return recipes[0]["stem"] if recipes else None

    def seed(metrics):
        """That of training and attacks; question 1's is the split's own."""
        return None if metrics.get("question") == "q1" else metrics["seed"]

    for question in list(found)[1:]:
        for key, of in {
            "split": lambda metrics: metrics["split_sha256"],
            "seed": seed,
            "mode (--quick or not)": lambda metrics: metrics["quick"],
            "stem": stem,
        }.items():
            reference = next((name for name in found if of(found[name]) is not None), question)
            if of(found[question]) not in (None, of(found[reference])):
                raise common.UserError(
                    f"{args.results}: {question} and {reference} are of a "
                    f"different {key}; make {question} again with: "
                    + common.script_command(question, args)
                )
        chosen = found[question].get("init", "q2") != "q2"
        if "q2" in found and not chosen and question != "q2":
            (model,) = found["q2"]["models"].values()
            if found[question]["parent_sha256"] != [model["sha256"]]:
                raise common.UserError(
                    f"{args.results}: {question} began with another model than "
                    f"q2's present one; make {question} again with: "
                    + common.script_command(question, args)
                )


# ---- The sections --------------------------------------------------------------------------------
# Lists of ("heading", text), ("text", text), ("table", caption, header, rows),
# ("figure", path, caption). Figures 1 to 16 are those that the assignment asks for; S1 to S5 are
# more.


def introduction(found, author):
    blocks = [
        ("title", "Generalization and Robustness: ResNet-18 on 20 % of CIFAR-10"),
        ("text", " · ".join(filter(None, [author, datetime.date.today().isoformat()]))),
    ]
    if any(metrics["quick"] for metrics in found.values()):
        blocks.append(
            (
                "text",
                "MADE WITH --quick: A TINY SUBSET AND A FEW EPOCHS. THE NUMBERS "
                "MEAN NOTHING; they only show that everything works.",
            )
        )
    blocks.append(
        (
            "text",
            "Accuracies are on the test part. FGM and PGD act in pixel space on [0, "
            "1] images, in L-infinity, epsilon = 8/255 unless another is given.",
        )
    )
    return blocks


def split_section(q1):
    duplicates = q1["test_images_with_duplicate_in_train"]
    return [
        ("heading", "Question 1: the split"),
        (
            "text",
            "Asked: a small training part, the rest to validate and test, classes in "
            f"proportion. Done: protocol {q1['protocol']}, seed {q1['seed']}, {q1['n_train']} "
            f"images to train, {q1['n_val']} to validate, {q1['n_test']} to test.",
        ),
        ("figure", "q1/figure01_train_labels.png", "Figure 1: labels of the training part."),
        (
            "figure",
            "q1/figure02_held_out_labels.png",
            "Figure 2: labels of the validation and test parts.",
        ),
        (
            "text",
            "Figures 1 and 2 show the labels. Parts with the same share of every class can "
            "be compared (Kohavi 1995).",
        ),
        (
            "text",
            f"Leakage: {duplicates['exact']} test images are in train to the byte, "
            f"{duplicates['near']} as a near duplicate (pixel correlation of at least "
            f"{duplicates['near_means_correlation_from']}), "
            f"{common.percent(duplicates['near'] / q1['n_test'])} of the test part. CIFAR-10 "
            "is known for such pairs (Barz & Denzler 2020).",
        ),
    ]


def training_section(q2):
    (model,) = q2["models"].values()
    chosen = ["TrivialAugment"] if model["recipe"]["trivial_augment"] else []
    per_class = model["test"]["accuracy_per_class"]
    hardest, easiest = min(per_class, key=per_class.get), max(per_class, key=per_class.get)
    return [
        ("heading", "Question 2: cross-entropy"),
        (
            "text",
            "Asked: train ResNet-18 from random weights with cross-entropy. Done: "
            f"{described(model['recipe'])}, augmentation by "
            f"{', '.join([*chosen, 'shifts', 'mirroring', 'cutout'])}. Table 1 is the "
            "outcome.",
        ),
        (
            "table",
            "Table 1: the trained network on held-out images.",
            ["part", "accuracy", "cross-entropy", "calibration error (ECE)"],
            [
                [
                    name,
                    common.percent(model[part]["accuracy"]),
                    f"{model[part]['loss']:.3f}",
                    common.percent(model[part]["ece"]),
                ]
                for name, part in (("validation", "val"), ("test", "test"))
            ],
        ),
        ("figure", "q2/figure03_accuracy.png", "Figure 3: accuracy per epoch."),
        ("figure", "q2/figure04_loss.png", "Figure 4: loss per epoch."),
        ("text", fitted(model, q2["n_test"])),
        (
            "text",
            "Figure S1 shows which classes are taken for which. "
            + (
                f"The hardest on test is {hardest} ({common.percent(per_class[hardest])}), "
                f"the easiest {easiest} ({common.percent(per_class[easiest])})."
                if shows(per_class[hardest], per_class[easiest], q2["n_test"] // 10)
                else "That one class is harder than another does not show."
            )
            + f" Figure S2: {calibration(model['test'])}",
        ),
        (
            "figure",
            "q2/confusion_test.png",
            "Figure S1: confusion matrix on test, and accuracy per class.",
        ),
        ("figure", "q2/reliability_test.png", "Figure S2: reliability diagram on test."),
        (
            "text",
            "Figures 5 and 6 are maps of what the convolutional part ends in. They show which "
            "images are neighbours, and so which classes touch. How far apart two islands "
            "are, and how large, says little: UMAP weighs near neighbours above all (McInnes "
            "et al. 2018).",
        ),
        (
            "figure",
            "q2/figure05_umap_train.png",
            "Figure 5: UMAP of the backbone output, fitted on "
            "train without labels. Colours are true classes, in all maps.",
        ),
        ("figure", "q2/figure06_umap_test.png", "Figure 6: the test part in the map of figure 5."),
    ]


def attack_section(q3):
    (model,) = q3["models"].values()
    value, checks, number = model["accuracy"], model["checks"], q3["n_test"]
    parts = [[part, common.percent(share)] for part, share in model["by_part"].items()]
    worst, second = sorted(model["by_part"], key=model["by_part"].get)[:2]
    sound = not model["warnings"]
    return [
        ("heading", "Question 3: perturbation and attack"),
        (
            "text",
            "Asked: perturb unseen images, attack with the Fast Gradient Method, compare. "
            "Done: colour jitter, rotation up to 5 degrees and ten pixels with one channel at "
            "full; FGM on the model of question 2. Figure 7 has examples.",
        ),
        (
            "figure",
            "q3/figure07_examples.png",
            "Figure 7: original, perturbed and attacked test images with the predicted class.",
        ),
        conditions_table("Table 2: question 2's model on test.", q3["models"]),
        (
            "text",
            "Table 2 has all conditions. "
            + " ".join(
                [
                    effect("Perturbation", value["clean"], value["perturbed"], number),
                    effect("FGM", value["clean"], value["fgm"], number),
                    effect("Their combination", value["clean"], value["perturbed_fgm"], number),
                    "In L2 with epsilon = 0.5, FGM leaves "
                    f"{common.percent(model['accuracy_l2']['fgm'])}.",
                ]
            ),
        ),
        (
            "table",
            "Table 3: the parts of the perturbation.",
            ["part of the perturbation, alone", "accuracy"],
            [*parts, ["all three", common.percent(value["perturbed"])]],
        ),
        (
            "text",
            f"Of the parts in table 3, {worst} costs most. "
            + effect("It", value["clean"], model["by_part"][worst], number)
            if shows(model["by_part"][worst], model["by_part"][second], number)
            else "Which of the parts in table 3 costs most does not show.",
        ),
        *attack_sentences(model, number),
        (
            "text",
            f"Precision: on the first {checks['images']} images FGM leaves "
            f"{common.percent(checks['fgm'])} as measured and "
            f"{common.percent(checks['fgm_float32'])} with float32 arithmetic throughout.",
        ),
        *warnings_of(q3["models"]),
        *why(
            (
                sound and exceeds(checks["noise"], checks["fgm"], checks["images"]),
                "The network reads patterns that predict the class and that a change too small to see "
                "can turn around: non-robust features (Ilyas et al. 2019).",
            ),
            (
                sound and exceeds(value["fgm"], value["pgd"], number),
                "FGM follows the gradient at the image alone, as if the loss were linear (Goodfellow "
                "et al. 2015); where it bends, more and smaller steps find more (Madry et al. 2018).",
            ),
            (
                sound and exceeds(value["perturbed"], value["fgm"], number),
                "The perturbation changes pixels by far more than FGM does and costs less, since it "
                "is drawn without a look at the network: among 3,072 directions few matter, and a "
                "random one hardly points along them (Fawzi et al. 2016).",
            ),
        ),
        ("text", "Figures S3 and S4 show how accuracy falls with epsilon and with PGD's steps."),
        (
            "figure",
            "q3/by_epsilon.png",
            "Figure S3: FGM and PGD-20 over epsilon, on the first "
            f"{model['by_eps']['images']} test images.",
        ),
        (
            "figure",
            "q3/pgd_by_step.png",
            "Figure S4: PGD over its number of steps, on all test images.",
        ),
        (
            "text",
            "In figure 8 a colour on another's island is an image in the wrong class's "
            "neighbourhood; those that are misclassified when clean lie there, too. How small "
            "a change brought an image there, the map cannot show.",
        ),
        (
            "figure",
            "q3/figure08_umap.png",
            "Figure 8: perturbed and attacked test images in the map of figure 5.",
        ),
    ]


def adversarial_section(q4):
    (without, plain), (with_fgm, robust) = q4["models"].items()
    before, after, number = plain["accuracy"], robust["accuracy"], q4["n_test"]
    sound = not robust["warnings"]
    blocks = [
        ("heading", "Question 4: training on perturbed and attacked data"),
        (
            "text",
            "Asked: train on data perturbed as in question 3, without and with FGM in the "
            f"loop. Done: {without}: {described(plain['recipe'])}; {with_fgm}: "
            f"{described(robust['recipe'])}. First weights: {q4['init']}. The attack in the "
            "loop is N-FGSM (de Jorge et al. 2022) with noise of "
            f"{robust['recipe']['noise']:g} epsilons against catastrophic overfitting.",
        ),
        conditions_table("Table 4: question 4's models on test.", q4["models"]),
        (
            "text",
            "Table 4: FGM in the loop, against training without it. "
            + effect(
                "On perturbed images under FGM it",
                before["perturbed_fgm"],
                after["perturbed_fgm"],
                number,
            )
            + " "
            + effect("On clean images it", before["clean"], after["clean"], number),
        ),
        *[("text", f"{title}: {overfitting(model)}") for title, model in q4["models"].items()],
        ("text", f"The attacks on {with_fgm}:"),
        *attack_sentences(robust, number),
        *warnings_of(q4["models"]),
        *why(
            (
                sound and exceeds(after["pgd"], before["pgd"], number),
                "Training on one kind of change teaches to bear that kind and hardly another (Geirhos "
                "et al. 2018): the perturbation does not prepare for an attack, an attack in the loop "
                "does (Madry et al. 2018).",
            ),
            (
                sound and exceeds(before["clean"], after["clean"], number),
                "What it costs on clean images are features that predict the class but do not stand "
                "an attack; a robust model has to do without them (Tsipras et al. 2019).",
            ),
        ),
        ("text", "Figures 9 and 10 show the trainings, figures 11 and 12 the maps."),
    ]
    for title, model in q4["models"].items():
        name = model["file"].removesuffix(".pt")
        blocks += [
            (
                "figure",
                f"q4/figure09_accuracy_{name}.png",
                f"Figure 9, {title}: accuracy per epoch, with PGD-20's.",
            ),
            ("figure", f"q4/figure10_loss_{name}.png", f"Figure 10, {title}: loss per epoch."),
            (
                "figure",
                f"q4/figure11_umap_train_{name}.png",
                f"Figure 11, {title}: UMAP of perturbed train.",
            ),
            (
                "figure",
                f"q4/figure12_umap_test_{name}.png",
                f"Figure 12, {title}: perturbed test in that map.",
            ),
        ]
    return blocks


def angular_section(q6):
    (model,) = q6["models"].values()
    val, value, number = model["val"], model["accuracy"], q6["n_test"]
    first, last = val["accuracy_before_training"], val["accuracy"]
    return [
        ("heading", "Question 6: the angular loss"),
        (
            "text",
            "Asked: the same with the angular loss and a pretrained ResNet-18, on clean data "
            f"only. Done: {described(model['recipe'])}; first weights: {q6['init']}. Accuracy "
            f"is a vote of the {model['neighbours']} nearest training embeddings; on "
            f"validation it is {common.percent(val['accuracy'])}. With the first weights and "
            "a random last layer, before training, it is "
            f"{common.percent(val['accuracy_before_training'])}. Table 5 is the outcome.",
        ),
        conditions_table("Table 5: the vote on test.", q6["models"]),
        *attack_sentences(model, number),
        *warnings_of(q6["models"]),
        *why(
            (
                not exceeds(last, first, number),
                "The loss orders distances and has no word on classes; losses of its kind gain little "
                "where all else is equal (Musgrave et al. 2020).",
            ),
            (
                value["pgd"] < value["clean"] / 2 and exceeds(value["clean"], value["pgd"], number),
                "A vote does not protect: it reads the same features, and whoever moves an image's "
                "features moves its neighbours (Mao et al. 2019).",
            ),
        ),
        (
            "text",
            "Figure 13 shows the training, table 6 how well neighbours are ranked, figures 14 "
            "to 16 maps and examples.",
        ),
        (
            "table",
            "Table 6: training images as neighbours of test images.",
            ["measure", "test"],
            [[RETRIEVAL[name], f"{value:.4f}"] for name, value in model["retrieval"].items()],
        ),
        ("figure", "q6/figure13_accuracy.png", "Figure 13: accuracy per epoch."),
        ("figure", "q6/figure13_loss.png", "Figure 13, continued: loss per epoch."),
        (
            "figure",
            "q6/figure14_umap.png",
            "Figure 14: UMAP of the embeddings, fitted on train; the test part in that map.",
        ),
        (
            "figure",
            "q6/figure15_examples.png",
            "Figure 15: original, perturbed and attacked test images with the class voted.",
        ),
        (
            "figure",
            "q6/figure16_umap.png",
            "Figure 16: perturbed and attacked test images in the map of figure 14.",
        ),
    ]


def comparison(found):
    """All models under all conditions, and for each condition in words which is best."""
    models = {
        name: model
        for question in ("q3", "q4", "q6")
        if question in found
        for name, model in found[question]["models"].items()
    }
    if len(models) < 2:
        return []
    number = min(metrics["n_test"] for metrics in found.values())
    best = []
    for key, title in common.CONDITIONS.items():
        shares = {name: model["accuracy"][key] for name, model in models.items()}
        images = min(model["strongest_images"] for model in models.values())
        images = images if key == "strongest" else number
        first = max(shares, key=shares.get)
        ties = [name for name in shares if not shows(shares[name], shares[first], images)]
        best.append(
            f"{title}: " + " or ".join(f"{name} ({common.percent(shares[name])})" for name in ties)
        )
    epochs = [
        f"{name} {model['recipe']['epochs']} from {metrics.get('init', 'random weights')}"
        for question, metrics in found.items()
        if question != "q3"
        for name, model in metrics.get("models", {}).items()
    ]
    blocks = [
        ("heading", "Comparison of all models"),
        conditions_table("Table 7: all models on test.", models),
        (
            "text",
            f"Epochs of training behind table 7: {', '.join(epochs)}. Those of a "
            "model that began with another's weights come on top of that model's.",
        ),
        (
            "text",
            "Best under each condition, and what is not more than two standard errors "
            "behind: " + "; ".join(best) + ".",
        ),
        (
            "text",
            "Standard errors are those of drawing the test images. Training again with "
            "another seed moves accuracies, too, which one run cannot show; `make "
            "seeds` measures by how much.",
        ),
    ]
    reference, *others = models
    for name in others:
        changes = []
        for key, title in common.CONDITIONS.items():
            before, after = (models[model]["accuracy"][key] for model in (reference, name))
            images = models[name]["strongest_images"] if key == "strongest" else number
            change = f"{title} {100 * (after - before):+.1f}"
            changes.append(change if shows(before, after, images) else f"{change} (does not show)")
        blocks.append(("text", f"{name} against {reference}, in points: {', '.join(changes)}."))
    if "q6" in found:
        images = min(model["by_eps"]["images"] for model in models.values())
        blocks += [
            ("text", "Figure S5 shows how much of that holds for other epsilons."),
            (
                "figure",
                "q6/all_models.png",
                "Figure S5: every model's accuracy over epsilon "
                f"on the first {images} test images, under FGM (dashed) and PGD-20 (solid).",
            ),
        ]
    return blocks


def origin_section(found):
    """Where each number comes from: machine, precision, commit, time, and the recipes in full."""
    rows = [
        [
            question,
            str(metrics["seed"]),
            f"{metrics['device']} ({metrics['hardware']})",
            metrics["precision"],
            str(metrics["git_commit"])[:10],
            metrics["versions"]["torch"],
            f"{minutes(metrics):.1f}",
            seconds_per_epoch(metrics),
            str(metrics.get("peak_gpu_memory_mib", metrics["peak_memory_mib"])),
        ]
        for question, metrics in found.items()
    ]
    recipes = {
        name: model["recipe"]
        for metrics in found.values()
        for name, model in metrics.get("models", {}).items()
        if "recipe" in model
    }
    settings = {
        key: None
        for recipe in recipes.values()
        for key in recipe
        if key not in ("split_sha256", "first_weights")
    }  # a set that keeps its order
    split = next(iter(found.values()))["split_sha256"]
    return [
        ("heading", "How these results were made"),
        (
            "text",
            "Table 8 tells where each number comes from, table 9 every setting. SHA-256 "
            f"of the split: {split}",
        ),
        (
            "table",
            "Table 8: each question's run.",
            [
                "question",
                "seed",
                "device",
                "precision",
                "commit",
                "torch",
                "minutes",
                "seconds per epoch",
                "peak memory, MiB",
            ],
            rows,
        ),
        *(
            [
                (
                    "table",
                    "Table 9: the recipe of each training.",
                    ["setting", *recipes],
                    [
                        [key, *(setting(recipe.get(key, "")) for recipe in recipes.values())]
                        for key in settings
                    ],
                )
            ]
            if recipes
            else []
        ),
    ]


def setting(value):
    """A setting as the table shows it: a float without the digits that say nothing."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def sources_section(blocks):
    """The references that the text names."""
    said = " ".join(text for kind, text, *_ in blocks if kind == "text")
    named = [f"{key}: {reference}" for key, reference in SOURCES.items() if key in said]
    return (
        [("heading", "Sources"), ("markdown", "\n".join(f"- {line}" for line in named))]
        if named
        else []
    )


def seconds_per_epoch(metrics):
    """The median of each training's epochs, since a machine may have had other work in some."""
    return ", ".join(
        f"{statistics.median(epoch['seconds'] for epoch in model['history']):.1f}"
        for model in metrics.get("models", {}).values()
        if "history" in model
    )


def minutes(metrics):
    """Of a question's stages and trainings."""
    trainings = [model.get("training_seconds", 0) for model in metrics.get("models", {}).values()]
    return sum([*metrics["seconds"].values(), *trainings]) / 60


def shows(first, second, number):
    """Whether two accuracies on so many images differ by two standard errors or more."""
    error = math.hypot(*(common.standard_error(share, number) for share in (first, second)))
    return first != second and abs(first - second) >= 2 * error


def exceeds(first, second, number):
    """Whether the first of two accuracies is the higher, and that shows."""
    return first > second and shows(first, second, number)


def effect(cause, before, after, number):
    """A sentence on what takes an accuracy from `before` to `after`, on so many images each."""
    points = 100 * (after - before)
    if not shows(before, after, number):
        return f"{cause} changes it by {points:+.1f} points, which does not show."
    verb = "gains" if points > 0 else "costs"
    return f"{cause} {verb} {abs(points):.1f} points."


def fitted(model, number):
    """How much better the network does on what it was trained on, and why that is no surprise."""
    train, test = model["history"][-1]["accuracy"], model["test"]["accuracy"]
    said = (
        f"In the last epoch it was right on {common.percent(train)} of the augmented training "
        f"images (figures 3 and 4), and then on {common.percent(test)} of the test images."
    )
    if exceeds(train, test, number):
        said += (
            " A network of this size can learn any labels by heart (Zhang et al. 2017); "
            "augmentation shows it no image twice."
        )
    return said


def calibration(scores):
    """Whether the predicted probabilities are too high, too low or right on average."""
    gap = sum(
        share * (confidence - accuracy) for share, confidence, accuracy in scores["reliability"]
    )
    if abs(gap) < 0.01:
        return "its probabilities are right on average."
    if gap > 0:
        return (
            f"its probabilities are {100 * gap:.1f} points too high on average, as is usual "
            "(Guo et al. 2017)."
        )
    return (
        f"its probabilities are {-100 * gap:.1f} points too low on average, which label "
        "smoothing makes them (Müller et al. 2019)."
    )


def why(*reasons):
    """The reasons that the numbers bear, as one block of text. reasons: (whether, sentence)."""
    borne = [sentence for holds, sentence in reasons if holds]
    return [("text", "Why? " + " ".join(borne))] if borne else []


def attack_sentences(model, number):
    """What noise, more steps and another loss do beside FGM, each said as its numbers allow."""
    value, checks, masked = model["accuracy"], model["checks"], bool(model["warnings"])
    noise, fgm = checks["noise"], checks["fgm"]
    said = (
        f"Random noise of FGM's size leaves {common.percent(noise)} of the first "
        f"{checks['images']} images, FGM {common.percent(fgm)} of the same: "
    )
    if not shows(noise, fgm, checks["images"]):
        said += "that the direction matters does not show."
    else:
        said += (
            "the direction matters, not the size."
            if noise > fgm
            else "noise is the stronger, so that the gradient says little here."
        )
    gap = 100 * (value["fgm"] - value["pgd"])
    steps = f"PGD-20 leaves {common.percent(value['pgd'])}, "
    if not shows(value["fgm"], value["pgd"], number):
        steps += f"{gap:+.1f} points from FGM's, which does not show."
    elif gap < 0:
        steps += f"{-gap:.1f} points more than FGM: more steps attack less well here."
    else:
        steps += f"{gap:.1f} points below FGM" + (
            "." if masked else ": that gap is what one step misses."
        )
    images = model["strongest_images"]
    last = 100 * common.standard_error(value["strongest"], images)
    strongest = (
        f"The strongest attack, PGD on a margin after PGD on cross-entropy, leaves "
        f"{common.percent(value['strongest'])} ± {last:.1f} of the first {images} images."
    )
    return [("text", " ".join([said, steps, strongest]))]


def overfitting(model):
    """What PGD accuracy on validation tells of the training."""
    history, kept = model["history"], model["epoch_kept"]
    best, last = max(epoch["val_pgd"] for epoch in history), history[-1]["val_pgd"]
    if kept < len(history):
        return (
            f"training collapsed in epoch {len(history)}, where PGD-20 accuracy on validation "
            f"fell from {common.percent(best)} to {common.percent(last)}; the weights are "
            f"those of epoch {kept}, chosen on validation."
        )
    return (
        f"PGD-20 accuracy on validation was {common.percent(last)} after the last epoch, "
        f"{common.percent(best)} at best."
    )


def described(recipe):
    """A recipe in words."""
    optimizer = {"sgd": "SGD with Nesterov momentum", "adamw": "AdamW"}[recipe["optimizer"]]
    return (
        f"{recipe['epochs']} epochs, batch {recipe['batch_size']}, {optimizer}, one-cycle "
        f"learning rate up to {recipe['lr']:g}, stem {recipe['stem']}, "
        f"{recipe['precision']} on {recipe['device']}"
    )


def conditions_table(caption, models):
    header, rows = common.condition_rows(models)
    if any("autoattack" in model for model in models.values()):
        header = [*header, "AutoAttack"]
        rows = [
            [*row, refereed(model.get("autoattack"))]
            for row, model in zip(rows, models.values(), strict=True)
        ]
    return ("table", caption, header, rows)


def refereed(found):
    """AutoAttack's number with its standard error and the images that it is of, or nothing."""
    if found is None:
        return ""
    share = found["right"] / found["images"]
    error = 100 * common.standard_error(share, found["images"])
    return f"{common.percent(share)} ± {error:.1f} ({found['images']} images)"


def warnings_of(models):
    return [
        ("text", f"Warning, {name}: {warning}")
        for name, model in models.items()
        for warning in model["warnings"]
    ]


# ---- The two forms -------------------------------------------------------------------------------


def markdown(blocks):
    """Blocks as Markdown; figures stay files beside it."""
    lines = []
    for kind, *content in blocks:
        if kind == "table":
            caption, header, rows = content
            cells = [
                [common.one_line(cell).replace("|", "\\|") for cell in row]
                for row in (header, ["---"] * len(header), *rows)
            ]
            lines += [f"*{caption}*", "\n".join(f"| {' | '.join(row)} |" for row in cells)]
        elif kind == "markdown":
            lines.append(content[0].strip())
        elif kind == "figure":
            lines.append(f"![{content[1]}]({content[0]})\n\n*{content[1]}*")
        else:
            lines.append({"title": "# ", "heading": "## "}.get(kind, "") + content[0])
    return "\n\n".join(lines) + "\n"


STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1rem; align-items: start }
.wide { grid-column: 1 / -1 }
figure { margin: 1rem 0; text-align: center; break-inside: avoid }
img { max-width: 100% }
figcaption { color: #555; font-size: .9em }
.scroll { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .9em }
caption { text-align: left; color: #555 }
td, th { border: 1px solid #ccc; padding: .2rem .5rem; text-align: left }
tr, math, pre { break-inside: avoid }
pre { overflow-x: auto; font-size: .85em }
h1, h2, h3 { break-after: avoid }
header { position: fixed; top: 0; left: 0; right: 0; text-align: center; font-weight: bold;
         color: #b00; background: #fffc }
@media (max-width: 40rem) {
  .figures { grid-template-columns: 1fr }
  p, li { overflow-x: auto }
}
@media print {
  @page { size: A4; margin: 15mm }
  body { font-size: 10pt; line-height: 1.35; margin: 0; padding: 0; max-width: none }
  .figures { grid-template-columns: 1fr 1fr }
  figure { margin: .3rem 0 }
  img { max-height: 6.5cm }
  .wide img { max-height: 8cm }
  p, ul, .scroll { margin: .5em 0 }
  td, th { padding: .05rem .3rem }
  .scroll { overflow: visible; break-inside: avoid }
}
"""


def html_page(blocks, args, hashes):
    """Blocks as one HTML page with the figures inside.

    hashes: dict from a figure's path to its SHA-256. Raises UserError for a figure that is missing
    or of another run.
    """
    headings = [content[0] for kind, *content in blocks if kind == "heading"]
    parts = []
    for kind, group in itertools.groupby(blocks, key=lambda block: block[0]):
        contents = [content for _, *content in group]
        if kind == "figure":  # those that follow each other stand side by side
            figures = "".join(html_figure(*content, args, hashes) for content in contents)
            parts.append(f"<div class='figures'>{figures}</div>")
        elif kind == "markdown":
            parts += [
                html_block(block.strip(), args)
                for content in contents
                for block in re.findall(r"```.*?```|(?:(?!\n\n|```).)+", content[0], re.DOTALL)
                if block.strip()
            ]
        elif kind == "table":
            parts += [html_table(*content) for content in contents]
        elif kind == "heading":
            number = headings.index(contents[0][0])
            if number == 0:
                links = "".join(
                    f"<li><a href='#{n}'>{html.escape(heading)}</a></li>"
                    for n, heading in enumerate(headings)
                )
                parts.append(f"<ul>{links}</ul>")
            parts.append(f"<h2 id='{number}'>{html.escape(contents[0][0])}</h2>")
        else:
            tag = {"title": "h1", "text": "p", "note": "header"}[kind]
            parts += [f"<{tag}>{html.escape(content[0])}</{tag}>" for content in contents]
    return (
        f"<!DOCTYPE html><html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(blocks[0][1])}</title><style>{STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def html_table(caption, header, rows):
    lines = [html_row("th", header), *(html_row("td", row) for row in rows)]
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<div class='scroll'><table>{title}{''.join(lines)}</table></div>"


def html_row(tag, cells):
    return "<tr>" + "".join(f"<{tag}>{html_line(cell)}</{tag}>" for cell in cells) + "</tr>"


def html_figure(path, caption, args, hashes):
    """A figure with its image inside. Raises UserError when that is missing or has another hash."""
    made_by = (
        f"python report.py --results {args.results}"
        if path.startswith("q5")
        else common.script_command(path[:2], args)
    )
    with common.opened(args.results / path, made_by) as image:
        content = image.read()
        if not path.startswith("q5") and hashes.get(path) != common.sha256(content):
            raise ValueError("the figure of another run than metrics.json")
    across, down = struct.unpack(">II", content[16:24])  # of a PNG
    data = base64.b64encode(content).decode()
    wide = " class='wide'" if across > 1.6 * down or "examples" in path else ""
    return (
        f"<figure{wide}><img src='data:image/png;base64,{data}' "
        f"alt='{html.escape(caption, quote=True)}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


# ---- The little Markdown and LaTeX that question 5's answer uses ---------------------------------


def html_block(block, args):
    """A block of Markdown: code, heading, formula, figure, table, list or paragraph."""
    if block.startswith("```"):
        return f"<pre>{html.escape(block.strip('`').split(chr(10), 1)[1])}</pre>"
    if heading := re.match(r"(#+) (.*)", block):
        level = len(heading[1])
        return f"<h{level}>{html_line(heading[2])}</h{level}>"
    if block.startswith("$$"):
        return f"<div class='scroll'>{mathml(block.strip('$'), 'block')}</div>"
    if figure := re.match(r"!\[(.*)\]\((.*)\)$", block):
        return html_figure(figure[2], figure[1], args, {})
    if block.startswith("|"):
        header, _, *rows = (
            [cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")
        )
        return html_table("", header, rows)
    if items := re.split(r"(?:^|\n)(?:-|\d+\.) ", block)[1:]:
        kind = "ul" if block.startswith("-") else "ol"
        return f"<{kind}>" + "".join(f"<li>{html_line(item)}</li>" for item in items) + f"</{kind}>"
    return f"<p>{html_line(block)}</p>"


def html_line(text):
    """Text with `code`, $formula$, **bold**, *italic* and <links>."""
    pieces = re.split(r"(`[^`]*`|\$[^$]*\$)", " ".join(text.split()))
    for position, piece in enumerate(pieces):
        if piece.startswith("`"):
            pieces[position] = f"<code>{html.escape(piece[1:-1])}</code>"
        elif piece.startswith("$"):
            pieces[position] = mathml(piece[1:-1], "inline")
        else:
            pieces[position] = re.sub(
                r"&lt;(https:[^ ]*)&gt;", r"<a href='\1'>\1</a>", html.escape(piece)
            )
    line = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", "".join(pieces))
    return re.sub(r"(?<![*\w])\*([^*]+)\*", r"<i>\1</i>", line)


SYMBOLS = {
    "alpha": "α",
    "theta": "θ",
    "ell": "ℓ",
    "nabla": "∇",
    "sum": "∑",
    "le": "≤",
    "ge": "≥",
    "ne": "≠",
    "in": "∈",
    "to": "→",
    "cdot": "·",
    "partial": "∂",
    "top": "⊤",
    "lVert": "‖",
    "rVert": "‖",
    "lvert": "|",
    "rvert": "|",
    "-": "−",
    "'": "′",
    "{": "{",
    "}": "}",
}
LETTERS = {"alpha", "theta", "ell", "partial", "top"}  # the symbols that are no operators
SCRIPT = {"P": "𝒫", "R": "ℝ"}  # as \mathcal and \mathbb


def mathml(tex, display):
    """A formula of the LaTeX that our text uses as MathML, which browsers draw themselves."""
    tokens = re.findall(r"\\text\{[^}]*\}|\\[a-zA-Z]+|\\.|\d+(?:\.\d+)?|\S", tex)
    return f"<math display='{display}'>{_row(tokens)}</math>"


def _row(tokens):
    """The tokens up to the end or a closing brace, which is taken, too."""
    parts = []
    while tokens and tokens[0] != "}":
        base, scripts = _atom(tokens), {}
        while tokens and tokens[0] in "_^":
            place = tokens.pop(0)
            scripts[place] = _atom(tokens)
        tag = {"_": "sub", "^": "sup", "_^": "subsup"}.get("".join(sorted(scripts, reverse=True)))
        if tag:
            ordered = "".join(scripts[kind] for kind in "_^" if kind in scripts)
            tag = {"sub": "under", "subsup": "underover"}.get(tag, tag) if "∑" in base else tag
            base = f"<m{tag}>{base}{ordered}</m{tag}>"
        parts.append(base)
    if tokens:
        tokens.pop(0)
    return f"<mrow>{''.join(parts)}</mrow>"


def _atom(tokens):
    token = tokens.pop(0)
    name = token.removeprefix("\\")
    if token == "{":
        return _row(tokens)
    if name in ("frac", "tfrac"):
        return f"<mfrac>{_argument(tokens)}{_argument(tokens)}</mfrac>"
    if name.startswith("text{"):
        return f"<mtext>{name[5:-1].replace(' ', chr(160))}</mtext>"
    if name in ("mathcal", "mathbb"):
        letter = "".join(tokens.pop(0) for _ in "{P}")[1]
        return f"<mi>{SCRIPT[letter]}</mi>"
    if name in ("big", "Big"):
        return _atom(tokens)
    if name == "qquad":
        return "<mspace width='2em'/>"
    if name in SYMBOLS:
        tag = "mi" if name in LETTERS else "mo"
        return f"<{tag}>{SYMBOLS[name]}</{tag}>"
    tag = "mn" if token[0].isdigit() else "mi" if name.isalpha() else "mo"
    return f"<{tag}>{html.escape(name)}</{tag}>"


def _argument(tokens):
    """The next group, or of a number the first digit: \\tfrac12 is a half."""
    if tokens[0].isdigit() and len(tokens[0]) > 1:
        first, rest = tokens[0][0], tokens[0][1:]
        tokens[:1] = [first, rest]
    return _atom(tokens)


if __name__ == "__main__":
    common.run(main)
