"""Attention maps and value relations: values by hand, torch's KL, finite differences, causal zeros,
unequal heads. (Runs: tests/test_method_inside.py.)"""

import math

import pytest
import torch
import torch.nn.functional as F

from distill.attention import attention_loss, relation_rows, value_relation_loss
from methods.attention import MATCHED, compute_loss
from model import ModelConfig, Record, Transformer
from tests.explain import check

LN = math.log


def states(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def maps(B, H, S, seed=0):
    """Causal attention maps, and the scores that they were made from."""
    scores = states(B, H, S, S, seed=seed)
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def mask_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


# By hand: two positions, one head. Row 0 is (1, 0) always; row 1 is (3/4, 1/4) for the teacher and
# (1/2, 1/2) for the student: KL = 3/4 ln(3/2) + 1/4 ln(1/2), halved by the mean over two rows.

TEACHER = torch.tensor([[[[1.0, 0], [0.75, 0.25]]]], dtype=torch.float64)
STUDENT = torch.tensor([[[[1.0, 0], [0.5, 0.5]]]], dtype=torch.float64)
KL = 0.75 * LN(1.5) + 0.25 * LN(0.5)


def test_values_worked_by_hand():
    loss = attention_loss(STUDENT, TEACHER)
    assert loss.shape == (), "a loss is one number: the mean over rows is missing"
    check(
        loss,
        KL / 2,
        {
            "KL(student || teacher): the two are swapped": (0.5 * LN(2 / 3) + 0.5 * LN(2)) / 2,
            "a mean over keys too: the causal zeros dilute it": KL / 4,
            "a sum over rows": KL,
        },
    )
    check(
        attention_loss(STUDENT, TEACHER, mask_of((0, 1))),
        KL,
        {"the row that is masked out is counted": KL / 2},
    )


def test_relations_worked_by_hand():
    """Values 2 and x of one channel: row 1 of the scores is (2 x, x^2). The teacher's x = 1 gives
    softmax(2, 1), the student's x = 0 gives (1/2, 1/2)."""
    rows = [torch.tensor([[[[2.0], [x]]]], dtype=torch.float64) for x in (0, 1)]
    p = math.e / (1 + math.e)
    expected = (p * LN(2 * p) + (1 - p) * LN(2 * (1 - p))) / 2
    # Both directions, as in MiniLM: row 0 is softmax(4, 2 x), (e^4, 1) and (e^4, e^2) over sums.
    q0, p0 = math.exp(4) / (math.exp(4) + 1), math.exp(2) / (math.exp(2) + 1)
    both = expected + (p0 * LN(p0 / q0) + (1 - p0) * LN((1 - p0) / (1 - q0))) / 2
    mistakes = {"a row reads keys to its right": both}
    check(value_relation_loss(rows[0], rows[1]), expected, mistakes, rel=1e-9)


def test_relations_are_scaled_by_the_width_of_a_relation_head():
    """4 numbers, all 1, in R heads of 4 / R: every score is (4 / R) / sqrt(4 / R); rows are even.
    With values 1 and 2 row 1 is softmax of (2, 4) sqrt(4 / R)."""
    values = torch.ones(1, 2, 2, 2, dtype=torch.float64)
    values[:, :, 1] = 2
    for R in (1, 2, 4):
        row = relation_rows(values, R)[0, :, 1]
        expected = torch.tensor([2.0, 4.0], dtype=torch.float64).mul((4 / R) ** 0.5).softmax(-1)
        assert row.shape == (R, 2)
        torch.testing.assert_close(row, expected.expand(R, 2))


# Against torch, and by finite differences.


def torch_kl(student, teacher, mask):
    """Row by row over the keys that are seen: KL(teacher || student) by F.kl_div."""
    B, H, S, _ = student.shape
    total, rows = 0.0, 0
    for b in range(B):
        for s in range(S):
            for h in range(H if mask[b, s] else 0):
                seen = slice(0, s + 1)
                log_q, p = student[b, h, s, seen].log(), teacher[b, h, s, seen]
                total, rows = total + F.kl_div(log_q, p, reduction="sum"), rows + 1
    return (total / rows).item()


@pytest.mark.parametrize("mask", [mask_of((1, 1, 1), (1, 1, 1)), mask_of((0, 1, 1), (0, 0, 1))])
def test_equals_torch_and_is_not_diluted(mask):
    """F.kl_div's default, reduction="mean", divides by S keys too, MSE of maps by S * S entries
    of which half are always 0."""
    student, teacher = maps(2, 2, 3), maps(2, 2, 3, seed=1)
    right = torch_kl(student, teacher, mask)
    check(
        attention_loss(student, teacher, mask),
        right,
        {
            'divided by the keys too: reduction="mean" of F.kl_div': right / 3,
            "the direction is wrong": torch_kl(teacher, student, mask),
        },
        rel=1e-9,
    )
    student, teacher = states(2, 1, 3, 4), states(2, 2, 3, 8, seed=1)  # other heads and widths
    rows = []
    for values in (student, teacher):  # 2 relation heads, cut from the concatenated heads
        joined = torch.cat([values[:, head] for head in range(values.shape[1])], dim=-1)
        cut = torch.stack(joined.chunk(2, dim=-1), dim=1)
        scores = torch.einsum("bhid,bhjd->bhij", cut, cut) / cut.shape[-1] ** 0.5
        rows.append(scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(-1))
    found = value_relation_loss(student, teacher, mask, heads=2)
    assert found.item() == pytest.approx(torch_kl(*rows, mask), rel=1e-9)


def test_gradients_by_finite_differences():
    mask, teacher = mask_of((0, 1, 1)), maps(1, 2, 3, seed=1)
    hidden = torch.ones(3, 3, dtype=torch.bool).triu(1)

    def of_scores(scores):
        return attention_loss(scores.masked_fill(hidden, -torch.inf).softmax(-1), teacher, mask)

    def of_values(values):
        return value_relation_loss(values, states(1, 2, 3, 4, seed=2), mask, heads=2)

    assert torch.autograd.gradcheck(of_scores, states(1, 2, 3, 3).requires_grad_())
    assert torch.autograd.gradcheck(of_values, states(1, 1, 3, 4).requires_grad_())


def test_causal_zeros_give_no_nan():
    """The KL written p (log p - log q) is 0 * (-inf + inf) = NaN at every key that a row cannot
    see, and so is the MSE of the scores, -inf - -inf, that TinyBERT's recipe asks for."""
    scores = states(1, 1, 3, 3).requires_grad_()
    hidden = torch.ones(3, 3, dtype=torch.bool).triu(1)
    student, teacher = scores.masked_fill(hidden, -torch.inf).softmax(-1), maps(1, 1, 3, seed=1)

    def plain(student, teacher):
        return (teacher * (teacher.log() - student.log())).sum(-1).mean()

    assert plain(student, teacher).isnan(), "this test would not notice the defect"
    attention_loss(student, teacher).backward()
    assert scores.grad.isfinite().all() and scores.grad.abs().max() > 0
    assert not scores.grad[0, 0][hidden].any()


def test_a_key_that_the_student_gives_nothing_costs_much_but_not_infinity():
    student = torch.tensor([[[[1.0, 0.0]]]], requires_grad=True)
    loss = attention_loss(student, torch.tensor([[[[0.5, 0.5]]]]))
    loss.backward()
    assert 10 < loss.item() < 100 and student.grad.isfinite().all()


def test_equal_relations_have_no_loss_and_no_gradient():
    values = states(2, 2, 3, 4).requires_grad_()
    loss = value_relation_loss(values, values.detach().clone(), heads=2)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12) and values.grad.abs().max() < 1e-12


