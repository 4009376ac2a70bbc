"""Multi-task: batches of both tasks, one mean over both by weight, and text alone as lesson 2."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_distillation
from dataset import ChatData, PackedText
from methods import multi_task
from methods.multi_task import TextAndProblems, compute_loss
from tests.explain import check
from tests.random_teacher import make_random_teacher
from tests.short_runs import SIX, check_resume, run, same_bits
from tests.test_lesson2_logits import logits_of, random_labels, random_logits

LN = math.log


# Batches.


@pytest.fixture(scope="module")
def data(prepared_folder):
    return TextAndProblems(prepared_folder, 384, 1.0, 0.25)


def test_a_batch_has_rows_of_both(data, prepared_folder):
    S, jsonl = data.seq_len, prepared_folder / "reason_train.jsonl"
    text = PackedText(prepared_folder, "train", S)
    problems = ChatData(jsonl, prepared_folder, "train", S)
    input_ids, labels, is_problem = data.batch(3, 8, 1)
    assert input_ids.shape == labels.shape == (8, S)
    assert is_problem.tolist() == [False] * 6 + [True] * 2, "a quarter of 8 rows are 2 problems"
    for mine, theirs in zip((input_ids, labels), text.batch(3, 6, 1), strict=True):
        assert torch.equal(mine[:6], theirs)
    ids, learned = problems.batch(3, 2, 1)
    end = ids.shape[1]
    assert torch.equal(input_ids[6:, :end], ids) and torch.equal(labels[6:, :end], learned)
    assert (labels[6:, end:] == -100).all() and end < S, "padding is taught"
    again = data.batch(3, 8, 1)
    assert all(map(torch.equal, again, (input_ids, labels, is_problem)))
    assert not torch.equal(data.batch(3, 8, 2)[0], input_ids)
    assert data.sha256 == [text.sha256, problems.sha256]
    assert set(map(str, problems.files)) < set(map(str, data.files)), "a file is not recorded"
    last = data.batch(-(-problems.size // 3) - 1, 12, 1)[2]  # of an epoch of problems
    assert last.sum() == (problems.size % 3 or 3) and len(last) == 9 + last.sum()


@pytest.mark.parametrize("share, problems", [(0.0, 0), (0.1, 0), (0.2, 1), (1.0, 4)])
def test_shares_are_rounded_to_rows(data, share, problems, monkeypatch):
    monkeypatch.setattr(data, "problem_share", share)
    input_ids, _, is_problem = data.batch(0, 4, 0)
    assert is_problem.sum() == problems and len(input_ids) == 4


# The loss.


def mean_per_task(student, teacher, labels, is_problem):
    """A mutant: each task has a mean of its own, and they are summed."""
    valid, text = labels != -100, ~is_problem
    kl = F.kl_div(student[text].log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    taught = valid & is_problem[:, None]
    ce = F.cross_entropy(student[taught], labels[taught])
    return kl[valid[text]].mean() + ce


def test_loss_worked_by_hand():
    """Student 1/2, 1/2. Text: 3 tokens of KL from 3/4, 1/4. Problem: 1 token of CE = ln 2, that
    counts twice. At alpha 0: (3 KL + 2 ln 2) / 5."""
    student, teacher = logits_of(0.5, 0.5).repeat(2, 3, 1), logits_of(0.75, 0.25).repeat(1, 3, 1)
    labels = torch.tensor([[0, 1, 0], [1, -100, -100]])
    is_problem = torch.tensor([False, True])
    loss, parts, weight = compute_loss(student, teacher, labels, is_problem, 2.0, 0.0)
    kl = 0.75 * LN(1.5) + 0.25 * LN(0.5)
    mistakes = {
        "a mean per task": kl + LN(2),
        "divided by the tokens, not by their weights": (3 * kl + 2 * LN(2)) / 4,
        "a problem's weight is not read": (3 * kl + LN(2)) / 4,
        "the teacher is asked about problems": (3 * kl + 2 * kl) / 5,
        "alpha also sits on problems": 3 * kl / 5,
    }
    check(loss, (3 * kl + 2 * LN(2)) / 5, mistakes)
    check(parts["text"], 3 * kl / 5, {})
    check(parts["problems"], 2 * LN(2) / 5, {})
    assert weight == 5, "micro-batches count by the sum of weights"
    mutant = mean_per_task(student, teacher, labels, is_problem)
    assert mutant.item() == pytest.approx(mistakes["a mean per task"])


def inputs():
    """Three rows, of which the second is a problem; 2, 3 and 4 labels."""
    student, teacher = random_logits(3, 4, 5, seed=1), random_logits(2, 4, 5, seed=2)
    labels = random_labels(3, 4, 5)
    labels[0, 2:] = labels[1, 0] = -100
    return student, teacher, labels, torch.tensor([False, True, False])


@pytest.mark.parametrize("problem_weight", [0.0, 1.0, 3.0])
def test_equals_torch(problem_weight):
    student, teacher, labels, is_problem = inputs()
    text = labels[~is_problem] != -100
    q, p = student[~is_problem][text], teacher[text]
    kl = F.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="sum")
    ce = F.cross_entropy(q, labels[~is_problem][text], reduction="sum")
    other = F.cross_entropy(student[1], labels[1], reduction="sum")
    expected = 0.3 * ce + 0.7 * kl + problem_weight * other
    loss, parts, weight = compute_loss(student, teacher, labels, is_problem, problem_weight, 0.3)
    assert weight == 6 + problem_weight * 3
    torch.testing.assert_close(loss, expected / weight, rtol=1e-10, atol=0)
    torch.testing.assert_close(parts["text"] + parts["problems"], loss)
    if problem_weight == 0:
        lesson = train_distillation.compute_loss(
            student[~is_problem], teacher, labels[~is_problem], 1.0, 0.3
        )
        torch.testing.assert_close(loss, lesson[0], rtol=1e-12, atol=0)


def test_micro_batches_give_the_whole_batch():
    student, teacher, labels, is_problem = inputs()
    whole = compute_loss(student, teacher, labels, is_problem, 3.0, 0.3)[0]
    total, weights, mutant = 0.0, 0.0, 0.0
    for rows, asked in (([0], [0]), ([1], []), ([2], [1])):
        piece = student[rows], teacher[asked], labels[rows], is_problem[rows]
        loss, _, weight = compute_loss(*piece, 3.0, 0.3)
        total, weights = total + weight * loss, weights + weight
        mutant = mutant + (piece[2] != -100).sum() * loss / 9
    torch.testing.assert_close(total / weights, whole)
    assert not torch.isclose(mutant, whole), "mutant: weighing micro-batches by their labels"
    apart = mean_per_task(student, teacher, labels, is_problem)
    cut = mean_per_task(student[:2], teacher[:1], labels[:2], is_problem[:2])
    assert not torch.isclose(apart, cut), "mutant: a mean per task depends on the cut"
    only = compute_loss(student[1:2], teacher[:0], labels[1:2], is_problem[1:2], 0.0, 0.3)
    assert only[0] == only[2] == 0, "problems alone, that do not count, teach nothing"


def test_gradients_and_what_is_not_finite():
    student, teacher, labels, is_problem = inputs()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    loss = lambda logits: compute_loss(logits, teacher, labels, is_problem, 2.0, 0.3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (student,))
    loss(student).backward()
    assert teacher.grad is None, "a gradient reaches the teacher"
    student, teacher, ignored = student.detach(), teacher.detach(), labels == -100
    teacher[1, 1, 2] = -math.inf
    expected = loss(student)
    assert expected.isfinite(), "0 log 0 = 0"
    student[ignored], teacher[ignored[~is_problem]] = math.nan, math.nan
    assert torch.equal(loss(student), expected)
    teacher[1, 1] = math.nan
    assert loss(student).isnan(), "a NaN of the teacher is hidden"


# Whole runs.


@pytest.fixture(scope="module")
def flags(prepared_folder, tmp_path_factory):
    teacher = make_random_teacher(tmp_path_factory.mktemp("tasks"), prepared_folder)
    return ["--teacher", teacher, "--data", prepared_folder, "--seq_len", 256, "--batch_size", 2]


def test_resumes_to_the_same_bits(flags, tmp_path, monkeypatch):
    words = [*flags, "--problem_weight", 2, "--accumulation_steps", 2]
    check_resume(multi_task, words, tmp_path, monkeypatch)


def test_text_alone_is_lesson_2_to_the_bit(flags, tmp_path):
    same = [*SIX, *flags, "--steps", 1, "--final_eval", 1]
    run(train_distillation, *same, "--out", tmp_path / "lesson")
    run(multi_task, *same, "--problem_share", 0, "--out", tmp_path / "text")
    assert same_bits(tmp_path / "lesson", tmp_path / "text")
