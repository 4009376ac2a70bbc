"""Where and how a model computes: device, precision, threads, memory."""

import contextlib
import ctypes
import gc
import os
import platform
import re
import sys
from pathlib import Path

import numpy as np
import torch


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The torch device for --device; "auto" takes CUDA, then Apple's MPS, then the CPU.
    local_rank: of this process, where there are several on the machine: each has its own GPU."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    several = local_rank is not None
    if several and name == "cuda":
        name = f"cuda:{local_rank}"
    elif several and name != "cpu":
        cure = "use cuda, which gives each a GPU, or cpu"
        raise ValueError(f"--device {name} is one device for several processes: {cure}")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
        if several and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not usable ({reason}): try auto or cpu") from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """--dtype auto is bfloat16 where the machine multiplies in it: on CUDA, and on a CPU that has
    instructions for it; elsewhere float32. A rule, not a timing: one command, one result."""
    if name != "auto":
        return name
    native = device.type == "cuda"
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def autocast(device: torch.device, precision: str):
    """A context for forward passes in `precision`; master weights and losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def not_compiled(compiles: bool):
    """A context in which compiled models run as they are written."""
    # Asking torch for it takes two seconds where nothing has been compiled yet.
    return torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()


def available_cores() -> int:
    """Cores that this process may use, which can be fewer than the machine has."""
    limited = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if limited else os.cpu_count() or 1


def describe_device(device: torch.device) -> str:
    """The name of the GPU, or of the processor and the number of its cores in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def prepare_process(seed: int, processes: int) -> None:
    """Seed all random numbers; settle memory and threads, of `processes` on this machine."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    keep_freed_memory()
    # A CPU compiles a bfloat16 kernel, of half a MB, for every shape of a product; by default it
    # keeps 1,024, and with 128 it compiles all the time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "384")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, available_cores() // processes))
    torch.set_float32_matmul_precision("high")  # tf32 on CUDA; nothing changes on a CPU
    reset_peak_memory()


def call_libc(name: str, *numbers: int) -> None:
    """Call a function of the system's C library, where it has one of that name."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), name):
        getattr(ctypes.CDLL(None), name)(*numbers)


def keep_freed_memory() -> None:
    """Ask glibc to keep large freed blocks, as every step takes the same (B, S, V) ones again: to
    zero fresh pages for them cost a third of a distillation step at V = 2,048 on a CPU."""
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
        call_libc("mallopt", parameter, 1 << 30)


def give_back_memory() -> None:
    """Return what `keep_freed_memory` keeps to the system, before it is all in pieces."""
    gc.collect()
    call_libc("malloc_trim", 0)


def reset_peak_memory() -> None:
    """Start a new count of peak memory for this run, where the system can."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MB since `reset_peak_memory`: the GPU's on CUDA, else the whole process's.
    None on Windows, which does not tell; on macOS since the process began."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
    if sys.platform == "linux":
        peak = re.search(r"VmHWM:\s+([0-9]+)", Path("/proc/self/status").read_text())
        return round(int(peak[1]) * 1024 / 1e6, 1)
    if sys.platform == "win32":
        return None
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)  # bytes on macOS
