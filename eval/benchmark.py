"""How fast, in how much memory, and how near to what the machine can do.

    python -m eval.benchmark                        # results/benchmark/results.csv, some minutes
    python -m eval.benchmark --only distillation --no-compile
    python -m eval.benchmark --peers                # TRL beside it: requirements-bench.txt
    python -m eval.benchmark --against results/benchmark/results.csv     # ratios to an earlier run

Everything that is compared runs in one process, turn by turn: a machine that slows down slows all
of it, so the ratios hold where the absolute numbers do not. A number is the median over the rounds.

tokens_per_second  of a training step (forward, backward, AdamW), or generated
ratio              this variant's speed, over that of the group's first variant
memory_mb          peak memory that a step adds to what the models and the optimizer hold
flops_share        floating-point operations that the method needs, over what the machine's own
                   matrix product does in the same time, in float32. The count is 6 N a token for a
                   student, 2 N for a live teacher (N: parameters that multiply; a tied embedding
                   counts once, as the head), plus causal attention, 6 or 2 L H d S.

Shapes: B batch, S sequence, V vocabulary, N tokens, D width.
"""

import argparse
import contextlib
import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dataset.cache_teacher import top_k
from distill import (
    HiddenTeacher,
    SparseTeacher,
    fused_mixed_loss,
    mixed_loss,
    weighted_cross_entropy,
)
from model import ModelConfig, Transformer, generate
from run.files import atomic_path, command_line
from run.flags import new_parser
from run.folder import describe_device
from run.setup import (
    autocast,
    available_cores,
    choose_device,
    give_back_memory,
    keep_freed_memory,
    peak_memory_mb,
    reset_peak_memory,
)
from run.speed import compiler_for

COLUMNS = (
    "group size variant tokens_per_second ratio memory_mb flops_share seconds rounds device torch"
).split()
B, S = 16, 128
K = 64  # of the sparse cache
Variants = dict[str, Callable[[], int]]  # name -> one step; it returns its tokens


# Timing.


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


def take_turns(variants: Variants, rounds: int, device, name: str) -> dict[str, dict]:
    """Median seconds, tokens and memory of every variant, all of them once a round."""
    seconds, result = {name: [] for name in variants}, {}
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
    for variant, times in seconds.items():
        result[variant]["seconds"] = statistics.median(times)
    return result


