"""Adversarial: a discriminator tells the student's states from the teacher's, the student fools it.

    judged = softplus(-C(n(t))) + softplus( C(stop( n(W h) )) )     what the discriminator C lowers
    fooled = softplus(-C(n(W h)))                                   what student and W lower
    loss   = alpha * CE + (1 - alpha) * KL(teacher || student) + weight * fooled  (+ judged, for C)

h (B, S, D) is the student's state after its last layer, t (B, S, E) the teacher's, n divides by the
root mean square, W (D -> E) is learned with the student and thrown away. Nothing says which state
belongs to which token, only how the teacher's states are spread: a weaker demand than |W h - t|^2,
for a student that cannot meet that (GAN, 1406.2661, in its non-saturating form). Samples instead of
states need rewards: no gradient passes a drawn token (GAD, 2511.10643). KL points to the student;
the teacher gets no gradient, C none from `fooled`, the student none from `judged`; C has its own
optimizer. Means are over labels that are not -100. Traps: without stop() the student helps to be
told apart; a C that learns from `fooled` goes blind; size alone gives a state away, hence n.
Charged: the teacher's forward pass, C and W.

    python -m methods.adversarial
    python -m methods.adversarial --weight 0             # C only watches: plain distillation

Judged on few: success is 0.02 nats below --weight 0 over 3 seeds.
Try: --weight 1; --discriminator_rate 0.0003 (C's `accuracy`: 0.5 is fooled, at 1 it gives noise).
Shapes: B batch, S sequence, V vocabulary, D and E widths of student and teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import add_data_flags, open_data
from distill import at_least_float32, cross_entropy, kl_divergence, weighted_mean
from distill.hidden import normalise
from files import check_ranges
from model import Record
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"weight": (0.0, 1e3), "discriminator_rate": (1e-12, 1.0), "units": (1, 2**16)}


def play(seen: Tensor, target: Tensor, discriminator: nn.Module, valid: Tensor) -> dict:
    """fooled, judged, and the discriminator's accuracy, scalars: states of the student (projected)
    and of the teacher, both (B, S, E), valid (B, S)."""
    seen, target = normalise(seen), normalise(target.detach())
    true, false = (at_least_float32(discriminator(x)) for x in (target, seen.detach()))  # (B, S, 1)
    judged = F.softplus(-true) + F.softplus(false)
    discriminator.requires_grad_(False)  # what the student wants does not teach the judge
    fooled = F.softplus(-at_least_float32(discriminator(seen)))
    discriminator.requires_grad_(True)
    right = ((true > 0).float() + (false <= 0).float()) / 2
    values = {"fooled": fooled, "judged": judged, "accuracy": right}
    return {name: weighted_mean(value.squeeze(-1), valid) for name, value in values.items()}


def compute_loss(mine: Record, theirs: Record, labels, project, discriminator, alpha, weight):
    """The loss of both players and its parts: records with logits (B, S, V) and hidden states
    (B, S, D or E), labels (B, S)."""
    valid = labels != -100
    ce = weighted_mean(cross_entropy(mine.logits, labels), valid)
    kl = weighted_mean(kl_divergence(mine.logits, theirs.logits, 1.0), valid)
    game = play(project(mine.hidden[-1]), theirs.hidden[-1], discriminator, valid)
    loss = alpha * ce + (1 - alpha) * kl + weight * game["fooled"] + game["judged"]
    return loss, {"ce": ce, "kl": kl, **game}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--weight", type=float, default=0.1, help="of fooling the discriminator")
    add("--discriminator_rate", type=float, default=0.003, help="its peak learning rate")
    add("--units", type=int, default=64, help="of its hidden layer")
    add("--alpha", type=float, default=0.5, help="0: teacher; 1: labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/adversarial", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    D, E = student.config.hidden_size, teacher.config.hidden_size
    project = nn.Linear(D, E, bias=False)
    discriminator = nn.Sequential(nn.Linear(E, args.units), nn.GELU(), nn.Linear(args.units, 1))
    run.optimize(student, project)
    run.optimize(discriminator, learning_rate=args.discriminator_rate)
    for input_ids, labels in run.batches(data):  # (B, S) each
        mine, theirs = Record("hidden"), Record("hidden")
        with run.precision():
            student(input_ids, record=mine)
            with torch.no_grad():
                teacher(input_ids, record=theirs)
            loss, parts = compute_loss(
                mine, theirs, labels, project, discriminator, args.alpha, args.weight
            )
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
