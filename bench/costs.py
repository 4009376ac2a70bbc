"""What distillation costs: the benchmark's numbers, a model of them, and what it says of more.

    python -m bench.benchmark                              # results/benchmark/results.csv
    python -m bench.costs                                  # writes results/benchmark/README.md

The model counts floating-point operations, 6 N per token for a student (forward and backward) and
2 N for a live teacher (forward), N the parameters that multiply (Kaplan et al. 2020, 2001.08361);
the benchmark counts attention too. It is held against the benchmark's ratios before it is used for
sizes that nobody here has run.
"""

import argparse
from pathlib import Path

from eval.report import table
from files import atomic_path, command_line, new_parser

from .benchmark import K, read_results

TOKENS_PER_PARAMETER = 20  # of a student's training: Hoffmann et al. 2022, 2203.15556
BYTES_PER_TOKEN = 4 * K + 2  # of a top-k cache: uint16 id and float16 log-probability; and the rest
# Device: peak bfloat16 operations per second (dense), and the share of it that training reaches.
TITLE = "# What it costs"
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


def check_table(results: dict) -> str:
    """Speed over that without a teacher: by the operations that were counted, and as measured."""
    rows = []
    for size in [size for _, size, variant in results if variant == "no teacher"]:
        cells = []
        alone = results["distillation", size, "no teacher"]
        for name in ("fused", f"cached top {K}"):
            row = results["distillation", size, name]
            speed = float(row["tokens_per_second"]) / float(alone["tokens_per_second"])
            operations = float(row["flops_share"]) / float(alone["flops_share"]) / speed
            cells += [f"{1 / operations:.2f}", f"{speed:.2f}"]
        rows.append([size, *cells])
    columns = ["student<teacher", "live: model", "measured", "cached: model", "measured"]
    return table(columns, rows)


def paper_table() -> str:
    rows = []
    for student, N in STUDENTS.items():
        tokens = TOKENS_PER_PARAMETER * N
        for teacher, M in TEACHERS.items():
            own, live = 6 * N, 2 * M
            cells = [
                f"{hours(tokens * (own + live), device)} / {hours(tokens * own, device)}"
                for device in DEVICES
            ]
            cells.append(f"{tokens * BYTES_PER_TOKEN / 1e9:,.0f} GB")
            # With a cache: of each step, and of two students with the writing counted.
            cells.append(f"{(own + live) / own:,.1f}")
            cells.append(f"{2 * (own + live) / (2 * own + live):.2f}")
            rows.append([student, teacher, f"{tokens / 1e9:.1f}B", *cells])
    columns = ["student", "teacher", "tokens", *DEVICES, f"cache, k = {K}"]
    return table([*columns, "a step, times", "two students, times"], rows)


def text_of(results: dict) -> str:
    row = next(iter(results.values()))
    assumed = "; ".join(
        f"{name}: {share:.0%} of {peak / 1e12:,.0f} TFLOP/s"
        for name, (peak, share) in DEVICES.items()
    )
    return f"""{TITLE}

Made by `python -m bench.costs` from [results.csv](results.csv), which `python -m bench.benchmark`
made on {row["device"]}, torch {row["torch"]}.
Training steps are of 16 x 128 random tokens with AdamW; the vocabulary is 2,048 (pretraining,
generation) or 1,024 (distillation). Each ratio is to the first variant of its group, timed turn by
turn with it.

## Measured

{measured_table(results)}

## The model, held against it

A student costs 6 N operations per token, a live teacher 2 N more, a cache none. So the speed of
distillation (live and fused, or from a cache), over that of training without a teacher, should be:

{check_table(results)}

It leaves out what is not a matrix product (softmax, optimizer, reading the cache), and that a
forward pass alone may reach a larger share of the machine than a backward one.

## On paper

Nobody here has run these. A student reads {TOKENS_PER_PARAMETER} tokens per parameter; time with a
live teacher / with its cache at hand. Assumed: {assumed}, bfloat16, and
that both models fit (a 70B teacher in bfloat16 needs 140 GB: not the first two, see `--fsdp`).
A cache costs one pass of the teacher, as much as a live teacher costs one student. The last two
columns say by how much it is faster: a step alone, and two students with the writing counted.

{paper_table()}

Its price is the disk: {BYTES_PER_TOKEN} bytes per token at k = {K}.
"""


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("results/benchmark/results.csv"), help="CSV to read"
    )
    return parser.parse_args(argv)


def main(args) -> None:
    path = args.results.with_name("README.md")
    text = text_of(read_results(args.results))
    if path.exists() and not path.read_text("utf-8").startswith(TITLE):
        raise ValueError(f"{path} is not a page of this command: move the CSV to its own folder")
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    command_line(main, parse_args())
