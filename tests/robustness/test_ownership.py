"""A command writes only into what it made itself: what is there of others' needs --overwrite, an
input is never an output even then, and a failure leaves what was there.

CELLS is the table of classes by entry points: a test, or why there is none.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch

import train_distill_reason
import train_distillation
import train_pretrain
from bench import benchmark, costs
from dataset import make_traces, prepare, teacher_cache
from dataset.packing import PackedText
from eval import reasoning
from eval.experiments.scales import Scale
from eval.report import check_report
from files import Locked, atomic, lock, tokenizer_hash, unlock
from files.atomic import UNFINISHED, atomic_folder
from methods import cached_teacher
from model import ModelConfig, Transformer, load_model, save_model
from tests.conftest import small_text
from tests.robustness.test_bad_input import snapshot
from tests.robustness.test_files import HOLD, elsewhere
from tests.short_runs import Killed, kill_in_update, run

STEPS = "--steps 2 --batch_size 2 --seq_len 32 --eval_every 2 --device cpu --dtype float32".split()
TEXT = ["--data", "data", *STEPS]
PAIR = ["--teacher", "teacher", "--student", "student"]
CHATS = ["--data", "chats.jsonl", *STEPS, "--seq_len", "256"]
CACHE = ["--teacher", "teacher", "--data", "data", "--seq_len", "32", "--k", "4", "--device", "cpu"]
SMALL = ["--vocab_size", "300", "--problems", "20", "--prompts", "5", "--test_problems", "5"]
TRACES = ["--prompts", "prompts.jsonl", "--keep", "all", "--device", "cpu"]
TRACES += ["--temperature", "1", "--samples", "4"]  # an untrained teacher's greedy ones never end
COMMANDS = {
    "pretrain": [train_pretrain, "--model", "student", *TEXT],
    "distill": [train_distillation, *PAIR, *TEXT],
    "reason": [train_distill_reason, *PAIR, *CHATS],
    "cached": [cached_teacher, *PAIR, *TEXT, "--teacher_cache", "sample.cache"],
    "traces": [make_traces, "--teacher", "teacher", *TRACES],
    "cache": [teacher_cache, *CACHE],
    "prepare": [prepare, "--text", "notes", *SMALL],
}
RUNS = ("pretrain", "distill", "reason", "cached")
INPUTS = {  # what is read, by flag
    "pretrain": {"model": "student", "data": "data"},
    "distill": {"teacher": "teacher", "student": "student", "data": "data"},
    "reason": {"teacher": "teacher", "student": "student", "data": "chats.jsonl"},
    "cached": {"teacher": "teacher", "data": "data", "teacher_cache": "sample.cache"},
    "traces": {"teacher": "teacher", "prompts": "prompts.jsonl"},
    "cache": {"teacher": "teacher", "data": "data"},
    "prepare": {"text": "notes", "tokenizer": "data"},
}
PLACES = {  # of --out, where `read` is an input
    "is it": lambda read: read,
    "is a symlink to it": lambda read: link_to(read),
    "lies in it": lambda read: read / "new",
    "holds it": lambda read: read.parent,
}
INPUT = "--out {} would write where --{} {} is read: pass another --out, outside of it"
NOT_OURS = "theirs holds files that this command did not make .letter.txt.: .* or --overwrite"
CELLS = {
    "the output is an input": dict.fromkeys(COMMANDS, INPUT)
    | {"reproduce": "(its inputs are its own outputs)"},
    "others' files are there": dict.fromkeys((*RUNS, "prepare"), NOT_OURS)
    | {
        "traces": "theirs exists and is not a file to go on with: .* or --overwrite to replace it",
        "cache": "theirs is not a teacher cache",
        "reproduce": "README.md is not a report of this preset: pass another --results",
    },
    "it fails": dict.fromkeys(COMMANDS, "what was there is there")
    | {"reproduce": "(rows are only ever added, by renaming; test_kill.py kills sweeps)"},
}
FILES = ("traces", "cache")  # which write a file, the others a folder


def link_to(read: Path) -> Path:
    link = Path(f"link to {read.name}")
    link.symlink_to(read.resolve())
    return link


@pytest.fixture
def world(prepared_folder, tmp_path, monkeypatch):
    """Nothing in it was made by training: each test makes what it needs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    shutil.copytree(prepared_folder, "data")
    for number, name in enumerate(("teacher", "student")):
        torch.manual_seed(number)
        save_model(Transformer(ModelConfig.preset("nano", 400)), name, "data")
    shutil.copy("data/reason_train.jsonl", "chats.jsonl")
    lines = Path("data/reason_prompts.jsonl").read_text("utf-8").splitlines(keepends=True)
    Path("prompts.jsonl").write_text("".join(lines[:2]), "utf-8")
    Path("sample.cache").write_bytes(b"stands for a cache")
    Path("notes").mkdir()
    for number in range(3):
        Path(f"notes/{number}.txt").write_text(small_text(number, 20), "utf-8")
    return tmp_path


