"""Teacher, assistant, student; and generations of one size: what each learns from whom, and what
several of them say together."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_distillation
import train_pretrain
from files import read_json
from methods import born_again, ema_teacher, teacher_assistant
from model import make_or_load, save_model, weights_hash
from run import loss_together
from tests.explain import check
from tests.short_runs import SIX, check_resume, run, same_bits

LN = math.log
IGNORE = -100
LOSSES = [teacher_assistant.compute_loss, born_again.compute_loss, ema_teacher.compute_loss]


def random_logits(*shape, seed=0):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def batch(B=2, S=4, V=5):
    """student and teacher (B, S, V), labels (B, S) of 2 and 3 valid tokens."""
    labels = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(0))
    labels[0, 2:] = labels[1, 0] = IGNORE
    return random_logits(B, S, V, seed=1), random_logits(B, S, V, seed=2), labels


# The loss, the same in each: that of lesson 2.


@pytest.mark.parametrize("compute_loss", LOSSES)
def test_the_loss_by_hand(compute_loss):
    """Student 1/2, 1/2; teacher 3 : 1, at T = 2 sqrt(3) : 1; label 0."""
    student = torch.zeros(1, 1, 2).double()
    teacher = torch.tensor([[[LN(3), 0.0]]], dtype=torch.double)
    labels = torch.tensor([[0]])
    kl = 0.75 * LN(1.5) + 0.25 * LN(0.5)
    mistakes = {
        "alpha sits on the KL": 0.7 * LN(2) + 0.3 * kl,
        "student and teacher are swapped": 0.3 * LN(2) + 0.7 * (0.5 * LN(2 / 3) + 0.5 * LN(2)),
        "the label is not heard": 0.7 * kl,
    }
    check(compute_loss(student, teacher, labels, 1.0, 0.3)[0], 0.3 * LN(2) + 0.7 * kl, mistakes)
    p = 3**0.5 / (1 + 3**0.5)
    kl = p * LN(2 * p) + (1 - p) * LN(2 - 2 * p)
    check(compute_loss(student, teacher, labels, 2.0, 0.0)[0], 4 * kl, {"T^2 is missing": kl})


@pytest.mark.parametrize("compute_loss", LOSSES)
@pytest.mark.parametrize("T, alpha", [(1.0, 0.5), (3.0, 0.2), (2.0, 0.0), (1.0, 1.0)])
def test_it_is_lesson_2s_and_torchs(compute_loss, T, alpha):
    student, teacher, labels = batch()
    student.requires_grad_()
    found, parts = compute_loss(student, teacher.requires_grad_(), labels, T, alpha)
    expected = train_distillation.compute_loss(student, teacher, labels, T, alpha)[0]
    valid = labels != IGNORE
    log_q, p = (student[valid] / T).log_softmax(-1), (teacher[valid] / T).softmax(-1)
    kl = F.kl_div(log_q, p, reduction="batchmean")  # of (N, V): a mean over N
    by_torch = alpha * F.cross_entropy(student[valid], labels[valid]) + (1 - alpha) * T**2 * kl
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert found.item() == pytest.approx(by_torch.item(), rel=1e-10)
    assert parts["kl"].item() == pytest.approx(kl.item(), rel=1e-10)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert teacher.grad is None and not compute_loss(
        student.detach(), teacher, labels, T, alpha
    )[0].requires_grad, "no gradient may reach the teacher"  # fmt: skip


@pytest.mark.parametrize("compute_loss", LOSSES)
def test_gradients_ignored_tokens_and_micro_batches(compute_loss):
    student, teacher, labels = batch()
    rows = [compute_loss(student[i, None], teacher[i, None], labels[i, None], 2.0, 0.3)[0]
            for i in (0, 1)]  # fmt: skip
    whole = compute_loss(student, teacher, labels, 2.0, 0.3)[0]
    torch.testing.assert_close(whole, (2 * rows[0] + 3 * rows[1]) / 5)
    assert torch.autograd.gradcheck(
        lambda z: compute_loss(z, teacher, labels, 2.0, 0.3)[0], student.clone().requires_grad_()
    )
    student[labels == IGNORE] = teacher[labels == IGNORE] = math.nan
    assert torch.equal(compute_loss(student, teacher, labels, 2.0, 0.3)[0], whole)
    teacher[labels != IGNORE] = torch.tensor([0.0, -math.inf, 1.0, -math.inf, 2.0]).double()
    student.requires_grad_()
    loss = compute_loss(student[:, 1:2], teacher[:, 1:2], labels[:, 1:2], 2.0, 0.3)[0]
    assert torch.autograd.grad(loss, student)[0].isfinite().all(), "0 log 0 is 0"


def test_generation_0_learns_from_labels_alone():
    student, _, labels = batch()
    loss, parts = born_again.compute_loss(student, None, labels, 2.0, 0.3)
    expected = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12) and parts.keys() == {"ce"}


# Together.


class Says(torch.nn.Module):
    """A model that gives one distribution (V,) at every position."""

    def __init__(self, *probabilities):
        super().__init__()
        self.lm_head = torch.nn.Linear(1, 1)
        self.logits = torch.tensor(probabilities).log()

    def forward(self, input_ids):
        return self.logits.expand(*input_ids.shape, -1)


def test_models_together_by_hand():
    """Labels 0, 0 and 1, and one that is ignored, in batches of 3 and 1."""
    first, second = Says(0.8, 0.2), Says(0.4, 0.6)
    ids = torch.zeros(1, 3, dtype=torch.long)
    batches = [(ids, torch.tensor([[0, 0, IGNORE]])), (ids[:, :1], torch.tensor([[1]]))]
    expected = -(2 * LN(0.6) + LN(0.4)) / 3
    mistakes = {
        "the mean of two losses": -(2 * LN(0.8) + LN(0.2) + 2 * LN(0.4) + LN(0.6)) / 6,
        "a mean of batches, not of tokens": -(LN(0.6) + LN(0.4)) / 2,
    }
    check(loss_together([first, second], batches), expected, mistakes, rel=1e-6)
    alone = -(2 * LN(0.8) + LN(0.2)) / 3
    assert loss_together([first], batches) == pytest.approx(alone, rel=1e-6)
    assert loss_together([first] * 3, batches) == pytest.approx(alone, rel=1e-6)


# The commands.

TWO = ["--steps", "2", "--eval_every", "1", "--batch_size", "8"]


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    torch.manual_seed(9)
    model = make_or_load("nano", 400)
    model.lm_head.weight.data *= 20  # a teacher with opinions
    folder = tmp_path_factory.mktemp("chain") / "teacher"
    save_model(model, folder, prepared_folder)
    return folder


def test_an_assistant_stands_between_teacher_and_student(
    teacher, prepared_folder, tmp_path, monkeypatch
):
    """Killed in the last phase; the student is that of lesson 2 with the assistant as teacher."""
    flags = ["--data", prepared_folder, "--teacher", teacher, "--temperature", 2, "--alpha", 0.3]
    flags += [*TWO, "--assistant", "nano"]
    record = check_resume(teacher_assistant, flags, tmp_path, monkeypatch, update=2 + 2)
    assistant = tmp_path / "whole" / "phases" / "assistant"
    assert record["sources"]["teacher_sha256"] == [weights_hash(teacher), weights_hash(assistant)]
    before = read_json(assistant / "run.json")
    assert before["sources"]["teacher_sha256"] == [weights_hash(teacher)]
    assert record["tokens"] == 2 * before["tokens"] == 2 * 2 * 8 * 32
    assert record["metrics"]["teacher_loss"] == before["metrics"]["teacher_loss"], (
        "the student is compared with the first teacher, not with its assistant"
    )
    words = [*SIX, *flags[:-2], "--teacher", assistant, "--out", tmp_path / "lesson"]
    run(train_distillation, *words)
    assert same_bits(tmp_path / "whole", tmp_path / "lesson"), "the assistant is who teaches"


def test_each_generation_learns_from_the_one_before(prepared_folder, tmp_path, monkeypatch):
    flags = ["--data", prepared_folder, *TWO, "--generations", 1]
    flags += ["--temperature", 2, "--alpha", 0.3]
    record = check_resume(born_again, flags, tmp_path, monkeypatch, update=2 + 2)
    folder = tmp_path / "whole"
    first = folder / "phases" / "generation0"
    assert record["sources"]["teacher_sha256"] == [weights_hash(first)]
    assert "teacher_sha256" not in read_json(first / "run.json")["sources"]
    words = [*SIX, "--data", prepared_folder, *TWO]
    run(train_pretrain, *words, "--model", "nano", "--seed", 1000, "--out", tmp_path / "plain")
    assert same_bits(first, tmp_path / "plain"), "generation 0 is a plain student"
    assert not same_bits(first, folder)
    metrics = read_json(folder / "run.json")["metrics"]
    assert metrics == record["metrics"]
    losses = [read_json(x / "run.json")["metrics"]["val_loss"] for x in (first, folder)]
    assert metrics["together_loss"] < sum(losses) / 2, "Jensen: a mean of probabilities"


def test_generations_may_begin_with_a_teacher(teacher, prepared_folder, tmp_path):
    flags = [*SIX, "--steps", 1, "--data", prepared_folder, "--teacher", teacher]
    run(born_again, *flags, "--generations", 1, "--out", tmp_path)
    record = read_json(tmp_path / "phases" / "generation0" / "run.json")
    assert record["sources"]["teacher_sha256"] == [weights_hash(teacher)]
