"""What all pictures share: looks, points with their spread over seeds, labels, what may be claimed.

A title names a best arm, or a gain, only where seeds tell the arms apart: `differ` is that rule.
"""

from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from eval.experiments.rows import read_rows

# Okabe & Ito's colours, distinct for every kind of colour vision; shapes tell them apart in grey.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"
LOOKS = {
    "teacher": {"color": GREY, "marker": "s", "linestyle": ":"},
    "plain": {"color": RED, "marker": "^", "linestyle": "--"},
    "distilled": {"color": BLUE, "marker": "o", "linestyle": "-"},
}
LOSS_LABEL = "held-out loss (nats per token)\n← lower is better"


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


# What may be claimed.


def differ(a: list[dict], b: list[dict], column="val_loss") -> bool:
    """Whether seeds tell two arms apart: their means differ by more than twice the larger standard
    deviation over seeds. One seed shows no spread, so it tells nothing apart."""
    a, b = ([float(row[column]) for row in rows] for rows in (a, b))
    if min(len(a), len(b)) < 2:
        return False
    return abs(np.mean(a) - np.mean(b)) > 2 * max(np.std(a, ddof=1), np.std(b, ddof=1))


def best(names: list[str], groups: list[list[dict]]) -> str:
    """ "T = 1 is best", or which arms cannot be told from the one of the lowest mean loss."""
    lowest = groups[int(np.argmin([spread(rows)[0] for rows in groups]))]
    tied = [not differ(rows, lowest) for rows in groups]
    if len(lowest) < 2:
        return f"{names[groups.index(lowest)]} is lowest, but one seed shows no spread"
    names = [name for name, is_tied in zip(names, tied, strict=True) if is_tied]
    if len(names) == 1:
        return f"{names[0]} is best"
    names = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{names} are best: {len(lowest)} seeds do not tell them apart"


def amount(a: list[dict], b: list[dict], column="val_loss", scale=1.0, digits=2) -> str:
    """The difference of two means without its sign, and whether seeds tell it from nothing."""
    size = abs(spread(a, column, scale)[0] - spread(b, column, scale)[0])
    unsure = min(len(a), len(b)) > 1 and not differ(a, b, column)
    return f"{size:.{digits}f}" + (" (within the spread)" if unsure else "")


def verdict(a: list[dict], b: list[dict]) -> str:
    """Whose mean loss is lower: "wins by 0.07 nats", "loses ...", "ties within the spread"."""
    size = amount(a, b)
    if "spread" in size:
        return "ties within the spread"
    return f"{'wins' if spread(a)[0] <= spread(b)[0] else 'loses'} by {size} nats"


def change_of(a: list[dict], b: list[dict]) -> str:
    """What the mean loss does from a to b: "gains 0.07", "loses 0.07", "stays within 0.01"."""
    size = amount(a, b)
    if size.startswith("0.00"):
        return "stays within 0.01"
    return f"{'gains' if spread(b)[0] <= spread(a)[0] else 'loses'} {size}"


def spread(rows: list[dict], column="val_loss", scale=1.0) -> tuple[float, float, float]:
    """Mean, lowest and highest of a column."""
    values = [scale * float(row[column]) for row in rows]
    return float(np.mean(values)), min(values), max(values)


def seeds_of(rows: list[dict]) -> str:
    counts = [len({row["seed"] for row in arm}) for arm in by_arm(rows).values()]
    few, most = min(counts), max(counts)
    count = f"{few} to {most}" if few < most else f"{most}"
    return f"{count} seeds: mean, lowest, highest" if most > 1 else "1 seed"


def millions(parameters) -> str:
    return f"{float(parameters) / 1e6:.2f}M"


def points(axis, x, groups: list[list[dict]], column="val_loss", scale=1.0, **style) -> list[float]:
    """Draw mean and range of every group at its x; returns the means."""
    mean, low, high = np.array([spread(rows, column, scale) for rows in groups]).T
    style = {"linewidth": 1.8, "capsize": 4, "markersize": 7, **style}
    axis.errorbar(x, mean, yerr=np.array([mean - low, high - mean]), **style)
    return mean.tolist()


def references(axis, results: Path, arms=("plain",)) -> list[list[dict]]:
    """A line for the plain student or the teacher, with its range shaded; returns their rows."""
    groups = by_arm(rows_of(results, "headline"))
    arms = [arm for arm in arms if arm in groups]
    for arm in arms:
        level(axis, spread(groups[arm]), {"plain": "plain student"}.get(arm, arm), arm)
    return [groups[arm] for arm in arms]


def level(axis, stats, label: str, arm: str) -> None:
    """A horizontal line at a mean, its range shaded."""
    mean, low, high = stats
    look = {name: LOOKS[arm][name] for name in ("color", "linestyle")}
    axis.axhline(mean, label=label, linewidth=1.8, **look)
    axis.axhspan(low, high, color=look["color"], alpha=0.12, linewidth=0)


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Families of fonts for `text`: the usual one, and those of the system that add characters of
    other scripts; and the characters that no font has."""
    families, missing = [], set(text) - {" "}
    usual = str(Path(font_manager.findfont("DejaVu Sans")))  # matplotlib 3.11 has a type for it
    installed = {font.fname: font.name for font in font_manager.fontManager.ttflist}
    for path in dict.fromkeys([usual, *sorted(installed)]):
        found = set()
        if missing and installed[path] not in families:
            font = FT2Font(path)
            found = missing & set(map(chr, font.get_charmap())) if font.scalable else found
        if found or path == usual:
            families.append(installed[path])
            missing -= found
    return families, missing


def shown(text: str, missing: set[str], most: int = 45) -> str:
    """The end of `text`, at most so long, as it can be drawn: "\\u4eba" for what no font has."""
    parts = [c.encode("unicode_escape").decode() if c in missing else c for c in text]
    while sum(map(len, parts)) > most:
        del parts[0]
    return "".join(parts).replace("$", r"\$")  # which else begins a formula


def finish(axis, title: str, xlabel: str, ylabel=LOSS_LABEL, ticks=None, log=None) -> None:
    """Title, axes and grid. ticks: x values and their names. log: base of the x axis."""
    if log:
        axis.set_xscale("log", base=log)
    if ticks is not None:
        axis.set_xticks([], minor=True)
        axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_title(title, fontsize=11, loc="left")
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def label_lines(axis, size=10) -> None:
    """Write every line's label right of the axes at the height of its last point, but none over
    another. For a figure whose layout is made: heights are those of the screen."""
    labels, free = [], -np.inf
    for handle, text in zip(*axis.get_legend_handles_labels(), strict=True):
        line = handle[0] if isinstance(handle, tuple) else handle
        height = axis.transData.transform((1, line.get_ydata()[-1]))[1]
        labels.append((height, text, line.get_color()))
    for height, text, color in sorted(labels):
        half = (1 + text.count("\n")) * size * axis.figure.dpi / 72 * 0.65
        height = max(height, free + half)
        free = height + half
        height = axis.transAxes.inverted().transform((0, height))[1]
        style = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": size}
        axis.annotate(text, (1, height), (6, 0), color=color, va="center", **style)
