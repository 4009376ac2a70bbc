"""Lesson 2: alpha * CE + (1 - alpha) * T^2 * KL(teacher || student). The KL worked by hand first,
then the whole loss held against plain Python, torch's library, distill's functions and the fused
loss, and against everything that must not change it."""

import math

import pytest
import torch
import torch.nn.functional as F

from distill import cross_entropy, distillation_loss, fused_loss, kl_divergence, weighted_mean
from model import ModelConfig, Transformer
from tests.explain import check, explain
from train_distillation import compute_loss

IGNORE = -100
LN = math.log
ROOT3 = math.sqrt(3)
MASKS = ["all", "some", "none"]
TEMPERATURES = [0.5, 1.0, 4.0]
ALPHAS = [0.0, 0.3, 1.0]
WAYS = {  # two functions of (student, teacher, temperature) that are T^2 * KL
    "distill": lambda student, teacher, T: distillation_loss(student, teacher, temperature=T),
    "lesson": lambda student, teacher, T: compute_loss(
        student, teacher, torch.zeros(student.shape[:2], dtype=torch.long), T, 0.0
    )[0],
}


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


def pair(B=2, S=4, V=5):
    """Student's and teacher's logits."""
    return random_logits(B, S, V, seed=1), random_logits(B, S, V, seed=2)


def logits_of(*probabilities):
    """(1, 1, V) logits whose softmax is `probabilities`, shifted: a softmax ignores a shift."""
    return torch.tensor([[[LN(p) for p in probabilities]]], dtype=torch.float64) + 3.0


def slow_kl(student_logits, teacher_logits, temperature):
    """KL(teacher || student) of two lists of V logits, in Python floats."""
    student = [math.exp(z / temperature) for z in student_logits]
    teacher = [math.exp(z / temperature) for z in teacher_logits]
    student = [value / sum(student) for value in student]
    teacher = [value / sum(teacher) for value in teacher]
    return sum(p * LN(p / q) for p, q in zip(teacher, student, strict=True))


# By hand.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "teacher, student, temperature, expected",
    [
        # 3/4 ln(3/4 : 1/2) + 1/4 ln(1/4 : 1/2)
        ((0.75, 0.25), (0.5, 0.5), 1.0, 0.75 * LN(1.5) + 0.25 * LN(0.5)),
        # The other direction is another number: 1/2 ln(1/2 : 3/4) + 1/2 ln(1/2 : 1/4)
        ((0.5, 0.5), (0.75, 0.25), 1.0, 0.5 * LN(2 / 3) + 0.5 * LN(2)),
        # T = 2 takes the roots: 3 : 1 becomes sqrt(3) : 1; then times T^2 = 4
        (
            (0.75, 0.25),
            (0.5, 0.5),
            2.0,
            4 * (ROOT3 * LN(2 * ROOT3 / (1 + ROOT3)) + LN(2 / (1 + ROOT3))) / (1 + ROOT3),
        ),
        # T = 1/2 squares: 3 : 1 becomes 9 : 1; then times 1/4
        ((0.75, 0.25), (0.5, 0.5), 0.5, 0.25 * (0.9 * LN(1.8) + 0.1 * LN(0.2))),
        # 1/8 ln(1/8 : 1/2) + 1/4 ln 1 + 5/8 ln(5/8 : 1/4)
        ((0.125, 0.25, 0.625), (0.5, 0.25, 0.25), 1.0, 0.125 * LN(0.25) + 0.625 * LN(2.5)),
    ],
)
def test_values_worked_by_hand(way, teacher, student, temperature, expected):
    student, teacher = logits_of(*student), logits_of(*teacher)
    loss = WAYS[way](student, teacher, temperature)
    assert loss.shape == (), "a loss is one number: the mean over tokens is missing"
    check(loss, expected, mistakes_of(student, teacher, temperature))


