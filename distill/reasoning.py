"""Distillation by reasoning: cross-entropy on <think>/<answer> traces, some tokens weighing more.

    loss = sum_s w(s) * CE(s) / sum_s w(s)

    w = 0              prompt and padding (label -100)
        tag_weight     on <think>, </think>, <answer>, </answer> themselves (MiniMind: 10)
        think_weight   inside <think> ... </think>
        answer_weight  inside <answer> ... </answer>
        1              elsewhere in the assistant's turn: between the spans, the end of the turn

An unclosed span reaches to the end of its turn; where spans are nested the one that opened last
decides.
"""

import torch
from torch import Tensor

from .logits import IGNORE, cross_entropy, weighted_mean

END_OF_TURN = 2
TAG_IDS = (3, 4, 5, 6)  # <think>, </think>, <answer>, </answer>


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum(weights * CE) / sum(weights), a scalar; 0 (with a gradient path) if nothing weighs.
    logits (B, S, V); labels (B, S), of which -100 counts 0 whatever its weight; weights (B, S),
    non-negative, by default 1."""
    valid = (labels != IGNORE).to(torch.float32)
    weights = valid if weights is None else weights * valid
    return weighted_mean(cross_entropy(logits, labels), weights)


def reasoning_weights(
    labels: Tensor,
    tag_weight: float = 1.0,
    think_weight: float = 1.0,
    answer_weight: float = 1.0,
    tag_ids: tuple[int, int, int, int] = TAG_IDS,
    end_of_turn: int = END_OF_TURN,
) -> Tensor:
    """The weight of every label (B, S) -> (B, S) float32, from the special-token ids alone.
    Raises ValueError for a negative or infinite weight."""
    named = {"tag_weight": tag_weight, "think_weight": think_weight, "answer_weight": answer_weight}
    for name, weight in named.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} {weight} must be a number of at least 0")
    think_open, think_close, answer_open, answer_close = tag_ids
    index = torch.arange(labels.shape[-1], device=labels.device).expand_as(labels)

    def last(where: Tensor) -> Tensor:
        """For every position the index of the last true one up to it, or -1."""
        return torch.where(where, index, -1).cummax(-1).values

    turn_over = (labels == IGNORE) | (labels == end_of_turn)
    thinking_since = last(labels == think_open)
    answering_since = last(labels == answer_open)
    thinking = thinking_since > last(turn_over | (labels == think_close))
    answering = answering_since > last(turn_over | (labels == answer_close))
    thinks = thinking & (~answering | (thinking_since > answering_since))
    answers = answering & ~thinks

    weights = torch.ones(labels.shape, dtype=torch.float32, device=labels.device)
    weights = torch.where(thinks, think_weight, weights)
    weights = torch.where(answers, answer_weight, weights)
    is_tag = torch.isin(labels, torch.tensor(tag_ids, device=labels.device))
    weights = torch.where(is_tag, tag_weight, weights)
    return torch.where(labels == IGNORE, 0.0, weights)
