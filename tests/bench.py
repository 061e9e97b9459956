"""Ours and the usual way side by side, on this machine: `make bench DATA=path`, under ten minutes on two cores.

Every row alternates ours and the peer and takes the median of ROUNDS runs. Sizes are cut to fit the time, and each
row says which; ratios are per image. Peers are in tests/requirements-peers.txt. Nothing else should be running.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets, transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402  (it lies one folder up)
import q2_train_ce  # noqa: E402

ROUNDS = 5
BATCH = 128
STEM = "stride2"
PRECISION = common._pick_precision("auto", "cpu")  # what the scripts use here


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--results", type=Path, default=Path("results"), help="where peak memory is looked up")
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
    return [statistics.median(times) for times in zip(*rounds)]


def row(what, ours, peer, ratio, bound):
    print(f"| {what} | {ours} | {peer} | {ratio} | {bound} |", flush=True)


def augmented(images, generator):
    """Question 2's training images."""
    return q2_train_ce.cut_out(common.crop_and_flip(common.as_float(images), generator), generator)


def bench_training(root, images, labels):
    """An epoch over 1,280 images: our loop's step against the usual DataLoader loop, same network and optimiser."""
    number = 10 * BATCH
    images, labels = images[:number], labels[:number]
    model = common.resnet18(10, STEM).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)

    def our_epoch(dtype=PRECISION):
        generator = torch.Generator().manual_seed(0)
        for indices in common.shuffled_batches(number, BATCH, generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                batch = augmented(images[indices], generator)
                loss = F.cross_entropy(model(batch).float(), labels[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    usual = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
                                transforms.ToTensor(), transforms.Normalize(common.CIFAR10_MEAN, common.CIFAR10_STD)])
    dataset = torch.utils.data.Subset(datasets.CIFAR10(root, transform=usual), range(number))
    loader = torch.utils.data.DataLoader(dataset, BATCH, shuffle=True, num_workers=2)
    plain = nn.Sequential(common.resnet18(10, STEM).backbone, nn.Linear(512, 10)).to(memory_format=torch.contiguous_format)
    plain_optimizer = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def usual_epoch():
        for batch, target in loader:
            plain_optimizer.zero_grad()
            F.cross_entropy(plain(batch), target).backward()
            plain_optimizer.step()

    ours, ours_float32, peer = alternate(our_epoch, lambda: our_epoch("float32"), usual_epoch)
    row(f"training, images/s, stem {STEM}, {PRECISION}", f"{number / ours:.0f}", f"{number / peer:.0f}", f"{peer / ours:.2f}x", "1.5x")
    row("the same in float32", f"{number / ours_float32:.0f}", f"{number / peer:.0f}", f"{peer / ours_float32:.2f}x", "")

    flops = 3 * forward_flops(model, images[:1])
    left, right = torch.rand(2, 2048, 2048)
    limit = 2 * 2048**3 / alternate(lambda: left @ right)[0]
    for name, seconds in ((PRECISION, ours), ("float32", ours_float32)):
        share = flops * number / seconds / limit
        row(f"the same in GFLOP/s against a 2048^3 float32 product, {name}", f"{flops * number / seconds / 1e9:.0f}",
            f"{limit / 1e9:.0f}", f"{share:.0%}", "50%")

    generator = torch.Generator().manual_seed(0)
    augment, = alternate(lambda: [augmented(images[:BATCH], generator) for _ in range(10)])
    row("augmentation as a share of training", f"{augment * 1e2:.2f} ms/step", f"{ours * 1e2:.0f} ms/step", f"{augment / ours:.1%}", "under 3%")


def forward_flops(model, image):
    """Floating-point operations of the forward pass of one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        common.frozen(model)(common.as_float(image))
    return counter.get_total_flops()


def bench_perturbation(images):
    """12,000 images by us, 1,000 by the loop, per image."""
    jitter, rotation = transforms.ColorJitter(*common.JITTER.values()), transforms.RandomRotation(common.MAX_ROTATION)
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
    row("perturb, microseconds per image", f"{per_image * 1e6:.0f}", f"{loop_per_image * 1e6:.0f}", f"{loop_per_image / per_image:.1f}x", "20x")


def bench_attacks(images, labels):
    """FGM on 500 images and PGD-20 on 50, for a model with random weights (the work does not depend on them)."""
    torch.manual_seed(0)
    model = common.resnet18(10, STEM).eval()
    ours, ours_float32 = common.frozen(model, PRECISION), common.frozen(model)
    eps, step = common.EPSILON["linf"], common.PGD_STEP_SIZE
    for title, number, bound, attack, theirs in (
        ("FGM", 500, "1.3x", lambda network, x, y: common.fgm(network, x, y, eps), peer_fgm(model, eps)),
        ("PGD-20", 50, "1.2x", lambda network, x, y: common.pgd(network, x, y, eps, step, 20), peer_pgd(model, eps, step)),
    ):
        x, y = common.as_float(images[:number]), labels[:number]
        seconds, float32, *peers = alternate(lambda: attack(ours, x, y), lambda: attack(ours_float32, x, y),
                                             *(lambda peer=peer: peer(x, y) for peer in theirs.values()))
        for name, peer in zip(theirs, peers):
            row(f"{title}, images/s, {PRECISION}, against {name}", f"{number / seconds:.1f}", f"{number / peer:.1f}", f"{peer / seconds:.2f}x", bound)
        fastest = min(peers)
        row(f"{title}, images/s, float32, against the fastest", f"{number / float32:.1f}", f"{number / fastest:.1f}", f"{fastest / float32:.2f}x", "")


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
    return {"ART": lambda x, y: art_attack.generate(x.numpy(), y.numpy()),
            "torchattacks": torchattacks.FGSM(model, eps=eps),
            "foolbox": lambda x, y: foolbox_attack(foolbox_model, x, y, epsilons=eps)}


def peer_pgd(model, eps, step):
    """PGD-20 of the peers as functions of images and labels."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    art_attack = ProjectedGradientDescentPyTorch(art_classifier(model), eps=eps, eps_step=step, max_iter=20,
                                                 batch_size=500, verbose=False)
    foolbox_model = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    foolbox_attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=20, random_start=False)
    return {"ART": lambda x, y: art_attack.generate(x.numpy(), y.numpy()),
            "torchattacks": torchattacks.PGD(model, eps=eps, alpha=step, steps=20, random_start=False),
            "foolbox": lambda x, y: foolbox_attack(foolbox_model, x, y, epsilons=eps)}


