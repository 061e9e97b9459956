"""CIFAR-10's files with pictures that are drawn here, and a way to run a script on them.

torchvision takes their checksums for the published ones.

Run     python -m tools.synthetic FOLDER SCRIPT FLAGS...
"""

import hashlib
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np


def main():
    from torchvision.datasets import CIFAR10

    _, root, *sys.argv = sys.argv
    for kind, names in published(root).items():
        setattr(CIFAR10, kind, names)
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


def write_synthetic_cifar10(root, per_file=10_000, contrast=16):
    """CIFAR-10's files under `root`: noise and over it, faintly, a coarse picture per class."""
    rng = np.random.default_rng(0)
    pictures = np.kron(
        rng.integers(-contrast, contrast + 1, (10, 3, 4, 4), np.int16), np.ones((8, 8), np.int16)
    ).reshape(10, 3072)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    batches = {f"data_batch_{number}": f"training batch {number} of 5" for number in range(1, 6)}
    for name, title in {**batches, "test_batch": "testing batch 1 of 1"}.items():
        labels = rng.permutation(np.arange(per_file) % 10)
        noise = (
            np.frombuffer(rng.bytes(per_file * 3072), np.uint8).reshape(per_file, 3072) // 2 + 64
        )
        content = {
            "batch_label": title,
            "labels": labels.tolist(),
            "data": (noise + pictures[labels]).astype(np.uint8),
            "filenames": [f"synthetic_{number:05}.png" for number in range(per_file)],
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def published(root):
    """The lists of names and MD5 that torchvision's CIFAR10 would have for the files in `root`."""
    from torchvision.datasets import CIFAR10

    folder = Path(root) / CIFAR10.base_folder
    return {
        kind: [
            [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
            for name, _ in getattr(CIFAR10, kind)
        ]
        for kind in ("train_list", "test_list")
    }


if __name__ == "__main__":
    main()
