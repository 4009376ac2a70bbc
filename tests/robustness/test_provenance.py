"""Whatever resumes, continues or reuses something refuses where a file that it was made from has
changed since, and names that file.

WORLD has a small data folder, teacher, student and cache, and one begun thing for each entry point:
a run that was killed, traces, caches, a finished run of a sweep. A test copies it, changes one
file, and calls the same command again. CELLS is the table: of every change at every entry point
what the sentence says, or why there is nothing to refuse.
"""

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import train_distill_reason
import train_distillation
import train_pretrain
from dataset import make_traces, prepare, teacher_cache
from dataset.packing import PackedText
from dataset.teacher_cache import HASH_BYTES
from eval.experiments.common import Experiment, prepare_data, run_experiments
from eval.experiments.jobs import Job
from eval.experiments.rows import append_rows
from eval.experiments.scales import Scale
from files import Finished, file_hash, known_hash, origin, read_json
from methods import cached_teacher
from model import ModelConfig, Transformer, save_model
from tests.conftest import small_text
from tests.robustness.test_bad_input import snapshot
from tests.short_runs import Killed, kill_in_update, run

STEPS = "--steps 4 --batch_size 2 --seq_len 32 --eval_every 2 --warmup 1 --device cpu"
STEPS = f"{STEPS} --dtype float32 --optimizer adamw".split()
TEXT = ["--data", "data", *STEPS]
PAIR = ["--teacher", "teacher", "--student", "student"]
CHATS = ["--data", "data/reason_train.jsonl", *STEPS, "--seq_len", "256"]
CACHE = ["--teacher", "teacher", "--data", "data", "--seq_len", "32", "--k", "4", "--device", "cpu"]
SMALL = ["--vocab_size", "300", "--problems", "20", "--prompts", "5", "--test_problems", "5"]
COMMANDS = {
    "pretrain": [train_pretrain, "--model", "student", *TEXT],
    "distill": [train_distillation, *PAIR, *TEXT],
    "reason": [train_distill_reason, *PAIR, *CHATS],
    "cached": [cached_teacher, *PAIR, *TEXT, "--teacher_cache", "sample.cache"],
    "traces": [
        *(make_traces, "--teacher", "teacher", "--prompts", "prompts.jsonl", "--keep", "all"),
        *("--temperature", "1", "--samples", "4", "--device", "cpu", "--out", "traces.jsonl"),
    ],
    "cache": [teacher_cache, *CACHE, "--out", "sample.cache"],
    "begun cache": [teacher_cache, *CACHE, "--out", "begun.cache"],
    "prepare": [prepare, "--text", "notes", "--out", "prepared", *SMALL],
}
RUNS = ("pretrain", "distill", "reason", "cached")
FLAGS = (("teacher", "teacher"), ("student", "student"), ("data", "data"), ("steps", 4))
JOB = Job("train_distillation", "done", FLAGS)


