"""What the experiments share: the jobs they are made of, their rows, and their command line.

Every experiment is a list of arms; an arm is a name and, for a seed, a Job. `run_experiments` runs
what is missing and appends one row per finished run; a row that is there already is left alone.
The seed of an arm is also the seed of its teacher, so the spread over seeds is that of the whole
procedure, not of the student alone.
"""

import argparse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dataset import prepare
from dataset.packing import PackedText
from files import Finished, check_ranges, command_line, new_parser, read_json
from files.atomic import check_path
from model import load_model
from model.device import choose_device, give_back_memory, keep_freed_memory
from run import evaluate

from . import jobs
from .jobs import Job, run_jobs
from .rows import append_rows, check_still_there, read_rows, short_hashes
from .scales import SCALES, Scale

# Jobs.


def text_flags(scale: Scale, seed: int, steps: int, share: float = 1.0) -> dict:
    return {
        "data": scale.data, "steps": steps, "warmup": scale.text_warmup,
        "batch_size": scale.text_batch, "seq_len": scale.seq_len, "data_share": float(share),
        "seed": seed, "eval_every": scale.text_eval_every, "final_eval": scale.text_final_eval,
        **dict(scale.flags),
    }  # fmt: skip


def teacher_of(scale: Scale, seed: int, size: str | None = None, reading: float = 0.0) -> Job:
    """A teacher of one size, trained on text. reading: how much it reads, times what a student
    does; 0 for the usual."""
    size, usual = size or scale.teacher, scale.teacher_steps
    steps = int(reading * scale.text_steps) or usual
    name = f"teacher-{size}" + (f"-{steps}steps" if steps != usual else "") + f"-s{seed}"
    flags = {"model": size, **text_flags(scale, seed, steps)}
    return Job("train_pretrain", f"{scale.root}/runs/{name}", tuple(flags.items()))


def plain(scale: Scale, seed: int, share=1.0, name="plain", needs=(), **more) -> Job:
    """A student trained on text alone, for --steps, or --flops or --seconds where `more` has it."""
    name += f"-{scale.student}-s{seed}" + (f"-share{share:g}" if share != 1 else "")
    flags = {"model": scale.student, **text_flags(scale, seed, scale.text_steps, share), **more}
    if not more.keys().isdisjoint({"flops", "seconds"}):
        del flags["steps"]
    return Job("train_pretrain", f"{scale.root}/runs/{name}", tuple(flags.items()), needs)


def distilled(scale: Scale, seed: int, temperature=1.0, alpha=0.5, share=1.0, teacher=None) -> Job:
    """The student distilled from a teacher, the usual one of the same seed unless another is named,
    which runs beside it."""
    teacher = teacher or teacher_of(scale, seed)
    name = f"distilled-from-{Path(teacher.out).name}-T{temperature:g}-a{alpha:g}"
    name += f"-share{share:g}" if share != 1 else ""
    flags = {"teacher": teacher.out, "student": scale.student}
    flags |= {"temperature": float(temperature), "alpha": float(alpha)}
    flags |= text_flags(scale, seed, scale.text_steps, share)
    out = f"{scale.root}/runs/{name}"
    return Job("train_distillation", out, tuple(flags.items()), (teacher,))


# Rows.


def run_row(job: Job) -> dict:
    """The columns that a finished run has, whatever it learned."""
    record = job.record()
    args, teacher = record["args"], record["args"].get("teacher")
    return {
        "student_params": record["parameters"],
        "teacher_params": job.needs[0].record()["parameters"] if teacher else "",
        "temperature": args["temperature"] if teacher else "",
        "alpha": args["alpha"] if teacher else 1.0,
        **record["metrics"],
        **{name: record.get(name) for name in ("tokens", "seconds", "flops", "peak_memory_mb")},
        **short_hashes(record.get("sources", {})),  # runs of earlier versions have none
        "device": record["device"],
        "command": job.command,
    }


def reference(scale: Scale, job: Job) -> Job:
    """The teacher beside which a run is measured that had none: the one of its seed."""
    return teacher_of(scale, dict(job.flags)["seed"])


def text_row(scale: Scale, job: Job) -> dict:
    """The columns of a finished text run. kl and agreement are those of a student beside its own
    teacher; a student that had none is measured beside the reference."""
    args, metrics = job.record()["args"], {}
    if job.script == "train_pretrain" and args["model"] == scale.student:
        keep_freed_memory()
        device = choose_device("auto")
        text = PackedText(scale.data, "val", scale.seq_len)
        student, teacher = (load_model(j.out, device) for j in (job, reference(scale, job)))
        batches = text.evaluation(scale.text_batch, args["final_eval"])
        metrics = evaluate(student, batches, text.bytes_per_token, teacher)
    more = {"best_val_loss": job.record()["best_val_loss"]}
    return {**more, "data_share": args["data_share"], **run_row(job), **metrics}


