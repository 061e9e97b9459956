"""Assemble what the questions have written: results/report.md and a self-contained report.html.

The sections return Markdown, which together is report.md. report.html is that file rendered, with
the figures inside. Questions that have not been run are left out. Results of different splits,
seeds, stems or models are refused, since they cannot be compared.

Reads   results/q1 ... q6, results/autoattack.json if it is there, q5_angular_loss.md
Writes  results/all_models.png, results/report.md, results/report.html
Run     python report.py
"""

import base64
import datetime
import math
import re
import statistics
import struct
from collections import namedtuple
from pathlib import Path

import mistune
from latex2mathml.converter import convert as mathml

import common

TITLE = "Generalization and Robustness: ResNet-18 with few labels of CIFAR-10"
QUESTIONS = ("q1", "q2", "q3", "q4", "q6")
MEASURED = ("q3", "q4", "q6")  # those that measure models under all conditions
HERE = Path(__file__).parent
MUST_AGREE = {  # a key of metrics.json, and what it says
    "split_sha256": "split",
    "quick": "mode (--quick or not)",
    "seed": "seed",
    "stem": "stem",
    "q2_sha256": "model of question 2",
}
CHI_SQUARE = 16.92  # exceeded with 9 degrees of freedom in 5 % of the cases
# Number, file and caption. 1 to 16 are those that the assignment asks for, the others are more.
FIGURES = """
S1 | all_models.png | accuracy over epsilon, under FGM (dashed) and PGD-20 (solid).
1 | q1/figure01_train_labels.png | labels of the training part.
2 | q1/figure02_held_out_labels.png | labels of the validation and test parts.
3 | q2/figure03_accuracy.png | accuracy per epoch, on up to 2,000 validation images.
4 | q2/figure04_loss.png | loss per epoch, on the same.
S2 | q2/confusion_test.png | confusion matrix on test, and accuracy per class.
S3 | q2/reliability_test.png | reliability diagram on test.
5 | q2/figure05_umap_train.png | UMAP of the backbone output, fitted on train without labels.
6 | q2/figure06_umap_test.png | the test part in the map of figure 5.
7 | q3/figure07_examples.png | the first test images that are right when clean; predicted class.
S4 | q3/by_epsilon.png | FGM and PGD-20 over epsilon.
S5 | q3/pgd_by_step.png | PGD over its number of steps, on all test images.
8 | q3/figure08_umap.png | test images, perturbed and under FGM, in the map of figure 5.
9 | q4/figure09_accuracy_{}.png | accuracy per epoch; PGD-20 on validation images.
10 | q4/figure10_loss_{}.png | loss per epoch.
11 | q4/figure11_umap_train_{}.png | UMAP of the perturbed training part.
12 | q4/figure12_umap_test_{}.png | perturbed test images in that map.
13 | q6/figure13_accuracy.png | accuracy per epoch.
13, continued | q6/figure13_loss.png | loss per epoch.
14 | q6/figure14_umap.png | UMAP of the embeddings, fitted on train, and the test part in that map.
15 | q6/figure15_examples.png | the first test images that are right when clean; voted class.
16 | q6/figure16_umap.png | test images, perturbed and under FGM, in the map of figure 14.
"""
SOURCES = """
Barz & Denzler 2020: Do we train on test data? Purging CIFAR of near-duplicates, J. Imaging
Carlini & Wagner 2017: Towards evaluating the robustness of neural networks, IEEE S&P
Croce & Hein 2020: Reliable evaluation of adversarial robustness with an ensemble of attacks, ICML
de Jorge et al. 2022: Make some noise: reliable and efficient single-step adversarial training
Edwards 1948: Note on the correction for continuity in testing correlated proportions, Psychometrika
Fawzi et al. 2016: Robustness of classifiers: from adversarial to random noise, NeurIPS
Fu et al. 2020: Label smoothing and adversarial robustness, arXiv:2009.08233
Geirhos et al. 2018: Generalisation in humans and deep neural networks, NeurIPS
Goodfellow et al. 2015: Explaining and harnessing adversarial examples, ICLR
Guo et al. 2017: On calibration of modern neural networks, ICML
Ilyas et al. 2019: Adversarial examples are not bugs, they are features, NeurIPS
Kohavi 1995: A study of cross-validation and bootstrap for accuracy estimation, IJCAI
Madry et al. 2018: Towards deep learning models resistant to adversarial attacks, ICLR
McInnes et al. 2018: UMAP: uniform manifold approximation and projection, arXiv:1802.03426
McNemar 1947: Note on the difference between correlated proportions or percentages, Psychometrika
Müller et al. 2019: When does label smoothing help?, NeurIPS
Musgrave et al. 2020: A metric learning reality check, ECCV
Sitawarin & Wagner 2019: On the robustness of deep k-nearest neighbors, arXiv:1903.08333
Tsipras et al. 2019: Robustness may be at odds with accuracy, ICLR
Wang et al. 2021: ASK: adversarial soft k-nearest neighbor attack and defense, arXiv:2106.14300
Wilson 1927: Probable inference, the law of succession, and statistical inference, JASA
Zhang et al. 2017: Understanding deep learning requires rethinking generalization, ICLR
"""
# What others have found, each said where the numbers bear it.
REASONS = """
random labels | That it is better on training images is no surprise: a network of this size can fit
even random labels (Zhang et al. 2017).

features | One explanation of what FGM does is that the network reads patterns that predict the
class, but that a small change can reverse: non-robust features (Ilyas et al. 2019). Noise of the
same size does less: among so many dimensions a random direction hardly leads towards another class
(Fawzi et al. 2016).

linear | FGM follows the gradient at the image alone, as if the loss were linear (Goodfellow et
al. 2015). Where the loss bends, more and smaller steps find more (Madry et al. 2018).

far | Accuracy under FGM is so far above that under PGD-20 that FGM alone says little about
robustness.

smoothing | Label smoothing, used here, can raise accuracy under attacks by gradients without making
a network robust (Fu et al. 2020).

blind | The perturbation changes pixels by far more than FGM and costs less: it is random and
knows nothing of the network.

loop | This run agrees with what others found: training on one kind of change need not help against
another (Geirhos et al. 2018). Under PGD-20 the perturbation alone gained little or nothing, an
attack in the loop much more (Madry et al. 2018).

trade-off | One explanation of the lower accuracy on clean images is that a robust model has to do
without features that predict the class but do not stand an attack (Tsipras et al. 2019).

together | One explanation of why training did not improve the vote: the loss asks only that images
of a class lie together and apart from others, which may hold for the first weights already.

vote | Under PGD-20 the vote does no better than question 2's classifier. Neighbours were proposed
as a defence, and gradients find images that fool it (Sitawarin & Wagner 2019).
"""


