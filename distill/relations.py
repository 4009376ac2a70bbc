"""Relations: not where a sample lies, but how samples lie to one another.

    distance      Huber( |s_i - s_j| / mean,  |t_i - t_j| / mean )             RKD, 1904.05068
    angle         Huber( cos at j of s_i and s_k,  cos at j of t_i and t_k )   RKD
    similarity    ( S S^T, its rows of unit length, minus that of T )^2        1907.09682
    graph         ( cos of every two nodes, minus that of the teacher )^2

Relations have one shape whatever the width of a state, so no projection is needed. The nodes of the
graph are layers x samples: it also says how a layer moves what the layer before it saw. It is our
definition; the nearest published one is the instance relationship graph (Liu et al., CVPR 2019).

Means are over two, or three, different samples, as the relation of a sample to itself is the same
in every model (similarity alone keeps its paper's n * n). Distances are divided by their mean over
pairs, which is a constant for the teacher and part of the gradient for the student. Coordinates are
subtracted: |s|^2 + |t|^2 - 2 s t, which others use, loses small distances to rounding.
Shapes: B batch, S sequence, L layers, n samples, D and E widths of student and teacher.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .hidden import normalise
from .logits import at_least_float32


def spread_positions(valid: Tensor, most: int) -> Tensor:
    """At most `most` valid positions of a micro-batch, spread evenly over its rows, as indices of
    the flattened (B * S): valid (B, S), bool -> (n,). Always the same ones for the same mask."""
    index = valid.flatten().nonzero().squeeze(-1)
    places = torch.linspace(0, max(0, len(index) - 1), min(len(index), most), device=index.device)
    return index[places.long()]


def differences(states: Tensor) -> tuple[Tensor, Tensor]:
    """(n, D) -> x_i - x_j (n, n, D), and their lengths (n, n), in float32 or better."""
    states = at_least_float32(states)
    apart = states[:, None] - states[None]
    squares = apart.square().sum(-1)
    zero = squares == 0  # the diagonal, and samples that are equal
    # The slope of a root at 0 is infinite, and 0 times infinity is NaN: the root gets a 1 there.
    return apart, squares.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def relative_distances(states: Tensor) -> Tensor:
    """Distances of states (n, D) over their mean between different samples: (n, n)."""
    lengths = differences(states)[1]
    n = len(states)
    mean = lengths.sum() / max(1, n * (n - 1))  # the diagonal adds 0 and is not counted
    return lengths / torch.where(mean > 0, mean, 1.0)


def cosines_of_angles(states: Tensor) -> Tensor:
    """cos of the angle at j between the ways to i and to k: (n, D) -> (j, i, k), (n, n, n)."""
    apart, lengths = differences(states)
    ways = apart / torch.where(lengths > 0, lengths, 1.0)[..., None]
    return ways @ ways.mT


def distance_relation_loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """A scalar, the mean over pairs of different samples; 0 for fewer than two.
    student_states (n, D), teacher_states (n, E): no gradient reaches the second."""
    n = len(student_states)
    target = relative_distances(teacher_states.detach())
    # Huber's loss: half the square of what is below 1. The diagonal adds 0.
    errors = F.smooth_l1_loss(relative_distances(student_states), target, reduction="sum")
    return errors / max(1, n * (n - 1))


def angle_relation_loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """A scalar, the mean over triplets of different samples; 0 for fewer than three.
    student_states (n, D), teacher_states (n, E): no gradient reaches the second."""
    n = len(student_states)
    target = cosines_of_angles(teacher_states.detach())
    errors = F.smooth_l1_loss(cosines_of_angles(student_states), target, reduction="none")
    same = torch.eye(n, dtype=torch.bool, device=errors.device)  # i = k is no angle
    return errors.masked_fill(same, 0.0).sum() / max(1, n * (n - 1) * (n - 2))


def similarity_loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Similarity-preserving distillation, a scalar: squares over n * n, as its paper has it (a row
    of unit length has n entries, so the loss falls with n). student_states (n, D), teacher_states
    (n, E): no gradient reaches the second."""
    similar = [
        F.normalize(at_least_float32(states) @ at_least_float32(states).mT, dim=-1)
        for states in (student_states, teacher_states.detach())
    ]
    return (similar[0] - similar[1]).square().sum() / max(1, similar[0].numel())


def graph_loss(student_states: Tensor, teacher_states: Tensor) -> Tensor:
    """A scalar, the mean over edges between different nodes of the squared difference of cosines.
    student_states (L, n, D), teacher_states (L, n, E): L layers of each model, as many of both; no
    gradient reaches the second."""
    edges = []
    for states in (student_states, teacher_states.detach()):
        nodes = normalise(states).flatten(0, 1)  # (L * n, width)
        edges.append(nodes @ nodes.mT / nodes.shape[-1])  # cosines: rows have mean square 1
    N = len(edges[0])
    different = ~torch.eye(N, dtype=torch.bool, device=edges[0].device)
    return (edges[0] - edges[1])[different].square().sum() / max(1, N * (N - 1))
