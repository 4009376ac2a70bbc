"""How fast each learns: held-out loss by tokens read, of the plain and the distilled student.

    python -m eval.experiments.curves --preset quick

Copies the evaluations of the headline runs' log.csv into one CSV.
"""

from pathlib import Path

from . import headline
from .common import append_row, experiment_main, read_rows
from .jobs import run_jobs


def run(scale, results) -> None:
    path = results / "curves" / "results.csv"
    present = {(row["arm"], int(row["seed"])) for row in read_rows(path)}
    for arm, job_of in headline.experiment(scale).arms:
        for seed in range(scale.headline_seeds):
            if (arm, seed) in present:
                continue
            job = job_of(seed)
            run_jobs([job])
            for line in read_rows(Path(job.out) / "log.csv"):
                if line["val_loss"]:
                    row = {"experiment": "curves", "arm": arm, "seed": seed}
                    row |= {k: line[k] for k in ("tokens", "val_loss", "seconds")}
                    append_row(path, {**row, "step": line["step"], "command": job.command})


if __name__ == "__main__":
    experiment_main(__doc__, run)
