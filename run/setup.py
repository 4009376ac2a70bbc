"""Device, precision, threads, seed and memory: what a run settles before its first step."""

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path

import numpy as np
import torch

from . import parallel
from .flags import check_flags


def choose_device(name: str) -> torch.device:
    """The torch device for --device; "auto" takes CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    several = parallel.world_size() > 1
    if several and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    elif several and name != "cpu":
        raise ValueError(
            f"--device {name} is one device for {parallel.world_size()} processes: use cuda, which "
            "gives each a GPU, or cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if several and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not usable ({reason}): try auto or cpu") from None
    return device


def setup(args) -> torch.device:
    """Check the flags, seed everything, tune the process; returns the device."""
    parallel.start()
    check_flags(args)
    check_processes(args)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    keep_freed_memory()
    bound_kernel_cache()
    if "OMP_NUM_THREADS" not in os.environ:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
        torch.set_num_threads(max(1, available_cores() // neighbours))
    torch.set_float32_matmul_precision("high")  # tf32 on CUDA; nothing changes on a CPU
    reset_peak_memory()
    return choose_device(args.device)


def check_processes(args) -> None:
    """Raise ValueError for what one process, or several, cannot do."""
    processes = parallel.world_size()
    if processes > args.batch_size:
        raise ValueError(
            f"{processes} processes cannot share a batch of {args.batch_size} sequences: raise "
            "--batch_size, or lower torchrun's --nproc_per_node"
        )
    if args.fsdp and processes == 1:
        raise ValueError(
            "--fsdp shards the models over several processes: start two or more with "
            "torchrun --nproc_per_node=2 and the rest of this command"
        )
    if args.fsdp and vars(args).get("teacher_cache"):
        raise ValueError(
            "--teacher_cache needs the whole teacher in one process, --fsdp has only parts: leave "
            "one of them out"
        )


def available_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def autocast(device: torch.device, dtype: str):
    """A context for forward passes in --dtype; master weights and losses stay float32.

    It holds inside another such context too. "auto" is bfloat16 on CUDA, float32 elsewhere.
    """
    low = dtype == "bfloat16" or (dtype == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks, instead of giving them back to the system.

    A step frees and takes the same (B, S, V) blocks again; having the system zero fresh pages for
    each of them cost a third to a half of a distillation step at V = 2,048 on a CPU.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            trim_threshold, mmap_threshold = -1, -3  # names of <malloc.h>
            libc.mallopt(mmap_threshold, 1 << 30)
            libc.mallopt(trim_threshold, 1 << 30)


def bound_kernel_cache() -> None:
    """Ask oneDNN to keep 384 compiled kernels, not 1,024; before it multiplies for the first time.

    In bfloat16 a CPU compiles one for every new shape of a product and keeps it: up to half a MB
    each, where conversations differ in length. With too few it compiles all the time: where 128
    are kept, a step takes a tenth longer.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "384")


def give_back_memory() -> None:
    """Return what is kept by `keep_freed_memory` to the system, before it is all in pieces."""
    gc.collect()
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)


def reset_peak_memory() -> None:
    """Start a new count of peak memory for this run, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MB since `reset_peak_memory`: the GPU's on CUDA, else the whole process's.

    None where the system does not tell (Windows). On macOS the count cannot be reset.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)  # bytes on macOS