def mistakes_of(student, teacher, temperature) -> dict[str, float]:
    """Of one token: T^2 * KL written wrongly, and the value that this gives."""
    T, z, y = temperature, student[0, 0].tolist(), teacher[0, 0].tolist()
    right = T**2 * slow_kl(z, y, T)
    return {
        f"at T = {T:g}: T^2 is missing": right / T**2,
        f"at T = {T:g}: T stands where T^2 should": right / T,
        f"at T = {T:g}: T^2 is there twice": right * T**2,
        "KL(student || teacher): the two are swapped": T**2 * slow_kl(y, z, T),
        "KL(student || teacher), and T^2 is missing": slow_kl(y, z, T),
        "neither is divided by T": T**2 * slow_kl(z, y, 1.0),
        "the student is not divided by T": T**2 * slow_kl([v * T for v in z], y, T),
        "the teacher is not divided by T": T**2 * slow_kl(z, [v * T for v in y], T),
        "the mean is over the V tokens of the vocabulary, not their sum": right / len(z),
        "the sign is wrong": -right,
    }


@pytest.mark.parametrize("wrong, said", [
    (lambda right, T: right / T**2, "exactly 1/4 of the expected value: at T = 2: T^2 is missing"),
    (lambda right, T: right / T, "exactly 1/2 of the expected value: at T = 2: T stands where T^2"),
    (lambda right, T: 1.01 * right, "exactly 101/100 of the expected value: no mistake that is"),
])  # fmt: skip
def test_a_broken_loss_says_what_is_wrong_with_it(wrong, said):
    student, teacher = logits_of(0.5, 0.5), logits_of(0.75, 0.25)
    expected = distillation_loss(student, teacher, temperature=2.0).item()
    sentence = explain(wrong(expected, 2.0), expected, mistakes_of(student, teacher, 2.0))
    assert sentence.startswith(said)
    with pytest.raises(AssertionError, match=said.replace("^", r"\^")):
        check(wrong(expected, 2.0), expected, mistakes_of(student, teacher, 2.0))


