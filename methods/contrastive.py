"""Contrastive: among the teacher's states of many positions, the student's must point to its own.

    loss = KL(teacher || student) - weight * mean over i of log( e^(s_ii) / sum_j e^(s_ij) )
    s_ij = cos( W h_i, t_j ) / tau                 i, j = 1 .. n positions of the micro-batch

A squared error wants every number of the teacher's state; this wants only what tells one position
from the others. It is contrastive representation distillation (CRD, 1910.10699) in its simplest
form, not the paper's: InfoNCE (1807.03748), a softmax over the n teacher states of one micro-batch,
where CRD draws thousands of negatives of other classes from a memory and decides each by itself
(NCE); one learned projection, W (D -> E) of the student, where CRD has one on each side. n
positions are spread evenly over the micro-batch; states are those of the last layers.

The KL points from teacher to student at T = 1 and is a mean over labels that are not -100; the
contrastive loss is defined per micro-batch: --accumulation_steps changes n and so the loss. No
gradient reaches the teacher. It starts near log n; log n - loss bounds from below the information
that both states share, so it cannot show more than log n. Traps: a W that no optimizer knows; two
positions with equal pasts are each other's negatives.
Charged: the teacher's forward pass, W, and the product of n x n states.

    python -m methods.contrastive
    python -m methods.contrastive --samples 1024 --tau 0.05 --out out/contrastive_1024

Judged on few: success is a held-out loss 0.02 below that of --weight 0, the KL alone.
Try: --samples 16 (is it too easy?); --tau 1 (why does hardly anything happen?).
Shapes: B batch, S sequence, n samples, D and E widths of student and teacher.
"""

import torch
from torch import Tensor, nn

from dataset import add_data_flags, open_data
from distill import kl_divergence, weighted_mean
from distill.hidden import normalise
from distill.relations import spread_positions
from files import check_ranges
from model import Record
from run import Run, add_common_flags, command_line, new_parser

RANGES = {"weight": (0.0, 1e4), "samples": (2, 2**13), "tau": (1e-3, 1e3)}


def contrastive_loss(student_states: Tensor, teacher_states: Tensor, tau: float) -> Tensor:
    """InfoNCE, a scalar: the mean over n samples of -log softmax at the sample itself.
    student_states (n, E), after the projection; teacher_states (n, E): without a gradient."""
    theirs = normalise(teacher_states.detach())
    cosines = normalise(student_states) @ theirs.mT / theirs.shape[-1]  # (n, n)
    log_probs = (cosines / tau).log_softmax(-1)  # over the teacher's states
    return -log_probs.diagonal().sum() / max(1, len(log_probs))


def compute_loss(student: Record, teacher: Record, labels, projection, samples, tau, weight):
    """KL + weight * contrastive loss, a scalar, and its two parts. student, teacher: records with
    logits (B, S, V) and hidden states (B, S, D or E); labels (B, S); projection: W."""
    valid = labels != -100
    kl = weighted_mean(kl_divergence(student.logits, teacher.logits, temperature=1.0), valid)
    index = spread_positions(valid, samples)  # (n,)
    ours, theirs = (model.hidden[-1].flatten(0, 1)[index] for model in (student, teacher))
    contrastive = contrastive_loss(projection(normalise(ours)), theirs, tau)
    return kl + weight * contrastive, {"kl": kl, "contrastive": contrastive}


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--samples", type=int, default=256, help="n, positions of a micro-batch")
    add("--tau", type=float, default=0.1, help="what cosines are divided by")
    add("--weight", type=float, default=0.3, help="of the contrastive loss")
    add_data_flags(parser)
    add_common_flags(parser, out="out/contrastive", pair=True, fused=False)
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, **RANGES)
    run = Run(args)
    data = open_data(args, args.student, args.teacher)
    teacher, student = run.teacher(args.teacher, data), run.student(args.student, data)
    projection = nn.Linear(student.config.hidden_size, teacher.config.hidden_size, bias=False)
    run.optimize(student, projection)
    for input_ids, labels in run.batches(data):  # (B, S) each
        ours, theirs = Record("hidden"), Record("hidden")
        with run.precision():
            student(input_ids, record=ours)
            with torch.no_grad():
                teacher(input_ids, record=theirs)
        loss, parts = compute_loss(
            ours, theirs, labels, projection, args.samples, args.tau, args.weight
        )
        run.step(loss, **parts)
    return run.finish()


if __name__ == "__main__":
    command_line(main, parse_args())
