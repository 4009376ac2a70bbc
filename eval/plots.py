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
    LOOKS,
    ORANGE,
    RED,
    by_arm,
    by_number,
    finish,
    millions,
    points,
    ranges,
    references,
    rows_of,
    seeds_of,
    spread,
)
from files import atomic_path, command_line, new_parser


def draw_temperature(results: Path, figure) -> None:
    rows = rows_of(results, "temperature")
    temperatures, groups = by_number(rows, "temperature")
    axis = figure.subplots()
    label = f"distilled, alpha = 0 ({seeds_of(rows)})"
    means = points(axis, temperatures, groups, label=label, **LOOKS["distilled"])
    plain = references(axis, results).get("plain")
    title = f"T = {temperatures[int(np.argmin(means))]:g} teaches best"
    if plain is not None:
        worse = [f"{T:g}" for T, mean in zip(temperatures, means, strict=True) if mean > plain]
        title += "; every temperature beats no teacher" if not worse else ""
        title += f"; worse than no teacher: T = {', '.join(worse)}" if worse else ""
    axis.set_xscale("log", base=2)
    ticks = {T: f"{T:g}" for T in temperatures}
    finish(axis, title, "temperature T (log scale)", ticks=ticks)


def draw_teacher_size(results: Path, figure) -> None:
    rows = rows_of(results, "teacher_size")
    sizes, teachers = by_number(rows, "student_params", "teacher ")
    teacher_sizes, students = by_number(rows, "teacher_params", "student of ")
    axis = figure.subplots()
    own = points(axis, sizes, teachers, label="teacher itself", **LOOKS["teacher"])
    label = f"its {millions(students[0][0]['student_params'])} student ({seeds_of(rows)})"
    means = points(axis, teacher_sizes, students, label=label, **LOOKS["distilled"])
    plain = references(axis, results, ("plain",)).get("plain")
    title = (
        f"From {millions(sizes[0])} to {millions(sizes[-1])} parameters the teacher gains "
        f"{own[0] - own[-1]:.2f} nats, its student {means[0] - means[-1]:.2f}"
    )
    if plain is not None and means[0] < plain:
        title += "\nEven a teacher of the student's own size helps"
    axis.set_xscale("log")
    ticks = {size: millions(size) for size in sizes}
    finish(axis, title, "teacher parameters (log scale)", ticks=ticks)


def draw_alpha(results: Path, figure) -> None:
    rows = rows_of(results, "alpha")
    alphas, groups = by_number(rows, "alpha")
    axis = figure.subplots()
    means = points(
        axis, alphas, groups, label=f"distilled, T = 1 ({seeds_of(rows)})", **LOOKS["distilled"]
    )
    references(axis, results)
    best = int(np.argmin(means))
    title = (
        f"alpha = {alphas[best]:g} is best: {means[-1] - means[best]:.2f} nats below labels alone, "
        f"{means[0] - means[best]:.2f} below the teacher alone"
    )
    ticks = {alpha: f"{alpha:g}" for alpha in alphas}
    finish(axis, title, "alpha: 0 = teacher only, 1 = labels only", ticks=ticks)


def draw_curves(results: Path, figure) -> None:
    rows = rows_of(results, "curves")
    axis, last = figure.subplots(), {}
    for arm, look in LOOKS.items():
        of_arm = [row for row in rows if row["arm"] == arm]
        tokens = sorted({int(row["tokens"]) for row in of_arm})
        groups = [[row for row in of_arm if int(row["tokens"]) == count] for count in tokens]
        last[arm] = tokens, points(axis, np.array(tokens) / 1e6, groups, label=arm, **look)
    tokens, plain = last["plain"]
    of_student, means = last["distilled"]
    gap = plain[-1] - means[-1]
    title = f"At the end distillation is {abs(gap):.2f} nats {'ahead' if gap >= 0 else 'behind'}"
    below = [i for i, mean in enumerate(means) if mean <= plain[-1]]
    if below:  # where the line that is drawn comes down to the plain student's last loss
        two = slice(max(0, below[0] - 1), below[0] + 1)
        share = np.interp(-plain[-1], -np.array(means[two]), of_student[two]) / tokens[-1]
        title += f";\nit passes the plain student's last loss after about {share:.0%} of the tokens"
    finish(axis, title, "tokens read (millions)", legend=seeds_of(rows))