def test_a_relation_is_blind_to_a_rotation():
    """Why no projection is needed: relations are inner products."""
    values = states(2, 1, 5, 4)
    rotation = torch.linalg.qr(states(4, 4, seed=3))[0]
    assert value_relation_loss(values @ rotation, values).item() == pytest.approx(0, abs=1e-12)
    assert value_relation_loss(2 * values, values).item() > 0.01


def test_padding_and_micro_batches():
    """What stands right of a row, and rows that are masked out, do not count."""
    student, teacher = states(3, 1, 4, 4), states(3, 2, 4, 4, seed=1)
    mask = mask_of((1, 1, 1, 1), (0, 1, 0, 0), (1, 1, 0, 0))
    whole = value_relation_loss(student, teacher, mask)
    padded = student.clone()
    padded[1:, :, 2:] = 1e6
    assert value_relation_loss(padded, teacher, mask).item() == whole.item()
    pieces = [
        value_relation_loss(student[rows], teacher[rows], mask[rows]) * mask[rows].sum()
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert sum(pieces).item() / 7 == pytest.approx(whole.item(), rel=1e-12)
    nothing = value_relation_loss(student.requires_grad_(), teacher, torch.zeros_like(mask))
    nothing.backward()
    assert nothing.item() == 0.0 and not student.grad.any()


def test_no_gradient_reaches_the_teacher():
    values, rows = (
        states(1, 1, 3, 4, seed=1).requires_grad_(),
        maps(1, 1, 3, seed=1).requires_grad_(),
    )
    loss = value_relation_loss(states(1, 1, 3, 4).requires_grad_(), values)
    (loss + attention_loss(maps(1, 1, 3).requires_grad_(), rows)).backward()
    assert values.grad is None and rows.grad is None, "the teacher learns: detach it"


# Unequal heads.


def test_unequal_heads_are_refused_or_averaged():
    student, teacher = maps(1, 2, 3), maps(1, 4, 3, seed=1)
    with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\).* \(1, 4, 3, 3\): heads must be as many"):
        attention_loss(student, teacher)
    found = attention_loss(student, teacher, average_heads=True)
    expected = attention_loss(student.mean(1, keepdim=True), teacher.mean(1, keepdim=True))
    assert found.item() == expected.item() > 0
    one = attention_loss(student[:, :1], teacher[:, :1])
    both = attention_loss(student[:, :1], teacher[:, :1], average_heads=True)
    assert one.item() == both.item()  # a single head is its own average


