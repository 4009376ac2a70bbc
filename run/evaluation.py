"""Measures of a language model on held-out tokens, alone and beside its teacher.

val_loss        mean cross-entropy, nats a token
perplexity      exp(val_loss)
bits_per_byte   val_loss / ln 2 / bytes a token: comparable between tokenizers
ece             expected calibration error: |confidence - accuracy| of the top token, averaged
                over 15 equal bins of confidence (Guo et al. 2017, 1706.04599)
kl              mean KL(teacher || student) at T = 1, nats a token
agreement       share of tokens where student and teacher have the same top token
teacher_loss    the teacher's own val_loss: what is there to be learned from it
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distill import cross_entropy, kl_divergence
from distill.fused import chunk_size

BINS = 15


@torch.no_grad()
def evaluate(
    student, batches: Iterable[tuple[Tensor, Tensor]], bytes_per_token=None, teacher=None
) -> dict[str, float]:
    """Metrics of `student` over batches of (input_ids, labels), both (B, S); labels of -100 do not
    count. With `teacher`, the last three are added. Logits are made for a chunk at a time."""
    device, size = student.lm_head.weight.device, chunk_size(len(student.lm_head.weight))
    # Sums are kept on the CPU: Apple's MPS has no float64.
    sums = torch.zeros(5, dtype=torch.float64)  # tokens, loss, kl, agreeing, teacher
    bins = torch.zeros(2, BINS, dtype=torch.float64)  # confidence, correct
    for input_ids, labels in batches:
        input_ids, labels = input_ids.to(device), labels.to(device)
        valid = labels != -100
        hidden, labels = student.model(input_ids)[valid], labels[valid]  # (N, D), (N,)
        teacher_hidden = None if teacher is None else teacher.model(input_ids)[valid]
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logits = student.lm_head(hidden[rows]).float()  # (C, V)
            loss = cross_entropy(logits, labels[rows])
            confidence, top = logits.softmax(-1).max(-1)
            values = [torch.ones_like(loss), loss]
            if teacher is not None:
                teacher_logits = teacher.lm_head(teacher_hidden[rows]).float()
                values.append(kl_divergence(logits, teacher_logits, 1.0))
                values.append((top == teacher_logits.argmax(-1)).float())
                values.append(cross_entropy(teacher_logits, labels[rows]))
            if (found := torch.stack([*values, confidence]).cpu()).isnan().any():
                raise ValueError("a model's guess is nan: train it, or download it again")
            sums[: len(values)] += found[:-1].double().sum(-1)
            index = (confidence * BINS).long().clamp(max=BINS - 1).cpu()
            correct = (top == labels[rows]).float()
            bins.index_add_(1, index, torch.stack((confidence, correct)).cpu().double())
    tokens, loss, kl, agreeing, teacher_loss = sums.tolist()
    if not tokens:
        raise ValueError("no token to evaluate: the held-out data has no label")
    loss = loss / tokens
    metrics = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
    if bytes_per_token is not None:
        metrics["bits_per_byte"] = loss / math.log(2) / bytes_per_token
    metrics["ece"] = float((bins[0] - bins[1]).abs().sum() / tokens)
    of_teacher = {"kl": kl, "agreement": agreeing, "teacher_loss": teacher_loss}
    of_teacher = {name: value / tokens for name, value in of_teacher.items()}
    return metrics if teacher is None else metrics | of_teacher


@torch.no_grad()
def loss_together(models: list[nn.Module], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """What several models say together: -log of the mean of their probabilities, nats per label
    that is not -100, over batches of input_ids and labels (B, S). At most the mean of their own
    losses, and lower the more they differ (Jensen): what a group gains without any teaching."""
    total, tokens = 0.0, 0
    for batch in batches:
        input_ids, labels = (x.to(models[0].lm_head.weight.device) for x in batch)
        losses = torch.stack([cross_entropy(model(input_ids), labels) for model in models])
        together = math.log(len(models)) - (-losses).logsumexp(0)  # (K, B, S) -> (B, S)
        valid = labels != -100
        total, tokens = total + float(together[valid].double().sum()), tokens + int(valid.sum())
    return total / tokens
