"""Every method's gain over the plain student, sorted: at equal tokens, and at equal cost."""

from functools import partial
from pathlib import Path

import numpy as np

from eval.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    best,
    by_arm,
    finish,
    read_rows,
    rows_of,
    seeds_of,
    spread,
)
from eval.gains import ANSWERS, gains, is_told_apart, sorted_arms


def draw_methods(results: Path, figure, bed: str) -> None:
    rows, axis = rows_of(results, bed), figure.subplots()
    arms = sorted_arms(rows)
    figure.set_size_inches(8.5, 1.8 + 0.27 * len(arms))
    counts = np.zeros(2, int)
    looks = [(BLUE, "o", 6, -0.12), (RED, "^", 5, 0.18)]
    for height, arm in enumerate(arms):
        axis.axhline(height, color=GREY, alpha=0.12, linewidth=0.8)
        for number, (values, look) in enumerate(zip(gains(rows, arm), looks, strict=True)):
            color, marker, size, offset = look
            told, mean = is_told_apart(values), values.mean()
            counts[number] += told and mean > 0
            error = [[mean - values.min()], [values.max() - mean]]
            face = color if told else "white"
            axis.errorbar(mean, height + offset, xerr=error, color=color, marker=marker,
                          markersize=size, markerfacecolor=face, elinewidth=1.2)  # fmt: skip
    axis.axvline(0, color=GREY, linewidth=1.2)
    if "KL" in arms:
        lesson2 = gains(rows, "KL")[0].mean()
        axis.axvline(lesson2, color=BLUE, linewidth=1, linestyle=":")
        axis.annotate("lesson 2", (lesson2, len(arms) - 0.5), (3, 2), textcoords="offset points",
                      fontsize=9, color=BLUE)  # fmt: skip
    axis.set_yticks(range(len(arms)), arms, fontsize=9)
    axis.set_ylim(len(arms) - 0.4, -1.6)
    names = ("● at equal tokens", "▲ at equal cost (hollow: within the spread, or one seed)")
    for number, (text, (color, *_)) in enumerate(zip(names, looks, strict=True)):
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "top"}
        axis.annotate(text, (0.02 + 0.24 * number, 1), (0, -4), fontsize=9, color=color, **place,
                      bbox={"color": "white", "pad": 1})  # fmt: skip
    unit = "answers at 3 steps, points" if rows[0].get(ANSWERS) else "nats per token"
    sure = sum(len(gains(rows, arm)[0]) > 1 for arm in arms)
    title = f"{counts[0]} of {sure} arms beat the plain student at equal tokens, {counts[1]} at "
    title += f"equal cost\n({len(arms) - sure} more have one seed yet)" if sure < len(arms) else (
        "equal cost")  # fmt: skip
    finish(axis, title, f"gain over the plain student ({unit})\n"
           f"higher is better →\n{seeds_of(rows)}", "")  # fmt: skip


PICTURES = {
    bed: (partial(draw_methods, bed=bed), (8.5, 6)) for bed in ("few", "text", "words", "oracle")
}


def rank_correlation(groups: dict, kinds: list[str], column: str) -> float:
    """Spearman's, of what teachers have in a column and the losses that their students reach."""
    pairs = [(f"teacher {kind}", column, f"student of {kind}") for kind in kinds]
    values = [(spread(groups[a], c)[0], spread(groups[b])[0]) for a, c, b in pairs]
    ranks = np.argsort(np.argsort(values, axis=0), axis=0)
    return float(np.corrcoef(ranks.T)[0, 1])


def draw_quality(results: Path, figure) -> None:
    """Above: what students of five teachers reach against what is said to make a teacher good.
    Below: two principal components of each teacher's last hidden states, by the next token."""
    groups = by_arm(rows_of(results, "teacher_quality"))
    kinds = [arm.split()[1] for arm in groups if arm.startswith("teacher ")]
    above, below = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    columns = {"val_loss": "teacher's held-out loss", "ece": "teacher's calibration error",
               "separation": "separation of the teacher's classes"}  # fmt: skip
    axes = above.subplots(1, 3, sharey=True)
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        shown = []
        for kind in kinds:
            x, y = spread(groups[f"teacher {kind}"], column), spread(groups[f"student of {kind}"])
            axis.errorbar(x[0], y[0], color=BLUE, marker="o", elinewidth=1.2,
                          xerr=[[x[0] - x[1]], [x[2] - x[0]]],
                          yerr=[[y[0] - y[1]], [y[2] - y[0]]])  # fmt: skip
            taken = any(np.allclose(place, (x[0], y[0]), rtol=0.01) for place in shown)
            axis.annotate(kind, (x[0], y[0]), (5, -12 if taken else 5), textcoords="offset points",
                          fontsize=9)  # fmt: skip
            shown.append((x[0], y[0]))
        better = "student's held-out loss\n← lower is better"
        finish(axis, f"rank correlation {rank_correlation(groups, kinds, column):+.1f}", label,
               better if axis is axes[0] else "")  # fmt: skip
        axis.margins(x=0.3, y=0.15)
    losses = [groups[f"student of {kind}"] for kind in kinds]
    seeds = seeds_of([row for rows in groups.values() for row in rows])
    title = f"{best([f'The student of {kind}' for kind in kinds], losses)}\n({seeds})"
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    points = read_rows(Path(results) / "teacher_quality" / "points.csv")
    looks = zip(
        dict.fromkeys(row["token"] for row in points),
        (BLUE, ORANGE, GREEN, RED),
        "o^sv",
        strict=False,
    )
    looks = {token: (color, marker) for token, color, marker in looks}
    for axis, kind in zip(
        below.subplots(1, len(kinds), sharex=True, sharey=True), kinds, strict=True
    ):
        for token, (color, marker) in looks.items():
            own = [row for row in points if (row["kind"], row["token"]) == (kind, token)]
            x, y = np.array([(float(row["x"]), float(row["y"])) for row in own]).T
            axis.scatter(x, y, 9, color, marker=marker, alpha=0.6, linewidths=0)
            axis.annotate(repr(token), (x.mean(), y.mean()), fontsize=9, ha="center", weight="bold",
                          color=color)  # fmt: skip
        finish(axis, kind, "", "hidden states before\nthese tokens" if kind == kinds[0] else "")
        axis.set_xticks([])
        axis.set_yticks([])


PICTURES["teacher_quality"] = (draw_quality, (10, 6.5))
