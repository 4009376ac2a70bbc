"""Temperature schedule: T over a run, the loss at each T, and that a resumed run has its T."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_distillation
from methods import temperature_schedule
from methods.temperature_schedule import compute_loss, temperature_at
from tests.explain import check
from tests.random_teacher import make_random_teacher
from tests.short_runs import SIX, Killed, check_resume, kill_in_update, logged, run, same_bits
from tests.test_lesson2_logits import logits_of, random_labels, random_logits

LN = math.log
ROOT3 = math.sqrt(3)


def test_temperatures_worked_by_hand():
    """From 4 to 1: 4, 4 / sqrt(2), 2, sqrt(2), 1 at every quarter, and 1 beyond the end."""
    found = [temperature_at(spent, 4, 1) for spent in (0, 0.25, 0.5, 0.75, 1, 1.2)]
    assert found == pytest.approx([4, 4 / 2**0.5, 2, 2**0.5, 1, 1], rel=1e-12)
    assert temperature_at(0.5, 1, 4) == pytest.approx(2), "the way up mirrors the way down"
    assert {temperature_at(spent, 3.7, 3.7) for spent in (0, 0.3, 1)} == {3.7}, "constant, exactly"


def test_loss_worked_by_hand():
    """T = 2 takes the roots: 3 : 1 becomes sqrt(3) : 1; then times T^2 = 4."""
    student, teacher = logits_of(0.5, 0.5), logits_of(0.75, 0.25)
    loss, parts = compute_loss(student, teacher, torch.tensor([[0]]), 2.0, 0.25)
    kl = (ROOT3 * LN(2 * ROOT3 / (1 + ROOT3)) + LN(2 / (1 + ROOT3))) / (1 + ROOT3)
    mistakes = {
        "T^2 is missing": 0.25 * LN(2) + 0.75 * kl,
        "T stands where T^2 should": 0.25 * LN(2) + 0.75 * 2 * kl,
        "alpha sits on the KL": 0.75 * LN(2) + 0.25 * 4 * kl,
    }
    check(loss, 0.25 * LN(2) + 0.75 * 4 * kl, mistakes)
    check(parts["ce"], LN(2), {})
    check(parts["kl"], kl, {"the logged kl has the factor T^2": 4 * kl})


def inputs():
    student, teacher = random_logits(2, 4, 5, seed=1), random_logits(2, 4, 5, seed=2)
    return student, teacher, random_labels(2, 4, 5, "some")


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_equals_torch_and_lesson_2(T):
    student, teacher, labels = inputs()
    valid = labels != -100
    q, p = (student[valid] / T).log_softmax(-1), (teacher[valid] / T).softmax(-1)
    kl = F.kl_div(q, p, reduction="batchmean")
    expected = 0.3 * F.cross_entropy(student[valid], labels[valid]) + 0.7 * T**2 * kl
    loss = compute_loss(student, teacher, labels, T, 0.3)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    lesson = train_distillation.compute_loss(student, teacher, labels, T, 0.3)[0]
    torch.testing.assert_close(loss, lesson, rtol=1e-12, atol=0)


def without_t_squared(student, teacher, labels, T, alpha):
    """A mutant, as TRL, torchtune and Liger write the loss."""
    _, parts = compute_loss(student, teacher, labels, T, alpha)
    return alpha * parts["ce"] + (1 - alpha) * parts["kl"]


def test_the_gradient_keeps_its_size_along_the_schedule():
    """At T it is T (q - p), which at high T is near (z - y) / V; a mutant's falls as 1 / T^2."""
    student, teacher, labels = inputs()
    student.requires_grad_()

    def size(loss):
        return torch.autograd.grad(loss, student)[0].norm().item()

    right = [size(compute_loss(student, teacher, labels, T, 0.0)[0]) for T in (16.0, 4.0)]
    mutant = [size(without_t_squared(student, teacher, labels, T, 0.0)) for T in (16.0, 4.0)]
    assert 0.5 < right[0] / right[1] < 2, "T^2 is missing: the schedule is one of learning rates"
    assert mutant[0] / mutant[1] < 1 / 8, "mutant: not told from ours"