def bench_knn():
    """The vote of 100 neighbours for 24,000 embeddings among 12,000, each of 128 numbers."""
    from sklearn.neighbors import KNeighborsClassifier

    torch.manual_seed(0)
    train, queries = (F.normalize(torch.randn(number, 128)) for number in (12_000, 24_000))
    labels = torch.randint(0, 10, (12_000,))
    peer = KNeighborsClassifier(100, algorithm="brute", n_jobs=2).fit(train.numpy(), labels.numpy())
    ours, theirs = alternate(lambda: common.knn_predict(train, labels, queries, 100), lambda: peer.predict(queries.numpy()))
    row("100-NN of 24,000 among 12,000, seconds, against scikit-learn", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}x", "2x")


def bench_evaluation(images):
    """1,000 images by us and by a plain loop over the same network."""
    images = common.as_float(images[:1_000])
    model = common.resnet18(10, STEM).eval()
    plain = nn.Sequential(common.Normalize(), common.resnet18(10, STEM).backbone, nn.Linear(512, 10))
    plain = plain.to(memory_format=torch.contiguous_format).eval()

    def plain_loop():
        with torch.no_grad():
            for batch in images.split(BATCH):
                plain[2](plain[1]((batch - plain[0].mean) / plain[0].std)).argmax(1)

    ours, float32, theirs = alternate(lambda: common.predict(common.frozen(model, PRECISION), images),
                                      lambda: common.predict(common.frozen(model), images), plain_loop)
    for seconds, name, bound in ((ours, PRECISION, "1.3x"), (float32, "float32", "")):
        row(f"evaluation, images/s, {name}, against a plain loop", f"{1000 / seconds:.0f}", f"{1000 / theirs:.0f}", f"{theirs / seconds:.2f}x", bound)


def bench_startup():
    """Seconds until --help is printed, against importing torch alone."""
    script = Path(common.__file__).with_name("q1_split.py")

    def start(*words):
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)

    ours, bare = alternate(lambda: start(str(script), "--help"), lambda: start("-c", "import torch"))
    row("python q1_split.py --help, seconds, against import torch", f"{ours:.2f}", f"{bare:.2f}", f"{ours - bare:+.2f} s", "+0.3 s")


def report_memory(results):
    """Peak memory as the scripts themselves noted it in their last run."""
    for path in sorted(results.glob("q*/metrics.json")):
        peak = json.loads(path.read_text())["peak_memory_mib"]
        row(f"peak memory of {path.parent.name} in {results}, MiB", peak, "", "", "3072")


if __name__ == "__main__":
    main()
