"""Draw every picture from its CSV, and from nothing else.

    python -m eval.plots --results out/quick/results

Points and bars are means over seeds, thin lines span the lowest and highest seed. Reference lines,
where they make sense, are the teacher and the plain student of the same data and tokens. Titles
state what was found; they are computed from the numbers, so they stay true when those change, and
claim only what seeds tell apart (`differ` in drawing.py).
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files; no screen is needed
import matplotlib.pyplot as plt
import numpy as np

from eval import drawing
from eval.drawing import (
    BLUE,
    GREEN,
    GREY,
    LOOKS,
    ORANGE,
    RED,
    amount,
    best,
    by_arm,
    by_number,
    change_of,
    finish,
    millions,
    points,
    rows_of,
    seeds_of,
    spread,
    verdict,
)
from files import atomic_path, command_line, new_parser

TAG = "traces, tag "
ARMS = {
    "teacher": GREY, "answers alone": RED, f"{TAG}1": BLUE, f"{TAG}3": BLUE, f"{TAG}10": BLUE,
    "teacher's words": ORANGE, "traces and KL": GREEN,
}  # fmt: skip


def draw_headline(results: Path, figure) -> None:
    rows = rows_of(results, "headline")
    groups, (left, right) = by_arm(rows), figure.subplots(1, 2, sharey=True)
    ways = {
        f"equal {what}{more}": f"plain, equal {what}{words}"
        for more, words in (("", ""), (" and teacher", "\n+ teacher's training"))
        for what in ("seconds", "flops")
    }  # fmt: skip
    names = {"plain": "plain", "distilled": "distilled", **ways, "teacher": "teacher"}
    names = {arm: name for arm, name in names.items() if arm in groups}
    for height, arm in enumerate(names):
        (mean, low, high), look = spread(groups[arm]), LOOKS.get(arm, LOOKS["plain"])
        left.errorbar(mean, height, xerr=[[mean - low], [high - mean]], capsize=4, **look)
        left.annotate(f"{mean:.2f}", (mean, height), (0, 7), textcoords="offset points",
                      ha="center", fontsize=10, color=look["color"])  # fmt: skip
        flops, seconds, tokens = (
            spread(groups[arm], column, scale)[0]
            for column, scale in (("flops", 1e-12), ("seconds", 1), ("tokens", 1e-6))
        )
        words = f"{flops:,.1f} Tflop, {seconds:.0f} s,\n{tokens:.1f}M tokens"
        right.barh(height, flops, 0.6, color=look["color"])
        if arm == "distilled" and "teacher" in groups:
            taught = spread(groups["teacher"], "flops", 1e-12)[0]
            style = {"color": "white", "edgecolor": GREY, "hatch": "////"}
            right.barh(height, taught, 0.6, left=flops, **style)
            flops, words = flops + taught, f"{words}\n(hatched: its teacher's)"
        right.annotate(words, (flops, height), (4, 0), textcoords="offset points", va="center",
                       fontsize=9)  # fmt: skip
    left.axvline(spread(groups["distilled"])[0], color=BLUE, linewidth=1, alpha=0.5)
    left.set_yticks(range(len(names)), names.values())
    left.set_ylim(len(names) - 0.5, -0.7)
    left.margins(x=0.15)  # room for the numbers at the points
    right.set_xlim(0, 1.8 * right.get_xlim()[1])
    xlabel = f"held-out loss (nats per token)\n← lower is better\n{seeds_of(rows)}"
    finish(left, "", xlabel, "")
    finish(right, "", "cost of training (Tflop)\n← lower is cheaper", "")
    found = {arm: verdict(groups["distilled"], rows) for arm, rows in groups.items()}
    title = f"At equal tokens the distilled student {found['plain']}"
    bills = {"At equal cost": "", "If its teacher must be trained too": " and teacher"}
    for condition, bill in bills.items():
        arms = {f"equal {what}{bill}": what for what in ("seconds", "flops")}
        parts = [f"{found[arm]} ({what})" for arm, what in arms.items() if arm in found]
        title += f"\n{condition} it {', '.join(parts)}" if parts else ""
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")


def draw_temperature(results: Path, figure) -> None:
    rows, axis = rows_of(results, "temperature"), figure.subplots()
    temperatures, groups = by_number(rows, "temperature")
    points(axis, temperatures, groups, label="distilled,\nalpha = 0", **LOOKS["distilled"])
    title = best([f"T = {T:g}" for T in temperatures], groups)
    for plain in drawing.references(axis, results):
        worse = [f"{T:g}" for T, group in zip(temperatures, groups, strict=True)
                 if verdict(group, plain).startswith("loses")]  # fmt: skip
        title += f"\nWorse than no teacher: {'T = ' + ', '.join(worse) if worse else 'none'}"
    ticks = {T: f"{T:g}" for T in temperatures}
    finish(axis, title, f"temperature T (log scale)\n{seeds_of(rows)}", ticks=ticks, log=2)


def draw_teachers(results: Path, figure, name: str) -> None:
    """Teachers and their students, by the teacher's size or by how much it has read."""
    rows, axis = rows_of(results, name), figure.subplots()
    by_size = name == "teacher_size"
    x, teachers = by_number(rows, "student_params" if by_size else "teacher_tokens", "teacher ")
    _, students = by_number(rows, "teacher_params" if by_size else "teacher_tokens", "student of ")
    ticks = {size: millions(size) for size in x}
    xlabel, change = "teacher parameters (log scale)", "From {} to {} parameters"
    if not by_size:
        x = [tokens / float(students[0][0]["tokens"]) for tokens in x]
        ticks = {times: f"{times:.2g}x" for times in x}
        xlabel = "what the teacher read, as a multiple of what the student read (log scale)"
        change = "From {} to {} the student's reading"
    points(axis, x, teachers, label="teacher itself", **LOOKS["teacher"])
    label = f"its {millions(students[0][0]['student_params'])} student"
    points(axis, x, students, label=label, **LOOKS["distilled"])
    title = change.format(ticks[x[0]], ticks[x[-1]])
    gains = (change_of(arms[0], arms[-1]) for arms in (teachers, students))
    title += " the teacher {} nats,\nits student {}".format(*gains)
    for plain in drawing.references(axis, results):
        helps = all(verdict(student, plain).startswith("wins") for student in students)
        title += ". Every teacher helps" if helps else ""
    finish(axis, title, f"{xlabel}\n{seeds_of(rows)}", ticks=ticks, log=10)