def test_the_whole_loss_worked_by_hand():
    """Student 1/2, 1/2; teacher 3/4, 1/4; label 0: CE = ln 2, KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    student, teacher = logits_of(0.5, 0.5), logits_of(0.75, 0.25)
    loss, parts = compute_loss(student, teacher, torch.tensor([[0]]), 1.0, 0.3)
    kl = 0.75 * LN(1.5) + 0.25 * LN(0.5)
    assert parts["ce"].item() == pytest.approx(LN(2), rel=1e-12)
    assert parts["kl"].item() == pytest.approx(kl, rel=1e-12)
    mistakes = {
        "alpha sits on the KL: it belongs to the cross-entropy": 0.7 * LN(2) + 0.3 * kl,
        "the KL is not weighted by 1 - alpha": 0.3 * LN(2) + kl,
        "the cross-entropy is not weighted by alpha": LN(2) + 0.7 * kl,
        "the KL is missing": 0.3 * LN(2),
    }
    check(loss, 0.3 * LN(2) + 0.7 * kl, mistakes)


def test_gradient_worked_by_hand():
    """CE pulls by q - one hot, KL by q - p: 0.4 (-1/2, 1/2) + 0.6 (-1/4, 1/4), over 2 tokens."""
    student = logits_of(0.5, 0.5).repeat(1, 2, 1).requires_grad_()
    teacher = logits_of(0.75, 0.25).repeat(1, 2, 1)
    compute_loss(student, teacher, torch.tensor([[0, 0]]), 1.0, 0.4)[0].backward()
    expected = torch.tensor([-0.175, 0.175], dtype=torch.float64).expand(1, 2, 2)
    said = "0.4 (q - one hot) + 0.6 (q - p), over 2 tokens; gradients stop at the teacher"
    torch.testing.assert_close(student.grad, expected, msg=lambda text: f"{said}\n{text}")


# Against slow Python and the library.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equals_a_slow_implementation_and_torch(way, temperature):
    student, teacher = pair(2, 3, 5)
    loss = WAYS[way](student, teacher, temperature).item()
    slow = [
        slow_kl(student[b, s].tolist(), teacher[b, s].tolist(), temperature)
        for b in range(2)
        for s in range(3)
    ]
    T, total = temperature, sum(slow)
    mistakes = {
        f"at T = {T:g}: T^2 is missing": total / 6,
        'divided by B, not by the tokens: reduction="batchmean" on (B, S, V)': T**2 * total / 2,
        'divided by B * S * V: reduction="mean" of F.kl_div': T**2 * total / 30,
        "a sum over tokens: the mean is missing": T**2 * total,
    }
    check(loss, T**2 * total / 6, mistakes)
    library = F.kl_div(
        (student / temperature).log_softmax(-1).flatten(0, 1),
        (teacher / temperature).log_softmax(-1).flatten(0, 1),
        reduction="batchmean",  # a per-token mean on (N, V)
        log_target=True,
    )
    assert loss == pytest.approx(temperature**2 * library.item(), rel=1e-12)


def test_the_kl_of_every_token_has_no_temperature_factor():
    student, teacher = pair(2, 3, 5)
    per_token = kl_divergence(student, teacher, 3.0)
    assert per_token.shape == (2, 3)
    assert per_token[1, 2].item() == pytest.approx(
        slow_kl(student[1, 2].tolist(), teacher[1, 2].tolist(), 3.0), rel=1e-12
    )


def test_without_more_it_is_the_mean_over_all_tokens_at_temperature_1():
    student, teacher = pair(2, 3, 5)
    expected = kl_divergence(student, teacher, 1.0).mean()
    assert distillation_loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weights", [[True, False, True], [1.0, 0.0, 1.0]], ids=["mask", "weights"])
def test_a_value_that_is_not_finite_under_a_false_mask_is_not_read(bad, weights):
    """0 * nan is nan: a mask must choose (torch.where), a product with it is not enough."""
    said = "the mask is multiplied in: 0 * nan is nan, so it must choose (torch.where)"
    values = torch.tensor([2.0, bad, 4.0], dtype=torch.float64, requires_grad=True)
    mean = weighted_mean(values, torch.tensor(weights))
    assert mean.item() == 3.0, said  # (2 + 4) / 2
    assert torch.autograd.grad(mean, values)[0].tolist() == [0.5, 0.0, 0.5]
    nothing = weighted_mean(values, torch.tensor(weights) * 0)
    assert nothing.item() == 0.0, f"nothing counts, so the mean is 0; {said}"


def test_a_mask_picks_tokens_and_weights_make_a_weighted_mean():
    student, teacher = pair(1, 3, 5)
    kl = [slow_kl(student[0, s].tolist(), teacher[0, s].tolist(), 2.0) for s in range(3)]
    chosen = distillation_loss(student, teacher, torch.tensor([[True, False, True]]), 2.0)
    mistakes = {
        "the mean is over all tokens, also those that the mask leaves out": 4 * (kl[0] + kl[2]) / 3,
        "the mask is not read": 4 * sum(kl) / 3,
        "the mask is upside down": 4 * kl[1],
    }
    check(chosen, 4 * (kl[0] + kl[2]) / 2, mistakes)
    weighted = distillation_loss(student, teacher, torch.tensor([[1.0, 0.0, 10.0]]), 2.0)
    mistakes = {
        "divided by the number of tokens, not by the sum of the weights": 4
        * (kl[0] + 10 * kl[2])
        / 3,
        "weights are read as a mask": 4 * (kl[0] + kl[2]) / 2,
    }
    check(weighted, 4 * (kl[0] + 10 * kl[2]) / 11, mistakes)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_alpha_ce_plus_the_rest_kl(alpha, temperature):
    student, teacher = pair()
    labels = random_labels()
    labels[0, 2:] = IGNORE  # 6 of 8 tokens are valid, for both halves
    valid = [(b, s) for b in range(2) for s in range(4) if labels[b, s] != IGNORE]
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten()).item()
    kl = [slow_kl(student[at].tolist(), teacher[at].tolist(), temperature) for at in valid]
    expected = alpha * ce + (1 - alpha) * temperature**2 * sum(kl) / 6
    loss, _ = compute_loss(student, teacher, labels, temperature, alpha)
    T, mean = temperature, sum(kl) / 6
    mistakes = {
        "alpha sits on the KL": (1 - alpha) * ce + alpha * T**2 * mean,
        "T^2 is missing": alpha * ce + (1 - alpha) * mean,
        "T^2 scales the cross-entropy too": T**2 * (alpha * ce + (1 - alpha) * mean),
        "the KL's mean is over all 8 tokens": alpha * ce + (1 - alpha) * T**2 * mean * 6 / 8,
    }
    check(loss, expected, mistakes, rel=1e-9)


# The parts that are logged.


@pytest.mark.parametrize("alpha, names", [(0.0, {"kl"}), (0.3, {"ce", "kl"}), (1.0, {"ce"})])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("mask", MASKS)
def test_parts_have_no_factors_and_make_up_the_loss(alpha, names, temperature, mask):
    student, teacher = pair()
    labels = random_labels(mask=mask)
    valid = labels != IGNORE
    expected = {
        "ce": weighted_mean(cross_entropy(student, labels), valid),
        "kl": weighted_mean(kl_divergence(student, teacher, temperature), valid),
    }
    factors = {"ce": alpha, "kl": (1 - alpha) * temperature**2}
    eye = torch.eye(5).double()  # a head of which hidden states are logits
    fused = by_chunks((student, eye), (teacher, eye), labels, temperature, alpha)
    for loss, parts in (compute_loss(student, teacher, labels, temperature, alpha), fused):
        assert parts.keys() == names
        for name, value in parts.items():
            assert value.item() == pytest.approx(expected[name].item(), rel=1e-9, abs=1e-12)
        total = sum(factors[name] * value.item() for name, value in parts.items())
        assert loss.item() == pytest.approx(total, rel=1e-9, abs=1e-12)


def test_alpha_one_needs_no_teacher_and_alpha_zero_reads_no_label():
    student, teacher = pair()
    labels = random_labels(mask="some")
    loss, parts = compute_loss(student, None, labels, 2.0, 1.0)
    library = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    assert loss.item() == parts["ce"].item() == pytest.approx(library.item())
    others = torch.where(labels == IGNORE, labels, (labels + 1) % 5)
    first, second = (compute_loss(student, teacher, x, 2.0, 0.0)[0] for x in (labels, others))
    assert torch.equal(first, second)


# Three ways to one value and one gradient: the lesson, distill's functions and the fused loss.


def by_chunks(student, teacher, labels, temperature, alpha, chunk=None):
    rest = (student, teacher, labels, temperature, alpha)
    return fused_loss(compute_loss, *rest, weight=labels != IGNORE, chunk=chunk)


def ways(student, teacher, labels, temperature, alpha):
    valid = labels != IGNORE
    ce = weighted_mean(cross_entropy(student, labels), valid)
    kd = distillation_loss(student, teacher, valid, temperature)
    eye = torch.eye(student.shape[-1], dtype=student.dtype)
    yield compute_loss(student, teacher, labels, temperature, alpha)[0]
    yield (alpha * ce if alpha > 0 else 0.0) + ((1 - alpha) * kd if alpha < 1 else 0.0)
    if student.isfinite().all() and teacher.isfinite().all():  # a head gives no infinite logit
        yield by_chunks((student, eye), (teacher, eye), labels, temperature, alpha, chunk=3)[0]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_all_ways_agree(mask, temperature, alpha):
    student, teacher = pair()
    student.requires_grad_()
    losses = list(ways(student, teacher, random_labels(mask=mask), temperature, alpha))
    assert len(losses) == 3
    grads = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses]
    for loss, grad in zip(losses, grads, strict=True):
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(grad, grads[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_through_heads_the_gradients_agree_too(mask, temperature, alpha):
    """hidden (B, S, D) and head (V, D) of the student; the teacher has another width."""
    hidden, head = random_logits(2, 4, 3, seed=3), random_logits(5, 3, seed=4)
    inputs = hidden.requires_grad_(), head.requires_grad_()
    teacher = random_logits(2, 4, 7, seed=5), random_logits(5, 7, seed=6, scale=0.5)
    labels = random_labels(mask=mask)
    plain = compute_loss(hidden @ head.T, teacher[0] @ teacher[1].T, labels, temperature, alpha)
    guess = teacher if alpha < 1 else None
    fused = by_chunks((hidden, head), guess, labels, temperature, alpha)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-9)
    found = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss, _ in (plain, fused))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


def ruled_out(kind, student, teacher, labels):
    """Put -inf into the logits where no label is."""
    V = student.shape[-1]
    out = torch.rand(student.shape, generator=torch.Generator().manual_seed(9)) < 0.5
    out = out.scatter(-1, labels.clamp(min=0)[..., None], False)
    if kind == "teacher":  # the student's logits stay finite
        return student, teacher.masked_fill(out, -math.inf)
    if kind == "one-hot teacher":
        return student, teacher.masked_fill(torch.arange(V) != 2, -math.inf)
    return student.masked_fill(out, -math.inf), teacher.masked_fill(out, -math.inf)


@pytest.mark.parametrize("kind", ["teacher", "one-hot teacher", "both"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_tokens_that_are_ruled_out(kind, mask, temperature, alpha):
    """0 log 0 = 0: values and gradients stay finite, are equal every way, and are those of a
    logit of -1e5 instead of -inf."""
    labels = random_labels(mask=mask)
    student, teacher = ruled_out(kind, *pair(), labels)
    student.requires_grad_()
    near = (student.detach().clamp(min=-1e5).requires_grad_(), teacher.clamp(min=-1e5))
    expected = compute_loss(*near, labels, temperature, alpha)[0]
    expected_grad = torch.autograd.grad(expected, near[0])[0]
    for loss in ways(student, teacher, labels, temperature, alpha):
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        grad = torch.autograd.grad(loss, student)[0]
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-9)


def test_a_token_that_only_the_student_rules_out_costs_infinitely_much():
    student, teacher = pair(1, 1, 5)
    student[..., 3] = -math.inf
    labels = torch.tensor([[0]])
    assert compute_loss(student, teacher, labels, 1.0, 0.5)[0] == math.inf
    assert distillation_loss(student, teacher) == math.inf


# Properties that the bugs of other projects would have failed.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
def test_equal_distributions_give_zero(way, temperature):
    teacher = random_logits(2, 3, 5).float()
    student = teacher.clone().requires_grad_()
    loss = WAYS[way](student, teacher, temperature)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert student.grad.abs().max() < 1e-6
    assert abs(WAYS[way](student + 7.0, teacher, temperature).item()) < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_swapping_teacher_and_student_is_another_loss(way):
    student, teacher = pair()
    there, back = WAYS[way](student, teacher, 1.0), WAYS[way](teacher, student, 1.0)
    assert abs(there.item() - back.item()) > 0.05


@pytest.mark.parametrize("temperature", [0.7, 1.0, 5.0])
def test_gradient_is_t_times_the_difference_of_probabilities(temperature):
    student, teacher = pair()
    student.requires_grad_()
    labels = random_labels(mask="some")  # 5 tokens
    difference = (student.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    expected = temperature * difference * (labels != IGNORE)[..., None] / 5
    for loss in (
        compute_loss(student, teacher, labels, temperature, 0.0)[0],
        distillation_loss(student, teacher, labels != IGNORE, temperature),
    ):
        grad = torch.autograd.grad(loss, student)[0]
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("way", WAYS)
def test_large_temperature_limit(way):
    """T^2 KL -> (1 / 2V) * sum_v (dz_v - mean dz)^2: matching logits, up to a shift."""
    student, teacher = random_logits(2, 3, 7, seed=3), random_logits(2, 3, 7, seed=4)
    difference = student - teacher
    centred = difference - difference.mean(-1, keepdim=True)
    limit = centred.pow(2).sum(-1).mean() / (2 * 7)
    assert WAYS[way](student, teacher, 1e4).item() == pytest.approx(limit.item(), rel=1e-3)


def test_gradient_against_finite_differences():
    student, teacher = pair(1, 2, 3)
    labels = torch.tensor([[2, IGNORE]])
    assert torch.autograd.gradcheck(
        lambda logits: compute_loss(logits, teacher, labels, 2.0, 0.3)[0],
        (student.requires_grad_(),),
    )


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_batch_is_the_token_weighted_mean_of_its_rows(alpha):
    student, teacher = pair()
    labels = random_labels(mask="some")
    rows = [
        compute_loss(student[i : i + 1], teacher[i : i + 1], labels[i : i + 1], 2.0, alpha)[0]
        for i in range(2)
    ]
    whole = compute_loss(student, teacher, labels, 2.0, alpha)[0]
    torch.testing.assert_close(whole, (2 * rows[0] + 3 * rows[1]) / 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_at_an_ignored_token_does_not_count(bad):
    student, teacher = pair()
    labels = random_labels(mask="some")
    expected = compute_loss(student, teacher, labels, 2.0, 0.5)[0]
    masked = labels == IGNORE
    student[masked] = teacher[masked] = bad
    assert torch.equal(compute_loss(student, teacher, labels, 2.0, 0.5)[0], expected)
    clean = distillation_loss(student[:1, :2], teacher[:1, :2])
    found = distillation_loss(student[:1], teacher[:1], ~masked[:1])
    assert found.item() == pytest.approx(clean.item(), rel=1e-12)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("many", [1, 5])
def test_nan_at_a_valid_token_is_not_hidden(alpha, whose, many):
    """Run's guard stops a run whose loss is NaN; a KL of 0 it would never see."""
    student, teacher = pair()
    labels = random_labels(mask="some")
    (student if whose == "student" else teacher)[1, 3, :many] = math.nan
    heard = whose == "student" or alpha < 1  # at alpha 1 nobody listens to the teacher
    eye = torch.eye(5).double()
    losses = [
        compute_loss(student, teacher, labels, 2.0, alpha)[0],
        by_chunks((student, eye), (teacher, eye), labels, 2.0, alpha)[0],
    ]
    if alpha == 0:
        losses.append(distillation_loss(student, teacher, labels != IGNORE, 2.0))
    assert [bool(loss.isnan()) for loss in losses] == [heard] * len(losses)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_no_valid_token_gives_zero_with_a_gradient_path(alpha):
    student, teacher = pair()
    student.requires_grad_()
    loss, _ = compute_loss(student, teacher, random_labels(mask="none"), 2.0, alpha)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_the_teacher_gets_no_gradient(alpha):
    student, teacher = (logits.requires_grad_() for logits in pair())
    compute_loss(student, teacher, random_labels(), 2.0, alpha)[0].backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


