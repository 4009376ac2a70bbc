"""methods/divergences.py and distill/divergences.py: every divergence worked by hand, held against
the definitions that TRL and DistiLLM publish, at its limits, under -inf, and against the mistakes
that were shipped under these names."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_distillation
from dataset import oracle
from distill.divergences import (
    DIVERGENCES,
    adaptive_kl,
    forward_kl,
    jeffreys,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    total_variation,
)
from eval.experiments import mode_seeking
from methods import divergences
from model import ModelConfig, Transformer, save_model
from tests.explain import check
from tests.short_runs import check_resume, run

LN, INF = math.log, math.inf
IGNORE = -100


def random_logits(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def pair(*shape):
    """Student's and teacher's logits."""
    shape = shape or (2, 3, 7)
    return random_logits(*shape, seed=1), random_logits(*shape, seed=2)


def logits_of(*probabilities):
    """(V,) logits whose softmax is `probabilities`, shifted: a softmax ignores a shift."""
    return torch.tensor([LN(p) for p in probabilities], dtype=torch.float64) + 3.0


def value_and_gradient(divergence, student, teacher, **parameters):
    student = student.clone().requires_grad_()
    value = divergence(student, teacher, **parameters)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


# By hand: p = 3/4, 1/4 and q = 1/2, 1/2.

FORWARD = 0.75 * LN(3 / 2) + 0.25 * LN(1 / 2)
REVERSE = 0.5 * LN(2 / 3) + 0.5 * LN(2)
# m = 1/4 p + 3/4 q = 9/16, 7/16
TO_M, FROM_Q = 0.75 * LN(4 / 3) + 0.25 * LN(4 / 7), 0.5 * LN(8 / 9) + 0.5 * LN(8 / 7)
# DistiLLM's lam = 1/4 is the student's weight: m = 3/4 p + 1/4 q = 11/16, 5/16
LAM_P, LAM_Q = 0.75 * LN(12 / 11) + 0.25 * LN(4 / 5), 0.5 * LN(8 / 11) + 0.5 * LN(8 / 5)


@pytest.mark.parametrize(
    "found, expected, mistakes",
    [
        (forward_kl, FORWARD, {"the two are swapped": REVERSE, "the sign is wrong": -FORWARD}),
        (reverse_kl, REVERSE, {"the two are swapped": FORWARD, "the sign is wrong": -REVERSE}),
        (jeffreys, FORWARD + REVERSE, {"the mean, not the sum": (FORWARD + REVERSE) / 2}),
        (
            lambda q, p: jensen_shannon(q, p, beta=0.25),
            0.25 * TO_M + 0.75 * FROM_Q,
            {
                "beta weighs the student, as in DistiLLM": 0.25 * LAM_Q + 0.75 * LAM_P,
                "the mixture is upside down, as in TRL before #3043": 0.25 * LAM_P + 0.75 * LAM_Q,
                "the two KLs are weighted upside down": 0.75 * TO_M + 0.25 * FROM_Q,
            },
        ),
        (
            lambda q, p: jensen_shannon(q, p, beta=0.25, normalised=True),
            (0.25 * TO_M + 0.75 * FROM_Q) / (3 / 16),
            {"not divided by beta (1 - beta)": 0.25 * TO_M + 0.75 * FROM_Q},
        ),
        # 1/10 p + 9/10 q = 0.525, 0.475
        (
            skew_kl,
            0.75 * LN(0.75 / 0.525) + 0.25 * LN(0.25 / 0.475),
            {
                "p's entropy is left out, as in DistiLLM": -0.75 * LN(0.525) - 0.25 * LN(0.475),
                "skew weighs the student": 0.75 * LN(0.75 / 0.725) + 0.25 * LN(0.25 / 0.275),
            },
        ),
        # 1/10 q + 9/10 p = 0.725, 0.275
        (
            skew_reverse_kl,
            0.5 * LN(0.5 / 0.725) + 0.5 * LN(0.5 / 0.275),
            {"skew weighs the teacher": 0.5 * LN(0.5 / 0.525) + 0.5 * LN(0.5 / 0.475)},
        ),
        (
            total_variation,
            0.25,
            {"one half is missing": 0.5, "divided by V": 0.125, "a square": 0.0625},
        ),
        # The head is the first token, though it has more than head_mass: gaps 1/4 and 1/4.
        (adaptive_kl, (FORWARD + REVERSE) / 2, {"an empty head": REVERSE}),
    ],
    ids=["forward", "reverse", "jeffreys", "jsd", "jsd_n", "skew", "skew_r", "tv", "akl"],
)
def test_values_worked_by_hand(found, expected, mistakes):
    check(found(logits_of(0.5, 0.5), logits_of(0.75, 0.25)), expected, mistakes)


@pytest.mark.parametrize(
    "head_mass, head, tail, with_next",
    [(0.3, 0.3, 0.4, 0.3), (0.5, 0.3, 0.4, 0.35), (0.75, 0.35, 0.35, 0.4), (0.95, 0.4, 0.3, 0.7)],
)
def test_the_head_of_adaptive_kl_holds_at_most_its_mass(head_mass, head, tail, with_next):
    """p = 0.4, 0.3, 0.2, 0.1 and q = 0.1, 0.35, 0.15, 0.4, in another order: the gaps are 0.3,
    0.05, 0.05, 0.3. At 0.5 the head is the first token alone, for two hold 0.7."""
    p, q = (0.2, 0.4, 0.1, 0.3), (0.15, 0.1, 0.4, 0.35)
    forward = sum(a * LN(a / b) for a, b in zip(p, q, strict=True))
    reverse = sum(b * LN(b / a) for a, b in zip(p, q, strict=True))

    def mix(head, tail, total=0.7):
        return (head * forward + tail * reverse) / total

    mistakes = {
        "the weights are swapped": mix(tail, head),
        "not divided by head + tail": mix(head, tail, 1.0),
        "the token that crosses head_mass is in the head, as in KDFlow": mix(
            with_next, 0.7 - with_next
        ),
    }
    found = adaptive_kl(logits_of(*q), logits_of(*p), head_mass=head_mass)
    check(found, mix(head, tail), mistakes)


# Against what others publish: the formulas of TRL and DistiLLM, written with torch's own KL.


def library_kl(a, b):
    """KL(a || b) by F.kl_div, whose second argument is the first of the KL."""
    return F.kl_div(b.log(), a, reduction="none").sum(-1)


def trl_jsd(q, p, beta):
    """GKD's equation 1 as TRL has it since #3043, with its two special cases."""
    if beta in (0, 1):
        return library_kl(q, p) if beta else library_kl(p, q)
    mixture = beta * p + (1 - beta) * q
    return beta * library_kl(p, mixture) + (1 - beta) * library_kl(q, mixture)


