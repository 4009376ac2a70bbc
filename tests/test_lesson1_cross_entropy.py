"""Lesson 1: the loss is the surprise of the label, -log softmax(logits)[label], averaged over the
tokens that have one. Worked by hand first, then held against torch's library, against distill's
functions and the fused loss, and against everything that must not change it."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill import cross_entropy, fused_loss, weighted_cross_entropy
from tests.explain import check
from train_pretrain import compute_loss

IGNORE = -100
LN = math.log
MASKS = ["all", "some", "none"]


def logits_of(*rows):
    """(1, S, V) logits whose softmax is `rows`, shifted: a softmax ignores a shift."""
    return torch.tensor([rows], dtype=torch.float64).log() + 3.0


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def random_labels(B=2, S=4, V=5, mask="all", seed=0):
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(seed))
    if mask == "some":
        labels[0, 2:] = labels[1, 0] = IGNORE
    if mask == "none":
        labels.fill_(IGNORE)
    return labels


# By hand.


@pytest.mark.parametrize(
    "labels, expected",
    [
        ([0, 1], (LN(2) + LN(4)) / 2),  # -ln 1/2 and -ln 1/4
        ([1, 0], (LN(2) + LN(4 / 3)) / 2),  # -ln 1/2 and -ln 3/4
        ([IGNORE, 1], LN(4)),  # the mean is over one token, not over two
        ([0, IGNORE], LN(2)),
        ([IGNORE, IGNORE], 0.0),
    ],
)
def test_values_worked_by_hand(labels, expected):
    logits = logits_of((0.5, 0.5), (0.75, 0.25))
    loss, parts = compute_loss(logits, torch.tensor([labels]))
    assert loss.shape == (), "a loss is one number: the mean over tokens is missing"
    valid = sum(label != IGNORE for label in labels)
    mistakes = {
        "the mean is over all positions: those with label -100 do not count": expected * valid / 2,
        "a sum: divide by the number of labels that are not -100": expected * valid,
        "the logarithm is of base 2: log_softmax is natural": expected / LN(2),
        "the sign: surprise is minus the log-probability": -expected,
    }
    check(loss, expected, mistakes)
    assert parts.keys() == {"ce"} and parts["ce"].item() == loss.item()


def test_gradient_worked_by_hand():
    """(q - one hot) / N: two tokens count, so q = (1/2, 1/2), label 0, gives (-1/4, 1/4)."""
    logits = logits_of((0.5, 0.5), (0.75, 0.25), (0.9, 0.1)).requires_grad_()
    compute_loss(logits, torch.tensor([[0, 1, IGNORE]]))[0].backward()
    expected = [[[-0.25, 0.25], [0.375, -0.375], [0.0, 0.0]]]
    said = "(q - one hot) / 2: a -100 label must count neither in the sum nor in the mean"
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, msg=lambda text: f"{said}\n{text}")


def test_the_loss_of_every_token_worked_by_hand():
    per_token = cross_entropy(logits_of((0.75, 0.25), (0.75, 0.25)), torch.tensor([[1, 0]]))
    assert per_token.tolist()[0] == pytest.approx([LN(4), LN(4 / 3)])


def test_a_vocabulary_of_one_token_is_no_surprise():
    assert not cross_entropy(torch.zeros(1, 2, 1), torch.tensor([[0, IGNORE]])).any()
    assert compute_loss(torch.zeros(1, 2, 1), torch.tensor([[0, IGNORE]]))[0].item() == 0.0


def test_a_uniform_guess_costs_log_v():
    assert compute_loss(torch.zeros(1, 3, 32), random_labels(1, 3, 32))[0].item() == pytest.approx(
        LN(32)
    )


# Four ways to one value: the lesson, distill's functions, torch's library and the fused loss.


@pytest.mark.parametrize("mask", MASKS)
def test_all_ways_agree(mask):
    logits, labels = random_logits(2, 4, 5).requires_grad_(), random_labels(mask=mask)
    valid = labels != IGNORE
    per_token = cross_entropy(logits, labels)
    eye = torch.eye(5).double()  # a head of which hidden states are logits
    fused, fused_parts = fused_loss(compute_loss, (logits, eye), labels, weight=valid, chunk=3)
    ways = {
        "lesson": compute_loss(logits, labels)[0],
        "mean of every token": per_token.sum() / valid.sum().clamp(min=1),
        "weighted, without weights": weighted_cross_entropy(logits, labels),
        "fused": fused,
    }
    if mask != "none":
        ways["torch"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    expected = (ways["lesson"], *torch.autograd.grad(ways["lesson"], logits, retain_graph=True))
    for value in ways.values():
        assert value.dtype == torch.float64
        found = (value, *torch.autograd.grad(value, logits, retain_graph=True))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert fused_parts.keys() == {"ce"}
    library = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(per_token, library.view(2, 4))


def test_gradient_against_finite_differences():
    logits = random_logits(1, 3, 4).requires_grad_()
    labels = torch.tensor([[2, IGNORE, 0]])
    assert torch.autograd.gradcheck(lambda z: compute_loss(z, labels)[0], (logits,))


# What must not change it.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 50.0])
def test_what_stands_at_an_ignored_label_does_not_matter(bad):
    logits, labels = random_logits(2, 4, 5), random_labels(mask="some")
    expected = compute_loss(logits, labels)[0]
    logits[labels == IGNORE] = bad
    logits.requires_grad_()
    loss = compute_loss(logits, labels)[0]
    assert torch.equal(loss, expected)
    loss.backward()
    if math.isfinite(bad):  # autograd's 0 * inf is the model's concern: its logits are finite
        assert logits.grad.isfinite().all() and not logits.grad[labels == IGNORE].any()


def test_a_batch_is_the_token_weighted_mean_of_its_rows():
    logits, labels = random_logits(2, 4, 5), random_labels(mask="some")
    counts = (labels != IGNORE).sum(-1)
    rows = [compute_loss(logits[i : i + 1], labels[i : i + 1])[0].item() for i in range(2)]
    whole = compute_loss(logits, labels)[0].item()
    assert counts.tolist() == [2, 3]
    assert whole == pytest.approx((2 * rows[0] + 3 * rows[1]) / 5, rel=1e-12)
    assert compute_loss(logits.flip(0), labels.flip(0))[0].item() == pytest.approx(whole, rel=1e-12)


def test_a_shift_of_all_logits_changes_nothing():
    logits, labels = random_logits(2, 4, 5), random_labels()
    torch.testing.assert_close(compute_loss(logits + 9.0, labels), compute_loss(logits, labels))


def test_tokens_that_are_ruled_out():
    """A logit of -inf is a probability of 0: finite loss and gradient unless it is the label's."""
    logits, labels = random_logits(1, 2, 4), torch.tensor([[1, 2]])
    logits[..., 3] = -math.inf
    expected = compute_loss(logits[..., :3], labels)[0]
    logits.requires_grad_()
    loss = compute_loss(logits, labels)[0]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert logits.grad.isfinite().all()
    assert compute_loss(logits, torch.tensor([[1, 3]]))[0] == math.inf


