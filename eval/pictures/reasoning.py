"""Word problems: how many are solved, and what a weight on the tags does to that."""

from pathlib import Path

from eval.drawing import (
    BLUE,
    GREEN,
    GREY,
    LOOKS,
    ORANGE,
    RED,
    amount,
    by_arm,
    by_number,
    differ,
    finish,
    millions,
    points,
    rows_of,
    seeds_of,
    spread,
)

TAG = "traces, tag "
ARMS = {
    "teacher": GREY, "answers alone": RED, f"{TAG}1": BLUE, f"{TAG}3": BLUE, f"{TAG}10": BLUE,
    "teacher's words": ORANGE, "traces and KL": GREEN,
}  # fmt: skip


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
        f"{TAG}1": "Taught with steps written out, the student solves {} of 3-step problems",
        "answers alone": ";\ntaught with answers alone {}",
        "teacher's words": "; with steps in its teacher's words {}",
    }
    title = "".join(words.format(percent(*spread(groups[arm], "accuracy_3", 100)))
                    for arm, words in said.items() if arm in groups)  # fmt: skip
    figure.suptitle(title, fontsize=11, x=0.02, ha="left")
    xlabel = f"exact answers (% of held-out problems), higher is better →\n{seeds_of(rows)}"
    figure.supxlabel(xlabel, fontsize=10)


def percent(mean: float, low: float, high: float) -> str:
    """Seeds that are far apart must not hide behind their mean."""
    return f"{mean:.0f}%" + f" ({low:.0f} to {high:.0f})" * (high - low >= 20)


def draw_tag_weight(results: Path, figure) -> None:
    rows = [row for row in rows_of(results, "reasoning") if row["arm"].startswith(TAG)]
    rows, axis = [{**row, "weight": row["arm"][len(TAG) :]} for row in rows], figure.subplots()
    weights, groups = by_number(rows, "weight")
    points(axis, weights, groups, "accuracy_3", 100, label="answer exact", **LOOKS["distilled"])
    look = {**LOOKS["plain"], "color": ORANGE}
    points(axis, weights, groups, "verified_3", 100, label="every step\ntrue", **look)
    (first, last), ends = (weights[0], weights[-1]), (groups[0], groups[-1])
    shares = [spread(end, "accuracy_3", 100)[0] for end in ends]
    title = f"A tag weight of {last:g} {'costs' if shares[1] <= shares[0] else 'gains'} "
    title += f"{amount(*ends, 'accuracy_3', 100, 0)} points"
    if min(map(len, ends)) > 1 and not differ(*ends, "accuracy_3"):
        title = f"Seeds do not tell a tag weight of {last:g} from {first:g}"
    title += f" at 3 steps:\n{shares[0]:.0f}% exact at {first:g}, {shares[1]:.0f}% at {last:g}"
    axis.set_ylim(-2, 104)
    xlabel = f"weight of the four tags; all else weighs 1 (log scale)\n{seeds_of(rows)}"
    ylabel = "% of held-out problems of 3 steps\nhigher is better →"
    finish(axis, title, xlabel, ylabel, {weight: f"{weight:g}" for weight in weights}, log=10)
