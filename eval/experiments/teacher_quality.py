"""What makes a good teacher: five of one size, and what one student learns from each.

    python -m eval.experiments.teacher_quality --results results/methods

    plain       1.5 times what a student of preset standard reads
    early       stopped after half of that
    over        as many steps on a quarter of the text: read several times over
    smoothed    taught by `plain`, with labels smoothed to its entropy (methods/controls.py)
    softened    `plain` with its logits divided by 1.75

Rows of teachers add, on held-out text:
    ece         expected calibration error
    separation  tr(between) / tr(within): the scatter of the class means of the last hidden states,
                over that of the states around them. A class is a next token, of the 20 commonest
    off_target  mean entropy, in nats, of the distribution over all tokens but the next one

Popular texts ask for well separated classes and calibration; Mueller et al. 2019 (1906.02629) found
that label smoothing separates better and teaches worse. The last three are within 0.1 nats of one
another on held-out text (the temperature was chosen for that). Students are those of bed few (a
tenth of the text) at alpha = 0. points.csv has two principal components of the hidden states of 4
classes, fitted on one half of the windows and shown on the other.
"""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dataset import PackedText
from dataset.tokenizer import load_tokenizer
from files import atomic_path, command_line, new_parser
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
from .scales import SCALES, Scale

TEACHERS = ("plain", "early", "over", "smoothed", "softened")
SIZE, READS, SHARE, TEMPERATURE = "micro", 1.5, 0.25, 1.75
CLASSES, SHOWN, POINTS, WINDOWS = 20, 4, 60, 200


def teacher_job(scale: Scale, kind: str, seed: int) -> Job:
    plain = teacher_of(scale, seed, SIZE, READS)
    if kind == "plain":
        return plain
    if kind == "early":
        return teacher_of(scale, seed, SIZE, READS / 2)
    out = f"{scale.root}/runs/teacher-{SIZE}-{kind}-s{seed}"
    steps = int(READS * scale.text_steps)
    if kind == "over":
        flags = {"model": SIZE, **text_flags(scale, seed, steps, SHARE)}
        return Job("train_pretrain", out, tuple(flags.items()))
    if kind == "smoothed":
        flags = {"teacher": plain.out, "student": SIZE, "control": "smoothing", "alpha": 0.0}
        flags |= text_flags(scale, seed, steps)
        return Job("methods.controls", out, tuple(flags.items()), (plain,))
    flags = {"teacher": plain.out, "temperature": TEMPERATURE}
    return Job("eval.experiments.softened", out, tuple(flags.items()), (plain,))