def test_relation_heads_must_divide_both():
    with pytest.raises(ValueError, match="3 relation heads cannot share 1 x 4 numbers: choose a"):
        value_relation_loss(states(1, 1, 3, 4), states(1, 3, 3, 4), heads=3)


# The method's whole loss, of models.


def small(layers, H, K, seed):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(20, 8 * H, layers, H, K, 8, 16)).double()


@pytest.fixture(scope="module")
def pair():
    ids = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))
    records = []
    for model in (small(2, 2, 1, 0), small(3, 4, 2, 1)):
        records.append(Record())
        model(ids, record=records[-1])
    labels = ids.clone()
    labels[0, 4:] = labels[1, 0] = -100
    return *records, labels


@pytest.mark.parametrize("match", MATCHED)
def test_the_loss_is_the_kl_and_what_is_matched(match, pair):
    student, teacher, labels = pair
    valid, pairs = labels != -100, [(1, 2), (2, 3)]
    log_p, log_q = (m.logits.log_softmax(-1) for m in (teacher, student))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[valid].mean().item()
    loss, parts = compute_loss(student, teacher, labels, pairs, MATCHED[match], 2, True, 3.0)
    assert parts.keys() == {"kl", *MATCHED[match]}
    expected = kl
    for name in MATCHED[match]:
        # A record's list of maps starts with layer 1, unlike its hidden states.
        both = [(getattr(student, name)[i], getattr(teacher, name)[j]) for i, j in ((0, 1), (1, 2))]
        one = [
            attention_loss(*two, valid, True) if name == "attention"
            else value_relation_loss(*two, valid, 2) for two in both
        ]  # fmt: skip
        expected += 3.0 * sum(one).item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss, parts = compute_loss(student, teacher, labels, pairs, MATCHED[match], 2, True, 0.0)
    assert loss.item() == parts["kl"].item() == pytest.approx(kl, rel=1e-9)


def test_maps_of_unequal_heads_need_the_flag(pair):
    with pytest.raises(ValueError, match="heads must be as many"):
        compute_loss(*pair, [(2, 3)], MATCHED["maps"], 1, False, 1.0)
