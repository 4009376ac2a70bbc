"""The tokenizer inside a GGUF file: from it, and to it, of Hugging Face's tokenizer.json.

GGUF lists tokens, what kind each is, and merges, but only names how a text is first cut into words
("pre": smollm, qwen2, ...). The cuts of those names are llama.cpp's (src/llama-vocab.cpp); a name
that is not known here is refused, as a wrong cut gives wrong ids that nobody would notice. Those
that cut no words (Llama 2, Mistral) are in gguf_sentencepiece.py.
"""

import json
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from files import as_value_error, atomic_path, check_file, write_json

from .control import control_ids, read_template
from .gguf_sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_sentencepiece,
    sentencepiece_fields,
)

CONTROL_IDS = {
    f"{ours}_token_id": f"tokenizer.ggml.{theirs}_token_id"
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
}
# (?i:...) as llama.cpp and Hugging Face write it for Llama 3 and Qwen.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def words(digits: str) -> PreTokenizer:
    """Words as Llama 3 and Qwen cut them, numbers as the pattern `digits` says."""
    pattern = Regex(f"{CONTRACTIONS}|{digits}|{REST}")
    return Sequence([Split(pattern, "isolated"), ByteLevel(False, use_regex=False)])


# Every digit alone, then the words of GPT-2: ours too.
SMOLLM = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
LLAMA3, QWEN = words(r"\p{N}{1,3}"), words(r"\p{N}")
CUTS = {
    "smollm": SMOLLM, "starcoder": SMOLLM, "refact": SMOLLM, "codeshell": SMOLLM,
    "gpt-2": ByteLevel(add_prefix_space=False), "llama-bpe": LLAMA3, "qwen2": QWEN,
    "deepseek-r1-qwen": QWEN,
}  # fmt: skip


def read_tokenizer(gguf) -> Tokenizer:
    """The tokenizer of a model.gguf_read.GGUF. Raises ValueError for one of another kind."""
    kind = gguf.field("tokenizer.ggml.model", str)
    name = gguf.field("tokenizer.ggml.pre", str, "") if kind == "gpt2" else kind
    cut = CUTS.get(name) if kind == "gpt2" else None  # SentencePiece's cuts no words
    if cut is None and kind != "llama":
        unknown = f"{gguf.path}: its tokenizer is of kind '{name or 'unnamed'}'"
        cure = f"use one of kind llama, or whose tokenizer.ggml.pre is {', '.join(CUTS)}"
        raise ValueError(f"{unknown}, which is not supported: {cure}")
    tokens = list(gguf.texts("tokenizer.ggml.tokens"))
    kinds = gguf.field("tokenizer.ggml.token_type", list, [NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise ValueError(f"{gguf.path}: {len(kinds)} kinds for {len(tokens)} tokens: use another")
    if strange := [kind for kind in kinds if type(kind) is not int or not NORMAL <= kind <= BYTE]:
        raise ValueError(
            f"{gguf.path}: a token is of kind {strange[0]!r:.20}, of 1 to 6: use another"
        )
    while tokens and kinds[len(tokens) - 1] == UNUSED:  # rows of the embedding without a token
        tokens.pop()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens) or len(tokens) > gguf.config.vocab_size:
        size = f"{len(tokens)} tokens, {len(vocabulary)} different ones"
        raise ValueError(f"{gguf.path}: {size}, for {gguf.config.vocab_size} rows: use another")
    if cut is None:
        tokenizer = read_sentencepiece(gguf, tokens, kinds)
    else:
        tokenizer = byte_level(gguf, vocabulary, cut)
    tokenizer.add_tokens([
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ])  # fmt: skip
    if gguf.field("tokenizer.ggml.add_bos_token", bool, cut in (None, LLAMA3)):  # its default
        index = gguf.field("tokenizer.ggml.bos_token_id", int)
        if not 0 <= index < len(tokens):
            raise ValueError(f"{gguf.path}: no token has the id {index}, which begins texts")
        if re.search(r"[\s:$]|^$", tokens[index]):  # which mean something in a template
            odd = f"{gguf.path}: texts begin with the token {tokens[index]!r:.40}"
            raise ValueError(f"{odd}, whose name has a space, : or $: use another model")
        begin = (tokens[index], index)
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{begin[0]} $A", f"{begin[0]} $A {begin[0]}:1 $B:1", [begin]
        )
    return tokenizer


