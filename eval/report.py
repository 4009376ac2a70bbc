"""One table of everything that was measured, in text and Markdown, made from the CSVs.

python -m eval.reproduce writes it to RESULTS/README.md, and prints it.
"""

import platform
from pathlib import Path

import numpy as np

from eval.drawing import by_arm, rows_of
from eval.plots import PICTURES
from eval.samples import samples
from files import atomic_path

TEXT = (
    "headline", "data_share", "temperature", "alpha", "teacher_size", "teacher_reading", "optimizer"
)  # fmt: skip
REASONING = ("reasoning", "reasoning_hard")
# Title of a column -> what it shows, times what, with how many digits.
TEXT_COLUMNS = {
    "held-out loss": ("val_loss",), "bits/byte": ("bits_per_byte",), "KL": ("kl",),
    "agreement %": ("agreement", 100, 1), "seconds": ("seconds", 1, 0),
    "Tflop": ("flops", 1e-12, 2),
}  # fmt: skip
REASONING_COLUMNS = {
    **{f"{steps} step %": (f"accuracy_{steps}", 100, 0) for steps in range(1, 6)},
    "formed %": ("well_formed", 100, 0), "verified %": ("verified", 100, 0),
    "seconds": ("seconds", 1, 0),
}  # fmt: skip


def mean_and_spread(rows: list[dict], column: str, scale: float = 1.0, digits: int = 3) -> str:
    """ "3.412 ± 0.004": mean and standard deviation over seeds; "-" where it was not measured."""
    values = [scale * float(row[column]) for row in rows if row.get(column)]
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose columns line up in plain text too."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    rows = [header, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def arms_table(results: Path, names: tuple, columns: dict[str, tuple]) -> str:
    """A line for every arm of those experiments. columns: title -> what mean_and_spread is told."""
    lines = [
        [name, arm, str(len(rows)), *(mean_and_spread(rows, *how) for how in columns.values())]
        for name in names
        for arm, rows in by_arm(rows_of(results, name)).items()
    ]
    return table(["experiment", "arm", "seeds", *columns], lines)


def check_report(results: Path, scale) -> Path:
    """RESULTS/README.md. Raises ValueError where that is not this preset's report."""
    path = Path(results) / "README.md"
    title = f"# Results of preset `{scale.name}`"
    if path.exists() and not path.read_text("utf-8").startswith(title):
        raise ValueError(f"{path} is not a report of this preset: pass another --results")
    return path


def write_report(results: Path, scale) -> str:
    """Write RESULTS/README.md; returns its tables and what the models wrote."""
    tables = arms_table(results, TEXT, TEXT_COLUMNS)
    if rows_of(results, "reasoning"):
        tables += "\n\n" + arms_table(results, REASONING, REASONING_COLUMNS)
    written = samples(scale)
    devices = {row["device"] for row in rows_of(results, "headline")}
    pictures = [name for name in PICTURES if (Path(results) / name / "plot.png").is_file()]
    parts = [
        f"# Results of preset `{scale.name}`",
        f"Made by `python -m eval.reproduce --preset {scale.name}` on {', '.join(sorted(devices))} "
        f"for each of the runs side by side ({platform.system()}, Python "
        f"{platform.python_version()}). Every CSV row holds the command of its run.",
        f"Text: Shakespeare's plays, {scale.text_steps} steps of {scale.text_batch} x "
        f"{scale.seq_len} tokens for students, {scale.teacher_steps} for teachers. Mean ± standard "
        "deviation over seeds; the seed is that of data order, student and teacher together. "
        "Held-out loss is in nats per token on three whole plays; KL and agreement beside the "
        "student's own teacher, for plain students beside the reference teacher. Seconds and "
        "operations are those of training: a distilled student's include its teacher's passes, not "
        "its teacher's training.",
        tables,
        *(f"![{name}]({name}/plot.png)" for name in pictures),
        "## What they write",
        written,
    ]
    with atomic_path(check_report(results, scale)) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", "utf-8")
    return f"{tables}\n\n{written}"
