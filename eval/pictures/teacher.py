"""What a teacher says of the next token, and what to keep of it in a file."""

from pathlib import Path

from eval import drawing
from eval.drawing import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    by_arm,
    by_number,
    finish,
    points,
    rows_of,
    seeds_of,
)


def draw_soft_labels(results: Path, figure) -> None:
    """A line of panels per context, a column per temperature, all on one scale."""
    rows, rest = rows_of(results, "soft_labels"), {}
    groups = list(by_arm(rows).values())
    fonts, missing = drawing.fonts_for("".join(row["context"] + row["token"] for row in rows))
    columns = len({row["temperature"] for row in rows})
    contexts = [group[0]["context"] for group in groups[::columns]]
    axes = figure.subplots(len(contexts), columns, sharex=True, squeeze=False)
    for axis, group in zip(axes.flat, groups, strict=True):
        for height, row in enumerate(group):
            look, chance = {"color": BLUE}, 100 * float(row["probability"])
            if row["is_next"] == "1":
                look = {"color": ORANGE, "hatch": "//"}
            elif row["rank"] == "0":
                look = {"color": "#bbbbbb"}
                rest.setdefault(float(row["temperature"]), []).append(chance)
            axis.barh(height, chance, edgecolor="black", linewidth=0.5, **look)
            percent = f"{chance:.0f}%" if chance >= 0.95 else f"{chance:.1g}%"
            axis.text(chance + 2, height, percent, va="center", fontsize=9)
        told = f"T = {float(row['temperature']):g}\nentropy {float(row['entropy']):.1f} nats"
        axis.text(125, 1.4, told, ha="right", va="center", fontsize=9)
        axis.set_xlim(0, 125)
        axis.set_ylim(len(group) - 0.4, -0.6)
        axis.set_xticks([0, 50, 100])
        axis.set_yticks([])
        axis.spines[["top", "right"]].set_visible(False)
    for context, line, group in zip(contexts, axes, groups[:: axes.shape[1]], strict=True):
        names = [f"all other {int(row['count']):,}" if row["rank"] == "0" else
                 drawing.shown(row["token"].strip() or repr(row["token"]), missing)
                 + " (true)" * int(row["is_next"]) for row in group]  # fmt: skip
        line[0].set_yticks(range(len(group)), names, fontsize=10, family=fonts)
        said = f"“… {drawing.shown(context, missing)} ___”"
        line[0].set_title(said, loc="left", fontsize=10, style="italic", family=fonts)
    low, high = (f"{min(rest[T]):.0f} to {max(rest[T]):.0f}% at T = {T:g}" for T in
                 (min(rest), max(rest)))  # fmt: skip
    title = "A higher T gives probability to tokens that the teacher thinks unlikely:\n"
    title += f"{low}, {high} (orange: the true next word)"
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    figure.supxlabel("the teacher's probability of the next token (%)", fontsize=10)


def draw_cache(results: Path, figure) -> None:
    rows, (upper, lower) = rows_of(results, "cache"), figure.subplots(2, 1, sharex=True)
    exact = {row["seed"]: float(row["val_loss"]) for row in rows if row["arm"] == "hidden"}
    rows = [{**row, "lost": float(row["val_loss"]) - exact[row["seed"]]}
            for row in rows if row["seed"] in exact]  # fmt: skip
    looks = {
        "topk": {"color": RED, "marker": "v", "label": "top k, renormalised"},
        "tail": {"color": ORANGE, "marker": "s", "label": "top k and a tail"},
        "sample": {"color": BLUE, "marker": "o", "label": "sample of k"},
        "hidden": {"color": GREEN, "marker": "^", "label": "hidden state"},
    }
    lost, biases, ticks = {}, {}, {}
    for kind, look in looks.items():
        sizes, arms = by_number(rows, "bytes_per_token", kind)
        ticks |= {size: f"{size:g}" for size in sizes}
        lost[kind] = points(upper, sizes, arms, "lost", **look)[0]
        if kind == "sample":
            single = {**look, "label": "sample of k: one draw", "linestyle": ":"}
            points(lower, sizes, arms, "gradient_error", markerfacecolor="white", **single)
            look = {**look, "label": "sample of k:\nmean of 32 draws"}
        biases[kind] = points(lower, sizes, arms, "gradient_bias", **look)[0]
    kept = sorted(ticks)
    for size, larger in zip(kept, kept[1:], strict=False):
        if larger <= 1.1 * size:  # labels side by side would hide each other
            del ticks[larger]
    upper.set_yscale("symlog", linthresh=0.01)  # linear up to 0.01, as the exact one is at 0
    upper.set_ylim(-0.006, 4)
    upper.set_yticks([0, 0.01, 0.1, 1], ["0", "0.01", "0.1", "1"])
    lower.set_yscale("log")
    title = f"With 4 numbers per token the student loses {lost['topk']:.2f} nats (top k),\n"
    title += f"{lost['tail']:.2f} (top k and a tail) or {lost['sample']:.2f} (sample)"
    ylabel = "nats above the hidden state's student\n(log scale)  ← lower is better"
    finish(upper, title, "", ylabel, ticks, log=2)
    title = f"The mean of 32 samples of 4 is {biases['tail'] / biases['sample']:.0f} times nearer "
    title += "to the true gradient\nthan the top 4 and a tail"
    ylabel = "|gradient - exact| / |exact|\n(log scale)  ← lower is better"
    finish(lower, title, f"bytes per token (log scale); {seeds_of(rows)}", ylabel, ticks, log=2)
