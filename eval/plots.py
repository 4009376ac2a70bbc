"""Draw every picture from its CSV, and from nothing else.

    python -m eval.plots --results out/quick/results

Points are means over seeds, bars span the lowest and highest seed. Reference lines, where they
make sense, are the teacher and the plain student of the same data and tokens. Titles state what
was found; they are computed from the numbers, so they stay true when the numbers change.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files; no screen is needed
import matplotlib.pyplot as plt
import numpy as np

from eval.drawing import (
    BLUE,
    GREEN,
    GREY,
    LOSS_LABEL,
    ORANGE,
    RED,
    by_arm,
    finish,
    parameters,
    points,
    references,
    rows_of,
    seeds_of,
    spread,
)
from run.files import atomic_path, command_line
from run.flags import new_parser


def draw_temperature(results: Path, figure) -> None:
    rows = rows_of(results, "temperature")
    groups = sorted(by_arm(rows).values(), key=lambda g: float(g[0]["temperature"]))
    temperatures = [float(group[0]["temperature"]) for group in groups]
    axis = figure.subplots()
    label = f"distilled, alpha = 0 ({seeds_of(rows)})"
    means = points(axis, temperatures, groups, color=BLUE, marker="o", label=label)
    plain = references(axis, results).get("plain")
    best = temperatures[int(np.argmin(means))]
    title = f"T = {best:g} teaches best"
    if plain is not None:
        worse = [f"{T:g}" for T, mean in zip(temperatures, means, strict=True) if mean > plain]
        title += (
            f"; worse than no teacher: T = {', '.join(worse)}"
            if worse
            else "; every temperature beats no teacher"
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(temperatures, [f"{T:g}" for T in temperatures])
    axis.legend(loc="best", framealpha=0.9, edgecolor="none")
    finish(axis, title, "temperature T (log scale)", LOSS_LABEL)


def draw_teacher_size(results: Path, figure) -> None:
    rows = rows_of(results, "teacher_size")
    teachers = [g for arm, g in by_arm(rows).items() if arm.startswith("teacher ")]
    students = [g for arm, g in by_arm(rows).items() if arm.startswith("student of ")]
    teachers.sort(key=lambda g: float(g[0]["student_params"]))
    students.sort(key=lambda g: float(g[0]["teacher_params"]))
    sizes = [float(group[0]["student_params"]) for group in teachers]
    axis = figure.subplots()
    own = points(
        axis, sizes, teachers, color=GREY, marker="s", linestyle=":", label="teacher itself"
    )
    name = f"its {parameters(students[0][0], 'student_params')} student ({seeds_of(rows)})"
    of = [float(group[0]["teacher_params"]) for group in students]
    means = points(axis, of, students, color=BLUE, marker="o", label=name)
    plain = references(axis, results, ("plain",)).get("plain")
    gain = means[0] - means[-1]
    title = (
        f"From {sizes[0] / 1e6:.1f}M to {sizes[-1] / 1e6:.1f}M parameters the teacher gains "
        f"{own[0] - own[-1]:.2f} nats, its student {gain:.2f}"
    )
    if plain is not None and means[0] < plain:
        title += "\nEven a teacher of the student's own size helps"
    axis.set_xscale("log")
    axis.set_xticks(sizes, [f"{size / 1e6:.1f}M" for size in sizes])
    axis.minorticks_off()
    axis.legend(loc="best", framealpha=0.9, edgecolor="none")
    finish(axis, title, "teacher parameters (log scale)", LOSS_LABEL)


def draw_alpha(results: Path, figure) -> None:
    rows = rows_of(results, "alpha")
    groups = sorted(by_arm(rows).values(), key=lambda g: float(g[0]["alpha"]))
    alphas = [float(group[0]["alpha"]) for group in groups]
    axis = figure.subplots()
    label = f"distilled, T = 1 ({seeds_of(rows)})"
    means = points(axis, alphas, groups, color=BLUE, marker="o", label=label)
    references(axis, results)
    best = int(np.argmin(means))
    title = (
        f"alpha = {alphas[best]:g} is best: {means[-1] - means[best]:.2f} nats below labels alone, "
        f"{means[0] - means[best]:.2f} below the teacher alone"
    )
    axis.set_xticks(alphas)
    axis.legend(loc="best", framealpha=0.9, edgecolor="none")
    finish(axis, title, "alpha: 0 = teacher only, 1 = labels only", LOSS_LABEL)


def draw_curves(results: Path, figure) -> None:
    rows = rows_of(results, "curves")
    axis = figure.subplots()
    last = {}
    for arm, colour, marker, dashes in (
        ("teacher", GREY, "s", ":"),
        ("plain", RED, "^", "--"),
        ("distilled", BLUE, "o", "-"),
    ):
        of_arm = [row for row in rows if row["arm"] == arm]
        steps = sorted({int(row["tokens"]) for row in of_arm})
        groups = [[row for row in of_arm if int(row["tokens"]) == step] for step in steps]
        style = {"color": colour, "marker": marker, "linestyle": dashes, "label": arm}
        means = points(axis, np.array(steps) / 1e6, groups, **style)
        last[arm] = (steps, means)
    steps, plain = last["plain"]
    of_student, means = last["distilled"]
    gap = plain[-1] - means[-1]
    title = f"At the end distillation is {abs(gap):.2f} nats {'ahead' if gap >= 0 else 'behind'}"
    below = [i for i, mean in enumerate(means) if mean <= plain[-1]]
    if below:  # where the line that is drawn comes down to the plain student's last loss
        two = slice(max(0, below[0] - 1), below[0] + 1)
        share = np.interp(-plain[-1], -np.array(means[two]), of_student[two]) / steps[-1]
        title += f";\nit passes the plain student's last loss after about {share:.0%} of the tokens"
    axis.legend(loc="best", framealpha=0.9, edgecolor="none", title=seeds_of(rows))
    finish(axis, title, "tokens read (millions)", LOSS_LABEL)


def draw_data_share(results: Path, figure) -> None:
    rows = rows_of(results, "data_share")
    axis = figure.subplots()
    means = {}
    for kind, colour, marker, dashes in (("plain", RED, "^", "--"), ("distilled", BLUE, "o", "-")):
        groups = [g for arm, g in by_arm(rows).items() if arm.startswith(kind)]
        groups.sort(key=lambda g: float(g[0]["data_share"]))
        shares = [100 * float(group[0]["data_share"]) for group in groups]
        style = {"color": colour, "marker": marker, "linestyle": dashes, "label": kind}
        means[kind] = points(axis, shares, groups, **style)
    teacher = by_arm(rows_of(results, "headline")).get("teacher")
    if teacher:
        mean = spread(teacher, "val_loss")[0]
        axis.axhline(mean, color=GREY, linestyle=":", linewidth=1.8, label="teacher (all text)")
    place = int(np.argmin(np.abs(np.array(shares) - 10)))
    lost = {kind: values[place] - values[-1] for kind, values in means.items()}
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:g}%" for share in shares])
    axis.minorticks_off()
    axis.legend(loc="best", framealpha=0.9, edgecolor="none", title=seeds_of(rows))
    title = (
        f"With {shares[place]:g}% of the text the plain student loses {lost['plain']:.2f} nats, "
        f"the distilled one {lost['distilled']:.2f}"
    )
    finish(axis, title, "share of the text, same number of steps (log scale)", LOSS_LABEL)


def draw_soft_labels(results: Path, figure) -> None:
    rows = rows_of(results, "soft_labels")
    groups = sorted(by_arm(rows).items(), key=lambda item: float(item[1][0]["temperature"]))
    axes = figure.subplots(1, len(groups), sharey=True)
    for axis, (arm, group) in zip(axes, groups, strict=True):
        chances = [float(row["probability"]) for row in group]
        bars = axis.barh(range(len(group)), chances, color=BLUE, edgecolor="black", linewidth=0.5)
        for bar, row in zip(bars, group, strict=True):
            if row["is_next"] == "1":
                bar.set(color=ORANGE, hatch="//", edgecolor="black")
        axis.set_title(f"{arm}, entropy {float(group[0]['entropy']):.1f} nats", fontsize=9)
        axis.set_xlabel("probability")
        axis.spines[["top", "right"]].set_visible(False)
    first = groups[0][1]
    axes[0].set_yticks(range(len(first)), [repr(row["token"])[1:-1] for row in first])
    axes[0].invert_yaxis()
    axes[0].set_ylabel("ten likeliest next tokens")
    context = " ".join(first[0]["context"].split())
    title = "A higher T shows the student more of what the teacher thinks nearly right"
    orange = " (orange: the true next token)" if any(r["is_next"] == "1" for r in first) else ""
    figure.suptitle(f"{title}\n…{context[-70:]} ___{orange}", fontsize=11, x=0.02, ha="left")


def draw_reasoning(results: Path, figure) -> None:
    rows = rows_of(results, "reasoning")
    groups = by_arm(rows)
    axis = figure.subplots()
    looks = {
        "teacher": (GREY, "s", ":"),
        "answers alone": (RED, "^", "--"),
        "traces, tag 1": (ORANGE, "v", "-."),
        "traces, tag 10": (BLUE, "o", "-"),
        "traces and KL": (GREEN, "D", "-"),
        "teacher's words": ("black", "x", (0, (5, 1))),
    }
    for place, (arm, (colour, marker, dashes)) in enumerate(looks.items()):
        if arm in groups:
            stats = [spread(groups[arm], f"accuracy_{n}") for n in range(1, 6)]
            stats = 100 * np.array(stats)
            x = np.arange(1, 6) + 0.03 * (place - 2.5)  # side by side, so that bars stay readable
            axis.errorbar(
                x,
                stats[:, 0],
                yerr=[stats[:, 0] - stats[:, 1], stats[:, 2] - stats[:, 0]],
                color=colour,
                marker=marker,
                linestyle=dashes,
                linewidth=1.8,
                capsize=3,
                label=f"{arm} ({parameters(groups[arm][0], 'student_params')})",
            )
    answers = spread(groups["answers alone"], "accuracy_3")[0]
    gains = [
        100 * (spread(groups[f"traces, tag {weight}"], "accuracy_3")[0] - answers)
        for weight in (1, 10)
    ]
    axis.axvspan(4.5, 5.3, color=GREY, alpha=0.12, linewidth=0)
    axis.text(4.9, 45, "never trained", ha="center", fontsize=9, color=GREY)
    axis.set_xticks(range(1, 6))
    axis.set_ylim(-2, 107)
    axis.legend(loc="best", framealpha=0.9, edgecolor="none", title=seeds_of(rows), fontsize=9)
    title = (
        f"At 3 steps, writing the steps is worth {gains[0]:+.0f} points over answers alone,\n"
        f"{gains[1]:+.0f} where the tags weigh 10 times as much as the words"
    )
    finish(axis, title, "steps of the problem", "exact answers (% of held-out problems)")


def draw_cache(results: Path, figure) -> None:
    groups = by_arm(rows_of(results, "cache"))
    left, right = figure.subplots(1, 2)
    kinds = (
        ("top", ORANGE, "s", "top k and a tail"),
        ("sample", BLUE, "o", "sample of k"),
        ("hidden", GREEN, "^", "hidden state"),
    )
    losses, biases = {}, {}
    for kind, colour, marker, label in kinds:
        arms = [group for arm, group in groups.items() if arm.split()[0] == kind]
        sizes = [float(group[0]["bytes_per_token"]) for group in arms]
        style = {"color": colour, "marker": marker, "label": label}
        losses[kind] = points(left, sizes, arms, **style)
        if kind == "sample":
            style["label"] = "sample of k: mean of 32 draws"
        biases[kind] = points(right, sizes, arms, column="gradient_bias", **style)
        if kind == "sample":
            style.update(linestyle=":", markerfacecolor="white", label="sample of k: a single draw")
            points(right, sizes, arms, column="gradient_error", **style)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.legend(loc="best", framealpha=0.9, edgecolor="none", fontsize=9)
    right.set_yscale("log")
    ticks: list[float] = []
    for size in sorted(float(group[0]["bytes_per_token"]) for group in groups.values()):
        if not ticks or size > 1.1 * ticks[-1]:  # labels side by side would hide each other
            ticks.append(size)
    for axis in (left, right):
        axis.set_xticks(ticks, [f"{size:g}" for size in ticks])
    gaps = {kind: max(values) - losses["hidden"][0] for kind, values in losses.items()}
    seeds = seeds_of([row for group in groups.values() for row in group])
    title = f"With 4 numbers a token the student loses\n{gaps['top']:.3f} nats (top) or "
    title += f"{gaps['sample']:.3f} (sample); {seeds}"
    finish(left, title, "bytes a token (log scale)", LOSS_LABEL)
    ratio = biases["top"][0] / biases["sample"][0]
    title = (
        f"The mean of 32 samples is {ratio:.0f} times nearer to\nthe true gradient than the top 4"
    )
    finish(right, title, "bytes a token (log scale)", "|gradient - exact| / |exact| (log scale)")


PICTURES: dict[str, tuple[Callable, tuple[float, float]]] = {
    "temperature": (draw_temperature, (7, 4.5)),
    "teacher_size": (draw_teacher_size, (7, 4.5)),
    "alpha": (draw_alpha, (7.5, 4.5)),
    "curves": (draw_curves, (7, 4.5)),
    "data_share": (draw_data_share, (7.5, 4.5)),
    "soft_labels": (draw_soft_labels, (11, 4.2)),
    "reasoning": (draw_reasoning, (8, 5)),
    "cache": (draw_cache, (11, 4.5)),
}


def draw_all(results: Path) -> list[Path]:
    """Draw each picture whose CSV is there; returns the paths."""
    paths = []
    for name, (draw, size) in PICTURES.items():
        if not rows_of(results, name):
            continue
        figure = plt.figure(figsize=size, layout="constrained")
        draw(results, figure)
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
            f"no results.csv below '{args.results}': make them with: python -m eval.reproduce"
        )
    for path in paths:
        print(path)


if __name__ == "__main__":
    command_line(main, parse_args())
