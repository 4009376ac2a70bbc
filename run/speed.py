"""Precision and compilation, settled by a short measurement where the user does not settle them.

bfloat16 halves what a matrix product reads, and some processors multiply it several times as fast;
others know it not at all, and convert every number twice.
torch.compile saves a part of every step and takes up to a minute first. Neither follows from the
name of a machine, so forward and backward of a few tokens are timed, for about a second.

The choice is one of the run's flags from then on: a run that is resumed goes on as it began.
"""

import importlib.util
import shutil
import time

import torch
from torch import Tensor, nn

from . import parallel
from .setup import autocast
from .state import earlier_flags

SMALLEST_FOR_BFLOAT16 = 150_000  # parameters; on a CPU smaller models are not worth a measurement
GAIN_NEEDED = 0.9  # of float32's time: a tie must not make two runs of one command differ
COMPILE_SECONDS, COMPILE_SAVES = 60, 0.1  # what it costs; the least share of a step that it saves
TOKENS, WORK = 2048, 10**10  # of the measurement: at most so many tokens, and parameters x tokens
ROUNDS = 4


def settle_speed(args, device, student: nn.Module, teacher=None) -> None:
    """Replace --dtype auto, and a --compile that was left open, by what pays here; say so.

    The teacher's precision is args.teacher_dtype: only its forward pass runs, so it may gain where
    the student does not. A --dtype that the user names is for both.
    """
    args.teacher_dtype = args.dtype
    if args.resume:
        before = earlier_flags(args.out)
        for name in ("dtype", "teacher_dtype"):
            if vars(args)[name] == "auto":
                setattr(args, name, before.get(name, "auto"))
        if args.compile is None:
            args.compile = before.get("compile")
    if "auto" not in (args.dtype, args.teacher_dtype) and args.compile is not None:
        return
    models = [model for model in (student, teacher) if model is not None]
    input_ids, told = example_ids(models, args.batch_size, args.seq_len), []
    args.dtype, seconds = faster("student", [student], input_ids, args.dtype, told)
    if teacher is not None:
        args.teacher_dtype, more = faster("teacher", [teacher], input_ids, args.teacher_dtype, told)
        seconds += more
    else:
        args.teacher_dtype = args.dtype
    left = seconds * args.steps * args.batch_size * args.seq_len / input_ids.numel()
    if args.compile is None:
        args.compile = compiler_for(device) and COMPILE_SAVES * left > COMPILE_SECONDS
    if parallel.is_main():
        compiled = "--compile" if args.compile else "--no-compile"
        print(f"{input_ids.numel()} tokens: {'; '.join(told)}; {compiled}")


def example_ids(models, batch_size: int, seq_len: int) -> Tensor:
    """Some ids (rows, seq_len) on the models' device, at most a batch; which ids takes no time."""
    largest = max(model.num_parameters() for model in models)
    rows = max(1, min(batch_size, min(TOKENS, WORK // largest) // seq_len))
    ids = torch.arange(rows * seq_len, device=models[0].lm_head.weight.device)
    return ids.view(rows, seq_len) % models[0].config.vocab_size


def faster(label: str, models, input_ids, dtype: str, told: list[str]) -> tuple[str, float]:
    """The precision to use for all of `models`, and the seconds that they take together.

    dtype: "auto", or the only one to time. told: gets a line about it, which begins with label.
    The precisions take turns, so that a busy moment of the machine does not choose between them.
    """
    device = input_ids.device
    tried = [dtype] if dtype != "auto" else ["float32"]
    largest = max(model.num_parameters() for model in models)
    worth_a_try = device.type == "cuda" or largest >= SMALLEST_FOR_BFLOAT16
    if dtype == "auto" and device.type != "mps" and worth_a_try:
        tried.append("bfloat16")
    turns = [
        [sum(measure(model, input_ids, name) for model in models) for name in tried]
        for _ in range(1 + ROUNDS)
    ][1:]  # the first warms up
    times = [parallel.of_main(min(seconds)) for seconds in zip(*turns, strict=True)]
    best = -1 if times[-1] < GAIN_NEEDED * times[0] else 0
    shown = ", ".join(f"{n} {1000 * t:.0f} ms" for n, t in zip(tried, times, strict=True))
    told.append(f"{label} {shown}: {tried[best]}")
    return tried[best], times[best]


def measure(model, input_ids: Tensor, dtype: str) -> float:
    """Seconds of one pass over input_ids (B, S): forward, and backward where the model learns."""
    learns = any(parameter.requires_grad for parameter in model.parameters())
    started = time.perf_counter()
    with autocast(input_ids.device, dtype), torch.set_grad_enabled(learns):
        logits = model.lm_head(model.model(input_ids))
    if learns:
        logits.float().logsumexp(-1).mean().backward()
    if input_ids.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds


def compiler_for(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler for a CPU, Triton for CUDA."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and any(map(shutil.which, ("g++", "clang++", "cl")))
