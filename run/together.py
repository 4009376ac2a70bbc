"""What several models say together: the held-out loss of the mean of their probabilities.

    -log (1/K sum_k p_k(label)) = log K - log sum_k exp(-CE_k)

It is at most the mean of their own losses, and lower the more they differ (Jensen): what a group
gains without any teaching. Shapes: B batch, S sequence, K models.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from distill import cross_entropy
from files import write_json


@torch.no_grad()
def loss_together(models: list[nn.Module], batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Nats per label that is not -100, over batches of input_ids and labels, (B, S) each."""
    total, tokens = 0.0, 0
    for batch in batches:
        input_ids, labels = (x.to(models[0].lm_head.weight.device) for x in batch)
        losses = torch.stack([cross_entropy(model(input_ids), labels) for model in models])
        together = math.log(len(models)) - (-losses).logsumexp(0)  # (K, B, S) -> (B, S)
        valid = labels != -100
        total, tokens = total + float(together[valid].double().sum()), tokens + int(valid.sum())
    return total / tokens


def add_together(record: dict, out, models: list[nn.Module], batches) -> dict:
    """Put "together_loss" into the metrics of a finished run, `record`, and into its run.json."""
    record["metrics"]["together_loss"] = loss = loss_together(models, batches)
    write_json(Path(out) / "run.json", record)
    print(f"{out}: {len(models)} models together {loss:.4g}")
    return record
