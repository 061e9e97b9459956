"""Mean and standard deviation of every model's accuracies over several seeds.

Reads   the metrics.json of questions 3, 4 and 6 in each results folder
Run     make seeds, or python -m tools.seeds FOLDER FOLDER...
"""

import statistics
import sys
from pathlib import Path

import common

IN_L2 = {"fgm": "FGM, L2", "perturbed_fgm": "perturbed + FGM, L2"}


def main():
    folders = [Path(name) for name in sys.argv[1:]]
    if len(folders) < 2:
        raise common.UserError("give two results folders or more, or let them be made: make seeds")
    runs = [accuracies_in(folder) for folder in folders]
    rows = [
        [name, *(mean_and_deviation([run[name][title] for run in runs]) for title in columns)]
        for name, columns in runs[0].items()
    ]
    title = f"Accuracy on test in %, mean and standard deviation over {len(folders)} seeds"
    common.print_table(title, ["model", *common.CONDITIONS.values(), *IN_L2.values()], rows)


def accuracies_in(folder):
    """What questions 3, 4 and 6 measured: dict from model to dict from column to accuracy."""
    accuracies = {}
    for question in ("q3", "q4", "q6"):
        for name, model in common.read_metrics(folder / question / "metrics.json")[
            "models"
        ].items():
            accuracies[name] = {
                **{title: model["accuracy"][key] for key, title in common.CONDITIONS.items()},
                **{title: model["accuracy_l2"][key] for key, title in IN_L2.items()},
            }
    return accuracies


def mean_and_deviation(shares):
    """[0.84, 0.86] as '85.00 ± 1.41'."""
    return f"{100 * statistics.mean(shares):.2f} ± {100 * statistics.stdev(shares):.2f}"


if __name__ == "__main__":
    common.run(main)
