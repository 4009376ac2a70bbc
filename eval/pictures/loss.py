"""Held-out loss: who wins at which cost, and what temperature, alpha, teacher and text do to it."""

from pathlib import Path

import numpy as np

from eval import drawing
from eval.drawing import (
    BLUE,
    GREY,
    LOOKS,
    amount,
    best,
    by_arm,
    by_number,
    change_of,
    differ,
    finish,
    millions,
    points,
    rows_of,
    seeds_of,
    spread,
    verdict,
)


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
        helps = [verdict(student, plain).startswith("wins") for student in students]
        sure = [differ(student, plain) for student in students]  # one seed tells nothing
        title += ". Every teacher helps" if all(helps) and all(sure) else ""
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
