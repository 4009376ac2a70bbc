"""Hybrid labels: one mean over both kinds of tokens, however they are mixed; and mistakes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import train_distillation
from methods import hybrid_labels
from methods.hybrid_labels import compute_loss, mistakes
from tests.explain import check
from tests.random_teacher import make_random_teacher
from tests.short_runs import SIX, check_resume, nearly_equal, run, same_bits
from tests.test_lesson2_logits import logits_of, random_labels, random_logits, uneven_batch

LN = math.log


def kinds(*values):
    return torch.tensor(values, dtype=torch.float64)


def normalised_apart(student, teacher, labels, w, T):
    """A mutant, as recipes that mix two losses have it: a mean over the labelled tokens plus a mean
    over the others."""
    valid, labelled = labels != -100, (w == 1)[:, None]
    ce = F.cross_entropy(student.transpose(1, 2), labels, reduction="none")
    kl = F.kl_div((student / T).log_softmax(-1), (teacher / T).softmax(-1), reduction="none")
    return ce[valid & labelled].mean() + T**2 * kl.sum(-1)[valid & ~labelled].mean()


def test_loss_worked_by_hand():
    """Student 1/2, 1/2; the first example labelled: 3 tokens of CE = ln 2; the second, 1 token, of
    the teacher, 3/4 against 1/4."""
    student, teacher = (logits_of(*p).repeat(2, 3, 1) for p in ((0.5, 0.5), (0.75, 0.25)))
    labels = torch.tensor([[0, 1, 0], [1, -100, -100]])
    loss, parts = compute_loss(student, teacher, labels, kinds(1, 0), 1.0)
    kl = 0.75 * LN(1.5) + 0.25 * LN(0.5)
    wrong = {
        "a mean per kind, summed": LN(2) + kl,
        "a mean per kind, averaged": (LN(2) + kl) / 2,
        "the two kinds are swapped": (3 * kl + LN(2)) / 4,
        "a sum: the mean is missing": 3 * LN(2) + kl,
    }
    check(loss, (3 * LN(2) + kl) / 4, wrong)
    check(parts["ce"], LN(2), {})
    check(parts["kl"], kl, {})
    assert normalised_apart(student, teacher, labels, kinds(1, 0), 1.0).item() == pytest.approx(
        wrong["a mean per kind, summed"]
    )


def inputs(B=3):
    student, teacher = random_logits(B, 4, 5, seed=1), random_logits(B, 4, 5, seed=2)
    return student, teacher, random_labels(B, 4, 5, "some")


def test_equals_torch_summed_over_both_kinds():
    student, teacher, labels = inputs()
    total = 0.0
    for row, w in enumerate((1, 0, 1)):
        valid = labels[row] != -100
        q, p = (student[row] / 3).log_softmax(-1)[valid], (teacher[row] / 3).softmax(-1)[valid]
        kl = 9 * F.kl_div(q, p, reduction="sum")
        total += F.cross_entropy(student[row], labels[row], reduction="sum") if w else kl
    loss = compute_loss(student, teacher, labels, kinds(1, 0, 1), 3.0)[0]
    torch.testing.assert_close(loss, total / (labels != -100).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_by_weight_is_lesson_2_with_that_alpha(share, T):
    student, teacher, labels = inputs()
    expected = train_distillation.compute_loss(student, teacher, labels, T, share)[0]
    loss = compute_loss(student, teacher, labels, kinds(share, share, share), T)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_sampling_has_the_gradient_of_weighting_on_average():
    """Over all 8 draws of 3 examples of unlike lengths, each with its probability."""
    student, teacher, labels = inputs()
    student.requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss, student)[0]

    mean, mutant = 0.0, 0.0
    for draw in itertools.product((0, 1), repeat=3):
        chance = math.prod(0.1 if w else 0.9 for w in draw)
        mean += chance * gradient(compute_loss(student, teacher, labels, kinds(*draw), 2.0)[0])
        if 0 < sum(draw) < 3:
            apart = normalised_apart(student, teacher, labels, kinds(*draw), 2.0)
            mutant += chance * gradient(apart)
    expected = gradient(compute_loss(student, teacher, labels, kinds(0.1, 0.1, 0.1), 2.0)[0])
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(mutant, expected, rtol=0.1), "mutant: not told from ours"


def test_a_tenth_of_the_examples_is_a_tenth_of_the_gradient():
    """All ten examples pull alike (student 1/2, 1/2; each teacher and label says the first): of the
    summed pull one example has a tenth; of the mutant's half."""
    student = logits_of(0.5, 0.5).repeat(10, 2, 1).requires_grad_()
    teacher = torch.tensor([30.0, -30.0], dtype=torch.float64).repeat(10, 2, 1)
    labels, w = torch.zeros(10, 2, dtype=torch.long), kinds(1, *[0] * 9)
    for loss, expected in (
        (compute_loss(student, teacher, labels, w, 1.0)[0], 0.1),
        (normalised_apart(student, teacher, labels, w, 1.0), 0.5),
    ):
        pull = torch.autograd.grad(loss, student)[0][..., 1].sum(-1)  # (B,)
        assert (pull[0] / pull.sum()).item() == pytest.approx(expected)


