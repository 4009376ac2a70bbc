"""Precision and compilation, settled by a short measurement where the user does not settle them.

bfloat16 halves what a matrix product reads, and some processors multiply it several times as fast;
but small matrices are bound by other things, and there the conversions cost more than they save.
torch.compile saves a part of every step and takes up to a minute first. Neither follows from the
name of a machine, so forward and backward of a few tokens are timed, for about a second.

The choice is one of the run's flags from then on: a run that is resumed goes on as it began.
"""

import importlib.util
import shutil
import time

import torch
from torch import nn

from . import parallel
from .folder import earlier_flags
from .setup import autocast

SMALLEST_FOR_BFLOAT16 = 1_500_000  # parameters; below it was never faster on a CPU
GAIN_NEEDED = 0.9  # of float32's time: a tie must not make two runs of one command differ
COMPILE_SECONDS, COMPILE_SAVES = 60, 0.1  # what it costs; the least share of a step that it saves
TOKENS = 512  # of the measurement


def settle_speed(args, device: torch.device, student: nn.Module) -> None:
    """Replace --dtype auto, and a --compile that was left open, by what pays here; say so."""
    if args.resume:
        before = earlier_flags(args.out)
        if args.dtype == "auto":
            args.dtype = before.get("dtype", "auto")
        if args.compile is None:
            args.compile = before.get("compile")
    if args.dtype != "auto" and args.compile is not None:
        return
    times = measure(args, device, student)
    if args.dtype == "auto":
        paying = times.get("bfloat16", float("inf")) < GAIN_NEEDED * times["float32"]
        args.dtype = "bfloat16" if paying else "float32"
    left = times[args.dtype] * args.steps * args.batch_size * args.seq_len / TOKENS
    if args.compile is None:
        args.compile = compiler_for(device) and COMPILE_SAVES * left > COMPILE_SECONDS
    if parallel.is_main():
        shown = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in times.items())
        compiled = "--compile" if args.compile else "--no-compile"
        print(f"{TOKENS} tokens forward and backward: {shown}: --dtype {args.dtype} {compiled}")


def compiler_for(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler for a CPU, Triton for CUDA."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and any(map(shutil.which, ("g++", "clang++", "cl")))


def measure(args, device: torch.device, student: nn.Module) -> dict[str, float]:
    """Seconds for forward and backward of TOKENS tokens, by precision: the faster of two runs."""
    S = min(args.seq_len, TOKENS)
    input_ids = torch.arange(TOKENS // S * S, device=device).view(-1, S)
    input_ids %= student.config.vocab_size
    dtypes = [args.dtype] if args.dtype != "auto" else ["float32"]
    worth_a_try = device.type == "cuda" or student.num_parameters() >= SMALLEST_FOR_BFLOAT16
    if args.dtype == "auto" and device.type != "mps" and worth_a_try:
        dtypes.append("bfloat16")
    seconds = {}
    for dtype in dtypes:
        tries = []
        for _ in range(3):  # the first one warms up
            started = time.perf_counter()
            with autocast(device, dtype):
                logits = student.lm_head(student.model(input_ids))
            logits.float().logsumexp(-1).mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            tries.append(time.perf_counter() - started)
            student.zero_grad(set_to_none=True)
        seconds[dtype] = parallel.of_main(min(tries[1:]))
    return seconds