@dataclass(frozen=True)
class Experiment:
    """name: of its folder. arms: (name, Job of a seed). row_of: what a finished job's row holds.
    reference: another job that a row is measured beside, and has to wait for."""

    name: str
    arms: list[tuple[str, Callable[[int], Job]]]
    seeds: int
    row_of: Callable[[Job], dict]
    reference: Callable[[Job], Job] = lambda job: job


def run_experiments(experiments: list[Experiment], results: Path) -> None:
    """Run what is missing of all experiments in one pool; add a row as soon as its run is done."""
    check_path(results, is_folder=True)
    todo = []
    for experiment in experiments:
        path = Path(results) / experiment.name / "results.csv"
        rows = read_rows(path)
        check_still_there(path, rows)
        present = {(row["arm"], int(row["seed"])): row.get("command", "") for row in rows}
        for seed in range(experiment.seeds):
            for arm, job_of in experiment.arms:
                job = job_of(seed)
                if (arm, seed) not in present:
                    todo.append((experiment, path, arm, seed, job))
                    continue
                asked = dict(job.flags).get("dtype")
                if asked and f"--dtype {asked}" not in present[arm, seed]:
                    other = f"{path} has {arm}, seed {seed}, made without --dtype {asked}"
                    raise ValueError(f"{other}: leave --dtype out, or pass another --results")

    def write_finished_rows() -> None:
        for entry in list(todo):
            experiment, path, arm, seed, job = entry
            if all(needed.is_done() for needed in (job, experiment.reference(job), *job.needs)):
                row = {"experiment": experiment.name, "arm": arm, "seed": seed}
                append_rows(path, [{**row, **experiment.row_of(job)}])
                todo.remove(entry)
                give_back_memory()  # the workers need it

    write_finished_rows()
    run_jobs([j for e, *_, job in todo for j in (e.reference(job), job)], write_finished_rows)


def text_experiment(scale: Scale, name: str, arms: list, seeds: int | None = None) -> Experiment:
    row_of, teacher_of = partial(text_row, scale), partial(reference, scale)
    return Experiment(name, arms, seeds or scale.seeds, row_of, teacher_of)


def add_sweep_flags(parser) -> None:
    """Add --jobs and --dtype, which are of all runs of a sweep."""
    at_once = "runs at a time; default one on a GPU, else one for every core up to 4"
    parser.add_argument("--jobs", type=int, help=at_once)
    usual = "of all runs; default what suits the machine"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=usual)


def settled(scale: Scale, args) -> Scale:
    """`scale` with the flags of `add_sweep_flags`. Raises ValueError for --jobs 0."""
    check_ranges(args, jobs=(1, 1000))
    jobs.at_once = args.jobs
    more = () if args.dtype is None else (("dtype", args.dtype),)
    return replace(scale, flags=(*scale.flags, *more))


def preset_args(description: str, argv=None, sweeps: bool = True) -> argparse.Namespace:
    """The command line that every experiment has: --preset, as `scale`, --results, and where it
    sweeps over runs --jobs and --dtype."""
    parser = new_parser(description, jobs=(1, 1000))
    parser.add_argument("--preset", choices=tuple(SCALES), default="quick", help="sizes and seeds")
    where = "folder of CSV and PNG; default out/PRESET/results"
    parser.add_argument("--results", type=Path, default=None, help=where)
    if sweeps:
        add_sweep_flags(parser)
    args = parser.parse_args(argv)
    args.scale = SCALES[args.preset]
    args.results = args.results or Path(args.scale.root) / "results"
    return args


def experiment_main(description: str, run: Callable[[Scale, Path], None]) -> None:
    def main(args) -> None:
        scale = settled(args.scale, args)
        prepare_data(scale)
        run(scale, args.results)

    command_line(main, preset_args(description))


def run_alone(description: str, experiment: Callable[[Scale], Experiment]) -> None:
    """The command line of one experiment of arms."""
    experiment_main(
        description, lambda scale, results: run_experiments([experiment(scale)], results)
    )


def prepare_data(scale: Scale) -> None:
    """Run dataset.prepare for this scale, unless it is done. Raises ValueError where it was done
    with other flags."""
    tiers = {"easy": scale.data} | ({"hard": scale.hard_data} if scale.hard_steps else {})
    for tier, folder in tiers.items():
        names = ("vocab_size", "problems", "prompts", "test_problems")
        flags = {"tier": tier, **{name: getattr(scale, name) for name in names}}
        if (Path(folder) / "meta.json").is_file():
            made = read_json(Path(folder) / "meta.json").get("made_from", {})
            for name, value in flags.items():
                if made.get(name, value) != value:
                    other = f"{folder} was prepared with --{name} {made[name]}"
                    raise ValueError(f"{other}, this preset needs {value}: move or delete it")
        else:
            words = ["--out", folder]
            for name, value in flags.items():
                words += [f"--{name}", str(value)]
            print("$ python -m dataset.prepare " + " ".join(words))
            with suppress(Finished):  # by another sweep, while this one waited
                prepare.main(prepare.parse_args(words))
