"""Shapes of one size: how the same number of parameters may be spent on depth and width.

    parameters = V D + L (2 D^2 + 2 D d + 3 D I + 2 D) + D     one key-value head, a tied head

V D is the embedding: the wider a small model, the less is left for its layers. I is what is free.
How well one ranking of them foretells another: kendall_tau.
Shapes: V vocabulary, D width, L layers, d = D / H head width, I feed-forward units.
"""

from .config import ModelConfig
from .transformer import Transformer

MOST_LAYERS, WIDEST = 12, 1024


def shapes_of_size(count: int, like: ModelConfig) -> dict[str, tuple]:
    """`count` presets of as many parameters as `like`, within 2%, from shallow to deep."""
    V, size, found = like.vocab_size, Transformer(like).num_parameters(), {}
    for L in range(1, MOST_LAYERS + 1):
        for D in range(16, WIDEST + 1, 8):
            H = max(1, D // 32)
            if D % (2 * H):
                continue
            attention = 2 * D * D + 2 * D * (D // H)  # one key-value head
            left = size - V * D - D - L * (attention + 2 * D)
            I = round(left / (3 * D * L))  # noqa: E741
            if D / 2 <= I <= 8 * D:  # neither all attention nor none
                found[f"d{D}-l{L}"] = (D, L, H, 1, I, like.max_position_embeddings)
    if len(found) < count:
        raise ValueError(f"--shapes {count}: only {len(found)} of this size, lower it")
    names = sorted(found, key=lambda name: found[name][1] / found[name][0])
    picked = [names[i * (len(names) - 1) // (count - 1)] for i in range(count)]
    return {name: found[name] for name in picked}


def kendall_tau(first: list[float], second: list[float]) -> float:
    """Of two lists of n scores: 1 same order, -1 opposite; a tie in either is neither."""
    n, total = len(first), 0
    for i in range(n):
        for j in range(i):
            product = (first[i] - first[j]) * (second[i] - second[j])
            total += (product > 0) - (product < 0)
    return total / (n * (n - 1) / 2)
