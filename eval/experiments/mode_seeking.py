"""What a student that is too small does with three modes, under each divergence.

    python -m eval.experiments.mode_seeking

The target p is a known law of the next of 32 tokens: three bumps, which hold 50, 30 and 20%. The
student q can only be one bump, q(v) = softmax(-(v - centre)^2 / (2 width^2)): two numbers, fitted
by Adam under every divergence from six starts, one of them wide. A row is a fit; `seed` numbers the
start, `value` is the divergence that is left. Of the six the picture draws the lowest bold; the
others are where gradient descent stays, having started elsewhere. (Adaptive KL's weights have no
gradient, so it ends where its pull is 0, which need not be its lowest value.)

    coverage     sum of p(v) where q(v) > 0.01: how much of the teacher's the student would say
    precision    sum of q(v) where p(v) > 0.01: how much of the student's the teacher would say

How many starts end in one mode depends on these starts and rates: from wide ones alone reverse KL
stays wide. That its lowest fit is one mode, and forward KL has one optimum, does not.

No data and no teacher is needed; it takes half a minute. A student that can fit p has no such
choice to make: there all divergences have one optimum, q = p.
"""

import torch
from torch import Tensor

from distill.divergences import DIVERGENCES
from files import command_line

from .common import preset_args
from .rows import append_rows, read_rows

V, STEPS, LIKELY = 32, 600, 0.01
RATES = (0.2, 0.03)  # of the centre and of the width's logarithm, falling to 0
MODES = ((6, 1.0, 0.5), (16, 1.2, 0.3), (26, 1.0, 0.2))  # centre, width, share
STARTS = ((3, 1.5), (9, 1.5), (16, 1.5), (23, 1.5), (29, 1.5), (16, 8.0))  # centre, width
ARMS = {  # name: divergence and its parameters
    "forward KL": ("forward_kl", {}),
    "skew KL, 0.1": ("skew_kl", {"skew": 0.1}),
    "JSD, beta 0.1": ("jensen_shannon_normalised", {"beta": 0.1}),
    "adaptive KL": ("adaptive_kl", {}),
    "Jeffreys": ("jeffreys", {}),
    "JSD, beta 0.5": ("jensen_shannon_normalised", {"beta": 0.5}),
    "JSD, beta 0.9": ("jensen_shannon_normalised", {"beta": 0.9}),
    "total variation": ("total_variation", {}),
    "skew reverse KL, 0.1": ("skew_reverse_kl", {"skew": 0.1}),
    "reverse KL": ("reverse_kl", {}),
}


def bump(centre: Tensor, width: Tensor) -> Tensor:
    """Logits of one bump: centre and width (...) -> (..., V)."""
    return -((torch.arange(V) - centre[..., None]) ** 2) / (2 * width[..., None] ** 2)


def target() -> Tensor:
    """p (V,)."""
    centre, width, share = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*MODES, strict=True)
    )
    return (share[:, None] * bump(centre, width).softmax(-1)).sum(0)


def fit(name: str, parameters: dict, p: Tensor) -> tuple[Tensor, Tensor]:
    """Values (starts,) and distributions q (starts, V) at the end, one from each start."""
    centre, width = torch.tensor(STARTS, dtype=torch.float64).T.clone()
    learned = (centre.requires_grad_(), width.log().requires_grad_())
    adam = torch.optim.Adam([{"params": [x]} for x in learned], betas=(0.9, 0.95))
    teacher_logits = p.log().expand(len(STARTS), V)
    for step in range(STEPS):
        for group, rate in zip(adam.param_groups, RATES, strict=True):
            group["lr"] = rate * (1 - step / STEPS)
        student_logits = bump(learned[0], learned[1].exp())
        values = DIVERGENCES[name](student_logits, teacher_logits, **parameters)  # (starts,)
        adam.zero_grad()
        values.sum().backward()
        adam.step()
    return values.detach(), student_logits.detach().softmax(-1)


def run(scale, results) -> None:
    path = results / "mode_seeking" / "results.csv"
    if read_rows(path):
        return
    p, rows = target(), []
    for arm, (name, parameters) in ARMS.items():
        for seed, (value, q) in enumerate(zip(*fit(name, parameters, p), strict=True)):
            rows.append({
                "experiment": "mode_seeking", "arm": arm, "seed": seed, "value": float(value),
                "coverage": float(p[q > LIKELY].sum()), "precision": float(q[p > LIKELY].sum()),
                "target": " ".join(f"{x:.4f}" for x in p), "fit": " ".join(f"{x:.4f}" for x in q),
                "command": "python -m eval.experiments.mode_seeking",
            })  # fmt: skip
    append_rows(path, rows)
    print(f"{path}: written")


if __name__ == "__main__":
    command_line(lambda args: run(args.scale, args.results), preset_args(__doc__, sweeps=False))
