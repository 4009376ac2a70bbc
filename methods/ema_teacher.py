"""EMA teacher: the student learns from a slow average of its own weights, and from no one else.

    after update n:  w_teacher <- r w_teacher + (1 - r) w_student,     r = min(rho, n / (n + 10))
    loss = alpha * CE + (1 - alpha) * T^2 * KL(teacher || student)

The average of many steps is steadier than any of them, and often better (Mean Teacher, Tarvainen &
Valpola 2017, 1703.01780). There the two also see different noise; here all that they differ by is
time, so do not expect much while the student changes little.

    KL points from the average; no gradient reaches it. Means are over labels that are not -100.
    It follows once per update, not per micro-batch. r grows from 0 so that the random weights of
    the start are forgotten: with r = 0.99 from the start they are a third of it at step 100.
    Traps: rho = 0 teaches what the student says already, a KL whose value and gradient are 0; an
    average must also copy what is no parameter (batch statistics: there are none here); weights of
    a model are averaged, and not those of two that were trained apart.
    Charged: a forward pass of the average per batch. It is saved, too, in student2/: "val_loss_2".

    python -m methods.ema_teacher
    python -m methods.ema_teacher --rho 0.95 --alpha 0.2

Judged on few: success is 0.02 nats below a plain student of equal steps, over 3 seeds.
Try: --alpha 1 (only the average is new: is val_loss_2 the better one?); --rho 0.999.
Shapes: B batch, S sequence, V vocabulary.
"""

import torch
from torch import nn

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from files import check_ranges
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"rho": (0.0, 1.0)}


def compute_loss(student_logits, teacher_logits, labels, T: float, alpha: float):
    """alpha * CE + (1 - alpha) * T^2 * KL, a scalar, and its two parts: logits (B, S, V), labels
    (B, S), -100 is ignored."""
    valid = labels != -100
    ce = weighted_mean(cross_entropy(student_logits, labels), valid)
    kl = weighted_mean(kl_divergence(student_logits, teacher_logits.detach(), T), valid)
    return alpha * ce + (1 - alpha) * T**2 * kl, {"ce": ce, "kl": kl}


@torch.no_grad()
def follow(average: nn.Module, student: nn.Module, rho: float, updates: int) -> None:
    """The average after the update that `updates` others came before; the first is a copy."""
    r = min(rho, updates / (updates + 10))
    for mean, now in zip(average.parameters(), student.parameters(), strict=True):
        mean.lerp_(now, 1 - r)  # mean + (1 - r) (now - mean)


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--student", default="nano", help="preset (nano, micro, ...) or checkpoint folder")
    add("--rho", type=float, default=0.98, help="of the average, once 10 updates are little")
    add("--temperature", type=float, default=1.0, help="T")
    add("--alpha", type=float, default=0.5, help="0: the average; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/ema_teacher", fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run, data = Run(args), open_data(args, args.student)
    student = run.student(args.student, data)
    average = run.student(args.student, data)  # a second student: evaluated and saved as well
    average.requires_grad_(False).load_state_dict(student.state_dict())
    run.optimize(student, average)  # what is frozen is only kept
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = average(input_ids)
        knobs = (args.temperature, args.alpha)
        loss, parts = compute_loss(student_logits, teacher_logits, labels, *knobs)
        if run.step(loss, **parts):
            follow(average, student, args.rho, run.training.step)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