def student_job(scale: Scale, kind: str, seed: int) -> Job:
    teacher = teacher_job(scale, kind, seed)
    flags = {"teacher": teacher.out, "student": scale.student, "alpha": 0.0}
    flags |= text_flags(scale, seed, scale.text_steps // 2, 0.1)
    flags["warmup"] = min(flags["warmup"], flags["steps"] // 10)
    out = f"{scale.root}/runs/student-of-{kind}-s{seed}"
    return Job("train_distillation", out, tuple(flags.items()), (teacher,))


@torch.no_grad()
def states_of(model, text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
    """Of some held-out windows: the last hidden states (N, D), the next tokens (N,), and the
    entropy of the distribution over all tokens but that one (N,)."""
    device = model.lm_head.weight.device
    found = []
    for input_ids, labels in text.evaluation(8, WINDOWS):
        hidden = model.model(input_ids.to(device)).flatten(0, 1).float()  # (B * S, D)
        log_p = model.lm_head(hidden).float().log_softmax(-1)
        labels = labels.to(device).flatten()
        others = log_p.scatter(-1, labels[:, None], -torch.inf).log_softmax(-1)
        entropy = -torch.where(others.isinf(), 0.0, others.exp() * others).sum(-1)
        found.append((hidden.cpu(), labels.cpu(), entropy.cpu()))
    hidden, labels, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    return hidden, labels, entropy


def separation(states: Tensor, labels: Tensor) -> float:
    """tr(between) / tr(within) of states (N, D), the classes being labels (N,)."""
    center, between, within = states.mean(0), 0.0, 0.0
    for label in labels.unique():
        own = states[labels == label]
        between += len(own) * float((own.mean(0) - center).square().sum())
        within += float((own - own.mean(0)).square().sum())
    return between / within


def commonest(labels: Tensor, count: int) -> Tensor:
    return torch.bincount(labels).topk(count).indices


def principal_components(fit: Tensor, shown: Tensor) -> Tensor:
    """The first two of `shown` (N, D), fitted on `fit` (M, D), over their deviations: (N, 2)."""
    center = fit.mean(0)
    axes = torch.linalg.svd(fit - center, full_matrices=False).Vh[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # one of two signs
    scale = ((fit - center) @ axes.T).std(0)
    return (shown - center) @ axes.T / scale


def row_of(scale: Scale, kind: str, is_teacher: bool, job: Job) -> dict:
    keep_freed_memory()
    device, record = choose_device("auto"), job.record()
    text = PackedText(scale.data, "val", scale.seq_len)
    model = load_model(job.out, device)
    batches = text.evaluation(scale.text_batch, scale.text_final_eval)
    row = {"separation": "", "off_target": "", "kind": kind, **evaluate(
        model, batches, text.bytes_per_token)}  # fmt: skip
    if is_teacher:
        states, labels, off_target = states_of(model, text)
        among = torch.isin(labels, commonest(labels, CLASSES))
        row["separation"] = separation(states[among], labels[among])
        row["off_target"] = float(off_target.mean())
    names = ("tokens", "seconds", "flops")
    return {**row, **{name: record[name] for name in names}, "student_params": record["parameters"],
            "device": record["device"], "command": job.command}  # fmt: skip


def experiment(scale: Scale) -> list[Experiment]:
    found = []
    for kind in TEACHERS:
        for is_teacher, job_of in ((True, teacher_job), (False, student_job)):
            name = f"teacher {kind}" if is_teacher else f"student of {kind}"
            arms = [(name, partial(job_of, scale, kind))]
            rows = partial(row_of, scale, kind, is_teacher)
            found.append(Experiment("teacher_quality", arms, scale.seeds, rows))
    return found


def write_points(scale: Scale, path: Path) -> None:
    """points.csv: kind, token, x, y of the teachers of seed 0."""
    text, tokenizer = PackedText(scale.data, "val", scale.seq_len), load_tokenizer(scale.data)
    rows = []
    for kind in TEACHERS:
        states, labels, _ = states_of(load_model(teacher_job(scale, kind, 0).out), text)
        among = torch.isin(labels, commonest(labels, SHOWN))
        states, labels = states[among], labels[among]
        half = len(states) // 2
        points = principal_components(states[:half], states[half:])
        for label in commonest(labels, SHOWN).tolist():
            own = points[labels[half:] == label][:POINTS]
            token = tokenizer.decode([label])
            rows += [(kind, token, f"{x:.4g}", f"{y:.4g}") for x, y in own.tolist()]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("kind", "token", "x", "y"), *rows])


def parse_args(argv=None):
    parser = new_parser(__doc__, jobs=(1, 1000))
    parser.add_argument("--preset", choices=tuple(SCALES), default="standard", help="sizes, seeds")
    where = Path("results/methods")
    parser.add_argument("--results", type=Path, default=where, help="folder of CSV and PNG")
    add_sweep_flags(parser)
    return parser.parse_args(argv)


def main(args) -> None:
    scale = settled(replace(SCALES[args.preset], hard_steps=0), args)
    prepare_data(scale)
    run_experiments(experiment(scale), args.results)
    write_points(scale, args.results / "teacher_quality" / "points.csv")


if __name__ == "__main__":
    command_line(main, parse_args())
