"""Text that is not English: from a file to pictures and replies, without a warning."""

import dataclasses
import random
import warnings

import pytest
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

import train_pretrain
from dataset import prepare
from dataset.tokenizer import encode, train_tokenizer
from eval import chat, drawing, plots
from eval.experiments import soft_labels
from eval.experiments.common import teacher_of
from eval.experiments.rows import read_rows
from eval.experiments.scales import QUICK
from files import command_line, printable

WORDS = "春天 夏天 秋天 冬天 老人 孩子 先生 学生 看见 喜欢 月亮 太阳 在 和 的 也 $5 $6".split()


def chinese_text(seed: int) -> str:
    rng = random.Random(seed)
    return "".join("\u3000" + "".join(rng.choices(WORDS, k=9)) + "。\n" for _ in range(150))


@pytest.fixture(scope="module")
def tokenizer():
    """Of a vocabulary of 300: few characters have a token of their own."""
    return train_tokenizer([chinese_text(0)], 300)


@pytest.fixture
def scale(tmp_path, monkeypatch):
    """Chinese text, prepared, and a teacher of 6 steps that has read it."""
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(5):
        (texts / f"{number}.txt").write_text(chinese_text(number), "utf-8")
    tiny = {"teacher": "nano", "teacher_steps": 6, "seq_len": 32, "text_batch": 4}
    scale = dataclasses.replace(QUICK, name="zh", **tiny)
    flags = "--vocab_size 420 --val_share 0.2 --problems 9 --prompts 2 --test_problems 5"
    words = ["--text", str(texts), "--out", scale.data, *flags.split()]
    prepare.main(prepare.parse_args(words))
    train_pretrain.main(train_pretrain.parse_args(teacher_of(scale, 0).argv))
    return scale


def test_from_a_chinese_text_to_a_picture_without_a_warning(scale, tmp_path):
    results = tmp_path / "results"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        soft_labels.run(scale, results)
        (picture,) = plots.draw_all(results)
    assert picture.stat().st_size > 10_000
    rows = read_rows(results / "soft_labels" / "results.csv")
    assert len({row["context"] for row in rows}) == 3
    assert not any("\ufffd" in row["context"] + row["token"] for row in rows)
    assert any("\u4e00" <= c <= "\u9fff" for row in rows for c in row["context"])


def test_a_part_of_a_character_is_named_by_its_bytes(tokenizer):
    """U+9F98 is e9 be 98 in UTF-8, and too rare for a token of its own."""
    ids = encode(tokenizer, "龘")
    names = [soft_labels.token_text(tokenizer, token) for token in ids]
    assert len(ids) > 1
    assert " ".join(name.strip("<>") for name in names) == "e9 be 98"
    (token,) = encode(tokenizer, "a")
    assert soft_labels.token_text(tokenizer, token) == "a"


def test_characters_that_no_font_has_are_escaped():
    missing = {"人", "\U0001f600"}
    assert drawing.shown("a人", missing) == r"a\u4eba"
    assert drawing.shown("a\U0001f600é", missing) == r"a\U0001f600é"
    assert drawing.shown("abc人人", missing, most=12) == r"\u4eba\u4eba"
    assert drawing.shown("costs $5 or $6", set()) == r"costs \$5 or \$6"  # no formula


def characters(name: str) -> set[str]:
    return set(map(chr, FT2Font(font_manager.findfont(name)).get_charmap()))


def test_a_font_of_the_system_is_taken_for_what_the_usual_one_lacks():
    """STIXNonUnicode comes with matplotlib; it stands for a Chinese font."""
    usual, other = characters("DejaVu Sans"), characters("STIXNonUnicode")
    extra = min(other - usual)
    families, missing = drawing.fonts_for(f"a {extra}")
    assert families[0] == "DejaVu Sans" and len(families) == 2 and not missing
    assert extra in characters(families[1])
    assert drawing.fonts_for("a b") == (["DejaVu Sans"], set())
    families, missing = drawing.fonts_for("a\U0003fffd")  # a code of no character
    assert (families, missing) == (["DejaVu Sans"], {"\U0003fffd"})


@pytest.mark.parametrize("cut", [0, 1])
def test_replies_are_written_character_by_character(tokenizer, monkeypatch, capsys, cut):
    """Also where the last one is cut: what is not whole is neither shown nor remembered."""
    ids = encode(tokenizer, "龘\u3000老人龘")

    class Config:
        max_position_embeddings = 100

    model = type("Model", (), {"config": Config})
    monkeypatch.setattr(chat, "stream", lambda *_, **__: iter(ids[: len(ids) - cut]))
    args = chat.parse_args([])
    text = chat.reply(model, tokenizer, [1], args, None)
    assert text == "龘\u3000老人" + "龘" * (not cut)
    assert capsys.readouterr().out == text + "\n"


def test_what_may_be_printed():
    assert printable("老人\u3000春天\xa0é\n") == "老人\u3000春天\xa0é\n"
    assert printable("\x1b[2J\r\x85\u2028\u202e") == "\ufffd[2J" + 4 * "\ufffd"


def test_a_terminal_without_chinese_gets_escapes(capfd, monkeypatch):
    import io
    import sys

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    command_line(lambda args: print("人"))
    out.flush()
    assert out.buffer.getvalue() == rb"\u4eba" + b"\n"
