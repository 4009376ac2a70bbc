"""Controls: each target keeps what it is said to keep, and no more; the cost is the teacher's."""

import math

import pytest
import torch
import torch.nn.functional as F

import train_distillation
from methods import controls
from methods.controls import compute_loss, smoothing_of, target_of
from tests.explain import check
from tests.random_teacher import make_random_teacher
from tests.short_runs import SIX, check_resume, logged, run, same_bits
from tests.test_lesson2_logits import logits_of, random_labels, random_logits

LN = math.log


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def entropy(probs):
    return -torch.xlogy(probs, probs).sum(-1)


def inputs(B=3, S=4, V=6):
    student, teacher = random_logits(B, S, V, seed=1), random_logits(B, S, V, seed=2)
    labels = random_labels(B, S, V)
    labels[0, 2:] = labels[1, 0] = -100
    return student, teacher.softmax(-1), labels


# Smoothing of matched entropy.


@pytest.mark.parametrize("V, e, H", [
    (2, 0.5, LN(2)),  # even
    (4, 0.5, LN(2) + 0.5 * LN(3)),  # half on the label, a sixth on each other: 1/2 ln 2 + 1/2 ln 6
    (4, 0.75, LN(4)),  # even: the largest e
    (5, 0.2, 0.8 * LN(1.25) + 0.2 * LN(20)),  # 0.8, and 0.05 four times
])  # fmt: skip
def test_smoothing_worked_by_hand(V, e, H):
    found = smoothing_of(torch.tensor([H], dtype=torch.float64), V).item()
    # where all are even, e moves by 1e-8 while the entropy moves by 1e-16
    assert found == pytest.approx(e, rel=1e-7)


