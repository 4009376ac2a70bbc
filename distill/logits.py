"""Distillation by logits, token by token: what evaluation, methods and tests share.

    KL(p_T || q_T) = sum_v p_T(v) * (log p_T(v) - log q_T(v))

p_T = softmax(teacher_logits / T), q_T = softmax(student_logits / T); train_distillation.py says why
and mixes it, alpha * CE + (1 - alpha) * T^2 * KL. Convention: alpha sits on cross-entropy, as in
MiniMind. torchtune, MiniLLM and DistiLLM put their ratio on the KL instead; TRL, torchtune and
Liger leave T^2 out.

Everything is computed in float32 or better: softmax in bfloat16 is coarse enough to give negative
divergences. (F.kl_div's reduction="batchmean" is not a mean over tokens on (B, S, V): it divides by
B alone.) Shapes: B batch, S sequence, V vocabulary; ... stands for (B, S) or (N,).
"""

import torch
from torch import Tensor

IGNORE = -100


def at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def check_shapes(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        shapes = f"student logits {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"{shapes} of the teacher differ in shape: use one batch, one tokenizer")


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """sum(weights * values) / sum(weights); 0 with a gradient path if all weigh 0."""
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype)
    total = weights.sum()
    # where, not *: a value that is not finite at a masked position must not reach the sum.
    summed = torch.where(weights > 0, weights * values, 0.0).sum()
    return summed / torch.where(total > 0, total, 1.0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of every token: logits (..., V), labels (...) -> (...).
    Labels of -100 give 0; another label outside 0 .. V-1 is an error of gather."""
    log_probs = at_least_float32(logits).log_softmax(-1)
    ignored = labels == IGNORE
    chosen = log_probs.gather(-1, labels.masked_fill(ignored, 0)[..., None]).squeeze(-1)
    return torch.where(ignored, 0.0, -chosen)


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of every token at `temperature`, without T^2: (..., V) -> (...)."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be a positive number")
    check_shapes(student_logits, teacher_logits)
    student_log_probs = (at_least_float32(student_logits) / temperature).log_softmax(-1)
    teacher_logits = at_least_float32(teacher_logits.detach())
    teacher_log_probs = (teacher_logits / temperature).log_softmax(-1)
    teacher_probs = teacher_log_probs.exp()
    terms = teacher_probs * (teacher_log_probs - student_log_probs)
    # 0 log 0 = 0: a token that the teacher rules out (a logit of -inf) adds nothing.
    return torch.where(teacher_probs == 0, 0.0, terms).sum(-1)


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, temperature=1.0
) -> Tensor:
    """T^2 * KL(teacher || student), a scalar: the mean over tokens where mask is true.
    student_logits, teacher_logits: (B, S, V). mask: (B, S), bool, or non-negative weights."""
    per_token = kl_divergence(student_logits, teacher_logits, temperature)
    return temperature**2 * weighted_mean(per_token, mask)