def call(entry: str, *more) -> None:
    run(COMMANDS[entry][0], *COMMANDS[entry][1:], *more)


def test_the_table_has_every_cell():
    assert all(set(cells) == {*COMMANDS, "reproduce"} for cells in CELLS.values())
    assert set(INPUTS) == set(COMMANDS)


# An input is never an output.


@pytest.mark.parametrize(
    "entry, flag, name, place",
    [
        (entry, flag, name, place)
        for entry in INPUTS
        for flag, name in INPUTS[entry].items()
        for place in PLACES
        if place != "lies in it" or "." not in name  # nothing lies in a file
    ],
)
def test_an_input_is_never_an_output(entry, flag, name, place, world):
    """Even with --overwrite."""
    read = Path(name)
    if place == "holds it":  # by itself: the world's root holds all
        shutil.move(name, "in")
        read = Path("in") / name
    out = PLACES[place](read)
    before = snapshot(world)
    with pytest.raises(ValueError, match=INPUT.format(out, flag, read)):
        call(entry, f"--{flag}", read, "--out", out, "--overwrite")
    assert snapshot(world) == before


def test_a_preset_is_no_folder(world):
    """A folder may be called nano; as a student that still is the preset."""
    call("distill", "--student", "nano", "--out", "nano", "--alpha", "1")
    with pytest.raises(ValueError, match="nano already holds a run"):
        call("distill", "--student", "nano", "--out", "nano", "--alpha", "1")


def test_no_command_writes_into_a_teacher_by_itself(world):
    """Neither a cache nor answers: it may be someone's download."""
    call("cache", "--data_share", "0.1")
    assert Path("out/sample.cache").is_file()
    Path("teacher/manifest.json").unlink()  # only what we save has one
    before = snapshot(world / "teacher")
    with pytest.raises(ValueError, match="teacher is not a model that was trained here: .*--out"):
        run(reasoning, "--model", "teacher", "--problems", "prompts.jsonl")
    assert snapshot(world / "teacher") == before


# What others made.


@pytest.mark.parametrize("entry", COMMANDS)
def test_others_files_are_not_touched(entry, world):
    Path("theirs").mkdir()
    Path("theirs/letter.txt").write_text("Dear")
    Path("theirs/old.tmp").write_text("theirs")
    if entry in FILES:
        shutil.rmtree("theirs")
        Path("theirs").write_text("Dear")
    before = snapshot(world)
    if entry == "cached":
        Path("sample.cache").unlink()
        call("cache", "--out", "sample.cache")
        before = snapshot(world)
    for more in ([], ["--resume"]) if entry in RUNS else ([],):
        with pytest.raises(ValueError, match=CELLS["others' files are there"][entry]):
            call(entry, "--out", "theirs", *more)
        assert snapshot(world) == before
    call(entry, "--out", "theirs", "--overwrite")  # now it was told to
    if entry in FILES:
        assert Path("theirs").read_bytes() != b"Dear"
    else:  # among them, not instead of them
        assert Path("theirs/letter.txt").read_text() == "Dear"
        assert Path("theirs/old.tmp").read_text() == "theirs"
        PackedText("theirs", "train", 8) if entry == "prepare" else load_model("theirs")


def test_answers_replace_no_file_of_others(world):
    words = ["--model", "teacher", "--problems", "prompts.jsonl", "--out"]
    Path("letter.txt").write_text("Dear")
    before = snapshot(world)
    with pytest.raises(ValueError, match="letter.txt exists: pass --overwrite"):
        run(reasoning, *words, "letter.txt")
    with pytest.raises(ValueError, match="would write where --problems prompts.jsonl is read"):
        run(reasoning, *words, "prompts.jsonl", "--overwrite")
    assert snapshot(world) == before