def draw_alpha(results: Path, figure) -> None:
    rows, axis = rows_of(results, "alpha"), figure.subplots()
    alphas, groups = by_number(rows, "alpha")
    points(axis, alphas, groups, label="distilled,\nT = 1", **LOOKS["distilled"])
    lowest = min(groups, key=lambda group: spread(group)[0])
    title = f"alpha = {best([f'{alpha:g}' for alpha in alphas], groups)}"
    title += f"\nThe lowest is {amount(lowest, groups[-1])} nats below labels alone"
    xlabel = f"alpha: 0 = teacher only, 1 = labels only (the plain student)\n{seeds_of(rows)}"
    finish(axis, title, xlabel, ticks={alpha: f"{alpha:g}" for alpha in alphas})


def draw_curves(results: Path, figure) -> None:
    rows, axis = rows_of(results, "curves"), figure.subplots()
    few, most = (f(int(row["windows"]) for row in rows) for f in (min, max))
    final, lines = {}, {}  # the tables' numbers; and those on equal windows, by tokens
    for arm, group in by_arm(rows).items():
        end = max(int(row["tokens"]) for row in group)
        final[arm] = [r for r in group if (int(r["tokens"]), int(r["windows"])) == (end, most)]
        early = [{**row, "arm": row["tokens"]} for row in group if int(row["windows"]) == few]
        lines[arm] = by_number(early, "tokens")
        if arm != "teacher":
            x, groups = lines[arm]
            groups, label = [*groups[:-1], final[arm]], f"{arm} {spread(final[arm])[0]:.2f}"
            points(axis, np.array(x) / 1e6, groups, label=label, **LOOKS[arm])
    read = float(final["teacher"][0]["tokens"]) / float(final["plain"][0]["tokens"])
    stats = spread(final["teacher"])
    label = f"teacher {stats[0]:.2f},\nafter reading\n{read:.2g}x as much"
    drawing.level(axis, stats, label, "teacher")
    title = f"At the end the distilled student {verdict(final['distilled'], final['plain'])}"
    (tokens, plain), (of_student, students) = lines["plain"], lines["distilled"]
    level, means = spread(plain[-1])[0], [spread(group)[0] for group in students]
    below = [i for i, loss in enumerate(means) if loss <= level]
    if below:  # where its line comes down to the plain student's last loss
        two = slice(max(0, below[0] - 1), below[0] + 1)
        share = np.interp(-level, -np.array(means[two]), of_student[two]) / tokens[-1]
        title += f";\nit passes the plain student's last loss after about {share:.0%} of the tokens"
    xlabel = f"tokens read (millions); {seeds_of(rows)}\nlast point: {most} held-out windows, as in"
    finish(axis, title, f"{xlabel} the tables; before: {few}")


