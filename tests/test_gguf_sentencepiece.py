"""The tokenizer of a Llama 2 or a Mistral, out of a GGUF file and into one, gives the ids that the
library sentencepiece gives, which trained it."""

import io
import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
from tokenizers import Tokenizer

from dataset.tokenizer import encode, load_tokenizer, train_tokenizer
from files import write_json
from model import export, save_model
from tests.conftest import small_text

pytest.importorskip("gguf")
spm = pytest.importorskip("sentencepiece", reason="pip install sentencepiece")
from tests.test_gguf import LLAMA, TEXTS, convert, put, random_model, write  # noqa: E402

NAMES = ["<unk>", "<s>", "</s>"]  # ids 0 to 2
MORE = [
    "", " ", "  a", "aaaaaaa", "ooo   ooo ", "<s> <unk> <0x0A> ▁x", "\x00\n\n", small_text(3),
    "".join(sorted(small_text(4)))[::3],
]  # fmt: skip


@pytest.fixture(scope="module")
def original():
    """As Llama 2's: every digit alone, bytes for what has no token, a space before every text."""
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, *small_text(1).split("\n"), "aaaa ooo " * 9]),
        model_writer=written, model_type="bpe", vocab_size=440, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, user_defined_symbols=["<think>"], num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=written.getvalue())


@pytest.fixture(scope="module")
def write_gguf(original):
    """Write a model of `size` rows with this tokenizer, as llama.cpp's converter writes it. spoil:
    what to put in place of a setting, and how it is made of what is there."""
    ids = range(original.get_piece_size())
    kind_of = [
        (original.is_unknown, 2), (original.is_control, 3), (lambda i: i == 3, 4),
        (original.is_unused, 5), (original.is_byte, 6), (lambda i: True, 1),
    ]  # fmt: skip
    settings = {
        "model": "llama",
        "pre": "default",
        "tokens": [original.id_to_piece(i) for i in ids],
        "scores": [original.get_score(i) for i in ids],
        "token_type": [next(kind for test, kind in kind_of if test(i)) for i in ids],
    }
    other = train_tokenizer([small_text(1)], 300)  # whose settings are replaced

    def make(path, size=440, space=True, **spoil):
        def change(writer, tensors):
            for name, value in settings.items():
                value = spoil.get(name, lambda x: x)(value)
                put(f"tokenizer.ggml.{name}", value)(writer, tensors)
            writer.add_add_space_prefix(space)
            del writer.kv_data[0]["tokenizer.ggml.merges"]

        model = random_model(replace(LLAMA, vocab_size=size))
        return write(path / "a.gguf", model, other, change=change)

    return make


@pytest.fixture(scope="module")
def folder(write_gguf, tmp_path_factory):
    path = tmp_path_factory.mktemp("read")
    return convert(write_gguf(path), path / "out", "--dtype", "float32")


def to_gguf(folder, file):
    words = ["--model", str(folder), "--gguf", str(file), "--dtype", "f32"]
    export.main(export.parse_args(words))
    return file


def test_ids_and_texts_are_those_of_sentencepiece(folder, original):
    read = load_tokenizer(folder)
    assert [read.id_to_token(i) for i in range(4)] == [*NAMES, "<think>"]
    for text in [*TEXTS, *MORE]:
        if "<think>" not in text:
            assert encode(read, text) == original.encode(text), text
        ids = original.encode(text)
        assert read.decode(ids, skip_special_tokens=False) == original.decode(ids)


def test_a_text_begins_with_the_first_token_and_typed_ones_are_words(folder):
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert whole.encode("a").ids[0] == 1 and whole.encode("a</s>").ids[-1] == 2
    assert not {0, 1, 2} & set(encode(load_tokenizer(folder), "<s> a </s> <unk>"))