@pytest.fixture(scope="module")
def made_world(prepared_folder, tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    patch = pytest.MonkeyPatch()
    patch.chdir(world)
    shutil.copytree(prepared_folder, "data")
    for number, name in enumerate(("teacher", "student")):
        save_random(name, seed=number)
    lines = Path("data/reason_prompts.jsonl").read_text("utf-8").splitlines(keepends=True)
    Path("prompts.jsonl").write_text("".join(lines[:2]), "utf-8")
    Path("notes").mkdir()
    for number in range(3):
        Path(f"notes/{number}.txt").write_text(small_text(number, 20), "utf-8")
    for name in ("traces", "cache", "prepare"):
        run(*COMMANDS[name])
    for name in RUNS:
        with pytest.MonkeyPatch.context() as killing, pytest.raises(Killed):
            kill_in_update(killing, 3)
            run(*COMMANDS[name], "--out", name)
    run(*COMMANDS["distill"], "--out", "done")

    def killed(*_):
        raise Killed

    with pytest.MonkeyPatch.context() as killing, pytest.raises(Killed):
        killing.setattr(teacher_cache, "teacher_output", killed)
        run(*COMMANDS["begun cache"])
    patch.undo()
    return world


@pytest.fixture
def world(made_world, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(made_world, tmp_path / "world"))
    return tmp_path / "world"


def save_random(folder, seed) -> None:
    torch.manual_seed(seed)
    save_model(Transformer(ModelConfig.preset("nano", 400)), folder, "data")


def go_on(entry: str) -> None:
    """What a user does who takes the thing for what it was."""
    if entry == "reproduce":
        assert JOB.is_done()
    else:
        resume = ["--resume", "--out", entry] if entry in RUNS else []
        run(*COMMANDS[entry], *resume)


# Changes.


def flip(path) -> None:
    content = bytearray(Path(path).read_bytes())
    content[-HASH_BYTES - 1] ^= 1
    Path(path).write_bytes(content)


def text_of_another_day() -> None:
    """As prepare leaves it: the hashes in meta.json are those of the new files."""
    content = Path("data/train.bin").read_bytes()  # two bytes a token: the first one goes last
    Path("data/train.bin").write_bytes(content[2:] + content[:2])
    meta = read_json("data/meta.json")
    meta["train"]["sha256"] = file_hash("data/train.bin")
    Path("data/meta.json").write_text(json.dumps(meta))
    Path("notes/0.txt").write_text(small_text(9, 20), "utf-8")


def other_tokenizer(folder) -> None:
    """Of the same size: two tokens have changed places."""
    path = Path(folder, "tokenizer.json")
    content = read_json(path)
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content), "utf-8")