def main():
    parser = common.argument_parser(__doc__)
    parser.set_defaults(device="cpu")  # a GPU would have nothing to do
    parser.add_argument("--author", default="", help="whose name stands below the title")
    parser.add_argument("--student-id", default="", help="what stands beside it")
    parser.add_argument("--note", default="", help="a line for every page")
    args = common.parse_arguments(parser)
    found = read_results(args.results)
    refuse_mixtures(found, args.results)
    right = read_right(found, args.results)
    hashes = bring_figures(found, args.results)
    text = assemble(found, right, [args.author, args.student_id], args.note)
    # Rendered first: where a figure is missing, both files stay as they were.
    page = rendered(text, args.results, hashes)
    common.write_file(args.results / "report.md", text.encode())
    common.write_file(args.results / "report.html", page.encode())
    written = f"{args.results / 'report.html'} (self-contained), {args.results / 'report.md'}"
    print(common.one_line(f"Report: {written}"))


# ---- Results -------------------------------------------------------------------------------------


def read_results(results):
    """The metrics of the questions that have been run: dict from question to its metrics.json.

    AutoAttack's numbers, if there are any, stand beside those of the models that they belong to.
    Raises UserError without question 1, with which every run begins.
    """
    found = common.metrics_found(results, QUESTIONS)
    if "q1" not in found:
        command = common.command_for(results / "q1" / "metrics.json")
        raise common.UserError(f"{results} holds no results of q1; begin with: {command}")
    path = results / "autoattack.json"
    autoattack = common.read_metrics(path) if path.exists() else {}
    for question, name, model in measured(found):
        digest = model.get("sha256") or found[question]["q2_sha256"]
        if name in autoattack and autoattack[name]["sha256"] == digest:
            model["autoattack"] = autoattack[name]
    return found


def measured(found):
    """Question, name and metrics of each model that was measured under all conditions: a list."""
    return [
        (question, name, model)
        for question in MEASURED
        if question in found
        for name, model in found[question]["models"].items()
    ]


def refuse_mixtures(found, results):
    """Raise UserError where two questions differ in what must agree."""
    for key, meaning in MUST_AGREE.items():
        holders = [question for question in found if key in found[question]]
        for question in holders[1:]:
            if found[question][key] != found[holders[0]][key]:
                command = common.command_for(results / question / "metrics.json")
                raise common.UserError(
                    f"{results}: {question} and {holders[0]} have a different {meaning}; make "
                    f"{question} again with: {command}"
                )


def read_right(found, results):
    """Which test images each model got right: dict from model to condition to a bool array.

    A question whose right.npz is missing has its models left out.
    """
    right = {}
    for question in MEASURED:
        path = results / question / "right.npz"
        if question in found and path.exists():
            right |= common.read_right(path)
    return right


def bring_figures(found, results):
    """Draw the comparison of all models and copy question 5's figure.

    Returns the SHA-256 of these and of the questions' figures, by path in the results folder.
    """
    hashes = {
        f"{question}/{name}": digest
        for question, metrics in found.items()
        for name, digest in metrics["figures"].items()
    }
    if measured(found):
        draw_all_models(results / "all_models.png", found)
        hashes["all_models.png"] = common.sha256((results / "all_models.png").read_bytes())
    drawing = HERE / "docs" / "angular_loss.png"
    if drawing.exists():
        common.write_file(results / "q5" / "angular_loss.png", drawing.read_bytes())
        hashes["q5/angular_loss.png"] = common.sha256(drawing.read_bytes())
    return hashes


