"""InfoNCE between states of student and teacher: values by hand, F.cross_entropy, finite
differences, and its bounds. (Runs: tests/test_method_inside.py.)"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.contrastive import compute_loss, contrastive_loss
from model import Record
from tests.explain import check

LN = math.log


def states(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_values_worked_by_hand():
    """Teacher (1, 0), (0, 1); student (2, 0), (1, 1). Cosines (1, 0) and (r, r), r = sqrt 1/2.
    At tau = 1/2 the first is right by e^2 : 1, the second by 1 : 1."""
    student = torch.tensor([[2.0, 0], [1, 1]], dtype=torch.float64)
    teacher = torch.eye(2, dtype=torch.float64)
    first = LN(1 + math.exp(-2))
    r = 0.5**0.5
    columns = LN(1 + math.exp(2 * r - 2)) + LN(1 + math.exp(-2 * r))
    loss = contrastive_loss(student, teacher, tau=0.5)
    assert loss.shape == ()
    check(
        loss,
        (first + LN(2)) / 2,
        {
            "the sum over samples, not their mean": first + LN(2),
            "the student's states are the negatives: the softmax is over the wrong side": columns
            / 2,
            "tau multiplies": (LN(1 + math.exp(-0.5)) + LN(2)) / 2,
            "inner products, not cosines": (LN(1 + math.exp(-4)) + LN(2)) / 2,
        },
        rel=1e-9,
    )


def test_equals_cross_entropy_of_cosines():
    student, teacher = states(5, 4), states(5, 4, seed=1)
    cosines = F.cosine_similarity(student[:, None], teacher[None], dim=-1)
    expected = F.cross_entropy(cosines / 0.1, torch.arange(5)).item()
    assert contrastive_loss(student, teacher, 0.1).item() == pytest.approx(expected, rel=1e-9)


def test_gradients_by_finite_differences():
    student, teacher = states(4, 3).requires_grad_(), states(4, 3, seed=1)
    assert torch.autograd.gradcheck(lambda s: contrastive_loss(s, teacher, 0.5), student)


def test_no_gradient_reaches_the_teacher():
    teacher = states(4, 3, seed=1).requires_grad_()
    contrastive_loss(states(4, 3).requires_grad_(), teacher, 0.1).backward()
    assert teacher.grad is None, "the teacher learns: detach its states"


def test_from_chance_to_certainty():
    """log n where nothing tells samples apart, 0 where each finds its own; the wrong pairs cost
    more than chance. A loss that only pulls positives together would call the first perfect."""
    corners, same = torch.eye(8, dtype=torch.float64), torch.ones(8, 8, dtype=torch.float64)
    assert contrastive_loss(same, same, 0.1).item() == pytest.approx(LN(8), rel=1e-9)
    assert contrastive_loss(corners, corners, 0.01).item() < 1e-9
    assert contrastive_loss(corners.roll(1, 0), corners, 0.1) > LN(8)
    assert (1 - F.cosine_similarity(same, same)).abs().max() < 1e-9


def test_one_sample_or_none_tells_nothing():
    for n in (0, 1):
        student = states(n, 3).requires_grad_()
        loss = contrastive_loss(student, states(n, 3, seed=1), 0.1)
        loss.backward()
        assert loss.item() == 0.0 and not student.grad.any()


def record(seed, width):
    made = Record("hidden")
    made.logits = states(2, 4, 5, seed=seed)
    made.hidden = [states(2, 4, width, seed=seed + number) for number in range(3)]
    return made


def test_the_loss_is_the_kl_and_the_last_layers_samples():
    student, teacher = record(0, 3), record(50, 4)
    labels = torch.tensor([[1, 2, -100, -100], [0, 4, 3, 1]])
    valid = labels != -100
    W = nn.Linear(3, 4, bias=False, dtype=torch.float64)
    log_p, log_q = (m.logits.log_softmax(-1) for m in (teacher, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[valid].mean().item()
    ours, theirs = W(student.hidden[-1][valid]), teacher.hidden[-1][valid]
    expected = contrastive_loss(ours, theirs, 0.1).item()
    loss, parts = compute_loss(student, teacher, labels, W, 64, 0.1, 0.5)
    assert parts["contrastive"].item() == pytest.approx(expected, rel=1e-6)
    assert loss.item() == pytest.approx(kl + 0.5 * expected, rel=1e-6)
    few = [0, 4, 7]  # first, middle and last of six valid positions: 0, 1, 4, 5, 6, 7
    ours, theirs = (model.hidden[-1].flatten(0, 1)[few] for model in (student, teacher))
    parts = compute_loss(student, teacher, labels, W, 3, 0.1, 0.5)[1]
    assert parts["contrastive"].item() == pytest.approx(
        contrastive_loss(W(ours), theirs, 0.1).item(), rel=1e-6
    )
    loss, parts = compute_loss(student, teacher, labels, W, 64, 0.1, 0.0)
    assert loss.item() == parts["kl"].item() == pytest.approx(kl, rel=1e-9)


def test_what_is_masked_leaves_no_trace():
    student, teacher = record(0, 4), record(50, 4)
    labels = torch.tensor([[1, 2, -100, -100], [0, 4, 3, 1]])
    before = compute_loss(student, teacher, labels, nn.Identity(), 64, 0.1, 0.5)[0]
    hidden = student.hidden[-1].masked_fill((labels == -100)[..., None], torch.nan)
    student.hidden[-1] = hidden.requires_grad_()
    after = compute_loss(student, teacher, labels, nn.Identity(), 64, 0.1, 0.5)[0]
    after.backward()
    assert after.item() == before.item() and student.hidden[-1].grad.isfinite().all()
