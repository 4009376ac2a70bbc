"""Write text with a model: a key-value cache, a batch with left padding, greedy or sampled.

The padding on a prompt's left is masked out, and positions count from each prompt's own first
token, so a row's result does not depend on the rows beside it.
"""

from collections.abc import Container, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .transformer import Transformer

PAD_ID, END_OF_TEXT_ID, END_OF_TURN_ID = 0, 0, 2


class KeyValueCache:
    """Keys and values of all layers, each (B, K, capacity, d), filled from the left, so that a step
    computes one token only."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0  # positions filled by finished forward passes
        self.layers: dict[object, tuple[Tensor, Tensor]] = {}

    def append(self, layer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (B, K, S, d) after the filled positions; return all filled ones."""
        if layer not in self.layers:
            B, K, _, d = key.shape
            shape = (B, K, self.capacity, d)
            self.layers[layer] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self.layers[layer]
        end = self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Drop the rows of the batch that are not in `rows` (their indices)."""
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = (keys[rows], values[rows])


def choose_token(logits: Tensor, temperature: float, top_k: int, top_p: float, generator) -> Tensor:
    """Pick one id per row of logits (B, V) -> (B,). temperature 0 is greedy (argmax)."""
    likeliest = logits.argmax(-1)  # nan where there is one
    if not logits.gather(-1, likeliest[:, None]).isfinite().all():
        raise ValueError("a model's guess is inf or nan: train it, or download it again")
    if temperature == 0:
        return likeliest
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        # Keep the smallest set whose mass reaches top_p: drop what stands after that point.
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.scatter(-1, order, ordered.masked_fill(dropped, -torch.inf))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def left_pad(prompts: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Prompts -> ids (B, S) flush right, and which of them are no padding (B, S)."""
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and every prompt at least one token")
    longest = max(map(len, prompts))
    ids = [[PAD_ID] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def check_room(model: Transformer, length: int, max_new_tokens: int) -> None:
    """Raise ValueError where a prompt of `length` tokens leaves too few positions."""
    if length + max_new_tokens > (limit := model.config.max_position_embeddings):
        asked = f"a prompt of {length} tokens and {max_new_tokens} new ones"
        raise ValueError(f"{asked} need more than the model's {limit} positions: ask for less")


@torch.inference_mode()
def decode(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
    stop_ids: Container[int] = (END_OF_TURN_ID, END_OF_TEXT_ID),
    generator: torch.Generator | None = None, use_cache: bool = True,
) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """The loop behind `generate` and `stream`: yields each step's (prompt index, token) pairs."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must be above 0 and at most 1")
    ids, attention_mask = left_pad(prompts, model.lm_head.weight.device)
    length = ids.shape[1]
    check_room(model, length, max_new_tokens)
    rows = list(range(len(prompts)))  # which prompt each row of the batch continues
    finished = set()
    cache = KeyValueCache(length + max_new_tokens) if use_cache else None
    padded = not bool(attention_mask.all())
    new_ids = ids  # what the model has not read yet
    for _ in range(max_new_tokens):
        S, keys = new_ids.shape[1], attention_mask.shape[1]
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -S:]
        mask = None
        if padded or S < keys:
            causal = torch.ones(S, keys, dtype=torch.bool, device=ids.device).tril(keys - S)
            mask = (causal & attention_mask[:, None, :])[:, None]  # (B, 1, S, keys)
            if padded:  # a padding query may see itself, or its softmax would be 0 / 0
                mask = mask | torch.eye(keys, dtype=torch.bool, device=ids.device)[-S:]
        hidden = model.model(new_ids, positions, cache, mask)
        tokens = choose_token(model.lm_head(hidden[:, -1]), temperature, top_k, top_p, generator)
        if cache is not None:
            cache.length += S
        pairs = list(zip(rows, tokens.tolist(), strict=True))
        finished |= {row for row, token in pairs if token in stop_ids}
        made = [(row, token) for row, token in pairs if row not in finished]
        yield made
        if not made:
            return
        ids = torch.cat((ids, tokens[:, None]), dim=1)
        attention_mask = F.pad(attention_mask, (0, 1), value=True)
        if len(made) < 0.75 * len(rows):  # shrinking copies the cache, so not for every row
            left = [i for i, row in enumerate(rows) if row not in finished]
            rows, left = [rows[i] for i in left], torch.tensor(left, device=ids.device)
            ids, attention_mask = ids[left], attention_mask[left]
            if cache is not None:
                cache.keep(left)
        new_ids = ids[:, -1:] if use_cache else ids


def generate(
    model: Transformer, prompts: list[list[int]], max_new_tokens: int = 128, **options
) -> list[list[int]]:
    """Continue every prompt (token ids) by at most max_new_tokens; returns the new ids only.

    Options: temperature (0, the default, is greedy), top_k (0 is off), top_p (1 is off), stop_ids
    (a row ends before the first of them), generator (a torch.Generator that makes sampling
    repeatable), use_cache (False computes the whole sequence at every step, to check the cache).
    Raises ValueError for empty prompts or more positions than the model has."""
    results: list[list[int]] = [[] for _ in prompts]
    for made in decode(model, prompts, max_new_tokens, **options):
        for row, token in made:
            results[row].append(token)
    return results


def stream(model, prompt: list[int], max_new_tokens: int = 128, **options) -> Iterator[int]:
    """Yield the tokens of one continuation as they are made; options as in `generate`."""
    for made in decode(model, [prompt], max_new_tokens, **options):
        yield from (token for _, token in made)
