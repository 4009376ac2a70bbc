"""Hybrid labels: most examples learn from the teacher, a tenth from their labels, as a safeguard.

    loss = 1/N sum over tokens of  w CE + (1 - w) T^2 KL(teacher || student)

    sampling   w is 1 for the examples that are drawn, --label_share of them on average, else 0
    weight     w is --label_share for every token: lesson 2 with that alpha

A student that hears its teacher alone learns the teacher's mistakes; labels can repair them. On
average over draws both ways have one gradient, long examples or short, as N counts all tokens (GKD
mixes its data so, 2306.13649). To see a mistake repaired, make one: --wrong 0.1 takes a tenth of
the vocabulary, always the same, and gives each of these tokens the probability that the teacher has
for another one of them. It is a control, not part of the method.

    KL points from the teacher to the student; no gradient reaches the teacher.
    The mean is over all N tokens of both kinds. Trap: a mean over the labelled plus a mean over the
    others makes a tenth of the examples half of the gradient.
    Examples are drawn from (seed, step); metrics are beside the teacher without its mistakes.
    Charged: the teacher's pass over all examples, the labelled too.

    python -m methods.hybrid_labels
    python -m methods.hybrid_labels --by weight --out out/by_weight
    python -m methods.hybrid_labels --wrong 0.1 --label_share 0 --out out/misled

Judged on few: success is that under --wrong 0.1 a label_share of 0.1 undoes half of what the
mistakes cost a student at label_share 0, and that without mistakes it costs less than 0.02 nats.
Try: --wrong 0.1 --label_share 0.5; by sampling and by weight at 0.01.
Shapes: B batch, S sequence, N valid tokens, V vocabulary.
"""

import torch
from torch import Tensor

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from files import check_ranges
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"label_share": (0.0, 1.0), "wrong": (0.0, 1.0)}


def mistakes(vocab_size: int, wrong: float) -> Tensor:
    """Of which token each one has the teacher's logit, (V,): its own, but for a share `wrong` of
    them, which are drawn once for all seeds and passed round."""
    order = torch.arange(vocab_size)
    chosen = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
    chosen = chosen[: int(wrong * vocab_size)]
    order[chosen] = chosen.roll(1)
    return order


def compute_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, w: Tensor, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """A scalar and, of all tokens, mean ce and kl: logits (B, S, V), labels (B, S), w (B,)."""
    valid, w = labels != -100, w[:, None]
    ce = cross_entropy(student_logits, labels)  # (B, S)
    kl = kl_divergence(student_logits, teacher_logits, temperature)  # (B, S)
    loss = weighted_mean(w * ce + (1 - w) * temperature**2 * kl, valid)
    return loss, {"ce": weighted_mean(ce, valid), "kl": weighted_mean(kl, valid)}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--by", choices=("sampling", "weight"), default="sampling", help="how the two are mixed")
    add("--label_share", type=float, default=0.1, help="0: the teacher alone; 1: the labels")
    add("--temperature", type=float, default=1.0, help="T")
    add("--wrong", type=float, default=0.0, help="share of the vocabulary that is mistaken")
    add_data_flags(parser)
    add_common_flags(parser, out="out/hybrid_labels", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    order = mistakes(teacher.config.vocab_size, args.wrong).to(run.device)
    run.optimize(student)

    def draw(input_ids, labels, generator):
        """w of every example, drawn for the whole batch before it is cut."""
        w = torch.full((len(labels),), args.label_share, device=labels.device)
        if args.by == "sampling":
            w = w.bernoulli(generator=generator)
        return input_ids, labels, w

    for input_ids, labels, w in run.batches(data, sample=draw):
        with run.precision():
            student_logits = student(input_ids)  # (B, S, V)
            with torch.no_grad():
                teacher_logits = teacher(input_ids)[..., order]
        loss, parts = compute_loss(student_logits, teacher_logits, labels, w, args.temperature)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