def draw_data_share(results: Path, figure) -> None:
    rows, axis, arms = rows_of(results, "data_share"), figure.subplots(), {}
    for kind in ("plain", "distilled"):
        shares, arms[kind] = by_number(rows, "data_share", kind)
        shares = [100 * share for share in shares]
        points(axis, shares, arms[kind], label=kind, **LOOKS[kind])
    drawing.references(axis, results, ("teacher",))
    near = int(np.argmin(np.abs(np.array(shares) - 10)))
    lost = [amount(groups[near], groups[-1]) for groups in arms.values()]
    title = f"With {shares[near]:g}% of the text the plain student loses {lost[0]} nats,\n"
    ticks = {share: f"{share:g}%" for share in shares}
    xlabel = "share of the text, same number of steps (log scale); the teacher read all\n"
    title, xlabel = f"{title}the distilled one {lost[1]}", xlabel + seeds_of(rows)
    finish(axis, title, xlabel, ticks=ticks, log=10)


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


def draw_reasoning(results: Path, figure, name: str) -> None:
    rows = rows_of(results, name)
    groups = by_arm(rows)
    arms = [arm for arm in ARMS if arm in groups]
    axes = figure.subplots(1, 5, sharex=True, sharey=True)
    for steps, axis in enumerate(axes, start=1):
        for height, arm in enumerate(arms):
            mean, low, high = spread(groups[arm], f"accuracy_{steps}", 100)
            axis.barh(height, mean, 0.7, color=ARMS[arm], xerr=[[mean - low], [high - mean]],
                      error_kw={"capsize": 3 * (low < high)})  # fmt: skip
            axis.text(high + 5, height, f"{mean:.0f}", va="center", fontsize=10)
        heading = f"{steps} step{'s' * (steps > 1)}" + "\nnever trained" * (steps == 5)
        axis.set_title(heading, fontsize=10)
        axis.set_xlim(0, 140)
        axis.set_xticks([0, 50, 100])
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_facecolor("#eeeeee")
    sizes = [millions(groups[arm][0]["student_params"]) for arm in arms]
    axes[0].set_yticks(range(len(arms)), [f"{a} ({n})" for a, n in zip(arms, sizes, strict=True)])
    axes[0].invert_yaxis()
    said = {
        f"{TAG}1": "Taught with steps written out, the student solves {:.0f}% of 3-step problems",
        "answers alone": ";\ntaught with answers alone {:.0f}%",
        "teacher's words": "; with steps in its teacher's words {:.0f}%",
    }
    title = "".join(words.format(spread(groups[arm], "accuracy_3", 100)[0])
                    for arm, words in said.items() if arm in groups)  # fmt: skip
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    xlabel = f"exact answers (% of held-out problems), higher is better →\n{seeds_of(rows)}"
    figure.supxlabel(xlabel, fontsize=10)


