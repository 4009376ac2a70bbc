"""Attention: teach the student where the teacher looks, or which positions it finds alike.

    loss = KL(teacher || student) + weight * sum over matched R of KL( R_teacher || R_student )

    maps      R = softmax( Q K^T / sqrt(d) )     a row per head and query: which keys it reads
    values    R = softmax( V V^T / sqrt(d) )     whose values are alike, a relation of positions
    minilm    both (MiniLM, 2002.10957)
    qkv       Q Q^T, K K^T and V V^T instead (MiniLMv2, 2012.15828; queries and keys are rotated)

Maps need as many heads in both models; they are refused otherwise, unless --average_heads compares
their means over heads. Relations need only --relation_heads that divide both models' concatenated
heads. A row reads no key to its right, in relations too (the papers' models read both ways).

All KLs point from teacher to student at T = 1; no gradient reaches the teacher. Means are over
heads, layers and rows whose label is not -100. Traps: -inf of hidden keys becomes NaN; a mean over
S * S entries counts the zeros above the diagonal; fused attention returns no maps.
Charged: the teacher's forward pass; relations, S * S * d per head; maps, by an unfused kernel.

    python -m methods.attention
    python -m methods.attention --match maps --average_heads --out out/attention_maps
    python -m methods.attention --match qkv --layers uniform --relation_heads 2 --out out/qkv

Judged on few: success is a held-out loss 0.02 below that of --weight 0, the KL alone.
Try: --weight 0 (do relations become alike by themselves?); --layers 1:1,2:4 (early layers too).
Shapes: B batch, S sequence, N valid tokens, H heads, K key-value heads, d head width.
"""

import torch

from dataset import add_data_flags, open_data
from distill import kl_divergence, weighted_mean
from distill.attention import attention_loss, value_relation_loss
from distill.hidden import layer_pairs
from files import check_ranges
from model import Record
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"weight": (0.0, 1e4), "relation_heads": (1, 2**10)}
MATCHED = {
    "maps": ("attention",),
    "values": ("values",),
    "minilm": ("attention", "values"),
    "qkv": ("queries", "keys", "values"),
}


def compute_loss(student, teacher, labels, pairs, matched, heads, average_heads, weight):
    """KL + weight * attention loss, a scalar, and its parts. student, teacher: records with logits
    (B, S, V) and, per layer, attention (B, H, S, S) or others (B, heads, S, d); labels (B, S)."""
    valid = labels != -100
    kl = weighted_mean(kl_divergence(student.logits, teacher.logits, temperature=1.0), valid)
    parts = {"kl": kl}
    for name in matched:
        losses = []
        for ours, theirs in pairs:  # layers count from 1
            both = getattr(student, name)[ours - 1], getattr(teacher, name)[theirs - 1]
            if name == "attention":
                losses.append(attention_loss(*both, valid, average_heads))
            else:
                losses.append(value_relation_loss(*both, valid, heads))
        parts[name] = torch.stack(losses).mean()
    return kl + weight * sum(parts[name] for name in matched), parts


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--match", choices=MATCHED, default="values", help="see above")
    add("--layers", default="last", help="uniform, last, or student:teacher pairs from 1: 1:2,2:4")
    add("--relation_heads", type=int, default=1, help="pieces that relations are computed from")
    add("--average_heads", action="store_true", help="compare the mean of all maps of a layer")
    add("--weight", type=float, default=0.1, help="of the attention loss")
    add_data_flags(parser)
    add_common_flags(parser, out="out/attention", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run, matched = Run(args), MATCHED[args.match]
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    pairs = layer_pairs(args.layers, len(student.model.layers), len(teacher.model.layers))
    run.optimize(student)
    for input_ids, labels in run.batches(data):  # (B, S) each
        ours, theirs = Record(*matched), Record(*matched)
        with run.precision():
            student(input_ids, record=ours)
            with torch.no_grad():
                teacher(input_ids, record=theirs)
        heads, average = args.relation_heads, args.average_heads
        loss, parts = compute_loss(
            ours, theirs, labels, pairs, matched, heads, average, args.weight
        )
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
