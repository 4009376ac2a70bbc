"""Experts to dense: a student starts from the experts of a sparse teacher, and learns from it.

    start:  W = new, or W_e of the most used expert, or sum_e share_e W_e, its units aligned or not
    loss = alpha * CE + (1 - alpha) * KL(teacher || student)

How much of a dense student can come from a teacher's experts (2201.10890, 2502.12947)? share_e is
expert e's mean weight from the gate, over 8 training batches; "rest" copies all but the experts. No
gradient reaches the teacher; means are over labels that are not -100. The balance loss, one of each
micro-batch, is only of the phase that trains the teacher: in a student's CE alpha would scale it.
Traps: experts have their hidden units in different orders (model/align.py); noise in the gate,
experts that drop tokens (a teacher here has neither). Nano has 229,696 parameters, a teacher of its
shape with 4 experts 451,392, of which a token uses 303,936.
Charged: the teacher's training where none is given, its passes; not the 8 batches.

    python -m methods.experts_to_dense         # trains its teacher first, on all of the text
    python -m methods.experts_to_dense --start random --out out/random --teacher TEACHER
                                               # TEACHER: out/experts_to_dense/phases/teacher

Judged on few: success is 0.02 nats below --start rest, which has nothing of the experts.
Try: --start average (where is it before the first step?), --balance 0 (what does the gate use?).
Shapes: B batch, S sequence, V vocabulary.
"""

from dataclasses import asdict

import torch

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from files import check_ranges
from model.align import measure_shares, start_dense
from model.experts import ExpertsConfig, RouterRecord, add_experts, balance_loss
from run import Run, add_common_flags, command_line, new_parser, run_phase

RANGES = {"experts": (2, 256), "experts_per_token": (1, 256), "balance": (0.0, 100.0)}
RANGES |= {"teacher_steps": (1, 10**9)}


def compute_loss(student_logits, teacher_logits, labels, alpha: float):
    """alpha * CE + (1 - alpha) * KL, a scalar, and its parts. Logits (B, S, V), labels (B, S)."""
    valid = labels != -100
    ce = weighted_mean(cross_entropy(student_logits, labels), valid)
    kl = weighted_mean(kl_divergence(student_logits, teacher_logits, 1.0), valid)
    return alpha * ce + (1 - alpha) * kl, {"ce": ce, "kl": kl}


def train_teacher(args) -> dict:
    """The phase that makes a teacher: the student's shape with experts, by CE and balance."""
    run, data = Run(args), open_data(args, args.student)
    teacher = run.student(args.student, data)
    number = {"num_local_experts": args.experts, "num_experts_per_tok": args.experts_per_token}
    shape = asdict(teacher.config) | number | {"router_aux_loss_coef": args.balance}
    run.optimize(add_experts(teacher, ExpertsConfig(**shape)))
    for input_ids, labels in run.batches(data):
        record, valid = RouterRecord(), labels != -100
        with run.precision():
            ce = weighted_mean(cross_entropy(teacher(input_ids, record=record), labels), valid)
        balance = balance_loss(record.router, args.experts_per_token, valid)
        run.step(ce + args.balance * balance, ce=ce, balance=balance)
    return run.finish()


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add, starts = parser.add_argument, ("random", "rest", "one", "average", "aligned")
    add("--start", choices=starts, default="aligned", help="of the student")
    add("--alpha", type=float, default=0.0, help="0: the teacher; 1: the labels")
    add("--experts", type=int, default=4, help="of a teacher that is trained here, in a layer")
    add("--experts_per_token", type=int, default=2, help="that it uses, at most --experts")
    add("--balance", type=float, default=0.02, help="weight of its balance loss")
    add("--teacher_steps", type=int, default=600, help="optimizer steps of its training")
    add_data_flags(parser)
    add_common_flags(parser, out="out/experts_to_dense", pair=True, fused=False, teacher=None)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    if args.fsdp or args.teacher_dtype != "float32" or args.student.startswith("layers:"):
        raise ValueError("experts become dense whole: leave --fsdp, --teacher_dtype, layers:N out")
    length = {"steps": args.teacher_steps, "flops": None, "seconds": None, "data_share": 1.0}
    folder = args.teacher or run_phase(args, "teacher", train_teacher, **length)
    run, data = Run(args), open_data(args, args.student, folder)
    teacher, student = run.teacher(folder, data), run.student(args.student, data)
    if args.start != "random":
        batches = [data.batch(step, args.batch_size, args.seed) for step in range(8)]
        start_dense(student, teacher, args.start, measure_shares(teacher, batches))
    run.optimize(student)
    for input_ids, labels in run.batches(data):
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids)
        loss, parts = compute_loss(student_logits, teacher_logits, labels, args.alpha)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
