"""The optimizer and the learning-rate schedule.

Muon (Jordan et al. 2024) takes the momentum of a weight matrix to the nearest matrix whose singular
values are all 1, so that every direction of the matrix learns at one speed. It suits hidden
matrices only; embeddings, norms and biases go to AdamW. torch.optim.Muon with "match_rms_adamw"
scales its updates to the size of AdamW's (Liu et al. 2025, 2502.16982), so both share one rate.
"""

import math

import torch
from torch import nn

from . import parallel, shards


class Optimizer:
    """AdamW alone, or Muon beside AdamW, behind one step, zero_grad and state_dict."""

    def __init__(self, student: nn.Module, args):
        matrices, embeddings, vectors = [], [], []
        for name, parameter in student.named_parameters():
            if parameter.ndim < 2:
                vectors.append(parameter)
            elif "embed_tokens" in name or "lm_head" in name:
                embeddings.append(parameter)
            else:
                matrices.append(parameter)
        decay, rate = args.weight_decay, args.learning_rate
        groups = [
            {"params": embeddings, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},  # a norm's scale should not shrink
        ]
        self.parts: list[torch.optim.Optimizer] = []
        if args.optimizer == "muon":
            self.parts.append(
                torch.optim.Muon(
                    matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        else:
            groups.append({"params": matrices, "weight_decay": decay})
        self.parts.append(torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True))
        self.parameters = matrices + embeddings + vectors
        self.args = args

    def step(self, step: int) -> float:
        """Sum, clip, update and clear; returns the rate of `step`."""
        self.clip()
        return self.update(step)

    def clip(self) -> torch.Tensor:
        """Sum the gradient over processes and clip it; returns its norm before, a scalar."""
        if not shards.in_use:  # fully_shard has summed them in backward
            parallel.sum_gradients(self.parameters)
        largest = self.args.grad_clip if self.args.grad_clip > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.parameters, largest)
        return norm.full_tensor() if shards.in_use else norm

    def update(self, step: int) -> float:
        """Set the rate of `step`, change the weights, clear the gradient; returns the rate."""
        rate = learning_rate(step, self.args)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        self.clear()
        return rate

    def clear(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def clear_where(self, broken: torch.Tensor) -> None:
        """Make the gradient 0 if `broken`, a bool on the device, without waiting for its value."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = torch.where(broken, 0.0, parameter.grad)

    def state_dict(self) -> list[dict]:
        """Whole, whatever is sharded: a run may go on with another number of processes."""
        return [shards.gather(part.state_dict()) for part in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for part, state in zip(self.parts, states, strict=True):
            held = [parameter for group in part.param_groups for parameter in group["params"]]
            moments = {
                number: {k: shards.shard(v, held[number]) for k, v in values.items()}
                for number, values in state["state"].items()
            }
            part.load_state_dict({**state, "state": moments})


def learning_rate(step: int, args) -> float:
    """Linear warm-up over --warmup steps, then a cosine from the peak down to a tenth of it."""
    if step < args.warmup:
        return args.learning_rate * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