def distillm_js(q, p, lam):
    mixture = (1 - lam) * p + lam * q
    return lam * library_kl(q, mixture) + (1 - lam) * library_kl(p, mixture)


def distillm_skew(q, p, lam):
    """Without the entropy of p, which does not depend on the student."""
    return -(p * (lam * p + (1 - lam) * q).log()).sum(-1)


def distillm_skew_reverse(q, p, lam):
    return (q * q.log() - q * ((1 - lam) * p + lam * q).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_that_of_gkd_and_trl(beta):
    student, teacher = pair()
    q, p = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(jensen_shannon(student, teacher, beta=beta), trl_jsd(q, p, beta))
    torch.testing.assert_close(
        jensen_shannon(student, teacher, beta=beta), distillm_js(q, p, 1 - beta)
    )


def test_the_ends_of_the_normalised_form_are_those_of_trl():
    student, teacher = pair()
    q, p = student.softmax(-1), teacher.softmax(-1)
    for beta in (0, 1):
        found = jensen_shannon(student, teacher, beta=beta, normalised=True)
        torch.testing.assert_close(found, trl_jsd(q, p, beta))
        near = jensen_shannon(student, teacher, beta=abs(beta - 1e-6), normalised=True)
        torch.testing.assert_close(near, found, rtol=1e-3, atol=0)
        vanishing = jensen_shannon(student, teacher, beta=abs(beta - 1e-6))
        assert vanishing.max() < 1e-4, "without normalisation it vanishes at the ends"


def test_skew_divergences_are_those_of_distillm():
    student, teacher = pair()
    for lam in (0.1, 0.6):
        student.requires_grad_()
        q, p = student.softmax(-1), teacher.softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        ours, theirs = skew_kl(student, teacher, skew=lam), distillm_skew(q, p, lam)
        torch.testing.assert_close(ours, theirs - entropy)
        grads = [
            torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (ours, theirs)
        ]
        torch.testing.assert_close(*grads)
        ours = skew_reverse_kl(student, teacher, skew=lam)
        torch.testing.assert_close(ours, distillm_skew_reverse(q, p, lam))
        student = student.detach()


def test_others_are_the_library_too():
    student, teacher = pair()
    q, p = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(forward_kl(student, teacher), library_kl(p, q))
    torch.testing.assert_close(reverse_kl(student, teacher), library_kl(q, p))
    torch.testing.assert_close(jeffreys(student, teacher), library_kl(p, q) + library_kl(q, p))
    half = F.l1_loss(q, p, reduction="none").sum(-1) / 2
    torch.testing.assert_close(total_variation(student, teacher), half)


# What was shipped under these names, and is not it: our checks tell each from ours.


def mix(a, b, weight):
    return weight * a + (1 - weight) * b


MUTANTS = {
    "TRL before #3043: beta mixes the student": (
        "jensen_shannon", 0.3,
        lambda q, p: 0.3 * library_kl(p, mix(q, p, 0.3)) + 0.7 * library_kl(q, mix(q, p, 0.3)),
    ),
    "TRL before #2202: logarithms are mixed": (
        "jensen_shannon", 0.3,
        lambda q, p: 0.3 * library_kl(p, p**0.3 * q**0.7) + 0.7 * library_kl(q, p**0.3 * q**0.7),
    ),
    "DistiLLM's lam, taken for GKD's beta": (
        "jensen_shannon", 0.3, lambda q, p: distillm_js(q, p, 0.3),
    ),
    "DistiLLM-2's fallback: the sign of reverse KL": (
        "reverse_kl", None, lambda q, p: (q * (p.log() - q.log())).sum(-1),
    ),
    "twinkle #112: the two KLs are swapped": ("forward_kl", None, lambda q, p: library_kl(q, p)),
    "total variation as a mean over the vocabulary": (
        "total_variation", None, lambda q, p: (p - q).abs().mean(-1) / 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", MUTANTS)
def test_shipped_mistakes_are_told_from_ours(what):
    name, beta, mutant = MUTANTS[what]
    student, teacher = pair()
    parameters = {} if beta is None else {"beta": beta}
    ours = DIVERGENCES[name](student, teacher, **parameters)
    wrong = mutant(student.softmax(-1), teacher.softmax(-1))
    assert (ours - wrong).abs().min() > 1e-3, f"{what}: the same values"


def test_a_detached_mixture_has_the_value_and_another_gradient():
    """DistiLLM-2 detaches the student in the mixture of its skew reverse KL; DistiLLM does not."""
    student, teacher = pair()
    value, gradient = value_and_gradient(skew_reverse_kl, student, teacher)

    def detached(z, y):
        q, p = z.softmax(-1), y.softmax(-1)
        return (q * (q.log() - (0.9 * p + 0.1 * q.detach()).log())).sum(-1)

    other_value, other = value_and_gradient(detached, student, teacher)
    torch.testing.assert_close(value, other_value)
    assert (gradient - other).abs().max() > 1e-3, "the mixture is detached"


# Gradients.


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_gradients_are_those_of_finite_differences(name):
    student, teacher = pair(3, 5)
    assert torch.autograd.gradcheck(
        lambda z: DIVERGENCES[name](z, teacher), student.requires_grad_()
    )


def test_gradients_worked_by_hand():
    """Forward KL pulls by q - p, reverse KL by q (log q/p - KL)."""
    student, teacher = pair()
    q, p = student.softmax(-1), teacher.softmax(-1)
    forward = value_and_gradient(forward_kl, student, teacher)[1]
    torch.testing.assert_close(forward, q - p)
    reverse = value_and_gradient(reverse_kl, student, teacher)[1]
    torch.testing.assert_close(reverse, q * ((q / p).log() - library_kl(q, p)[..., None]))
    # Adaptive KL: the same two, by weights that are constants.
    head_first = p.sort(-1, descending=True)
    in_head = head_first.values.cumsum(-1) <= 0.5
    in_head[..., 0] = True
    gap = (p - q).abs().gather(-1, head_first.indices)
    head = (gap * in_head).sum(-1, keepdim=True) / gap.sum(-1, keepdim=True)
    adaptive = value_and_gradient(adaptive_kl, student, teacher)[1]
    torch.testing.assert_close(adaptive, head * forward + (1 - head) * reverse)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_teacher_gets_no_gradient(name):
    student, teacher = (logits.requires_grad_() for logits in pair())
    DIVERGENCES[name](student, teacher).sum().backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name, dtype, atol):
    """Adaptive KL's weights are 0/0 there."""
    logits = random_logits(4, 9, scale=3.0, dtype=dtype)
    value, gradient = value_and_gradient(DIVERGENCES[name], logits, logits)
    assert value.shape == (4,) and value.dtype == dtype
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=atol)
    torch.testing.assert_close(gradient, torch.zeros_like(logits), rtol=0, atol=atol)


# Properties: sign, symmetry, bounds, limits, and one number per token.


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tokens_do_not_mix_and_values_are_positive(name):
    student, teacher = pair()
    whole = DIVERGENCES[name](student, teacher)
    assert whole.shape == (2, 3) and (whole > 0).all()
    torch.testing.assert_close(DIVERGENCES[name](student[1, 2], teacher[1, 2]), whole[1, 2])
    half = DIVERGENCES[name](student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.float32, "bfloat16 is too coarse for a softmax"
    with pytest.raises(ValueError, match="differ in shape"):
        DIVERGENCES[name](student, teacher[..., :-1])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_which_are_symmetric(name):
    student, teacher = pair()
    there, back = DIVERGENCES[name](student, teacher), DIVERGENCES[name](teacher, student)
    same = ("jeffreys", "jensen_shannon", "jensen_shannon_normalised", "total_variation")
    assert torch.allclose(there, back) == (name in same)


def test_bounds_hold_where_the_kls_grow_without_end():
    student, teacher = (1e3 * logits for logits in pair(50, 6))
    assert forward_kl(student, teacher).max() > 100 and reverse_kl(student, teacher).max() > 100
    for bounded, most in ((skew_kl, -LN(0.1)), (skew_reverse_kl, -LN(0.1)), (total_variation, 1.0)):
        assert most * 0.99 < bounded(student, teacher).max() < most + 1e-9
    assert jensen_shannon(student, teacher).max() < LN(2) + 1e-9


def test_limits_are_the_two_kls():
    student, teacher = pair()
    forward, reverse = forward_kl(student, teacher), reverse_kl(student, teacher)
    torch.testing.assert_close(skew_kl(student, teacher, skew=0.0), forward)
    torch.testing.assert_close(skew_reverse_kl(student, teacher, skew=0.0), reverse)
    whole_head = adaptive_kl(student, teacher, head_mass=1.0 + 1e-9)
    torch.testing.assert_close(whole_head, forward)


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.1, math.nan])
def test_a_beta_that_teaches_nothing_is_refused(beta):
    with pytest.raises(ValueError, match=f"of beta {beta} teaches nothing: use one between"):
        jensen_shannon(*pair(), beta=beta)