def draw_all_models(path, found):
    """Every model's accuracy over epsilon: FGM dashed, PGD-20 solid."""
    with common.drawing(path, (9, 3.6)) as figure:
        axes = figure.subplots()
        for position, (_, name, model) in enumerate(measured(found)):
            by_eps, colour = model["by_eps"], f"C{position}"
            eps = [255 * value for value in by_eps["eps"]]
            axes.plot(eps, by_eps["fgm"], ".--", color=colour)
            axes.plot(eps, by_eps["pgd"], ".-", color=colour, label=name.replace("$", r"\$"))
        axes.plot([], [], "k--", label="FGM")
        axes.plot([], [], "k-", label="PGD-20")
        axes.set(xlabel="epsilon (L-infinity) in 1/255", ylabel="accuracy", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()


# ---- Markdown ------------------------------------------------------------------------------------


def plain(value):
    """What comes from a file or a flag as Markdown that shows it as it is, on one line."""
    shown = f"{value:g}" if isinstance(value, float) else value
    return re.sub(r"([\\`*_\[\]<>&$|~#!])", r"\\\1", common.one_line(shown))


def table(caption, header, rows):
    """A table below its caption. The cells are Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return f"*{caption}*\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figures(*numbers, name="", file=""):
    """Figures of these numbers, each above its caption. name, file: of the model that they show."""
    lines = [line.split(" | ") for line in FIGURES.strip().splitlines()]
    return "\n\n".join(
        f"![Figure {number}]({path.format(file)})\\\n*Figure {number}{name}: {caption}*"
        for number, path, caption in lines
        if number in numbers
    )


def remarks(models):
    """A paragraph for each warning that the attacks' checks gave and for each note on a model."""
    return "\n\n".join(
        f"{kind}, {plain(name)}: {plain(sentence)}"
        for name, model in models.items()
        for kind, key in (("Warning", "warnings"), ("Note", "notes"))
        for sentence in model.get(key, [])
    )


def reasons(borne):
    """Those of REASONS that the numbers bear, as a paragraph. borne: dict from name to bool."""
    named = dict(entry.split(" | ") for entry in REASONS.strip().split("\n\n"))
    return " ".join(named[name] for name, holds in borne.items() if holds)


# ---- Statistics ----------------------------------------------------------------------------------

# points and their standard error; sign: 1 or -1, or 0 where they are within two standard errors
Difference = namedtuple("Difference", ["points", "error", "sign"])


def paired(before, after):
    """The Difference of two accuracies on the same images. before, after: bool arrays.

    Tested by McNemar (1947) with the correction of Edwards (1948): only images on which the two
    differ count.
    """
    gained, lost, images = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    change = (gained - lost) / images
    error = math.sqrt(((gained + lost) / images - change**2) / images)
    beyond = abs(gained - lost) - 1 > 2 * math.sqrt(gained + lost)
    return Difference(100 * change, 100 * error, math.copysign(1, change) if beyond else 0)


def unpaired(before, after, images_before, images_after):
    """The Difference of two accuracies, each a share of so many images."""
    change, error = after - before, common.standard_error
    error = math.hypot(error(before, images_before), error(after, images_after))
    sign = math.copysign(1, change) if abs(change) > 2 * error else 0
    return Difference(100 * change, 100 * error, sign)


def effect(cause, difference):
    """A sentence on what something does to the accuracy of a model."""
    points = shown(difference.points, difference.points)
    if difference.sign == 0:
        return f"{cause} changes accuracy by {points} points, within two standard errors."
    verb = "gains" if difference.sign > 0 else "costs"
    return f"{cause} {verb} {points[1:]} points."


def shown(points, beside):
    """Points with their sign: two digits after the point where `beside`, in points, has 0.0."""
    return f"{points:+.{2 if 0 < abs(beside) < 0.05 else 1}f}"


def with_limits(share, images):
    """An accuracy on so many images; where fewer than ten are right or wrong, with limits of 95 %.

    Those are the interval of Wilson (1927), or the limit that none right, or none wrong, sets.
    """
    wrong = images - round(share * images)
    if wrong in (0, images):
        limit = math.ceil(1e4 * (1 - 0.05 ** (1 / images))) / 1e4
        return f"over {common.percent(1 - limit)}" if share else f"under {common.percent(limit)}"
    if min(wrong, images - wrong) < 10:
        low, high = wilson(share, images)
        return f"{common.percent(share)} ({100 * low:.2f} to {common.percent(high)})"
    return common.percent(share)


def with_error(share, images):
    """The same, with its standard error where that says something."""
    accuracy = with_limits(share, images)
    if accuracy != common.percent(share):
        return accuracy
    return f"{accuracy} ± {100 * common.standard_error(share, images):.1f}"


def wilson(share, images):
    """The 95 % interval of a share of so many images (Wilson 1927), as two shares."""
    z = 1.96
    centre = share + z**2 / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + z**2 / (4 * images**2))
    return [(centre + side) / (1 + z**2 / images) for side in (-half, half)]


def is_of_use(*shares):
    """Whether accuracies are so far above guessing that the model has learned something."""
    return min(shares) >= 2 * common.CHANCE


def classes_differ(per_class, images):
    """Whether accuracies of ten classes, of so many images each, differ: a chi-square test."""
    mean = statistics.mean(per_class.values())
    squares = sum((share - mean) ** 2 for share in per_class.values())
    return images * squares > CHI_SQUARE * mean * (1 - mean)


# ---- The first page ------------------------------------------------------------------------------


def assemble(found, right, author=(), note=""):
    """The whole report as Markdown.

    found: dict from question to metrics; right: as read_right returns it; author: words for the
    line below the title; note: text for every page.
    """
    sections = {"q1": split_section, "q2": training_section, "q3": attack_section}
    sections |= {"q4": adversarial_section, "q6": angular_section}
    parts = {
        name: unwrapped(make(found, right)) for name, make in sections.items() if name in found
    }
    parts["q5"] = answer_5()
    questions = [parts[name] for name in sorted(parts)]
    summary, origin = unwrapped(summary_section(found, right)), unwrapped(origin_section(found))
    body = "\n\n".join([summary, *questions, origin])
    sources = [f"- {line}" for line in SOURCES.splitlines() if line and line.split(":")[0] in body]
    body += "\n\n## References\n\n" + "\n".join(sources)
    made = " · ".join(filter(None, [*map(plain, author), f"made {datetime.date.today()}"]))
    headings = re.findall(r"^## (.*)$", body, re.MULTILINE)
    contents = " · ".join(f"[{title}](#{anchor(title)})" for title in headings)
    page = f"{head(found, note)}\n\n# {TITLE}\n\n{made}\n\nContents: {contents}\n\n{body}\n"
    return page.lstrip()


def unwrapped(text):
    """Markdown with each paragraph and item on one line; tables and captions keep their lines."""
    joints = r"(?<=[^\n|\\]) ?\n *(?=[^\n|])(?!- )"
    return re.sub(joints, " ", re.sub(r"\n{3,}", "\n\n", text)).strip()


def answer_5():
    """Question 5's section, or a line that says that it is missing."""
    path, title = HERE / "q5_angular_loss.md", "## Question 5: the angular loss\n\n"
    if not path.exists():
        return f"{title}The answer is left out: {path.name} does not lie beside report.py."
    answer = path.read_text(encoding="utf-8").split("\n", 1)[1].replace("\n##", "\n###").strip()
    if (HERE / "docs" / "angular_loss.png").exists():
        return title + answer.replace("docs/angular_loss.png", "q5/angular_loss.png")
    missing = "The figure is left out: docs/angular_loss.png is missing.\n\n"
    return title + re.sub(r"!\[.*\]\(docs/angular_loss.png\)\\\n", missing, answer)


