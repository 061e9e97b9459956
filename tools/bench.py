"""Ours and the usual way side by side, on this machine: `make bench DATA=path`, under ten minutes
on two cores.

Every row alternates ours and the peer and takes the median of ROUNDS runs. Sizes are cut to fit
the time, and each row says which; ratios are per image. Peers are in tests/requirements-peers.txt.
Nothing else should be running."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision import datasets, transforms

import common
import q2_train_ce

ROUNDS = 5
BATCH = 64  # question 2's
STEM = "stride2"
PRECISIONS = list(
    dict.fromkeys([common.best_precision("cpu"), "float32"])
)  # the scripts use the first


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument(
        "--results", type=Path, default=Path("results"), help="where peak memory is looked up"
    )
    args = parser.parse_args()
    images, labels = common.load_cifar10(args.data)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS}\n")
    print("| what | ours | peer | ratio | at least |")
    print("|---|---|---|---|---|")
    bench_training(args.data, images, labels)
    bench_perturbation(images)
    bench_attacks(images, labels)
    bench_knn()
    bench_evaluation(images)
    bench_startup()
    report_memory(args.results)


def seconds_of(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def alternate(*functions):
    """Median seconds of each function, run in turn after one round to warm up."""
    for function in functions:
        function()
    rounds = [[seconds_of(function) for function in functions] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def row(what, ours, peer, ratio, at_least):
    print(f"| {what} | {ours} | {peer} | {ratio} | {at_least} |", flush=True)


def bound(precision, at_least):
    """What a row should reach: only the precision that the scripts use has to."""
    return at_least if precision == PRECISIONS[0] else ""


def augmented(images, generator):
    """Question 2's training images."""
    return q2_train_ce.cut_out(
        common.crop_and_flip(common.as_float(images), generator), q2_train_ce.CUTOUT, generator
    )


def bench_training(root, images, labels):
    """An epoch over 1,024 images: our loop's step against the usual DataLoader loop, same network
    and optimiser."""
    steps = 16
    number = steps * BATCH
    images, labels = images[:number], labels[:number]
    model = common.resnet18(10, STEM).train()
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )

    def our_epoch(precision):
        generator = torch.Generator().manual_seed(0)
        model.precision = precision
        for indices in common.shuffled_batches(labels, BATCH, generator):
            F.cross_entropy(
                model(augmented(images[indices], generator)), labels[indices]
            ).backward()
            optimizer.step()
            optimizer.zero_grad()

    usual = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(common.CIFAR10_MEAN, common.CIFAR10_STD),
        ]
    )
    dataset = torch.utils.data.Subset(datasets.CIFAR10(root, transform=usual), range(number))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=2)
    plain = usual_network().train()
    plain_optimizer = torch.optim.SGD(
        plain.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    )

    def usual_epoch():
        for batch, target in loader:
            plain_optimizer.zero_grad()
            F.cross_entropy(plain(batch), target).backward()
            plain_optimizer.step()

    *ours, peer = alternate(
        *(lambda precision=precision: our_epoch(precision) for precision in PRECISIONS), usual_epoch
    )
    flops = 3 * forward_flops(model, images[:1])
    left, right = torch.rand(2, 2048, 2048)
    limit = 2 * 2048**3 / alternate(lambda: left @ right)[0]
    for precision, seconds in zip(PRECISIONS, ours, strict=True):
        row(
            f"training, images/s, stem {STEM}, {precision}",
            f"{number / seconds:.0f}",
            f"{number / peer:.0f}",
            f"{peer / seconds:.2f}x",
            bound(precision, "1.5x"),
        )
        row(
            f"the same in GFLOP/s against a 2048^3 float32 product, {precision}",
            f"{flops * number / seconds / 1e9:.0f}",
            f"{limit / 1e9:.0f}",
            f"{flops * number / seconds / limit:.0%}",
            bound(precision, "50%"),
        )

    generator = torch.Generator().manual_seed(0)
    (augment,) = alternate(lambda: [augmented(images[:BATCH], generator) for _ in range(steps)])
    row(
        "augmentation as a share of training",
        f"{augment / steps * 1e3:.2f} ms/step",
        f"{ours[0] / steps * 1e3:.0f} ms/step",
        f"{augment / ours[0]:.1%}",
        "under 3%",
    )


def usual_network():
    """The same network with PyTorch's own convolutions throughout, channels first, for normalised
    images."""
    backbone = torchvision.models.resnet18(num_classes=10)
    backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=2, padding=1, bias=False)
    backbone.maxpool = nn.Identity()
    return backbone


