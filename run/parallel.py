"""One run on several devices, a process each: data-parallel training.

    torchrun --nproc_per_node=4 train_pretrain.py --batch_size 64

Every process holds the same weights, reads the whole batch, and takes its own rows of it
(run/batches.py). Its loss is its part of the batch's, so gradients are summed over the processes,
once per optimizer step, and all make the same update. (DistributedDataParallel also sends each
layer's gradients while earlier layers are still in backward.) Rank 0 writes and prints. Alone, all
of this is the identity.
"""

import os
import sys
from contextlib import suppress
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from files import command

TIMEOUT = timedelta(hours=2)  # others wait while rank 0 evaluates or compiles
store = None  # the key-value store of torchrun, which outlives a process that failed


def start() -> None:
    """Join the processes that torchrun started, if it did."""
    global store
    if store is not None or int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:
        return
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        command.end_process = end_process
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        cure = "start them with torchrun; if the port is taken choose another with --master_port"
        reason = str(error).splitlines()[0]
        raise ValueError(f"the processes cannot meet ({reason}): {cure}") from None
    if number > 0:
        sys.stdout = open(os.devnull, "w")  # what all processes would print is printed once


def end_process(code: int, message: str | None) -> None:
    """End this process, one of several; the first one to fail says why. It leaves the connections
    open: closing them waits for the others (torchtitan #1342). Nor is the interpreter taken down:
    gloo's threads may hold tensors (pytorch #179291)."""
    with suppress(RuntimeError):  # the store went with its process, which has reported
        if message is not None and store.add("failures", 1) == 1:
            command.end_alone(0, message)
    if code == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


# Agreements. Each is made by all processes at the same place, or they wait for each other forever.


def total(value: Tensor) -> Tensor:
    """`value`, become the sum of every process's. Raises OSError where another one is gone."""
    if world_size() > 1:
        try:
            dist.all_reduce(value)
        except RuntimeError:
            cure = "see its message (or was it killed for memory?), and go on with --resume"
            raise ConnectionError(f"another process of this run has ended: {cure}") from None
    return value


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true in any process. It is a CPU's tensor: no process waits for a GPU."""
    return bool(total(torch.tensor(int(flag)))) if world_size() > 1 else flag


def barrier() -> None:
    any_rank(False)


def broadcast_from_rank0(value: float) -> float:
    """The value that rank 0 has: equal weights on unequal GPUs may differ in the last digit."""
    return float(total(torch.tensor(value if is_main() else 0.0, dtype=torch.float64)))


def sum_gradients(gradients: list[Tensor]) -> None:
    """Replace every gradient by its sum over the processes, sent as one vector."""
    if world_size() > 1 and gradients:
        vector_to_parameters(total(parameters_to_vector(gradients)), gradients)
