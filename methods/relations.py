"""Relations: teach the student how positions lie to one another in the teacher, not where they lie.

    loss = KL(teacher || student) + weight * relation loss of n positions' states s_i, t_i

    distance      Huber( |s_i - s_j| / mean,  |t_i - t_j| / mean )        over pairs (1904.05068)
    angle         Huber( cos of the angle at j in s,  the same in t )     over triplets
    rkd           distance + 2 * angle, the paper's ratio
    similarity    ( S S^T, rows of unit length, - the same of T )^2       over n * n (1907.09682)
    graph         ( cos of two nodes - the teacher's )^2                  nodes: layers x positions

Whatever the widths, no projection is needed. A sample is the state of a position after a layer,
divided by its root mean square; n positions are spread evenly over the micro-batch, as relations of
neighbours mostly say that they are neighbours. The graph is our definition (distill/relations.py).

The KL points from teacher to student at T = 1 and is a mean over labels that are not -100; the
relation loss is defined per micro-batch: --accumulation_steps changes it. No gradient reaches the
teacher, nor its mean distance. Traps: the root's slope at 0; the diagonal in the mean.
Charged: the teacher's forward pass; angles, samples^3 * width.

    python -m methods.relations
    python -m methods.relations --relation graph --out out/relations_graph
    python -m methods.relations --relation similarity --layers last --out out/similarity

Judged on few: success is a held-out loss 0.02 below that of --weight 0, the KL alone.
Try: --samples 8 against 128; --layers 1:1 (what do relations of an early layer say?).
Shapes: B batch, S sequence, n samples, V vocabulary, D and E widths of student and teacher.
"""

import torch

from dataset import add_data_flags, open_data
from distill import kl_divergence, weighted_mean
from distill.hidden import layer_pairs, normalise
from distill.relations import angle_relation_loss as angle_loss
from distill.relations import distance_relation_loss as distance_loss
from distill.relations import graph_loss, similarity_loss, spread_positions
from files import check_ranges
from model import Record
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"weight": (0.0, 1e4), "samples": (3, 512)}
RELATIONS = {  # and a weight: with eight times as much, gradients are about as large as the KL's
    "distance": (distance_loss, 2.5),
    "angle": (angle_loss, 3.0),
    "rkd": (lambda s, t: distance_loss(s, t) + 2 * angle_loss(s, t), 1.0),
    "similarity": (similarity_loss, 5.0),
    "graph": (graph_loss, 0.6),
}


def compute_loss(student: Record, teacher: Record, labels, pairs, relation, samples, weight):
    """KL + weight * relation loss, a scalar, and its two parts. student, teacher: records with
    logits (B, S, V) and hidden states (B, S, D or E); labels (B, S); pairs of layers."""
    valid = labels != -100
    kl = weighted_mean(kl_divergence(student.logits, teacher.logits, temperature=1.0), valid)
    index = spread_positions(valid, samples)  # (n,)
    ours = [normalise(student.hidden[layer].flatten(0, 1)[index]) for layer, _ in pairs]  # (n, D)
    theirs = [normalise(teacher.hidden[layer].flatten(0, 1)[index]) for _, layer in pairs]
    loss = RELATIONS[relation][0]
    if relation == "graph":
        related = loss(torch.stack(ours), torch.stack(theirs))
    else:
        related = sum(loss(s, t) for s, t in zip(ours, theirs, strict=True)) / len(pairs)
    return kl + weight * related, {"kl": kl, relation: related}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--relation", choices=RELATIONS, default="rkd", help="see above")
    add("--layers", default="uniform", help="or last, or student:teacher pairs from 1: 1:2,2:4")
    add("--samples", type=int, default=64, help="n, positions of a micro-batch")
    weights = ", ".join(f"{weight:g} for {name}" for name, (_, weight) in RELATIONS.items())
    add("--weight", type=float, help=f"of the relation loss; if not given {weights}")
    add_data_flags(parser)
    add_common_flags(parser, out="out/relations", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    pairs = layer_pairs(args.layers, len(student.model.layers), len(teacher.model.layers))
    weight = RELATIONS[args.relation][1] if args.weight is None else args.weight
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        ours, theirs = Record("hidden"), Record("hidden")
        with run.precision():
            student(input_ids, record=ours)
            with torch.no_grad():
                teacher(input_ids, record=theirs)
        loss, parts = compute_loss(ours, theirs, labels, pairs, args.relation, args.samples, weight)
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
