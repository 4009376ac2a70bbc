"""How fast each learns: held-out loss by tokens read, of the plain and the distilled student.

    python -m eval.experiments.curves --preset quick

Copies the evaluations of the headline runs' log.csv into one CSV.
"""

from pathlib import Path

from . import headline
from .common import append_rows, experiment_main, read_rows
from .jobs import run_jobs


def run(scale, results) -> None:
    path = results / "curves" / "results.csv"
    present = {(row["arm"], int(row["seed"])) for row in read_rows(path)}
    for arm, job_of in headline.experiment(scale).arms:
        for seed in range(scale.seeds):
            if (arm, seed) in present:
                continue
            job = job_of(seed)
            run_jobs([job])
            row = {"experiment": "curves", "arm": arm, "seed": seed, "command": job.command}
            lines = [line for line in read_rows(Path(job.out) / "log.csv") if line["val_loss"]]
            names = ("step", "tokens", "val_loss", "seconds", "flops")
            append_rows(path, [{**row, **{name: line[name] for name in names}} for line in lines])


if __name__ == "__main__":
    experiment_main(__doc__, run)
