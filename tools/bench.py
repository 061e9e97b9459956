"""Ours and the usual way side by side, on this machine's processor: under ten minutes on two cores.

Every row alternates ours and the peer and takes the median of ROUNDS runs. Sizes are cut to fit
the time, and each row says which; ratios are per image. Peers are in tests/requirements-peers.txt.
Nothing else should be running.

Reads   CIFAR-10; for peak memory the metrics.json of a results folder
Run     make bench DATA=path, or python -m tools.bench --data path
"""

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
import q6_angular

ROUNDS = 5
BATCH = 64  # question 2's
STEM = "stride2"
EPS, STEP_SIZE, STEPS = common.EPSILON["linf"], common.PGD_STEP_SIZE, common.PGD_STEPS


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_args()
    images, labels = common.load_cifar10(args.data)
    # The scripts use the first of them.
    precisions = list(dict.fromkeys([common.best_precision("cpu"), "float32"]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS}\n")
    print("| what | ours | peer | ratio | at least |")
    print("|---|---|---|---|---|")
    bench_training(args.data, images, labels, precisions)
    bench_perturbation(images)
    bench_attack("FGM", our_fgm, peer_fgm, images[:500], labels[:500], precisions, "1.3x")
    bench_attack("PGD-20", our_pgd, peer_pgd, images[:25], labels[:25], precisions, "1.2x")
    bench_knn()
    bench_evaluation(images, precisions)
    bench_startup()
    report_memory(args.results)


def alternate(*functions):
    """Median seconds of each function, run in turn after one round to warm up."""
    for function in functions:
        function()
    rounds = [[seconds_of(function) for function in functions] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def seconds_of(function):
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def print_row(*cells):
    """What, ours, peer, ratio, and what the ratio should reach."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def print_rates(what, images, ours, peer, at_least):
    """A row per precision in images a second; only the first precision has to reach `at_least`.

    ours: dict from precision to seconds; peer: seconds.
    """
    for precision, seconds in ours.items():
        rates = f"{images / seconds:.1f}", f"{images / peer:.1f}"
        print_row(f"{what}, images/s, {precision}", *rates, f"{peer / seconds:.2f}x", at_least)
        at_least = ""


# ---- Training -----------------------------------------------------------------------------------


def bench_training(root, images, labels, precisions):
    """An epoch over 1,024 images: our step against the usual DataLoader loop, same network."""
    images, labels = images[: 16 * BATCH], labels[: 16 * BATCH]
    model, generator = common.resnet18(10, STEM).train(), torch.Generator().manual_seed(0)
    optimizer = sgd(model)
    loader, usual, usual_optimizer = usual_training(root, len(images))

    def our_epoch(precision):
        model.precision = precision
        for batch in common.shuffled_batches(labels, BATCH, generator):
            logits = model(augmented(images[batch], generator))
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def usual_epoch():
        for batch, target in loader:
            usual_optimizer.zero_grad()
            F.cross_entropy(usual(batch), target).backward()
            usual_optimizer.step()

    *seconds, peer = alternate(*(partial(our_epoch, each) for each in precisions), usual_epoch)
    ours = dict(zip(precisions, seconds, strict=True))
    print_rates(f"training, stem {STEM}", len(images), ours, peer, "1.5x")
    print_speed(3 * len(images) * forward_flops(model, images[:1]), ours)
    (augment,) = alternate(lambda: [augmented(each, generator) for each in images.split(BATCH)])
    shown = [f"{1e3 * each / 16:.2f} ms/step" for each in (augment, seconds[0])]
    share = f"{augment / seconds[0]:.1%}"
    print_row("augmentation as a share of training", *shown, share, "under 3%")


def sgd(model, **options):
    return torch.optim.SGD(
        model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, **options
    )


def augmented(images, generator):
    """uint8 images as question 2 trains on them."""
    images = common.crop_and_flip(common.as_float(images), generator)
    return q2_train_ce.cut_out(images, q2_train_ce.CUTOUT, generator)


def usual_training(root, images):
    """A DataLoader of the first so many images, the network, and its optimiser."""
    change = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(common.CIFAR10_MEAN, common.CIFAR10_STD),
        ]
    )
    dataset = torch.utils.data.Subset(datasets.CIFAR10(root, transform=change), range(images))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=2)
    model = usual_network().train()
    return loader, model, sgd(model)


def usual_network():
    """The same network in PyTorch's own convolutions, channels first, for normalised images."""
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


def print_speed(flops, ours):
    """Training's operations a second against those of a large product. ours: see print_rates."""
    left, right = torch.rand(2, 2048, 2048)
    limit, at_least = 2 * 2048**3 / alternate(lambda: left @ right)[0], "50%"
    for precision, seconds in ours.items():
        what = f"the same in GFLOP/s against a 2048^3 float32 product, {precision}"
        speed = flops / seconds
        shown = f"{speed / 1e9:.0f}", f"{limit / 1e9:.0f}", f"{speed / limit:.0%}"
        print_row(what, *shown, at_least)
        at_least = ""


# ---- Perturbation and attacks -------------------------------------------------------------------


def bench_perturbation(images):
    """12,000 images by us, 1,000 by the loop, per image."""
    jitter = transforms.ColorJitter(*common.JITTER.values())
    rotation = transforms.RandomRotation(common.MAX_ROTATION)
    many, few = common.as_float(images[:12_000]), common.as_float(images[:1_000])

    def per_image_loop():
        for image in few:
            image = rotation(jitter(image))
            for pixel in np.random.choice(1024, common.NUM_PIXELS, replace=False):
                image[np.random.randint(3), pixel // 32, pixel % 32] = 1

    def ours():
        generator = torch.Generator().manual_seed(0)
        for batch in many.split(common.EVALUATION_BATCH):
            common.perturb(batch, generator)

    our_seconds, peer_seconds = alternate(ours, per_image_loop)
    our_time, peer_time = 1e6 * our_seconds / len(many), 1e6 * peer_seconds / len(few)
    shown = f"{our_time:.0f}", f"{peer_time:.0f}", f"{peer_time / our_time:.1f}x"
    print_row("perturb, microseconds per image", *shown, "20x")


def bench_attack(title, our_attack, peers_for, images, labels, precisions, at_least):
    """An attack for a model with random weights, on which the work does not depend.

    our_attack(model, images, labels); peers_for(model): dict from library to such a function of
    images and labels.
    """
    torch.manual_seed(0)
    model, images = common.resnet18(10, STEM).eval(), common.as_float(images)
    ours = [partial(our_attack, common.frozen(model, each)) for each in precisions]
    peers = peers_for(model)
    attacks = [partial(attack, images, labels) for attack in (*ours, *peers.values())]
    seconds = alternate(*attacks)
    ours = dict(zip(precisions, seconds, strict=False))
    for name, peer in zip(peers, seconds[len(ours) :], strict=True):
        print_rates(f"{title} against {name}", len(images), ours, peer, at_least)


def our_fgm(model, images, labels):
    return common.fgm(model, images, labels, EPS)


def our_pgd(model, images, labels):
    """PGD that takes every step, as the peers do: no image ever counts as fooled."""
    steps = EPS, STEP_SIZE, STEPS
    return common.pgd(model, images, labels, *steps, decide=lambda output: labels)


def peer_fgm(model):
    """FGM of the peers as functions of images and labels."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import FastGradientMethod

    art_attack = FastGradientMethod(art_classifier(model), eps=EPS, batch_size=500)
    foolbox_attack = foolbox.attacks.LinfFastGradientAttack(random_start=False)
    return peers_of(model, art_attack, torchattacks.FGSM(model, eps=EPS), foolbox_attack)


def peer_pgd(model):
    """PGD-20 of the peers as functions of images and labels."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    options = {"eps": EPS, "eps_step": STEP_SIZE, "max_iter": STEPS, "batch_size": 500}
    art_attack = ProjectedGradientDescentPyTorch(art_classifier(model), **options, verbose=False)
    options = {"eps": EPS, "alpha": STEP_SIZE, "steps": STEPS, "random_start": False}
    options_of_foolbox = {"abs_stepsize": STEP_SIZE, "steps": STEPS, "random_start": False}
    foolbox_attack = foolbox.attacks.LinfPGD(**options_of_foolbox)
    return peers_of(model, art_attack, torchattacks.PGD(model, **options), foolbox_attack)


def art_classifier(model):
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1))


def peers_of(model, art_attack, torchattacks_attack, foolbox_attack):
    """The libraries' attacks as functions of images and labels: dict by library."""
    import foolbox

    foolbox_model = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    return {
        "ART": lambda images, labels: art_attack.generate(images.numpy(), labels.numpy()),
        "torchattacks": torchattacks_attack,
        "foolbox": lambda images, labels: foolbox_attack(
            foolbox_model, images, labels, epsilons=EPS
        ),
    }


# ---- The rest -----------------------------------------------------------------------------------


def bench_knn():
    """The vote of 100 neighbours for 24,000 embeddings among 12,000, each of 128 numbers."""
    from sklearn.neighbors import KNeighborsClassifier

    torch.manual_seed(0)
    train, queries = (F.normalize(torch.randn(count, 128)) for count in (12_000, 24_000))
    labels = torch.randint(0, 10, (12_000,))
    peer = KNeighborsClassifier(100, algorithm="brute", n_jobs=2).fit(train.numpy(), labels.numpy())
    ours, theirs = alternate(
        lambda: q6_angular.vote(train, labels, queries, 100),
        lambda: peer.predict(queries.numpy()),
    )
    shown = f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}x"
    print_row("100-NN of 24,000 among 12,000, seconds, against scikit-learn", *shown, "2x")