def matmul_flops(device, dtype=torch.float32, size: int = 1536) -> float:
    """Floating-point operations a second of a large square matrix product: the best of ten."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
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


# What is timed.


class Bench:
    """A student on random tokens, and its training step with any loss."""

    def __init__(self, size: str, vocab_size: int, device):
        torch.manual_seed(0)
        self.device = device
        self.config = ModelConfig.preset(size, vocab_size)
        self.student = Transformer(self.config).to(device)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, fused=True)
        tokens = torch.randint(vocab_size, (B, S + 1), device=device)
        self.input_ids, self.labels = tokens[:, :-1], tokens[:, 1:]
        self.bodies = {False: self.student.model}

    def body(self, compiled: bool):
        if compiled not in self.bodies:
            self.bodies[True] = torch.compile(self.student.model)
        return self.bodies[compiled]

    def step(self, loss_of, dtype: str = "float32", compiled: bool = False) -> Callable[[], int]:
        """A training step; loss_of(hidden) -> scalar."""

        def run() -> int:
            with autocast(self.device, dtype):
                loss = loss_of(self.body(compiled)(self.input_ids))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return B * S

        return run


def pretraining(size: str, device, compiles: bool) -> tuple[Variants, dict[str, float]]:
    bench = Bench(size, 2048, device)

    def loss(hidden):
        return weighted_cross_entropy(bench.student.lm_head(hidden), bench.labels)

    variants = {
        f"{dtype}{', compiled' if compiled else ''}": bench.step(loss, dtype, compiled)
        for compiled in ((False, True) if compiles else (False,))
        for dtype in ("float32", "bfloat16")
    }
    return variants, dict.fromkeys(variants, flops_per_token(bench.config, 6, S))


def distillation(sizes: str, device, compiles: bool) -> tuple[Variants, dict[str, float]]:
    """Student and teacher of "student<teacher", vocabulary 1,024, T = 1, alpha = 0.5."""
    student_size, teacher_size = sizes.split("<")
    bench = Bench(student_size, 1024, device)
    config = ModelConfig.preset(teacher_size, 1024)
    teacher = Transformer(config).to(device).requires_grad_(False)
    head, labels, student = teacher.lm_head.weight, bench.labels, bench.student
    with torch.no_grad():
        cached = teacher.model(bench.input_ids)
        ids, kept, rest = top_k(teacher.lm_head(cached).log_softmax(-1).flatten(0, 1), K)
    sparse = SparseTeacher(ids.view(B, S, K), kept.exp().view(B, S, K), tail=rest.exp().view(B, S))
    teacher_bodies = {False: teacher.model}

    def teacher_body(compiled, dtype="float32"):
        if compiled not in teacher_bodies:
            teacher_bodies[True] = torch.compile(teacher.model)
        with torch.no_grad(), autocast(device, dtype):
            return teacher_bodies[compiled](bench.input_ids)

    def fused(hidden, says, compiled):
        return fused_mixed_loss(hidden, student.lm_head.weight, says, labels, compiled=compiled)

    losses = {
        "plain": lambda hidden, compiled: mixed_loss(
            student.lm_head(hidden), teacher.lm_head(teacher_body(compiled)), labels
        ),
        "fused": lambda hidden, compiled: fused(
            hidden, HiddenTeacher(teacher_body(compiled), head), compiled
        ),
        "fused, bfloat16 teacher": lambda hidden, compiled: fused(
            hidden, HiddenTeacher(teacher_body(compiled, "bfloat16"), head), compiled
        ),
        "fused, cached hidden": lambda hidden, compiled: fused(
            hidden, HiddenTeacher(cached, head), compiled
        ),
        f"fused, cached top {K}": lambda hidden, compiled: fused(hidden, sparse, compiled),
        "no teacher": lambda hidden, compiled: weighted_cross_entropy(
            student.lm_head(hidden), labels
        ),
    }
    own, teachers = flops_per_token(bench.config, 6, S), flops_per_token(config, 2, S)
    flops = dict.fromkeys(losses, own + teachers)
    flops["fused, cached hidden"] = own + 2 * 1024 * config.hidden_size
    flops[f"fused, cached top {K}"] = flops["no teacher"] = own
    variants, counts = {}, {}
    for compiled in (False, True) if compiles else (False,):
        for name, loss in losses.items():
            full = name + (", compiled" if compiled else "")

            def loss_of(hidden, loss=loss, compiled=compiled):
                return loss(hidden, compiled)

            variants[full] = bench.step(loss_of, compiled=compiled)
            counts[full] = flops[name]
    return variants, counts


def loss_alone(size: str, device, compiles: bool) -> tuple[Variants, dict[str, float]]:
    """Heads and loss without bodies: 4,096 tokens, vocabulary 32,768, widths 256 and 512."""
    N, V, D, E = 4096, 32768, 256, 512
    hidden, teacher_hidden = (torch.randn(N, width, device=device) for width in (D, E))
    head, teacher_head = (0.05 * torch.randn(V, width, device=device) for width in (D, E))
    labels = torch.randint(V, (N,), device=device)
    hidden.requires_grad_(), head.requires_grad_()

    def plain():
        logits, teacher_logits = F.linear(hidden, head), F.linear(teacher_hidden, teacher_head)
        mixed_loss(logits[None], teacher_logits[None], labels[None]).backward()
        hidden.grad = head.grad = None
        return N

    def fused():
        says = HiddenTeacher(teacher_hidden, teacher_head)
        fused_mixed_loss(hidden, head, says, labels).backward()
        hidden.grad = head.grad = None
        return N

    variants = {"plain": plain, "fused": fused}
    return variants, dict.fromkeys(variants, 6 * V * D + 2 * V * E)


def generation(size: str, device, compiles: bool) -> tuple[Variants, dict[str, float]]:
    """64 prompts of 32 tokens, 64 new tokens each; of those one at a time only 4 are run."""
    torch.manual_seed(0)
    config = ModelConfig.preset(size, 2048)
    model = Transformer(config).to(device)
    prompts, new = torch.randint(7, 2048, (64, 32)).tolist(), 64

    def batched(use_cache: bool):
        generate(model, prompts, new, stop_ids=(), use_cache=use_cache)
        return len(prompts) * new

    def one_at_a_time(use_cache: bool):
        for prompt in prompts[:4]:
            generate(model, [prompt], new, stop_ids=(), use_cache=use_cache)
        return 4 * new

    variants = {
        "one at a time, no cache": lambda: one_at_a_time(False),
        "one at a time, cache": lambda: one_at_a_time(True),
        "64 together, cache": lambda: batched(True),
    }
    return variants, dict.fromkeys(variants, flops_per_token(config, 2, 64))


GROUPS = {
    "pretraining": (pretraining, ("nano", "mini", "small"), 9),
    "distillation": (distillation, ("nano<mini", "mini<small", "small<base"), 9),
    "loss": (loss_alone, ("4096x32768",), 3),
    "generation": (generation, ("nano", "mini", "small"), 3),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--only", choices=tuple(GROUPS), default=None, help="one group")
    parser.add_argument("--size", default=None, help="one size of a group, as the CSV names it")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time torch.compile, where there is a compiler (half a minute a variant)",
    )
    parser.add_argument("--peers", action="store_true", help="also time TRL's GKD, if installed")
    parser.add_argument("--against", type=Path, default=None, help="earlier results.csv to compare")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--out", type=Path, default=Path("out/benchmark/results.csv"), help="CSV to write"
    )
    return parser.parse_args(argv)


def main(args) -> list[dict]:
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cores())
    device = choose_device(args.device)
    earlier = read_results(args.against) if args.against else {}
    compiles = args.compile and compiler_for(device)
    rows = []
    peaks = {dtype: matmul_flops(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    shown = ", ".join(f"{str(k)[6:]} {value / 1e9:,.0f} GFLOP/s" for k, value in peaks.items())
    print(f"{describe_device(device)}: matrix product {shown}")
    for group, (make, sizes, rounds) in GROUPS.items():
        for size in sizes:
            if (args.only or group) != group or (args.size or size) != size:
                continue
            variants, flops = make(size, device, compiles)
            if args.peers and group == "distillation":
                from eval.peers import peer_variants  # needs requirements-bench.txt

                variants |= peer_variants(size, B, S, device)
            results = take_turns(variants, rounds, device, f"{group} {size}")
            base = None
            for variant, got in results.items():
                speed = got["tokens"] / got["seconds"]
                base = base or speed
                row = {
                    "group": group, "size": size, "variant": variant,
                    "tokens_per_second": round(speed), "ratio": round(speed / base, 3),
                    "memory_mb": got["memory_mb"],
                    "flops_share": round(speed * flops[variant] / peaks[torch.float32], 3)
                    if variant in flops else None,
                    "seconds": round(got["seconds"], 5), "rounds": rounds,
                    "device": describe_device(device), "torch": torch.__version__,
                }  # fmt: skip
                rows.append(row)
                print(line_of(row, earlier))
            write_results(args.out, rows)
    if not rows:
        raise ValueError(
            f"--size {args.size} is no size of group {args.only or 'any'}: see the CSV, or --help"
        )
    print(f"wrote {args.out}")
    return rows


def line_of(row: dict, earlier: dict) -> str:
    share = "" if row["flops_share"] is None else f"{row['flops_share']:6.0%} of float32 peak"
    text = (
        f"{row['group']:13s} {row['size']:12s} {row['variant']:32s} "
        f"{row['tokens_per_second']:>11,} tokens/s  x{row['ratio']:<6.2f} "
        f"{row['memory_mb'] if row['memory_mb'] is not None else '-':>8} MB {share}"
    )
    before = earlier.get((row["group"], row["size"], row["variant"]))
    if before is not None:
        text += f"  {row['tokens_per_second'] / float(before['tokens_per_second']):.2f} of before"
        text += f" (ratio {row['ratio'] / float(before['ratio']):.2f})"
    return text


def read_results(path: Path) -> dict[tuple, dict]:
    """Rows of an earlier CSV by group, size and variant. Raises ValueError where it is none."""
    with contextlib.suppress(OSError, UnicodeDecodeError, KeyError):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows:
            return {(row["group"], row["size"], row["variant"]): row for row in rows}
    raise ValueError(
        f"{path} is not a CSV of this benchmark: make one with: python -m eval.benchmark"
    )


def write_results(path: Path, rows: list[dict]) -> None:
    """Write rows, beside those of other groups and sizes that the file has from earlier calls."""
    measured = {(row["group"], row["size"]) for row in rows}
    if path.is_file():
        earlier = read_results(path).values()
        rows = [r for r in earlier if (r["group"], r["size"]) not in measured] + rows
    with (
        atomic_path(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        rows = sorted(rows, key=lambda row: list(GROUPS).index(row["group"]))
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    command_line(main, parse_args())
