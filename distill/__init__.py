"""How knowledge passes: pure loss functions on tensors, one file per family."""

from .logits import cross_entropy, distillation_loss, kl_divergence, mixed_loss
from .reasoning import reasoning_weights, weighted_cross_entropy

__all__ = [
    "cross_entropy",
    "distillation_loss",
    "kl_divergence",
    "mixed_loss",
    "reasoning_weights",
    "weighted_cross_entropy",
]
