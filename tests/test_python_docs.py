"""Promise: of a page that is held out nothing stands in the training text, nor in the tokens that
`dataset.prepare --held_out` makes of both."""

import json

import pytest

from dataset import prepare, python_docs
from dataset.python_docs import SHORT, split_pages
from files import Finished
from tests.test_prepare import run_prepare, stored_documents, write_lines


def paragraphs(texts) -> list[str]:
    found = (p.strip() for text in texts for p in text.split("\n\n"))
    return [p for p in found if len(p) > SHORT]


def make(out, *words) -> tuple[list[str], list[str]]:
    python_docs.main(python_docs.parse_args(["--out", str(out), *words]))
    lines = ((out / name).read_text("utf-8").splitlines() for name in python_docs.NAMES)
    training, held_out = ([json.loads(line)["text"] for line in part] for part in lines)
    return training, held_out


def test_no_paragraph_is_trained_on_and_held_out(tmp_path):
    topics = pytest.importorskip("pydoc_data.topics").topics
    training, held_out = make(tmp_path / "docs")
    assert not set(paragraphs(training)) & set(paragraphs(held_out))
    assert len(set(paragraphs(training))) == len(paragraphs(training)), "a paragraph stands twice"
    assert set(held_out) < set(topics.values()), "held-out pages must be whole"
    size = sum(map(len, topics.values()))
    assert 0.07 < sum(map(len, held_out)) / size < 0.14
    every = {p for text in topics.values() for p in paragraphs([text])}
    assert set(paragraphs(training)) | set(paragraphs(held_out)) == every, "some text was lost"


def test_quoted_paragraphs_by_hand():
    """Four pages, one of which quotes each of the others: what it quotes is kept once."""
    words = {name: f"This paragraph stands on page {name}." for name in "abc"}
    quoting = "\n\n".join([*words.values(), "or", "And this nowhere else, but here."])
    pages = [("quoting", quoting), *((name, f"{text}\n\nor") for name, text in words.items())]
    for share in (0.1, 0.3, 0.5):
        training, held_out = split_pages(pages, share)
        both = paragraphs([*training, *held_out])
        held = paragraphs(held_out)
        assert held and not set(held) & set(paragraphs(training))
        assert set(both) == {*words.values(), "And this nowhere else, but here."}
        assert len(paragraphs(training)) == len(set(paragraphs(training)))
        assert all(paragraphs([text]) for text in training), "a page with nothing on it is kept"


def test_what_is_there_is_replaced_only_when_told(tmp_path):
    first = make(tmp_path / "docs")
    with pytest.raises(Finished, match="docs: there already, the same"):
        make(tmp_path / "docs")
    with pytest.raises(ValueError, match="docs holds another text: pass --overwrite"):
        make(tmp_path / "docs", "--val_share", "0.03")
    (tmp_path / "docs" / "held_out.jsonl").unlink()  # of a call that was killed
    with pytest.raises(ValueError, match="docs holds another text: pass --overwrite"):
        make(tmp_path / "docs")
    assert make(tmp_path / "docs", "--overwrite") == first
    fewer = make(tmp_path / "docs", "--overwrite", "--val_share", "0.03")
    assert len(fewer[1]) < len(first[1])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "letter.txt").write_text("Dear")
    with pytest.raises(ValueError, match="holds files that this command did not make"):
        make(tmp_path / "theirs")


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_prepare_holds_out_what_it_is_told_to(kind, tmp_path, capsys):
    """And trains on none of it: a text of both files counts as held out."""
    texts = [f"story {i}: once there were {'very ' * i}many" for i in range(8)]
    held_out, training = texts[:2], texts[2:]
    if kind == "jsonl":
        train = write_lines(tmp_path / "train.jsonl", [{"text": t} for t in texts[1:]])
        held = write_lines(tmp_path / "held.jsonl", [{"text": t} for t in held_out])
    else:
        train, held = tmp_path / "train", tmp_path / "held.txt"
        train.mkdir()
        for number, text in enumerate(texts[1:]):
            (train / f"{number}.txt").write_text(text)
        held.write_text(texts[0])
        held_out, training = texts[:1], texts[1:]
    flags = {kind: train, "held_out": held}
    out = run_prepare(tmp_path / "out", **flags)
    assert stored_documents(out, "val") == held_out
    assert sorted(stored_documents(out, "train")) == training
    assert ("repeated documents left out: 1" in capsys.readouterr().out) == (kind == "jsonl")
    # The held-out text is part of what the folder is made from.
    more = texts[0] + " more"
    held.write_text(more if kind == "text" else json.dumps({"text": more}) + "\n")
    with pytest.raises(ValueError, match="was prepared with another content: pass --overwrite"):
        run_prepare(out, **flags)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--held_out held.txt", "--held_out held.txt goes with --text or --jsonl"),
        ("--held_out held.txt --text held.txt", "all of the text stands in --held_out held.txt"),
        ("--held_out none.txt --text held.txt", "none.txt does not exist"),
        ("--held_out held.txt --text held.txt --val_share 0.1", "leaves --val_share nothing"),
    ],
)
def test_what_cannot_be_held_out(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.txt").write_text("Once upon a time.")
    with pytest.raises(ValueError, match=said):
        prepare.main(prepare.parse_args(words.split()))
    assert not (tmp_path / "out").exists()
