"""eval.chat: turns are greedy, a text is continued by sampling unless flags say otherwise."""

import io
import sys

import pytest

from dataset.tokenizer import load_tokenizer
from eval import chat
from files import printable
from model import load_model
from tests.short_runs import make_teacher


@pytest.fixture(scope="module")
def folder(prepared_folder, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("talk"), prepared_folder)


@pytest.mark.parametrize(
    "words, temperature, top_p",
    [
        ("", 0.0, 1.0),
        ("--temperature 0.7", 0.7, 1.0),
        ("--complete", 0.8, 0.95),
        ("--complete --temperature 0", 0.0, 0.95),
        ("--complete --top_p 1", 0.8, 1.0),
        ("--complete --temperature 1.5 --top_p 0.5", 1.5, 0.5),
    ],
)
def test_texts_are_sampled_and_turns_are_greedy(words, temperature, top_p):
    args = chat.parse_args(words.split())
    assert (args.temperature, args.top_p) == (temperature, top_p)


def test_the_help_says_so(capsys):
    with pytest.raises(SystemExit):
        chat.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default 0, with --complete 0.8" in text and "default 1, with --complete 0.95" in text


def continued(folder, monkeypatch, capsys, *words) -> str:
    """What the command prints for one line of text."""
    said = iter(["the king", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    flags = ["--model", str(folder), "--complete", "--device", "cpu", "--max_new_tokens", "30"]
    capsys.readouterr()
    chat.main(chat.parse_args([*flags, *words]))
    return capsys.readouterr().out.removesuffix("\n")


def test_complete_writes_what_the_command_prints(folder, monkeypatch, capsys):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    texts = [chat.complete(model, tokenizer, "the king", 30, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    for seed in (0, 1):
        printed = continued(folder, monkeypatch, capsys, "--seed", str(seed))
        assert printed == printable(texts[seed + 1])
    assert continued(folder, monkeypatch, capsys, "--temperature", "0") not in texts


def test_bytes_that_are_no_text_are_no_reason_to_stop(folder, monkeypatch, capsys):
    """A terminal may send anything; what is no UTF-8 is read as a replacement character."""
    typed = io.TextIOWrapper(io.BytesIO(b"the \xff\xfe king\n\n"), "utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    asked = []
    monkeypatch.setattr(chat, "encode_prompt", lambda _, turns: asked.append(dict(turns[0])) or [1])
    flags = ["--model", str(folder), "--device", "cpu", "--max_new_tokens", "2"]
    chat.main(chat.parse_args(flags))
    assert asked == [{"role": "user", "content": "the \ufffd\ufffd king"}]
