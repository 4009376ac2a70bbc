"""Confidence filter: which tokens are kept, the loss over them, and what it is at threshold 0."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_distillation
from methods import confidence_filter
from methods.confidence_filter import choose, compute_loss
from tests.explain import check
from tests.random_teacher import make_random_teacher
from tests.short_runs import SIX, check_resume, logged, nearly_equal, run, same_bits
from tests.test_lesson2_logits import logits_of, random_labels, random_logits

LN = math.log
KINDS = ["confident", "uncertain", "random"]
P_MAX = torch.tensor([[0.9, 0.2, 0.6], [0.5, 0.3, 0.8]])
VALID = torch.tensor([[True, True, True], [True, True, False]])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# The choice.


def test_choices_worked_by_hand():
    """At 0.5 three valid tokens are sure (0.5 too); the three least sure are 0.2, 0.3, 0.5."""
    found = choose(P_MAX, VALID, "confident", 0.5, None)
    assert found.tolist() == [[True, False, True], [True, False, False]]
    found = choose(P_MAX, VALID, "uncertain", 0.5, None)
    assert found.tolist() == [[False, True, False], [True, True, False]]
    first, again, other = (choose(P_MAX, VALID, "random", 0.5, generator(s)) for s in (1, 1, 2))
    assert torch.equal(first, again), "a draw must follow from its generator alone"
    assert first.sum() == other.sum() == 3 and not torch.equal(first, other)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_all_kinds_keep_as_many_valid_tokens(threshold):
    source = generator()
    p_max, valid = torch.rand(8, 16, generator=source), torch.rand(8, 16, generator=source) < 0.7
    for kind in KINDS:
        kept = choose(p_max, valid, kind, threshold, generator())
        many = (p_max[valid] >= threshold).sum()
        assert kept.sum() == many, f"{kind} keeps {kept.sum()} tokens, {many} are confident"
        assert not kept[~valid].any(), f"{kind} keeps tokens that have no label"
        if threshold == 0:
            assert torch.equal(kept, valid)
    share = (p_max[valid] >= 0.3).float().mean()
    drawn = torch.rand(20, int(valid.sum()), generator=source) < share
    many = (p_max[valid] >= 0.3).sum()
    assert (drawn.sum(1) != many).any(), "mutant: as many on average is not as many"


def test_a_draw_prefers_no_token():
    """Each of 5 valid tokens is among the 3 kept in 3/5 of 500 draws, within 5 deviations."""
    source = generator()
    counts = sum(choose(P_MAX, VALID, "random", 0.5, source).int() for _ in range(500))
    assert (counts[VALID] - 300).abs().max() < 5 * (500 * 0.6 * 0.4) ** 0.5


def test_ties_go_to_the_first_and_nan_is_kept():
    tied = torch.full((2, 3), 0.25)
    tied[0, 0] = 0.75
    assert choose(tied, VALID, "uncertain", 0.5, None).tolist()[0] == [False, True, False]
    broken = torch.where(P_MAX == 0.6, math.nan, P_MAX)
    for kind in ("confident", "uncertain"):
        kept = choose(broken, VALID, kind, 0.95, None)
        assert kept.nonzero().tolist() == [[0, 2]], "a NaN of the teacher must reach the loss"


# The loss.


def test_loss_worked_by_hand():
    """Two tokens, the first kept: KL = 3/4 ln 3/2 + 1/4 ln 1/2, CE = ln 2, at T = 1."""
    student = logits_of(0.5, 0.5).repeat(1, 2, 1)
    teacher = torch.cat((logits_of(0.75, 0.25), logits_of(0.6, 0.4)), 1)
    kept = choose(teacher.softmax(-1).amax(-1), torch.ones(1, 2) > 0, "confident", 0.7, None)
    loss, parts = compute_loss(student, teacher, torch.tensor([[0, 1]]), kept, 1.0, 0.25)
    kl, other = 0.75 * LN(1.5) + 0.25 * LN(0.5), 0.6 * LN(1.2) + 0.4 * LN(0.8)
    mistakes = {
        "divided by all N tokens, not by the K kept ones": (0.25 * LN(2) + 0.75 * kl) / 2,
        "the other token is kept": 0.25 * LN(2) + 0.75 * other,
        "dropped tokens teach too": 0.25 * LN(2) + 0.75 * (kl + other) / 2,
        "labels teach nothing": 0.75 * kl,
    }
    check(loss, 0.25 * LN(2) + 0.75 * kl, mistakes)
    check(parts["ce"], LN(2), {})
    check(parts["kl"], kl, mistakes)


def inputs(threshold=0.4, kind="confident"):
    student, teacher = random_logits(3, 4, 5, seed=1), random_logits(3, 4, 5, seed=2)
    labels = random_labels(3, 4, 5, "some")
    kept = choose(teacher.softmax(-1).amax(-1), labels != -100, kind, threshold, generator())
    return student, teacher, labels, kept


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_on_the_kept_tokens(kind):
    student, teacher, labels, kept = inputs(0.7, kind)
    assert 0 < kept.sum() < (labels != -100).sum()
    q, p = (student[kept] / 2).log_softmax(-1), (teacher[kept] / 2).log_softmax(-1)
    kl = F.kl_div(q, p, reduction="batchmean", log_target=True)
    expected = 0.3 * F.cross_entropy(student[kept], labels[kept]) + 0.7 * 4 * kl
    loss = compute_loss(student, teacher, labels, kept, 2.0, 0.3)[0]
    mistakes = {"T^2 is missing": (expected - 0.7 * 3 * kl).item()}
    check(loss, expected.item(), mistakes, rel=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_threshold_zero_is_lesson_2(alpha):
    student, teacher, labels, kept = inputs(0.0)
    expected = train_distillation.compute_loss(student, teacher, labels, 2.0, alpha)[0]
    loss = compute_loss(student, teacher, labels, kept, 2.0, alpha)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_gradients_against_finite_differences_and_none_for_dropped_tokens():
    student, teacher, labels, kept = inputs()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    loss = lambda logits: compute_loss(logits, teacher, labels, kept, 2.0, 0.3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (student,))
    of_student, of_teacher = torch.autograd.grad(loss(student), (student, teacher), None,
                                                 allow_unused=True)  # fmt: skip
    assert of_teacher is None, "a gradient reaches the teacher"
    assert torch.equal(of_student[~kept], torch.zeros_like(of_student[~kept]))
    assert (of_student[kept].abs().sum(-1) > 0).all()


def masked_by_a_product(student, teacher, kept):
    """A mutant: 0 * nan is nan."""
    q, p = student.log_softmax(-1), teacher.softmax(-1)
    return ((p * (p.log() - q)).sum(-1) * kept).sum() / kept.sum()


def test_what_is_not_finite_is_read_where_it_is_kept_and_only_there():
    student, teacher, labels, kept = inputs()
    expected = compute_loss(student, teacher, labels, kept, 1.0, 0.3)[0]
    student[~kept] = teacher[~kept] = math.nan
    assert torch.equal(compute_loss(student, teacher, labels, kept, 1.0, 0.3)[0], expected)
    assert masked_by_a_product(student, teacher, kept).isnan(), "mutant: not told from ours"
    row, column = kept.nonzero()[0].tolist()
    teacher[row, column] = torch.tensor([1.0, -math.inf, 0.0, -math.inf, 2.0])
    assert compute_loss(student, teacher, labels, kept, 1.0, 0.0)[0].isfinite(), "0 log 0 = 0"
    teacher[row, column] = math.nan
    assert compute_loss(student, teacher, labels, kept, 1.0, 0.0)[0].isnan(), "NaN is hidden"


def test_a_batch_is_the_mean_of_its_rows_by_kept_tokens():
    student, teacher, labels, kept = inputs()
    kept[2] = False  # a micro-batch may have none
    whole = compute_loss(student, teacher, labels, kept, 2.0, 0.3)[0]
    rows = [
        compute_loss(*(x[i : i + 1] for x in (student, teacher, labels, kept)), 2.0, 0.3)[0]
        for i in range(3)
    ]
    counts = kept.sum(-1)
    assert len(set(counts.tolist())) == 3 and rows[2] == 0
    by_kept = sum(n * row for n, row in zip(counts, rows, strict=True)) / counts.sum()
    torch.testing.assert_close(by_kept, whole)
    valid = (labels != -100).sum(-1)
    by_valid = sum(n * row for n, row in zip(valid, rows, strict=True)) / valid.sum()
    assert not torch.isclose(by_valid, whole), "mutant: weighing micro-batches by valid tokens"


# Whole runs.


@pytest.fixture(scope="module")
def flags(prepared_folder, tmp_path_factory):
    teacher = make_random_teacher(tmp_path_factory.mktemp("filter"), prepared_folder)
    return ["--teacher", teacher, "--data", prepared_folder]


def test_random_tokens_resume_to_the_same_bits(flags, tmp_path, monkeypatch):
    words = [*flags, "--threshold", 0.0165, "--keep", "random"]
    check_resume(confidence_filter, words, tmp_path, monkeypatch)
    shares = [float(share) for (share,) in logged(tmp_path / "whole", "kept")]
    assert all(0.05 < share < 0.95 for share in shares) and len(set(shares)) > 1, shares
    run(confidence_filter, *SIX, *words, "--accumulation_steps", 2, "--out", tmp_path / "cut")
    assert nearly_equal(tmp_path / "whole", tmp_path / "cut"), "the choice depends on the cut"
    assert logged(tmp_path / "cut", "kept") == logged(tmp_path / "whole", "kept")


def test_a_run_at_threshold_zero_is_lesson_2_to_the_bit(flags, tmp_path):
    same = [*SIX, *flags, "--steps", 1, "--temperature", 2, "--alpha", 0.3]
    run(train_distillation, *same, "--out", tmp_path / "lesson")
    run(confidence_filter, *same, "--threshold", 0, "--out", tmp_path / "all")
    assert same_bits(tmp_path / "lesson", tmp_path / "all")