def head(found, note):
    """What every page must say, as a block quote."""
    quick = "Made with `--quick`: the numbers mean nothing, they only show that everything works."
    lines = [plain(note), quick if found["q1"]["quick"] else ""]
    return "\n>\n".join(f"> {line}" for line in lines if line)


def anchor(heading):
    """The name by which links, on GitHub too, point to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def summary_section(found, right):
    q1, models = found["q1"], {name: model for _, name, model in measured(found)}
    text = f"""## Summary

ResNet-18 has {q1["n_train"]:,} images of CIFAR-10 to train on and {q1["n_test"]:,} others to be
tested on."""
    if not models:
        return text
    curve = min(model["by_eps"]["images"] for model in models.values())
    strongest = min(model["strongest_images"] for model in models.values())
    eps = 255 * common.EPSILON["linf"]
    return f"""{text} {"" if q1["quick"] else conclusions(found)}

{conditions_table(found, models, right)}

{figures("S1")}

How to read table 1, figure S1 and what follows:

- Epochs: "40 + 16" are 40 of question 2, with whose weights the training began, and 16 more. A
  question mark stands for an unknown number.
- FGM, the Fast Gradient Method, takes one step up the loss. PGD, projected gradient descent, takes
  20 steps of a quarter of epsilon, and leaves an image alone once it is misclassified. Both start
  from the given image (from the perturbed one in the column *perturbed + FGM*) and use the attacked
  model's own gradient. Each pixel, in [0, 1], may move by epsilon, {eps:g}/255 unless another is
  given: the norm is L-infinity.
- *Strongest* is PGD-20 on cross-entropy, and then on a margin for the images that are still right:
  the gradient of cross-entropy vanishes where a network is sure (Carlini & Wagner 2017). It is
  measured on {strongest:,} test images, figure S1 on {curve:,}: the first ones, after question 1
  has shuffled them.
- A number after ± is a standard error: how much the number would typically change with other test
  images. Where fewer than ten images are right or wrong, a 95 % interval (Wilson 1927) or limit
  stands in table 1 instead.
- Where it is known which images were right, accuracies on the same images are compared image by
  image (McNemar 1947, Edwards 1948). A difference *within two standard errors* may be chance.

{comparison(models, right)}

{autoattack_sentences(models, right)}"""


def conclusions(found):
    """The sentences of the summary, chosen by the numbers."""
    models, percent, said = {name: model for _, name, model in measured(found)}, common.percent, []
    if common.CROSS_ENTROPY in models:
        shares = models[common.CROSS_ENTROPY]["accuracy"]
        n_test = found["q1"]["n_test"]
        value = {key: with_limits(shares[key], n_test) for key in shares if key != "strongest"}
        said.append(
            f"Trained with cross-entropy, it is right on {value['clean']} of the test images; the "
            f"perturbation of question 3 leaves {value['perturbed']}, FGM {value['fgm']}, PGD-20 "
            f"{value['pgd']}."
        )
    better = "; ".join(
        f"{plain(name)} with {percent(model['accuracy']['strongest'])} "
        f"(clean: {percent(model['accuracy']['clean'])})"
        for name, model in models.items()
        if common.is_above_chance(model["accuracy"]["strongest"], model["strongest_images"])
    )
    said.append(f"Better than chance under the strongest attack: {better or 'none of the models'}.")
    warned = ", ".join(plain(name) for name, model in models.items() if model["warnings"])
    if warned:
        said.append(
            f"The checks of the attacks warn, as the questions say, of the numbers of: {warned}."
        )
    return " ".join(said)


def conditions_table(found, models, right):
    """Table 1: all models under all conditions."""
    best, rows = {key: best_under(key, models, right) for key in common.CONDITIONS}, []
    for question, name, model in measured(found):
        cells = []
        for condition, share in model["accuracy"].items():
            cell = with_limits(share, found["q1"]["n_test"])
            if condition == "strongest":
                cell = with_error(share, model["strongest_images"])
            cells.append(f"**{cell}**" if name in best[condition] else cell)
        rows.append([plain(name), epochs(found, question, model), *cells])
    bold = "; bold: the best, and others within two standard errors" if any(best.values()) else ""
    caption = f"Table 1: accuracy on test{bold}."
    return table(caption, ["model", "epochs", *common.CONDITIONS.values()], rows)


def epochs(found, question, model):
    """How long a model was trained, with the epochs behind its first weights, such as 40 + 16."""
    metrics, said = found[question], []
    if "q2_sha256" in metrics and "q2" in found:
        said = [str(first["epoch_kept"]) for first in found["q2"]["models"].values()]
    elif metrics.get("init", "q2") != "scratch":
        said = ["?"]
    return " + ".join([*said, *([str(model["epoch_kept"])] if "recipe" in model else [])])


def best_under(condition, models, right):
    """The names of the best models under a condition: none where none is better than chance."""
    if len(models) == 1 or not models.keys() <= right.keys():
        return []
    images = {name: right[name][condition] for name in models}
    first = max(images, key=lambda name: images[name].mean())
    if not common.is_above_chance(images[first].mean(), len(images[first])):
        return []
    return [name for name in images if paired(images[first], images[name]).sign == 0]


def comparison(models, right):
    """Each model beside the first one on the same images, and the best under each condition."""
    missing = ", ".join(plain(name) for name in models if name not in right)
    if missing:
        return f"There is no table 2, since right.npz is missing for: {missing}."
    reference, *others = models
    if not others:
        return ""
    rows = [
        [
            plain(name),
            *(cell(paired(right[reference][key], right[name][key])) for key in common.CONDITIONS),
        ]
        for name in others
    ]
    caption = (
        f"Table 2: accuracy minus that of {plain(reference)} on the same images, in points; bold: "
        "beyond two standard errors of drawing test images."
    )
    return f"""{table(caption, ["model", *common.CONDITIONS.values()], rows)}

