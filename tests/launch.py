"""Run a script on synthetic CIFAR-10 files, whose checksums torchvision then takes for the
published.

Run     python tests/launch.py FOLDER SCRIPT FLAGS...
"""

import hashlib
import runpy
import sys
from pathlib import Path


def accept(root):
    """The lists of names and MD5 that torchvision.datasets.CIFAR10 would have for the files in
    `root`."""
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
    from torchvision.datasets import CIFAR10

    _, root, *sys.argv = sys.argv
    for kind, names in accept(root).items():
        setattr(CIFAR10, kind, names)
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
