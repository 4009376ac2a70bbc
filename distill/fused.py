"""The mixed loss without the logits: from hidden states and heads, a chunk of tokens at a time.

    mixed_loss        alpha * CE + (1 - alpha) * T^2 * KL on logits (B, S, V), distill/logits.py
    fused_mixed_loss  the same value and the same gradients, from hidden states (B, S, D)

Logits are the largest tensors of a distillation step: B*S = 4,096 tokens at V = 32,768 are 0.5 GB
in float32, the plain formula keeps about eight of them, and most of its time goes into moving them
through memory. But a token's loss and gradient need only that token's logits. So a chunk of
tokens goes through both heads, gives its loss and its gradient, and its logits are forgotten.

The gradient is written by hand. With q = softmax(z), q_T = softmax(z / T), p_T = softmax(y / T) for
student logits z and teacher logits y, a token whose cross-entropy counts `a` in the loss and whose
KL counts `b` (T^2 included) has

    d loss / d z = a * (q - onehot(label)) + b / T * (q_T - p_T)

Through the head, z = hidden @ head.T:

    d loss / d hidden = dz @ head            d loss / d head = sum over chunks of dz.T @ hidden

so the forward pass has both gradients at hand and keeps them, D numbers a token and one head's
size; the backward pass only multiplies them by the gradient that comes in (usually 1). Liger
(2410.10989) and cut cross-entropy (2411.09009) do the same inside a GPU kernel.

The teacher is one of: hidden states and head; logits, such as log-probabilities from a file; or
`SparseTeacher`, of which k probabilities a token were kept (dataset/cache_teacher.py).

Shapes: N tokens, C tokens of a chunk, V vocabulary, D width of the student, E of the teacher.
"""

from dataclasses import dataclass, fields
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .logits import IGNORE, check_alpha, check_temperature

CHUNK, CHUNK_LOGITS = 256, 2**20  # a chunk: so many tokens, or more at a small vocabulary

HUGE = 1e30  # stands for infinity where it is multiplied by 0


@dataclass(frozen=True)
class SparseTeacher:
    """k probabilities a token, at the temperature of the loss.

    ids (..., k): different tokens. probs (..., k): theirs, or an unbiased sample's weights.
    tail (...,): the mass of all other tokens, compared as one bucket with the student's mass there;
    None for a sample, whose weights already sum to 1.
    entropy (...,): of the whole distribution, for a sample; None with a tail. Only the value of the
    loss needs it: KL = -entropy - sum of probs * log q.
    """

    ids: Tensor
    probs: Tensor
    tail: Tensor | None = None
    entropy: Tensor | None = None

    def map(self, function) -> "SparseTeacher":
        """function applied to every tensor."""
        values = (getattr(self, field.name) for field in fields(self))
        return SparseTeacher(*(None if value is None else function(value) for value in values))


@dataclass(frozen=True)
class HiddenTeacher:
    """Hidden states (..., E) and the head (V, E) that makes logits of them."""

    hidden: Tensor
    head: Tensor


Teacher = HiddenTeacher | SparseTeacher | Tensor | None


def fused_mixed_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher: Teacher,
    labels: Tensor | None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.5,
    chunk: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """alpha * CE + (1 - alpha) * T^2 * KL, a scalar, equal to `mixed_loss` of the logits.

    student_hidden (B, S, D), student_head (V, D). teacher: HiddenTeacher, SparseTeacher or logits
    (B, S, V), never given a gradient; None at alpha = 1. labels (B, S), -100 is ignored; None at
    alpha = 0. mask (B, S): valid tokens, or their weights. chunk: tokens that have logits at once.
    compiled: what a chunk computes between its matrix products becomes a few passes over memory.
    Under autocast the heads multiply in its precision; softmax, loss and sums stay float32.
    Raises ValueError like `mixed_loss`.
    """
    check_alpha(alpha, labels, teacher)
    check_temperature(temperature)
    if isinstance(teacher, HiddenTeacher) and len(teacher.head) != len(student_head):
        raise ValueError(
            f"teacher vocabulary {len(teacher.head)} != student vocabulary {len(student_head)}: "
            "both must use one tokenizer"
        )
    lead = student_hidden.ndim - 1  # dimensions that number the tokens
    hidden = student_hidden.flatten(0, lead - 1)
    if labels is not None:
        labels = labels.flatten()
    if mask is None:
        mask = torch.ones_like(hidden[:, 0]) if labels is None else labels != IGNORE
    weights = mask.flatten().to(torch.promote_types(hidden.dtype, torch.float32))
    ce_weights = kl_weights = None
    if alpha > 0:
        labelled = weights * (labels != IGNORE)
        ce_weights = alpha * labelled / positive(labelled.sum())
    if alpha < 1:
        kl_weights = (1 - alpha) * temperature**2 * weights / positive(weights.sum())
    # What is not finite at a masked token must not reach the sums: 0 * inf is NaN.
    masked = weights == 0
    return FusedMixedLoss.apply(
        hidden.masked_fill(masked[:, None], 0.0),
        student_head,
        flatten(teacher, masked, lead) if alpha < 1 else None,
        labels,
        ce_weights,
        kl_weights,
        temperature,
        chunk or chunk_of(len(student_head)),
        compiled_loss_and_gradient() if compiled else loss_and_gradient,
    )


