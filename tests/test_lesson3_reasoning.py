"""Lesson 3: sum(w * CE) / sum(w). First which weight every label of a trace has, by hand and with
a slow state machine; then the loss made of them, by hand, against the formula, torch's library,
distill's functions and the fused loss, and against everything that must not change it."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

import train_distillation
from distill import (
    cross_entropy,
    fused_loss,
    kl_divergence,
    reasoning_weights,
    weighted_cross_entropy,
    weighted_mean,
)
from tests.explain import check
from train_distill_reason import compute_loss

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


def test_every_word_counts_alike_unless_told_otherwise():
    """--tag_weight 10 is MiniMind's; by default only the prompt is left out."""
    labels = torch.tensor([[-100, 3, 20, 4, 22, 5, 23, 6, 2]])
    assert reasoning_weights(labels).tolist() == [[0, 1, 1, 1, 1, 1, 1, 1, 1]]
    weights = reasoning_weights(labels, tag_weight=10)
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


# The loss: tokens with a label, (N, V) logits and (N,) labels and weights.

LN = math.log
TEMPERATURES = [0.5, 1.0, 4.0]
ALPHAS = [0.0, 0.3, 1.0]
MASKS = {  # weights of six tokens
    "all": (1.0, 10.0, 0.5, 2.0, 10.0, 1.0),
    "some": (0.0, 10.0, 0.0, 2.0, 0.3, 0.0),
    "none": (0.0,) * 6,
}