def byte_level(gguf, vocabulary: dict[str, int], cut: PreTokenizer) -> Tokenizer:
    """The tokenizer of a GGUF that lists its merges."""
    merges = [tuple(pair.split(" ", 1)) for pair in gguf.texts("tokenizer.ggml.merges", [])]
    with as_value_error(f"{gguf.path}: its merges do not fit its tokens", "download it again"):
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut is LLAMA3))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    if cut is QWEN:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def ids_in(gguf) -> dict[str, int | list[int]]:
    """bos_token_id, eos_token_id and pad_token_id, where the file names them. A model that ends a
    turn with another token than a text has a list of ends. Raises ValueError for an impossible id.
    """
    named = {ours: theirs for ours, theirs in CONTROL_IDS.items() if theirs in gguf.fields}
    ids = {ours: gguf.field(theirs, int) for ours, theirs in named.items()}
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ends = list(dict.fromkeys(gguf.field(name, int) for name in names if name in gguf.fields))
    for index in [*ids.values(), *ends]:
        if not 0 <= index < gguf.config.vocab_size:
            raise ValueError(f"{gguf.path}: the control token {index} is beyond its vocabulary")
    return ids | ({"eos_token_id": ends} if len(ends) > 1 else {})


def write_tokenizer(gguf, folder: Path) -> None:
    """Write the tokenizer of a GGUF with its chat template and control tokens to `folder`."""
    tokenizer, config = read_tokenizer(gguf), {"tokenizer_class": "PreTrainedTokenizerFast"}
    with atomic_path(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    for name, ids in ids_in(gguf).items():
        first = ids[0] if isinstance(ids, list) else ids
        config[name.removesuffix("_id")] = tokenizer.id_to_token(first)
    if "tokenizer.chat_template" in gguf.fields:
        config["chat_template"] = gguf.field("tokenizer.chat_template", str)
    config["clean_up_tokenization_spaces"] = False
    write_json(folder / "tokenizer_config.json", config)


def tokenizer_fields(folder: Path, vocab_size: int) -> dict[str, object]:
    """What a GGUF says of the tokenizer in a checkpoint folder: settings' names -> values. Raises
    ValueError for one that llama.cpp has no name for."""
    with as_value_error(f"{folder}/tokenizer.json is no tokenizer", "download it again"):
        tokenizer = Tokenizer.from_file(str(check_file(folder / "tokenizer.json")))
    tokenizer.no_padding()  # or an empty text would not be empty
    about = json.loads(tokenizer.to_str())
    model, cut = about["model"], about["pre_tokenizer"]
    names = [name for name, known in CUTS.items() if without_offsets(known) == without_offsets(cut)]
    allowed = (None, {"type": "NFC"}) if names[:1] == ["qwen2"] else (None,)
    fits = about["normalizer"] in allowed and bool(names)
    fits &= model.get("ignore_merges", False) == (names == ["llama-bpe"])
    cure = f"use byte-level BPE with the words of {', '.join(CUTS)}, or SentencePiece's as Llama 2"
    none = f"the tokenizer of '{folder}' is none that llama.cpp knows: {cure} has it"
    ids, begin = control_ids(folder), tokenizer.encode("").ids
    if model.get("type") != "BPE" or begin not in ([], [ids["bos_token_id"]]):
        raise ValueError(none)
    kinds, tokens = {}, dict(model["vocab"])
    for token in about["added_tokens"]:
        tokens[token["content"]] = token["id"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    by_id = {index: token for token, index in tokens.items()}
    if max(by_id, default=0) >= vocab_size:
        raise ValueError(f"'{folder}': a token has the id {max(by_id)}, of {vocab_size} rows")
    tokens = [by_id.get(row, f"[PAD{row}]") for row in range(vocab_size)]
    kinds = [kinds.get(r, NORMAL) if r in by_id else UNUSED for r in range(vocab_size)]
    fields = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": bool(begin),
    }
    if fits:
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": names[0]}
        fields["tokenizer.ggml.merges"] = merges
    elif (other := sentencepiece_fields(about, tokens, kinds)) is not None:
        fields |= other
    else:
        raise ValueError(none)
    if (template := read_template(folder)) is not None:
        fields["tokenizer.chat_template"] = template
    for ours, theirs in CONTROL_IDS.items():
        value = ids[ours]
        value = value[0] if isinstance(value, list) and value else value
        if type(value) is int and 0 <= value < vocab_size:
            fields[theirs] = value
    return fields


def without_offsets(cut: PreTokenizer | dict | None) -> object:
    """A pre-tokenizer as JSON, without what only matters for where in a text a token stands."""
    if isinstance(cut, PreTokenizer):
        cut = json.loads(cut.__getstate__())
    if isinstance(cut, dict):
        return {k: without_offsets(v) for k, v in cut.items() if k != "trim_offsets"}
    return [without_offsets(part) for part in cut] if isinstance(cut, list) else cut
