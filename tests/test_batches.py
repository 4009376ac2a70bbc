"""Batches cut into micro-batches: they give the loss and gradient of the whole batch."""

import pytest
import torch
import torch.nn.functional as F

from distill import weighted_cross_entropy
from model import ModelConfig, Transformer
from run import batches
from run.batches import COLUMNS, Accumulated, micro_batches
from train_distillation import compute_loss

CPU = torch.device("cpu")
IGNORE = -100


# Promise: padding, the order of a batch and cutting it change neither the loss nor the gradient.


def tiny_model():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=13, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24, max_position_embeddings=128,
    )  # fmt: skip
    return Transformer(config)


def uneven_batch():
    """ids, labels (6, 7), teacher logits: rows with 7, 1, 4, 0, 2 and 6 labels, 20 in all."""
    torch.manual_seed(1)
    ids, labels, teacher = (
        torch.randint(13, (6, 7)),
        torch.randint(13, (6, 7)),
        torch.randn(6, 7, 13),
    )
    for row, count in enumerate((7, 1, 4, 0, 2, 6)):
        labels[row, count:] = IGNORE
    return ids, labels, 2 * teacher


def gradients(batch, parts=1, padded=True, weighted=True):
    """Loss and gradient of a model after the micro-batches of one batch."""
    student, whole = tiny_model(), Accumulated(batch, CPU)
    pieces = list(micro_batches(batch, parts, padded))
    for (ids, labels, teacher), count in pieces:
        loss, named = compute_loss(student(ids), teacher, labels, 2.0, 0.4)
        whole.add(loss, named, count if weighted else whole.labels / len(pieces), None)
    loss, named = whole.totals()
    assert loss == pytest.approx(0.4 * named["ce"] + 0.6 * 4.0 * named["kl"], rel=1e-5)
    return loss, torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def assert_same_step(got, expected):
    assert got[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padded", [True, False])
def test_right_padding_changes_nothing(padded):
    ids, labels, teacher = uneven_batch()
    wide = (
        F.pad(ids, (0, 60), value=0),
        F.pad(labels, (0, 60), value=IGNORE),
        F.pad(teacher, (0, 0, 0, 60), value=9.0),
    )
    expected = gradients((ids, labels, teacher))
    assert_same_step(gradients(wide, padded=padded), expected)


def test_batch_order_changes_nothing():
    batch = uneven_batch()
    order = torch.tensor([4, 0, 5, 2, 3, 1])
    assert_same_step(gradients(tuple(tensor[order] for tensor in batch)), gradients(batch))


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("padded", [True, False])
def test_micro_batches_sum_to_the_whole_batch(parts, padded):
    """4 parts of 6 rows are uneven, and with 6 parts one of them has no label at all."""
    batch = uneven_batch()
    counts = [count for _, count in micro_batches(batch, parts, padded)]
    assert sum(counts) == 20 and len(counts) == {4: 3, 6: 5}.get(parts, parts)
    assert_same_step(gradients(batch, parts, padded), gradients(batch))


def test_averaging_the_means_of_micro_batches_would_be_another_loss():
    whole, naive = gradients(uneven_batch()), gradients(uneven_batch(), 3, weighted=False)
    assert abs(whole[0] - naive[0]) > 1e-2
    assert (whole[1] - naive[1]).norm() > 0.05 * whole[1].norm()


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_micro_batches_count_by_their_own_denominator(parts):
    """A mean over the sum of weights, 10 here and 1 there: not over the number of labels."""
    ids, labels, _ = uneven_batch()
    weights = torch.where(labels == 3, 10.0, 1.0)
    student, whole = tiny_model(), Accumulated((ids, labels), CPU)
    for (piece_ids, piece_labels, piece_weights), count in micro_batches(
        (ids, labels, weights), parts, padded=True
    ):
        loss = weighted_cross_entropy(student(piece_ids), piece_labels, piece_weights)
        total = (piece_weights * (piece_labels != IGNORE)).sum()
        whole.add(loss, {"ce": loss}, count, total)
    scale = whole.denominator()
    other = tiny_model()
    expected = weighted_cross_entropy(other(ids), labels, weights)
    expected.backward()
    loss, named = whole.totals()
    assert loss == named["ce"] == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(student.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(scale * ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_micro_batches_by_hand(monkeypatch):
    """2 and 3 labels; what stands right of the last label of a piece is cut off."""
    monkeypatch.setattr(batches, "COLUMNS", 1)
    ids = torch.arange(12).view(4, 3)
    labels = torch.tensor([[1, -100, -100], [-100, 2, -100], [-100, -100, -100], [3, 4, 5]])
    by_row, by_token = torch.arange(4), torch.arange(24).view(4, 3, 2)
    batch = (ids, labels, by_row, by_token, by_row[:, None])
    (first, count), (second, other_count) = micro_batches(batch, 2, padded=True)
    assert (count, other_count) == (2, 3)
    assert first[0].tolist() == [[0, 1], [3, 4]]
    assert first[1].tolist() == [[1, -100], [-100, 2]]
    assert first[2].tolist() == [0, 1] and first[4].tolist() == [[0], [1]]  # not by token: whole
    assert first[3].tolist() == [[[0, 1], [2, 3]], [[6, 7], [8, 9]]]
    assert second[0].tolist() == [[6, 7, 8], [9, 10, 11]]
    (first, _), _ = micro_batches(batch, 2, padded=False)
    assert first[0].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("padded", [True, False])
def test_micro_batches_without_a_label_are_left_out(padded):
    """They would add a gradient of 0, and a mean of 0 / 0 where the whole batch is empty."""
    ids, labels = torch.arange(8).view(4, 2), torch.ones(4, 2, dtype=torch.long)
    labels[1] = IGNORE
    kept = [piece[0].tolist() for piece, _ in micro_batches((ids, labels), 4, padded)]
    assert kept == [[[0, 1]], [[4, 5]], [[6, 7]]]
    assert list(micro_batches((ids, torch.full((4, 2), IGNORE)), 2, padded)) == []


def test_pieces_are_cut_at_few_widths():
    """A piece ends after its last label, at a multiple of COLUMNS, or at the end."""
    ids, labels = torch.zeros(4, 70, dtype=torch.long), torch.full((4, 70), IGNORE)
    for row, last in enumerate((0, COLUMNS - 1, COLUMNS, 69)):
        labels[row, last] = 1
    widths = [piece[0].shape[1] for piece, _ in micro_batches((ids, labels), 4, padded=True)]
    assert widths == [COLUMNS, COLUMNS, 2 * COLUMNS, 70]


def test_parts_are_numbers_or_tensors_wherever_the_loss_is():
    """A number of the schedule (a temperature) once ended every run on a GPU: it was on the CPU."""
    labels = torch.tensor([[1, 2], [3, -100]])
    whole = Accumulated((labels, labels), CPU)
    for temperature, count in ((4.0, 2), (1.0, 1)):
        loss = torch.zeros((), requires_grad=True)
        whole.add(loss, {"temperature": temperature}, count, None)
    assert whole.totals() == (0.0, {"temperature": pytest.approx(3.0)})
    elsewhere = torch.device("meta")
    whole = Accumulated((labels, labels), elsewhere)
    loss = torch.zeros((), device=elsewhere, requires_grad=True)
    whole.add(loss, {"ce": loss, "temperature": 2.0, "kept": torch.tensor(0.5)}, 3, None)
    assert {part.device for part in whole.parts.values()} == {elsewhere}
