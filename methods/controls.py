"""Controls: teachers that know nothing more, to see how much of a gain is the teacher's knowledge.

    loss = alpha * CE + (1 - alpha) * KL(target || student),  p = softmax(teacher):

    smoothing   target = 1 - e on the label, e / (V - 1) elsewhere; e such that H(target) = H(p)
    permuted    target = p with all entries but the label's in a random order, new for every token
    untrained   target = p of a teacher of the same shape with random weights
    plain       alpha = 1: the teacher is asked, and its answer thrown away

Smoothing (1512.00567) keeps how soft each target is; permuted also how likely the label is and how
large the others are, not which they are (DKPP of 1805.04770 spares the largest entry instead);
plain the cost. What lesson 2 gains over them with the same flags is what its teacher knows.

    KL points from the target to the student; no gradient reaches it. Means are over valid tokens.
    Trap: one e for all tokens, which differ in softness. Draws are from (seed, step).
    Charged: a teacher's pass, by all four (permuted also sorts V numbers per token).

    python -m methods.controls && python -m methods.controls --control permuted --out out/permuted

Judged on few: success is lesson 2 below all four by two standard deviations of 3 seeds.
Try: --control untrained, --control plain (metrics are beside the trained teacher), --alpha 0.
Shapes: B batch, S sequence, N valid tokens, V vocabulary.
"""

import torch
from torch import Tensor

from dataset import add_data_flags, open_data
from distill import at_least_float32, cross_entropy, weighted_mean
from model import Transformer
from run import Run, add_common_flags, command_line, new_parser


def smoothing_of(entropy: Tensor, V: int) -> Tensor:
    """The e (...) at which a smoothed label has that entropy (...) in nats, found by bisection."""
    low, high = torch.zeros_like(entropy), torch.full_like(entropy, 1 - 1 / V)
    for _ in range(50):
        e = (low + high) / 2
        less = -torch.xlogy(1 - e, 1 - e) - torch.xlogy(e, e / (V - 1)) < entropy
        low, high = torch.where(less, e, low), torch.where(less, high, e)
    return e + 0 * entropy  # NaN stays NaN, for the run's guard to see


def target_of(control: str, probs: Tensor, labels: Tensor, generator=None) -> Tensor:
    """What is taught instead of the teacher's probs (B, S, V): of that shape; labels (B, S)."""
    V, index = probs.shape[-1], labels.clamp(min=0)[..., None]  # (B, S, 1)
    if control == "smoothing":
        e = smoothing_of(-torch.xlogy(probs, probs).sum(-1, keepdim=True), V)  # (B, S, 1)
        return (e / (V - 1)).repeat(1, 1, V).scatter(-1, index, 1 - e)
    if control == "permuted":
        order = torch.rand(probs.shape, generator=generator, device=probs.device).argsort(-1)
        order = torch.where(order == index, order.gather(-1, index), order)
        return probs.gather(-1, order.scatter(-1, index, index))  # the label has its own again
    return probs


def compute_loss(student_logits: Tensor, target: Tensor, labels: Tensor, alpha: float):
    """A scalar and its parts: student_logits, target (B, S, V), labels (B, S)."""
    valid = labels != -100
    ce = weighted_mean(cross_entropy(student_logits, labels), valid)
    log_q = at_least_float32(student_logits).log_softmax(-1)
    terms = torch.where(target == 0, 0.0, target * (target.log() - log_q))  # 0 log 0 = 0
    kl = weighted_mean(terms.sum(-1), valid)
    return alpha * ce + (1 - alpha) * kl, {"ce": ce, "kl": kl}


def parse_args(argv=None):
    parser = new_parser(__doc__)
    kinds = ("smoothing", "permuted", "untrained", "plain")
    parser.add_argument("--control", choices=kinds, default="smoothing", help="what is taught")
    parser.add_argument("--alpha", type=float, default=0.5, help="0: the target; 1: the labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/controls", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    args.alpha = 1.0 if args.control == "plain" else args.alpha
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    if args.control == "untrained":  # made after the student, whose first weights stay the same
        teacher = run.to_device(Transformer(teacher.config).requires_grad_(False))
    run.optimize(student)

    def ask(input_ids, labels, generator):
        """A target for every token of a batch, before it is cut."""
        probs = at_least_float32(teacher(input_ids)).softmax(-1)
        return input_ids, labels, target_of(args.control, probs, labels, generator)

    for input_ids, labels, target in run.batches(data, sample=ask):
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
        loss, parts = compute_loss(student_logits, target, labels, args.alpha)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
