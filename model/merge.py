"""One model made of several of one shape: the weighted average of their weights.

    theta = sum_i w_i theta_i        w = softmax(-losses / tau)

It needs models that descend from one: only those have their hidden units in the same order.
"""

import torch
from torch import Tensor


def merge_weights(losses: list[float], tau: float) -> list[float]:
    """softmax(-losses / tau): a lower loss weighs more."""
    return (-torch.tensor(losses, dtype=torch.float64) / tau).softmax(0).tolist()


def merge(states: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """The weighted average of state_dicts of equal shapes, in float32."""
    assert abs(sum(weights) - 1) < 1e-6, "the model would shrink or grow"
    pairs = list(zip(weights, states, strict=True))
    return {name: sum(w * state[name].float() for w, state in pairs) for name in states[0]}
