"""The network and its checkpoints, the k-NN vote, calibration and the losses."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import AngularLoss
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import nn

import common
import helpers
import q2_train_ce
import q6_angular


def trained_looking(stem, num_outputs=10):
    """A network whose batch-norms have seen images, in train mode, with those images."""
    torch.manual_seed(0)
    model = common.resnet18(num_outputs, stem).train()
    images = torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            model(images)
    return model, images


def named_as_torchvision(tensors):
    """The tensors of our network (dict from name) under their names in torchvision's."""
    return {
        name.removeprefix("backbone.").replace("head.", "fc."): tensor
        for name, tensor in tensors.items()
    }


# ---- Network -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stem, sizes",
    [("imagenet", (8, 4, 2, 1)), ("stride2", (16, 8, 4, 2)), ("cifar", (32, 16, 8, 4))],
)
def test_stems_differ_in_the_size_of_the_stages_and_not_in_the_output(stem, sizes):
    model = common.resnet18(7, stem).eval()
    seen = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(model.backbone, name).register_forward_hook(
            lambda module, given, output: seen.append(tuple(output.shape[1:]))
        )
    images = torch.rand(2, 3, 32, 32)
    assert model(images).shape == (2, 7)
    assert seen == [
        (channels, size, size) for channels, size in zip((64, 128, 256, 512), sizes, strict=True)
    ]
    assert common.backbone_features(model, images).shape == (2, 512)


def test_the_imagenet_stem_is_torchvisions_network_on_normalised_images():
    from torchvision.models import resnet18
    from torchvision.transforms.functional import normalize

    torch.manual_seed(0)
    ours, peer = (
        common.resnet18(10, "imagenet").double().train(),
        resnet18(num_classes=10).double().train(),
    )
    named = named_as_torchvision(dict(ours.named_parameters()))
    peer.load_state_dict(named, strict=False)  # the statistics of both start at 0 and 1
    images, labels = torch.rand(8, 3, 32, 32, dtype=torch.double), torch.arange(8)
    loss = F.cross_entropy(ours(images), labels)
    expected = F.cross_entropy(
        peer(normalize(images, common.CIFAR10_MEAN, common.CIFAR10_STD)), labels
    )
    loss.backward()
    expected.backward()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-6)
    for name, weight in peer.named_parameters():
        assert torch.allclose(
            named[name].grad, weight.grad, rtol=1e-3, atol=1e-3 * weight.grad.abs().max().item()
        ), name


