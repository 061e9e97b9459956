"""The data and its split, the perturbation and the augmentation."""

import hashlib
import itertools
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest, uniform
from torchvision.datasets import CIFAR10
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

import common
import helpers
import q1_split
import q2_train_ce
from tools import synthetic

TVF_STEPS = (
    ("brightness", tvf.adjust_brightness),
    ("contrast", tvf.adjust_contrast),
    ("saturation", tvf.adjust_saturation),
    ("hue", tvf.adjust_hue),
)


# ---- Data ----------------------------------------------------------------------------------------


@pytest.fixture
def archived(tmp_path, monkeypatch):
    """A folder with nothing but an archive of 120 images, and those images."""
    made, given = tmp_path / "made", tmp_path / "given"
    synthetic.write_synthetic_cifar10(made, per_file=20)
    given.mkdir()
    with tarfile.open(given / CIFAR10.filename, "w:gz") as archive:
        archive.add(made / CIFAR10.base_folder, CIFAR10.base_folder)
    helpers.accept_as_published(monkeypatch, made)
    archive_md5 = hashlib.md5((given / CIFAR10.filename).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "tgz_md5", archive_md5)
    return given, common.load_cifar10(made)[0]


def test_images_come_as_the_five_training_files_and_then_the_test_file(cifar10, loaded):
    images, labels = loaded
    assert images.shape == (60_000, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and images.is_contiguous()
    for index, name, row in (
        (0, "data_batch_1", 0),
        (12_345, "data_batch_2", 2_345),
        (49_999, "data_batch_5", 9_999),
        (50_000, "test_batch", 0),
        (59_999, "test_batch", 9_999),
    ):
        content = pickle.loads((cifar10 / CIFAR10.base_folder / name).read_bytes())
        assert images[index].flatten().tolist() == content["data"][row].tolist()
        assert labels[index] == content["labels"][row]


@pytest.mark.parametrize("name, kept", [(None, 0), ("data_batch_1", 0), ("test_batch", -1000)])
def test_an_archive_from_any_mirror_is_unpacked_also_after_an_interruption(
    archived, no_network, name, kept
):
    folder, images = archived
    if name:
        common.load_cifar10(folder)
        path = folder / CIFAR10.base_folder / name
        path.write_bytes(path.read_bytes()[:kept])
    assert torch.equal(common.load_cifar10(folder)[0], images)


def test_a_changed_byte_is_noticed_before_anything_is_unpickled(archived, no_network, monkeypatch):
    folder, _ = archived
    common.load_cifar10(folder)
    (folder / CIFAR10.filename).unlink()
    path = folder / CIFAR10.base_folder / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(pickle, "load", lambda *args, **options: pytest.fail("unpickled"))
    with pytest.raises(common.UserError, match="not complete.*no network") as error:
        common.load_cifar10(folder)
    assert str(folder) in str(error.value)


# ---- Split -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labels():
    """Labels of 60,000 images, 5,000 of each class in the official training file and 1,000 in its
    test file."""
    rng = np.random.default_rng(0)
    return np.concatenate([rng.permutation(np.arange(size) % 10) for size in (50_000, 10_000)])


@pytest.mark.parametrize(
    "protocol, sizes", [("pooled", (1200, 2400, 2400)), ("official", (1000, 4000, 1000))]
)
def test_parts_are_disjoint_and_hold_equally_many_of_each_class(labels, protocol, sizes):
    parts = q1_split.draw_split(labels, protocol, seed=0, quick=False)
    everything = np.concatenate(list(parts.values()))
    assert len(np.unique(everything)) == len(everything) == 60_000
    for part, size in zip((parts["train"], parts["val"], parts["test"]), sizes, strict=True):
        assert np.bincount(labels[part]).tolist() == [size] * 10


@pytest.mark.parametrize("quick", [False, True])
def test_the_official_protocol_tests_on_the_official_test_file_only(labels, quick):
    parts = q1_split.draw_split(labels, "official", seed=0, quick=quick)
    assert parts["test"].min() >= 50_000
    assert max(parts["train"].max(), parts["val"].max()) < 50_000


def test_parts_are_shuffled(labels):
    """Scores on the first images of a part stand for the part: classes must not come in order."""
    for part in q1_split.draw_split(labels, "pooled", seed=0, quick=False).values():
        assert np.bincount(labels[part[:2000]]).min() > 150


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"quick": False}, {"protocol": "official"}, {"train": np.arange(20)}]
)
def test_the_checksum_of_a_split_covers_all_of_it(tmp_path, change):
    parts = {"train": np.arange(1, 21), "val": np.arange(30, 40), "test": np.arange(50, 60)}
    digests = set()
    for changes in ({}, change):
        arrays = {**helpers.tiny_split(), **parts, **changes}
        common.write_npz(tmp_path / "split.npz", arrays)
        digests.add(common.load_split(tmp_path / "split.npz")["sha256"])
    assert len(digests) == 2


