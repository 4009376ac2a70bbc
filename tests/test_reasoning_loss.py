"""Every label of a reasoning trace has the weight that distill/reasoning.py names: cases worked by
hand, and a slow state machine that reads labels one by one, on random sequences."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from distill import reasoning_weights, weighted_cross_entropy

IGNORE, END = -100, 2
THINK, THINK_END, ANSWER, ANSWER_END = 3, 4, 5, 6
TAG, THINKS, ANSWERS = 10.0, 0.5, 2.0  # three weights that cannot be mistaken for 1 or each other


def weights_of(row, **options):
    options = {"tag_weight": TAG, "think_weight": THINKS, "answer_weight": ANSWERS} | options
    return reasoning_weights(torch.tensor([row]), **options)[0].tolist()


# Ordinary tokens are 20 and above.
CASES = {
    "a normal trace after a masked prompt, then padding": (
        [-100, -100, 3, 20, 21, 4, 22, 5, 23, 6, 2, -100, -100],
        [0, 0, 10, 0.5, 0.5, 10, 1, 10, 2, 10, 1, 0, 0],
    ),
    "no tags": ([-100, 20, 21, 2], [0, 1, 1, 1]),
    "only the answer": ([-100, 5, 20, 6, 2], [0, 10, 2, 10, 1]),
    "text before, between and after the spans": (
        [20, 3, 21, 4, 22, 23, 5, 24, 6, 25, 2],
        [1, 10, 0.5, 10, 1, 1, 10, 2, 10, 1, 1],
    ),
    "a tag typed in the masked prompt is no label and opens nothing": (
        # the label of the masked <think> is -100, so what follows the prompt is plain text
        [-100, -100, -100, 20, 21, 2],
        [0, 0, 0, 1, 1, 1],
    ),
    "an unclosed <think> reaches the end of its turn, not the next turn": (
        [-100, 3, 20, 21, 2, -100, -100, 22, 23, 2],
        [0, 10, 0.5, 0.5, 1, 0, 0, 1, 1, 1],
    ),
    "an unclosed <answer> in a turn that was cut": (
        [-100, 5, 20, 21, -100, 22],
        [0, 10, 2, 2, 0, 1],
    ),
    "the end of a turn closes spans even where no prompt is masked after it": (
        [3, 20, 2, 21, 2, 5, 22, 2, 23],
        [10, 0.5, 1, 1, 1, 10, 2, 1, 1],
    ),
    "two turns": (
        [-100, 3, 20, 4, 5, 21, 6, 2, -100, 3, 22, 4, 5, 23, 6, 2],
        [0, 10, 0.5, 10, 10, 2, 10, 1, 0, 10, 0.5, 10, 10, 2, 10, 1],
    ),
    "nested: the span that opened last decides": (
        [3, 20, 5, 21, 6, 22, 4, 23, 2],
        [10, 0.5, 10, 2, 10, 0.5, 10, 1, 1],
    ),
    "nested the other way round": (
        [5, 20, 3, 21, 4, 22, 6, 23, 2],
        [10, 2, 10, 0.5, 10, 2, 10, 1, 1],
    ),
    "crossed: closing the outer span leaves the inner one": (
        [3, 20, 5, 21, 4, 22, 6, 23, 2],
        [10, 0.5, 10, 2, 10, 2, 10, 1, 1],
    ),
    "a closing tag that closes nothing": ([20, 4, 21, 6, 22, 2], [1, 10, 1, 10, 1, 1]),
    "empty spans": ([3, 4, 5, 6, 2], [10, 10, 10, 10, 1]),
    "nothing but padding": ([-100, -100], [0, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_by_hand(name):
    row, expected = CASES[name]
    assert weights_of(row) == expected


def test_default_weights_are_those_of_minimind():
    labels = torch.tensor([[-100, 3, 20, 4, 22, 5, 23, 6, 2]])
    weights = reasoning_weights(labels)
    assert weights.tolist() == [[0, 10, 1, 10, 1, 10, 1, 10, 1]]
    assert weights.dtype == torch.float32


def test_other_token_ids():
    row = [-100, 3, 30, 20, 31, 32, 21, 33, 40, 22]
    weights = weights_of(row, tag_ids=(30, 31, 32, 33), end_of_turn=40)
    assert weights == [0, 1, 10, 0.5, 10, 10, 2, 10, 1, 1]


def slow_weights(row):
    """Read labels one by one; `spans` are those that are open, the one opened last at the end."""
    spans, weights = [], []
    for label in row:
        if label == IGNORE:
            spans, weight = [], 0.0
        elif label == END:
            spans, weight = [], 1.0
        elif label in (THINK, ANSWER):
            spans = [span for span in spans if span != label] + [label]
            weight = TAG
        elif label in (THINK_END, ANSWER_END):
            spans = [span for span in spans if span != label - 1]
            weight = TAG
        else:
            weight = {THINK: THINKS, ANSWER: ANSWERS}[spans[-1]] if spans else 1.0
        weights.append(weight)
    return weights


def test_random_sequences_against_a_slow_state_machine():
    draw = random.Random(0)
    rows = [draw.choices((IGNORE, END, 3, 4, 5, 6, 20, 21), k=40) for _ in range(300)]
    tags_rare = [
        draw.choices((IGNORE, END, 3, 4, 5, 6, 20), (1, 1, 1, 1, 1, 1, 14), k=40)
        for _ in range(300)
    ]
    labels = torch.tensor(rows + tags_rare)
    got = reasoning_weights(labels, TAG, THINKS, ANSWERS)
    assert got.tolist() == [slow_weights(row) for row in labels.tolist()]


@pytest.mark.parametrize("name", ["tag_weight", "think_weight", "answer_weight"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} "):
        reasoning_weights(torch.tensor([[3, 20, 4]]), **{name: value})


def test_zero_weights_are_allowed():
    assert weights_of([3, 20, 4, 21], tag_weight=0.0) == [0, 0.5, 0, 1]


# The loss.


def random_batch(B=3, S=8, V=11):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(B, S, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (B, S), generator=generator)
    labels[0, 5:] = labels[1, :3] = IGNORE
    return logits, labels


def test_without_weights_it_is_the_library_cross_entropy():
    logits, labels = random_batch()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    assert weighted_cross_entropy(logits, labels).item() == pytest.approx(expected.item())


def test_weighted_mean_by_hand():
    """CE is ln 2, ln 4 and ln 8, weights are 1, 10 and 4: (ln 2 + 10 ln 4 + 4 ln 8) / 15."""
    probabilities = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [0.125, 0.875]]])
    labels, weights = torch.tensor([[0, 0, 0]]), torch.tensor([[1.0, 10.0, 4.0]])
    loss = weighted_cross_entropy(probabilities.double().log(), labels, weights)
    assert loss.item() == pytest.approx((1 + 20 + 12) / 15 * math.log(2))


def test_weighted_loss_and_gradient_against_the_formula():
    logits, labels = random_batch()
    logits.requires_grad_()
    weights = reasoning_weights(labels, TAG, THINKS, ANSWERS)
    loss = weighted_cross_entropy(logits, labels, weights)
    loss.backward()
    per_token = F.cross_entropy(
        logits.detach().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE
    )
    expected = (weights.flatten() * per_token).sum() / weights.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    # d loss / d z = w / sum(w) * (softmax(z) - one hot)
    one_hot = F.one_hot(labels.clamp(min=0), 11).double()
    expected = (weights / weights.sum())[..., None] * (logits.detach().softmax(-1) - one_hot)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-9)


def test_an_ignored_label_counts_nothing_whatever_its_weight():
    logits, labels = random_batch()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    loss = weighted_cross_entropy(logits, labels, torch.full(labels.shape, 7.0))
    assert loss.item() == pytest.approx(expected.item())


def test_the_scale_of_the_weights_cancels():
    logits, labels = random_batch()
    weights = reasoning_weights(labels, TAG, THINKS, ANSWERS)
    small, large = (weighted_cross_entropy(logits, labels, s * weights) for s in (0.01, 100.0))
    assert small.item() == pytest.approx(large.item(), rel=1e-6)


@pytest.mark.parametrize("row", [[20, 21, 22, 2], [3, 20, 4, 2], [3, 4, 5, 6], [-100, 3, -100, 6]])
def test_the_size_of_the_loss_does_not_follow_how_many_tags_there_are(row):
    """Every token costs ln 32 under uniform logits, so every weighted mean is ln 32."""
    labels = torch.tensor([row])
    loss = weighted_cross_entropy(torch.zeros(1, 4, 32), labels, reasoning_weights(labels))
    assert loss.item() == pytest.approx(math.log(32))


@pytest.mark.parametrize("weights", [None, torch.zeros(3, 8)])
def test_nothing_to_learn_gives_zero_with_a_gradient_path(weights):
    logits, labels = random_batch()
    logits.requires_grad_()
    if weights is None:
        labels.fill_(IGNORE)
    loss = weighted_cross_entropy(logits, labels, weights)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
