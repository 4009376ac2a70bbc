"""Early exits: after each layer the last norm and the head say what they would say now.

    logits_k = head(norm(state after layer k));  leave at the first k with max softmax > threshold

At threshold 0 every token leaves after the first layer, at 1 none before the last. No exit has
weights of its own. Shapes: B batch, S sequence, V vocabulary, D width, L layers, N tokens.
"""

import torch
from torch import Tensor

from .generate import END_OF_TEXT_ID, END_OF_TURN_ID, check_room
from .transformer import Transformer, rotary_tables


def exit_logits(model: Transformer, states: list[Tensor]) -> list[Tensor]:
    """Logits (B, S, V) of an exit from each of `states` (B, S, D), before the norm."""
    return [model.lm_head(model.model.norm(state)) for state in states]


def first_sure(confidence: Tensor, threshold: float) -> Tensor:
    """Which exit is taken, 0 .. L - 1 (N,), by the exits' largest probabilities (L, N): the first
    above the threshold, else the last."""
    sure = confidence > threshold
    sure[-1] = True
    return sure.int().argmax(0)  # of equal values the first


@torch.inference_mode()
def generate_early(
    model: Transformer, prompt: list[int], max_new_tokens: int, threshold: float
) -> tuple[list[int], list[int]]:
    """Greedy new tokens of one prompt, until its turn or text ends, and the layers that each took.

    No cache: a token that left early has no keys in deeper layers, which a later token may look
    at. Here they are computed from the start when they are needed, so no layer is approximated."""
    if not prompt:
        raise ValueError("the prompt is empty: it needs a token to go on from")
    check_room(model, len(prompt), max_new_tokens)
    decoder, c, made, depths = model.model, model.config, [], []
    for _ in range(max_new_tokens):
        ids = torch.tensor([prompt + made], device=model.lm_head.weight.device)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = rotary_tables(positions, c.head_dim, c.rope_theta, c.rope_scaling)
        x = decoder.embed_tokens(ids)
        depth, sure = 0, False
        while depth < len(decoder.layers) and not sure:
            x, depth = decoder.layers[depth](x, rotary), depth + 1
            logits = model.lm_head(decoder.norm(x[:, -1]))[0]  # (V,)
            sure = logits.float().softmax(-1).max() > threshold
        token = int(logits.argmax())
        if token in (END_OF_TURN_ID, END_OF_TEXT_ID):
            break
        made.append(token)
        depths.append(depth)
    return made, depths
