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

from eval import drawing
from eval.drawing import rows_of
from eval.pictures import divergences, loss, methods, reasoning, teacher
from files import atomic_path, command_line, new_parser

PICTURES: dict[str, tuple[Callable, tuple[float, float]]] = {
    "headline": (loss.draw_headline, (8, 5.2)),
    "curves": (loss.draw_curves, (7.5, 4.8)),
    "soft_labels": (teacher.draw_soft_labels, (8, 7)),
    "data_share": (loss.draw_data_share, (7.5, 4.5)),
    "teacher_size": (partial(loss.draw_teachers, name="teacher_size"), (7.5, 4.5)),
    "teacher_reading": (partial(loss.draw_teachers, name="teacher_reading"), (7.5, 4.5)),
    "temperature": (loss.draw_temperature, (7.5, 4.5)),
    "alpha": (loss.draw_alpha, (7.5, 4.5)),
    "reasoning": (partial(reasoning.draw_reasoning, name="reasoning"), (8.5, 4.2)),
    "reasoning_hard": (partial(reasoning.draw_reasoning, name="reasoning_hard"), (8.5, 3.2)),
    "tag_weight": (reasoning.draw_tag_weight, (7.5, 4.5)),
    "cache": (teacher.draw_cache, (7.5, 7.5)),
    "mode_seeking": (divergences.draw_mode_seeking, (9, 4.8)),
}


def is_measured(results: Path, name: str) -> bool:
    """Whether there are rows that this picture is drawn from."""
    if name == "tag_weight":
        rows = [row for row in rows_of(results, "reasoning") if reasoning.TAG in row["arm"]]
        return len({row["arm"] for row in rows if "verified_3" in row}) > 1
    return bool(rows_of(results, name))


def draw_all(results: Path, pictures=PICTURES) -> list[Path]:
    """Draw each picture whose CSV is there; returns the paths."""
    paths = []
    for name, (draw, size) in pictures.items():
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
    paths = draw_all(args.results, PICTURES | methods.PICTURES)
    if not paths:
        raise ValueError(
            f"no results.csv below '{args.results}': make them with: python -m eval.reproduce "
            f"--results {args.results}"
        )
    print(*paths, sep="\n")


if __name__ == "__main__":
    command_line(main, parse_args())
