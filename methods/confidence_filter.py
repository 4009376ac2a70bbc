"""Confidence filter: distil only the tokens that the teacher is sure of, or unsure, or any as many.

    loss = 1/K sum over the K kept tokens of  alpha CE + (1 - alpha) T^2 KL(teacher || student)

    confident   keep a token where  max_v p(v) >= threshold,  p the teacher's softmax at T = 1
    uncertain   as many tokens of the batch, those of the smallest max_v p(v)
    random      as many tokens of the batch, drawn from (seed, step)

Popular texts advise to distil where the teacher is sure. In text those are the easy tokens, such as
ends of words (for reinforcement learning the unsure ones matter most, 2506.01939). A dropped token
teaches nothing, by its label neither. Threshold 0 keeps all: plain distillation.

    KL points from the teacher to the student; no gradient reaches the teacher or the choice.
    The mean is over kept tokens; "as many" holds in every batch, as it is asked before it is cut.
    Trap: dividing by K raises the weight of a kept token by N / K: compare with as many others.
    Charged: the passes of teacher and student over all tokens, kept or not.

    python -m methods.confidence_filter
    python -m methods.confidence_filter --keep random --out out/random

Judged on few: success is confident below random by two standard deviations of 3 seeds. A prototype
says the reverse, and is to be tested: p_max > 0.5 at alpha 0 gave 5.81 nats, all tokens 4.02.
Try: --keep uncertain, --threshold 0.9 --alpha 0.5.
Shapes: B batch, S sequence, N valid tokens, K kept ones, V vocabulary.
"""

import torch
from torch import Tensor

from dataset import add_data_flags, open_data
from distill import at_least_float32, cross_entropy, kl_divergence, weighted_mean
from files import check_ranges
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"threshold": (0.0, 1.0)}


def choose(p_max: Tensor, valid: Tensor, keep: str, threshold: float, generator) -> Tensor:
    """The kept tokens, (B, S) of bool: p_max (B, S), valid (B, S). Ties go to the first."""
    confident = valid & ~(p_max < threshold)  # NaN is kept: the run's guard must see it
    if keep == "confident":
        return confident
    order = p_max.nan_to_num(0.0)
    if keep == "random":
        order = torch.rand(order.shape, generator=generator, device=order.device)
    order = order.masked_fill(~valid, torch.inf).flatten().argsort(stable=True)  # (B * S,)
    kept = torch.zeros_like(valid).flatten()
    kept[order[: confident.sum()]] = True
    return kept.view_as(valid)


def compute_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, kept: Tensor,
    temperature: float, alpha: float,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """A scalar and its parts: student_logits, teacher_logits (B, S, V); labels, kept (B, S)."""
    ce = weighted_mean(cross_entropy(student_logits, labels), kept)
    kl = weighted_mean(kl_divergence(student_logits, teacher_logits, temperature), kept)
    return alpha * ce + (1 - alpha) * temperature**2 * kl, {"ce": ce, "kl": kl}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    kinds = ("confident", "uncertain", "random")
    parser.add_argument("--keep", choices=kinds, default="confident", help="tokens to learn from")
    parser.add_argument("--threshold", type=float, default=0.5, help="p_max of a confident token")
    parser.add_argument("--temperature", type=float, default=1.0, help="T")
    parser.add_argument("--alpha", type=float, default=0.0, help="0: the teacher; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/confidence_filter", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    run.optimize(student)

    def ask(input_ids, labels, generator):
        """What the teacher says of a batch, what is kept of it, and the share of that (B,)."""
        teacher_logits, valid = teacher(input_ids), labels != -100
        p_max = at_least_float32(teacher_logits).softmax(-1).amax(-1)  # (B, S)
        kept = choose(p_max, valid, args.keep, args.threshold, generator)
        share = kept.sum() / valid.sum()
        return input_ids, labels, teacher_logits, kept, share.expand(len(labels))

    for input_ids, labels, teacher_logits, kept, share in run.batches(data, sample=ask):
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
        loss, parts = compute_loss(
            student_logits, teacher_logits, labels, kept, args.temperature, args.alpha
        )
        run.step(loss, weight=kept.sum(), kept=share.mean(), **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
