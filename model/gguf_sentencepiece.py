"""The tokenizers of Llama 2 and Mistral (SentencePiece's byte-pair encoding) from and to GGUF.

GGUF has no merges for them but a score for each token: of all neighbours whose join is a token, the
join of the highest score is made first. Hugging Face's tokenizer.json has the same as a list of
merges, in order. A space is "▁" in both, one more stands before a text, and a character without a
token becomes its bytes, <0xE9>. llama.cpp does this in src/llama-vocab.cpp (llm_tokenizer_spm).
"""

import json

from tokenizers import Tokenizer, decoders, models, normalizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LEAST = -1e6  # the score of what no merge makes: single characters


def merges_of(
    tokens: list[str], scores: list[float], kinds: list[int], among=(NORMAL,)
) -> list[tuple[str, str]]:
    """Every pair of tokens whose join is one, the join of the highest score first."""
    ids, merges = {tokens[i]: i for i, kind in enumerate(kinds) if kind in among}, []
    for token in sorted(ids, key=lambda token: -scores[ids[token]]):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def spaces(prefix: bool) -> normalizers.Normalizer:
    """prefix: whether a space is put before every text."""
    before = [normalizers.Prepend("▁")] if prefix else []
    return normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])


def read_sentencepiece(gguf, tokens: list[str], kinds: list[int]) -> Tokenizer:
    """The tokenizer of a model.gguf_read.GGUF, whose control tokens are not yet added. Raises
    ValueError for one that cannot be read in the same way as llama.cpp reads it."""
    scores = gguf.field("tokenizer.ggml.scores", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    kinds = kinds[: len(tokens)]
    if len(scores) < len(tokens):
        raise ValueError(f"{gguf.path}: {len(scores)} scores for {len(tokens)} tokens: use another")
    if not all(isinstance(score, float) for score in scores):
        raise ValueError(f"{gguf.path}: its tokens' scores are no decimal numbers: use another")
    if missing := [byte for byte in BYTES if byte not in vocabulary]:
        bytes_ = f"{gguf.path}: its tokenizer has no token {missing[0]}"
        raise ValueError(f"{bytes_}, so some texts could not be written: use another model")
    merges = merges_of(tokens, scores, kinds)
    if UNUSED in kinds and merges != merges_of(tokens, scores, kinds, (NORMAL, UNUSED)):
        raise ValueError(f"{gguf.path}: others are made of its unused tokens: use another model")
    joined = {first + second for first, second in merges}
    if len({scores[vocabulary[token]] for token in joined}) < len(joined):
        raise ValueError(f"{gguf.path}: two tokens have one score, so no order: use another model")
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = gguf.field("tokenizer.ggml.add_space_prefix", bool, True)
    tokenizer.normalizer = spaces(prefix)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * prefix)
    return tokenizer


def sentencepiece_fields(about: dict, tokens: list[str], kinds: list[int]) -> dict | None:
    """What a GGUF says of a parsed tokenizer.json, whose tokens have these kinds. None where it is
    of another sort, or no scores give the same merges."""
    model = about["model"]
    forms = [json.loads(spaces(prefix).__getstate__()) for prefix in (False, True)]
    other = ("ignore_merges", "end_of_word_suffix", "continuing_subword_prefix", "dropout")
    if about["normalizer"] not in forms or about["pre_tokenizer"] or any(map(model.get, other)):
        return None
    if not model.get("byte_fallback") or not set(BYTES) <= set(tokens):
        return None
    special = {model.get("unk_token"): UNKNOWN, **dict.fromkeys(BYTES, BYTE)}
    kinds = [special.get(token, kind) for token, kind in zip(tokens, kinds, strict=True)]
    merges = [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]
    order = dict.fromkeys(first + second for first, second in merges)
    order = {token: -float(rank) for rank, token in enumerate(order)}
    scores = [order.get(token, LEAST) for token in tokens]
    found = merges_of(tokens, scores, kinds)
    if set(found) != set(merges) or list(map("".join, found)) != list(map("".join, merges)):
        return None
    unknown = [i for i, kind in enumerate(kinds) if kind == UNKNOWN]
    return {
        **({"tokenizer.ggml.unknown_token_id": unknown[0]} if unknown else {}),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": about["normalizer"] == forms[1],
    }
