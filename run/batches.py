"""Cutting a batch into micro-batches without changing its loss or gradient."""

from collections.abc import Iterator

from torch import Tensor

from . import parallel


def microbatches(tensors: tuple[Tensor, ...], weights: Tensor, parts: int) -> Iterator[tuple]:
    """Cut each tensor's rows into `parts` pieces; yield (*pieces, their share of the weight).

    Of N processes each takes every Nth row, so that long and short rows are dealt evenly.

    weights (B, S) is what each token counts in the loss, which is a mean over tokens. A piece with
    few valid tokens must count less than one with many, so the batch's loss is the sum of
    share * loss(piece); averaging the pieces' means (the usual shortcut) would be another loss.

    A piece ends at its last token that counts: what stands to the right of it (padding) cannot
    matter under causal attention. Where rows are sorted by length this removes most padding.
    """
    hands = [
        list(pieces_of(tensors, weights, parts, rank, parallel.world_size()))
        for rank in range(parallel.world_size())
    ]
    mine = hands[parallel.rank()]
    yield from mine
    # With --fsdp all processes must run a layer together. One that has fewer pieces runs along on
    # another's, at no weight.
    for *pieces, share in max(hands, key=len)[len(mine) :]:
        yield (*pieces, 0 * share)


def pieces_of(tensors, weights: Tensor, parts: int, rank: int, processes: int) -> Iterator[tuple]:
    """The pieces of one process, each with its share of the whole batch's weight."""
    total = weights.sum()
    chunks = [tensor[rank::processes].chunk(parts) for tensor in (*tensors, weights)]
    for *pieces, weight in zip(*chunks, strict=True):
        end = length_in_use(weight)
        if end:
            yield (*(piece[:, :end] for piece in pieces), weight.sum() / total)


def length_in_use(weights: Tensor) -> int:
    """Columns of weights (B, S) up to the last one that is not all zero."""
    columns = (weights > 0).any(0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 0
