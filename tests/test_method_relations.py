"""Relations between samples: values by hand, slow Python over pairs and triplets, finite
differences, equal samples, and the graph of layers. (Runs: tests/test_method_inside.py.)"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distill.hidden import normalise
from distill.relations import (
    angle_relation_loss,
    distance_relation_loss,
    graph_loss,
    relative_distances,
    similarity_loss,
    spread_positions,
)
from methods.relations import RELATIONS, compute_loss
from model import Record
from tests.explain import check

FLAT = {"distance": distance_relation_loss, "angle": angle_relation_loss}
FLAT |= {"similarity": similarity_loss}
GRAPH = {"graph": lambda s, t: graph_loss(s.view(2, -1, s.shape[-1]), t.view(2, -1, t.shape[-1]))}
ALL = FLAT | GRAPH  # of (n, D) and (n, E); n is even


def states(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def points(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def huber(x):
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


# By hand. The teacher's samples are the corners of a triangle with sides 3, 4, 5, mean 4; the
# student's lie on a line at 0, 1, 2: distances 1, 1, 2, mean 4/3.

TRIANGLE, LINE = points((0, 0), (3, 0), (0, 4)), points((1,), (0,), (2,))


def test_distances_worked_by_hand():
    """3/4, 4/4 and 5/4 against 3/4 (1 to 0), 3/4 (1 to 2) and 6/4 (0 to 2)."""
    errors = [huber(0.75 - 0.75), huber(0.75 - 1.0), huber(1.5 - 1.25)]
    expected = sum(errors) / 3
    loss = distance_relation_loss(LINE, TRIANGLE)
    assert loss.shape == ()
    raw = [huber(1 - 3), huber(1 - 4), huber(2 - 5)]
    check(
        loss,
        expected,
        {
            "the diagonal is in the mean over pairs": expected * 2 / 3,
            "the distances are not divided by their mean": sum(raw) / 3,
            "the square, not half of it": expected * 2,
        },
    )


def test_angles_worked_by_hand():
    """Triangle: cos 0, 3/5 and 4/5. Line: at 1, between the others, -1; at 0 and at 2 the others
    lie on one side, 1. Each angle is there as (i, k) and (k, i)."""
    errors = [huber(-1 - 0), huber(1 - 3 / 5), huber(1 - 4 / 5)]
    expected = sum(errors) / 3
    loss = angle_relation_loss(LINE, TRIANGLE)
    mistakes = {"triplets of equal samples are in the mean": 2 * sum(errors) / 27}
    check(loss, expected, mistakes, rel=1e-9)


def test_similarity_worked_by_hand():
    """Rows (1, 0), (0, 1) against (1, 1) / sqrt 2 twice: each of 4 entries is off by 1 - r or r,
    r = 1 / sqrt 2."""
    r = 0.5**0.5
    loss = similarity_loss(points((1, 0), (0, 1)), points((1,), (1,)))
    check(
        loss,
        (2 * (1 - r) ** 2 + 2 * r**2) / 4,
        {
            "rows are not of unit length": 2 / 4,
            "divided by n, not n * n": (2 * (1 - r) ** 2 + 2 * r**2) / 2,
            "the sum over pairs": 2 * (1 - r) ** 2 + 2 * r**2,
        },
        rel=1e-9,
    )


def test_a_graph_worked_by_hand():
    """One sample, two layers: nodes at right angles for the student, alike for the teacher. The one
    edge, which no loss within a layer has, is off by 1."""
    student, teacher = points((1, 0), (0, 3)).view(2, 1, 2), points((2,), (5,)).view(2, 1, 1)
    check(graph_loss(student, teacher), 1.0, {"a node's edge to itself is counted": 0.5}, rel=1e-9)


# Against slow Python, and by finite differences.


def cosine(x, y):
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def slow(name, s, t):
    s, t, n = s.numpy(), t.numpy(), len(s)
    if name == "distance":
        pairs = list(itertools.permutations(range(n), 2))
        both = [[np.linalg.norm(x[i] - x[j]) for i, j in pairs] for x in (s, t)]
        both = [np.array(x) / np.mean(x) for x in both]
        return np.mean([huber(a - b) for a, b in zip(*both, strict=True)])
    if name == "angle":
        return np.mean([
            huber(cosine(s[i] - s[j], s[k] - s[j]) - cosine(t[i] - t[j], t[k] - t[j]))
            for i, j, k in itertools.permutations(range(n), 3)
        ])  # fmt: skip
    if name == "similarity":
        grams = [x @ x.T for x in (s, t)]
        grams = [gram / np.sqrt((gram**2).sum(1, keepdims=True)) for gram in grams]
        return np.mean((grams[0] - grams[1]) ** 2)
    pairs = itertools.permutations(range(n), 2)
    return np.mean([(cosine(s[i], s[j]) - cosine(t[i], t[j])) ** 2 for i, j in pairs])


@pytest.mark.parametrize("name", ALL)
def test_equals_slow_python(name):
    student, teacher = states(6, 3), states(6, 5, seed=1)
    found = ALL[name](student, teacher).item()
    assert found == pytest.approx(slow(name, student, teacher), rel=1e-9) and found > 0.001


@pytest.mark.parametrize("name", ALL)
def test_gradients_by_finite_differences(name):
    """Of the student's states; that of its mean distance is part of it."""
    teacher = states(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda s: ALL[name](s, teacher), states(4, 3).requires_grad_())