def test_gradients_against_finite_differences():
    student, teacher, labels = inputs()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    loss = lambda logits: compute_loss(logits, teacher, labels, kinds(1, 0, 0.3), 2.0)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (student,))
    loss(student).backward()
    assert teacher.grad is None, "a gradient reaches the teacher"


def test_what_is_not_finite_counts_only_at_valid_tokens():
    student, teacher, labels = inputs()
    teacher[1, 1, 2] = -math.inf  # the teacher rules a token out
    expected = compute_loss(student, teacher, labels, kinds(1, 0, 1), 1.0)[0]
    assert expected.isfinite(), "0 log 0 = 0"
    student[labels == -100] = teacher[labels == -100] = math.nan
    assert torch.equal(compute_loss(student, teacher, labels, kinds(1, 0, 1), 1.0)[0], expected)
    teacher[1, 1] = math.nan
    assert compute_loss(student, teacher, labels, kinds(1, 0, 1), 1.0)[0].isnan(), "NaN is hidden"


def test_micro_batches_give_the_whole_batch():
    _, teacher, labels = uneven_batch()
    student, w = random_logits(6, 7, 13, seed=9).float(), torch.tensor([1.0, 0, 0, 1, 1, 0])
    whole = compute_loss(student, teacher, labels, w, 2.0)[0]
    pieces = [slice(0, 1), slice(1, 4), slice(4, 6)]
    parts = [compute_loss(student[p], teacher[p], labels[p], w[p], 2.0)[0] for p in pieces]
    counts = [(labels[p] != -100).sum() for p in pieces]
    total = sum(n * part for n, part in zip(counts, parts, strict=True)) / sum(counts)
    torch.testing.assert_close(total, whole)


def test_mistakes_pass_some_tokens_round():
    order = mistakes(400, 0.1)
    assert sorted(order.tolist()) == list(range(400)), "two tokens got one token's probability"
    moved = (order != torch.arange(400)).sum()
    assert moved == 40, f"{moved} of 400 tokens are mistaken, a tenth was asked for"
    torch.manual_seed(5)
    assert torch.equal(order, mistakes(400, 0.1)), "seeds must share one wrong teacher"
    assert torch.equal(mistakes(400, 0.0), torch.arange(400))


@pytest.fixture(scope="module")
def flags(prepared_folder, tmp_path_factory):
    teacher = make_random_teacher(tmp_path_factory.mktemp("hybrid"), prepared_folder)
    return ["--teacher", teacher, "--data", prepared_folder]


def test_draws_resume_to_the_same_bits(flags, tmp_path, monkeypatch):
    words = [*flags, "--label_share", 0.4, "--wrong", 0.1]
    check_resume(hybrid_labels, words, tmp_path, monkeypatch)


def test_runs_at_its_ends_are_lesson_2(flags, tmp_path):
    same = [*SIX, *flags, "--steps", 1, "--temperature", 2]
    run(train_distillation, *same, "--alpha", 0, "--out", tmp_path / "lesson")
    run(hybrid_labels, *same, "--label_share", 0, "--out", tmp_path / "soft")
    assert same_bits(tmp_path / "lesson", tmp_path / "soft")
    words = ["--by", "weight", "--label_share", 0, "--wrong", 0.1, "--out", tmp_path / "wrong"]
    run(hybrid_labels, *same, *words)
    assert not nearly_equal(tmp_path / "lesson", tmp_path / "wrong"), "--wrong changes nothing"
