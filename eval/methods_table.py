"""The table that a reader starts from: each method, what it is, what it gained, at which cost.

Made from the docstrings in methods/, results/methods/BED/results.csv, and the sentences that a
person wrote in results/methods/found.csv, by python -m eval.experiments.methods; written to
results/methods/README.md.
"""

import ast
import re
from pathlib import Path

from eval.drawing import by_arm, read_rows, rows_of
from eval.gains import ANSWERS, beside, gains, is_told_apart, sorted_arms
from eval.report import mean_and_spread, table
from files import atomic_path

ROOT = Path(__file__).parents[1]
LESSONS = ("train_distillation.py",)


def shown(differences, digits: int = 3) -> str:
    """ "+0.120 ± 0.008", or "none" and the same in brackets."""
    spread = f" ± {differences.std(ddof=1):.{digits}f}" if len(differences) > 1 else ""
    value = f"{differences.mean():+.{digits}f}{spread}"
    return value if len(differences) < 2 or is_told_apart(differences) else f"none ({value})"


def about(path: Path) -> dict[str, str]:
    """What a method's docstring says: its name, its loss or first equation, its papers."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    lines = [" ".join(line.split()) for line in text.split("\n") if line.startswith("    ")]
    equation = next((line for line in lines if line.startswith("loss")), *lines[:1])
    papers = dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", text))
    papers = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    return {"name": text.split("\n")[0].split(": ")[0], "equation": equation, "papers": papers}


def script_of(rows: list[dict]) -> str:
    """The file that an arm's command runs: "methods/attention.py"."""
    words = rows[0]["command"].split()
    return words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]


def methods_table(rows: list[dict], found: dict[str, str]) -> str:
    """A line for each file, with the best of its arms, and the sentence that `found` has of it."""
    lines, groups = [], by_arm(rows)
    files = [ROOT / name for name in LESSONS] + sorted((ROOT / "methods").glob("[a-z]*.py"))
    order = sorted_arms(rows)
    for path in files:
        name = str(path.relative_to(ROOT))
        arms = [arm for arm in order if script_of(groups[arm]) == name]
        if not arms:
            continue
        said = about(path)
        gain, cost = gains(rows, arms[0])
        words = [said["name"], f"`{said['equation'].replace('|', chr(92) + '|')}`", said["papers"]]
        words += [
            f"[{path.stem}](../../{name})",
            arms[0],
            shown(gain),
            shown(cost),
            found.get(path.stem, ""),
        ]
        lines.append((-gain.mean(), words))
    header = ["method", "equation", "paper", "file", "best arm", "gain, equal tokens"]
    header += ["gain, equal cost", "found"]
    return table(header, [words for _, words in sorted(lines)])


def arms_table(rows: list[dict]) -> str:
    """A line for each arm, the best first."""
    lines, groups = [], by_arm(rows)
    plain = sorted((arm for arm in groups if arm.split(" x")[0] == "plain"), key=lambda arm: (
        float(arm.split(" x")[1]) if " x" in arm else 1.0))  # fmt: skip
    digits = 1 if rows[0].get(ANSWERS) else 3  # points, or nats
    columns = [("val_loss",), ("bits_per_byte",), ("kl",), ("agreement", 100, 1), ("ece", 100, 1)]
    titles = ["held-out loss", "bits/byte", "KL", "agreement %", "ece %"]
    if rows[0].get(ANSWERS):
        columns, titles = [(ANSWERS, 100, 0), ("val_loss",)], ["3 steps %", "held-out loss"]
    if "kl_to_truth" in rows[0]:
        columns, titles = [*columns, ("kl_to_truth", 1, 4)], [*titles, "KL to the truth"]
    costs = [("tokens", 1e-6, 2), ("flops", 1e-12, 2), ("seconds", 1, 0)]
    for arm in [*sorted_arms(rows), *plain]:
        gain, cost = (shown(some, digits) for some in gains(rows, arm))
        cost = "-" if arm in plain else cost
        gain = "-" if arm == "plain" else gain
        measured = [mean_and_spread(groups[arm], *how) for how in columns]
        spent = [mean_and_spread(groups[arm], *how).split(" ±")[0] for how in costs]
        over_kl = arm not in (*plain, "KL") and "KL" in groups
        kl = shown(beside(rows, arm, "KL"), digits) if over_kl else "-"
        lines.append([arm, str(len(groups[arm])), gain, cost, kl, *measured, *spent])
    header = ["arm", "seeds", "gain, equal tokens", "gain, equal cost", "gain over KL", *titles]
    return table([*header, "Mtokens", "Tflop", "seconds"], lines)


def write_table(results: Path) -> str:
    """Write RESULTS/README.md from the CSVs of all beds that are there; returns the path."""
    searched = any(Path(results).glob("*/search/results.csv"))
    parts = [
        "# Every method beside the others",
        "Made by `python -m eval.experiments.methods`; every CSV row holds the command of its run. "
        "Student nano (0.23M), teacher mini (1.05M). Gain: nats per token below the plain student "
        "of the same seed (on bed words, whose teacher is micro, 0.49M, points of exact answers at "
        "3 steps above it), mean ± standard deviation over seeds; `none` where it is within two "
        "standard deviations. At equal cost: below the plain student that spent as many operations "
        "(teacher's passes and all phases counted, the reference teacher's own training not). "
        "Seconds are of a shared machine. The losses are those of all held-out plays but the first"
        + (
            ", on which knobs were searched."
            if searched
            else "; knobs were not searched yet: "
            "defaults were chosen in a few short runs of seed 0, on all held-out plays."
        ),
    ]
    found = {row["method"]: row["found"] for row in read_rows(Path(results) / "found.csv")}
    for bed in ("few", "text", "words", "oracle"):
        rows = rows_of(results, bed)
        if rows:
            devices = ", ".join(sorted({row["device"] for row in rows}))
            parts += [f"## {bed}", f"On {devices}.", f"![{bed}]({bed}/plot.png)"]
            parts += [methods_table(rows, found)] if bed == "few" else []
            parts += [arms_table(rows)]
    path = Path(results) / "README.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n", "utf-8")
    return str(path)