def test_duplicates_are_counted_as_a_direct_comparison_counts_them():
    rng = torch.Generator().manual_seed(0)
    train = torch.randint(60, 200, (30, 3, 32, 32), generator=rng).byte()
    test = torch.randint(60, 200, (20, 3, 32, 32), generator=rng).byte()
    test[:3] = train[5:8]
    test[3] = (train[9] * 1.2).byte()  # the same picture, brighter
    correlations = np.corrcoef(train.flatten(1).numpy(), test.flatten(1).numpy())[:30, 30:]
    exact, near = q1_split.count_duplicates(train, test)
    assert exact == 3
    assert near == (correlations.max(0) >= 0.95).sum() == 4


# ---- Perturbation ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    """Images of noise, some of them with grey or saturated areas, where hue has ties."""
    images = torch.rand(48, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    images[::4, :, :16] = images[::4, :1, :16]
    images[1::4, 0, :, :16] = 1
    images[2::4, 1, 16:] = 0
    return images


@pytest.fixture
def drawn(monkeypatch):
    """What perturb hands to its three steps: a list that each of them extends with its arguments
    after the images."""
    arguments = []
    for name in ("color_jitter", "rotate", "set_to_full"):
        original = getattr(common, name)
        monkeypatch.setattr(
            common,
            name,
            lambda images, *rest, original=original: (
                arguments.extend(rest) or original(images, *rest)
            ),
        )
    return arguments


def share_of_different_pixels(found, expected, tolerance):
    return ((found - expected).abs().amax(1) > tolerance).double().mean().item()


def jittered_by_torchvision(image, factors, order, index):
    for kind in order[index].tolist():
        name, adjust = TVF_STEPS[kind]
        image = adjust(image, factors[name][index].item())
    return image


@pytest.mark.parametrize("kind", range(4))
def test_each_colour_step_is_torchvisions(images, kind):
    name, adjust = TVF_STEPS[kind]
    factors = {each: torch.full((48,), 0.0 if each == "hue" else 1.0) for each, _ in TVF_STEPS}
    factors[name] = torch.linspace(*((-0.5, 0.5) if name == "hue" else (0, 2)), 48)
    found = common.color_jitter(images, factors, torch.arange(4).expand(48, 4))
    expected = torch.stack(list(map(adjust, images, factors[name].tolist())))
    assert share_of_different_pixels(found, expected, 1e-5) <= (1e-3 if name == "hue" else 0)


def test_perturb_jitters_then_rotates_then_sets_pixels(images, drawn):
    found = common.perturb(images, torch.Generator().manual_seed(0))
    factors, order, angles, channels, pixels = drawn
    expected = []
    for index, image in enumerate(images):
        image = jittered_by_torchvision(image, factors, order, index)
        image = tvf.rotate(image, angles[index].item(), InterpolationMode.NEAREST)
        image[channels[index], pixels[index] // 32, pixels[index] % 32] = 1
        expected.append(image)
    assert share_of_different_pixels(found, torch.stack(expected), 1e-5) < 0.003


def test_exactly_ten_pixels_get_one_full_channel_each():
    """A black image stays black under jitter and rotation, so that only these pixels are left."""
    perturbed = common.perturb(torch.zeros(500, 3, 32, 32), torch.Generator().manual_seed(0))
    assert perturbed.unique().tolist() == [0, 1]
    assert (perturbed.sum(1) <= 1).all()
    assert (perturbed.sum((1, 2, 3)) == 10).all()


def test_perturbations_have_the_intended_distributions(drawn):
    common.perturb(torch.zeros(5000, 3, 4, 4), torch.Generator().manual_seed(0))
    factors, order, angles, channels, pixels = drawn
    for values, low, high in (
        (factors["brightness"], 0.6, 1.4),
        (factors["contrast"], 0.6, 1.4),
        (factors["saturation"], 0.6, 1.4),
        (factors["hue"], -0.1, 0.1),
        (angles, -5, 5),
    ):
        assert kstest(values, uniform(low, high - low).cdf).pvalue > 1e-3
    orders = Counter(map(tuple, order.tolist()))
    assert len(orders) == 24 and chisquare(list(orders.values())).pvalue > 1e-3
    assert chisquare(torch.bincount(channels.flatten())).pvalue > 1e-3
    assert (
        torch.bincount(pixels.flatten()).double().std() < 60
    )  # 3,125 of each; with fixed places it would be 2,500


def test_every_use_of_random_numbers_has_its_own_stream():
    uses = list(itertools.product((0, 1), common.STREAMS, (0, 1)))
    first, again = (
        [torch.rand(1, generator=common.generator_for(*use)).item() for use in uses]
        for _ in range(2)
    )
    assert first == again and len(set(first)) == len(uses)


# ---- Augmentation ------------------------------------------------------------------------------


def test_crop_and_flip_gives_each_shifted_or_mirrored_version_equally_often():
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    version_of = {}
    for top, left in np.ndindex(9, 9):
        crop = padded[:, top : top + 32, left : left + 32]
        version_of[crop.tobytes()] = (top, left, False)
        version_of[crop[:, :, ::-1].tobytes()] = (top, left, True)

    augmented = common.crop_and_flip(
        image.expand(4000, -1, -1, -1), torch.Generator().manual_seed(0)
    )
    versions = Counter(version_of[each.numpy().tobytes()] for each in augmented)
    assert len(versions) == 162
    assert chisquare(list(versions.values())).pvalue > 1e-3


def test_cutout_covers_every_pixel_and_at_most_one_square():
    images = torch.ones(2000, 3, 32, 32)
    cut = q2_train_ce.cut_out(images, 12, torch.Generator().manual_seed(0))
    changed = cut != images
    mean = torch.tensor(common.CIFAR10_MEAN)
    assert torch.equal(cut[changed], mean.view(1, 3, 1, 1).expand_as(images)[changed])
    assert torch.equal(changed[:, 0], changed[:, 1]) and torch.equal(changed[:, 0], changed[:, 2])
    rows, columns = changed[:, 0].any(2).sum(1), changed[:, 0].any(1).sum(1)
    assert torch.equal(
        changed[:, 0].sum((1, 2)), rows * columns
    )  # a rectangle, cut only by the border
    assert (
        rows.max() == columns.max() == q2_train_ce.CUTOUT
        and rows.min() == columns.min() == q2_train_ce.CUTOUT // 2
    )
    assert changed[:, 0].any(0).all()


@pytest.fixture(scope="module")
def augmented():
    """800 uint8 images of noise, and what TrivialAugment makes of them."""
    images = torch.randint(256, (800, 3, 32, 32), generator=torch.Generator().manual_seed(3))
    images = images.to(torch.uint8)
    return images, q2_train_ce.trivial_augment(images, torch.Generator().manual_seed(0))


def test_trivial_augment_draws_from_our_generator_alone(augmented):
    images, made = augmented
    images, made = images[:80], made[:80]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again, other = (
        q2_train_ce.trivial_augment(images, torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    assert torch.equal(torch.get_rng_state(), state)  # a training that goes on is exact
    assert torch.equal(again, made) and not torch.equal(other, made)


def test_trivial_augment_changes_groups_of_images_each_in_its_own_way(augmented):
    images, made = augmented
    assert made.shape == images.shape and made.dtype == torch.uint8
    same = (made == images).flatten(1).all(1).view(-1, q2_train_ce.AUGMENTED_TOGETHER)
    # A group shares what is drawn, which may still leave one of its images as it was.
    assert (same.any(1) == same.all(1)).float().mean() > 0.9
    assert 1 / 20 < same.float().mean() < 1 / 3  # the identity is one of 14; strength 0 is another
