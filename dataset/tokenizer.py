"""A byte-level BPE tokenizer with every digit a token of its own and seven control tokens.

The alphabet is the 256 bytes, so every text round-trips and nothing is unknown; 17 is always "1",
"7", so arithmetic is learned digit by digit. What a user types goes through `encode`, which reads
"<think>" as seven ordinary characters; only an assistant's turn goes through `encode_tagged`, which
knows the four reasoning tags. Tokenizers of others are read as they are; dataset/template.py says
how their models talk.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from files import as_value_error, atomic_path, check_file, read_json, write_json
from model.control import control_ids

TAGS = ("<think>", "</think>", "<answer>", "</answer>")  # ids 3 to 6
# 0: padding and end of a document; 1: begin, 2: end of a turn
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *TAGS)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
TAG_PATTERN = re.compile("(" + "|".join(map(re.escape, TAGS)) + ")")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a BPE vocabulary of vocab_size tokens: 7 control tokens, 256 bytes, and merges."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocabulary {vocab_size} is too small: use {SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) to `folder`."""
    with atomic_path(Path(folder) / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    write_json(Path(folder) / "tokenizer_config.json", config)


def load_tokenizer(folder) -> Tokenizer:
    """The tokenizer of a data or checkpoint folder. Raises ValueError naming what is wrong."""
    folder, make = Path(folder), "make one with: python -m dataset.prepare"
    with as_value_error(f"no tokenizer in '{folder}': tokenizer.json", make):
        tokenizer = Tokenizer.from_file(str(check_file(folder / "tokenizer.json")))
    tokenizer.encode_special_tokens = True
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.content in TAGS and not token.special:  # Qwen3's: in a user's words, text too
            tokenizer.add_special_tokens([AddedToken(token.content, normalized=token.normalized)])
    tokenizer.folder = folder  # where its chat template is, and which ids end a turn
    tokenizer.no_truncation()  # what others' files may ask for would cut texts, or fill them up
    tokenizer.no_padding()
    size, largest = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values(), default=0)
    if largest >= size:  # a model of `size` tokens would have no row for it
        few = f"the tokenizer of '{folder}' has {size} tokens, but the id {largest}"
        raise ValueError(f"{few}: use one that leaves no id out")
    vocabulary_of(folder, tokenizer)  # raises for a model that has too few
    return tokenizer


def vocabulary_of(folder, tokenizer: Tokenizer) -> int:
    """How many tokens there are. The folder's model may have more rows, as config.json or meta.json
    says (Qwen's 151,936 for 151,669): a run leaves those out. Raises ValueError for fewer."""
    size = tokenizer.get_vocab_size()
    for path in (Path(folder, "config.json"), Path(folder, "meta.json")):
        rows = read_json(path, vocab_size=int)["vocab_size"] if path.is_file() else size
        if size > rows:
            other = f"the tokenizer of '{folder}' has {size} tokens, its model {rows}"
            raise ValueError(f"{other}: copy in the one that the model was trained with")
    return size


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of `text`, in which nothing is a control token."""
    return encode_all(tokenizer, [text])[0]


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of every text, like `encode`, on all cores."""
    # Fast: without where in the text each token stands, which took a third of the time.
    with as_value_error("the tokenizer cannot read a text", "use another"):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def encode_tagged(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of an assistant's `text`: the four reasoning tags are control tokens, nothing else is."""
    ids = []
    for piece in TAG_PATTERN.split(text):
        ids += [special_id(tokenizer, piece)] if piece in TAGS else encode(tokenizer, piece)
    return ids


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a control token. Raises ValueError where this tokenizer has none."""
    if (index := tokenizer.token_to_id(token)) is None:
        cure = "use a model whose tokenizer has it: a preset, on the data of dataset.prepare, does"
        if token in TAGS:
            cure += "; or add the tags: python -m dataset.add_tags --model FOLDER --out NEW"
        raise ValueError(f"the tokenizer has no token '{token}': {cure}")
    return index


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a turn or a text, as the tokenizer's folder says, the most usual first."""
    folder = getattr(tokenizer, "folder", None)  # none of one that was just trained
    found = control_ids(folder)["eos_token_id"] if folder else [2, 0]
    return [index for index in found if tokenizer.id_to_token(index) is not None]


def document_end(tokenizer: Tokenizer) -> int:
    """The id that stands between two documents. Raises ValueError where there is none."""
    if tokenizer.token_to_id("<|endoftext|>") is None:
        turn = tokenizer.token_to_id("<|im_end|>")  # ends no document
        for index in (x for x in end_ids(tokenizer) if x != turn):
            return index  # "</s>" of Llama 2
    return special_id(tokenizer, "<|endoftext|>")


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Text of `ids`, control tokens written out."""
    return tokenizer.decode(ids, skip_special_tokens=False)