def tokens(N=6, V=5):
    """Logits of both models and labels of N tokens."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, N, V, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(V, (N,), generator=generator)


def weights_named(mask):
    return torch.tensor(MASKS[mask], dtype=torch.float64)


def test_weighted_mean_by_hand():
    """CE is ln 2, ln 4 and ln 8, weights are 1, 10 and 4: (ln 2 + 10 ln 4 + 4 ln 8) / 15."""
    logits = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.125, 0.875]]).double().log()
    labels, weights = torch.tensor([0, 0, 0]), torch.tensor([1.0, 10.0, 4.0]).double()
    expected = (1 + 20 + 12) / 15 * LN(2)
    loss, parts = compute_loss(logits, None, labels, weights)
    mistakes = {
        "divided by the number of tokens, 3, not by the sum of the weights, 15": 11 * LN(2),
        "not divided by the sum of the weights": 33 * LN(2),
        "every token weighs 1: the weights are left out": 2 * LN(2),
        "the weights are squared": (1 + 200 + 48) / 15 * LN(2),
    }
    whole = weighted_cross_entropy(logits[None], labels[None], weights[None])
    for value in (loss, parts["ce"], whole):
        check(value, expected, mistakes)


def test_with_a_teacher_by_hand():
    """Students of 1/2, 1/2, a teacher of 3/4, 1/4 and of 1/2, 1/2; weights 10 and 1; label 0.
    CE = ln 2 of both; KL = 10/11 of the first token's, as the second's is 0."""
    student = torch.zeros(2, 2, dtype=torch.float64)
    teacher = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).double().log()
    weights = torch.tensor([10.0, 1.0]).double()
    loss, parts = compute_loss(student, teacher, torch.tensor([0, 0]), weights, 1.0, 0.4)
    kl = 10 / 11 * (0.75 * LN(1.5) + 0.25 * LN(0.5))
    assert parts["ce"].item() == pytest.approx(LN(2), rel=1e-12)
    assert parts["kl"].item() == pytest.approx(kl, rel=1e-12)
    mistakes = {
        "alpha sits on the KL: it belongs to the cross-entropy": 0.6 * LN(2) + 0.4 * kl,
        "the KL is not weighted like the words of the trace": 0.4 * LN(2) + 0.6 * kl * 11 / 20,
        "the KL is missing": 0.4 * LN(2),
    }
    check(loss, 0.4 * LN(2) + 0.6 * kl, mistakes)


def test_gradient_by_hand():
    """w / sum(w) * (q - one hot): 3/4 and 1/4 of (-1/2, 1/2)."""
    student = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([3.0, 1.0]).double()
    compute_loss(student, None, torch.tensor([0, 0]), weights)[0].backward()
    assert student.grad.tolist() == [[-0.375, 0.375], [-0.125, 0.125]]


def slow_loss(student, teacher, labels, weights, temperature, alpha):
    total = 0.0
    for z, y, label, weight in zip(*(x.tolist() for x in (student, teacher, labels, weights)),
                                   strict=True):  # fmt: skip
        ce = LN(sum(math.exp(v) for v in z)) - z[label]
        p, q = ([math.exp(v / temperature) for v in row] for row in (y, z))
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        kl = sum(a * LN(a / b) for a, b in zip(p, q, strict=True))
        total += weight * (alpha * ce + (1 - alpha) * temperature**2 * kl)
    return total / (sum(weights.tolist()) or 1.0)


def by_chunks(student, teacher, labels, weights, temperature, alpha, chunk=4):
    rest = (student, teacher, labels, weights, temperature, alpha)
    return fused_loss(compute_loss, *rest, weight=weights, chunk=chunk)


def ways(student, teacher, labels, weights, temperature, alpha):
    """The lesson, distill's functions, and the fused loss where a head can give these logits."""
    ce = weighted_cross_entropy(student[None], labels[None], weights[None])
    kl = weighted_mean(kl_divergence(student, teacher, temperature), weights)
    kd = (1 - alpha) * temperature**2 * kl
    eye = torch.eye(student.shape[-1], dtype=student.dtype)
    yield compute_loss(student, teacher, labels, weights, temperature, alpha)[0]
    yield (alpha * ce if alpha > 0 else 0.0) + (kd if alpha < 1 else 0.0)
    if student.isfinite().all() and teacher.isfinite().all():
        yield by_chunks((student, eye), (teacher, eye), labels, weights, temperature, alpha)[0]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_all_ways_agree(mask, temperature, alpha):
    student, teacher, labels = tokens()
    weights = weights_named(mask)
    expected = slow_loss(student, teacher, labels, weights, temperature, alpha)
    student.requires_grad_()
    losses = list(ways(student, teacher, labels, weights, temperature, alpha))
    assert len(losses) == 3
    grads = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses]
    for loss, grad in zip(losses, grads, strict=True):
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        torch.testing.assert_close(grad, grads[0], rtol=0, atol=1e-9)
    # w / sum(w) * (alpha * (q - one hot) + (1 - alpha) * T * (q_T - p_T))
    z = student.detach()
    pull = alpha * (z.softmax(-1) - F.one_hot(labels, 5))
    pull += (1 - alpha) * temperature * (
        (z / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    )  # fmt: skip
    share = weights / max(weights.sum().item(), 1.0)
    torch.testing.assert_close(grads[0], share[:, None] * pull, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_through_heads_the_gradients_agree_too(mask, temperature, alpha):
    """hidden (N, D) and head (V, D) of the student; the teacher has another width."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((6, 3), (5, 3), (6, 7), (5, 7))
    hidden, head, *teacher = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes
    )
    inputs = hidden.requires_grad_(), head.requires_grad_()
    labels, weights = tokens()[2], weights_named(mask)
    plain = compute_loss(
        hidden @ head.T, teacher[0] @ teacher[1].T, labels, weights, temperature, alpha
    )
    fused = by_chunks((hidden, head), tuple(teacher), labels, weights, temperature, alpha)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-9)
    found = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss, _ in (plain, fused))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_tokens_that_are_ruled_out(both, mask, temperature, alpha):
    """-inf for the teacher where the student is finite, or for both; never for the label."""
    student, teacher, labels = tokens()
    weights = weights_named(mask)
    out = torch.rand(6, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    out = out.scatter(-1, labels[:, None], False)
    teacher = teacher.masked_fill(out, -math.inf)
    student = student.masked_fill(out, -math.inf) if both else student
    near = student.clamp(min=-1e5).requires_grad_()
    expected = compute_loss(near, teacher.clamp(min=-1e5), labels, weights, temperature, alpha)[0]
    expected_grad = torch.autograd.grad(expected, near)[0]
    student.requires_grad_()
    for loss in ways(student, teacher, labels, weights, temperature, alpha):
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        grad = torch.autograd.grad(loss, student)[0]
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-9)  # so it is finite


@pytest.mark.parametrize("alpha, names", [(0.0, {"kl"}), (0.3, {"ce", "kl"}), (1.0, {"ce"})])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("mask", MASKS)
def test_parts_have_no_factors_and_make_up_the_loss(alpha, names, temperature, mask):
    student, teacher, labels = tokens()
    weights = weights_named(mask)
    expected = {
        "ce": weighted_mean(cross_entropy(student, labels), weights),
        "kl": weighted_mean(kl_divergence(student, teacher, temperature), weights),
    }
    loss, parts = compute_loss(student, teacher, labels, weights, temperature, alpha)
    assert parts.keys() == names
    for name, value in parts.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=1e-9, abs=1e-12)
    factors = {"ce": alpha, "kl": (1 - alpha) * temperature**2}
    total = sum(factors[name] * value.item() for name, value in parts.items())
    assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_with_weights_of_one_it_is_lesson_2(alpha):
    student, teacher, labels = tokens()
    ours = compute_loss(student, teacher, labels, torch.ones(6), 2.0, alpha)
    whole = train_distillation.compute_loss(student[None], teacher[None], labels[None], 2.0, alpha)
    torch.testing.assert_close(ours, whole)


def test_without_weights_it_is_the_library_cross_entropy():
    student, _, labels = tokens()
    labels[2:4] = IGNORE
    library = F.cross_entropy(student, labels).item()
    for weights in (None, torch.full((6,), 7.0)):  # a label of -100 counts 0 whatever they say
        assert weighted_cross_entropy(student, labels, weights).item() == pytest.approx(library)
    chosen = labels != IGNORE
    loss, _ = compute_loss(student[chosen], None, labels[chosen], torch.ones(4))
    assert loss.item() == pytest.approx(library)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_scale_of_the_weights_cancels(alpha):
    """Also where they sum to less than 1."""
    student, teacher, labels = tokens()
    small, large = (
        list(ways(student, teacher, labels, scale * weights_named("some"), 2.0, alpha))
        for scale in (0.01, 100.0)
    )
    torch.testing.assert_close(small, large, rtol=1e-6, atol=0)


@pytest.mark.parametrize("row", [[20, 21, 22, 2], [3, 20, 4, 2], [3, 4, 5, 6], [-100, 3, -100, 6]])
def test_the_size_of_the_loss_does_not_follow_how_many_tags_there_are(row):
    """Every token costs ln 32 under uniform logits, so every weighted mean is ln 32."""
    labels = torch.tensor([row])
    weights = reasoning_weights(labels)
    loss = weighted_cross_entropy(torch.zeros(1, 4, 32), labels, weights)
    assert loss.item() == pytest.approx(LN(32))
    chosen = labels != IGNORE
    rows = torch.zeros(int(chosen.sum()), 32)
    assert compute_loss(rows, None, labels[chosen], weights[chosen])[0].item() == pytest.approx(
        LN(32)
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_batch_is_the_mean_of_its_pieces_weighted_by_their_weights(alpha):
    """What run.step(loss, weight=weights.sum()) relies on."""
    student, teacher, labels = tokens()
    weights = weights_named("all")

    def loss(rows):
        return compute_loss(student[rows], teacher[rows], labels[rows], weights[rows], 2.0, alpha)[
            0
        ]

    pieces = (slice(0, 2), slice(2, 3), slice(3, 6))
    total = sum(weights[rows].sum() * loss(rows) for rows in pieces) / weights.sum()
    torch.testing.assert_close(loss(slice(0, 6)), total)
    torch.testing.assert_close(loss([4, 0, 5, 2, 3, 1]), total)  # nor does their order matter


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_what_stands_at_a_weight_of_0_does_not_matter(bad, alpha):
    student, teacher, labels = tokens()
    weights = weights_named("some")
    expected = compute_loss(student, teacher, labels, weights, 2.0, alpha)[0]
    student[weights == 0] = teacher[weights == 0] = bad
    for loss in list(ways(student, teacher, labels, weights, 2.0, alpha)):
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("many", [1, 5])
def test_nan_at_a_token_that_counts_is_not_hidden(alpha, whose, many):
    student, teacher, labels = tokens()
    weights = weights_named("some")
    (student if whose == "student" else teacher)[3, :many] = math.nan
    heard = whose == "student" or alpha < 1  # at alpha 1 nobody listens to the teacher
    eye = torch.eye(5).double()
    losses = [
        *ways(student, teacher, labels, weights, 2.0, alpha),
        by_chunks((student, eye), (teacher, eye), labels, weights, 2.0, alpha, chunk=None)[0],
    ]
    assert [bool(loss.isnan()) for loss in losses] == [heard] * 3


@pytest.mark.parametrize("alpha", ALPHAS)
def test_nothing_to_learn_gives_zero_with_a_gradient_path(alpha):
    """Weights that are all 0, and (of a whole batch) labels that are all ignored."""
    student, teacher, labels = tokens()
    student.requires_grad_()
    losses = list(ways(student, teacher, labels, weights_named("none"), 2.0, alpha))
    losses.append(weighted_cross_entropy(student, torch.full((6,), IGNORE)))
    for loss in losses:
        assert loss.item() == 0.0
        grad = torch.autograd.grad(loss, student, retain_graph=True)[0]
        assert torch.equal(grad, torch.zeros_like(student))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_equal_distributions_give_no_kl_and_the_teacher_no_gradient(alpha):
    student, _, labels = tokens()
    student.requires_grad_()
    teacher = (student.detach() + 3.0).requires_grad_()
    loss, parts = compute_loss(student, teacher, labels, weights_named("all"), 2.0, alpha)
    loss.backward()
    assert parts["kl"].item() == pytest.approx(0.0, abs=1e-12)
    assert teacher.grad is None
    assert (student.grad.abs().max() < 1e-12) == (alpha == 0)


def test_gradient_against_finite_differences():
    student, teacher, labels = tokens(3, 4)
    weights = torch.tensor([10.0, 0.0, 0.5]).double()
    assert torch.autograd.gradcheck(
        lambda logits: compute_loss(logits, teacher, labels, weights, 2.0, 0.3)[0],
        (student.requires_grad_(),),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    student, teacher, labels = tokens(64, 32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    weights = torch.linspace(0, 10, 64)
    loss = compute_loss(student, teacher, labels, weights, 2.0, 0.3)[0]
    exact = compute_loss(student.double(), teacher.double(), labels, weights, 2.0, 0.3)[0]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