def bench_evaluation(images, precisions):
    """1,000 images by us and by a plain loop over the same network."""
    images = common.as_float(images[:1_000])
    model, plain = common.resnet18(10, STEM).eval(), usual_network().eval()

    def ours(precision):
        return common.predict(common.frozen(model, precision), images)

    def plain_loop():
        with torch.no_grad():
            for batch in images.split(BATCH):
                plain((batch - model.mean) / model.std).argmax(1)

    *seconds, peer = alternate(*(partial(ours, each) for each in precisions), plain_loop)
    seconds = dict(zip(precisions, seconds, strict=True))
    print_rates("evaluation against a plain loop", len(images), seconds, peer, "1.3x")


def bench_startup():
    """Seconds until --help is printed, against importing torch alone."""

    def start(*words):
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    script = Path(common.__file__).with_name("q1_split.py")
    ours, bare = alternate(partial(start, script, "--help"), partial(start, "-c", "import torch"))
    shown = f"{ours:.2f}", f"{bare:.2f}", f"{ours - bare:+.2f} s"
    print_row("python q1_split.py --help, seconds, against import torch", *shown, "+0.3 s")


def report_memory(results):
    """Peak memory as the scripts themselves noted it in their last run."""
    for path in sorted(results.glob("q*/metrics.json")):
        peak = json.loads(path.read_text())["peak_memory_mib"]
        print_row(f"peak memory of {path.parent.name} in {results}, MiB", peak, "", "", "3072")


if __name__ == "__main__":
    common.run(main)
