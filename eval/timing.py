"""How long a step takes, how much memory it adds, and what it would take at the machine's best.

Everything that is compared runs in one process, turn by turn: a machine that slows down slows all
of it, so the ratios hold where the absolute numbers do not. A number is the median over the rounds.
"""

import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from model import ModelConfig
from run.setup import give_back_memory, peak_memory_mb, reset_peak_memory

Variants = dict[str, Callable[[], int]]  # name -> one step; it returns its tokens


def synchronize(device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_of(step: Callable[[], int], device) -> float | None:
    """MB that one step adds at its peak."""
    give_back_memory()
    reset_peak_memory()
    before = (
        torch.cuda.memory_allocated() / 1e6 if device.type == "cuda" else peak_memory_mb(device)
    )
    step()
    synchronize(device)
    after = peak_memory_mb(device)
    return None if after is None else round(after - before, 1)


def take_turns(variants: Variants, rounds: int, device, name: str) -> tuple[dict[str, dict], float]:
    """Median seconds, tokens and memory of every variant, all of them once a round.

    Second: operations a second of a float32 matrix product, the median of the same rounds.
    """
    seconds, result, peaks = {name: [] for name in variants}, {}, []
    for variant, step in tqdm(variants.items(), desc=f"{name}: warm-up", leave=False):
        step()  # compiles, where it does
        memory = memory_of(step, device)
        result[variant] = {"memory_mb": memory, "tokens": step()}
    for _ in tqdm(range(rounds), desc=name, leave=False):
        for variant, step in variants.items():
            synchronize(device)
            started = time.perf_counter()
            step()
            synchronize(device)
            seconds[variant].append(time.perf_counter() - started)
        peaks.append(matmul_flops(device))
    for variant, times in seconds.items():
        result[variant]["seconds"] = statistics.median(times)
    return result, statistics.median(peaks)


def matmul_flops(device, dtype=torch.float32, size: int = 1536) -> float:
    """Floating-point operations a second of a large square matrix product: the best of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def flops_per_token(config: ModelConfig, factor: int, sequence: int) -> float:
    """factor 6: forward and backward; 2: forward alone."""
    D, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    key_values = config.num_key_value_heads * config.head_dim
    layer = 2 * D * heads + 2 * D * key_values + 3 * D * config.intermediate_size
    parameters = config.num_hidden_layers * layer + config.vocab_size * D
    attention = config.num_hidden_layers * heads * sequence  # causal: half of 2 * S * H * d
    return factor * (parameters + attention)
