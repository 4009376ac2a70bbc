"""What the experiments share: the jobs they are made of, and their rows in a CSV.

Every experiment is a list of arms; an arm is a name and, for a seed, a Job. `run_experiments` runs
what is missing and appends one row per finished run; a row that is there already is left alone.
The seed of an arm is also the seed of its teacher, so the spread over seeds is that of the whole
procedure, not of the student alone.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from dataset.packing import PackedText
from eval.metrics import evaluate
from model import ModelConfig, Transformer, load_model
from run.files import command_line, hold, read_json, release, write_json
from run.setup import choose_device, give_back_memory, keep_freed_memory
from run.speed import example_ids, faster

from .jobs import Job, run_jobs
from .scales import SCALES, Scale

COLUMNS = (
    "experiment arm seed student_params teacher_params tokens temperature alpha val_loss "
    "perplexity bits_per_byte agreement kl ece seconds peak_memory_mb"
).split()


def root(scale: Scale) -> str:
    return f"out/{scale.name}"


def data_folder(scale: Scale) -> str:
    return f"{root(scale)}/data"


@lru_cache
def precision(scale: Scale) -> str:
    """--dtype of all runs of a preset in this folder, so that their rows compare.

    The first experiment measures which is faster for student and teacher together, on one thread
    as the workers have; out/PRESET/precision.json keeps the answer.
    """
    path = Path(root(scale)) / "precision.json"
    hold(path, wait=True)
    if not path.is_file():
        keep_freed_memory()
        models = [
            Transformer(ModelConfig.preset(size, scale.vocab_size)).to(choose_device("auto"))
            for size in (scale.student, scale.teacher)
        ]
        input_ids = example_ids(models, scale.text_batch, scale.seq_len)
        threads, told = torch.get_num_threads(), []
        torch.set_num_threads(1)
        dtype, _ = faster("student and teacher", models, input_ids, "auto", told)
        torch.set_num_threads(threads)
        write_json(path, {"dtype": dtype, "measured": told[0]})
        print(f"all runs in {root(scale)}: --dtype {dtype} ({told[0]})")
    release(path)
    return read_json(path)["dtype"]


# Jobs.


def speed_flags(scale: Scale) -> tuple:
    """Precision and compilation, the same for all rows, whatever each run would measure."""
    return ("dtype", precision(scale)), *(() if scale.compiles else (("compile", False),))


def text_flags(scale: Scale, seed: int, share: float, steps: int | None = None) -> tuple:
    return (
        ("data", data_folder(scale)),
        ("steps", steps or scale.text_steps),
        ("warmup", scale.text_warmup),
        ("batch_size", scale.text_batch),
        ("seq_len", scale.seq_len),
        ("data_share", float(share * scale.text_share)),
        ("seed", seed),
        ("eval_every", scale.text_eval_every),
        ("final_eval", scale.text_final_eval),
        *speed_flags(scale),
    )


def pretrained(scale: Scale, size: str, seed: int, share: float = 1.0, **more) -> Job:
    """A model trained on text alone: a teacher, or a plain student."""
    name = f"plain-{size}-s{seed}" + (f"-share{share:g}" if share != 1 else "")
    name += "".join(f"-{value}" for value in more.values())
    steps = more.pop("steps", None)
    flags = {"model": size, **dict(text_flags(scale, seed, share, steps)), **more}
    return Job("train_pretrain", f"{root(scale)}/runs/{name}", tuple(flags.items()))


def teacher_cache(scale: Scale, teacher: Job, method: str = "hidden", k: int = 0) -> Job:
    """What the teacher says about all windows, in a file; k numbers a token, or hidden states."""
    flags = (
        ("teacher", teacher.out),
        ("data", data_folder(scale)),
        ("method", method),
        *((("k", k),) if k else ()),
        ("seq_len", scale.seq_len),
        ("data_share", scale.text_share),
        ("dtype", precision(scale)),
    )
    name = method + (str(k) if k else "")
    return Job("dataset.cache_teacher", f"{teacher.out}/{name}.cache", flags, (teacher,))


def distilled(
    scale: Scale,
    seed: int,
    temperature: float = 1.0,
    alpha: float = 0.5,
    share: float = 1.0,
    teacher_size: str | None = None,
    cache: Job | None = None,
    live: bool = False,
) -> Job:
    """The student distilled from a teacher of the same seed.

    The reference teacher has many students: they read its hidden states from a file, or what else
    `cache` has kept. A teacher with a single student is run live: one of another size, or `live`.
    """
    size = teacher_size or scale.teacher
    teacher = pretrained(scale, size, seed)
    name = f"distilled-{size}-to-{scale.student}-T{temperature:g}-a{alpha:g}-s{seed}"
    name += f"-share{share:g}" if share != 1 else ""
    name += f"-{Path(cache.out).stem}" if cache else ""
    flags = (
        ("teacher", teacher.out),
        ("student", scale.student),
        ("temperature", float(temperature)),
        ("alpha", float(alpha)),
        *text_flags(scale, seed, share),
    )
    needs = (teacher,)
    if size == scale.teacher and not live:
        cache = cache or teacher_cache(scale, teacher)
        flags += (("teacher_cache", cache.out),)
        needs += (cache,)
    return Job("train_distillation", f"{root(scale)}/runs/{name}", flags, needs)


# Rows.


@lru_cache(maxsize=4)
def loaded_teacher(folder: str, device: str):
    return load_model(folder, device)


def text_row(scale: Scale, job: Job, teacher: Job) -> dict:
    """The shared columns of a finished text run. kl and agreement are those of a student beside its
    own teacher; a student that had none is measured beside the reference, `teacher`."""
    record = job.record()
    args, metrics = record["args"], dict(record["metrics"])
    plain_student = job.script == "train_pretrain" and args["model"] == scale.student
    if plain_student:
        keep_freed_memory()
        device = choose_device("auto")
        text = PackedText(data_folder(scale), "val", scale.seq_len)
        metrics = evaluate(
            load_model(job.out, device),
            text.evaluation_batches(scale.text_batch, args["final_eval"]),
            text.bytes_per_token,
            loaded_teacher(teacher.out, str(device)),
        )
    is_student = job.script == "train_distillation"
    return {
        "student_params": record["parameters"],
        "teacher_params": job.needs[0].record()["parameters"] if is_student else "",
        "tokens": record["tokens"],
        "temperature": args.get("temperature", "") if is_student else "",
        "alpha": args["alpha"] if is_student else 1.0,
        **metrics,
        "seconds": record["seconds"],
        "peak_memory_mb": record["peak_memory_mb"],
        "best_val_loss": record["best_val_loss"],
        "data_share": args["data_share"] / scale.text_share,
        "device": record["device"],
        "command": job.command,
    }


def read_rows(path: Path) -> list[dict]:
    """All rows of a CSV, as text; none where there is no file yet."""
    if not Path(path).is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, row: dict, key: tuple[str, ...] = ()) -> None:
    """Add one row; the first row settles the columns. A row whose `key` is there already is left
    out: another sweep, sharing the work, has written it."""
    hold(path, wait=True)
    try:
        write_row(path, row, key)
    finally:
        release(path)


def write_row(path: Path, row: dict, key: tuple[str, ...]) -> None:
    known = read_rows(path)
    if key and any(all(other[k] == str(row[k]) for k in key) for other in known):
        return
    columns = list(known[0]) if known else [*COLUMNS, *(k for k in row if k not in COLUMNS)]
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if not known:
            writer.writeheader()
        writer.writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items() if k in columns}
        )


@dataclass(frozen=True)
class Experiment:
    """name: of its folder. arms: (name, Job of a seed). row_of: what a finished job's row holds.
    beside: another job that a row is measured beside, and has to wait for."""

    name: str
    arms: list[tuple[str, Callable[[int], Job]]]
    seeds: int
    row_of: Callable[[Job], dict]
    beside: Callable[[Job], Job] = lambda job: job


def run_experiments(experiments: list[Experiment], results: Path) -> None:
    """Run what is missing of all experiments in one pool; add a row as soon as its run is done."""
    todo = []
    for experiment in experiments:
        path = Path(results) / experiment.name / "results.csv"
        present = {(row["arm"], int(row["seed"])) for row in read_rows(path)}
        for seed in range(experiment.seeds):
            for arm, job_of in experiment.arms:
                if (arm, seed) not in present:
                    todo.append((experiment, path, arm, seed, job_of(seed)))

    def write_finished_rows() -> None:
        for entry in list(todo):
            experiment, path, arm, seed, job = entry
            if all(needed.is_done() for needed in (job, experiment.beside(job), *job.needs)):
                row = {"experiment": experiment.name, "arm": arm, "seed": seed}
                append_row(path, {**row, **experiment.row_of(job)}, key=("arm", "seed"))
                todo.remove(entry)
                give_back_memory()  # the workers need it

    write_finished_rows()
    run_jobs([j for e, *_, job in todo for j in (e.beside(job), job)], write_finished_rows)


def text_experiment(scale: Scale, name: str, arms: list, seeds: int | None = None) -> Experiment:
    """An experiment on text, whose students are all measured beside the reference teacher."""

    def reference(job: Job) -> Job:
        return pretrained(scale, scale.teacher, dict(job.flags)["seed"])

    def row_of(job: Job) -> dict:
        return text_row(scale, job, reference(job))

    return Experiment(name, arms, seeds or scale.seeds, row_of, reference)


def experiment_main(description: str, run: Callable[[Scale, Path], None]) -> None:
    """The command line that every experiment has: --preset and --results."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=tuple(SCALES), default="quick", help="sizes and seeds")
    parser.add_argument("--results", type=Path, default=None, help="[out/PRESET/results]")

    def main(args) -> None:
        scale = SCALES[args.preset]
        prepare_data(scale)
        run(scale, args.results or Path(root(scale)) / "results")

    command_line(main, parser.parse_args())


def run_alone(description: str, experiment: Callable[[Scale], Experiment]) -> None:
    """The command line of one experiment of arms."""
    experiment_main(
        description, lambda scale, results: run_experiments([experiment(scale)], results)
    )


def prepare_data(scale: Scale) -> None:
    """Run dataset.prepare for this scale, unless it is done."""
    from dataset import prepare

    out = data_folder(scale)
    if not (Path(out) / "meta.json").is_file():
        words = ["--out", out]
        for flag in ("vocab_size", "problems", "prompts", "test_problems"):
            words += [f"--{flag}", str(getattr(scale, flag))]
        print("$ python -m dataset.prepare " + " ".join(words))
        prepare.main(prepare.parse_args(words))
