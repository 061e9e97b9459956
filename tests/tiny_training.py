"""Question 2's training, with every augmentation, on 160 random images: a script to be killed by
the tests.

Run     python tests/tiny_training.py --results FOLDER
"""

import torch

import common
import helpers
import q2_train_ce

RECIPES = {
    stem: {"epochs": 4, "batch_size": 40, "lr": 0.05, "trivial_augment": True}
    for stem in common.STEMS
}


def main():
    torch.set_num_threads(2)
    parser = common.argument_parser(__doc__, RECIPES)
    parser.add_argument("--stem", choices=common.STEMS, default="imagenet")
    args = common.parse_arguments(parser)
    recipe = common.choose_recipe(
        args, RECIPES, args.stem, "tiny", {"sha256": "tiny"}, cutout=12, label_smoothing=0.1
    )
    q2_train_ce.train_classifier(
        helpers.tiny_data(), recipe, args.results / "training.pt", args.fresh
    )


if __name__ == "__main__":
    common.STATE_EVERY = 0  # its epochs are shorter than any that a user waits for
    common.run(main)