def test_a_report_replaces_only_a_report(tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(ValueError, match=CELLS["others' files are there"]["reproduce"]):
        check_report(tmp_path, Scale("quick"))
    (tmp_path / "README.md").write_text("# Results of preset `quick`\n")
    assert check_report(tmp_path, Scale("quick")) == tmp_path / "README.md"


def test_what_a_killed_run_left_is_still_its_own(world, monkeypatch):
    """Before the first state is saved, and before anything is."""
    for update in (1, 3):
        with monkeypatch.context() as killing, pytest.raises(Killed):
            kill_in_update(killing, update)
            call("pretrain", "--out", "run", "--steps", "4", "--eval_every", "4")
    call("pretrain", "--out", "run", "--steps", "4", "--eval_every", "4", "--resume")
    assert not Path("run/resume").exists()


def test_a_folder_called_resume_is_not_a_run(world):
    """Of whoever applies for a job: it would be gone once the run is finished."""
    Path("theirs/resume").mkdir(parents=True)
    Path("theirs/resume/letter.txt").write_text("mine")
    before = snapshot(world)
    for more in ([], ["--overwrite"], ["--resume"]):
        with pytest.raises(ValueError, match="theirs/resume holds files that no run made .letter"):
            call("pretrain", "--out", "theirs", *more)
    assert snapshot(world) == before


def test_others_unfinished_files_stay(world):
    Path("theirs").mkdir()
    Path("theirs/notes.2.tmp").write_text("mine")
    call("pretrain", "--out", "theirs", "--overwrite")
    assert Path("theirs/notes.2.tmp").read_text() == "mine" and Path("theirs/run.json").is_file()


@pytest.mark.parametrize("name", ["t.jsonl.finished.json", "t.jsonl.progress.json"])
def test_an_input_is_not_what_is_written_beside_an_output(name, world):
    shutil.copy("prompts.jsonl", name)
    before = snapshot(world)
    with pytest.raises(ValueError, match="would write where --prompts"):
        call("traces", "--prompts", name, "--out", "t.jsonl", "--overwrite")
    assert snapshot(world) == before


def test_problems_that_lie_in_a_model_are_no_place_for_answers(world):
    shutil.copy("prompts.jsonl", "teacher/answers.jsonl")
    before = snapshot(world)
    with pytest.raises(ValueError, match="would write where --problems"):
        run(reasoning, "--model", "teacher", "--problems", "teacher/answers.jsonl")
    assert snapshot(world) == before


def test_a_page_of_costs_replaces_no_other_page(world):
    shutil.copy(Path(benchmark.__file__).parents[1] / "results/benchmark/results.csv", "in")
    Path("in/README.md").write_text("# My project\n")
    with pytest.raises(ValueError, match="README.md is not a page of this command"):
        run(costs, "--results", "in/results.csv")
    assert Path("in/README.md").read_text() == "# My project\n"


def test_a_folder_of_a_presets_name_is_no_students_tokenizer(world):
    """ "nano" stays the preset where conversations are read, too."""
    shutil.copytree("data", "nano")
    Path("nano/tokenizer.json").write_text("of something else")
    flags = ["--student", "nano", "--tokenizer", "data", "--alpha", "1", "--out", "new"]
    call("reason", *flags)
    assert tokenizer_hash("new") == tokenizer_hash("data")


# A failure leaves what was there.


@pytest.mark.parametrize(
    "more, said",
    [
        (["--tokenizer", "plain"], "the tokenizer has no token '<.endoftext.>'"),
        (["--tokenizer", "nowhere"], "no tokenizer in 'nowhere'"),
        (["--reason", "prompts.jsonl"], "no assistant turn"),
        (["--text", "nowhere"], "nowhere does not exist"),
    ],
)
def test_prepare_fails_before_it_changes_anything(more, said, world):
    call("prepare", "--out", "prepared")
    Path("plain").mkdir()
    content = Path("data/tokenizer.json").read_text("utf-8")
    Path("plain/tokenizer.json").write_text(content.replace("<|endoftext|>", "<|end|>"), "utf-8")
    before = snapshot(world)
    with pytest.raises(ValueError, match=said):
        call("prepare", *more, "--out", "prepared", "--overwrite")
    assert snapshot(world) == before


def test_prepare_keeps_a_folder_of_the_users_whatever_its_name(world):
    for name in ("new", "old", "tmp"):
        Path("mine", name).mkdir(parents=True)
        Path("mine", name, "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine holds files that this command did not make"):
        call("prepare", "--out", "mine")
    call("prepare", "--out", "mine", "--overwrite")
    assert PackedText("mine", "train", 8).size
    kept = [Path("mine", name, "thesis.txt").read_text() for name in ("new", "old", "tmp")]
    assert kept == ["years of work"] * 3


def test_prepare_replaces_only_when_told_to(world):
    call("prepare", "--out", "prepared")
    before = snapshot(world)
    with pytest.raises(ValueError, match="was prepared with another vocab_size: pass --overwrite"):
        call("prepare", "--out", "prepared", "--vocab_size", "310")
    assert snapshot(world) == before
    call("prepare", "--out", "prepared", "--tokenizer", "data", "--overwrite")
    assert PackedText("prepared", "train", 8).vocab_size == 400


def test_a_folder_is_whole_or_known_not_to_be(tmp_path):
    """Ended before each of its renames and removals, as by a kill, and called again."""
    folder, files = tmp_path / "f", ("a", "b", "meta")

    def fill(content):
        with atomic_folder(folder, last="meta") as new:
            for file in files:
                (new / file).write_text(content)

    for number in range(1, 6):
        shutil.rmtree(folder, ignore_errors=True)
        fill("old")
        left = [number]

        def or_die(act):
            def acting(*words, **more):
                left[0] -= 1  # noqa: B023
                if left[0] == 0:  # noqa: B023
                    os._exit(0)
                return act(*words, **more)

            return acting

        child = os.fork()
        if child == 0:
            atomic.move, Path.unlink = or_die(atomic.move), or_die(Path.unlink)
            Path.rmdir = or_die(Path.rmdir)
            fill("new")
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0, "more operations were expected"
        found = {file: (folder / file).read_text() for file in files if (folder / file).exists()}
        assert "meta" not in found or len(set(found.values())) == 1, (number, found)
        assert (folder / UNFINISHED).exists()  # which says whose folder it is
        fill("new")
        assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(
            files, "new"
        )


@pytest.mark.parametrize("entry", ["cache", "traces"])
def test_a_replacement_that_fails_leaves_the_old_file(entry, world):
    call(entry, "--out", "made")
    before = snapshot(world)
    for more in (["--teacher", "nowhere"], ["--temperature", "-1"]):
        with pytest.raises(ValueError):
            call(entry, *more, "--out", "made", "--overwrite")
        assert snapshot(world) == before


def test_a_cache_is_replaced_only_when_the_new_one_is_whole(world, monkeypatch):
    call("cache", "--out", "made")
    before = Path("made").read_bytes()

    def killed(*_):
        raise Killed

    with monkeypatch.context() as killing, pytest.raises(Killed):
        killing.setattr(teacher_cache, "teacher_output", killed)
        call("cache", "--out", "made", "--seed", "1", "--overwrite")
    assert Path("made").read_bytes() == before
    call("cache", "--out", "made", "--seed", "1", "--overwrite")
    assert Path("made").read_bytes() != before


@pytest.mark.parametrize("entry", RUNS)
def test_a_run_is_replaced_only_after_all_that_it_reads_was_read(entry, world):
    if entry == "cached":
        Path("sample.cache").unlink()
        call("cache", "--out", "sample.cache")
    call(entry, "--out", "made")
    before = snapshot(world)
    for flag in INPUTS[entry]:
        with pytest.raises(ValueError):
            call(entry, f"--{flag}", "nowhere", "--out", "made", "--overwrite")
        assert snapshot(world) == before


# Locks.


def test_two_paths_to_one_place_are_one_lock(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "up").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    process = elsewhere(HOLD, tmp_path / "run", 60)
    try:
        for path in ("link", "up/run", "run/", "./run/../link"):
            with pytest.raises(Locked, match="is in use by another process"):
                lock(path)
    finally:
        process.kill()
        process.wait()
    lock("link")
    unlock("run")
