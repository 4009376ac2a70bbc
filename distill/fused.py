"""A lesson's loss without the logits: from hidden states and heads, a chunk of tokens at a time.

    compute_loss(logits, ...)                               logits (B, S, V), as the lesson has it
    fused_loss(compute_loss, (hidden, head), ..., weight=)  the same value and the same gradients

Logits are the largest tensors of a distillation step: B*S = 4,096 tokens at V = 32,768 are 0.5 GB
in float32, and the plain formula keeps about eight of them until the backward pass. But a token's
loss and gradient need only that token's logits. So the lesson's own `compute_loss` is given a chunk
of tokens, and at once its gradients go on to hidden states and head; then its logits are forgotten.
A chunk is a mean over its own tokens and counts by them, as a micro-batch does in a step. Liger
(2410.10989) and cut cross-entropy (2411.09009) do the same inside a GPU kernel.

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width of the student, E of the teacher.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

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
    compute_loss: Callable, student: tuple[Tensor, Tensor], *others,
    weight: Tensor, chunk: int | None = None, compiled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """What compute_loss(student_logits, *others) returns: a loss, a scalar, and its named parts.

    student: hidden states (..., D) and head (V, D) for the logits. others: what else compute_loss
    takes; a pair of hidden states (..., E) and head (V, E), which get no gradient, where that is
    logits; of a tensor (..., any) a chunk's rows; the rest as it is. weight (...): what a token
    counts in the means that compute_loss returns. chunk: tokens that have logits at once. compiled:
    what a chunk computes becomes a few passes over memory. Under autocast heads multiply in its
    precision; loss and sums stay float32."""
    (hidden, head), dims = student, weight.ndim
    weight = weight.flatten().to(torch.promote_types(hidden.dtype, torch.float32))
    total = weight.sum()
    total = torch.where(total > 0, total, 1.0)  # a batch without a token has loss 0
    ignored = (weight == 0)[:, None]

    def part_of(x, rows: slice):
        """Of a chunk what compute_loss is given: logits (C, V), a tensor's rows, or x itself."""
        if isinstance(x, tuple):
            hidden = x[0].flatten(0, -2)[rows].masked_fill(ignored[rows], 0.0)
            return F.linear(hidden.to(dtype), x[1])
        return x.flatten(0, dims - 1)[rows] if isinstance(x, Tensor) else x

    # What is not finite at a token that counts nothing must not reach the sums: 0 * inf is NaN.
    hidden = hidden.flatten(0, -2).masked_fill(ignored, 0.0)
    size = chunk or chunk_size(len(head)) // 2  # as a formula keeps several tensors of logits
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else head.dtype  # of the products
    hidden_grad = torch.zeros_like(hidden) if hidden.requires_grad else None
    head_grad = torch.zeros_like(head, dtype=weight.dtype) if head.requires_grad else None
    loss, parts = 0.0, {}
    compute_loss = compiled_once(compute_loss) if compiled else compute_loss
    with torch.no_grad(), torch.autocast(device, enabled=False):
        head_cast = head.to(dtype)
        others = [(x[0], x[1].to(dtype)) if isinstance(x, tuple) else x for x in others]
        for start in range(0, max(len(hidden), 1), size):
            rows = slice(start, start + size)
            given, part = [part_of(x, rows) for x in others], hidden[rows].to(dtype)
            logits = F.linear(part, head_cast).requires_grad_()
            with torch.enable_grad():
                chunk_loss, chunk_parts = compute_loss(logits, *given)
            share = (weight[rows].sum() / total).to(chunk_loss)
            grad = torch.autograd.grad(chunk_loss, logits, share)[0]
            loss = loss + share * chunk_loss.detach()
            for name, value in chunk_parts.items():
                parts[name] = parts.get(name, 0.0) + share * value.detach()
            if hidden_grad is not None:  # logits = hidden @ head.T
                hidden_grad[rows] = (grad @ head_cast).to(hidden_grad)
            if head_grad is not None and dtype == head_grad.dtype:
                head_grad.addmm_(grad.T, part)
            elif head_grad is not None:
                head_grad += grad.T @ part  # summed over chunks in float32
            del logits, given, grad, chunk_loss, chunk_parts  # before the next chunk's are made
    head_grad = head_grad if head_grad is None else head_grad.to(head)
    return KnownGradients.apply(hidden, head, loss, hidden_grad, head_grad), parts


@cache
def compiled_once(function: Callable) -> Callable:
    return torch.compile(function)


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