def draw_data_share(results: Path, figure) -> None:
    rows = rows_of(results, "data_share")
    axis, means = figure.subplots(), {}
    for kind in ("plain", "distilled"):
        shares, groups = by_number(rows, "data_share", kind)
        shares = [100 * share for share in shares]
        means[kind] = points(axis, shares, groups, label=kind, **LOOKS[kind])
    references(axis, results, ("teacher",))
    near = int(np.argmin(np.abs(np.array(shares) - 10)))
    lost = {kind: values[near] - values[-1] for kind, values in means.items()}
    axis.set_xscale("log")
    title = (
        f"With {shares[near]:g}% of the text the plain student loses {lost['plain']:.2f} nats, "
        f"the distilled one {lost['distilled']:.2f}"
    )
    ticks = {share: f"{share:g}%" for share in shares}
    xlabel = "share of the text, same number of steps (log scale); the teacher read all"
    finish(axis, title, xlabel, ticks=ticks, legend=seeds_of(rows))


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
    groups, axis = by_arm(rows), figure.subplots()
    looks = {
        "teacher": LOOKS["teacher"],
        "answers alone": LOOKS["plain"],
        "traces, tag 1": {"color": ORANGE, "marker": "v", "linestyle": "-."},
        "traces, tag 10": LOOKS["distilled"],
        "traces and KL": {"color": GREEN, "marker": "D", "linestyle": "-"},
        "teacher's words": {"color": "black", "marker": "x", "linestyle": (0, (5, 1))},
    }
    at_three = {}
    for number, (arm, look) in enumerate(looks.items()):
        if arm in groups:
            stats = [spread(groups[arm], f"accuracy_{steps}") for steps in range(1, 6)]
            x = np.arange(1, 6) + 0.03 * (number - 2.5)  # side by side, so that bars stay readable
            label = f"{arm} ({millions(groups[arm][0]['student_params'])})"
            at_three[arm] = ranges(axis, x, 100 * np.array(stats), label=label, **look)[2]
    gains = [at_three[f"traces, tag {weight}"] - at_three["answers alone"] for weight in (1, 10)]
    axis.axvspan(4.5, 5.3, color=GREY, alpha=0.12, linewidth=0)
    axis.text(4.9, 45, "never trained", ha="center", fontsize=9, color=GREY)
    axis.set_xticks(range(1, 6))
    axis.set_ylim(-2, 107)
    title = (
        f"At 3 steps, writing the steps is worth {gains[0]:+.0f} points over answers alone,\n"
        f"{gains[1]:+.0f} where the tags weigh 10 times as much as the words"
    )
    ylabel = "exact answers (% of held-out problems)"
    finish(axis, title, "steps of the problem", ylabel, legend=seeds_of(rows))


def draw_cache(results: Path, figure) -> None:
    rows = rows_of(results, "cache")
    left, right = figure.subplots(1, 2)
    looks = {
        "topk": {"color": RED, "marker": "v", "label": "top k, renormalised"},
        "tail": {"color": ORANGE, "marker": "s", "label": "top k and a tail"},
        "sample": {"color": BLUE, "marker": "o", "label": "sample of k"},
        "hidden": {"color": GREEN, "marker": "^", "label": "hidden state"},
    }
    losses, biases, ticks = {}, {}, {}
    for kind, look in looks.items():
        sizes, arms = by_number(rows, "bytes_per_token", kind)
        ticks |= {size: f"{size:g}" for size in sizes}
        losses[kind] = points(left, sizes, arms, **look)
        if kind == "sample":
            single = {**look, "label": "sample of k: a single draw", "linestyle": ":"}
            points(right, sizes, arms, "gradient_error", markerfacecolor="white", **single)
            look = {**look, "label": "sample of k: mean of 32 draws"}
        biases[kind] = points(right, sizes, arms, "gradient_bias", **look)
    kept = sorted(ticks)
    for size, larger in zip(kept, kept[1:], strict=False):
        if larger <= 1.1 * size:  # labels side by side would hide each other
            del ticks[larger]
    for axis in (left, right):
        axis.set_xscale("log", base=2)
    right.set_yscale("log")
    gaps = {kind: values[0] - losses["hidden"][0] for kind, values in losses.items()}
    title = f"With 4 numbers per token the student loses ({seeds_of(rows)})\n{gaps['topk']:.3f} "
    title += f"nats (top k), {gaps['tail']:.3f} (and a tail) or {gaps['sample']:.3f} (sample)"
    finish(left, title, "bytes per token (log scale)", ticks=ticks)
    ratio = biases["tail"][0] / biases["sample"][0]
    title = f"The mean of 32 samples of 4 is {ratio:.0f} times nearer\nto the true gradient "
    title += "than the top 4 and a tail"
    ylabel = "|gradient - exact| / |exact| (log scale)"
    finish(right, title, "bytes per token (log scale)", ylabel, ticks=ticks)


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
    print(*paths, sep="\n")


if __name__ == "__main__":
    command_line(main, parse_args())
