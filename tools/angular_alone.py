"""The angular loss alone: from random weights, with question 2's epochs and augmentation.

Question 6 begins with question 2's weights. This is the comparison of the two losses on equal
terms, on validation images.

Reads   results/q1/split.npz, CIFAR-10
Writes  results/angular_alone: training.pt, model.pt
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
    parser = common.argument_parser(__doc__, RECIPES)
    parser.add_argument("--stem", choices=("auto", *common.STEMS), default="auto")
    args = common.parse_arguments(parser)
    folder = args.results / "angular_alone"
    split, data = common.load_data(args)
    recipe = common.choose_recipe(
        args,
        RECIPES,
        q2_train_ce.choose_stem(args),
        "q6",
        split,
        cutout=q2_train_ce.CUTOUT,
        alpha=q6_angular.ALPHA,
        embedding=q6_angular.EMBEDDING,
    )
    torch.manual_seed(args.seed)
    model = common.resnet18(q6_angular.EMBEDDING, recipe["stem"]).to(args.device)
    history = q6_angular.train_embedding(
        model, training_step, data, recipe, folder / "training.pt", args.fresh
    )
    origin = common.provenance(args, "q6", split)
    common.save_trained(folder, "model", model, history, recipe, origin)
    trained = common.frozen(model, args.precision)
    accuracy = q6_angular.validation_accuracy(trained, data)
    print(f"Accuracy on validation by the vote: {common.percent(accuracy)}")


def training_step(model, images, labels, generator, recipe):
    """Question 6's, after question 2's augmentation."""
    images = q2_train_ce.augmented(images, generator, recipe)
    return q6_angular.loss_and_correct(model, images, labels, recipe)


if __name__ == "__main__":
    common.run(main)