@pytest.mark.parametrize("side, stride", [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_convolution_computed_as_a_matrix_product_is_a_convolution(side, stride, bias, training):
    torch.manual_seed(0)
    ours = common.Conv3x3(5, 7, 3, stride=stride, padding=1, bias=bias, dtype=torch.double).train(
        training
    )
    peer = nn.Conv2d(5, 7, 3, stride=stride, padding=1, bias=bias, dtype=torch.double)
    peer.load_state_dict(ours.state_dict())
    maps = torch.randn(4, 5, side, side, dtype=torch.double, requires_grad=True)
    outputs = [layer(maps) for layer in (ours, peer)]
    direction = torch.randn_like(outputs[1])
    gradients = [
        torch.autograd.grad(output, [maps, *layer.parameters()], direction)
        for output, layer in zip(outputs, (ours, peer), strict=True)
    ]
    for found, expected in zip(
        (outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True
    ):
        assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("stem", ["imagenet", "stride2"])
def test_frozen_computes_what_eval_computes_without_gradients_for_the_weights(stem):
    model, images = trained_looking(stem)
    frozen = common.frozen(model)
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    assert not frozen.training and not any(weight.requires_grad for weight in frozen.parameters())
    with torch.no_grad():
        assert torch.allclose(frozen(images), model.eval()(images), atol=1e-4)


def test_frozen_in_bfloat16_computes_nearly_the_same_and_takes_and_gives_float32():
    model, images = trained_looking("imagenet")
    exact, rounded = (
        common.frozen(model, precision)(images) for precision in ("float32", "bfloat16")
    )
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.05
    images.requires_grad_()
    common.frozen(model, "bfloat16")(images).sum().backward()
    assert images.grad.dtype == torch.float32 and images.grad.abs().sum() > 0


# ---- Checkpoints ---------------------------------------------------------------------------------


def test_a_loaded_checkpoint_is_the_saved_model_in_eval_mode(tmp_path):
    model, images = trained_looking("imagenet", num_outputs=128)
    path, origin = tmp_path / "model.pt", {"question": "q6"}
    digest = common.save_checkpoint(path, model, stem="imagenet", provenance=origin)
    loaded = common.load_checkpoint(path)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
    checkpoint = common.read_checkpoint(path)
    assert checkpoint["provenance"] == origin
    assert checkpoint["sha256"] == digest == common.weights_sha256(model.state_dict())


def test_a_model_is_its_weights_whatever_file_holds_them(tmp_path):
    model = common.resnet18(10, "imagenet")
    digests = [
        common.save_checkpoint(tmp_path / name, model, stem="imagenet", provenance=origin)
        for name, origin in (("a.pt", {"git_commit": "x"}), ("b.pt", {"git_commit": "y"}))
    ]
    assert digests[0] == digests[1]
    assert (tmp_path / "a.pt").read_bytes() != (tmp_path / "b.pt").read_bytes()
    with torch.no_grad():
        model.head.bias[3] += 1e-6
    changed = common.save_checkpoint(tmp_path / "a.pt", model, stem="imagenet", provenance={})
    assert changed != digests[0]
    assert common.read_checkpoint(tmp_path / "a.pt")["sha256"] == changed


def test_the_hash_of_weights_covers_names_types_and_shapes_but_no_order():
    weights = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    digest = common.weights_sha256(weights)
    assert digest == common.weights_sha256({"b": weights["b"], "a": weights["a"]})
    integers = weights["a"].view(torch.int32)  # the same bytes
    for change in ({"a": weights["a"].view(2, 2)}, {"a": integers}, {"c": torch.zeros(0)}):
        assert digest != common.weights_sha256({**weights, **change})
    assert digest != common.weights_sha256({"a": weights["a"], "c": weights["b"]})


def test_a_checkpoint_that_holds_the_same_is_not_written_again(tmp_path):
    model, path = common.resnet18(10, "imagenet"), tmp_path / "model.pt"

    def saved(origin):
        common.save_checkpoint(path, model, stem="imagenet", provenance=origin)
        return path.stat().st_ino  # of another file, where it is written again

    first = saved({"seed": 0})
    assert saved({"seed": 0}) == first
    other = saved({"seed": 1})
    assert other != first and common.read_checkpoint(path)["provenance"] == {"seed": 1}
    path.write_bytes(b"damaged")
    saved({"seed": 1})
    assert common.read_checkpoint(path)["provenance"] == {"seed": 1}


def test_question_6_takes_over_a_backbone_and_keeps_its_own_first_layer_where_stems_differ(
    tmp_path,
):
    other = tmp_path / "other.pt"
    origin = {"question": "q2", "split_sha256": "0" * 64, "seed": 0}
    other.write_bytes(helpers.torch_bytes(helpers.small_checkpoint()))
    first = common.resnet18(10, "stride2")
    common.save_checkpoint(tmp_path / "q2" / "model.pt", first, stem="stride2", provenance=origin)
    args = helpers.tiny_args(results=tmp_path, init=str(other))
    model, about, first_weights = q6_angular.first_model(args, {"sha256": "0" * 64})
    assert about == {"stem": "stride2"}
    assert first_weights == common.read_checkpoint(other)["sha256"]
    stem = model.backbone.conv1.weight
    assert stem.shape == (64, 3, 3, 3) and stem.std() > 0
    assert model.head.weight.shape == (128, 512) and model.head.weight.std() > 0
    assert all(
        (weight == 0).all()
        for name, weight in model.backbone.named_parameters()
        if name != "conv1.weight"
    )


@pytest.mark.parametrize(
    "stem, stages", [("imagenet", ["layer3", "layer4"]), ("stride2", ["layer4"]), ("cifar", [])]
)
def test_matrix_products_stand_where_they_pay_and_leave_the_weights_as_they_are(
    monkeypatch, stem, stages
):
    torch.manual_seed(0)
    plain = common.resnet18(10, stem)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    torch.manual_seed(0)
    fast = common.resnet18(10, stem)
    helpers.assert_same_bits(fast.state_dict(), plain.state_dict())
    found = {
        name.split(".")[1]
        for name, module in fast.named_modules()
        if isinstance(module, common.Conv3x3)
    }
    assert sorted(found) == stages
    images = torch.rand(4, 3, 32, 32)
    for train in (True, False):
        assert torch.allclose(fast.train(train)(images), plain.train(train)(images), atol=1e-4)


# ---- k-NN vote ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 4, 10, 100])
def test_the_vote_is_scikit_learns_ties_included(k):
    rng = torch.Generator().manual_seed(0)
    train, queries = (
        torch.randn(size, 6, dtype=torch.float64, generator=rng) for size in (400, 700)
    )
    labels = torch.randint(0, 5, (400,), generator=rng)
    peer = KNeighborsClassifier(k).fit(train.numpy(), labels.numpy())
    if k == 4:  # ties must be there to be tested: two classes with two votes each
        votes = np.sort((peer.predict_proba(queries.numpy()) * k).round(), axis=1)
        assert (votes[:, -1] == votes[:, -2]).sum() > 100
    assert (
        q6_angular.vote(train, labels, queries, k).tolist()
        == peer.predict(queries.numpy()).tolist()
    )


@pytest.mark.parametrize("offset", [0, 1000])
def test_neighbours_and_their_distances_are_exact_far_from_the_origin_too(offset):
    generator = torch.Generator().manual_seed(0)
    train, queries = (offset + torch.randn(size, 2, generator=generator) for size in (500, 1300))
    peer = NearestNeighbors(n_neighbors=5).fit(train.double().numpy())
    expected, nearest = peer.kneighbors(queries.double().numpy())
    distances, indices = common.nearest_neighbours(queries, 5, train)
    assert indices.tolist() == nearest.tolist()
    assert np.abs(distances.numpy() - expected).max() < 1e-3


def test_a_map_is_umaps_of_the_exact_neighbours_and_places_others_among_their_own(monkeypatch):
    import umap

    reducers = []

    class Kept(umap.UMAP):
        def __init__(self, **settings):
            super().__init__(**settings)
            reducers.append(self)

    monkeypatch.setattr(umap, "UMAP", Kept)
    torch.manual_seed(0)
    labels = torch.arange(200) % 4
    centres = torch.randn(4, 32)
    train, others = (centres[labels] + 0.1 * torch.randn(200, 32) for _ in range(2))
    points, place = common.fit_umap(train, 0)
    peer = NearestNeighbors(n_neighbors=15, algorithm="kd_tree").fit(train.numpy())
    distances, nearest = peer.kneighbors(train.numpy())
    expected, *_ = umap.umap_.fuzzy_simplicial_set(
        train.numpy(), 15, None, "euclidean", knn_indices=nearest, knn_dists=distances
    )
    assert abs(reducers[0].graph_ - expected).max() < 0.01
    votes = KNeighborsClassifier(5).fit(points, labels).predict(place(others))
    assert votes.tolist() == labels.tolist()


def test_retrieval_quality_is_what_its_definition_gives():
    torch.manual_seed(0)
    train, queries = F.normalize(torch.randn(60, 8)), F.normalize(torch.randn(25, 8))
    labels, query_labels = torch.arange(60) % 3, torch.arange(25) % 3
    found = q6_angular.retrieval_quality(train, labels, queries, query_labels)
    first, precision, average = [], [], []
    for query, label in zip(queries, query_labels, strict=True):
        right = (labels[(train - query).norm(dim=1).argsort()] == label).double()[
            :20
        ]  # R = 20 of each class
        precisions = right.cumsum(0) / torch.arange(1, 21)
        first.append(right[0])
        precision.append(right.mean())
        average.append((right * precisions).sum() / 20)
    expected = {
        "precision_at_1": first,
        "r_precision": precision,
        "mean_average_precision_at_r": average,
    }
    assert found == pytest.approx(
        {name: torch.stack(values).mean().item() for name, values in expected.items()}
    )


# ---- Calibration -------------------------------------------------------------------------------


def test_calibration_error_is_what_a_loop_over_the_bins_gives():
    rng = torch.Generator().manual_seed(0)
    confidence = (
        torch.rand(3000, generator=rng).sqrt().clamp_min(0.21)
    )  # the lowest bins stay empty
    correct = torch.rand(3000, generator=rng) < confidence**2
    expected = 0
    for position in range(15):
        inside = (confidence > position / 15) & (confidence <= (position + 1) / 15)
        if inside.any():
            gap = (confidence[inside].mean() - correct[inside].double().mean()).abs()
            expected += inside.double().mean() * gap
    bins = q2_train_ce.reliability(confidence, correct)
    assert q2_train_ce.expected_calibration_error(bins) == pytest.approx(expected.item(), abs=1e-6)
    assert expected > 0.05


# ---- Losses and schedule -----------------------------------------------------------------------


def test_the_librarys_angular_loss_is_the_formula_of_question_5():
    torch.manual_seed(0)
    tangent = math.tan(math.radians(q6_angular.ALPHA)) ** 2
    x, y = F.normalize(torch.randn(20, 8, dtype=torch.float64)), torch.arange(20) % 5
    terms = []
    for a in range(20):
        for p in range(20):
            if a != p and y[a] == y[p]:
                f = [
                    4 * tangent * (x[a] + x[p]) @ x[n] - 2 * (1 + tangent) * x[a] @ x[p]
                    for n in range(20)
                    if y[n] != y[a]
                ]
                terms.append(math.log(1 + sum(map(math.exp, f))))
    assert AngularLoss(alpha=q6_angular.ALPHA)(x, y).item() == pytest.approx(
        sum(terms) / len(terms)
    )


def test_the_soft_knn_loss_is_what_a_loop_over_the_neighbours_gives():
    torch.manual_seed(0)
    train, labels = F.normalize(torch.randn(30, 4)), torch.arange(30) % 3
    output, targets = 3 * torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    expected = 0
    for point, target in zip(output, targets, strict=True):
        weights = [math.exp(point @ other / point.norm() / 0.1) for other in train]
        expected -= math.log(
            sum(weight for weight, label in zip(weights, labels, strict=True) if label == target)
            / sum(weights)
        )
    assert q6_angular.soft_knn_loss(train, labels)(output, targets).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_the_nearest_other_image_of_a_batch_is_counted():
    embeddings = F.normalize(torch.tensor([[1, 0], [1, 0.1], [0, 1], [0.2, 1], [1, 0.3]]))
    assert q6_angular.nearest_is_same_class(embeddings, torch.tensor([0, 0, 1, 1, 1])).item() == 4


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_training_is_pytorchs_optimizer_at_a_changing_rate_with_decay_of_weights_only(
    tmp_path, name
):
    settings = {
        "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        "adamw": (torch.optim.AdamW, {"betas": (0.9, 0.999)}),
    }
    model = nn.Linear(4, 2)
    peer = copy.deepcopy(model)
    changes = {"optimizer": name, "epochs": 2, "lr": 0.5, "weight_decay": 0.1}
    helpers.train_linear(tmp_path / "model.pt", model, **changes)

    kind, more = settings[name]
    optimizers = [
        kind([peer.weight], weight_decay=0.1, **more),
        kind([peer.bias], weight_decay=0, **more),
    ]
    points, labels = helpers.linear_problem()
    for step in range(6):
        generator = common.generator_for(0, "epoch", step // 3)
        batch = common.shuffled_batches(labels, 4, generator)[step % 3]
        peer.zero_grad()
        F.cross_entropy(peer(points[batch]), labels[batch]).backward()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.5 * np.interp(step / 6, [0, 0.2, 1], [0, 1, 0])
            optimizer.step()
    for found, expected in zip(model.parameters(), peer.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_an_epoch_holds_every_image_at_most_once_and_only_full_batches():
    batches = common.shuffled_batches(torch.zeros(103), 10, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [10] * 10
    assert len(torch.cat(batches).unique()) == 100
    assert torch.cat(batches).tolist() != sorted(torch.cat(batches).tolist())


def test_batches_of_question_6_hold_equally_many_images_of_each_class_and_every_image_once():
    labels = torch.arange(600) % 10
    batches = q6_angular.class_balanced_batches(labels, 120, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [120] * 5
    for batch in batches:
        assert torch.bincount(labels[batch]).tolist() == [12] * 10
    assert sorted(torch.cat(batches).tolist()) == list(range(600))


# ---- Collapse ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores, kept",
    [
        ([], 0),
        ([0.1, 0.2, 0.3], 3),
        ([0.3, 0.4, 0.2], 3),  # half of the best is not below it
        ([0.3, 0.4, 0.19], 2),
        ([0.4, 0.3, 0.4, 0.19], 3),
        ([0.1, 0.01], 2),  # a best of a tenth says nothing
    ],
)
def test_the_epoch_that_is_kept(scores, kept):
    history = [{"val_pgd": score} for score in scores]
    assert common.kept_epoch(history, "val_pgd") == kept
    assert common.kept_epoch(history, None) == len(scores)


def test_a_training_that_collapses_stops_and_goes_back_to_its_best_epoch(tmp_path, capsys):
    scores = iter([0.2, 0.4, 0.3, 0.1, 0.9])
    seen = []

    def evaluate(model):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"score": next(scores)}

    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    arguments = {"evaluate": evaluate, "epochs": 9, "guard": "score"}
    history = helpers.train_linear(tmp_path / "model.pt", model, **arguments)["history"]
    assert [epoch["score"] for epoch in history] == [0.2, 0.4, 0.3, 0.1]
    helpers.assert_same_bits(dict(model.state_dict()), seen[1])
    assert "back to the weights of epoch 2" in capsys.readouterr().out

    again = nn.Linear(4, 2)  # a later call neither trains on nor forgets
    assert helpers.train_linear(tmp_path / "model.pt", again, **arguments)["history"] == history
    helpers.assert_same_bits(dict(again.state_dict()), seen[1])
