"""All methods beside each other: one student, one teacher, the same tokens, the same seeds.

    python -m eval.experiments.methods --bed few                # results/methods/few: CSV, picture
    python -m eval.experiments.methods --bed few --search       # the methods' own knobs

    few      a tenth of the text: a teacher that has read all of it knows what the student cannot
    text     all of the text
    words    word problems with traces: the score is the exact answers at 3 steps
    oracle   a Markov source whose truth is known: kl_to_truth is exact

Every arm is a command of ARMS, with --steps, --data and the like added to it: equal tokens of the
student in its last phase. Gain at equal cost is read off one curve: the plain student at six
budgets, the best of those that cost no more than the arm did. Knobs were chosen by --search, on one
held-out document; the table is made from the others.
"""

import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from dataset import PackedText, oracle
from eval import plots
from eval.methods_table import write_table
from eval.pictures.methods import PICTURES
from eval.reasoning import evaluate_reasoning
from files import command_line, new_parser
from model import load_model
from model.device import choose_device, keep_freed_memory
from run import evaluate

from .common import (
    Experiment,
    add_sweep_flags,
    prepare_data,
    run_experiments,
    settled,
    teacher_of,
    text_flags,
)
from .jobs import Job
from .reasoning import teacher_job as reason_teacher
from .rows import short_hashes
from .scales import SCALES, Scale

BUDGETS = (1, 1.5, 2, 3, 4, 6)  # of the plain student, times the steps of the others


@dataclass(frozen=True)
class Bed:
    """share: of the text. steps: of a student, times those of the preset."""

    share: float
    steps: float
    only: tuple[str, ...] = ()  # arms; none named: all


# {pair}: teacher and student as most methods have them. {teacher}, {teacher2}, {teacher3}: the
# reference teachers of this seed and of others. {student}: the student's preset.
ARMS: dict[str, str] = {
    "plain": "train_pretrain --model {student}",
    "KL": "train_distillation {pair} --alpha 0.0",
    "KL and labels": "train_distillation {pair} --alpha 0.5",
    "reverse KL": "methods.divergences {pair} --divergence reverse_kl",
    "Jeffreys": "methods.divergences {pair} --divergence jeffreys",
    "JSD 0.5": "methods.divergences {pair} --divergence jensen_shannon_normalised",
    "skew KL": "methods.divergences {pair} --divergence skew_kl",
    "total variation": "methods.divergences {pair} --divergence total_variation",
    "adaptive KL": "methods.divergences {pair} --divergence adaptive_kl",
    "confident tokens": "methods.confidence_filter {pair} --keep confident",
    "uncertain tokens": "methods.confidence_filter {pair} --keep uncertain",
    "random tokens": "methods.confidence_filter {pair} --keep random",
    "10% labels": "methods.hybrid_labels {pair}",
    "10% labels, teacher wrong": "methods.hybrid_labels {pair} --wrong 0.1",
    "no labels, teacher wrong": "methods.hybrid_labels {pair} --wrong 0.1 --label_share 0.0",
    "temperature 4 to 1": "methods.temperature_schedule {pair} --alpha 0.0",
    "temperature 4": "train_distillation {pair} --alpha 0.0 --temperature 4.0",
    "control: smoothing": "methods.controls {pair} --control smoothing --alpha 0.0",
    "control: permuted": "methods.controls {pair} --control permuted --alpha 0.0",
    "control: untrained": "methods.controls {pair} --control untrained --alpha 0.5",
    "hidden states": "methods.hidden_states {pair}",
    "attention: values": "methods.attention {pair}",
    "relations": "methods.relations {pair}",
    "contrastive": "methods.contrastive {pair}",
    "adversarial": "methods.adversarial {pair} --alpha 0.0",
    "from teacher's layers": "methods.init_from_teacher {pair} --alpha 0.0",
    "from teacher's layers, labels": "methods.init_from_teacher {pair} --alpha 1.0",
    "layer by layer": "methods.progressive_layers {pair} --alpha 0.0",
    "hidden states, cosine": "methods.hidden_states {pair} --metric cosine",
    "lagging layers": "methods.dynamic_layers {pair} --alpha 0.0",
    "ensemble": "methods.ensemble --teacher {teacher1},{teacher2},{teacher3} --student {student} "
    "--alpha 0.0",
    "ensemble, product": "methods.ensemble --teacher {teacher1},{teacher2},{teacher3} "
    "--student {student} --alpha 0.0 --combine product",
    "assistant": "methods.teacher_assistant {pair} --alpha 0.0",
    "born again": "methods.born_again --student {student}",
    "own exits": "methods.self_distillation --student {student}",
    "own average": "methods.ema_teacher --student {student}",
    "two students": "methods.mutual --student {student}",
    "merged parts": "methods.merge --student {student}",
    "experts": "methods.experts_to_dense --student {student}",
}
KNOBS: dict[str, tuple[str, tuple]] = {  # arm: (flag, the values that were tried)
    "hidden states": ("weight", (0.3, 3.0, 30.0)),
    "attention: values": ("weight", (0.01, 0.1, 1.0)),
    "contrastive": ("weight", (0.03, 0.3, 3.0)),
    "lagging layers": ("weight", (0.1, 1.0, 10.0)),
    "adversarial": ("weight", (0.01, 0.1, 1.0)),
    "own average": ("rho", (0.9, 0.98, 0.995)),
}
DOZEN = (
    "plain", "KL", "KL and labels", "reverse KL", "JSD 0.5", "random tokens", "hidden states",
    "control: smoothing", "from teacher's layers", "ensemble", "own average", "two students",
)  # fmt: skip
BEDS = {
    "few": Bed(0.1, 0.5),
    "text": Bed(1.0, 1.0, DOZEN),
    "words": Bed(1.0, 1.0, DOZEN),
    "oracle": Bed(1.0, 0.5, DOZEN),
}


