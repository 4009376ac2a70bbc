"""The loss of lesson 2 without the logits: from hidden states and heads, a chunk at a time.

    compute_loss   alpha * CE + (1 - alpha) * T^2 * KL on logits (B, S, V), train_distillation.py
    fused_loss     the same value and the same gradients, from hidden states (B, S, D)

Logits are the largest tensors of a distillation step: B*S = 4,096 tokens at V = 32,768 are 0.5 GB
in float32, and the plain formula keeps about eight of them until the backward pass. But a token's
loss and gradient need only that token's logits. So a chunk of tokens goes through both heads, gives
its loss and at once its gradients to hidden states and head; then its logits are forgotten. The
backward pass multiplies those gradients by the one that comes in (usually 1). Liger (2410.10989)
and cut cross-entropy (2411.09009) do the same inside a GPU kernel.

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width of the student, E of the teacher.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .logits import IGNORE, check_temperature

CHUNK, CHUNK_LOGITS = 128, 2**20  # a chunk: so many tokens, or more at a small vocabulary
MOST_BYTES = 256 * 2**20  # of a batch's float32 logits, above which --fused auto is on


def use_fused(choice: str, tokens: int, vocab_size: int) -> bool:
    """--fused yes, no or auto: whether the logits of `tokens` tokens would fill memory; printed."""
    size = 4 * tokens * vocab_size
    if choice == "auto" and size > MOST_BYTES:
        print(f"--fused: the logits of a batch would take {size / 2**20:,.0f} MB, so none are made")
    return choice == "yes" or (choice == "auto" and size > MOST_BYTES)


def chunk_size(vocab_size: int) -> int:
    """Tokens that have logits at once."""
    return max(CHUNK, CHUNK_LOGITS // vocab_size)


def fused_loss(
    student_hidden: Tensor, student_head: Tensor, teacher: tuple[Tensor, Tensor] | None,
    labels: Tensor, temperature: float = 1.0, alpha: float = 1.0, weights: Tensor | None = None,
    chunk: int | None = None, compiled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """alpha * CE + (1 - alpha) * T^2 * KL, a scalar, and its parts "ce" and "kl".

    student_hidden (..., D), student_head (V, D); teacher: hidden states (..., E) and head (V, E),
    which get no gradient, or None at alpha = 1. labels (...), -100 is ignored; weights (...) of
    the tokens, by default 1. chunk: tokens that have logits at once. compiled: what a chunk
    computes becomes a few passes over memory. Under autocast the heads multiply in its precision;
    softmax, loss and sums stay float32. Raises ValueError for what cannot be computed."""
    check_temperature(temperature)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha {alpha} must be between 0 (only the teacher) and 1 (only labels)")
    if alpha < 1 and teacher is None:
        raise ValueError(f"alpha {alpha} needs a teacher; without one use alpha 1")
    if alpha < 1 and len(teacher[1]) != len(student_head):
        sizes = f"teacher vocabulary {len(teacher[1])} != student vocabulary {len(student_head)}"
        raise ValueError(f"{sizes}: both must use one tokenizer")
    hidden, labels = student_hidden.flatten(0, -2), labels.flatten()  # (N, D), (N,)
    valid = (labels != IGNORE).to(torch.promote_types(hidden.dtype, torch.float32))
    weights = valid if weights is None else weights.flatten().to(valid) * valid
    total = weights.sum()
    share = weights / torch.where(total > 0, total, 1.0)  # a batch without a token has loss 0
    # What is not finite at a token that counts nothing must not reach the sums: 0 * inf is NaN.
    ignored = (weights == 0)[:, None]
    hidden, head = hidden.masked_fill(ignored, 0.0), student_head
    if alpha < 1:
        teacher_hidden = teacher[0].detach().flatten(0, -2).masked_fill(ignored, 0.0)
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.dtype  # of the products
    hidden_grad = torch.zeros_like(hidden) if hidden.requires_grad else None
    head_grad = torch.zeros_like(head, dtype=share.dtype) if head.requires_grad else None
    sums = torch.zeros(3, dtype=share.dtype, device=hidden.device)  # loss, CE, KL
    of_chunk = compiled_chunk_loss() if compiled else chunk_loss
    size = chunk or chunk_size(len(head))
    with torch.no_grad(), torch.autocast(device, enabled=False):
        head_cast = head.to(dtype)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            part, guess = hidden[rows].to(dtype), None
            if alpha < 1:
                guess = F.linear(teacher_hidden[rows].to(dtype), teacher[1].to(dtype))
                guess = guess.to(share.dtype)
            logits = F.linear(part, head_cast).to(share.dtype)
            values, grad = of_chunk(logits, guess, labels[rows], share[rows], temperature, alpha)
            sums, grad = sums + values, grad.to(dtype)
            if hidden_grad is not None:  # logits = hidden @ head.T
                hidden_grad[rows] = (grad @ head_cast).to(hidden_grad)
            if head_grad is not None and dtype == head_grad.dtype:
                head_grad.addmm_(grad.T, part)
            elif head_grad is not None:
                head_grad += grad.T @ part  # summed over chunks in float32
    head_grad = head_grad if head_grad is None else head_grad.to(head)
    loss = KnownGradients.apply(hidden, head, sums[0], hidden_grad, head_grad)
    return loss, ({"ce": sums[1]} if alpha > 0 else {}) | ({"kl": sums[2]} if alpha < 1 else {})


def chunk_loss(logits, teacher_logits, labels, share, temperature, alpha):
    """Loss, CE and KL of a chunk (3,), and the loss's gradient to its logits (C, V), by autograd.
    labels (C,); share (C,): what each token counts in the means."""
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        log_probs = logits.log_softmax(-1)
        ce = kl = logits.new_zeros(())
        if alpha > 0:
            known = labels.masked_fill(labels == IGNORE, 0)
            chosen = log_probs.gather(-1, known[:, None]).squeeze(-1)
            ce = -torch.where(share > 0, share * chosen, 0.0).sum()
        if alpha < 1:
            if temperature != 1.0:
                log_probs = (logits / temperature).log_softmax(-1)
            teacher_log_probs = (teacher_logits / temperature).log_softmax(-1)
            teacher_probs = teacher_log_probs.exp()
            terms = teacher_probs * (teacher_log_probs - log_probs)
            per_token = torch.where(teacher_probs == 0, 0.0, terms).sum(-1)
            kl = torch.where(share > 0, share * per_token, 0.0).sum()
        loss = alpha * ce + (1 - alpha) * temperature**2 * kl
        return torch.stack((loss, ce, kl)).detach(), torch.autograd.grad(loss, logits)[0]


@cache
def compiled_chunk_loss():
    return torch.compile(chunk_loss)


class KnownGradients(torch.autograd.Function):
    """A loss whose gradients to hidden states and head are at hand already."""

    @staticmethod
    def forward(ctx, hidden, head, loss, hidden_grad, head_grad):
        ctx.save_for_backward(hidden_grad, head_grad)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        gradients = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return *gradients, None, None, None
