"""Measures of a language model on held-out tokens, alone and beside its teacher.

val_loss        mean cross-entropy, nats a token
perplexity      exp(val_loss)
bits_per_byte   val_loss / ln 2 / bytes a token: comparable between tokenizers
ece             expected calibration error: |confidence - accuracy| of the top token, averaged
                over 15 equal bins of confidence (Guo et al. 2017, 1706.04599)
kl              mean KL(teacher || student) at T = 1, nats a token
agreement       share of tokens where student and teacher have the same top token
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from distill import cross_entropy, kl_divergence
from distill.fused import chunk_of

IGNORE = -100
BINS = 15


@torch.no_grad()
def evaluate(
    student, batches: Iterable[tuple[Tensor, Tensor]], bytes_per_token=None, teacher=None
) -> dict[str, float]:
    """Metrics of `student` over batches of (input_ids, labels), both (B, S); labels of -100 and
    what they stand for do not count. With `teacher`, kl and agreement are added. Logits are made
    for a chunk of tokens at a time (distill/fused.py says why)."""
    device = student.lm_head.weight.device
    sums = torch.zeros(4, dtype=torch.float64)  # tokens, loss, kl, agreeing
    bins = torch.zeros(3, BINS, dtype=torch.float64)  # tokens, confidence, correct
    for input_ids, labels in batches:
        input_ids, labels = input_ids.to(device), labels.to(device)
        valid = labels != IGNORE
        hidden, labels = student.model(input_ids)[valid], labels[valid]  # (N, D), (N,)
        of_teacher = None if teacher is None else teacher.model(input_ids)[valid]
        size = chunk_of(len(student.lm_head.weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = student.lm_head(hidden[rows]).float()[None]  # (1, C, V)
            confidence, top = logits.softmax(-1).max(-1)
            sums[0] += len(labels[rows])  # sums are kept on the CPU: Apple's MPS has no float64
            sums[1] += cross_entropy(logits, labels[None, rows]).cpu().double().sum().item()
            place = (confidence[0] * BINS).long().clamp(max=BINS - 1).cpu()
            values = torch.stack(
                (torch.ones_like(confidence[0]), confidence[0], (top == labels[rows])[0].float())
            )
            bins.index_add_(1, place, values.cpu().double())
            if teacher is not None:
                teacher_logits = teacher.lm_head(of_teacher[rows]).float()[None]
                sums[2] += kl_divergence(logits, teacher_logits, 1.0).cpu().double().sum().item()
                sums[3] += (top == teacher_logits.argmax(-1)).sum().item()
    tokens, loss, kl, agreeing = sums.tolist()
    if not tokens:
        raise ValueError("no token to evaluate: the held-out data has no label")
    loss = loss / tokens
    metrics = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
    if bytes_per_token is not None:
        metrics["bits_per_byte"] = loss / math.log(2) / bytes_per_token
    metrics["ece"] = float((bins[1] - bins[2]).abs().sum() / tokens)
    if teacher is not None:
        metrics["kl"] = kl / tokens
        metrics["agreement"] = agreeing / tokens
    return metrics