Between equal models, about one comparison in twenty is beyond two standard errors by chance; table
2 makes {len(others) * len(common.CONDITIONS)} comparisons. Another seed moves accuracies as well:
no difference that one run shows is an effect of the training before `make seeds` has shown it."""


def cell(difference):
    """A Difference as a cell of a table."""
    said = with_its_error(difference)
    return f"**{said}**" if difference.sign else said


def with_its_error(difference):
    """A Difference in points, with its standard error."""
    error = shown(difference.error, difference.points)
    return f"{shown(difference.points, difference.points)} ± {error[1:]}"


def autoattack_sentences(models, right):
    """AutoAttack, and beside it the strongest attack on the same images."""
    said = []
    for name, model in models.items():
        if "autoattack" in model:
            images = model["autoattack"]["images"]
            left = with_error(model["autoattack"]["right"] / images, images)
            said.append(f"{plain(name)} {left} on {images:,} test images")
            if name in right:
                share = right[name]["strongest"][:images].mean()
                said[-1] += f" (under table 1's *strongest* {common.percent(share)} on the same)"
    return f"Accuracy under AutoAttack (Croce & Hein 2020): {'; '.join(said)}." if said else ""


# ---- The questions -------------------------------------------------------------------------------
# Each section takes all metrics (by question) and which images each model got right (read_right).


def split_section(found, right):
    q1 = found["q1"]
    duplicates = q1["test_images_with_duplicate_in_train"]
    pooled = " (all 60,000 images are mixed before)" if q1["protocol"] == "pooled" else ""
    return f"""## Question 1: the split

Asked: a small part to train, the rest to validate and to test, classes in proportion. Done:
protocol {plain(q1["protocol"])}{pooled}, seed {q1["split_seed"]}, {q1["n_train"]:,} images to
train, {q1["n_val"]:,} to validate, {q1["n_test"]:,} to test. Figures 1 and 2 show their labels. For
cross-validation, parts with classes in proportion gave less biased estimates of accuracy, which
varied less (Kohavi 1995).

{figures("1", "2")}

Leakage: test images with a near duplicate in the training part, one whose pixels correlate by at
least {duplicates["near_means_correlation_from"]}: {duplicates["near"]}
({common.percent(duplicates["near"] / q1["n_test"])}). Among them, with an exact copy there:
{duplicates["exact"]}. CIFAR-10 is known for such pairs (Barz & Denzler 2020)."""


def training_section(found, right):
    q1, q2 = found["q1"], found["q2"]
    (model,) = q2["models"].values()
    chosen = "TrivialAugment, " if model["recipe"]["trivial_augment"] else ""
    rows = [
        [
            title,
            with_error(model[part]["accuracy"], q1[f"n_{part}"]),
            f"{model[part]['loss']:.3f}",
            common.percent(model[part]["ece"]),
        ]
        for title, part in (("validation", "val"), ("test", "test"))
    ]
    header = ["part", "accuracy", "cross-entropy", "calibration error (ECE)"]
    fitted, tested = model["history"][-1]["accuracy"], model["test"]["accuracy"]
    why = reasons(
        {
            "random labels": not q2["quick"]
            and unpaired(fitted, tested, q1["n_train"], q1["n_test"]).sign < 0
        }
    )
    return f"""## Question 2: cross-entropy

Asked: train ResNet-18 from random weights with cross-entropy. Done: {described(model)},
augmentation by {chosen}shifts, mirroring and cutout. Table 3 is the outcome.

{table("Table 3: the trained network on held-out images.", header, rows)}

{remarks(q2["models"])}

{figures("3", "4")}

In the last epoch it was right on {common.percent(fitted)} of the augmented training images (figures
3 and 4), and after that epoch on {common.percent(tested)} of the test images. {why}

Figure S2 shows which classes are taken for which.
{hardest_class(model["test"]["accuracy_per_class"], q1["n_test"])} Figure S3:
{calibration(model, q1["n_test"])}

{figures("S2", "S3")}

Figures 5 and 6 are maps of the 512 outputs of the convolutional part. In all maps, colours are true
classes. The maps show which images are neighbours, and so which classes touch. The size of an
island and its distance from another say little: UMAP keeps near neighbours together above all
(McInnes et al. 2018).

{figures("5", "6")}"""


def hardest_class(per_class, n_test):
    """The classes of the lowest and the highest accuracy, where classes differ at all."""
    images = n_test // len(common.CLASSES)
    if not classes_differ(per_class, images):
        return "Accuracies of the ten classes do not differ by more than chance (chi-square, 5 %)."
    low, high = min(per_class, key=per_class.get), max(per_class, key=per_class.get)
    return (
        "Accuracies of the ten classes differ (chi-square, 5 %): the lowest on test is that of "
        f"{plain(low)}, {with_error(per_class[low], images)}, the highest that of {plain(high)}, "
        f"{with_error(per_class[high], images)}."
    )


def calibration(model, n_test):
    """Whether the predicted probabilities are too high, too low or right on average."""
    gap = sum(
        share * (confidence - accuracy)
        for share, confidence, accuracy in model["test"]["reliability"]
    )
    near = max(0.01, 2 * common.standard_error(model["test"]["accuracy"], n_test))
    if abs(gap) < near:
        within = f"within {100 * near:.1f} points"
        return f"on average the probability of the predicted class matches the accuracy, {within}."
    points = f"{abs(100 * gap):.1f} points too {'high' if gap > 0 else 'low'} on average"
    if gap > 0:
        points += ", as in many networks (Guo et al. 2017)"
    elif model["recipe"].get("label_smoothing", 0) > 0:
        points += ", and label smoothing lowers it (Müller et al. 2019)"
    return f"the probability of the predicted class is {points}."


def attack_section(found, right):
    q3, smoothing = found["q3"], 0
    ((name, model),) = q3["models"].items()
    of_model = right.get(name)
    rows = [[plain(part), common.percent(share)] for part, share in model["by_part"].items()]
    rows.append(["all three", common.percent(model["accuracy"]["perturbed"])])
    sound = not (q3["quick"] or model["warnings"])
    causes = {"perturbed": "Perturbation", "fgm": "FGM", "perturbed_fgm": "Their combination"}
    effects, steps, milder = "", Difference(0, 0, 0), False
    if of_model:
        effects = " ".join(
            effect(cause, paired(of_model["clean"], of_model[condition]))
            for condition, cause in causes.items()
        )
        steps = paired(of_model["fgm"], of_model["pgd"])
        milder = (
            paired(of_model["clean"], of_model["perturbed"]).sign < 0
            and paired(of_model["perturbed"], of_model["fgm"]).sign < 0
        )
    if "q2" in found:
        smoothing = found["q2"]["models"][name]["recipe"].get("label_smoothing", 0)
    far = sound and steps.sign < 0 and steps.points < -10
    why = reasons(
        {
            "features": sound and direction_counts(model) == "most",
            "linear": sound and steps.sign < 0,
            "far": far,
            "smoothing": far and smoothing > 0,
            "blind": sound and milder,
        }
    )
    return f"""## Question 3: perturbation and attack