def test_every_smoothed_label_is_as_soft_as_the_teacher():
    _, probs, labels = inputs()
    labels[labels == -100] = 0
    probs[2, 0] = torch.tensor([0, 0, 1.0, 0, 0, 0])  # a teacher without doubt
    target = target_of("smoothing", probs, labels)
    torch.testing.assert_close(entropy(target), entropy(probs), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(target.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    on_label = target.gather(-1, labels[..., None])
    assert (on_label >= target).all(), "the label must be the likeliest"
    for row, label in zip(target.flatten(0, 1), labels.flatten(), strict=True):
        others = torch.cat((row[:label], row[label + 1 :]))
        assert (others.max() - others.min()).abs() == 0, "smoothing must know nothing of others"
    e = smoothing_of(entropy(probs).mean(), 6).expand(3, 4, 1)
    mutant = (e / 5).repeat(1, 1, 6).scatter(-1, labels[..., None], 1 - e)
    found = entropy(mutant)
    torch.testing.assert_close(found.mean(), entropy(probs).mean())
    assert not torch.allclose(found, entropy(probs), rtol=0.1), "mutant: one e, right on average"


def test_smoothing_in_float32_at_a_real_vocabulary():
    probs = (3 * torch.randn(4, 8, 2048, generator=generator())).softmax(-1)
    probs[0, 0] = F.one_hot(torch.tensor(5), 2048)
    labels = torch.randint(2048, (4, 8), generator=generator())
    target = target_of("smoothing", probs, labels)
    torch.testing.assert_close(entropy(target)[1:], entropy(probs)[1:], rtol=1e-4, atol=1e-4)
    assert target.dtype == torch.float32 and target.min() >= 0


# A permuted teacher.


def test_permuting_keeps_the_label_and_the_sizes_of_the_others():
    _, probs, labels = inputs(8, 16, 20)
    target = target_of("permuted", probs, labels, generator())
    torch.testing.assert_close(target.sort(-1)[0], probs.sort(-1)[0], rtol=0, atol=0)
    valid, index = labels != -100, labels.clamp(min=0)[..., None]

    def kept(target):
        return (target.gather(-1, index) == probs.gather(-1, index))[..., 0][valid]

    assert kept(target).all(), "the label's own probability was moved"
    moved = (target != probs).float().mean()  # of 19 others one stays, on average
    assert 0.85 < moved < 0.95, f"{moved:.2f} of the probabilities changed their places"
    assert torch.equal(target, target_of("permuted", probs, labels, generator()))
    assert not torch.equal(target, target_of("permuted", probs, labels, generator(1)))
    everywhere = probs.gather(-1, torch.rand(probs.shape, generator=generator()).argsort(-1))
    assert kept(everywhere).float().mean() < 0.3, "mutant: the label is permuted too"


def test_permuting_leaves_nothing_of_the_others_on_average():
    """The mean of 2,000 draws: the label's own, and (1 - p(label)) / (V - 1) elsewhere."""
    probs = torch.tensor([0.3, 0.5, 0.15, 0.05], dtype=torch.float64).repeat(1, 2000, 1)
    labels = torch.zeros(1, 2000, dtype=torch.long)
    mean = target_of("permuted", probs, labels, generator()).mean(1)[0]
    expected = torch.tensor([0.3, 0.7 / 3, 0.7 / 3, 0.7 / 3], dtype=torch.float64)
    torch.testing.assert_close(mean, expected, rtol=0, atol=5 * 0.2 / 2000**0.5)


def test_a_teacher_sure_of_the_label_leaves_only_the_label():
    labels = random_labels(2, 3, 6)
    sure = F.one_hot(labels, 6).double()
    student = random_logits(2, 3, 6)
    expected = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    for control in ("smoothing", "permuted", "untrained"):
        target = target_of(control, sure, labels, generator())
        loss = compute_loss(student, target, labels, 0.0)[0]
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


# The loss.


def test_loss_worked_by_hand():
    """Student 1/2, 1/2; teacher 1/4, 3/4; label 0. Smoothing: 3/4, 1/4, for it is as soft."""
    student, teacher = logits_of(0.5, 0.5), logits_of(0.25, 0.75)
    labels, kl = torch.tensor([[0]]), 0.75 * LN(1.5) + 0.25 * LN(0.5)
    target = target_of("smoothing", teacher.softmax(-1), labels)
    torch.testing.assert_close(target.flatten().tolist(), [0.75, 0.25])
    loss, parts = compute_loss(student, target, labels, 0.25)
    mistakes = {
        "alpha sits on the KL": 0.75 * LN(2) + 0.25 * kl,
        "a cross-entropy with the target: its entropy is missing": LN(2),
    }
    check(loss, 0.25 * LN(2) + 0.75 * kl, mistakes, rel=1e-9)
    check(parts["ce"], LN(2), {})


def test_the_teacher_itself_as_target_is_lesson_2():
    student, probs, labels = inputs()
    probs[2, 1] = torch.tensor([0.5, 0, 0.5, 0, 0, 0])  # 0 log 0 = 0
    assert target_of("untrained", probs, labels) is probs
    loss = compute_loss(student, probs, labels, 0.3)[0]
    expected = train_distillation.compute_loss(student, probs.log(), labels, 1.0, 0.3)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    valid = labels != -100
    kl = F.kl_div(student[valid].log_softmax(-1), probs[valid], reduction="batchmean")
    library = 0.3 * F.cross_entropy(student[valid], labels[valid]) + 0.7 * kl
    torch.testing.assert_close(loss, library, rtol=1e-10, atol=0)


@pytest.mark.parametrize("control", ["smoothing", "permuted", "untrained"])
def test_gradients_and_what_is_not_finite(control):
    student, probs, labels = inputs()
    target = target_of(control, probs, labels, generator())
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: compute_loss(z, target, labels, 0.3)[0], (student,))
    expected = compute_loss(student, target, labels, 0.3)[0]
    rows = [
        compute_loss(*(x[i : i + 1] for x in (student, target, labels)), 0.3)[0] for i in (0, 1, 2)
    ]
    total = sum(n * row for n, row in zip((2, 3, 4), rows, strict=True)) / 9
    torch.testing.assert_close(total, expected, msg="micro-batches give another loss")
    student, hidden = student.detach(), labels == -100
    student[hidden] = target[hidden] = math.nan
    assert torch.equal(compute_loss(student, target, labels, 0.3)[0], expected.detach())
    probs[2, 2] = math.nan
    target = target_of(control, probs, labels, generator())
    assert compute_loss(student, target, labels, 0.3)[0].isnan(), "a NaN of the teacher is hidden"


# Whole runs.


@pytest.fixture(scope="module")
def flags(prepared_folder, tmp_path_factory):
    teacher = make_random_teacher(tmp_path_factory.mktemp("controls"), prepared_folder)
    return ["--teacher", teacher, "--data", prepared_folder]


def test_costs_and_first_weights(flags, tmp_path):
    """plain is lesson 1 at the cost of lesson 2; an untrained teacher changes no first weights."""
    same, records = [*SIX, *flags, "--steps", 1], {}
    for alpha in (1, 0.5):
        out = tmp_path / str(alpha)
        records[alpha] = run(train_distillation, *same, "--alpha", alpha, "--out", out)
    for name in ("plain", "untrained"):
        out = tmp_path / name
        records[name] = run(controls, *same, "--control", name, "--out", out)
        assert records[name]["flops"] == records[0.5]["flops"] > records[1]["flops"]
    assert same_bits(tmp_path / "1", tmp_path / "plain"), "the teacher's pass changed the student"
    (lesson,), (untrained,) = (logged(tmp_path / x, "ce", "kl") for x in ("0.5", "untrained"))
    assert lesson[0] == untrained[0], "another student, or other text"
    assert lesson[1] != untrained[1], "the trained teacher was asked"


def test_an_untrained_teacher_is_the_same_after_a_resume(flags, tmp_path, monkeypatch):
    words = [*flags, "--control", "untrained", "--alpha", 0]
    check_resume(controls, words, tmp_path, monkeypatch)
