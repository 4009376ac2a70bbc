"""Promise: every text survives the tokenizer, and only our code can write a control token."""

import hashlib
import json
import random

import jinja2
import pytest
from tokenizers import Tokenizer, models

from dataset.chat import encode_conversation, encode_prompt
from dataset.tokenizer import (
    decode,
    document_end,
    encode,
    encode_tagged,
    end_ids,
    load_tokenizer,
    save_tokenizer,
    special_id,
    train_tokenizer,
)
from files import tokenizer_hash

SPECIALS = "<|endoftext|> <|im_start|> <|im_end|> <think> </think> <answer> </answer>".split()
TEXT = [
    "the king and the queen saw the ship in the long night 1024 times\n\n",
    "user\nassistant\nsystem\n  two  spaces\n\n\n    an indent, 17 + 25 = 42 and 1,234,567.\n",
    "<think>\nthinking\n</think>\n<answer>\nanswering\n</answer>\n",
] * 30


def byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes, written from its definition."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(b) if b in kept else chr(256 + moved.index(b)) for b in range(256)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, 330)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(tokenizer, out)
    return out


@pytest.fixture(scope="module", params=["trained", "loaded"])
def either(request, tokenizer, folder):
    """The tokenizer as trained, and as read back from its folder: both must keep each promise."""
    return tokenizer if request.param == "trained" else load_tokenizer(folder)


def test_special_tokens_have_the_ids_of_the_format(either):
    assert [special_id(either, token) for token in SPECIALS] == [0, 1, 2, 3, 4, 5, 6]
    assert [either.id_to_token(i) for i in range(7)] == SPECIALS


@pytest.mark.parametrize("size", [263, 264, 300, 330])
def test_vocabulary_has_the_size_asked_for(size):
    made = train_tokenizer(TEXT, size)
    assert made.get_vocab_size() == size
    assert sorted(made.get_vocab().values()) == list(range(size))  # no gap: it sizes the embedding


@pytest.mark.parametrize("size", [-1, 0, 7, 262])
def test_too_small_a_vocabulary_is_refused(size):
    with pytest.raises(ValueError, match=f"{size}.*263"):
        train_tokenizer(TEXT, size)


def test_every_byte_is_a_token(either):
    ids = [either.token_to_id(character) for character in byte_characters()]
    assert None not in ids and len(set(ids)) == 256 and min(ids) == 7


def test_merges_were_learned(tokenizer):
    # Without this the tests below would also pass on bytes alone.
    assert len(encode(tokenizer, "the king")) < len("the king")


@pytest.mark.parametrize("text", ["0", "17", "2024", "1,234.5", "a1b22c333", "007 and 99", "12+5"])
def test_every_digit_is_a_token_of_its_own(either, text):
    pieces = [either.id_to_token(i) for i in encode(either, text)]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    ranges = [
        (0x00, 0x20),  # control
        (0x20, 0x7F),
        (0x80, 0x250),
        (0x300, 0x370),  # combining
        (0x590, 0x700),  # right to left
        (0x2000, 0x2070),  # joiners, marks of direction, odd spaces
        (0x4E00, 0x9FFF),
        (0xE000, 0xE100),  # private use
        (0xFE00, 0xFFFE),  # variation selectors, byte order mark
        (0x1F300, 0x1FAFF),  # emoji
        (0x10FF00, 0x10FFFF),
    ]
    texts = []
    for _ in range(count):
        chosen = rng.choices(ranges, k=rng.randint(1, 3))
        texts.append("".join(chr(rng.randrange(*rng.choice(chosen))) for _ in range(30)))
    return texts


def test_random_unicode_round_trips(either):
    for text in random_texts(400):
        ids = encode(either, text)
        assert decode(either, ids) == text
        assert min(ids) > 6


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        "\r\n\t\x00\x7f",
        "  a  ",
        "e\u0301 \u00e9",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "שלום مرحبا",
        "\ufeffbom",
        "a" * 3000,
    ],
)
def test_awkward_text_round_trips(either, text):
    assert decode(either, encode(either, text)) == text


def test_text_with_every_byte_of_utf8_round_trips(either):
    # Bytes C0, C1 and F5..FF never stand in UTF-8; all the others do in this text.
    text = "".join(map(chr, range(0x800))) + "\ud7ff"
    text += "".join(chr(c << 12 | 0x923) for c in range(0x110) if c != 0xD)  # no surrogate
    assert len(set(text.encode("utf-8"))) == 256 - 13
    assert decode(either, encode(either, text)) == text


@pytest.mark.parametrize("token", SPECIALS)
@pytest.mark.parametrize("around", ["{}", "say {} now", "{}{}", "\n{}\n", "x{}9"])
def test_control_tokens_typed_by_a_user_stay_text(either, token, around):
    text = around.format(token, token)
    ids = encode(either, text)
    assert min(ids) > 6
    assert decode(either, ids) == text


@pytest.mark.parametrize("token", SPECIALS)
def test_encode_tagged_knows_the_four_tags_and_nothing_else(either, token):
    ids = encode_tagged(either, f"a {token}9")
    index = SPECIALS.index(token)
    if index >= 3:
        assert ids == [*encode(either, "a "), index, *encode(either, "9")]
    else:
        assert ids == encode(either, f"a {token}9") and min(ids) > 6