Asked: perturb unseen images, attack with the Fast Gradient Method, compare. Done: colour jitter,
rotation up to 5 degrees and ten pixels with one channel at full; FGM on the model of question 2.
Figure 7 has examples, table 1 the numbers. {effects}

{figures("7")}

{table("Table 4: each part of the perturbation alone.", ["part", "accuracy"], rows)}

{costliest_part(model, found["q1"]["n_test"])} {attack_sentences(q3, model, of_model)}

{remarks(q3["models"])}

{why}

Figure S4 shows accuracy over epsilon (on {model["by_eps"]["images"]:,} test images), figure S5 over
PGD's steps.

{figures("S4", "S5")}

In figure 8 a dot among dots of another colour is an image in the neighbourhood of a wrong class.
Images that are misclassified without any change lie there, too. The map cannot show how small a
change brought an image there.

{figures("8")}"""


def costliest_part(model, images):
    """Which part of the perturbation costs most, where one does."""
    clean, by_part = model["accuracy"]["clean"], model["by_part"]
    worst, second, *_ = sorted(by_part, key=by_part.get)
    loss = unpaired(clean, by_part[worst], images, images)
    if loss.sign < 0 and unpaired(by_part[second], by_part[worst], images, images).sign < 0:
        return f"Of the parts in table 4 {plain(worst)} costs most, {-loss.points:.1f} points."
    return "Table 4 does not show that one part costs more than the others."


def direction_counts(model):
    """How FGM's change compares with noise of its size: a key of the sentences about that."""
    checks, clean = model["checks"], model["by_eps"]["fgm"][0]
    found = unpaired(checks["noise"], checks["fgm"], checks["images"], checks["images"])
    if found.sign < 0:
        most = checks["noise"] - checks["fgm"] > clean - checks["noise"]
        return "most" if most else "some"
    return "less" if found.sign > 0 else "none"


def attack_sentences(metrics, model, of_model):
    """What noise, more steps, another loss and rounding do beside FGM, as the numbers allow.

    of_model: dict from condition to which images are right, or None where that is not known.
    """
    checks, images, shares = model["checks"], model["checks"]["images"], model["accuracy"]
    value = {key: common.percent(checks[key]) for key in checks if key != "images"}
    l2 = {key: common.percent(share) for key, share in model["accuracy_l2"].items()}
    count = model["strongest_images"]
    strongest = with_error(shares["strongest"], count)
    direction = {
        "most": "what FGM costs is due more to its direction than to its size.",
        "some": "FGM's direction costs more than a random one of the same size.",
        "none": "a difference within two standard errors.",
        "less": "noise is the stronger, so that the gradient says little here.",
    }[direction_counts(model)]
    steps, same = "", ""
    if of_model:
        steps = effect("PGD-20 in place of FGM", paired(of_model["fgm"], of_model["pgd"]))
        same = f" (under PGD-20 alone {common.percent(of_model['pgd'][:count].mean())})"
    rounding = "All was computed in float32."
    if metrics["precision"] != "float32":
        rounding = (
            f"Rounding: on {images:,} images accuracy under FGM is {value['fgm']} as measured and "
            f"{value['fgm_float32']} with a network in float32, under PGD-20 {value['pgd']} and "
            f"{value['pgd_float32']}."
        )
    return f"""On {images:,} test images accuracy is {value["noise"]} under random noise of FGM's
size, and {value["fgm"]} under FGM: {direction} On all test images it is
{common.percent(shares["pgd"])} under PGD-20. {steps} On {count:,} test images it is {strongest}
under the strongest attack{same}. In L2 with epsilon {common.EPSILON["l2"]:g} it is {l2["fgm"]}
under FGM, and {l2["perturbed_fgm"]} where perturbed images are attacked so. {rounding}"""


def adversarial_section(found, right):
    q4 = found["q4"]
    (without, plain_model), (attacked, robust) = q4["models"].items()
    helps = attack_training_helps(found, right)
    whole = robust["epoch_kept"] == robust["recipe"]["epochs"]
    why = reasons(
        {
            "loop": helps,
            "trade-off": helps
            and whole
            and paired(right[without]["clean"], right[attacked]["clean"]).sign < 0,
        }
    )
    noise = robust["recipe"]["noise"]
    attack = f"""N-FGSM (de Jorge et al. 2022) with uniform noise of up to {noise:g} times epsilon.
Noise is meant to prevent catastrophic overfitting"""
    if noise == 0:
        attack = "plain FGM, without noise"
    trainings = "\n\n".join(
        f"Validation, {plain(name)}: {overfitting(model, q4['n_val_pgd'])}"
        for name, model in q4["models"].items()
    )
    shown = "\n\n".join(
        figures("9", "10", "11", "12", name=f", {plain(name)}", file=Path(model["file"]).stem)
        for name, model in q4["models"].items()
    )
    return f"""## Question 4: training on perturbed and attacked data

Asked: train on data perturbed as in question 3, without and with FGM in the loop. Done: model
{plain(without)}: {described(plain_model)}; model {plain(attacked)}: {described(robust)}. First
weights: {plain(q4["init"])}; augmentation by shifts and mirroring, before the perturbation. The
attack in the loop is {attack}. Table 1 has the numbers.

{against(attacked, without, right, ("clean", "perturbed_fgm", "pgd"))}

{trainings}

The attacks on {plain(attacked)}: {attack_sentences(q4, robust, right.get(attacked))}

{remarks(q4["models"])}

{why}

Figures 9 and 10 show the trainings, figures 11 and 12 the maps.

{shown}"""