def draw_tag_weight(results: Path, figure) -> None:
    rows = [row for row in rows_of(results, "reasoning") if row["arm"].startswith(TAG)]
    rows, axis = [{**row, "weight": row["arm"][len(TAG) :]} for row in rows], figure.subplots()
    weights, groups = by_number(rows, "weight")
    points(axis, weights, groups, "accuracy_3", 100, label="answer exact", **LOOKS["distilled"])
    look = {**LOOKS["plain"], "color": ORANGE}
    points(axis, weights, groups, "verified_3", 100, label="every step\ntrue", **look)
    first, last = (spread(groups[end], "accuracy_3", 100)[0] for end in (0, -1))
    change = amount(groups[0], groups[-1], "accuracy_3", 100, 0)
    title = (
        f"A tag weight of {weights[-1]:g} {'costs' if last <= first else 'gains'} {change} points "
    )
    title += f"at 3 steps:\n{first:.0f}% exact at {weights[0]:g}, {last:.0f}% at {weights[-1]:g}"
    axis.set_ylim(-2, 104)
    xlabel = f"weight of the four tags; all else weighs 1 (log scale)\n{seeds_of(rows)}"
    ylabel = "% of held-out problems of 3 steps\nhigher is better →"
    finish(axis, title, xlabel, ylabel, {weight: f"{weight:g}" for weight in weights}, log=10)


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


PICTURES: dict[str, tuple[Callable, tuple[float, float]]] = {
    "headline": (draw_headline, (8, 5.2)),
    "curves": (draw_curves, (7.5, 4.8)),
    "soft_labels": (draw_soft_labels, (8, 7)),
    "data_share": (draw_data_share, (7.5, 4.5)),
    "teacher_size": (partial(draw_teachers, name="teacher_size"), (7.5, 4.5)),
    "teacher_reading": (partial(draw_teachers, name="teacher_reading"), (7.5, 4.5)),
    "temperature": (draw_temperature, (7.5, 4.5)),
    "alpha": (draw_alpha, (7.5, 4.5)),
    "reasoning": (partial(draw_reasoning, name="reasoning"), (8.5, 4.2)),
    "reasoning_hard": (partial(draw_reasoning, name="reasoning_hard"), (8.5, 3.2)),
    "tag_weight": (draw_tag_weight, (7.5, 4.5)),
    "cache": (draw_cache, (7.5, 7.5)),
}


def is_measured(results: Path, name: str) -> bool:
    """Whether there are rows that this picture is drawn from."""
    rows = rows_of(results, "reasoning" if name == "tag_weight" else name)
    if name == "tag_weight":
        return len({row["arm"] for row in rows if TAG in row["arm"] and "verified_3" in row}) > 1
    return bool(rows)


def draw_all(results: Path) -> list[Path]:
    """Draw each picture whose CSV is there; returns the paths."""
    paths = []
    for name, (draw, size) in PICTURES.items():
        if not is_measured(results, name):
            continue
        figure = plt.figure(figsize=size, layout="constrained")
        try:
            draw(results, figure)
        except (KeyError, ValueError, IndexError, ZeroDivisionError, StopIteration) as error:
            what = f"{Path(results) / name} cannot be drawn ({type(error).__name__}: {error})"
            raise ValueError(f"{what}: its CSV is not what eval.reproduce writes") from error
        figure.draw_without_rendering()  # makes the layout, by which labels are placed
        for axis in figure.axes:
            drawing.label_lines(axis)
        path = Path(results) / name / "plot.png"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png", metadata={"Software": None})
        plt.close(figure)
        paths.append(path)
    return paths


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("out/quick/results"), help="folder of the CSV folders"
    )
    return parser.parse_args(argv)


def main(args) -> None:
    paths = draw_all(args.results)
    if not paths:
        raise ValueError(
            f"no results.csv below '{args.results}': make them with: python -m eval.reproduce "
            f"--results {args.results}"
        )
    print(*paths, sep="\n")


if __name__ == "__main__":
    command_line(main, parse_args())
