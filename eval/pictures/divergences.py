"""What a bump does that must fit three, under each divergence."""

from pathlib import Path

import numpy as np

from eval.drawing import BLUE, ORANGE, by_arm, rows_of


def draw_mode_seeking(results: Path, figure) -> None:
    """A panel per divergence, all on one scale: above those that cover, below those that choose."""
    groups = by_arm(rows_of(results, "mode_seeking"))
    best = {arm: min(rows, key=lambda row: float(row["value"])) for arm, rows in groups.items()}
    of = {arm: tuple(float(row[x]) for x in ("coverage", "precision")) for arm, row in best.items()}
    lines = [[arm for arm in groups if (of[arm][0] > of[arm][1]) == covers]
             for covers in (True, False)]  # fmt: skip
    lines = [line for line in lines if line]
    columns = max(map(len, lines))
    axes = figure.subplots(len(lines), columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for line, row_of_axes in zip(lines, axes, strict=True):
        for arm, axis in zip(line, row_of_axes, strict=False):
            coverage, precision = of[arm]
            color = BLUE if coverage > precision else ORANGE
            target = np.array(best[arm]["target"].split(), float)
            axis.axis("on")
            axis.bar(range(len(target)), target, 1.0, color="#c8c8c8")
            for row in groups[arm]:
                axis.plot(
                    np.array(row["fit"].split(), float), color=color, linewidth=0.9, alpha=0.5
                )
            axis.plot(np.array(best[arm]["fit"].split(), float), color=color, linewidth=2.6)
            axis.set_title(arm, fontsize=10, color=color, weight="bold")
            told = f"coverage {coverage:.0%}\nprecision {precision:.0%}"
            axis.text(0.97, 0.97, told, ha="right", va="top", fontsize=9, transform=axis.transAxes)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.set_ylim(0, 0.5)
    title = "One bump must fit three: forward KL, as all in blue, covers the target ({:.0%}),\n"
    title += "reverse KL, as all in orange, chooses a mode ({:.0%}). Grey: target; bold: best fit"
    shown = (of[arm][0] for arm in ("forward KL", "reverse KL"))
    figure.suptitle(title.format(*shown), fontsize=11, x=0.02, ha="left")
    below = "probability of each of 32 tokens; thin: where other starts end\ncoverage: target's "
    below += "probability where the fit's is above 1%; precision: the fit's where the target's is"
    figure.supxlabel(below, fontsize=9)
