"""What a run shows while it goes on: a progress bar, and log.csv."""

import csv
from pathlib import Path

from tqdm import tqdm

from files import atomic_path

from . import parallel

bar_position = None  # the line of this process's progress bar, where several run at once
FIRST_COLUMNS = ("step", "tokens", "flops", "seconds", "train_loss")


class Log:
    """Rows of log.csv, one for each logged step, with the loss's named parts."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, []

    def bar(self, steps: float, step: int) -> tqdm:
        return tqdm(
            total=steps if steps < float("inf") else None, initial=step, desc=self.folder.name,
            mininterval=0.5, position=bar_position, leave=bar_position is None,
            disable=not parallel.is_main(),
        )  # fmt: skip

    def add(self, bar: tqdm, row: dict, parts: dict[str, float]) -> None:
        self.rows.append({**row, **parts, "val_loss": None})
        shown = " ".join(f"{k} {v:.3f}" for k, v in {"loss": row["train_loss"], **parts}.items())
        speed = row["tokens"] / max(row["seconds"], 1e-9)
        bar.set_postfix_str(f"{shown}, {speed:,.0f} tokens/s", refresh=False)

    def write(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name in row if name != "val_loss")
        columns = [*FIRST_COLUMNS, *(n for n in names if n not in FIRST_COLUMNS), "val_loss"]
        with atomic_path(self.folder / "log.csv") as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)
