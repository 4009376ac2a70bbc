"""How far a student's next-token distribution is from its teacher's: eight answers, token by token.

    forward_kl         KL(p || q)                                  covers all that p holds likely
    reverse_kl         KL(q || p)                                  says only what p holds likely
    jeffreys           KL(p || q) + KL(q || p)
    jensen_shannon     beta KL(p || m) + (1 - beta) KL(q || m),    m = beta p + (1 - beta) q
    skew_kl            KL(p || skew p + (1 - skew) q)              at most log(1 / skew)
    skew_reverse_kl    KL(q || skew q + (1 - skew) p)              at most log(1 / skew)
    total_variation    1/2 sum_v |p(v) - q(v)|                     0 to 1
    adaptive_kl        (head KL(p || q) + tail KL(q || p)) / (head + tail)

p = softmax(teacher_logits), q = softmax(student_logits), KL(a || b) = sum_v a(v) log(a(v) / b(v)).
Every one is 0, with gradient 0, where q = p. No gradient reaches the teacher; all others flow, also
through q in a mixture. Softmax in float32 or better. For a temperature, divide both logits by it.

A token that both rule out (a logit of -inf) adds nothing. One that only the second argument of a KL
rules out makes that KL infinite: the value is inf, and its gradient 0, never NaN.

Names are used differently elsewhere: beta is the teacher's weight here and in GKD (2306.13649) and
TRL, the student's in DistiLLM's js_distance. Shapes: V vocabulary; ... stands for (B, S) or (N,).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .logits import at_least_float32, check_shapes


def log_probs(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """log q and log p (..., V). Raises ValueError where the shapes differ."""
    check_shapes(student_logits, teacher_logits)
    log_q = at_least_float32(student_logits).log_softmax(-1)
    return log_q, at_least_float32(teacher_logits.detach()).log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum_v a (log a - log b), of log-probabilities: (..., V) -> (...)."""
    a = log_a.exp()
    ruled_out = (a > 0) & (log_b == -torch.inf)
    # Chosen before the product: where a = 0, 0 * inf would be NaN, if only in the gradient.
    log_ratio = torch.where((a == 0) | ruled_out, 0.0, log_a - log_b)
    return (a * log_ratio).sum(-1).masked_fill(ruled_out.any(-1), torch.inf)


def log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b), of log-probabilities (..., V)."""
    mixture = weight * log_a.exp() + (1 - weight) * log_b.exp()
    # log 0 has no gradient, and neither has torch.logaddexp(-inf, -inf).
    return mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p || q), the one of lesson 2 at temperature 1: (..., V) twice -> (...)."""
    log_q, log_p = log_probs(student_logits, teacher_logits)
    return kl(log_p, log_q)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(q || p), as in MiniLLM (2306.08543), on given text: (..., V) twice -> (...)."""
    log_q, log_p = log_probs(student_logits, teacher_logits)
    return kl(log_q, log_p)


def jeffreys(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p), the sum and not the mean: (..., V) twice -> (...)."""
    log_q, log_p = log_probs(student_logits, teacher_logits)
    return kl(log_p, log_q) + kl(log_q, log_p)


def jensen_shannon(
    student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5, normalised: bool = False
) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q: (..., V) twice -> (...).

    By itself it vanishes at both ends, so a small beta is a small learning rate more than another
    loss. normalised: divided by beta (1 - beta). That form tends to KL(p || q) as beta -> 0, to
    KL(q || p) as beta -> 1, and is those at 0 and 1. TRL returns them there without the division,
    a jump: raises ValueError at 0 and 1 unless normalised, and for a beta outside of them.
    """
    if normalised and beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(student_logits, teacher_logits)
    if not 0 < beta < 1:
        cure = "use one between, or the normalised form, whose ends are the two KLs"
        raise ValueError(f"the Jensen-Shannon divergence of beta {beta} teaches nothing: {cure}")
    log_q, log_p = log_probs(student_logits, teacher_logits)
    log_m = log_mixture(log_p, log_q, beta)
    value = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return value / (beta * (1 - beta)) if normalised else value


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || skew p + (1 - skew) q), DistiLLM (2402.03898): (..., V) twice -> (...). Theirs leaves
    out p's entropy: another value of the same gradient."""
    log_q, log_p = log_probs(student_logits, teacher_logits)
    return kl(log_p, log_mixture(log_p, log_q, skew))


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, skew: float = 0.1) -> Tensor:
    """KL(q || skew q + (1 - skew) p), DistiLLM (2402.03898): (..., V) twice -> (...). DistiLLM-2
    (2503.07067) detaches the q of the mixture: the same value of another gradient."""
    log_q, log_p = log_probs(student_logits, teacher_logits)
    return kl(log_q, log_mixture(log_q, log_p, skew))


def total_variation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1/2 sum_v |p - q|, f-distill (2307.15190): (..., V) twice -> (...). 1 minus it is how often
    speculative decoding accepts the student's token. Its gradient at a logit is proportional to q:
    a student that gives a token nearly nothing hardly learns it."""
    log_q, log_p = log_probs(student_logits, teacher_logits)
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def adaptive_kl(student_logits: Tensor, teacher_logits: Tensor, head_mass: float = 0.5) -> Tensor:
    """Forward KL weighted by how wrong the head is, reverse KL by the tail, AKL (2404.02657):
    (..., V) twice -> (...).

    The head is p's likeliest tokens whose probabilities add up to at most head_mass, the first one
    always; head and tail are sum |p - q| over them and over the others, without gradient."""
    log_q, log_p = log_probs(student_logits, teacher_logits)
    p, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    gap = (p - log_q.exp().gather(-1, order)).abs().detach()  # (..., V), sorted
    in_head = p.cumsum(-1) <= head_mass
    in_head[..., 0] = True
    head, tail = (torch.where(part, gap, 0.0).sum(-1) for part in (in_head, ~in_head))
    head, tail = (torch.where(head + tail == 0, 0.5, x / (head + tail)) for x in (head, tail))
    forward, reverse = head * kl(log_p, log_q), tail * kl(log_q, log_p)
    return torch.where(head == 0, 0.0, forward) + torch.where(tail == 0, 0.0, reverse)  # 0 * inf


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jeffreys": jeffreys,
    "jensen_shannon": jensen_shannon,
    "jensen_shannon_normalised": partial(jensen_shannon, normalised=True),
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "total_variation": total_variation,
    "adaptive_kl": adaptive_kl,
}
