"""Teacher assistant: a model of a size in between learns from the teacher and teaches the student.

    loss = alpha * CE + (1 - alpha) * T^2 * KL(assistant || student)
    and for the assistant, before:  the same with KL(teacher || assistant)

A student far smaller than its teacher cannot follow all that it says; an assistant says it more
simply (TAKD, Mirzadeh et al. 2019, 1902.03393). The price is a second training, and the assistant's
own mistakes: what the student loses of the first teacher is the KL and agreement in run.json.

    KL points from whoever teaches to whoever learns; no gradient reaches the former.
    Means are over the labels that are not -100.
    Charged: both trainings, with the passes of their teachers (run.json: "phases").
    Traps: an assistant is extra training, so compare with lesson 2 at the cost of both; a gap
    between teacher and student may only be a temperature that was not chosen for it.

    python -m methods.teacher_assistant                      # two trainings: two minutes
    python -m methods.teacher_assistant --assistant mini --temperature 2

Judged on few: success is 0.02 nats below lesson 2 with the same teacher and steps, over 3 seeds.
Try: --assistant nano (is a step down in size needed at all?); --alpha 0 (mistakes compound).
Shapes: B batch, S sequence, V vocabulary.
"""

from functools import partial

import torch

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from run import Run, add_common_flags, command_line, new_parser, run_phase


def compute_loss(student_logits, teacher_logits, labels, T: float, alpha: float):
    """alpha * CE + (1 - alpha) * T^2 * KL, a scalar, and its two parts: logits (B, S, V), labels
    (B, S), -100 is ignored."""
    valid = labels != -100
    ce = weighted_mean(cross_entropy(student_logits, labels), valid)
    kl = weighted_mean(kl_divergence(student_logits, teacher_logits, T), valid)
    return alpha * ce + (1 - alpha) * T**2 * kl, {"ce": ce, "kl": kl}


def parse_args(argv=None):
    parser = new_parser(__doc__)
    middle = "preset between teacher and student, or checkpoint folder to go on from"
    parser.add_argument("--assistant", default="micro", help=middle)
    parser.add_argument("--temperature", type=float, default=1.0, help="T")
    parser.add_argument("--alpha", type=float, default=0.5, help="0: the teacher; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/teacher_assistant", pair=True, fused=False)
    return parser.parse_args(argv)


def train(args, chain: list) -> dict:
    """Let the last of `chain`, checkpoint folders, teach; the first is what a student is compared
    with in run.json."""
    run, data = Run(args), open_data(args, args.student, args.teacher)
    *_, teacher = [run.teacher(folder, data) for folder in chain]
    student = run.student(args.student, data)
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids)
        knobs = (args.temperature, args.alpha)
        loss, parts = compute_loss(student_logits, teacher_logits, labels, *knobs)
        run.step(loss, **parts)
    return run.finish()


def main(args) -> dict:
    by_teacher = partial(train, chain=[args.teacher])
    assistant = run_phase(args, "assistant", by_teacher, student=args.assistant)
    return train(args, chain=[args.teacher, assistant])


if __name__ == "__main__":
    command_line(main, parse_args())
