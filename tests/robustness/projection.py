"""A method as a test needs one: a student whose hidden states, through a projection, come near the
teacher's. The projection is a module of the method's own, optimised beside the student."""

import torch
from torch import nn

from dataset import PackedText, add_data_flags
from distill import cross_entropy, weighted_mean
from model import Record
from run import Run, add_common_flags, new_parser, parallel


def parse_args(argv=None):
    parser = new_parser(__doc__)
    add_data_flags(parser)
    add_common_flags(parser, out="out/projected", pair=True)
    return parser.parse_args(argv)


def main(args) -> dict:
    run = Run(args)
    text = PackedText(args.data, "train", args.seq_len)
    teacher = run.teacher(args.teacher, text)
    student = run.student(args.student, text)
    projection = nn.Linear(student.config.hidden_size, teacher.config.hidden_size)
    run.optimize(student, projection)
    for input_ids, labels in run.batches(text):  # (B, S) each
        ours, theirs = Record("hidden"), Record("hidden")
        logits = student(input_ids, record=ours)  # (B, S, V)
        with torch.no_grad():
            teacher(input_ids, record=theirs)
        valid = labels != -100
        distance = (projection(ours.hidden[-1]) - theirs.hidden[-1]).pow(2).mean(-1)  # (B, S)
        parts = {"ce": weighted_mean(cross_entropy(logits, labels), valid)}
        parts["mse"] = weighted_mean(distance, valid)
        run.step(parts["ce"] + parts["mse"], **parts)
    record = run.finish()
    if parallel.is_main():
        torch.save(projection.state_dict(), args.out / "projection.pt")
    return record
