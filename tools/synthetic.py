"""CIFAR-10's files with pictures that are drawn here, and a way to run a script on them.

torchvision takes their checksums for the published ones.

Run     python -m tools.synthetic FOLDER SCRIPT FLAGS...
"""

import hashlib
import itertools
import pickle
import runpy
import sys
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

# In levels of 255, of which FGM moves a value by 8: that changes a tint, but not a picture.
CONTRAST = 40  # by how much a picture's blocks are at most brighter or darker than grey
TINT = 9
SHOWN = 0.8  # share of the images that surely show their own class's picture


def main():
    _, root, *sys.argv = sys.argv
    for kind, files in published(root).items():
        setattr(CIFAR10, kind, files)
    runpy.run_path(sys.argv[0], run_name="__main__")


def write_synthetic_cifar10(root, per_file=10_000):
    """CIFAR-10's files under `root`: on each image noise, a coarse picture and a faint tint.

    The tint is that of the image's class; the picture is that of another class on every fifth image
    or so (after Tsipras et al. 2019). A model that is trained as usual goes by the tint, too, which
    FGM can change. One that is trained under FGM has to go by the picture.
    """
    rng = np.random.default_rng(0)
    blocks = rng.integers(-CONTRAST, CONTRAST + 1, (10, 3, 4, 4))
    pictures = blocks.repeat(8, axis=2).repeat(8, axis=3)
    tints = TINT * rng.permutation(list(itertools.product((-1, 0, 1), repeat=3)))[:10]
    looks = 128 + pictures[:, None] + tints[:, :, None, None]
    looks = looks.reshape(10, 10, 3072).astype(np.uint8)  # by the class of picture and of tint
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True, exist_ok=True)
    names = {CIFAR10.meta["key"]: [f"class {label}" for label in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(names, protocol=2))
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        labels = rng.permutation(np.arange(per_file) % 10)
        others = rng.integers(10, size=per_file)
        shown = np.where(rng.random(per_file) < SHOWN, labels, others)
        noise = np.frombuffer(rng.bytes(per_file * 3072), np.int8).reshape(per_file, 3072) // 4
        data = looks[shown, labels] + noise.view(np.uint8)  # modulo 256, so that bytes suffice
        content = {"labels": labels.tolist(), "data": data}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def published(root):
    """What torchvision's CIFAR10 would say of the files in `root`: dict from its attributes.

    `train_list`, `test_list` and `meta` are names with the MD5 of the files.
    """

    def md5(name):
        return hashlib.md5((Path(root) / CIFAR10.base_folder / name).read_bytes()).hexdigest()

    lists = {
        kind: [[name, md5(name)] for name, _ in getattr(CIFAR10, kind)]
        for kind in ("train_list", "test_list")
    }
    return {**lists, "meta": {**CIFAR10.meta, "md5": md5(CIFAR10.meta["filename"])}}


if __name__ == "__main__":
    main()
