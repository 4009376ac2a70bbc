"""Hidden states matched through a projection: values by hand, numpy, finite differences, and what
must not change the loss; which layer is paired with which. (Runs: tests/test_method_inside.py.)"""

import numpy as np
import pytest
import torch
from torch import nn

from distill.hidden import METRICS, hidden_state_loss, layer_pairs, normalise
from methods.hidden_states import compute_loss
from model import Record
from tests.explain import check


def states(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mask_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


@pytest.fixture
def projection():
    W = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    with torch.no_grad():
        W.weight.copy_(states(4, 3, seed=5))
    return W


# By hand. (3, 4) and (4, 3) have the mean square 25 / 2 and the cosine 24 / 25.


@pytest.mark.parametrize(
    "metric, expected, mistakes",
    [
        # Divided by sqrt(25 / 2) they differ by 1 / sqrt(12.5) twice: 2 / 12.5 over 2 channels.
        (
            "mse",
            0.08,
            {
                "the states are not normalised": 1.0,
                "the sum over the width, not its mean": 0.16,
                "states of length 1: their entries should have mean square 1": 0.04,
            },
        ),
        ("cosine", 0.04, {"the cosine, not 1 minus it": 0.96, "its negative": -0.96}),
    ],
)
def test_values_worked_by_hand(metric, expected, mistakes):
    ours, theirs = (torch.tensor([[[*pair]]], dtype=torch.float64) for pair in ((3, 4), (4, 3)))
    loss = hidden_state_loss(ours, theirs, metric=metric)
    assert loss.shape == (), "a loss is one number: the mean over positions is missing"
    check(loss, expected, mistakes, rel=1e-9)


def test_a_projection_worked_by_hand():
    """n(3, 4) = (3, 4) / sqrt(12.5); W = (0 1; 1 0; 0 0) turns it into (4, 3, 0) / sqrt(12.5); the
    teacher's (0, 0, 5) becomes (0, 0, sqrt 3): (16/12.5 + 9/12.5 + 3) / 3 = 5/3."""
    W = nn.Linear(2, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        W.weight.copy_(torch.tensor([[0.0, 1], [1, 0], [0, 0]]))
    ours, theirs = torch.tensor([[[3.0, 4]]]).double(), torch.tensor([[[0.0, 0, 5]]]).double()
    check(
        hidden_state_loss(ours, theirs, projection=W).item(),
        5 / 3,
        {"divided by the student's width": 2.5, "the sum over the width": 5.0},
        rel=1e-9,
    )


# Against numpy.


@pytest.mark.parametrize("metric", METRICS)
def test_equals_numpy(metric, projection):
    h, t, mask = states(2, 3, 3), states(2, 3, 4, seed=1), mask_of((1, 0, 1), (1, 1, 0))
    W, errors = projection.weight.detach().numpy(), []
    for b, s in zip(*np.nonzero(mask.numpy()), strict=True):
        x, y = h[b, s].numpy(), t[b, s].numpy()
        x, y = W @ (x / np.sqrt(np.mean(x**2))), y / np.sqrt(np.mean(y**2))
        if metric == "mse":
            errors.append(np.mean((x - y) ** 2))
        else:
            errors.append(1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    check(
        hidden_state_loss(h, t, mask, projection, metric).item(),
        np.mean(errors),
        {
            "positions that are masked out are in the mean": hidden_state_loss(
                h, t, None, projection, metric
            ).item(),
            "divided by all positions, not by the valid ones": np.sum(errors) / 6,
        },
        rel=1e-9,
    )


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_by_finite_differences(metric, projection):
    mask = mask_of((1, 0), (1, 1))
    target = states(2, 2, 4, seed=1)

    def loss(h, weight):
        return hidden_state_loss(h, target, mask, lambda x: x @ weight.T, metric)

    weight = projection.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (states(2, 2, 3).requires_grad_(), weight))


# What must not change it.


@pytest.mark.parametrize("metric", METRICS)
def test_equal_states_have_no_loss_and_no_gradient(metric):
    ours = states(2, 3, 4).requires_grad_()
    loss = hidden_state_loss(ours, ours.detach().clone(), metric=metric)
    loss.backward()
    assert abs(loss.item()) < 1e-9 and ours.grad.abs().max() < 1e-9


@pytest.mark.parametrize("metric", METRICS)
def test_the_size_of_a_state_does_not_matter(metric, projection):
    """A position whose state is 100 times as long, as the first one's often is, counts like any
    other. The plain MSE of states, which most toolkits have, is of that position alone."""

    def plain_mse(h, t, mask, projection, metric):
        return (projection(h) - t).square().mean()

    h, t = states(2, 3, 3), states(2, 3, 4, seed=1)
    sizes = torch.tensor([100.0, 1, 0.1], dtype=torch.float64)[:, None]
    for loss, same in ((hidden_state_loss, True), (plain_mse, False)):
        before, after = (
            loss(h, t, None, projection, metric),
            loss(h * sizes, t * sizes, None, projection, metric),
        )
        assert torch.allclose(before, after, rtol=1e-9) is same


@pytest.mark.parametrize("metric", METRICS)
def test_masked_positions_leave_no_trace(metric, projection):
    """NaN there reaches neither the loss nor a gradient (multiplying by the mask would give NaN).
    A toolkit's cosine loss returned before its mask was applied (ModelOpt, pull request 892)."""

    def without_mask(h, t):
        return (1 - torch.cosine_similarity(projection(h), t, dim=-1)).mean()

    h, t, mask = states(2, 3, 3), states(2, 3, 4, seed=1), mask_of((1, 1, 0), (1, 0, 0))
    losses, gradients = [], []
    for filler in (0.0, 5.0, torch.nan):
        ours = h.masked_fill(~mask[..., None], filler).requires_grad_()
        projection.zero_grad()
        loss = hidden_state_loss(
            ours, t.masked_fill(~mask[..., None], filler), mask, projection, metric
        )
        loss.backward()
        losses.append(loss.item())
        gradients.append((ours.grad, projection.weight.grad.clone()))
        if metric == "cosine" and filler != 0.0:
            other = without_mask(ours, t).item()
            assert other != pytest.approx(losses[0], rel=1e-3), "this test tells no mask from one"
    assert losses[0] == losses[1] == losses[2], "what stands at masked positions is in the loss"
    for first, second in zip(gradients[0], gradients[2], strict=True):
        assert torch.equal(first, second), "NaN at a masked position reaches a gradient"


def test_no_valid_position():
    ours = states(1, 2, 4).requires_grad_()
    loss = hidden_state_loss(ours, states(1, 2, 4, seed=1), mask_of((0, 0)))
    loss.backward()
    assert loss.item() == 0.0 and not ours.grad.any()


def test_no_gradient_reaches_the_teacher(projection):
    theirs = states(1, 2, 4, seed=1).requires_grad_()
    hidden_state_loss(states(1, 2, 3), theirs, projection=projection).backward()
    assert theirs.grad is None, "the teacher learns: detach its states"


def test_micro_batches_weighted_by_their_tokens_give_the_batch(projection):
    h, t, mask = (
        states(4, 3, 3),
        states(4, 3, 4, seed=1),
        mask_of((1, 1, 1), (1, 0, 0), (1, 1, 0), (0, 1, 1)),
    )
    whole = hidden_state_loss(h, t, mask, projection)
    pieces = [
        hidden_state_loss(h[rows], t[rows], mask[rows], projection) * mask[rows].sum()
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert sum(pieces).item() / 8 == pytest.approx(whole.item(), rel=1e-12)


def test_bfloat16_is_normalised_in_float32():
    assert normalise(states(2, 8).bfloat16()).dtype == torch.float32


def test_zeros_have_a_gradient():
    ours = torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True)
    hidden_state_loss(ours, states(1, 1, 4)).backward()
    assert ours.grad.isfinite().all()


def test_widths_that_differ_need_a_projection():
    with pytest.raises(
        ValueError, match="student width 3 and teacher width 4 .* give a projection"
    ):
        hidden_state_loss(states(1, 2, 3), states(1, 2, 4))
    with pytest.raises(ValueError, match="no metric 'l1' .* use mse or cosine"):
        hidden_state_loss(states(1, 2, 3), states(1, 2, 3), metric="l1")


# Which layer is paired with which.


@pytest.mark.parametrize(
    "name, students, teachers, expected",
    [
        ("last", 2, 4, [(2, 4)]),
        ("uniform", 2, 4, [(1, 2), (2, 4)]),
        ("uniform", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ("uniform", 4, 6, [(1, 2), (2, 3), (3, 5), (4, 6)]),  # 1.5 and 4.5 alike, unlike round()
        ("uniform", 3, 1, [(1, 1), (2, 1), (3, 1)]),  # round(1/3) is 0, the embedding
        ("1:2,2:4", 2, 4, [(1, 2), (2, 4)]),
        ("2:1", 2, 4, [(2, 1)]),
    ],
)
def test_maps_of_layers(name, students, teachers, expected):
    assert layer_pairs(name, students, teachers) == expected


@pytest.mark.parametrize("name", ["0:1", "3:1", "1:5", "-1:1"])
def test_a_layer_that_there_is_not(name):
    said = f"--layers {name} asks for .* student has layers 1 to 2, the teacher 1 to 4"
    with pytest.raises(ValueError, match=said):
        layer_pairs(name, 2, 4)


@pytest.mark.parametrize("name", ["first", "1", "1:2:3", "1:2,", "a:b", ""])
def test_no_map_of_layers(name):
    with pytest.raises(ValueError, match="is no map of layers: use uniform, last, or"):
        layer_pairs(name, 2, 4)


# The method's whole loss.


def record(seed, width, layers):
    made = Record("hidden")
    made.logits = states(2, 3, 5, seed=seed)
    made.hidden = [states(2, 3, width, seed=seed + number) for number in range(layers + 1)]
    return made


def test_layers_count_from_one_and_states_from_the_embedding():
    """Layer l's states stand at index l, as index 0 is the embedding. Here the paired layers are
    equal; whoever starts at index 0 compares others."""
    student, teacher = record(0, 4, 2), record(100, 4, 4)
    teacher.hidden[2], teacher.hidden[4] = student.hidden[1] * 3, student.hidden[2]
    labels = torch.tensor([[1, 2, -100], [0, 4, 3]])
    pairs, W = [(1, 2), (2, 4)], [nn.Identity(), nn.Identity()]
    loss, parts = compute_loss(student, teacher, labels, pairs, W, "mse", 2.0)
    assert parts["hidden"].item() == pytest.approx(0, abs=1e-9)
    off_by_one = [(ours - 1, theirs - 1) for ours, theirs in pairs]
    assert compute_loss(student, teacher, labels, off_by_one, W, "mse", 2.0)[1]["hidden"] > 0.5


def test_the_loss_is_the_kl_and_the_mean_over_layers():
    student, teacher = record(0, 4, 2), record(100, 4, 2)
    labels = torch.tensor([[1, 2, -100], [0, 4, 3]])
    log_p, log_q = (m.logits.log_softmax(-1) for m in (teacher, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[labels != -100].mean().item()
    pairs, W = [(1, 1), (2, 2)], [nn.Identity(), nn.Identity()]
    errors = [
        hidden_state_loss(student.hidden[layer], teacher.hidden[layer], labels != -100).item()
        for layer in (1, 2)
    ]
    loss, parts = compute_loss(student, teacher, labels, pairs, W, "mse", 0.5)
    check(
        loss,
        kl + 0.5 * sum(errors) / 2,
        {
            "the sum over layers, not their mean": kl + 0.5 * sum(errors),
            "the weight is missing": kl + sum(errors) / 2,
            "the KL is missing": 0.5 * sum(errors) / 2,
        },
        rel=1e-9,
    )
    loss, parts = compute_loss(student, teacher, labels, pairs, W, "mse", 0.0)
    assert loss.item() == parts["kl"].item() == pytest.approx(kl, rel=1e-12)
