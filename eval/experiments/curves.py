"""How fast each learns: held-out loss by tokens read, of the plain and the distilled student.

    python -m eval.experiments.curves --preset quick

Copies the evaluations of three headline runs' log.csv into one CSV, and the final one of run.json,
which is the number of every table. It is made on more held-out windows than those before it, so
column `windows` has how many; losses are comparable where it is the same.
"""

from pathlib import Path

from dataset.packing import PackedText
from run.training import EVALUATED

from . import headline
from .common import experiment_main
from .jobs import run_jobs
from .rows import append_rows, read_rows

ARMS = ("teacher", "plain", "distilled")


def run(scale, results) -> None:
    path = results / "curves" / "results.csv"
    present = {(row["arm"], int(row["seed"])) for row in read_rows(path)}
    size = PackedText(scale.data, "val", scale.seq_len).size
    missing = {
        (arm, seed): job_of(seed)
        for arm, job_of in headline.experiment(scale).arms if arm in ARMS
        for seed in range(scale.seeds) if (arm, seed) not in present
    }  # fmt: skip
    run_jobs(list(missing.values()))
    for (arm, seed), job in missing.items():
        record, lines = job.record(), read_rows(Path(job.out) / "log.csv")
        most = record["args"]["final_eval"]
        few = {"windows": min(EVALUATED, most, size)}
        lines = [line | few for line in lines if line["val_loss"]]
        final = {"step": record["steps"], "windows": min(most, size)}
        lines.append({**record, **record["metrics"], **final})
        row = {"experiment": "curves", "arm": arm, "seed": seed, "command": job.command}
        names = ("step", "tokens", "val_loss", "windows", "seconds", "flops")
        append_rows(path, [{**row, **{name: line[name] for name in names}} for line in lines])


if __name__ == "__main__":
    experiment_main(__doc__, run)
