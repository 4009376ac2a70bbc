"""Hidden states: how far the student's view of a position is from the teacher's.

    mse       | W n(h) - n(t) |^2 / E              n(x) = x / sqrt(mean(x^2))
    cosine    1 - cos( W n(h), n(t) )

h (D) and t (E) are states of one position, W (D -> E) is learned with the student and thrown away
(FitNets, 1412.6550; TinyBERT, 1909.10351). The residual stream grows from layer to layer; n makes
layers and positions count alike. It does not tame a channel that is large at every position, as it
divides all channels of a position by one number. The cosine leaves the length of W n(h) free.

Shapes: B batch, S sequence, N valid tokens, D and E widths of student and teacher.
"""

import torch
from torch import Tensor

from .logits import at_least_float32

METRICS = ("mse", "cosine")
TINY = 1e-12  # beside a mean square: a state of zeros stays zero, and has a gradient


def normalise(states: Tensor) -> Tensor:
    """Divide states (..., D) by their root mean square, in float32 or better."""
    states = at_least_float32(states)
    return states * (states.square().mean(-1, keepdim=True) + TINY).rsqrt()


def hidden_state_loss(
    student_states: Tensor,
    teacher_states: Tensor,
    mask: Tensor | None = None,
    projection=None,
    metric: str = "mse",
) -> Tensor:
    """A scalar, the mean over positions where `mask` (B, S), bool, is true; 0 where none is.

    student_states (B, S, D), teacher_states (B, S, E): one layer's; no gradient reaches the second.
    projection: W, a module (N, D) -> (N, E). Raises ValueError where widths differ without one."""
    if metric not in METRICS:
        raise ValueError(f"no metric '{metric}' of hidden states: use {' or '.join(METRICS)}")
    teacher_states = teacher_states.detach()
    if mask is not None:  # positions are left out before anything is computed from them
        student_states, teacher_states = student_states[mask], teacher_states[mask]  # (N, ...)
    seen, target = normalise(student_states), normalise(teacher_states)
    seen = seen if projection is None else projection(seen)
    if seen.shape != target.shape:
        widths = f"student width {seen.shape[-1]} and teacher width {target.shape[-1]} differ"
        raise ValueError(f"{widths}: give a projection, nn.Linear({seen.shape[-1]}, ...)")
    if metric == "mse":
        errors = (seen - target).square().mean(-1)  # (N,)
    else:
        errors = 1 - (normalise(seen) * normalise(target)).mean(-1)
    return errors.sum() / max(1, errors.numel())


def layer_errors(states, targets, projections, mask: Tensor) -> Tensor:
    """| W_l n(h_l) - n(t_l) |^2 / E of each of L layers, (L,): lists of h (B, S, D), of t (B, S, E)
    and of modules W (D -> E); mask (B, S)."""
    triples = zip(states, targets, projections, strict=True)
    return torch.stack([hidden_state_loss(h, t, mask, W) for h, t, W in triples])


def layer_pairs(name: str, students: int, teachers: int) -> list[tuple[int, int]]:
    """(student layer, teacher layer) pairs, counted from 1, for models of so many layers.

    name: "last", "uniform" (each of the student's, spread over the teacher's depth up to its last
    layer), or pairs as "1:2,4:6". Raises ValueError for another name or a layer there is not."""
    if name == "last":
        return [(students, teachers)]
    if name == "uniform":  # rounded up: round() would give a flat teacher's embedding, layer 0
        return [(layer, -(-layer * teachers // students)) for layer in range(1, students + 1)]
    try:
        pairs = [tuple(map(int, pair.split(":"))) for pair in name.split(",")]
        pairs = [(ours, theirs) for ours, theirs in pairs]
    except ValueError:
        cure = "use uniform, last, or student:teacher pairs such as 1:2,2:4"
        raise ValueError(f"--layers {name} is no map of layers: {cure}") from None
    for ours, theirs in pairs:
        if not (1 <= ours <= students and 1 <= theirs <= teachers):
            sizes = f"the student has layers 1 to {students}, the teacher 1 to {teachers}"
            raise ValueError(f"--layers {name} asks for {ours}:{theirs}: {sizes}")
    return pairs
