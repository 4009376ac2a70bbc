"""Files are whole or absent, a mistake ends in one sentence, and of two processes one waits."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from files import (
    Finished,
    Locked,
    atomic_path,
    command_line,
    lock,
    new_parser,
    read_json,
    unlock,
    write_json,
)
from tests.robustness.test_folder import opened

ROOT = Path(__file__).parents[2]


# Files.


def test_a_file_is_written_whole(tmp_path):
    with atomic_path(tmp_path / "new" / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "new" / "a.txt").exists()
        assert temporary.parent == tmp_path / "new"  # a rename is atomic in one file system only
    assert (tmp_path / "new" / "a.txt").read_text() == "new"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_whoever_reads_the_old_file_goes_on_reading_it(tmp_path):
    """The new file takes the old one's place; it is not written over it."""
    path = tmp_path / "a.txt"
    path.write_text("old content")
    with open(path) as reader:
        assert reader.read(4) == "old "
        with atomic_path(path) as temporary:
            temporary.write_text("NEW CONTENT")
        assert reader.read() == "content"
    assert path.read_text() == "NEW CONTENT"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error("disk full")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_round_trip(tmp_path):
    value = {"name": "Éire", "list": [1, 2.5, None], "nested": {"a": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "Éire" in (tmp_path / "a.json").read_text("utf-8")


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        (b"", "not valid JSON"),
        (b'{"a": ', "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[1, 2]", "must be a JSON object, not a list"),
        (b"3", "must be a JSON object, not a int"),
    ],
)
def test_json_errors_name_the_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json .*{message}|a.json {message}"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "value, wrong",
    [
        ({}, "'a' is missing"),
        ({"a": None}, "'a' is None"),
        ({"a": True}, "'a' is True"),  # no whole number, though Python takes it for one
        ({"a": 1.0}, "'a' is 1.0"),
        ({"a": -1}, "'a' is -1"),
        ({"a": "1"}, "'a' is '1'"),
        ({"a": [7] * 99}, "'a' is .7, 7"),
    ],
)
def test_a_key_of_another_type_is_named(tmp_path, value, wrong):
    write_json(tmp_path / "a.json", value)
    with pytest.raises(ValueError, match=f"a.json is damaged .{wrong}") as error:
        read_json(tmp_path / "a.json", a=int)
    assert len(str(error.value)) < 200 + len(str(tmp_path))
    write_json(tmp_path / "a.json", {"a": 0, "b": "more"})
    assert read_json(tmp_path / "a.json", a=int, b=str) == {"a": 0, "b": "more"}


def test_a_byte_order_mark_is_no_part_of_json(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_paths_are_made_alike_and_nothing_else(tmp_path):
    parser = new_parser("")
    for name in ("data", "text", "student"):
        parser.add_argument(f"--{name}")
    args = parser.parse_args(["--data", "./a//b/", "--text", "a=", "--student=nano"])
    assert vars(args) == {"data": "a/b", "text": "a=", "student": "nano"}


@pytest.mark.parametrize(
    "error, code, shown",
    [
        (ValueError("temperature 0 must be positive"), 2, "error: temperature 0 must be positive"),
        (FileNotFoundError("no such file"), 2, "error: no such file"),
        (KeyboardInterrupt("saved at step 3"), 130, "saved at step 3"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_a_mistake_ends_in_one_sentence(error, code, shown, capsys):
    def main(args):
        raise error

    with pytest.raises(SystemExit) as stop:
        command_line(main, None)
    assert stop.value.code == code
    assert capsys.readouterr().err == f"{shown}\n"


def test_nothing_left_to_do_is_no_mistake(capsys):
    def main(args):
        raise Finished("finished already")

    command_line(main, None)
    assert "finished already" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["tensor", "python"])
def test_out_of_memory_says_what_to_lower(kind, capsys):
    def main(args):
        if kind == "tensor":
            torch.empty(10**15, dtype=torch.float32)
        raise MemoryError

    with pytest.raises(SystemExit) as stopped:
        command_line(main, None)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and len(said.splitlines()) == 1
    assert "out of memory (" in said and "lower --batch_size" in said


def test_our_own_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        command_line(lambda args: 1 / 0, None)


# Two processes.


def elsewhere(code: str, *words) -> subprocess.Popen:
    """Python code in a process of its own; it is ready when it has printed a line."""
    words = [
        sys.executable,
        "-c",
        "import sys, time; from files import *\n" + code,
        *map(str, words),
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    process.stdout.readline()
    return process


HOLD = "lock(sys.argv[1]); print('held', flush=True); time.sleep(float(sys.argv[2]))"


def test_a_second_process_is_told_that_the_folder_is_in_use(tmp_path):
    process = elsewhere(HOLD, tmp_path / "a", 60)
    try:
        with pytest.raises(Locked, match="a is in use by another process: wait for it, or pass"):
            opened(tmp_path / "a")
        assert not (tmp_path / "a").exists()
        opened(tmp_path / "b")
    finally:
        process.kill()
        process.wait()
    opened(tmp_path / "a")  # a killed process holds nothing


def test_a_second_process_can_wait(tmp_path):
    process = elsewhere(HOLD, tmp_path / "a", 1)
    started = time.perf_counter()
    lock(tmp_path / "a", wait=True)
    assert time.perf_counter() - started > 0.5
    lock(tmp_path / "a")  # again is no error
    unlock(tmp_path / "a")
    process.wait()