# -inf: tokens that one or both rule out.


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_token_that_both_rule_out_does_not_count(name):
    """As in a vocabulary that is padded to a round size."""
    student, teacher = pair(3, 5)
    padded = [F.pad(logits, (0, 2), value=-INF) for logits in (student, teacher)]
    value, gradient = value_and_gradient(DIVERGENCES[name], *padded)
    expected, rest = value_and_gradient(DIVERGENCES[name], student, teacher)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, F.pad(rest, (0, 2)))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("whose", ["student", "teacher", "each"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_one_rules_out_gives_no_nan(name, whose, dtype):
    student, teacher = (logits.to(dtype) for logits in pair(3, 5))
    if whose in ("student", "each"):
        student[0, 1] = student[1, 0] = student[1, 4] = -INF
    if whose in ("teacher", "each"):
        teacher[0, 2] = teacher[1, 3] = -INF
    value, gradient = value_and_gradient(DIVERGENCES[name], student, teacher)
    infinite = {
        "forward_kl": {"student", "each"},
        "reverse_kl": {"teacher", "each"},
        "jeffreys": {"student", "teacher", "each"},
        "adaptive_kl": {"student", "teacher", "each"},
    }.get(name, set())
    assert value.isinf().tolist() == [whose in infinite] * 2 + [False]
    assert not value.isnan().any() and gradient.isfinite().all()


def test_no_weight_on_an_infinite_kl_is_zero_not_nan():
    """p = 1/2, 1/4, 1/4 and q = 1/2, 1/2, 0: the head's gap is 0, its KL infinite, and 0 * inf is
    NaN. What is left is reverse KL: 1/2 ln 2."""
    student = torch.tensor([[0.5, 0.5, 0.0]]).double().log()
    value, gradient = value_and_gradient(adaptive_kl, student, logits_of(0.5, 0.25, 0.25)[None])
    assert value.item() == pytest.approx(0.5 * LN(2), rel=1e-12)
    assert gradient.isfinite().all()


def test_nan_is_not_hidden():
    """Run's guard stops a run whose loss is NaN; a value of 0 it would never see."""
    for whose in (0, 1):
        for divergence in DIVERGENCES.values():
            logits = pair(2, 5)
            logits[whose][0, 3] = math.nan
            assert divergence(*logits).isnan().tolist() == [True, False]


# The method.


def random_labels(*shape, V=7):
    labels = torch.randint(V, shape, generator=torch.Generator().manual_seed(0))
    labels[0, 1:] = IGNORE
    return labels


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_kl_is_lesson_2_to_the_bit(alpha, dtype):
    student, teacher = (logits.to(dtype) for logits in pair())
    teacher[1, 0, 2] = -INF
    labels = random_labels(2, 3)
    for compute_loss, last in (
        (divergences.compute_loss, (forward_kl, alpha)),
        (train_distillation.compute_loss, (1.0, alpha)),
    ):
        z = student.clone().requires_grad_()
        loss, parts = compute_loss(z, teacher if alpha < 1 else None, labels, *last)
        loss.backward()
        found = [loss.detach(), z.grad, *parts.values()]
        if compute_loss is divergences.compute_loss:
            ours = found
    assert len(ours) == len(found)
    for one, other in zip(ours, found, strict=True):
        assert torch.equal(one, other), "forward KL is not lesson 2's"


@pytest.mark.parametrize("name", DIVERGENCES)
def test_parts_of_a_batch_make_up_the_whole(name):
    student, teacher = pair()
    labels = random_labels(2, 3)  # 1 valid token, and 3
    whole, parts = divergences.compute_loss(student, teacher, labels, DIVERGENCES[name], 0.3)
    first, second = (
        divergences.compute_loss(
            student[row : row + 1], teacher[row : row + 1], labels[row : row + 1],
            DIVERGENCES[name], 0.3,
        )[0]
        for row in (0, 1)
    )  # fmt: skip
    torch.testing.assert_close(whole, (1 * first + 3 * second) / 4)
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(parts["ce"], ce)
    mean = DIVERGENCES[name](student, teacher)[labels != IGNORE].mean()
    torch.testing.assert_close(whole, 0.3 * ce + 0.7 * mean)


def test_what_stands_at_a_masked_token_changes_nothing():
    student, teacher = pair()
    labels = random_labels(2, 3)
    before = divergences.compute_loss(student, teacher, labels, reverse_kl, 0.5)[0]
    student[0, 2] = teacher[0, 1] = 100.0 * torch.arange(7)
    teacher[0, 2, 3] = -INF  # an infinite divergence
    student.requires_grad_()
    after = divergences.compute_loss(student, teacher, labels, reverse_kl, 0.5)[0]
    assert after.item() == before.item()
    assert torch.autograd.grad(after, student)[0][0, 1:].abs().sum() == 0


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A little text of a known source, and an untrained teacher for it."""
    folder = tmp_path_factory.mktemp("oracle")
    oracle.main(oracle.parse_args(["--out", str(folder / "data"), "--tokens", "4000"]))
    torch.manual_seed(7)
    save_model(Transformer(ModelConfig.preset("micro", 32)), folder / "teacher", folder / "data")
    return ["--data", folder / "data", "--teacher", folder / "teacher"]


def test_stopped_and_resumed_it_ends_in_the_same_bits(small_world, tmp_path, monkeypatch):
    flags = ["--divergence", "adaptive_kl", "--head_mass", 0.7, "--alpha", 0.2]
    record = check_resume(divergences, [*small_world, *flags], tmp_path, monkeypatch)
    assert record["metrics"]["kl"] > 0


def test_flags_reach_the_divergence():
    args = divergences.parse_args(["--divergence", "skew_reverse_kl", "--skew", "0.4"])
    found = divergences.choose(args)(*pair())
    torch.testing.assert_close(found, skew_reverse_kl(*pair(), skew=0.4))
    default = divergences.choose(divergences.parse_args([]))(*pair())
    torch.testing.assert_close(default, 4 * jensen_shannon(*pair(), beta=0.5))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--skew", 0.2], "^--skew is no parameter of jensen_shannon_normalised: leave it out$"),
        (["--divergence", "reverse_kl", "--beta", 0.2], "^--beta is no parameter of reverse_kl"),
        (["--divergence", "jensen_shannon", "--beta", 1], "of beta 1.0 teaches nothing: use one"),
        (["--beta", 1.5], "^--beta 1.5 must be between 0 and 1$"),
        (["--divergence", "skew_kl", "--skew", 1], "^--skew 1.0 must be between 0 and 0.99$"),
    ],
)
def test_flags_that_say_nothing_are_refused(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(divergences, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What is claimed of a student that is too small (eval/experiments/mode_seeking.py).


def test_forward_kl_covers_and_reverse_kl_chooses(monkeypatch):
    monkeypatch.setattr(mode_seeking, "STEPS", 250)
    p = mode_seeking.target()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    (forward, q), (reverse, r) = (
        mode_seeking.fit(name, {}, p) for name in ("forward_kl", "reverse_kl")
    )
    torch.testing.assert_close(
        forward, forward_kl(q.log(), p.log().expand_as(q)), rtol=0.01, atol=0
    )
    # One bump of exponential family: its forward KL has one optimum, of p's mean and variance.
    v = torch.arange(32.0).double()
    covers = q[forward.argmin()]
    assert (covers * v).sum().item() == pytest.approx((p * v).sum().item(), abs=0.05)
    assert p[covers > 0.01].sum() > 0.99 and covers[p > 0.01].sum() < 0.6
    chooses = r[reverse.argmin()]
    assert reverse.min().item() == pytest.approx(LN(2), abs=0.01)  # log(1 / the mode's share)
    assert p[chooses > 0.01].sum() < 0.55 and chooses[p > 0.01].sum() > 0.98
    assert len({round(x, 2) for x in reverse.tolist()}) > 2, "where it starts decides the mode"
