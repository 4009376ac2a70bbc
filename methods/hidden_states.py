"""Hidden states: teach the student how the teacher sees each position, not only what it says there.

    loss = KL(teacher || student) + weight * mean over layers of | W_l n(h_l) - n(t_m(l)) |^2 / E

h_l (D) is the student's state after its layer l, t (E) the teacher's after the layer that the map m
pairs with it; n divides by the root mean square. W_l (D -> E) is learned beside the student and
thrown away (FitNets, 1412.6550; TinyBERT, 1909.10351): a narrow student can hold only D directions
of the teacher's E, and W_l chooses them. --metric cosine compares directions alone.

The KL points from teacher to student at T = 1; no gradient reaches the teacher. Means are over
tokens whose label is not -100. Traps: a W_l that no optimizer knows, or that weight decay shrinks;
without n the layer and the position with the longest states own the error (a channel that is large
everywhere still has more than its part of it); states[0] is the embedding, so layers count from 1.
Charged: the teacher's forward pass and the W_l, a matrix product per layer.

    python -m methods.hidden_states
    python -m methods.hidden_states --layers last --metric cosine --out out/hidden_last
    python -m methods.hidden_states --layers 1:2,2:4 --weight 0.1 --out out/hidden_given

Judged on few: success is a held-out loss 0.02 below that of --weight 0, the KL alone.
Try: --weight 0 (log.csv tells how the hidden loss falls by itself); --layers 1:4,2:1 (crossed).
Shapes: B batch, S sequence, N valid tokens, D and E widths of student and teacher.
"""

import torch
from torch import nn

from dataset import add_data_flags, open_data
from distill import kl_divergence, weighted_mean
from distill.hidden import METRICS, hidden_state_loss, layer_pairs
from files import check_ranges
from model import Record
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"weight": (0.0, 1e4)}


def compute_loss(student: Record, teacher: Record, labels, pairs, projections, metric, weight):
    """KL + weight * hidden loss, a scalar, and its two parts. student, teacher: records with logits
    (B, S, V) and hidden states (B, S, D or E); labels (B, S); pairs of layers, each with its W."""
    valid = labels != -100
    kl = weighted_mean(kl_divergence(student.logits, teacher.logits, temperature=1.0), valid)
    errors = [
        hidden_state_loss(student.hidden[ours], teacher.hidden[theirs], valid, W, metric)
        for (ours, theirs), W in zip(pairs, projections, strict=True)
    ]
    hidden = torch.stack(errors).mean()
    return kl + weight * hidden, {"kl": kl, "hidden": hidden}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    which = "uniform, last, or student:teacher pairs, counted from 1: 1:2,2:4"
    parser.add_argument("--layers", default="uniform", help=which)
    kinds = "mse: squared error of normalised states; cosine: 1 - cosine"
    parser.add_argument("--metric", choices=METRICS, default="mse", help=kinds)
    parser.add_argument("--weight", type=float, default=3.0, help="of the hidden loss")
    add_data_flags(parser)
    add_common_flags(parser, out="out/hidden_states", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    pairs = layer_pairs(args.layers, len(student.model.layers), len(teacher.model.layers))
    D, E = student.config.hidden_size, teacher.config.hidden_size
    projections = nn.ModuleList(nn.Linear(D, E, bias=False) for _ in pairs)
    run.optimize(student, projections)
    for input_ids, labels in run.batches(data):  # (B, S) each
        ours, theirs = Record("hidden"), Record("hidden")  # layers + 1 states each
        with run.precision():
            student(input_ids, record=ours)
            with torch.no_grad():
                teacher(input_ids, record=theirs)
        loss, parts = compute_loss(
            ours, theirs, labels, pairs, projections, args.metric, args.weight
        )
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
