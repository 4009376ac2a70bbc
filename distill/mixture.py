"""Which teacher to trust how much: the weights of a mixture, learned from labels.

    maximise over w   mean over n of log sum_k w_k p_k(label_n),   w_k >= 0, sum_k w_k = 1

EM (Dempster, Laird & Rubin 1977): a teacher's weight becomes its mean share in the probability that
the mixture gives to the labels. No step lowers the mean, and there is no rate to choose.
Shapes: K teachers, N labels.
"""

import torch
from torch import Tensor


def mixture_weights(losses: Tensor, rounds: int = 100) -> Tensor:
    """w (K,) that sum to 1, from each teacher's cross-entropy of each label, losses (K, N)."""
    weights = torch.full_like(losses[:, 0], 1 / len(losses))
    for _ in range(rounds):
        weights = (weights.log()[:, None] - losses).softmax(0).mean(1)
    return weights