def test_the_teachers_mean_distance_is_a_constant():
    teacher = states(4, 5, seed=1).requires_grad_()
    for loss in ALL.values():
        loss(states(4, 3).requires_grad_(), teacher).backward()
    assert teacher.grad is None, "the teacher learns: detach its states"


# What a peer's loss does otherwise.


def published_distances(states, eps=0.0):
    """|x|^2 + |y|^2 - 2 x y and a root, as the code that most repositories of RKD copied has it
    (lenscloth/RKD); there with a clamp at 1e-12, and the diagonal set to 0 afterwards."""
    squares = states.square().sum(-1)
    return (squares[:, None] + squares[None] - 2 * states @ states.T).clamp(min=eps).sqrt()


@pytest.mark.parametrize("name", ALL)
def test_equal_samples_give_no_nan(name):
    """Two positions with one past (a sequence's first token) have equal states."""
    student, teacher = states(6, 3), states(6, 5, seed=1)
    student[1], teacher[1] = student[0], teacher[0]
    student.requires_grad_()
    loss = ALL[name](student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() > 0


def test_a_root_at_zero_has_no_slope():
    """The plain root gives NaN or an infinite slope at the diagonal, for any samples."""
    student = states(4, 3).requires_grad_()
    plain = (student[:, None] - student[None]).square().sum(-1).sqrt()
    (gradient,) = torch.autograd.grad(plain.sum(), student)
    assert gradient.isnan().any(), "this test would not notice the defect"
    (gradient,) = torch.autograd.grad(relative_distances(student).square().sum(), student)
    assert gradient.isfinite().all()


def test_small_distances_survive_float32():
    """Samples 1e-3 apart, 100 from the origin, as states with a common mean are: rounding in
    |x|^2 + |y|^2 - 2 x y is as large as the squares."""
    near = points((0, 0), (3e-3, 0), (0, 4e-3)) + 100
    exact = torch.tensor([[0, 3, 4], [3, 0, 5], [4, 5, 0]]) / 4
    torch.testing.assert_close(relative_distances(near.float()), exact, rtol=0.02, atol=0)
    published = published_distances(near.float(), eps=1e-12).fill_diagonal_(0)
    assert (published / published.sum() * 6 - exact).abs().max() > 0.2


def test_the_mean_distance_leaves_the_diagonal_out():
    """With it, the scaled distances would depend on how many samples there are: three at equal
    distances are 1 apart, not 3/2."""
    assert torch.allclose(
        relative_distances(points((1, 0, 0), (0, 1, 0), (0, 0, 1))), 1.0 - torch.eye(3).double()
    )
    corners = torch.eye(8, dtype=torch.float64)
    assert distance_relation_loss(corners[:, :], 3 * corners).item() == pytest.approx(0, abs=1e-12)


# What must not change them.


def rotate(x):
    return x @ torch.linalg.qr(states(x.shape[1], x.shape[1], seed=9))[0]


CHANGES = {
    "rotated": rotate,
    "scaled": lambda x: 3 * x,
    "in more channels": lambda x: F.pad(x, (0, 4)),
    "moved": lambda x: x + 2.0,
    "other lengths": lambda x: x * torch.arange(1, len(x) + 1)[:, None],
}
BLIND = {
    "distance": {"rotated", "scaled", "in more channels", "moved"},
    "angle": {"rotated", "scaled", "in more channels", "moved"},
    "similarity": {"rotated", "scaled", "in more channels"},
    "graph": {"rotated", "scaled", "in more channels", "other lengths"},
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_relation_is_blind_to(name, change):
    """Equal samples have no loss, nor those that a relation cannot tell from them; others do."""
    teacher = states(6, 3)
    loss = ALL[name](CHANGES[change](teacher), teacher).item()
    assert (loss < 1e-12) is (change in BLIND[name])
    reordered = [3, 0, 5, 1, 2, 4]
    if name != "graph":  # where it would mix layers
        student = states(6, 4, seed=2)
        assert ALL[name](student[reordered], teacher[reordered]).item() == pytest.approx(
            ALL[name](student, teacher).item(), rel=1e-12
        )


def test_the_graph_sees_how_layers_relate():
    """Every layer alike within itself, but the second layer rotated against the first."""
    teacher = states(2, 4, 3)
    student = torch.stack([teacher[0], rotate(teacher[1])])
    assert sum(similarity_loss(s, t) for s, t in zip(student, teacher, strict=True)) < 1e-12
    assert graph_loss(student, teacher) > 0.01


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("name", FLAT)
def test_too_few_samples_for_a_relation(name, n):
    student = states(n, 3).requires_grad_()
    loss = FLAT[name](student, states(n, 5, seed=1))
    loss.backward()
    enough = {"distance": 3, "angle": 3, "similarity": 2}[name]  # two distances are always 1
    assert student.grad.isfinite().all() and (n >= enough or loss.item() < 1e-20)


# Which positions are samples.


def test_positions_are_valid_and_spread():
    valid = torch.ones(16, 128, dtype=torch.bool)
    index = spread_positions(valid, 64)
    assert len(index) == len(index.unique()) == 64
    assert (index // 128).bincount(minlength=16).tolist() == [4] * 16, "not the same from each row"
    assert index.diff().min() >= 32 and len((index % 128).unique()) > 40
    valid[0], valid[5, :100] = False, False
    index = spread_positions(valid, 64)
    assert valid.flatten()[index].all(), "a position whose label is -100"
    few = torch.zeros(2, 4, dtype=torch.bool)
    assert spread_positions(few, 64).tolist() == []
    few[0, 2] = few[1, 1] = True
    assert spread_positions(few, 64).tolist() == [2, 5]


# The method's whole loss.


def record(seed, width, layers):
    made = Record("hidden")
    made.logits = states(2, 4, 5, seed=seed)
    made.hidden = [states(2, 4, width, seed=seed + number) for number in range(layers + 1)]
    return made


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_loss_is_the_kl_and_the_relations(relation):
    student, teacher = record(0, 3, 2), record(50, 5, 4)
    labels = torch.tensor([[1, 2, -100, -100], [0, 4, 3, 1]])
    valid = labels != -100
    log_p, log_q = (m.logits.log_softmax(-1) for m in (teacher, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[valid].mean().item()
    s, t = (
        [normalise(model.hidden[layer][valid]) for layer in layers]
        for model, layers in ((student, (1, 2)), (teacher, (2, 4)))
    )
    if relation == "graph":
        expected = slow("graph", torch.cat(s), torch.cat(t))
    else:
        terms = {"rkd": {"distance": 1, "angle": 2}}.get(relation, {relation: 1})
        expected = (
            sum(k * slow(name, *two) for two in zip(s, t, strict=True) for name, k in terms.items())
            / 2
        )
    pairs = [(1, 2), (2, 4)]
    loss, parts = compute_loss(student, teacher, labels, pairs, relation, 64, 3.0)
    assert parts[relation].item() == pytest.approx(expected, rel=1e-6)
    assert loss.item() == pytest.approx(kl + 3 * expected, rel=1e-6)
    loss, parts = compute_loss(student, teacher, labels, pairs, relation, 64, 0.0)
    assert loss.item() == parts["kl"].item() == pytest.approx(kl, rel=1e-9)


def test_masked_positions_leave_no_trace():
    student, teacher = record(0, 3, 1), record(50, 5, 1)
    labels = torch.tensor([[1, 2, -100, -100], [0, 4, 3, 1]])
    before = compute_loss(student, teacher, labels, [(1, 1)], "rkd", 64, 1.0)[0]
    hidden = student.hidden[1].masked_fill((labels == -100)[..., None], torch.nan)
    student.hidden[1] = hidden.requires_grad_()
    after = compute_loss(student, teacher, labels, [(1, 1)], "rkd", 64, 1.0)[0]
    after.backward()
    assert after.item() == before.item() and student.hidden[1].grad.isfinite().all()