def test_gradients_against_finite_differences():
    student, teacher, labels = inputs()
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    loss = lambda logits: compute_loss(logits, teacher, labels, 2.5, 0.3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (student,))
    loss(student).backward()
    assert teacher.grad is None, "a gradient reaches the teacher"


def test_what_is_not_finite_counts_only_at_valid_tokens():
    student, teacher, labels = inputs()
    teacher[0, 1, 2] = -math.inf
    expected = compute_loss(student, teacher, labels, 2.0, 0.3)[0]
    assert expected.isfinite(), "0 log 0 = 0"
    student[labels == -100] = teacher[labels == -100] = math.nan
    assert torch.equal(compute_loss(student, teacher, labels, 2.0, 0.3)[0], expected)
    teacher[0, 1] = math.nan
    assert compute_loss(student, teacher, labels, 2.0, 0.3)[0].isnan(), "NaN is hidden"


def test_micro_batches_give_the_whole_batch():
    student, teacher, labels = inputs()
    rows = [compute_loss(*(x[i : i + 1] for x in inputs()), 2.0, 0.3)[0] for i in range(2)]
    whole = compute_loss(student, teacher, labels, 2.0, 0.3)[0]
    torch.testing.assert_close((2 * rows[0] + 3 * rows[1]) / 5, whole)


# Whole runs.


@pytest.fixture(scope="module")
def flags(prepared_folder, tmp_path_factory):
    teacher = make_random_teacher(tmp_path_factory.mktemp("schedule"), prepared_folder)
    return ["--teacher", teacher, "--data", prepared_folder]


def temperatures(folder) -> dict[int, float]:
    rows = logged(folder, "step", "temperature")
    return {int(step): float(temperature) for step, temperature in rows}


def test_a_resumed_run_has_the_temperatures_it_would_have_had(flags, tmp_path, monkeypatch):
    """Step n begins after n - 1: of 6 steps, or of 3.5 that --flops pay, the fourth in part."""
    words = [*flags, "--accumulation_steps", 2]
    record = check_resume(temperature_schedule, words, tmp_path, monkeypatch)
    found = temperatures(tmp_path / "whole")
    expected = {step: 4 * 0.25 ** ((step - 1) / 6) for step in found}
    assert len(found) == 4 and found == pytest.approx(expected, rel=1e-6)
    from_the_resume = 4 * 0.25 ** ((6 - 5) / 6)  # a mutant that counts from there: step 5 has 4
    assert found[6] != pytest.approx(from_the_resume)

    words = [*SIX[2:], *words, "--flops", 3.5 * record["flops"] / 6, "--out", tmp_path / "flops"]
    words += ["--first_temperature", 2, "--last_temperature", 8]
    with monkeypatch.context() as killing, pytest.raises(Killed):
        kill_in_update(killing, 3)
        run(temperature_schedule, *words)
    assert run(temperature_schedule, *words, "--resume")["steps"] == 4
    found = temperatures(tmp_path / "flops")
    expected = {step: 2 * 4 ** ((step - 1) / 3.5) for step in found}
    assert max(found) == 4 and found == pytest.approx(expected, rel=1e-4)


def test_with_seconds_it_waits_for_the_plan(flags, tmp_path):
    """The number of steps is known after 20, or when time is up: until then T is the first one."""
    run(temperature_schedule, *SIX[2:], *flags, "--seconds", 1e-3, "--out", tmp_path)
    assert temperatures(tmp_path)[1] == 4


def test_a_constant_temperature_is_lesson_2_to_the_bit(flags, tmp_path):
    same = [*SIX, *flags, "--steps", 1, "--alpha", 0.3]
    run(train_distillation, *same, "--temperature", 3, "--out", tmp_path / "lesson")
    words = ["--first_temperature", 3, "--last_temperature", 3, "--out", tmp_path / "constant"]
    run(temperature_schedule, *same, *words)
    assert same_bits(tmp_path / "lesson", tmp_path / "constant")