@pytest.mark.parametrize("loss_of", [compute_loss, weighted_cross_entropy])
def test_no_valid_token_gives_zero_with_a_gradient_path(loss_of):
    logits = random_logits(2, 4, 5).requires_grad_()
    loss = loss_of(logits, random_labels(mask="none"))
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("where", [(0, 0), (1, 3)])
def test_nan_at_a_valid_token_is_not_hidden(where):
    """Run's guard stops a run whose loss is NaN; a loss of 0 it would never see."""
    logits, labels = random_logits(2, 4, 5), random_labels(mask="some")
    logits[(*where, 2)] = math.nan
    assert compute_loss(logits, labels)[0].isnan()
    assert weighted_cross_entropy(logits, labels).isnan()
    # Through the fused loss: a hidden state that is NaN, and a head of one.
    fused = fused_loss(compute_loss, (logits, torch.eye(5).double()), labels, weight=labels != -100)
    assert fused[0].isnan()


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, labels = random_logits(4, 16, 64).to(dtype), random_labels(4, 16, 64)
    library = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    per_token = cross_entropy(logits, labels)
    assert per_token.dtype == torch.float32
    torch.testing.assert_close(per_token.flatten().double(), library, rtol=1e-5, atol=1e-5)
    loss = compute_loss(logits, labels)[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(library.mean().item(), rel=1e-5)


def test_a_label_outside_the_vocabulary_is_an_error():
    """Anything below 0 but -100 is a mistake of the data; gather sees it."""
    for label in (5, -1):
        with pytest.raises(RuntimeError, match="index"):
            cross_entropy(random_logits(1, 1, 5), torch.tensor([[label]]))
