"""What all pictures share: colours, points with their spread over seeds, reference lines."""

from pathlib import Path

import numpy as np

from eval.experiments.common import read_rows

# Okabe & Ito's colours, distinct for every kind of colour vision; shapes tell them apart in grey.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
LOSS_LABEL = "held-out loss (nats per token)"


def rows_of(results: Path, name: str) -> list[dict]:
    return read_rows(Path(results) / name / "results.csv")


def spread(rows: list[dict], column: str) -> tuple[float, float, float]:
    """Mean, lowest and highest of a column."""
    values = [float(row[column]) for row in rows]
    return float(np.mean(values)), min(values), max(values)


def by_arm(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows grouped by arm, in the order of the file."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["arm"], []).append(row)
    return groups


def points(axis, x, groups: list[list[dict]], column="val_loss", **style) -> list[float]:
    """Draw mean and range of every group at its x; returns the means."""
    stats = np.array([spread(rows, column) for rows in groups])
    style = {"linewidth": 1.8, "capsize": 4, "markersize": 7, **style}
    errors = [stats[:, 0] - stats[:, 1], stats[:, 2] - stats[:, 0]]
    axis.errorbar(x, stats[:, 0], yerr=errors, **style)
    return stats[:, 0].tolist()


def references(axis, results: Path, arms=("plain", "teacher")) -> dict[str, float]:
    """Lines for the teacher and the plain student, with their range shaded; returns the means."""
    means = {}
    groups = by_arm(rows_of(results, "headline"))
    for arm, colour, dashes, label in (
        ("plain", RED, "--", "plain student (no teacher)"),
        ("teacher", GREY, ":", "teacher"),
    ):
        if arm in groups and arm in arms:
            mean, low, high = spread(groups[arm], "val_loss")
            axis.axhline(mean, color=colour, linestyle=dashes, linewidth=1.8, label=label)
            axis.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
            means[arm] = mean
    return means


def finish(axis, title: str, xlabel: str, ylabel: str) -> None:
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def seeds_of(rows: list[dict]) -> str:
    count = len({row["seed"] for row in rows})
    return f"{count} seed{'s' if count > 1 else ''}"


def parameters(row: dict, column: str) -> str:
    return f"{float(row[column]) / 1e6:.1f}M"
