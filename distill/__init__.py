"""How knowledge passes: pure functions on tensors, one file a family."""

from .fused import fused_loss, use_fused
from .logits import at_least_float32, cross_entropy, distillation_loss, kl_divergence, weighted_mean
from .reasoning import reasoning_weights, weighted_cross_entropy