# Precision and refusals.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    """In bfloat16 itself some of these divergences come out below -1e-3."""
    teacher = random_logits(4, 16, 64, seed=7).to(dtype)
    student = (teacher.double() + random_logits(4, 16, 64, seed=8, scale=0.01)).to(dtype)
    for way in WAYS.values():
        loss = way(student, teacher, 1.0)
        assert loss.dtype == torch.float32
        exact = way(student.double(), teacher.double(), 1.0)
        assert exact.dtype == torch.float64
        assert loss.item() == pytest.approx(exact.item(), rel=1e-3, abs=1e-7)
    assert kl_divergence(student, teacher, 1.0).min() > -1e-6


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 2, 5), (1, 3, 5), (3, 5)])
def test_shapes_that_differ_are_refused(shape):
    with pytest.raises(ValueError, match=r"student logits \(2, 3, 5\) and .* differ in shape"):
        distillation_loss(random_logits(2, 3, 5), random_logits(*shape))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_bad_temperatures_are_refused(temperature):
    logits = random_logits(1, 2, 3)
    with pytest.raises(ValueError, match=f"^temperature {temperature} must be a positive number$"):
        distillation_loss(logits, logits, temperature=temperature)


# Promise: padding and the order of a batch change neither the loss nor the model's gradient.


