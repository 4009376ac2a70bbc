"""How fast, in how much memory, and how near to what the machine can do.

    python -m bench.benchmark                       # results/benchmark/results.csv, some minutes
    python -m bench.benchmark --only distillation --no-compile
    python -m bench.benchmark --peers               # others beside it: requirements-bench.txt
    python -m bench.benchmark --against results/benchmark/results.csv    # ratios to an earlier run

What is timed are the lessons' own losses on random tokens, compiled as --compile does it, in one
process, turn by turn (bench/timing.py).

tokens_per_second  of a training step (forward, backward, AdamW), or generated
ratio              this variant's speed, over that of the group's first variant
memory_mb          peak memory that a step adds to what the models and the optimizer hold
flops_share        floating-point operations, counted as a run's meter counts them
                   (run/meter.py), over what the machine's own float32 matrix product does in the
                   same rounds

Shapes: B batch, S sequence, V vocabulary, N tokens, D and E widths of student and teacher.
"""

import argparse
import contextlib
import csv
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

import train_pretrain
from distill import fused_loss
from distill.sparse import top_k
from files import atomic_path, check_ranges, command_line, new_parser
from files.atomic import check_path
from methods import cached_teacher
from model import ModelConfig, Transformer, generate
from model import device as machine
from train_distillation import compute_loss

from .timing import Variants, take_turns

COLUMNS = (
    "group size variant tokens_per_second ratio memory_mb flops_share seconds rounds device torch"
).split()
B, S = 16, 128
K = 64  # of the sparse cache
Ways = list[tuple[bool, str]]  # (compiled, precision)


# What is timed. Each function makes the variants of one size.


class Bench:
    """A student on random tokens, and its training step with any loss."""

    def __init__(self, size: str, vocab_size: int, device, compiled: bool):
        torch.manual_seed(0)
        self.device = device
        self.student = Transformer(ModelConfig.preset(size, vocab_size)).to(device)
        if compiled:
            self.student.model.compile()
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4, fused=True)
        tokens = torch.randint(vocab_size, (B, S + 1), device=device)
        self.input_ids, self.labels = tokens[:, :-1], tokens[:, 1:]

    def step(self, loss_of: Callable, precision: str) -> Callable[[], int]:
        """A training step; loss_of() -> a loss and its parts."""

        def run() -> int:
            with machine.autocast(self.device, precision):
                loss, _ = loss_of()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            return B * S

        return run

    def pretraining(self):
        return train_pretrain.compute_loss(self.student(self.input_ids), self.labels)


def pretraining(size: str, device, ways: Ways) -> Variants:
    benches = {compiled: Bench(size, 2048, device, compiled) for compiled, _ in ways}
    variants = {}
    for compiled, precision in ways:
        bench = benches[compiled]
        variants[precision + ", compiled" * compiled] = bench.step(bench.pretraining, precision)
    return variants


class Pair(Bench):
    """A student and its teacher, "student<teacher", vocabulary 1,024, T = 1, alpha = 0.5."""

    def __init__(self, sizes: str, device, compiled: bool):
        student_size, teacher_size = sizes.split("<")
        super().__init__(student_size, 1024, device, compiled)
        self.compiled = compiled
        self.teacher = Transformer(ModelConfig.preset(teacher_size, 1024)).to(device)
        self.teacher.requires_grad_(False)
        self.hidden = self.teacher.model(self.input_ids)  # (B, S, E): what a cache would hold
        self.top_k = top_k(self.teacher.lm_head(self.hidden).log_softmax(-1), K)
        if compiled:
            self.teacher.model.compile()

    def plain(self):
        logits = self.student(self.input_ids)
        with torch.no_grad():
            teacher_logits = self.teacher(self.input_ids)
        return compute_loss(logits, teacher_logits, self.labels, 1.0, 0.5)

    def fused(self):
        logits = self.student.model(self.input_ids), self.student.lm_head.weight
        guess = self.teacher.model(self.input_ids), self.teacher.lm_head.weight
        options = {"weight": self.labels != -100, "compiled": self.compiled}
        return fused_loss(compute_loss, logits, guess, self.labels, 1.0, 0.5, **options)

    def cached(self, method: str, kept):
        logits = self.student(self.input_ids)
        return cached_teacher.compute_loss(logits, self.labels, method, kept, 1.0, 0.5)


def distillation(sizes: str, device, ways: Ways) -> Variants:
    pairs = {compiled: Pair(sizes, device, compiled) for compiled, _ in ways}
    losses = {
        "plain": Pair.plain,
        "fused": Pair.fused,
        "cached hidden": lambda pair: pair.cached("hidden", [pair.teacher.lm_head(pair.hidden)]),
        f"cached top {K}": lambda pair: pair.cached("tail", pair.top_k),
        "no teacher": Pair.pretraining,
    }
    variants = {}
    for (compiled, precision), (name, loss_of) in product(ways, losses.items()):
        name += ", bfloat16" * (precision == "bfloat16") + ", compiled" * compiled
        variants[name] = pairs[compiled].step(partial(loss_of, pairs[compiled]), precision)
    return variants


