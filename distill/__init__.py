"""How knowledge passes: pure loss functions on tensors, one file per family."""

from .fused import HiddenTeacher, SparseTeacher, fused_mixed_loss
from .logits import cross_entropy, distillation_loss, kl_divergence, mixed_loss
from .reasoning import reasoning_weights, weighted_cross_entropy

__all__ = [
    "HiddenTeacher",
    "SparseTeacher",
    "cross_entropy",
    "distillation_loss",
    "fused_mixed_loss",
    "kl_divergence",
    "mixed_loss",
    "reasoning_weights",
    "weighted_cross_entropy",
]
