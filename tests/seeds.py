"""Mean and standard deviation of every model's accuracies over several seeds: make seeds.

Run     python tests/seeds.py FOLDER FOLDER...
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402  (it lies one folder up)


def main():
    folders = [Path(name) for name in sys.argv[1:]]
    print(f"Accuracy on test: mean and standard deviation over {len(folders)} seeds")
    for question in ("q2", "q3", "q4", "q6"):
        runs = [
            common.read_metrics(folder / question / "metrics.json", "make seeds")["models"]
            for folder in folders
        ]
        for name, model in runs[0].items():
            for condition in model["accuracy"]:
                shares = [run[name]["accuracy"][condition] for run in runs]
                mean, spread = 100 * statistics.mean(shares), 100 * statistics.stdev(shares)
                print(f"{name}, {condition}: {mean:.2f} ± {spread:.2f} %")


if __name__ == "__main__":
    common.run(main)