def loss_alone(size: str, device, ways: Ways) -> Variants:
    """Heads and loss without bodies: 4,096 tokens, vocabulary 32,768, widths 256 and 512."""
    N, V, D, E = 4096, 32768, 256, 512
    hidden, teacher_hidden = (torch.randn(N, width, device=device) for width in (D, E))
    head, teacher_head = (0.05 * torch.randn(V, width, device=device) for width in (D, E))
    labels = torch.randint(V, (N,), device=device)
    hidden.requires_grad_(), head.requires_grad_()

    def plain():
        logits, teacher_logits = F.linear(hidden, head), F.linear(teacher_hidden, teacher_head)
        return compute_loss(logits, teacher_logits, labels, 1.0, 0.5)

    def fused():
        logits, guess = (hidden, head), (teacher_hidden, teacher_head)
        return fused_loss(compute_loss, logits, guess, labels, 1.0, 0.5, weight=labels != -100)

    def step(loss_of) -> int:
        loss_of()[0].backward()
        hidden.grad = head.grad = None
        return N

    return {"plain": partial(step, plain), "fused": partial(step, fused)}


def generation(size: str, device, ways: Ways) -> Variants:
    """64 prompts of 32 tokens, 64 new tokens each; of those one at a time only 4 are run."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset(size, 2048)).to(device)
    prompts, new = torch.randint(7, 2048, (64, 32)).tolist(), 64
    alone = [[prompt] for prompt in prompts[:4]]

    def write(batches, use_cache: bool) -> int:
        for batch in batches:
            generate(model, batch, new, stop_ids=(), use_cache=use_cache)
        return new * sum(map(len, batches))

    return {
        "one at a time, no cache": partial(write, alone, False),
        "one at a time, cache": partial(write, alone, True),
        "64 together, cache": partial(write, [prompts], True),
    }


GROUPS = {
    "pretraining": (pretraining, ("nano", "mini", "small"), 9),
    "distillation": (distillation, ("nano<mini", "mini<small", "small<base"), 9),
    "loss": (loss_alone, ("4096x32768",), 9),
    "generation": (generation, ("nano", "mini", "small"), 3),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--only", choices=tuple(GROUPS), default=None, help="one group, not all")
    parser.add_argument("--size", default=None, help="one size of a group, as the CSV names it")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also compiled: half a minute for each variant; needs a compiler",
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="also where --dtype auto would not take it"
    )
    parser.add_argument("--rounds", type=int, help="turns of each variant; default 9 or 3")
    parser.add_argument("--peers", action="store_true", help="also time others' loops; needs TRL")
    parser.add_argument("--against", type=Path, default=None, help="earlier results.csv to compare")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument(
        "--out", type=Path, default=Path("results/benchmark/results.csv"), help="CSV to write"
    )
    return parser.parse_args(argv)


def main(args) -> list[dict]:
    check_ranges(args)
    check_path(args.out, is_folder=False)
    if args.out.is_file():
        read_results(args.out)  # raises where it is not ours
    machine.prepare_process(seed=0, processes=1)  # as a run does
    device = machine.choose_device(args.device)
    earlier = read_results(args.against) if args.against else {}
    low = args.bfloat16 or machine.choose_precision("auto", device) == "bfloat16"
    modes = (False, True) if args.compile else (False,)
    ways = list(product(modes, ("float32", "bfloat16") if low else ("float32",)))
    chosen = [
        (group, size)
        for group, (_, sizes, _) in GROUPS.items()
        for size in sizes
        if (args.only or group) == group and (args.size or size) == size
    ]
    if not chosen:
        raise ValueError(
            f"--size {args.size} is no size of group {args.only or 'any'}: use one of "
            + ", ".join(
                x for name in [args.only] * bool(args.only) or GROUPS for x in GROUPS[name][1]
            )
        )
    rows = []
    for group, size in chosen:
        make, _, rounds = GROUPS[group]
        variants, rounds = make(size, device, ways), args.rounds or rounds
        if args.peers and group == "distillation":
            from .peers import peer_variants  # needs requirements-bench.txt

            variants |= peer_variants(size, Pair(size, device, compiled=False), device)
        where = {"device": machine.describe_device(device), "torch": torch.__version__}
        for row in take_turns(variants, rounds, device, f"{group} {size}"):
            row = {"group": group, "size": size, **row, "rounds": rounds, **where}
            rows.append(row)
            print(line_of(row, earlier))
        write_results(args.out, rows)
    print(f"wrote {args.out}")
    return rows


def line_of(row: dict, earlier: dict) -> str:
    text = (
        f"{row['group']:13s} {row['size']:12s} {row['variant']:32s} "
        f"{row['tokens_per_second']:>11,} tokens/s  x{row['ratio']:<6.2f} "
        f"{'-' if row['memory_mb'] is None else row['memory_mb']:>8} MB "
        f"{row['flops_share']:6.0%} of float32 peak"
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
        if rows and set(COLUMNS) == rows[0].keys():
            return {(row["group"], row["size"], row["variant"]): row for row in rows}
    raise ValueError(
        f"{path} is not a CSV of this benchmark: make one with: python -m bench.benchmark"
    )


def write_results(path: Path, rows: list[dict]) -> None:
    """Write rows, beside those of other groups and sizes that the file has from earlier calls."""
    measured = {(row["group"], row["size"]) for row in rows}
    if path.is_file():
        earlier = read_results(path).values()
        rows = [r for r in earlier if (r["group"], r["size"]) not in measured] + rows
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        order = [(group, size) for group, (_, sizes, _) in GROUPS.items() for size in sizes]
        index = {key: number for number, key in enumerate(order)}  # earlier sizes come last
        rows = sorted(rows, key=lambda row: index.get((row["group"], row["size"]), len(order)))
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    command_line(main, parse_args())
