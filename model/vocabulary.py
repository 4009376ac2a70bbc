"""Which rows of embedding and head a run needs: one for each token of its data's tokenizer.

A checkpoint may have more. Some are padded to a round number (Qwen's tokenizer has 151,669 tokens,
its small models 151,936 rows, its large ones 152,064); no text has those tokens, so they are cut
off. Others read a larger tokenizer, of which the data's is a part (dataset.trim_vocabulary). Then
the rows of the tokens that are left, and no others, give the logits:

    softmax over kept rows  =  p(v) / sum of p over kept tokens  =  p(v | the token is a kept one)

As both models of a run are cut alike, a loss, a fused loss, a cache and an evaluation never meet
logits of two lengths. Shapes: V tokens, D width.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from files import check_file, read_json, tokenizer_hash

from .transformer import Transformer


def vocabulary(tokenizer: dict) -> dict[str, int]:
    """token -> id of a parsed tokenizer.json, tokens that were added to its model included."""
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    return {**tokenizer["model"]["vocab"], **added}


def merges_of(tokenizer: dict) -> list[tuple[str, str]]:
    """The merges of a BPE tokenizer.json, first those that come first: "a b", or ["a", "b"]."""
    pairs = tokenizer["model"].get("merges") or []
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]


def reading_of(tokenizer: dict) -> list:
    """All that says how a tokenizer.json cuts texts, but its tokens and merges."""
    model = {k: v for k, v in tokenizer["model"].items() if k not in ("vocab", "merges")}
    added = [{**token, "id": None} for token in tokenizer.get("added_tokens") or []]
    return [model, added, *(tokenizer.get(k) for k in ("normalizer", "pre_tokenizer", "decoder"))]


def kept_rows(folder, data_folder) -> list[int] | None:
    """For each token of `data_folder`'s tokenizer its id in `folder`'s, where the former is a part
    of the latter (dataset.trim_vocabulary makes some), or the same in other bytes; None where they
    are two tokenizers."""
    try:
        whole, part = (
            read_json(check_file(Path(place) / "tokenizer.json")) for place in (folder, data_folder)
        )
        ids, wanted = vocabulary(whole), vocabulary(part)
        tokens = sorted(wanted, key=wanted.get)
        numbered = [wanted[token] for token in tokens] == list(range(len(tokens)))
        read_alike = reading_of(whole) == reading_of(part)
        ranks = {pair: rank for rank, pair in enumerate(merges_of(whole))}
        order, rows = [ranks[pair] for pair in merges_of(part)], [ids[token] for token in tokens]
        in_order = all(x == sorted(x) for x in (order, rows))  # not the same tokens numbered anew
    except (AttributeError, KeyError, TypeError, ValueError):  # not there, or of another kind
        return None
    return rows if numbered and read_alike and in_order else None


def rows_for(folder, data) -> list[int] | range | None:
    """The rows that `folder`'s model needs for `data`, in the order of the data's ids; None where
    it does not know the data's tokens."""
    if tokenizer_hash(folder) == data.tokenizer_sha256:
        return range(data.vocab_size)
    return kept_rows(folder, data.tokenizer_folder)


@torch.no_grad()
def select_rows(model: Transformer, rows) -> Transformer:
    """`model` with those rows (V,) of embedding and head alone, changed in place."""
    if len(rows) == model.config.vocab_size:  # rows are in order, so these are all of them
        return model
    index = torch.tensor(list(rows), device=model.lm_head.weight.device)
    learns = model.lm_head.weight.requires_grad
    weights = [model.model.embed_tokens.weight[index]]
    if not model.config.tie_word_embeddings:
        weights.append(model.lm_head.weight[index])
    weights = [nn.Parameter(weight, requires_grad=learns) for weight in weights]
    model.model.embed_tokens.weight, model.lm_head.weight = weights[0], weights[-1]
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = len(index)
    model.config = model.model.config = replace(model.config, vocab_size=len(index))
    return model