def against(name, reference, right, conditions):
    """A model beside another on the same images, in a sentence that says what one run cannot."""
    if not {name, reference} <= right.keys():
        return ""
    said = []
    for condition in conditions:
        difference = paired(right[reference][condition], right[name][condition])
        within = "" if difference.sign else ", within two standard errors"
        points = with_its_error(difference)
        said.append(f"{points} points ({common.CONDITIONS[condition]}{within})")
    return (
        f"On the same test images {plain(name)} differs from {plain(reference)} by "
        f"{', '.join(said)}; another seed moves accuracies as well, so that only `make seeds` can "
        "show an effect of the training."
    )


def attack_training_helps(found, right):
    """Whether FGM in the loop, and hardly the perturbation alone, goes with accuracy under PGD."""
    q4, reference = found["q4"], common.CROSS_ENTROPY
    (without, _), (attacked, robust) = q4["models"].items()
    if q4["quick"] or q4["init"] != "q2" or robust["warnings"]:
        return False
    if not {reference, without, attacked} <= right.keys():
        return False
    if not is_of_use(*(robust["accuracy"][key] for key in ("clean", "pgd", "strongest"))):
        return False
    for condition in ("pgd", "strongest"):
        alone, attack = (
            paired(right[reference][condition], right[name][condition])
            for name in (without, attacked)
        )
        if attack.sign <= 0 or alone.points > attack.points / 10:
            return False
    return True


def overfitting(model, images):
    """What accuracy under PGD on validation tells of a training."""
    history, kept = model["history"], model["epoch_kept"]
    best, last = (
        with_error(share, images)
        for share in (max(epoch["val_pgd"] for epoch in history), history[-1]["val_pgd"])
    )
    measure = f"accuracy under PGD-20 on {images} perturbed validation images"
    if kept == len(history):
        fitted, val = (common.percent(history[-1][key]) for key in ("accuracy", "val_accuracy"))
        return (
            f"the last epoch was right on {fitted} of the training images as trained on, and left "
            f"{val} on perturbed validation images; {measure} was {last}, {best} at best."
        )
    return (
        f"training was stopped after epoch {len(history)}: {measure} was {last}, less than half of "
        f"the {best} of epoch {kept}. The weights are those of that epoch, chosen on validation."
    )


def angular_section(found, right):
    q6, n_val = found["q6"], found["q1"]["n_val"]
    ((name, model),) = q6["models"].items()
    before, after = model["val"]["accuracy_before_training"], model["val"]["accuracy"]
    reference = common.CROSS_ENTROPY
    no_better = unpaired(before, after, n_val, n_val).sign <= 0 and after > before - 0.05
    comparable = {name, reference} <= right.keys() and not q6["quick"]
    fooled = is_of_use(model["accuracy"]["clean"]) and not is_of_use(model["accuracy"]["pgd"])
    why = reasons(
        {
            "together": not q6["quick"] and no_better and is_of_use(before),
            "vote": comparable
            and fooled
            and paired(right[reference]["pgd"], right[name]["pgd"]).sign <= 0,
        }
    )
    names = {
        "precision_at_1": "precision at 1",
        "r_precision": "R-precision",
        "mean_average_precision_at_r": "mean average precision at R",
    }
    rows = [[names[key], f"{value:.4f}"] for key, value in model["retrieval"].items()]
    caption = "Table 5: training images as neighbours of test images (Musgrave et al. 2020)."
    return f"""## Question 6: the angular loss in training

Asked: the same with the angular loss and a pretrained ResNet-18, on clean data only. Done:
{described(model)}; first weights: {plain(q6["init"])}. The class of an image is a vote of its
{model["neighbours"]} nearest training embeddings. On validation the vote is right on
{common.percent(before)} with the first weights and a random last layer, and on
{common.percent(after)} after training. Table 1 has the numbers on test.

{against(name, reference, right, ("clean", "pgd"))}

A vote has no gradient. The attacks raise the loss of a soft vote, as in ASK (Wang et al. 2021), and
count where the vote itself is wrong. {attack_sentences(q6, model, right.get(name))}

{remarks(q6["models"])}

{why}

Figure 13 shows the training, table 5 how well neighbours are ranked, figures 14 to 16 maps and
examples.

{table(caption, ["measure", "test"], rows)}

{figures("13", "13, continued", "14", "15", "16")}"""


# ---- Where the numbers come from -----------------------------------------------------------------


def described(model):
    """A model's training in words."""
    recipe, done = model["recipe"], len(model["history"])
    number = str(done) if done == recipe["epochs"] else f"{done} of {recipe['epochs']}"
    optimizer = {"sgd": "SGD with Nesterov momentum", "adamw": "AdamW"}[recipe["optimizer"]]
    stem, precision, device = (plain(recipe[key]) for key in ("stem", "precision", "device"))
    return (
        f"epochs: {number}, batch {recipe['batch_size']}, {optimizer}, one-cycle learning rate up "
        f"to {recipe['lr']:g}, stem {stem}, {precision} on {device}"
    )


