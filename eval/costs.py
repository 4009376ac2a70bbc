"""What distillation costs: the benchmark's numbers, a model of them, and what it says of more.

    python -m eval.benchmark --out results/benchmark/results.csv
    python -m eval.costs                                   # writes results/benchmark/README.md

The model counts floating-point operations, 6 N a token for a student (forward and backward) and
2 N for a live teacher (forward), N the parameters that multiply (Kaplan et al. 2020, 2001.08361;
attention is counted for the benchmark and left out on paper). It is held against the benchmark's
ratios before it is used for sizes that nobody here has run.
"""

import argparse
from pathlib import Path

from eval.benchmark import read_results
from eval.report import table
from eval.timing import flops_per_token
from model import ModelConfig
from run.files import atomic_path, command_line
from run.flags import new_parser

TOKENS_PER_PARAMETER = 20  # of a student's training: Hoffmann et al. 2022, 2203.15556
K, BYTES_PER_K = 64, 4  # of a top-k cache: uint16 id and float16 log-probability
# Device: peak bfloat16 operations a second (dense), and the share of it that training reaches.
DEVICES = {
    "laptop GPU": (60e12, 0.35),  # of RTX 4060 mobile's class
    "one H100": (989e12, 0.40),
    "eight H100": (8 * 989e12, 0.35),
}
STUDENTS, TEACHERS = {"26M": 26e6, "104M": 104e6}, {"0.6B": 0.6e9, "7B": 7e9, "70B": 70e9}


def hours(operations: float, device: str) -> str:
    peak, share = DEVICES[device]
    value = operations / (peak * share) / 3600
    if value < 1:
        return f"{60 * value:.0f} min" if value > 1 / 60 else "<1 min"
    return f"{value:.1f} h" if value < 48 else f"{value / 24:,.0f} d"


def measured_table(results: dict) -> str:
    columns = ["what", "size", "variant", "tokens/s", "ratio", "extra MB", "of float32 peak"]
    rows = []
    for (group, size, variant), row in results.items():
        share = f"{float(row['flops_share']):.0%}" if row["flops_share"] else "-"
        speed = f"{int(row['tokens_per_second']):,}"
        rows.append([group, size, variant, speed, row["ratio"], row["memory_mb"] or "-", share])
    return table(columns, rows)


def check_table(results: dict, vocab_size: int = 1024, sequence: int = 128) -> str:
    """Speed of a live teacher over no teacher: what the model says and what was measured."""
    rows = []
    for group, sizes, variant in results:
        if group != "distillation" or variant != "no teacher":
            continue
        student, teacher = (ModelConfig.preset(size, vocab_size) for size in sizes.split("<"))
        own = flops_per_token(student, 6, sequence)
        live = own + flops_per_token(teacher, 2, sequence)
        alone = float(results[group, sizes, "no teacher"]["tokens_per_second"])

        def ratio(name, sizes=sizes, alone=alone):
            row = results["distillation", sizes, name]
            return f"{float(row['tokens_per_second']) / alone:.2f}"

        cached = ratio(f"cached top {K}")
        rows.append([sizes, f"{own / live:.2f}", ratio("fused"), "1.00", cached])
    columns = ["student<teacher", "live: model", "measured", "cached: model", "measured"]
    return table(columns, rows)


def paper_table() -> str:
    rows = []
    for student, N in STUDENTS.items():
        tokens = TOKENS_PER_PARAMETER * N
        for teacher, M in TEACHERS.items():
            live = tokens * (6 * N + 2 * M)
            cells = [f"{hours(live, d)} / {hours(tokens * 6 * N, d)}" for d in DEVICES]
            size = tokens * (K * BYTES_PER_K + 2)
            rows.append([student, teacher, f"{tokens / 1e9:.1f}B", *cells, f"{size / 1e9:,.0f} GB"])
    columns = ["student", "teacher", "tokens", *DEVICES, f"cache, k = {K}"]
    return table(columns, rows)


def break_even() -> str:
    """By how much a cache is faster: a step alone, and two students with the writing counted."""
    lines = []
    for student, N in STUDENTS.items():
        for teacher, M in TEACHERS.items():
            step = (6 * N + 2 * M) / (6 * N)
            two = (12 * N + 4 * M) / (12 * N + 2 * M)
            lines.append([student, teacher, f"{step:,.1f}", f"{two:.2f}"])
    return table(["student", "teacher", "one step, times", "two students in all, times"], lines)


def text_of(results: dict) -> str:
    row = next(iter(results.values()))
    bytes_per_token = K * BYTES_PER_K + 2
    assumed = "; ".join(
        f"{name}: {share:.0%} of {peak / 1e12:,.0f} TFLOP/s"
        for name, (peak, share) in DEVICES.items()
    )
    return f"""# What it costs

Made by `python -m eval.costs` from [results.csv](results.csv), which `python -m eval.benchmark`
made on {row["device"]}, torch {row["torch"]}.
Training steps are of 16 x 128 random tokens with AdamW; the vocabulary is 2,048 (pretraining,
generation) or 1,024 (distillation). Each ratio is to the first variant of its group, timed turn by
turn with it.

## Measured

{measured_table(results)}

## The model, held against it

A student costs 6 N operations a token, a live teacher 2 N more, a cache none. So the speed of
distillation, over that of training without a teacher, should be:

{check_table(results)}

It leaves out what is not a matrix product (softmax, optimizer, reading the cache), and that a
forward pass alone may reach a larger share of the machine than a backward one.

## On paper

Nobody here has run these. A student reads {TOKENS_PER_PARAMETER} tokens a parameter; time with a
live teacher / with its cache at hand. Assumed: {assumed}, bfloat16, and
that both models fit (a 70B teacher in bfloat16 needs 140 GB: not the first two, see `--fsdp`).

{paper_table()}

A cache costs one pass of the teacher, as much as a live teacher costs one student. From the second
student, or the second epoch, on it is faster in all:

{break_even()}

Its price is the disk: {bytes_per_token} bytes a token at k = {K}. Reading is no limit: a million
tokens a second, more than a laptop trains on, are {bytes_per_token / 1000:.2f} GB a second.
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("results/benchmark/results.csv"), help="CSV to read"
    )
    return parser.parse_args(argv)


def main(args) -> None:
    text = text_of(read_results(args.results))
    path = args.results.with_name("README.md")
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    command_line(main, parse_args())
