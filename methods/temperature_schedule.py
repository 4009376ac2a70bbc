"""Temperature schedule: the softness of the targets changes over the run, from high to low or back.

    loss = alpha * CE + (1 - alpha) * T^2 * KL( softmax(teacher / T) || softmax(student / T) )
    T = first * (last / first)^u,   u the share of the run that is spent, from 0 to 1

At high T a student matches all logits alike, at T = 1 the probabilities that it is judged by. To go
from the one to the other is an old idea (annealing distillation, 2104.07163, which softens the
teacher alone and uses squared errors; 2211.16231 learns T, and lets it get harder). Here T falls by
equal ratios in equal times. first = last is a constant T: plain distillation.

    KL points from the teacher to the student; no gradient reaches the teacher.
    Both means are over the tokens whose label is not -100. The log has T as "temperature".
    u is that of the learning rate: steps, or --flops or --seconds that are spent, so a resumed run
    has the T that it would have had. With --seconds, T is first until the steps are planned.
    Traps: without T^2 the KL's gradient shrinks as 1 / T^2, and the schedule is one of learning
    rates in disguise; T counted from where a process starts begins anew at each resume.
    Charged: the teacher's pass.

    python -m methods.temperature_schedule
    python -m methods.temperature_schedule --first_temperature 1 --last_temperature 4 --out out/up

Judged on few: success is two standard deviations of 3 seeds below the better one of the constant
temperatures 1 and 4. We expect none.
Try: T from 8 to 1, and from 2 to 0.5.
Shapes: B batch, S sequence, N valid tokens, V vocabulary.
"""

import torch
from torch import Tensor

from dataset import add_data_flags, open_data
from distill import at_least_float32, cross_entropy, weighted_mean
from files import check_ranges
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"first_temperature": (1e-3, 1e3), "last_temperature": (1e-3, 1e3)}


def temperature_at(spent: float, first: float, last: float) -> float:
    """T after a share of the run, 0 to 1; no share yet known to be spent is 0."""
    return first * (last / first) ** min(1.0, spent)


def compute_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """A scalar and its parts: student_logits, teacher_logits (B, S, V), labels (B, S)."""
    valid = labels != -100
    log_q = (at_least_float32(student_logits) / temperature).log_softmax(-1)
    log_p = (at_least_float32(teacher_logits.detach()) / temperature).log_softmax(-1)
    terms = torch.where(log_p == -torch.inf, 0.0, log_p.exp() * (log_p - log_q))  # 0 log 0 = 0
    kl = weighted_mean(terms.sum(-1), valid)  # sum over the vocabulary, mean over tokens
    ce = weighted_mean(cross_entropy(student_logits, labels), valid)
    return alpha * ce + (1 - alpha) * temperature**2 * kl, {"ce": ce, "kl": kl}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    parser.add_argument("--first_temperature", type=float, default=4.0, help="T of the first step")
    parser.add_argument("--last_temperature", type=float, default=1.0, help="T at the end")
    parser.add_argument("--alpha", type=float, default=0.5, help="0: the teacher; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/temperature_schedule", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        step = run.training.step
        spent = step / run.training.meter.total_steps(step)  # the total may still be infinite
        T = temperature_at(spent, args.first_temperature, args.last_temperature)
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids)
        loss, parts = compute_loss(student_logits, teacher_logits, labels, T, args.alpha)
        run.step(loss, temperature=T, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
