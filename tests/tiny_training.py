"""Question 2's training, with every augmentation, on 160 random images: a script to be killed by the tests.

Run     python tests/tiny_training.py --results FOLDER
"""

import torch

import common
import helpers
import q2_train_ce


def main():
    torch.set_num_threads(2)
    parser = common.argument_parser(__doc__)
    common.add_training_flags(parser, epochs=4, batch_size=40, lr=0.05, stem="imagenet")
    parser.set_defaults(cutmix=True, trivial_augment=True)
    args = common.parse_arguments(parser)
    q2_train_ce.train_on_clean_images(helpers.tiny_data(), args, {"sha256": "tiny"}, args.results / "training.pt")


if __name__ == "__main__":
    common.run(main)
