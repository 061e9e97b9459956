"""Question 2's training, with every augmentation, on 80 random images: to be killed by tests.

Run     python tests/tiny_training.py --results FOLDER
"""

import torch

import common
import helpers
import q2_train_ce

ROW = {"epochs": 3, "batch_size": 40, "lr": 0.05, "trivial_augment": True}
RECIPES = dict.fromkeys(common.STEMS, ROW)


def main():
    torch.set_num_threads(2)
    parser = common.training_parser(__doc__, RECIPES)
    parser.add_argument("--stem", choices=common.STEMS, default="imagenet")
    args = common.parse_arguments(parser)
    constants = {"cutout": 12, "label_smoothing": 0.1}
    split = {"sha256": "tiny"}
    recipe = common.choose_recipe(args, RECIPES, args.stem, "tiny", split, **constants)
    path = args.results / "model.pt"
    data, origin = helpers.tiny_data(), helpers.tiny_origin()
    q2_train_ce.train_classifier(data, recipe, origin, path, args.fresh)


if __name__ == "__main__":
    common.STATE_EVERY = 0  # its epochs are shorter than any that a user waits for
    common.run(main)