def test_what_is_exported_reads_back_the_same(folder, tmp_path):
    again = convert(to_gguf(folder, tmp_path / "b.gguf"), tmp_path / "out", "--dtype", "float32")
    ours, theirs = (json.loads((f / "tokenizer.json").read_text()) for f in (folder, again))
    assert ours == theirs


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python: a long build")
def test_llama_cpp_cuts_texts_alike(folder, tmp_path):
    from llama_cpp import Llama

    theirs = Llama(str(to_gguf(folder, tmp_path / "b.gguf")), vocab_only=True, verbose=False)
    read = load_tokenizer(folder)
    for text in (text.replace("<think>", "") for text in [*TEXTS, *MORE]):  # to us a user's word
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == encode(read, text)
    whole = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "a </s><s> b<think> c</think>"
    assert theirs.tokenize(text.encode(), add_bos=True, special=True) == whole.encode(text).ids


def test_without_a_space_before_a_text(write_gguf, tmp_path):
    read = convert(write_gguf(tmp_path, size=449, space=False), tmp_path / "out")
    with_space, without = (load_tokenizer(read).encode(text).tokens for text in (" a", "a"))
    assert (with_space, without) == (["<s>", "▁a"], ["<s>", "a"])
    again = convert(to_gguf(read, tmp_path / "b.gguf"), tmp_path / "again")
    assert (again / "tokenizer.json").read_bytes() == (read / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name, spoil, message", [
    ("scores", lambda x: x[:9], "9 scores for 440 tokens"),
    ("scores", lambda x: [0.0] * len(x), "two tokens have one score, so no order"),
    ("scores", lambda x: [*range(len(x))], "scores are no decimal numbers"),
    ("token_type", lambda x: [0] * len(x), "a token is of kind 0, of 1 to 6"),
    ("token_type", lambda x: [9, *x[1:]], "a token is of kind 9, of 1 to 6"),
    ("token_type", lambda x: [5 if i == 290 else k for i, k in enumerate(x)], "its unused tokens"),
    ("tokens", lambda x: ["<begin of text>" if t == "<s>" else t for t in x], "has a space, : or"),
    ("tokens", lambda x: ["$A" if t == "<s>" else t for t in x], "has a space, : or"),
    ("tokens", lambda x: ["other" if t == "<0x41>" else t for t in x], "no token <0x41>, so some"),
])  # fmt: skip
def test_what_llama_cpp_would_read_otherwise_is_refused(name, spoil, message, write_gguf, tmp_path):
    file = write_gguf(tmp_path, **{name: spoil})
    with pytest.raises(ValueError, match=message) as error:
        convert(file, tmp_path / "out")
    assert str(file) in str(error.value)


def without_a_merge(content):
    joins = ["".join(pair) for pair in content["model"]["merges"]]
    several = next(i for i, token in enumerate(joins) if joins.count(token) > 1)
    del content["model"]["merges"][several]


def without_a_byte(content):
    vocab = content["model"]["vocab"]
    vocab["other"] = vocab.pop("<0x41>")


def with_ends_of_words(content):
    content["model"]["end_of_word_suffix"] = "c"


def with_an_end_of_texts(content):
    end = {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}
    single = [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ]
    content["post_processor"] |= {"single": single, "pair": single, "special_tokens": end}


@pytest.mark.parametrize(
    "spoil", [without_a_merge, without_a_byte, with_ends_of_words, with_an_end_of_texts]
)
def test_what_a_gguf_cannot_say_is_not_exported(spoil, folder, tmp_path):
    """SentencePiece makes a token of any two that join to it; one list of merges need not."""
    content = json.loads((folder / "tokenizer.json").read_text())
    spoil(content)
    spoilt = tmp_path / "spoilt"
    save_model(random_model(replace(LLAMA, vocab_size=440)), spoilt, folder)
    write_json(spoilt / "tokenizer.json", content)
    (spoilt / "manifest.json").unlink()
    with pytest.raises(ValueError, match="none that llama.cpp knows.*SentencePiece"):
        to_gguf(spoilt, tmp_path / "b.gguf")
