"""Batches cut into micro-batches without changing loss or gradient.

A batch is a tuple of tensors (B, ...), of which the second are the labels (B, S), -100 where
nothing is learned.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import parallel

# Widths are rounded up to a multiple: for every new shape a matrix product may compile a kernel (in
# bfloat16 on a CPU it does, and that took as long as the products themselves).
COLUMNS = 32
PARTS, ROWS = 4, 8  # of a batch with padding: at most so many micro-batches, of so many rows


def count_parts(batch_size: int, accumulation_steps: int, padded: bool) -> int:
    """Micro-batches of a batch: more are less padding, but each costs time by itself."""
    least = min(PARTS, batch_size // ROWS) if padded else 1
    return max(accumulation_steps, least)


def micro_batches(batch: tuple[Tensor, ...], parts: int, padded: bool) -> Iterator[tuple]:
    """Cut the batch's rows into `parts` pieces; yield (piece, how many labels it has to learn).
    Of N processes each takes every Nth row, so that long and short rows are dealt evenly. Pieces
    without a label are left out. padded: a piece ends at its last label (causal attention)."""
    size = parallel.world_size()
    of_ranks = [list(pieces_of_rank(batch, parts, padded, rank, size)) for rank in range(size)]
    local = of_ranks[parallel.rank()]
    yield from local
    # With --fsdp all must run a layer together: who has fewer pieces runs along, counting nothing.
    for piece, _ in max(of_ranks, key=len)[len(local) :]:
        yield piece, 0


def pieces_of_rank(batch, parts: int, padded: bool, rank: int, processes: int) -> Iterator[tuple]:
    columns = batch[1].shape[1]
    for piece in zip(*(tensor[rank::processes].chunk(parts) for tensor in batch), strict=True):
        learned = piece[1] != -100
        if not learned.any():
            continue
        if padded:
            end = -(-(int(learned.any(0).nonzero()[-1]) + 1) // COLUMNS) * COLUMNS
            piece = tuple(x[:, :end] if x.shape[1:2] == (columns,) else x for x in piece)
        yield piece, int(learned.sum())


class Accumulated:
    """The loss of one batch, added up over its micro-batches while their gradients are."""

    def __init__(self, batch: tuple[Tensor, ...], device: torch.device):
        self.input_ids, self.labels = batch[0], int((batch[1] != -100).sum())
        self.loss, self.parts = torch.zeros((), device=device), {}
        self.weight: Tensor | None = None  # sum of the lesson's own denominators, over labels

    def add(self, loss: Tensor, parts: dict, labels: int, weight: Tensor | None) -> None:
        """Backward; the micro-batch counts by its `weight`, or by its labels, over the batch's."""
        share = (labels if weight is None else torch.as_tensor(weight).detach()) / self.labels
        share = share if labels else 0.0  # a piece that only runs along
        (share * loss).backward()
        self.loss += share * loss.detach()
        for name, value in parts.items():
            value = torch.as_tensor(value, device=loss.device).detach()  # a number, or a tensor
            self.parts[name] = self.parts.get(name, 0.0) + share * value
        if weight is not None:
            self.weight = share + (0.0 if self.weight is None else self.weight)

    def denominator(self) -> Tensor | None:
        """What gradients must be multiplied by, where weights were not labels; the loss is."""
        if self.weight is None:
            return None
        total = parallel.total(torch.as_tensor(self.weight, dtype=torch.float32))
        scale = 1 / torch.where(total > 0, total, 1.0)
        self.loss = self.loss * scale
        self.parts = {name: value * scale for name, value in self.parts.items()}
        return scale

    def totals(self) -> tuple[float, dict[str, float]]:
        """Loss and parts over all processes."""
        values = torch.stack([self.loss, *self.parts.values()]).float()
        loss, *parts = parallel.total(values).tolist()
        return loss, dict(zip(self.parts, parts, strict=True))
