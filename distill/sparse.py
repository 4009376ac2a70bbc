"""What to keep of a distribution over V tokens, where k numbers must do.

    top_k     the k likeliest tokens, and the mass of all others as one number. Nobody says how that
              mass is spread, so a loss made of it is biased: less with more k.
    sample    k tokens drawn so that the gradient is right on average (after sparse logit sampling,
              Anshumann et al. 2025, 2503.16870): unbiased, but noisy.

Shapes: N tokens, V vocabulary, k kept tokens.
"""

import torch
from torch import Tensor


def top_k(log_probs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids and log_probs (N, k) of the k likeliest of (N, V), and log of the others' mass (N,)."""
    kept, ids = log_probs.topk(k, dim=-1)
    others = log_probs.scatter(-1, ids, -torch.inf)
    return ids, kept, others.logsumexp(-1)


def sample(log_probs: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """k ids and log weights (N, k), so that E[weight of v] = p_v; and the entropy (N,).
    Tokens likelier than a threshold t are kept with their own p. Any other is kept with
    probability p / t, and then stands for t: p / t * t = p on average. t is such that k are kept.
    The draw is systematic (Madow 1949): sample points at t * (u + 0, 1, 2, ...) on the tokens laid
    end to end, with one u per row; so the weights sum to 1 exactly, and vary less than independent
    draws from p (the paper's), which need several slots for a likely token."""
    probs = log_probs.double().exp()  # float32 cumulative sums are off by more than a rare token
    top, top_ids = probs.topk(k, dim=-1)
    left = (1 - top.cumsum(-1) + top).clamp(min=0)  # mass from the j-th likeliest on
    slots = torch.arange(k, 0, -1, device=probs.device)  # slots from the j-th on
    kept = (top * slots > left).cumprod(-1).bool()  # likelier than what is left per slot
    count = kept.sum(-1, keepdim=True)  # (N, 1) tokens that are kept for certain
    cdf = probs.scatter(-1, top_ids, torch.where(kept, 0.0, top)).cumsum(-1)
    threshold = cdf[:, -1:] / (k - count).clamp(min=1)
    start = torch.rand(len(probs), 1, generator=generator, device=probs.device, dtype=probs.dtype)
    points = (start + torch.arange(k, device=probs.device) - count) * threshold
    drawn = torch.searchsorted(cdf, points, right=True).clamp(max=probs.shape[-1] - 1)
    # The first `count` slots are the certain ones, the others the drawn.
    ids = torch.where(kept, top_ids, drawn)
    weights = torch.where(kept, top, threshold.expand_as(top))
    return ids, weights.log(), -torch.xlogy(probs, probs).sum(-1)
