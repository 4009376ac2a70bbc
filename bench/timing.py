"""How long a step takes, how much memory it adds, and what it would take at the machine's best.

Everything that is compared runs in one process, turn by turn: a machine that slows down slows all
of it, so the ratios hold where the absolute numbers do not. A number is the median over the rounds.
"""

import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from model.device import give_back_memory, not_compiled, peak_memory_mb, reset_peak_memory
from run.meter import CountFlops

Variants = dict[str, Callable[[], int]]  # name -> one step; it returns its tokens


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_of(step: Callable[[], int], device) -> float | None:
    """MB that one step adds at its peak."""
    give_back_memory()
    reset_peak_memory()
    before = peak_memory_mb(device)  # since the reset: what is held now
    step()
    synchronize(device)
    after = peak_memory_mb(device)
    return None if after is None else round(after - before, 1)


def take_turns(variants: Variants, rounds: int, device, name: str) -> list[dict]:
    """A row for every variant: the median of `rounds` rounds in which each of them runs once.

    What the machine can do is the median of a float32 matrix product in the same rounds.
    """
    seconds, counts, peaks = {name: [] for name in variants}, {}, []
    for variant, step in tqdm(variants.items(), desc=f"{name}: warm-up", leave=False):
        step()  # compiles, where it does
        memory = memory_of(step, device)
        with CountFlops() as counter, not_compiled(True):
            counts[variant] = step(), memory, counter
    for _ in tqdm(range(rounds), desc=name, leave=False):
        for variant, step in variants.items():
            seconds[variant].append(seconds_of(step, device))
        peaks.append(matmul_flops(device))
    peak, first, rows = statistics.median(peaks), None, []
    print(f"{name}: a float32 matrix product does {peak / 1e9:,.0f} GFLOP/s")
    for variant, (tokens, memory, counter) in counts.items():
        median = statistics.median(seconds[variant])
        first = first or tokens / median
        rows.append({
            "variant": variant, "tokens_per_second": round(tokens / median),
            "ratio": round(tokens / median / first, 3), "memory_mb": memory,
            "flops_share": round(counter.flops / median / peak, 3), "seconds": round(median, 5),
        })  # fmt: skip
    return rows


def seconds_of(step: Callable, device) -> float:
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started


def matmul_flops(device, size: int = 1536) -> float:
    """Floating-point operations per second of a large square product: the best of five."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5))
