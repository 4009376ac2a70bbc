"""How fast, in how much memory, and how near to what the machine can do.

    python -m eval.benchmark                        # results/benchmark/results.csv, some minutes
    python -m eval.benchmark --only distillation --no-compile
    python -m eval.benchmark --peers                # others beside it: requirements-bench.txt
    python -m eval.benchmark --against results/benchmark/results.csv     # ratios to an earlier run

Everything that is compared runs in one process, turn by turn (eval/timing.py).

tokens_per_second  of a training step (forward, backward, AdamW), or generated
ratio              this variant's speed, over that of the group's first variant
memory_mb          peak memory that a step adds to what the models and the optimizer hold
flops_share        floating-point operations that the method needs, over what the machine's own
                   float32 matrix product does in the same rounds. The count is 6 N a token for a
                   student, 2 N for a live teacher (N: parameters that multiply; a tied embedding
                   counts once, as the head), plus causal attention, 6 or 2 L H d S.

Shapes: B batch, S sequence, V vocabulary, N tokens, D width.
"""

import argparse
import contextlib
import csv
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

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
from run.record import describe_device
from run.setup import autocast, available_cores, choose_device, keep_freed_memory
from run.speed import compiler_for

from .timing import Variants, flops_per_token, matmul_flops, take_turns

COLUMNS = (
    "group size variant tokens_per_second ratio memory_mb flops_share seconds rounds device torch"
).split()
B, S = 16, 128
K = 64  # of the sparse cache
STUDENTS = 4  # that learn from one pass of the teacher


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
    losses = {False: weighted_cross_entropy, True: torch.compile(weighted_cross_entropy)}
    variants = {}
    for compiled in (False, True) if compiles else (False,):
        for dtype in ("float32", "bfloat16"):

            def loss(hidden, loss=losses[compiled]):
                return loss(bench.student.lm_head(hidden), bench.labels)

            name = dtype + (", compiled" if compiled else "")
            variants[name] = bench.step(loss, dtype, compiled)
    return variants, dict.fromkeys(variants, flops_per_token(bench.config, 6, S))


class Pair:
    """A teacher and its students, "student<teacher", vocabulary 1,024, T = 1, alpha = 0.5.

    Its methods take the student's hidden states (B, S, D) and give the loss, in one precision and
    compiled or not.
    """

    def __init__(self, sizes: str, device):
        student_size, teacher_size = sizes.split("<")
        self.benches = [Bench(student_size, 1024, device) for _ in range(STUDENTS)]
        self.config = ModelConfig.preset(teacher_size, 1024)
        self.teacher = Transformer(self.config).to(device).requires_grad_(False)
        self.bodies = {False: self.teacher.model, True: torch.compile(self.teacher.model)}
        bench = self.benches[0]
        self.head, self.labels, self.input_ids = (
            bench.student.lm_head, bench.labels, bench.input_ids
        )  # fmt: skip
        hidden = self.teacher_hidden(False)
        log_probs = self.teacher.lm_head(hidden).log_softmax(-1).flatten(0, 1)
        ids, kept, rest = (x.view(B, S, -1) for x in top_k(log_probs, K))
        self.cached = HiddenTeacher(hidden, self.teacher.lm_head.weight)
        self.sparse = SparseTeacher(ids, kept.exp(), tail=rest[..., 0].exp())

    @torch.no_grad()
    def teacher_hidden(self, compiled: bool):
        return self.bodies[compiled](self.input_ids)

    def plain(self, hidden, compiled: bool):
        teacher_logits = self.teacher.lm_head(self.teacher_hidden(compiled))
        return mixed_loss(self.head(hidden), teacher_logits, self.labels)

    def live(self, compiled: bool) -> HiddenTeacher:
        return HiddenTeacher(self.teacher_hidden(compiled), self.teacher.lm_head.weight)

    def fused(self, hidden, says, compiled: bool, head=None):
        head, alpha = head or self.head, 1.0 if says is None else 0.5
        return fused_mixed_loss(
            hidden, head.weight, says, self.labels, alpha=alpha, compiled=compiled
        )

    def several_students(self, dtype: str, compiled: bool) -> Callable[[], int]:
        """A step of STUDENTS students, for whom the teacher runs once."""

        def run() -> int:
            with autocast(self.head.weight.device, dtype):
                says = self.live(compiled)
            for bench in self.benches:

                def loss(hidden, head=bench.student.lm_head):
                    return self.fused(hidden, says, compiled, head)

                bench.step(loss, dtype, compiled)()
            return STUDENTS * B * S

        return run