def other_config(folder) -> None:
    config = read_json(Path(folder, "config.json"))
    Path(folder, "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    Path(folder, "manifest.json").unlink()  # or the model would not even be loaded


def other_line(path) -> None:
    content = Path(path).read_text("utf-8")
    Path(path).write_text(content.replace("How", "Now", 1), "utf-8")
    assert Path(path).read_text("utf-8") != content


def another_cache() -> None:
    """Whole, and of the same teacher and text: its last record has another bit."""
    flip("sample.cache")
    content = Path("sample.cache").read_bytes()[:-HASH_BYTES]
    Path("sample.cache").write_bytes(content + hashlib.sha256(content).digest())


CHANGES = {
    "data prepared again": text_of_another_day,
    "a bit of train.bin": lambda: flip("data/train.bin"),
    "a bit of val.bin": lambda: flip("data/val.bin"),
    "the data's tokenizer": lambda: other_tokenizer("data"),
    "the teacher's weights": lambda: save_random("teacher", seed=2),
    "the teacher's config": lambda: other_config("teacher"),
    "the teacher's tokenizer": lambda: other_tokenizer("teacher"),
    "the student's weights": lambda: save_random("student", seed=3),
    "the student's tokenizer": lambda: other_tokenizer("student"),
    "the conversations": lambda: other_line("data/reason_train.jsonl"),
    "the prompts": lambda: other_line("prompts.jsonl"),
    "a bit of the cache": lambda: flip("sample.cache"),
    "another cache": another_cache,
}
NO_TEXT = "(reads no packed text)"
NO_TEACHER = "(reads no teacher)"
NO_STUDENT = "(reads no student)"
NO_CHATS = "(reads no conversations)"
NO_PROMPTS = "(reads no prompts)"
NO_CACHE = "(reads no cache)"
CHANGED = "was made from other content: {} has changed .sha256 .* then, .* now.; "
NOT_IN_META = "data/{} is not the one whose sha256 is in meta.json: make it with"
OTHER = "sample.cache was made with {} .*, this run has .*: make it again with: python -m"
OTHERS = "sample.cache was made with another .*{}: pass --overwrite to replace it"
BEGUN = "begun.cache.partial was begun with other flags .*{}.*: use those, pass another --out"
SAVED = "{}/tokenizer.json is not the one that these weights were saved with: copy that back"
OWN = "(its own folder, prepared/, is flipped in the test below)"
ENTRIES = (*COMMANDS, "reproduce")


def files(path, begun, **cells) -> dict[str, str]:
    """What run folders and sweeps say of `path`, but for those that say something else."""
    said = dict.fromkeys((*RUNS, "traces", "reproduce"), CHANGED.format(path))
    return {**said, **cells, "begun cache": begun}


def meta(name) -> dict[str, str]:
    said = dict.fromkeys(("pretrain", "distill", "cached", "cache", "begun"), NOT_IN_META)
    said = {entry: words.format(name) for entry, words in said.items()}
    return files(f"data/{name}", **said, reason=NO_TEXT, traces=NO_TEXT, prepare=OWN)


CELLS = {
    "data prepared again": files(
        "data/train.bin", cached=OTHER.format("text_sha256"), cache=OTHERS.format("text_sha256"),
        begun=BEGUN.format("text_sha256"), reason=NO_TEXT, traces=NO_TEXT,
        prepare="prepared was prepared with another content: pass --overwrite",
    ),
    "a bit of train.bin": meta("train.bin"),
    "a bit of val.bin": meta("val.bin"),
    "the data's tokenizer": {
        **meta("tokenizer.json"), "reason": "(conversations are read with the student's)",
    },
    "the teacher's weights": files(
        "teacher/model.safetensors", cached=OTHER.format("teacher_sha256"),
        cache=OTHERS.format("teacher_sha256"), begun=BEGUN.format("teacher_sha256"),
        pretrain=NO_TEACHER, prepare=NO_TEACHER,
    ),
    "the teacher's config": files(
        "teacher/config.json", cached=OTHER.format("teacher_config_sha256"),
        cache=OTHERS.format("teacher_config_sha256"), begun=BEGUN.format("teacher_config_sha256"),
        pretrain=NO_TEACHER, prepare=NO_TEACHER,
    ),
    "the teacher's tokenizer": files(
        "teacher/tokenizer.json", pretrain=NO_TEACHER, prepare=NO_TEACHER,
        **dict.fromkeys((*RUNS[1:], "traces", "cache", "begun"), SAVED.format("teacher")),
    ),
    "the student's weights": files(
        "student/model.safetensors", cache=NO_STUDENT, begun=NO_STUDENT, traces=NO_STUDENT,
        prepare=NO_STUDENT,
    ),
    "the student's tokenizer": files(
        "student/tokenizer.json", **dict.fromkeys(RUNS, SAVED.format("student")), cache=NO_STUDENT,
        begun=NO_STUDENT, traces=NO_STUDENT, prepare=NO_STUDENT,
    ),
    "the conversations": files(
        "data/reason_train.jsonl",
        **dict.fromkeys(("pretrain", "distill", "cached", "traces", "cache", "begun"), NO_CHATS),
        prepare=NO_CHATS, reproduce="(this run has none; test_eval.py has a sweep with some)",
    ),
    "the prompts": files(
        "prompts.jsonl", **dict.fromkeys((*RUNS, "cache", "begun", "prepare"), NO_PROMPTS),
        reproduce="(this run has none)",
    ),
    "a bit of the cache": files(
        "", **dict.fromkeys(("pretrain", "distill", "reason", "traces", "prepare"), NO_CACHE),
        cached="sample.cache is damaged: .* delete it, make it with",
        cache="sample.cache is damaged: .* delete it, make it with",
        begun="(not written yet; what a kill left behind is made again)",
        reproduce="(this run has none)",
    ),
    "another cache": files(
        "sample.cache", **dict.fromkeys(("pretrain", "distill", "reason", "traces"), NO_CACHE),
        cache="(of the same teacher and text, and whole: there is nothing to tell)",
        begun=NO_CACHE, prepare=NO_CACHE, reproduce="(this run has none)",
    ),
}  # fmt: skip
TESTED = [(c, e) for c in CELLS for e in ENTRIES if not CELLS[c][e].startswith("(")]


def test_the_table_has_every_cell():
    assert set(CELLS) == set(CHANGES) and all(set(CELLS[name]) == set(ENTRIES) for name in CELLS)
    assert {entry for _, entry in TESTED} == set(ENTRIES)


@pytest.mark.parametrize("change, entry", TESTED)
def test_what_was_made_from_something_else_is_refused(change, entry, world):
    CHANGES[change]()
    before = snapshot(world)
    with pytest.raises(ValueError, match=CELLS[change][entry]):
        go_on(entry)
    assert snapshot(world) == before


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_a_change_it_goes_on(entry, world):
    try:
        go_on(entry)
    except Finished as reason:
        assert "already" in str(reason) and entry in ("cache", "prepare")
    if entry in RUNS:
        made_from = read_json(Path(entry) / "run.json")["made_from"]
        assert made_from == {path: file_hash(path) for path in made_from}
        assert "student/model.safetensors" in made_from
        assert ("teacher/model.safetensors" in made_from) == (entry != "pretrain")
        with pytest.raises(Finished):
            go_on(entry)


def test_how_a_model_talks_is_what_traces_and_runs_are_made_from(world):
    """Where its replies end, and its chat template, also one that was not there before."""
    ends = Path("teacher/generation_config.json")
    before = ends.read_text("utf-8")
    ends.write_text(json.dumps({"eos_token_id": [9]}), "utf-8")
    with pytest.raises(ValueError, match="generation_config.json has changed.*--overwrite"):
        go_on("traces")
    ends.write_text(before, "utf-8")
    template = "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
    for folder, entry in (("teacher", "traces"), ("student", "reason")):
        Path(folder, "chat_template.jinja").write_text(template, "utf-8")
        with pytest.raises(ValueError, match=f"made without {folder}/chat_template.jinja, which"):
            go_on(entry)
        Path(folder, "chat_template.jinja").unlink()
        go_on(entry)


@pytest.mark.parametrize("change", [other_line, Path.unlink])
def test_a_prepared_folder_is_compared_whole(change, world):
    change(Path("prepared/reason_test.jsonl"))
    with pytest.raises(ValueError, match="prepared/reason_test.jsonl has changed.*--overwrite"):
        go_on("prepare")
    go_on_with = [*COMMANDS["prepare"], "--overwrite"]
    run(*go_on_with)
    with pytest.raises(Finished):
        go_on("prepare")


def test_a_finished_run_is_not_taken_for_one_of_other_data(world):
    text_of_another_day()
    with pytest.raises(ValueError, match="data/train.bin has changed"):
        run(*COMMANDS["distill"], "--out", "done", "--resume")


@pytest.mark.parametrize("entry", RUNS)
def test_a_student_of_another_tokenizer_is_refused(entry, world):
    """Of equal size, and with no manifest: a download. (A text is read with the data's tokenizer,
    conversations with the student's, which is then not the teacher's.)"""
    other_tokenizer("student")
    Path("student/manifest.json").unlink()
    said = "the tokenizer of (student|teacher) .*vocabulary 400.* is not the one of "
    with pytest.raises(ValueError, match=said + ".*: both must use one tokenizer"):
        run(*COMMANDS[entry], "--out", "fresh")
    assert not Path("fresh").exists()


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_a_damaged_folder_is_not_taken_for_prepared(name, world):
    before = Path("prepared", name).read_bytes()
    flip(Path("prepared", name))
    with pytest.raises(ValueError, match=f"prepared/{name} is not the one .* --overwrite"):
        go_on("prepare")
    run(*COMMANDS["prepare"], "--overwrite")  # as the sentence says
    assert Path("prepared", name).read_bytes() == before


def test_advice_after_traces_that_all_failed_works(world):
    """Train longer, or keep all: the file of before is not in the way."""
    verified = [*COMMANDS["traces"], "--keep", "verified", "--out", "none.jsonl"]
    cure = "train it longer, or (use --keep all|raise --max_new_tokens)"
    with pytest.raises(ValueError, match=cure):
        run(*verified)
    assert run(*COMMANDS["traces"], "--out", "none.jsonl")["kept"] > 0


def test_a_sweep_goes_on_where_inputs_were_deleted(world):
    shutil.rmtree("teacher")
    assert JOB.is_done()


def test_rows_of_one_table_are_of_one_data(world):
    made = {"arm": "a", "seed": 0, "data_sha256": "0" * 12, "teacher_sha256": "1" * 12}
    made["problems_sha256"] = "3" * 12
    made["command"] = "python train_distillation.py --teacher t --data d --out x"
    append_rows(Path("x.csv"), [made])
    append_rows(Path("x.csv"), [{**made, "seed": 1}])
    for column in ("data_sha256", "teacher_sha256", "problems_sha256"):
        with pytest.raises(ValueError, match="x.csv has rows made with .* move that file"):
            append_rows(Path("x.csv"), [{**made, "seed": 2, column: "2" * 12}])
    with open("x.csv", newline="") as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0", "1"]


@pytest.mark.parametrize("what", ["data", "teacher"])
def test_a_whole_table_is_compared_with_the_inputs_of_today(what, world):
    """A sweep that finds nothing left to run would otherwise draw what other data gave."""
    made = {"arm": "a", "seed": 0, "data_sha256": known_hash("data/train.bin")[:12]}
    made["teacher_sha256"] = known_hash("teacher/model.safetensors")[:12]
    made["command"] = "python train_distillation.py --teacher teacher --data data --out x"
    append_rows(Path("results/x/results.csv"), [made])
    whole = Experiment("x", [("a", lambda seed: JOB)], 1, dict)
    run_experiments([whole], Path("results"))
    if what == "data":
        text_of_another_day()
    else:
        flip("teacher/model.safetensors")
    with pytest.raises(ValueError, match=f"has rows made with --{what} {what} .* move that file"):
        run_experiments([whole], Path("results"))
    shutil.rmtree(what)  # the table may be all that was kept
    run_experiments([whole], Path("results"))


def test_a_sweep_wants_its_own_problems(world):
    shutil.copytree("data", "out/x/data")
    with pytest.raises(ValueError, match=r"out/x/data was prepared with --problems 150, .* 9:"):
        prepare_data(Scale("x", vocab_size=400, problems=9, prompts=20, test_problems=20))


# How hashes are remembered.


def test_a_file_is_hashed_once_and_again_when_it_changes(world, monkeypatch):
    hashed = []
    monkeypatch.setattr(origin, "known", {})
    monkeypatch.setattr(origin, "file_hash", lambda *words: hashed.append(words) or "digest")
    for _ in range(3):
        origin.known_hash("data/train.bin")
        origin.known_hash(world / "data" / "train.bin")
    assert len(hashed) == 1
    about = os.stat("data/train.bin")
    flip("data/train.bin")
    os.utime("data/train.bin", ns=(about.st_atime_ns, about.st_mtime_ns))  # as nobody does
    origin.known_hash("data/train.bin")
    assert len(hashed) == 2


def test_hashes_of_large_files_outlive_the_process(world, monkeypatch):
    """Beside the output, never in the teacher's folder; a damaged memory is none."""
    monkeypatch.setattr(origin, "LARGE", 0)
    monkeypatch.setattr(origin, "memory", None)
    before = {path for path in world.rglob("*") if path.is_file()}
    for content, computed in ((None, True), (None, False), ("{", True)):
        if content:
            Path("out/.hashes.json").write_text(content)
        monkeypatch.setattr(origin, "known", {})
        hashed = []
        monkeypatch.setattr(origin, "file_hash", lambda *w, seen=hashed: seen.append(w) or "x" * 64)
        origin.remember_hashes(Path("out"))
        assert origin.known_hash("teacher/model.safetensors") == "x" * 64
        assert bool(hashed) == computed
    assert {p for p in world.rglob("*") if p.is_file()} - before == {world / "out/.hashes.json"}


def test_a_prepared_folder_says_what_is_wrong_in_it(world):
    other_tokenizer("data")
    with pytest.raises(ValueError, match="data/tokenizer.json is not the one"):
        PackedText("data", "val", 32)
