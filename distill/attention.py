"""Attention: where a model looks, and which of its positions look alike to it.

    maps         KL( A_teacher || A_student )                         A (keys) a row of attention
    relations    the same of the rows of  softmax( V V^T / sqrt(d) )  V (S, d) values, keys, queries

MiniLM (2002.10957) matches both in the last layer. A map has one row per head, so heads must be as
many; a relation is (S, S) whatever the heads and widths, and MiniLMv2 (2012.15828) first cuts the
concatenated heads into as many "relation heads" for both models. MiniLM reads both directions; here
row i of a relation has the keys 0 .. i alone, as that is what a causal model has seen (and padding,
which stands to the right, is in no valid row).

A row's sum is over its keys, the mean over heads and over valid query rows: the zeros above the
diagonal add nothing and count nothing (a mean over S * S entries would make the loss S times
smaller). Row 0 is 1 in every model and adds 0.
Shapes: B batch, S sequence, N valid tokens, H heads, K key-value heads, d head width, R relation
heads.
"""

import torch
from torch import Tensor

from .logits import at_least_float32


def row_divergence(student_rows: Tensor, teacher_rows: Tensor, mask: Tensor | None) -> Tensor:
    """KL(teacher || student) of rows (B, heads, S, keys) that sum to 1, a scalar: the mean over
    heads and over the query rows where `mask` (B, S) is true; 0 where none is."""
    student, teacher = student_rows.transpose(1, 2), teacher_rows.transpose(1, 2).detach()
    if mask is not None:
        student, teacher = student[mask], teacher[mask]  # (B, S, heads, keys) -> (N, heads, keys)
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    tiny = torch.finfo(student.dtype).tiny  # log 0 is never taken, and a hidden key adds 0 * 0
    log_ratio = teacher.clamp(min=tiny).log() - student.clamp(min=tiny).log()
    divergences = (teacher * log_ratio).sum(-1)
    return divergences.sum() / max(1, divergences.numel())


def attention_loss(
    student_maps: Tensor,
    teacher_maps: Tensor,
    mask: Tensor | None = None,
    average_heads: bool = False,
) -> Tensor:
    """KL(teacher || student) of attention maps, head by head, a scalar.

    student_maps (B, H, S, S), teacher_maps (B, H or others, S, S); mask (B, S), bool, of the query
    rows that count. average_heads: compare the mean over heads instead. Raises ValueError where the
    heads differ in number without it: which student head should learn from which is not known."""
    if average_heads:
        student_maps = student_maps.mean(1, keepdim=True)
        teacher_maps = teacher_maps.mean(1, keepdim=True)
    if student_maps.shape != teacher_maps.shape:
        heads = (
            f"student maps {tuple(student_maps.shape)}, teacher maps {tuple(teacher_maps.shape)}"
        )
        raise ValueError(f"{heads}: heads must be as many; average them, or match value relations")
    return row_divergence(student_maps, teacher_maps, mask)


def relation_rows(states: Tensor, heads: int) -> Tensor:
    """How alike a position finds the ones up to itself: (B, K, S, d) -> (B, R, S, S), rows that
    sum to 1. Raises ValueError where K * d numbers cannot be cut into `heads` equal pieces."""
    B, K, S, d = states.shape
    if K * d % heads:
        cure = "choose a number that divides both models' key-value heads times head width"
        raise ValueError(f"{heads} relation heads cannot share {K} x {d} numbers: {cure}")
    states = at_least_float32(states).transpose(1, 2).reshape(B, S, heads, K * d // heads)
    states = states.transpose(1, 2)  # (B, R, S, K * d / R)
    scores = states @ states.mT / states.shape[-1] ** 0.5
    causal = torch.ones(S, S, dtype=torch.bool, device=states.device).tril()
    return scores.masked_fill(~causal, -torch.inf).softmax(-1)


def value_relation_loss(
    student_values: Tensor, teacher_values: Tensor, mask: Tensor | None = None, heads: int = 1
) -> Tensor:
    """KL(teacher || student) of value relations, a scalar; queries or keys may stand for values.

    student_values, teacher_values (B, K, S, d), each with its own K and d; mask (B, S), bool, of
    the rows that count; heads: R, which must divide K * d of both. Raises ValueError otherwise."""
    with torch.no_grad():
        teacher_rows = relation_rows(teacher_values, heads)
    return row_divergence(relation_rows(student_values, heads), teacher_rows, mask)