def distillation(sizes: str, device, compiles: bool) -> tuple[Variants, dict[str, float]]:
    pair = Pair(sizes, device)
    bench = pair.benches[0]
    own, live = flops_per_token(bench.config, 6, S), flops_per_token(pair.config, 2, S)
    losses = {
        "plain": (pair.plain, own + live),
        "fused": (lambda h, c: pair.fused(h, pair.live(c), c), own + live),
        "cached hidden": (
            lambda h, c: pair.fused(h, pair.cached, c),
            own + 2 * 1024 * pair.config.hidden_size,
        ),
        f"cached top {K}": (lambda h, c: pair.fused(h, pair.sparse, c), own),
        "no teacher": (lambda h, c: pair.fused(h, None, c), own),
    }
    variants, counts = {}, {}
    for compiled in (False, True) if compiles else (False,):
        for dtype in ("float32", "bfloat16"):
            how = (", bfloat16" if dtype == "bfloat16" else "") + ", compiled" * compiled
            for name, (loss, flops) in losses.items():

                def loss_of(hidden, loss=loss, compiled=compiled):
                    return loss(hidden, compiled)

                variants[name + how] = bench.step(loss_of, dtype, compiled)
                counts[name + how] = flops
            name = f"{STUDENTS} students, one teacher pass{how}"
            variants[name] = pair.several_students(dtype, compiled)
            counts[name] = own + live / STUDENTS
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
    "loss": (loss_alone, ("4096x32768",), 9),
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
    parser.add_argument("--rounds", type=int, default=None, help="turns of every variant [3 or 9]")
    parser.add_argument("--peers", action="store_true", help="also time others' loops; needs TRL")
    parser.add_argument("--against", type=Path, default=None, help="earlier results.csv to compare")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmark/results.csv"), help="CSV to write"
    )
    return parser.parse_args(argv)


def main(args) -> list[dict]:
    keep_freed_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cores())
    device = choose_device(args.device)
    earlier = read_results(args.against) if args.against else {}
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds {args.rounds} must be 1 or more")
    compiles = args.compile and compiler_for(device)
    rows = []
    low = matmul_flops(device, torch.bfloat16) / 1e9
    print(f"{describe_device(device)}: matrix product in bfloat16 {low:,.0f} GFLOP/s")
    for group, (make, sizes, rounds) in GROUPS.items():
        for size in sizes:
            if (args.only or group) != group or (args.size or size) != size:
                continue
            variants, flops = make(size, device, compiles)
            if args.peers and group == "distillation":
                from eval.peers import peer_variants  # needs requirements-bench.txt

                variants |= peer_variants(size, B, S, device)
            rounds = args.rounds or rounds
            results, peak = take_turns(variants, rounds, device, f"{group} {size}")
            print(f"matrix product: {peak / 1e9:,.0f} GFLOP/s in float32")
            base = None
            for variant, got in results.items():
                speed = got["tokens"] / got["seconds"]
                base = base or speed
                row = {
                    "group": group, "size": size, "variant": variant,
                    "tokens_per_second": round(speed), "ratio": round(speed / base, 3),
                    "memory_mb": got["memory_mb"],
                    "flops_share": round(speed * flops[variant] / peak, 3)
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
        order = [(group, size) for group, (_, sizes, _) in GROUPS.items() for size in sizes]
        place = {key: number for number, key in enumerate(order)}  # sizes of old come last
        rows = sorted(rows, key=lambda row: place.get((row["group"], row["size"]), len(order)))
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    command_line(main, parse_args())
