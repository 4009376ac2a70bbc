"""Lesson 2: distill by logits. The student learns from the text and from the teacher's whole guess.

    loss = alpha * CE + (1 - alpha) * T^2 * KL( softmax(teacher / T) || softmax(student / T) )

A label names one next token. The teacher's distribution says how likely every token was, the nearly
right ones included: V numbers per position instead of one, so the student learns more from the same
text. T > 1 flattens both distributions, so that the small probabilities count; T^2 gives the
gradient its size back, so that alpha means the same at every T (Hinton, Vinyals & Dean 2015,
1503.02531).

    KL points from the teacher to the student; no gradient reaches the teacher.
    Both means are over the tokens whose label is not -100.
    Costs one forward pass of the teacher per batch, which the meter counts.
    alpha = 1 is plain training and makes no teacher; alpha = 0 learns from the teacher alone.

    python train_pretrain.py                           # once: the teacher, out/teacher
    python train_distillation.py                       # the student, out/student
    python train_distillation.py --temperature 4 --alpha 0 --out out/soft

Try: --alpha 1 (the teacher is silent), --temperature 8 --alpha 0 (why is it worse?), --student
layers:2 (two of the teacher's own layers, and its embedding).
Next: train_distill_reason.py. Shapes: B batch, S sequence, N valid tokens, V vocabulary, D width.
"""

import torch
from torch import Tensor

from dataset import add_data_flags, open_data
from distill import at_least_float32, fused_loss, use_fused
from run import Run, add_common_flags, command_line, new_parser


def compute_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor,
    temperature: float, alpha: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """alpha * CE + (1 - alpha) * T^2 * KL, a scalar, and its two parts.

    student_logits, teacher_logits (B, S, V); labels (B, S), -100 is ignored. The half that alpha
    leaves out is not computed.
    """
    student_logits = at_least_float32(student_logits)  # bfloat16 is too coarse for a softmax
    valid = labels != -100
    N = valid.sum().clamp(min=1)
    loss, parts = 0.0, {}
    if alpha > 0:  # the text
        log_probs = student_logits.log_softmax(-1)
        index = labels.masked_fill(~valid, 0)[..., None]  # (B, S, 1)
        chosen = log_probs.gather(-1, index).squeeze(-1)  # (B, S)
        parts["ce"] = -torch.where(valid, chosen, 0.0).sum() / N
        loss = loss + alpha * parts["ce"]
    if alpha < 1:  # the teacher
        student_log_probs = (student_logits / temperature).log_softmax(-1)
        teacher_logits = at_least_float32(teacher_logits.detach())
        teacher_log_probs = (teacher_logits / temperature).log_softmax(-1)
        teacher_probs = teacher_log_probs.exp()
        terms = teacher_probs * (teacher_log_probs - student_log_probs)
        terms = torch.where(teacher_probs == 0, 0.0, terms)  # 0 log 0 = 0
        kl = terms.sum(-1)  # (B, S)
        parts["kl"] = torch.where(valid, kl, 0.0).sum() / N  # mean over tokens
        loss = loss + (1 - alpha) * temperature**2 * parts["kl"]
    return loss, parts


def parse_args(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("--temperature", type=float, default=1.0, help="T")
    parser.add_argument("--alpha", type=float, default=0.5, help="0: the teacher; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/student", pair=True)  # --teacher, --student, ...
    return parser.parse_args(argv)


def main(args) -> dict:
    run = Run(args)  # device, precision, seed
    data = open_data(args, args.student, args.teacher)
    teacher = run.teacher(args.teacher, data) if args.alpha < 1 else None  # frozen
    student = run.student(args.student, data)
    fused = use_fused(args.fused, args.batch_size * args.seq_len, data.vocab_size)
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        with run.precision():
            if fused:  # the same value, without the (B, S, V) logits
                student_logits = (student.model(input_ids), student.lm_head.weight)  # unmultiplied
                guess = (teacher.model(input_ids), teacher.lm_head.weight) if teacher else None
                loss, parts = fused_loss(
                    compute_loss, student_logits, guess, labels, args.temperature, args.alpha,
                    weight=labels != -100, compiled=args.compile,
                )  # fmt: skip
            else:
                student_logits = student(input_ids)  # (B, S, V)
                with torch.no_grad():
                    teacher_logits = teacher(input_ids) if teacher else None
                loss, parts = compute_loss(
                    student_logits, teacher_logits, labels, args.temperature, args.alpha
                )
        run.step(loss, **parts)  # backward, clip, update, log
    return run.finish()  # evaluate beside the teacher, save


if __name__ == "__main__":
    command_line(main, parse_args())
