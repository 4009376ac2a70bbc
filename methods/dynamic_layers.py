"""Dynamic layers: hidden states and their changes are matched, most where the student lags most.

    e_l  = | W_l n(h_l) - n(t_m(l)) |^2 / E                              the state after layer l
    d_l  = | U_l n(h_l - h_(l-1)) - n(t_m(l) - t_m(l-1)) |^2 / E         what layer l has added
    loss = alpha * CE + (1 - alpha) * KL(teacher || student)
         + weight * sum_l lag(e)_l e_l + dynamics * sum_l lag(d)_l d_l
    lag(e)_l = stop(e_l)^power / sum_k stop(e_k)^power

h (B, S, D) are the student's states, t (B, S, E) the teacher's, m(l) = ceil(l L_t / L_s), index 0
the embedding; n divides by the root mean square; W and U are learned and thrown away. Depth can be
read as the time of a differential equation, so changes are matched beside states: Feature Dynamics
Distillation (ACL 2025, openreview YzOaEbkS4X; it compares in the vocabulary's space, we project).
Weights that follow the layers that lag are what popular texts call SDD: no published source of that
name was found, `lag` is our definition. KL points to the student; no gradient reaches the teacher,
or flows through lag; means are over labels that are not -100, lag is of a micro-batch.
Charged: the teacher's forward pass, and the projections.
Traps: a lag with a gradient (a layer is paid for falling behind); weights that do not sum to 1.

    python -m methods.dynamic_layers
    python -m methods.dynamic_layers --power 0 --dynamics 0     # plain matching of hidden states

Judged on few: success is 0.02 nats below --power 0 --dynamics 0 over 3 seeds.
Try: --power 4 (only the worst layer counts), --weight 0 (the changes alone).
Shapes: B batch, S sequence, N valid tokens, V vocabulary, D and E widths, L_s and L_t layers.
"""

import torch
from torch import Tensor, nn

from dataset import add_data_flags, open_data
from distill import cross_entropy, kl_divergence, weighted_mean
from distill.hidden import layer_errors, layer_pairs
from files import check_ranges
from model import Record
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"power": (0.0, 16.0), "weight": (0.0, 1e3), "dynamics": (0.0, 1e3)}


def lag(errors: Tensor, power: float) -> Tensor:
    """Weights (L,) that sum to 1 and grow with `errors` (L,); no gradient flows through them."""
    errors = errors.detach().clamp(min=1e-12) ** power
    return errors / errors.sum()


def changes(states: list[Tensor]) -> list[Tensor]:
    return [after - before for before, after in zip(states, states[1:], strict=False)]


def compute_loss(mine, theirs, labels, projections, alpha, weight, dynamics, power):
    """The loss and its parts. mine, theirs: records with logits (B, S, V) and as many hidden
    states, the embedding first; projections: the lists W and U; labels (B, S)."""
    valid, (W, U) = labels != -100, projections
    ce = weighted_mean(cross_entropy(mine.logits, labels), valid)
    kl = weighted_mean(kl_divergence(mine.logits, theirs.logits, 1.0), valid)
    e = layer_errors(mine.hidden[1:], theirs.hidden[1:], W, valid)  # (L,)
    d = layer_errors(changes(mine.hidden), changes(theirs.hidden), U, valid)
    loss = alpha * ce + (1 - alpha) * kl
    loss = loss + weight * (lag(e, power) * e).sum() + dynamics * (lag(d, power) * d).sum()
    return loss, {"ce": ce, "kl": kl, "hidden": e.mean(), "changes": d.mean()}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--weight", type=float, default=1.0, help="of the states")
    add("--dynamics", type=float, default=1.0, help="of their changes from layer to layer")
    add("--power", type=float, default=1.0, help="how much more a lagging layer counts; 0: no more")
    add("--alpha", type=float, default=0.5, help="0: teacher; 1: labels")
    add_data_flags(parser)
    add_common_flags(parser, out="out/dynamic_layers", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    L = len(student.model.layers)
    pairs = [(0, 0), *layer_pairs("uniform", L, len(teacher.model.layers))]  # 0 is the embedding
    D, E = student.config.hidden_size, teacher.config.hidden_size
    W, U = (nn.ModuleList(nn.Linear(D, E, bias=False) for _ in range(L)) for _ in range(2))
    run.optimize(student, W, U)
    for input_ids, labels in run.batches(data):  # (B, S) each
        mine, theirs = Record("hidden"), Record("hidden")
        with run.precision():
            student(input_ids, record=mine)
            with torch.no_grad():
                teacher(input_ids, record=theirs)
            theirs.hidden = [theirs.hidden[number] for _, number in pairs]
            loss, parts = compute_loss(
                mine, theirs, labels, (W, U), args.alpha, args.weight, args.dynamics, args.power
            )
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
