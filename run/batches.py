"""Batches made ahead of time, and cut into micro-batches without changing loss or gradient."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from . import parallel

# Sizes are rounded up to multiples: for every new shape a matrix product may compile a kernel (in
# bfloat16 on a CPU it does, and that took as long as the products themselves).
COLUMNS, PLACES = 32, 256


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
            yield (*(piece[:, :end] for piece in pieces), float(weight.sum() / total))


def length_in_use(weights: Tensor) -> int:
    """Columns of weights (B, S) up to the last one that is not all zero, rounded up."""
    columns = (weights > 0).any(0).nonzero()
    return round_up(int(columns[-1]) + 1, COLUMNS, weights.shape[1]) if len(columns) else 0


def places_in_use(weights: Tensor) -> Tensor:
    """Where the flattened weights (B, S) are not zero, (N,); some zeros after them round N up."""
    in_use = (weights.flatten() > 0).to(torch.uint8)
    N = round_up(int(in_use.sum()), PLACES, in_use.numel())
    return in_use.argsort(descending=True, stable=True)[:N]


def round_up(number: int, multiple: int, most: int) -> int:
    return min(-(-number // multiple) * multiple, most)


class Ahead:
    """Makes the next step's tensors in a thread, while this step's are computed with.

    make(step) -> a tuple of CPU tensors that depend on the step alone. For CUDA they are pinned,
    so that .to(device, non_blocking=True) does not wait for the copy.
    """

    def __init__(self, make: Callable[[int], tuple[Tensor, ...]], steps: int, device: torch.device):
        self.make, self.steps, self.pin = make, steps, device.type == "cuda"
        self.thread = ThreadPoolExecutor(1)
        self.coming: tuple = (None, None)  # a step, and the future of its tensors

    def prepare(self, step: int) -> tuple[Tensor, ...]:
        tensors = self.make(step)
        return tuple(tensor.pin_memory() for tensor in tensors) if self.pin else tensors

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """The tensors of `step`."""
        expected, future = self.coming
        if expected != step:  # the first step of this process
            future = self.thread.submit(self.prepare, step)
        tensors = future.result()
        if step + 1 < self.steps:
            self.coming = (step + 1, self.thread.submit(self.prepare, step + 1))
        return tensors
