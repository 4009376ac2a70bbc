"""Cutting a batch into micro-batches without changing its loss or gradient."""

from collections.abc import Iterator

from torch import Tensor


def microbatches(tensors: tuple[Tensor, ...], weights: Tensor, parts: int) -> Iterator[tuple]:
    """Cut each tensor's rows into `parts` pieces; yield (*pieces, their share of the weight).

    weights (B, S) is what each token counts in the loss, which is a mean over tokens. A piece with
    few valid tokens must count less than one with many, so the batch's loss is the sum of
    share * loss(piece); averaging the pieces' means (the usual shortcut) would be another loss.
    """
    total = weights.sum()
    chunks = [tensor.chunk(parts) for tensor in (*tensors, weights)]
    for *pieces, weight in zip(*chunks, strict=True):
        yield (*pieces, weight.sum() / total.clamp(min=1e-9))
