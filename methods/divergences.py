"""Divergences: pull the student to its teacher by one of nine distances, not by forward KL alone.

    loss = alpha * CE + (1 - alpha) * D(p, q),    p the teacher's distribution, q the student's

    forward_kl                   KL(p || q)                                   (lesson 2 at T = 1)
    reverse_kl                   KL(q || p)
    jeffreys                     KL(p || q) + KL(q || p)
    jensen_shannon               J = beta KL(p || m) + (1 - beta) KL(q || m)
    jensen_shannon_normalised    J / (beta (1 - beta)),    m = beta p + (1 - beta) q
    skew_kl, skew_reverse_kl     KL(p || skew p + (1 - skew) q), KL(q || skew q + (1 - skew) p)
    total_variation              1/2 sum |p - q|
    adaptive_kl                  (head KL(p || q) + tail KL(q || p)) / (head + tail)

All have one optimum, q = p. A student too small for it must choose: forward KL forbids it to
leave out what the teacher says, reverse KL to say what the teacher does not; its picture is made by
eval.experiments.mode_seeking. GKD (2306.13649), DistiLLM (2402.03898), f-distill (2307.15190), AKL
(2404.02657): head and tail are sum |p - q| over p's likeliest tokens, up to --head_mass, and over
the rest. No gradient reaches those or the teacher; it flows through q in a mixture. Means are over
labels not -100. Traps: beta weighs the student in DistiLLM's code; J vanishes at beta 0 and 1.
Charged: the teacher's forward pass.

    python -m methods.divergences
    python -m methods.divergences --divergence reverse_kl --out out/reverse_kl

Judged on few: success is 0.02 nats below forward KL, over 3 seeds and at alpha 0.
Try: --divergence total_variation (why does it stall?), --beta 0.01 with and without normalisation.
Shapes: B batch, S sequence, N valid tokens, V vocabulary.
"""

import inspect
from functools import partial

import torch

from dataset import add_data_flags, open_data
from distill import cross_entropy
from distill.divergences import DIVERGENCES
from files import check_ranges
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"beta": (0.0, 1.0), "skew": (0.0, 0.99), "head_mass": (0.0, 1.0)}


def compute_loss(student_logits, teacher_logits, labels, divergence, alpha: float):
    """alpha * CE + (1 - alpha) * D, a scalar, and its two parts. Logits (B, S, V), labels (B, S);
    divergence(student_logits, teacher_logits) -> (B, S) is one of distill/divergences.py."""
    valid, loss, parts = labels != -100, 0.0, {}
    N = valid.sum().clamp(min=1)
    if alpha > 0:
        parts["ce"] = cross_entropy(student_logits, labels)[valid].sum() / N
        loss = loss + alpha * parts["ce"]
    if alpha < 1:
        parts["divergence"] = divergence(student_logits, teacher_logits)[valid].sum() / N
        loss = loss + (1 - alpha) * parts["divergence"]
    return loss, parts


def choose(args):
    """The divergence that the flags name, with those of its parameters that are given."""
    divergence = DIVERGENCES[args.divergence]
    given = {name: getattr(args, name) for name in RANGES if getattr(args, name) is not None}
    for name in given.keys() - inspect.signature(divergence).parameters.keys():
        raise ValueError(f"--{name} is no parameter of {args.divergence}: leave it out")
    divergence(torch.zeros(1), torch.zeros(1), **given)  # raises where a value teaches nothing
    return partial(divergence, **given)


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add, names = parser.add_argument, tuple(DIVERGENCES)
    add("--divergence", choices=names, default="jensen_shannon_normalised", help="D")
    add("--beta", type=float, help="of jensen_shannon: the teacher's weight; 0.5 if not given")
    add("--skew", type=float, help="of skew_kl and skew_reverse_kl; 0.1 if not given")
    add("--head_mass", type=float, help="of adaptive_kl; 0.5 if not given")
    add("--alpha", type=float, default=0.0, help="0: the teacher; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/divergences", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    divergence = choose(args)
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher = run.teacher(args.teacher, data) if args.alpha < 1 else None
    student = run.student(args.student, data)
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids) if teacher else None
        loss, parts = compute_loss(student_logits, teacher_logits, labels, divergence, args.alpha)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
