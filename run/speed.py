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
    largest = max(model.num_parameters() for model in (student, teacher) if model is not None)
    rows = max(1, min(args.batch_size, min(TOKENS, WORK // largest) // args.seq_len))
    input_ids, told = example_ids(student, rows, args.seq_len), []
    args.dtype, seconds = faster(student, input_ids, args.dtype, told)
    if teacher is not None:
        args.teacher_dtype, more = faster(teacher, input_ids, args.teacher_dtype, told)
        seconds += more
    else:
        args.teacher_dtype = args.dtype
    left = seconds * args.steps * args.batch_size * args.seq_len / input_ids.numel()
    if args.compile is None:
        args.compile = compiler_for(device) and COMPILE_SAVES * left > COMPILE_SECONDS
    if parallel.is_main():
        compiled = "--compile" if args.compile else "--no-compile"
        print(f"{input_ids.numel()} tokens: {'; '.join(told)}; {compiled}")


def example_ids(model, rows: int, sequence: int) -> Tensor:
    """Some token ids (rows, sequence) on the model's device: what they are takes no time."""
    ids = torch.arange(rows * sequence, device=model.lm_head.weight.device)
    return ids.view(rows, sequence) % model.config.vocab_size


def faster(model, input_ids, dtype: str, told: list[str]) -> tuple[str, float]:
    """The precision to use and its seconds, for forward (and backward, where the model learns).

    dtype: "auto", or the only one to time. told: gets a line about it.
    """
    device = input_ids.device
    tried = [dtype] if dtype != "auto" else ["float32"]
    worth_a_try = device.type == "cuda" or model.num_parameters() >= SMALLEST_FOR_BFLOAT16
    if dtype == "auto" and device.type != "mps" and worth_a_try:
        tried.append("bfloat16")
    # Where nothing is chosen the time only tells how long the run will take: once is enough.
    rounds = 4 if len(tried) > 1 else 1
    times = {name: parallel.of_main(measure(model, input_ids, name, rounds)) for name in tried}
    best = tried[-1] if times[tried[-1]] < GAIN_NEEDED * times[tried[0]] else tried[0]
    shown = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in times.items())
    learns = any(parameter.requires_grad for parameter in model.parameters())
    told.append(f"{'student' if learns else 'teacher'} {shown}: {best}")
    return best, times[best]


def measure(model, input_ids: Tensor, dtype: str, rounds: int = 4) -> float:
    """Seconds for a pass over input_ids (B, S): the fastest, after one to warm up."""
    learns = any(parameter.requires_grad for parameter in model.parameters())
    tries = []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        with autocast(input_ids.device, dtype), torch.set_grad_enabled(learns):
            logits = model.lm_head(model.model(input_ids))
        if learns:
            logits.float().logsumexp(-1).mean().backward()
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize()
        tries.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    return min(tries[1:])


def compiler_for(device: torch.device) -> bool:
    """Whether torch.compile has what it needs: a C++ compiler for a CPU, Triton for CUDA."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and any(map(shutil.which, ("g++", "clang++", "cl")))
