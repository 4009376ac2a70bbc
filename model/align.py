"""A dense feed-forward layer made of sparse experts: one of them, their average, or the average
after their hidden units were matched.

    average    W = sum_e share_e W_e               share_e: the mean weight that the gate gives e
    aligned    the same, after each expert's hidden units have taken the order and the signs that
               make them most like those of the expert with the largest share

What an expert computes does not depend on the order of its hidden units, nor on a common sign of
the row of w3 and the column of w2 that belong to one: w2 (silu(w1 x) * w3 x) has the product of the
two. Experts learn these by chance, so the average of units that have nothing in common is near
noise (for whole models: Ainsworth et al. 2022, 2209.04836). A sign of w1 is not free: silu is not
odd.

Shapes: D width, I hidden units, E experts, L layers.
"""

from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .experts import Expert, ExpertsConfig, RouterRecord, route
from .transformer import Transformer


def assign(scores: np.ndarray) -> np.ndarray:
    """The one-to-one assignment of rows to columns whose scores (n, n) add up to most: the column
    of each row, (n,). The Hungarian method (Kuhn 1955), in n^3 steps: rows join one by one, each
    along the cheapest path of exchanges, which the prices u and v make visible."""
    n = len(scores)
    cost = np.zeros((n + 1, n + 1))  # row and column 0 stand for "none yet"
    cost[1:, 1:] = -np.asarray(scores, dtype=np.float64)
    u, v = np.zeros(n + 1), np.zeros(n + 1)
    owner, came_from = np.zeros(n + 1, dtype=int), np.zeros(n + 1, dtype=int)
    for row in range(1, n + 1):
        owner[0], column = row, 0
        reached, distance = np.zeros(n + 1, dtype=bool), np.full(n + 1, np.inf)
        while owner[column]:
            reached[column] = True
            reduced = cost[owner[column]] - u[owner[column]] - v
            closer = ~reached & (reduced < distance)
            distance[closer], came_from[closer] = reduced[closer], column
            column = int(np.where(reached, np.inf, distance).argmin())
            step = distance[column]
            u[owner[reached]] += step
            v[reached] -= step
            distance[~reached] -= step
        while column:  # the path back: each column goes to the row before
            owner[column] = owner[came_from[column]]
            column = came_from[column]
    columns = np.empty(n, dtype=int)
    columns[owner[1:] - 1] = np.arange(n)
    return columns


def align(units: Tensor, reference: Tensor) -> Tensor:
    """An expert's hidden units, in the order and with the signs that make them most like those of
    the reference; both (3, I, D): rows of w1, rows of w3, columns of w2. It computes the same as
    before. How alike two units are: the cosine in w1, and the size of those in w3 and w2 added."""
    cosine = F.normalize(reference, dim=-1) @ F.normalize(units, dim=-1).mT  # (3, I, I)
    linear = cosine[1] + cosine[2]
    order = torch.from_numpy(assign((cosine[0] + linear.abs()).cpu().numpy())).to(units.device)
    flipped = linear.gather(1, order[:, None]) < 0  # (I, 1)
    sign = torch.where(flipped, -1.0, 1.0).to(units.dtype)
    gate, up, down = units[:, order]
    return torch.stack((gate, sign * up, sign * down))


@torch.no_grad()
def measure_shares(teacher: Transformer, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """How much each expert has to say: its mean weight over the tokens of `batches`, pairs of
    input_ids and labels (B, S), whose label is not -100: (L, E), sum 1 in each layer. Raises
    ValueError for a model without experts."""
    config, total = teacher.config, 0.0
    if not isinstance(config, ExpertsConfig):
        cure = "pass a folder of MixtralForCausalLM, leave --teacher out, or --start random"
        raise ValueError(f"the teacher has no experts to start from: {cure}")
    device = teacher.lm_head.weight.device
    for input_ids, labels in batches:
        record, valid = RouterRecord(), (labels != -100).to(device)
        teacher(input_ids.to(device), record=record)
        logits = torch.stack(record.router)[:, valid]  # (L, N, E)
        chosen, weights = route(logits, config.num_experts_per_tok)  # (L, N, k)
        total = total + torch.zeros_like(logits).scatter(-1, chosen, weights).sum(1)
    return total / total.sum(-1, keepdim=True)


@torch.no_grad()
def merge_experts(experts: list[Expert], shares: Tensor, how: str) -> dict[str, Tensor]:
    """One SwiGLU's state_dict, made of experts by their shares (E,), which add up to 1. how: "one",
    the expert with the largest share; "average"; "aligned", the average after `align` to it."""
    units = [torch.stack((e.w1.weight, e.w3.weight, e.w2.weight.T)) for e in experts]  # (3, I, D)
    first = units[int(shares.argmax())]
    if how == "one":
        gate, up, down = first
    else:
        units = [align(x, first) if how == "aligned" else x for x in units]
        gate, up, down = sum(share * x for share, x in zip(shares, units, strict=True))
    return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down.T}


@torch.no_grad()
def start_dense(student: Transformer, teacher: Transformer, how: str, shares: Tensor) -> None:
    """Give a dense student of equal sizes the weights of a sparse teacher: "rest", all but the
    experts; otherwise also a SwiGLU made of each layer's experts by `merge_experts`. shares (L, E):
    of `measure_shares`. Raises ValueError where the sizes differ or the student has experts."""
    if isinstance(student.config, ExpertsConfig):
        raise ValueError("the student is a mixture of experts: pass a dense one, or --start random")
    mine, theirs = asdict(student.config), asdict(teacher.config)
    for name in mine:
        if mine[name] != theirs[name] and name != "max_position_embeddings":
            differs = f"{name} is {mine[name]} in the student and {theirs[name]} in the teacher"
            raise ValueError(f"{differs}: use a student of the experts' sizes, or --start random")
    state = {name: x for name, x in teacher.state_dict().items() if name in student.state_dict()}
    student.load_state_dict(state, strict=False)
    if how != "rest":
        for layer, sparse, of_layer in zip(
            student.model.layers, teacher.model.layers, shares, strict=True
        ):
            experts = list(sparse.block_sparse_moe.experts)
            layer.mlp.load_state_dict(merge_experts(experts, of_layer, how))
