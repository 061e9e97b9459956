"""The angular loss alone: from random weights, with question 2's epochs and augmentation.

Question 6 begins with question 2's weights. This is the comparison of the two losses on equal
terms, on validation images.

Reads   results/q1/split.npz, CIFAR-10
Writes  results/angular_alone: model.pt and the state of its training
Run     python -m tools.angular_alone --stem stride2
"""

import torch

import common
import q2_train_ce
import q6_angular

RECIPES = {  # the rate: the best of 0.03, 0.1, 0.3 and 1 after 8 epochs of stride2, on validation
    stem: {**row, "batch_size": q6_angular.RECIPES[stem]["batch_size"], "lr": 0.3}
    for stem, row in q2_train_ce.RECIPES.items()
}


def main():
    args = common.parse_arguments(parser())
    path = args.results / "angular_alone" / "model.pt"
    split, data = common.load_data(args)
    stem = q2_train_ce.choose_stem(args)
    origin = common.provenance(args, "q6", split, seed=args.seed, stem=stem)
    constants = {"alpha": q6_angular.ALPHA, "embedding": q6_angular.EMBEDDING}
    constants["cutout"] = q2_train_ce.CUTOUT
    recipe = common.choose_recipe(args, RECIPES, stem, "q6", split, **constants)

    torch.manual_seed(args.seed)
    model = common.resnet18(q6_angular.EMBEDDING, stem).to(args.device)
    training = q6_angular.train_embedding(
        model, training_step, data, recipe, origin, path, args.fresh
    )
    common.save_trained(path, model, training)
    trained = common.frozen(model, args.precision)
    train = q6_angular.embed(trained, common.as_float(data["train"][0]))
    accuracy = q6_angular.validation_accuracy(trained, train, data)
    print(f"Accuracy on validation by the vote: {common.percent(accuracy)}")


def parser():
    """This tool's flags."""
    flags = common.training_parser(__doc__, RECIPES)
    flags.add_argument("--stem", choices=("auto", *common.STEMS), default="auto")
    return flags


def training_step(model, images, labels, generator, recipe):
    """Question 6's, after question 2's augmentation."""
    images = q2_train_ce.augmented(images, generator, recipe)
    return q6_angular.loss_and_correct(model, images, labels, recipe)


if __name__ == "__main__":
    common.run(main)