def job_of(scale: Scale, bed: str, name: str, command: str, seed: int, steps: float = 1.0) -> Job:
    """The job of one arm: its command, and the flags that all arms of the bed share."""
    teacher = reason_teacher if bed == "words" else teacher_of
    count = max(3, scale.seeds)  # an ensemble has three teachers, also where there is one seed
    teachers = [teacher(scale, (seed + more) % count) for more in range(count)]
    numbered = {f"teacher{number}": t.out for number, t in enumerate(teachers, start=1)}
    names = {"student": scale.student, "teacher": teachers[0].out, **numbered}
    names["pair"] = "--teacher {teacher} --student {student}".format(**names)
    script, *words = shlex.split(command.format(**names))
    flags = text_flags(scale, seed, int(steps * BEDS[bed].steps * scale.text_steps))
    flags["data_share"], flags["final_eval"] = BEDS[bed].share, 50
    if bed == "words":
        flags["data"], flags["tokenizer"] = f"{scale.data}/reason_train.jsonl", scale.data
        flags["batch_size"], flags["seq_len"] = scale.reason_batch, 256
        flags["steps"] = int(steps * scale.reason_steps)
    flags["warmup"] = min(flags["warmup"], flags["steps"] // 10)
    for number, word in enumerate(words):
        if word.startswith("--"):
            value = words[number + 1] if number + 1 < len(words) else "--"
            flags[word[2:]] = None if value.startswith("--") else value
    needs = tuple(t for t in teachers if t.out in command.format(**names)) or (teachers[0],)
    folder = name.translate(str.maketrans(" /", "--", ",:'"))
    return Job(script, f"{scale.root}/runs/{bed}/{folder}-s{seed}", tuple(flags.items()), needs)


def documents(text: PackedText, bed: str, search: bool) -> np.ndarray:
    """Windows of the first held-out document, for the search, or of all others, for the table. The
    oracle's text is one document, of which the first quarter stands for the first."""
    first = text.size // 4
    if bed != "oracle":
        ends = np.flatnonzero(np.asarray(text.stream[:-1]) == 0)  # <|endoftext|>
        first = ends[0] // text.seq_len if len(ends) else first
    return np.arange(first) if search else np.arange(first + 1, text.size)


def row_of(scale: Scale, bed: str, search: bool, job: Job) -> dict:
    """What a finished student does on the table's documents, beside the reference teacher."""
    keep_freed_memory()
    names = ("tokens", "seconds", "flops", "peak_memory_mb")
    device, record = choose_device("auto"), job.record()
    row = {
        "steps": record["steps"], "student_params": record["parameters"], **record["metrics"],
        **{name: record[name] for name in names}, **short_hashes(record["sources"]),
        "device": record["device"], "command": job.command,
    }  # fmt: skip
    if bed == "words":
        answers = Path(job.out) / "answers.jsonl"
        table = evaluate_reasoning(job.out, f"{scale.data}/reason_test.jsonl", answers, device)
        return {f"accuracy_{n}": table[n]["accuracy"] for n in range(1, 6)} | row
    text = PackedText(scale.data, "val", scale.seq_len)
    student, teacher = (
        load_model(job.out, device),
        load_model(reference(scale, bed, job).out, device),
    )
    windows = documents(text, bed, search)
    chosen = windows[np.linspace(0, len(windows) - 1, scale.text_final_eval).astype(int)]
    chosen = np.array_split(np.unique(chosen), -(-len(chosen) // scale.text_batch))
    batches = (text.take(some) for some in chosen)
    metrics = evaluate(student, batches, text.bytes_per_token, teacher)
    if bed == "oracle":
        metrics["kl_to_truth"] = oracle.kl_to_truth(scale.data, student)
    return row | metrics


def reference(scale: Scale, bed: str, job: Job) -> Job:
    """The teacher beside which all students of a seed are measured."""
    of_bed = reason_teacher if bed == "words" else teacher_of
    return of_bed(scale, dict(job.flags)["seed"])


def experiment(scale: Scale, bed: str) -> Experiment:
    """The table: every arm, and the plain student at its other budgets."""
    arms = []
    for name, command in ARMS.items():
        if not BEDS[bed].only or name in BEDS[bed].only:
            arms.append((name, partial(job_of, scale, bed, name, command)))
    for times in BUDGETS[1:]:
        name = f"plain x{times:g}"
        arms.append((name, partial(job_of, scale, bed, name, ARMS["plain"], steps=times)))
    rows, beside = partial(row_of, scale, bed, False), partial(reference, scale, bed)
    return Experiment(bed, arms, scale.seeds, rows, beside)


def search(scale: Scale, bed: str) -> Experiment:
    """Each arm's knob at each of its values, on the document that is not the table's."""
    arms = []
    for name, (flag, values) in KNOBS.items():
        for value in values:
            arm, command = f"{name}, {flag} {value}", f"{ARMS[name]} --{flag} {value}"
            arms.append((arm, partial(job_of, scale, bed, arm, command)))
    rows, beside = partial(row_of, scale, bed, True), partial(reference, scale, bed)
    return Experiment(f"{bed}/search", arms, scale.seeds, rows, beside)


def scale_of(preset: str, bed: str) -> Scale:
    """The oracle's bed has a folder of its own, for data and teachers."""
    scale = replace(SCALES[preset], hard_steps=0)
    return replace(scale, name=f"{scale.name}-oracle") if bed == "oracle" else scale


def parse_args(argv=None):
    parser = new_parser(__doc__, jobs=(1, 1000))
    parser.add_argument("--bed", choices=tuple(BEDS), default="few", help="what is learned from")
    parser.add_argument("--preset", choices=tuple(SCALES), default="standard", help="sizes, seeds")
    parser.add_argument("--search", action="store_true", help="try the knobs, make no table")
    where = Path("results/methods")
    parser.add_argument("--results", type=Path, default=where, help="folder of CSV and PNG")
    add_sweep_flags(parser)
    return parser.parse_args(argv)


def main(args) -> None:
    scale = settled(scale_of(args.preset, args.bed), args)
    if args.bed != "oracle":
        prepare_data(scale)
    elif not (Path(scale.data) / "meta.json").is_file():
        oracle.main(oracle.parse_args(["--out", scale.data]))
    if args.search:
        run_experiments([search(scale, args.bed)], args.results)
        return
    run_experiments([experiment(scale, args.bed)], args.results)
    print(*plots.draw_all(args.results, PICTURES), sep="\n")
    print(write_table(args.results))


if __name__ == "__main__":
    command_line(main, parse_args())