def test_encode_tagged_whole_response(either):
    text = "<think>\n1+1=2\n</think>\n<answer>\n2\n</answer>"
    newline, think = encode(either, "\n"), encode(either, "\n1+1=2\n")
    expected = [3, *think, 4, *newline, 5, *encode(either, "\n2\n"), 6]
    assert encode_tagged(either, text) == expected
    assert decode(either, expected) == text
    assert encode_tagged(either, "") == []
    assert min(encode_tagged(either, "< think> <think <THINK> &lt;think>")) > 6


def test_saving_and_loading_changes_no_token(tokenizer, folder):
    loaded = load_tokenizer(folder)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    for text in [*TEXT[:3], *random_texts(50)]:
        assert encode(loaded, text) == encode(tokenizer, text)


def test_hash_is_of_the_file(folder, tmp_path, tokenizer):
    content = (folder / "tokenizer.json").read_bytes()
    assert tokenizer_hash(folder) == hashlib.sha256(content).hexdigest()
    save_tokenizer(train_tokenizer(TEXT, 331), tmp_path)
    assert tokenizer_hash(tmp_path) != tokenizer_hash(folder)
    save_tokenizer(train_tokenizer(TEXT, 330), tmp_path)
    assert tokenizer_hash(tmp_path) == tokenizer_hash(folder)  # training is deterministic


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"model": 1}', b"\xff\xfe\x00", b"half"]
)
def test_corrupt_tokenizer_is_refused(folder, tmp_path, content):
    whole = (folder / "tokenizer.json").read_bytes()
    content = whole[: len(whole) // 2] if content == b"half" else content
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match="no tokenizer in .*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer_is_refused_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(ValueError, match="python -m dataset.prepare") as error:
        load_tokenizer(tmp_path / "nowhere")
    assert "nowhere" in str(error.value)


def test_foreign_tokenizer_without_the_tags_is_refused():
    with pytest.raises(ValueError, match="<think>.*dataset.prepare.*python -m dataset.add_tags"):
        special_id(Tokenizer(models.BPE()), "<think>")


# --- The template that other tools read must make the tokens that we train on. ---

CONVERSATIONS = {
    "one turn": [("user", "What is 17+25?"), ("assistant", "42")],
    "system": [("system", "Be kind."), ("user", "hi\n\nthere"), ("assistant", "hello\n")],
    "reasoning": [
        ("user", "2*3?"),
        ("assistant", "<think>\n2*3=6\n</think>\n<answer>\n6\n</answer>"),
        ("user", "Sure? 👍"),
        ("assistant", "yes  "),
    ],
    "user opens with space": [("user", "\n\n  two  spaces"), ("assistant", "fine")],
    "empty turn": [("user", ""), ("assistant", "hm")],
}


def render(folder, turns, prompt: bool, **options) -> str:
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    template = jinja2.Environment(**options).from_string(config["chat_template"])
    return template.render(messages=turns, add_generation_prompt=prompt)


@pytest.mark.parametrize("options", [{}, {"trim_blocks": True, "lstrip_blocks": True}])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_template_makes_the_tokens_of_encode_conversation(folder, name, options):
    turns = [{"role": role, "content": content} for role, content in CONVERSATIONS[name]]
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))  # as any other tool loads it
    ids = plain.encode(render(folder, turns, False, **options)).ids
    input_ids, labels = encode_conversation(load_tokenizer(folder), turns)
    assert input_ids == ids[:-1]
    assert all(label in (-100, token) for label, token in zip(labels, ids[1:], strict=True))
    prompt = plain.encode(render(folder, turns[:-1], True, **options)).ids
    assert encode_prompt(load_tokenizer(folder), turns[:-1]) == prompt


def test_config_names_the_tokens_of_the_format(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert (config["pad_token"], config["eos_token"]) == ("<|endoftext|>", "<|im_end|>")


def test_a_tokenizer_that_leaves_ids_out_is_refused(tmp_path):
    """A model of as many ids as there are tokens would have no row for the largest."""
    content = json.loads(train_tokenizer([""], 263).to_str())
    content["model"]["vocab"]["z"] = 400
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(ValueError, match="has 263 tokens, but the id 400"):
        load_tokenizer(tmp_path)


# Tokenizers that others made: which tokens end what.


def test_what_ends_a_document_is_what_the_folder_says(tmp_path):
    content = train_tokenizer(TEXT, 330).to_str().replace("<|endoftext|>", "</s>")
    (tmp_path / "tokenizer.json").write_text(content.replace("<|im_end|>", "<|eot|>"), "utf-8")
    with pytest.raises(ValueError, match="no token '<.endoftext.>'"):
        document_end(load_tokenizer(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    loaded = load_tokenizer(tmp_path)
    assert (document_end(loaded), end_ids(loaded)) == (0, [0])
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0, 999]}')
    assert end_ids(load_tokenizer(tmp_path)) == [2, 0]  # it has no token 999


def test_tags_that_are_not_called_special_are_text_to_a_user_too(tmp_path):
    content = json.loads(train_tokenizer(TEXT, 330).to_str())
    for token in content["added_tokens"]:
        token["special"] = not token["content"].endswith("think>")  # as Qwen3 has it
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    loaded = load_tokenizer(tmp_path)
    assert min(encode(loaded, "<think> </think>")) > 6
    assert encode_tagged(loaded, "<think>a") == [3, *encode(loaded, "a")]
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.encode_special_tokens = True
    assert min(plain.encode("<think>").ids) == 3  # which is why
