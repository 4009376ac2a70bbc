"""What a run shows while it goes on: its progress, and log.csv."""

import csv
from pathlib import Path

from files import atomic_path
from files.progress import progress_bar

from . import parallel


class Log:
    """Rows of log.csv, one for each logged step, with the loss's named parts."""

    def __init__(self, folder: Path):
        self.folder, self.rows = folder, []

    def bar(self, steps: float, step: int):
        total = steps if steps < float("inf") else None
        return progress_bar(total, self.folder.name, step, silent=not parallel.is_main())

    def add(self, bar, row: dict, parts: dict[str, float]) -> None:
        self.rows.append({**row, **parts, "val_loss": None})
        shown = " ".join(f"{k} {v:.3f}" for k, v in {"loss": row["train_loss"], **parts}.items())
        speed = row["tokens"] / max(row["seconds"], 1e-9)
        bar.set_postfix_str(f"{shown}, {speed:,.0f} tokens/s", refresh=False)

    def write(self) -> None:
        names = dict.fromkeys(name for row in self.rows for name in row if name != "val_loss")
        with atomic_path(self.folder / "log.csv") as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, [*names, "val_loss"])
                writer.writeheader()
                writer.writerows(self.rows)