def forward_flops(model, image):
    """Floating-point operations of the forward pass of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        common.frozen(model)(common.as_float(image))
    return counter.get_total_flops()


def bench_perturbation(images):
    """12,000 images by us, 1,000 by the loop, per image."""
    jitter, rotation = (
        transforms.ColorJitter(*common.JITTER.values()),
        transforms.RandomRotation(common.MAX_ROTATION),
    )
    ours_images, loop_images = common.as_float(images[:12_000]), common.as_float(images[:1_000])

    def per_image_loop():
        for image in loop_images:
            image = rotation(jitter(image))
            for pixel in np.random.choice(1024, common.NUM_PIXELS, replace=False):
                image[np.random.randint(3), pixel // 32, pixel % 32] = 1

    def ours():
        generator = torch.Generator().manual_seed(0)
        for batch in ours_images.split(common.EVALUATION_BATCH):
            common.perturb(batch, generator)

    our_seconds, loop_seconds = alternate(ours, per_image_loop)
    per_image, loop_per_image = our_seconds / 12_000, loop_seconds / 1_000
    row(
        "perturb, microseconds per image",
        f"{per_image * 1e6:.0f}",
        f"{loop_per_image * 1e6:.0f}",
        f"{loop_per_image / per_image:.1f}x",
        "20x",
    )


def bench_attacks(images, labels):
    """FGM on 500 images and PGD-20 on 25, for a model with random weights (the work does not depend
    on them)."""
    torch.manual_seed(0)
    model = common.resnet18(10, STEM).eval()
    ours = [common.frozen(model, precision) for precision in PRECISIONS]
    eps, step = common.EPSILON["linf"], common.PGD_STEP_SIZE
    for title, number, at_least, attack, theirs in (
        (
            "FGM",
            500,
            "1.3x",
            lambda network, x, y: common.fgm(network, x, y, eps),
            peer_fgm(model, eps),
        ),
        (
            "PGD-20",
            25,
            "1.2x",
            lambda network, x, y: common.pgd(network, x, y, eps, step, 20),
            peer_pgd(model, eps, step),
        ),
    ):
        x, y = common.as_float(images[:number]), labels[:number]
        seconds = alternate(
            *(partial(attack, network, x, y) for network in ours),
            *(partial(peer, x, y) for peer in theirs.values()),
        )
        for precision, our_seconds in zip(PRECISIONS, seconds, strict=True):
            for name, peer in zip(theirs, seconds[len(ours) :], strict=True):
                row(
                    f"{title}, images/s, {precision}, against {name}",
                    f"{number / our_seconds:.1f}",
                    f"{number / peer:.1f}",
                    f"{peer / our_seconds:.2f}x",
                    bound(precision, at_least),
                )


def art_classifier(model):
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1))


def peer_fgm(model, eps):
    """FGM of the peers as functions of images and labels."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import FastGradientMethod

    art_attack = FastGradientMethod(art_classifier(model), eps=eps, batch_size=500)
    foolbox_model = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    foolbox_attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    return {
        "ART": lambda x, y: art_attack.generate(x.numpy(), y.numpy()),
        "torchattacks": torchattacks.FGSM(model, eps=eps),
        "foolbox": lambda x, y: foolbox_attack(foolbox_model, x, y, epsilons=eps),
    }


def peer_pgd(model, eps, step):
    """PGD-20 of the peers as functions of images and labels."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    art_attack = ProjectedGradientDescentPyTorch(
        art_classifier(model), eps=eps, eps_step=step, max_iter=20, batch_size=500, verbose=False
    )
    foolbox_model = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    foolbox_attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=20, random_start=False)
    return {
        "ART": lambda x, y: art_attack.generate(x.numpy(), y.numpy()),
        "torchattacks": torchattacks.PGD(model, eps=eps, alpha=step, steps=20, random_start=False),
        "foolbox": lambda x, y: foolbox_attack(foolbox_model, x, y, epsilons=eps),
    }


def bench_knn():
    """The vote of 100 neighbours for 24,000 embeddings among 12,000, each of 128 numbers."""
    from sklearn.neighbors import KNeighborsClassifier

    torch.manual_seed(0)
    train, queries = (F.normalize(torch.randn(number, 128)) for number in (12_000, 24_000))
    labels = torch.randint(0, 10, (12_000,))
    peer = KNeighborsClassifier(100, algorithm="brute", n_jobs=2).fit(train.numpy(), labels.numpy())
    ours, theirs = alternate(
        lambda: common.knn_predict(train, labels, queries, 100),
        lambda: peer.predict(queries.numpy()),
    )
    row(
        "100-NN of 24,000 among 12,000, seconds, against scikit-learn",
        f"{ours:.2f}",
        f"{theirs:.2f}",
        f"{theirs / ours:.2f}x",
        "2x",
    )


def bench_evaluation(images):
    """1,000 images by us and by a plain loop over the same network."""
    images = common.as_float(images[:1_000])
    model = common.resnet18(10, STEM).eval()
    plain = usual_network().eval()

    def plain_loop():
        with torch.no_grad():
            for batch in images.split(BATCH):
                plain((batch - model.mean) / model.std).argmax(1)

    *ours, peer = alternate(
        *(
            lambda precision=precision: common.predict(common.frozen(model, precision), images)
            for precision in PRECISIONS
        ),
        plain_loop,
    )
    for precision, seconds in zip(PRECISIONS, ours, strict=True):
        row(
            f"evaluation, images/s, {precision}, against a plain loop",
            f"{1000 / seconds:.0f}",
            f"{1000 / peer:.0f}",
            f"{peer / seconds:.2f}x",
            bound(precision, "1.3x"),
        )


def bench_startup():
    """Seconds until --help is printed, against importing torch alone."""
    script = Path(common.__file__).with_name("q1_split.py")

    def start(*words):
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    ours, bare = alternate(
        lambda: start(str(script), "--help"), lambda: start("-c", "import torch")
    )
    row(
        "python q1_split.py --help, seconds, against import torch",
        f"{ours:.2f}",
        f"{bare:.2f}",
        f"{ours - bare:+.2f} s",
        "+0.3 s",
    )


def report_memory(results):
    """Peak memory as the scripts themselves noted it in their last run."""
    for path in sorted(results.glob("q*/metrics.json")):
        peak = json.loads(path.read_text())["peak_memory_mib"]
        row(f"peak memory of {path.parent.name} in {results}, MiB", peak, "", "", "3072")


if __name__ == "__main__":
    main()
