"""The tokenizer inside a GGUF file, as a Hugging Face tokenizer.json and tokenizer_config.json.

GGUF lists tokens, what kind each is, and merges, but only names how a text is first cut into words
("pre": smollm, qwen2, ...). The cuts of those names are llama.cpp's (src/llama-vocab.cpp); a name
that is not known here is refused, as a wrong cut gives wrong ids that nobody would notice.
"""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from files import atomic_path, write_json

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # kinds of tokens; 1 is a normal one
# (?i:...) as llama.cpp and Hugging Face write it for Llama 3 and Qwen.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def words(digits: str) -> PreTokenizer:
    """Words as Llama 3 and Qwen cut them, numbers as the pattern `digits` says."""
    pattern = Regex(f"{CONTRACTIONS}|{digits}|{REST}")
    return Sequence([Split(pattern, "isolated"), ByteLevel(False, use_regex=False)])


def pre_tokenizer(name: str) -> PreTokenizer | None:
    """How the texts of a GGUF whose tokenizer.ggml.pre is `name` are cut; None: unknown."""
    if name in ("smollm", "starcoder", "refact", "codeshell"):  # every digit alone, then GPT-2's
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if name in ("gpt-2", "olmo"):
        return ByteLevel(add_prefix_space=False)
    if name in ("llama-bpe", "llama3", "llama-v3"):
        return words(r"\p{N}{1,3}")
    if name in ("qwen2", "deepseek-r1-qwen"):
        return words(r"\p{N}")
    return None


def read_tokenizer(gguf) -> Tokenizer:
    """The tokenizer of a model.gguf_read.GGUF. Raises ValueError for one of another kind."""
    kind = gguf.field("tokenizer.ggml.model", str)
    name = gguf.field("tokenizer.ggml.pre", str, "") if kind == "gpt2" else kind
    if (cut := pre_tokenizer(name)) is None:
        unknown = f"{gguf.path}: its tokenizer is of kind '{name or 'unnamed'}'"
        cure = "use a model whose tokenizer.ggml.pre is smollm, gpt-2, llama-bpe or qwen2"
        raise ValueError(f"{unknown}, which is not supported: {cure}")
    tokens = list(gguf.field("tokenizer.ggml.tokens", list))
    kinds = gguf.field("tokenizer.ggml.token_type", list, [1] * len(tokens))
    while tokens and kinds[len(tokens) - 1] == UNUSED:  # rows of the embedding without a token
        tokens.pop()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens) or len(tokens) > gguf.config.vocab_size:
        size = f"{len(tokens)} tokens, {len(vocabulary)} different ones"
        raise ValueError(f"{gguf.path}: {size}, for {gguf.config.vocab_size} rows: use another")
    merges = [tuple(pair.split(" ", 1)) for pair in gguf.field("tokenizer.ggml.merges", list)]
    is_llama3 = name in ("llama-bpe", "llama3", "llama-v3")
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=is_llama3))
    except Exception as error:  # a bare Exception is what the library raises
        raise ValueError(f"{gguf.path}: its merges do not fit its tokens ({error})") from None
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    if name in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, kinds, strict=False):
        if kind in (CONTROL, USER_DEFINED):
            added = AddedToken(token, special=kind == CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    if gguf.field("tokenizer.ggml.add_bos_token", bool, is_llama3):
        index = gguf.field("tokenizer.ggml.bos_token_id", int)
        begin = (tokens[index], index)
        tokenizer.post_processor = processors.TemplateProcessing(
            f"{begin[0]} $A", f"{begin[0]} $A {begin[0]}:1 $B:1", [begin]
        )
    return tokenizer


def control_ids(gguf) -> dict[str, int | list[int]]:
    """bos_token_id, eos_token_id, pad_token_id: those that the file names. A model that ends a turn
    with another token than a text has a list of ends."""
    ids = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        name = f"tokenizer.ggml.{theirs}_token_id"
        if name in gguf.fields:
            ids[f"{ours}_token_id"] = gguf.field(name, int)
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ends = list(dict.fromkeys(gguf.field(name, int) for name in names if name in gguf.fields))
    for index in [*ids.values(), *ends]:
        if index >= gguf.config.vocab_size:
            raise ValueError(f"{gguf.path}: the control token {index} is beyond its vocabulary")
    return ids | ({"eos_token_id": ends} if len(ends) > 1 else {})


def write_tokenizer(gguf, folder: Path) -> None:
    """Write the tokenizer of a GGUF with its chat template and control tokens to `folder`."""
    tokenizer, config = read_tokenizer(gguf), {"tokenizer_class": "PreTrainedTokenizerFast"}
    with atomic_path(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    for name, ids in control_ids(gguf).items():
        first = ids[0] if isinstance(ids, list) else ids
        config[name.removesuffix("_id")] = tokenizer.id_to_token(first)
    if "tokenizer.chat_template" in gguf.fields:
        config["chat_template"] = gguf.field("tokenizer.chat_template", str)
    config["clean_up_tokenization_spaces"] = False
    write_json(folder / "tokenizer_config.json", config)
