"""What all pictures share: looks, points with their spread over seeds, reference lines."""

from pathlib import Path

import numpy as np

from eval.experiments.common import read_rows

# Okabe & Ito's colours, distinct for every kind of colour vision; shapes tell them apart in grey.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
LOOKS = {
    "teacher": {"color": GREY, "marker": "s", "linestyle": ":"},
    "plain": {"color": RED, "marker": "^", "linestyle": "--"},
    "distilled": {"color": BLUE, "marker": "o", "linestyle": "-"},
}
LOSS_LABEL = "held-out loss (nats per token)"


def rows_of(results: Path, name: str) -> list[dict]:
    return read_rows(Path(results) / name / "results.csv")


def by_arm(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows grouped by arm, in the order of the file."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row["arm"], []).append(row)
    return groups


def by_number(rows: list[dict], column: str, arms: str = "") -> tuple[list, list]:
    """The groups of arms whose names begin with `arms`, sorted by a column; and their numbers."""
    groups = [group for arm, group in by_arm(rows).items() if arm.startswith(arms)]
    groups.sort(key=lambda group: float(group[0][column]))
    return [float(group[0][column]) for group in groups], groups


def spread(rows: list[dict], column: str) -> tuple[float, float, float]:
    """Mean, lowest and highest of a column."""
    values = [float(row[column]) for row in rows]
    return float(np.mean(values)), min(values), max(values)


def points(axis, x, groups: list[list[dict]], column="val_loss", **style) -> list[float]:
    """Draw mean and range of every group at its x; returns the means."""
    return ranges(axis, x, [spread(rows, column) for rows in groups], **style)


def ranges(axis, x, stats, **style) -> list[float]:
    """Draw (mean, lowest, highest) at every x; returns the means."""
    mean, low, high = np.array(stats).T
    style = {"linewidth": 1.8, "capsize": 4, "markersize": 7, **style}
    axis.errorbar(x, mean, yerr=np.array([mean - low, high - mean]), **style)
    return mean.tolist()


def references(axis, results: Path, arms=("plain", "teacher")) -> dict[str, float]:
    """Lines for the teacher and the plain student, with their range shaded; returns the means."""
    means, groups = {}, by_arm(rows_of(results, "headline"))
    labels = {"plain": "plain student (no teacher)", "teacher": "teacher"}
    for arm in filter(groups.get, arms):
        mean, low, high = spread(groups[arm], "val_loss")
        line = {"color": LOOKS[arm]["color"], "linestyle": LOOKS[arm]["linestyle"]}
        axis.axhline(mean, label=labels[arm], linewidth=1.8, **line)
        axis.axhspan(low, high, color=LOOKS[arm]["color"], alpha=0.12, linewidth=0)
        means[arm] = mean
    return means


def finish(axis, title: str, xlabel: str, ylabel=LOSS_LABEL, ticks=None, legend=None) -> None:
    """Labels, grid and legend. ticks: x values and their names. legend: its title."""
    if ticks is not None:
        axis.set_xticks([], minor=True)
        axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.legend(loc="best", framealpha=0.9, edgecolor="none", fontsize=9, title=legend)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def seeds_of(rows: list[dict]) -> str:
    count = len({row["seed"] for row in rows})
    return f"{count} seed{'s' if count > 1 else ''}"


def millions(parameters) -> str:
    return f"{float(parameters) / 1e6:.1f}M"