def tiny_model():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    return Transformer(config)


def uneven_batch():
    """ids, teacher logits, labels (6, 7): rows with 7, 1, 4, 0, 2 and 6 valid labels."""
    ids, labels = random_labels(6, 7, 13, seed=1), random_labels(6, 7, 13, seed=2)
    for row, count in enumerate((7, 1, 4, 0, 2, 6)):
        labels[row, count:] = IGNORE
    return ids, random_logits(6, 7, 13, seed=3).float(), labels


def loss_and_gradient(ids, teacher_logits, labels):
    student = tiny_model()
    loss, _ = compute_loss(student(ids), teacher_logits, labels, 2.0, 0.4)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters()])


def assert_same_step(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)


def test_right_padding_changes_nothing():
    ids, teacher_logits, labels = uneven_batch()
    padded = (
        F.pad(ids, (0, 5), value=0),
        F.pad(teacher_logits, (0, 0, 0, 5), value=9.0),
        F.pad(labels, (0, 5), value=IGNORE),
    )
    assert_same_step(loss_and_gradient(*padded), loss_and_gradient(*uneven_batch()))


def test_batch_order_changes_nothing():
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    shuffled = (tensor[order] for tensor in uneven_batch())
    assert_same_step(loss_and_gradient(*shuffled), loss_and_gradient(*uneven_batch()))