def chunk_of(vocab_size: int) -> int:
    """Tokens that have logits at once."""
    return max(CHUNK, CHUNK_LOGITS // vocab_size)


def positive(total: Tensor) -> Tensor:
    """total, or 1 where it is 0: a batch without a valid token has loss 0, not NaN."""
    return torch.where(total > 0, total, torch.ones_like(total))


def flatten(teacher: Teacher, masked: Tensor, lead: int) -> Teacher:
    """The teacher's tensors with their first `lead` dimensions as one, zero at masked tokens."""

    def rows(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().flatten(0, lead - 1)
        return tensor.masked_fill(masked[:, None] if tensor.ndim == 2 else masked, 0)

    if isinstance(teacher, SparseTeacher):
        return teacher.map(rows)
    if isinstance(teacher, HiddenTeacher):
        return HiddenTeacher(rows(teacher.hidden), teacher.head.detach())
    return rows(teacher)


class FusedMixedLoss(torch.autograd.Function):
    """The sum over tokens of ce_weights * CE + kl_weights * KL, and its gradients, in chunks.

    hidden (N, D), head (V, D), labels, ce_weights and kl_weights (N,); weights of None leave that
    half out. Gradients go to hidden and head.
    """

    @staticmethod
    def forward(
        ctx, hidden, head, teacher, labels, ce_weights, kl_weights, temperature, chunk, of_logits
    ):
        device = hidden.device.type
        # In autocast's precision: matrices multiply in `low`, everything else is `high`.
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
        high = torch.promote_types(low, torch.float32)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        head_low = head.to(low)
        loss = torch.zeros((), dtype=high, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if need_hidden else None
        head_grad = torch.zeros_like(head, dtype=high) if need_head else None
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                hidden_low = hidden[rows].to(low)
                part, logits_grad = of_logits(
                    F.linear(hidden_low, head_low).to(high),
                    teacher_chunk(teacher, rows, low, high),
                    None if ce_weights is None else labels[rows],
                    None if ce_weights is None else ce_weights[rows],
                    None if kl_weights is None else kl_weights[rows],
                    temperature,
                )
                loss = loss + part  # in place, torch 2.11 compiles a gradient of 0
                logits_grad = logits_grad.to(low)
                if need_hidden:
                    hidden_grad[rows] = logits_grad @ head_low
                if need_head and low == high:
                    head_grad.addmm_(logits_grad.T, hidden_low)  # no (V, D) between
                elif need_head:
                    head_grad += logits_grad.T @ hidden_low  # summed over chunks in float32
        ctx.save_for_backward(hidden_grad, head_grad if head_grad is None else head_grad.to(head))
        return loss

    @staticmethod
    def backward(ctx, grad):
        hidden_grad, head_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * grad.to(hidden_grad),
            None if head_grad is None else head_grad * grad.to(head_grad),
            *[None] * 7,
        )


def teacher_chunk(teacher: Teacher, rows: slice, low, high) -> Tensor | SparseTeacher | None:
    """A chunk of what the teacher says: logits (C, V) in `high`, or its k probabilities."""
    if isinstance(teacher, HiddenTeacher):
        return F.linear(teacher.hidden[rows].to(low), teacher.head.to(low)).to(high)
    if isinstance(teacher, SparseTeacher):
        return teacher.map(lambda tensor: tensor[rows])
    return None if teacher is None else teacher[rows].to(high)


def loss_and_gradient(logits, teacher, labels, ce_weights, kl_weights, temperature):
    """Loss of a chunk, a scalar, and its gradient to logits (C, V).

    Most of the time goes into exponentials, so every distribution has one softmax and nothing else:
    `softmax` tells its log-probabilities too. What is not needed again is worked on in place.
    """
    loss, gradient = 0.0, None
    if ce_weights is not None or temperature == 1.0:
        probs, constant = softmax(logits)  # q
    if ce_weights is not None:
        labels = labels.clamp(min=0)[:, None]  # an ignored label's weight is 0
        chosen = (logits.gather(-1, labels) + constant)[:, 0]  # log q of the label
        loss = -torch.where(ce_weights > 0, ce_weights * chosen, 0.0).sum()
    if kl_weights is None:
        gradient = probs.mul_(ce_weights[:, None])
    else:
        slope = share = kl_weights / temperature
        sparse = isinstance(teacher, SparseTeacher)  # at T already
        if temperature != 1.0:
            gradient = None if ce_weights is None else probs.mul_(ce_weights[:, None])
            logits, teacher = logits / temperature, teacher if sparse else teacher / temperature
            probs, constant = softmax(logits)  # q_T
        elif ce_weights is not None:
            share = slope + ce_weights
        divergence = sparse_kl if sparse else dense_kl
        per_token, soft = divergence(logits, probs, constant, teacher, slope, share)
        loss = loss + (kl_weights * per_token).sum()
        gradient = soft if gradient is None else gradient.add_(soft)
    if ce_weights is not None:
        gradient.scatter_add_(-1, labels, -ce_weights[:, None])
    return loss, gradient


def softmax(logits):
    """softmax of logits (C, V), and the constant (C, 1) by which its logarithm differs from them.

    log(softmax) = logits + constant everywhere, so also where both are largest.
    """
    probs = logits.softmax(-1)
    return probs, probs.amax(-1, keepdim=True).log() - logits.amax(-1, keepdim=True)


@cache
def compiled_loss_and_gradient():
    return torch.compile(loss_and_gradient)


def dense_kl(logits, probs, constant, teacher, slope, share):
    """KL(p || q) of every token (C,), and share * q - slope * p (C, V), which replaces q.

    sum of p * (log p - log q) = sum of p * (logits of p - logits of q), and the difference of their
    constants, as p sums to 1. teacher: its logits (C, V).
    """
    teacher_probs, teacher_constant = softmax(teacher)
    # A token that is ruled out has a logit of -inf: 0 log 0 must become 0.
    difference = (teacher - logits).nan_to_num_(0.0, HUGE, -HUGE)
    per_token = difference.mul_(teacher_probs).sum(-1) + (teacher_constant - constant)[:, 0]
    per_token = torch.where(per_token > HUGE**0.5, torch.inf, per_token)  # p > 0 where q = 0
    gradient = probs.mul_(share[:, None])
    return per_token, gradient.addcmul_(teacher_probs, slope[:, None], value=-1.0)


def sparse_kl(logits, probs, constant, teacher: SparseTeacher, slope, share):
    """Like `dense_kl`, from k probabilities: KL of a sample, or of k tokens and a tail.

    With a tail, KL = sum_k p_k log(p_k / q_k) + p_tail log(p_tail / q_tail) with
    q_tail = 1 - sum_k q_k. Its gradient at a token outside the k is q * (1 - p_tail / q_tail): the
    tail pushes all its tokens by one factor.
    """
    ids, kept = teacher.ids.long(), teacher.probs.to(probs.dtype)
    chosen = logits.gather(-1, ids) + constant  # log q_k
    per_token = -torch.where(kept > 0, kept * chosen, 0.0).sum(-1)  # 0 log 0 = 0
    if teacher.tail is None:
        per_token = per_token - teacher.entropy
        gradient = probs.mul_(share[:, None])
        return per_token, gradient.scatter_add_(-1, ids, -slope[:, None] * kept)
    student_kept = probs.gather(-1, ids)
    tail = teacher.tail.to(probs.dtype)
    student_tail = (1 - student_kept.sum(-1)).clamp(min=1e-6)
    per_token = per_token + torch.xlogy(kept, kept).sum(-1)
    per_token = per_token + torch.xlogy(tail, tail) - torch.xlogy(tail, student_tail)
    ratio = tail / student_tail
    gradient = probs.mul_((share - slope * ratio)[:, None])
    return per_token, gradient.scatter_add_(
        -1, ids, slope[:, None] * (ratio[:, None] * student_kept - kept)
    )