def origin_section(found):
    """Machine, precision, commit and time behind each number, and the recipes in full."""
    columns = {
        "question": lambda metrics: metrics["question"],
        "seed": lambda metrics: metrics.get("seed", metrics.get("split_seed")),
        "precision": lambda metrics: metrics["precision"],
        "commit": lambda metrics: shortened(metrics["git_commit"]),
        "torch": lambda metrics: metrics["versions"]["torch"],
        "minutes": lambda metrics: f"{minutes(metrics):.1f}",
        "memory, MiB": lambda metrics: " + GPU ".join(
            str(metrics[key])
            for key in ("peak_memory_mib", "peak_gpu_memory_mib")
            if metrics.get(key) is not None
        ),
    }
    runs = [[plain(column(metrics)) for column in columns.values()] for metrics in found.values()]
    machines = {}
    for question, metrics in found.items():
        machine = plain(f"{metrics['device']} ({metrics['hardware']})")
        machines.setdefault(machine, []).append(question)
    machines = "; ".join(f"{', '.join(run)} on {machine}" for machine, run in machines.items())
    recipes = {
        plain(name): {
            **model["recipe"],
            **model["recipe"].get("perturbation", {}),
            "trained by commit": shortened(model["git_commit"]),
        }
        for metrics in found.values()
        for name, model in metrics.get("models", {}).items()
        if "recipe" in model
    }
    hidden = {"split_sha256", "first_weights", "perturbation"}  # hashes, and what has own rows
    settings = dict.fromkeys(key for recipe in recipes.values() for key in recipe)  # in order
    rows = [
        [plain(key), *(plain(recipe.get(key, "")) for recipe in recipes.values())]
        for key in settings
        if key not in hidden
    ]
    caption = "Table 7: the recipe of each training."
    return f"""## How these results were made

Table 6 tells how each question was run{", table 7 how each model was trained" if recipes else ""}.
Machines: {machines}. SHA-256 of the split: {plain(found["q1"]["split_sha256"])}

{table("Table 6: the run of each question.", list(columns), runs)}

{table(caption, ["setting", *recipes], rows) if recipes else ""}"""


def shortened(commit):
    """Ten of a commit's digits, and its mark if files were changed."""
    return commit[:10] + commit[40:]


def minutes(metrics):
    """Of a question's stages and trainings."""
    trainings = [model.get("training_seconds", 0) for model in metrics.get("models", {}).values()]
    return sum([*metrics["seconds"].values(), *trainings]) / 60


# ---- The page ------------------------------------------------------------------------------------

STYLE = """
html { font: 17px/1.5 Charter, "Bitstream Charter", Cambria, Georgia, serif; color: #1a1a1a }
body { max-width: 44rem; margin: 3rem auto; padding: 0 1rem; overflow-wrap: break-word }
h1, h2, h3, h4 { line-height: 1.25; break-after: avoid }
h1 { font-size: 1.55rem; margin-bottom: .3rem }
h2 { font-size: 1.35rem; margin-top: 2.2rem }
h3, h4 { font-size: 1.08rem }
a { color: #1a4b8c; text-decoration: none }
blockquote { margin: 0; text-align: center; font-weight: bold; color: #a00 }
figure { display: inline-block; width: 48.5%; margin: .8rem .5%; vertical-align: top }
figure:has(.wide) { width: 99% }
img { display: block; max-width: 100%; margin: auto }
figcaption, .caption, table { font-size: .85rem; line-height: 1.35 }
figcaption, .caption { color: #555 }
.caption { margin: 1.5rem 0 .4rem; break-after: avoid }
figcaption em, .caption em { font-style: normal }
.scroll { overflow: auto hidden }
table { border-collapse: collapse; border: solid #1a1a1a; border-width: 1.5px 0 }
thead { border-bottom: 1px solid #1a1a1a }
th, td { padding: .15rem .5rem; text-align: left; vertical-align: bottom }
td { white-space: nowrap }
code { font-size: .85em }
pre { overflow-x: auto; line-height: 1.4 }
pre, tr, figure, .scroll, .block { break-inside: avoid }
@media (max-width: 40rem) { figure { width: 99% } p, ul, ol { overflow: auto hidden } }
@media print {
  @page { size: A4; margin: 15mm }
  html { font-size: 10pt; line-height: 1.35 }
  body { margin: 0; padding: 0; max-width: none }
  p, ul, ol, figure { margin-top: .5em; margin-bottom: .5em }
  img { max-height: 5.2cm }
  .scroll { overflow: visible }
  pre { white-space: pre-wrap }
  blockquote { position: fixed; top: 0; right: 0; writing-mode: vertical-rl; font-size: 8pt }
  body:has(blockquote) { padding-right: 8mm }
}
"""
WIDE = 1100  # pixels from which on a figure takes the whole width


class Page(mistune.HTMLRenderer):
    """The report as HTML: figures inside it, formulas as MathML, captions that can be styled.

    results: the folder that holds the figures; hashes: dict from a figure's path in it to SHA-256.
    """

    def __init__(self, results, hashes):
        super().__init__(escape=True)
        self.results, self.hashes = results, hashes

    def image(self, text, url, title=None):
        path = self.results / url
        with common.opened(path) as file:
            content = file.read()
        if common.sha256(content) != self.hashes.get(url):
            raise common.UserError(
                f"{path} is a figure of another run than metrics.json; make both again with: "
                + common.command_for(path)
            )
        (width,) = struct.unpack(">I", content[16:20])  # of a PNG
        wide = " class='wide'" if width > WIDE else ""
        data = base64.b64encode(content).decode()
        return f"<img{wide} src='data:image/png;base64,{data}' alt='{text}'>"

    def paragraph(self, text):
        if text.startswith("<img"):
            image, _, caption = text.partition("<br />\n")
            return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"
        kind = " class='caption'" if text.startswith("<em>Table ") else ""
        return f"<p{kind}>{text}</p>\n"

    def heading(self, text, level, **attributes):
        return f"<h{level} id='{anchor(text)}'>{text}</h{level}>\n"

    def table(self, text):
        return f"<div class='scroll'><table>{text}</table></div>\n"

    def inline_math(self, text):
        return mathml(text)

    def block_math(self, text):
        return f"<div class='scroll block'>{mathml(text, display='block')}</div>\n"


def rendered(text, results, hashes):
    """Markdown as one HTML page with the figures inside.

    hashes: dict from a figure's path in the results folder to its SHA-256. Raises UserError for a
    figure that is missing or of another run.
    """
    render = mistune.create_markdown(renderer=Page(results, hashes), plugins=["table", "math"])
    return (
        "<!DOCTYPE html>\n<html lang='en'><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{TITLE}</title><style>{STYLE}</style>\n<body>\n{render(text)}</body></html>\n"
    )


if __name__ == "__main__":
    common.run(main)
