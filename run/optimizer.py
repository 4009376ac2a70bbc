"""The optimizer and the learning-rate schedule.

Muon (Jordan et al. 2024) takes the momentum of a weight matrix to the nearest matrix whose singular
values are all 1, so that every direction of the matrix learns at one speed. It suits hidden
matrices only; embeddings, norms and biases go to AdamW. torch.optim.Muon with "match_rms_adamw"
scales its updates to the size of AdamW's (Liu et al. 2025, 2502.16982), so both share one rate.
"""

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from model.device import choose_precision

from . import parallel, shards


class InFloat32(TorchFunctionMode):
    """torch.optim.Muon rounds its matrices to bfloat16, whose products take 17 times as long as
    those of float32 on a CPU without instructions for them: there it computes in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = Tensor.float if func is Tensor.bfloat16 else func
        return func(*args, **(kwargs or {}))


class Optimizer:
    """AdamW alone, or Muon beside AdamW, for some modules, behind one update and state_dict. What
    is not a Transformer learns by AdamW without decay, what is frozen not at all."""

    def __init__(self, modules, args):
        matrices, embeddings, vectors, extra = [], [], [], []
        for module in modules:
            for name, parameter in module.named_parameters():
                embeds = "embed_tokens" in name or "lm_head" in name
                kind = vectors if parameter.ndim < 2 else embeddings if embeds else matrices
                kind = kind if hasattr(module, "lm_head") else extra
                if parameter.requires_grad:
                    kind.append(parameter)
        rate, decay, muon = args.learning_rate, args.weight_decay, args.optimizer != "adamw"
        groups = [
            {"params": embeddings, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},  # a norm's scale should not shrink
            {"params": [] if muon else matrices, "weight_decay": decay},
        ]
        self.parts: list[torch.optim.Optimizer] = []
        self.precision = contextlib.nullcontext()
        if muon and matrices and choose_precision("auto", matrices[0].device) == "float32":
            self.precision = InFloat32()
        if muon and matrices:
            size = {"adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, **size))
        # Sharded and whole tensors may not be in one optimizer.
        for some in (groups, [{"params": extra, "weight_decay": 0.0}]):
            some = [group for group in some if group["params"]]
            if some:
                self.parts.append(torch.optim.AdamW(some, lr=rate, betas=(0.9, 0.95), fused=True))
        self.parameters, self.args = matrices + embeddings + vectors + extra, args

    def clip(self, scale: Tensor | None = None) -> Tensor:
        """Sum the gradients over processes, multiply them by `scale` and clip them as a whole;
        returns their norm before clipping, a scalar."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        whole = [gradient for gradient in gradients if not shards.is_sharded(gradient)]
        sharded = [gradient for gradient in gradients if shards.is_sharded(gradient)]
        parallel.sum_gradients(whole)  # fully_shard has summed the others in backward
        if scale is not None:
            multiply(gradients, scale)
        norms = [nn.utils.get_total_norm(some) for some in (whole, sharded) if some]
        norms = [norm.full_tensor() if shards.is_sharded(norm) else norm for norm in norms]
        norm = torch.stack(norms).norm() if len(norms) > 1 else sum(norms, torch.zeros(()))
        if self.args.grad_clip > 0:
            multiply(gradients, (self.args.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def update(self, rate: float) -> None:
        """Change the weights at `rate`, clear the gradient."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            with self.precision:
                part.step()
        self.clear()

    def clear(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def clear_where(self, nonfinite: Tensor) -> None:
        """Make the gradient 0 if `nonfinite`, a bool on the device, without waiting for it."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = torch.where(nonfinite, 0.0, parameter.grad)

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


def multiply(gradients: list[Tensor], scale: Tensor) -> None:
    for gradient in gradients:
        gradient.mul_(float(scale) if shards.is_sharded(gradient) else scale)


def learning_rate(step: int, steps: float, args) -> float:
    """Linear warm-up over --warmup steps, then a cosine from the peak down to a tenth of it.
    steps: of the whole run, as far as is known: infinite at the start of a run of --seconds."""
    if step < args.warmup:
        return args.learning_rate * (step + 1) / args.warmup
    progress = min(1.0, (step - args.warmup) / max(1, steps - args.warmup))
    return args.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
