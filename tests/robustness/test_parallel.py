"""Several processes train as one does: two of them, on a CPU, started by torchrun.

Starting processes is slow, so one launch makes all runs that should end well; see `JOBS`.
"""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_distill_reason
import train_distillation
import train_pretrain
from dataset import teacher_cache
from files import read_json
from methods import cached_teacher
from model import load_model
from run import batches, parallel
from tests.robustness import projection
from tests.short_runs import logged, run, weights

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "8", "--batch_size", "7", "--seq_len", "32", "--eval_every", "4"]
SMALL += ["--warmup", "2", "--device", "cpu", "--dtype", "float32", "--learning_rate", "0.001"]
SMALL += ["--final_eval", "8"]
ADAMW = ["--optimizer", "adamw"]
NO_CLIP = [*ADAMW, "--grad_clip", "0", "--learning_rate", "0.1"]
ABSURD = ["--learning_rate", "3", "--steps", "99", "--eval_every", "2", "--patience", "2"]
# name: (script and data, flags, what is done to the run). Of a batch of 7 conversations one process
# gets 4 pieces, the other 3, of other lengths and masks.
JOBS = {
    "pretrain": ("pretrain", ADAMW, ""),
    "pretrain_fsdp": ("pretrain", [*ADAMW, "--fsdp"], ""),
    "accumulate": ("pretrain", [*ADAMW, "--accumulation_steps", "3"], ""),
    "muon": ("pretrain", ["--learning_rate", "0.012"], ""),
    "chat": ("chat", ADAMW, ""),
    "chat_fsdp": ("chat", [*ADAMW, "--fsdp"], ""),
    "distill": ("distill", ADAMW, ""),
    "distill_fsdp": ("distill", [*ADAMW, "--fsdp"], ""),
    "fused_fsdp": ("distill", [*ADAMW, "--fsdp", "--fused", "yes"], ""),
    "reason": ("reason", ADAMW, ""),
    "reason_fsdp": ("reason", [*ADAMW, "--fsdp"], ""),
    "projection": ("projection", ADAMW, ""),
    "projection_fsdp": ("projection", [*ADAMW, "--fsdp"], ""),
    "sgd": ("reason", NO_CLIP, "sgd"),
    "sgd_fsdp": ("reason", [*NO_CLIP, "--fsdp"], "sgd"),
    "tags": ("tags", NO_CLIP, "sgd"),
    "tags_fsdp": ("tags", [*NO_CLIP, "--fsdp"], "sgd"),
    "cached": ("cached", ADAMW, ""),
    "killed": ("pretrain", ADAMW, "kill"),
    "muon_fsdp": ("projection", ["--fsdp"], ""),
    "killed_fsdp": ("projection", ["--fsdp"], "kill"),
    "patience": ("pretrain", [*ADAMW, *ABSURD], ""),
    "elsewhere": ("pretrain", [*ADAMW, "--fsdp"], "kill for good"),
}
DRIVER = """
import json, sys
import torch
from importlib import import_module
from files import command_line
from run import training
from run.optimizer import Optimizer

training.EVALUATED = 8

class Killed(Exception):
    pass

def jobs(listed):
    for script, words, deed in listed:
        script, adamw, update = import_module(script), torch.optim.AdamW, Optimizer.update
        def run(*more):
            script.main(script.parse_args([*words, *more]))
        left = [6]
        def update_and_die(self, rate):
            left[0] -= 1
            if not left[0]:  # the last saved state is of step 4
                raise Killed
            update(self, rate)
        if deed == "sgd":
            torch.optim.AdamW = lambda groups, lr, **_: torch.optim.SGD(groups, lr=lr)
        if deed.startswith("kill"):
            Optimizer.update = update_and_die
            try:
                run()
            except Killed:
                Optimizer.update = update
            if deed == "kill":
                run("--resume")
        else:
            run()
        torch.optim.AdamW = adamw

command_line(jobs, json.load(open(sys.argv[1])))
"""


def cache_of(teacher) -> list:
    return ["--teacher_cache", teacher and teacher.parent / "sample.cache"]


def argv_of(name, prepared_folder, teacher) -> list:
    text = ["--data", prepared_folder, *SMALL]
    chats = ["--data", prepared_folder / "reason_train.jsonl", *SMALL, "--seq_len", "256"]
    reason = [train_distill_reason, "--student", "nano", "--tokenizer", prepared_folder, *chats]
    return {
        "pretrain": [train_pretrain, "--model", "nano", *text],
        "distill": [train_distillation, "--teacher", teacher, *text],
        "projection": [projection, "--teacher", teacher, *text],
        "cached": [cached_teacher, *cache_of(teacher), "--teacher", teacher, *text],
        "chat": [train_distillation, "--teacher", teacher, *chats],
        "reason": [*reason, "--teacher", teacher],
        "tags": [*reason, "--tag_weight", "30", "--think_weight", "0.2"],
    }[name]


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("parallel") / "teacher"
    script, *words = argv_of("pretrain", prepared_folder, None)
    run(script, *words, "--out", out)
    words = ["--teacher", out, "--data", prepared_folder, "--dtype", "float32"]
    run(teacher_cache, *words, "--seq_len", "32", "--k", "8", "--out", cache_of(out)[1])
    return out


def command(*words) -> list[str]:
    """torchrun with two processes, on a port that is free now."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    return [*start, f"--master_port={port}", *map(str, words)]


def environment(**more) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def launch(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*words), capture_output=True, text=True, env=environment(), timeout=300
    )


@pytest.fixture(scope="module")
def two(prepared_folder, teacher, tmp_path_factory):
    """The folder of all runs of JOBS, each made by two processes; and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    listed = []
    for name, (kind, flags, deed) in JOBS.items():
        script, *words = argv_of(kind, prepared_folder, teacher)
        words = [str(word) for word in (*words, *flags, "--out", folder / name)]
        listed.append((script.__name__, words, deed))
    (folder / "jobs.json").write_text(json.dumps(listed))
    (folder / "driver.py").write_text(DRIVER)
    result = launch(folder / "driver.py", folder / "jobs.json")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result


@pytest.fixture(scope="module")
def one(prepared_folder, teacher, tmp_path_factory):
    """Make the run of the same flags, without --fsdp, in this process; returns its folder."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def make(name):
        kind, flags, deed = JOBS[name]
        flags = [flag for flag in flags if flag != "--fsdp"]
        key = (kind, *flags, deed)
        if key not in made:  # a job with --fsdp and one without are compared with the same run
            script, *words = argv_of(kind, prepared_folder, teacher)
            run(script, *words, *flags, "--out", folder / name)
            made[key] = folder / name
        return made[key]

    return make


def farthest(one, two) -> float:
    """The largest difference between two runs' weights."""
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def losses(folder) -> list[float]:
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 3
    return [float(row[key]) for row in rows for key in ("train_loss", "val_loss") if row[key]]


@pytest.mark.parametrize(
    "name",
    [
        *("pretrain", "chat", "reason", "pretrain_fsdp", "chat_fsdp", "reason_fsdp"),
        *("distill", "distill_fsdp", "fused_fsdp", "accumulate", "cached"),
    ],
)
def test_two_processes_train_as_one(name, one, two):
    single, double = one(name), two[0] / name
    assert losses(double) == pytest.approx(losses(single), abs=1e-5)
    assert farthest(single, double) < 1e-4
    assert farthest(single / "best", double / "best") < 1e-4


@pytest.mark.parametrize("name", ["projection", "projection_fsdp"])
def test_a_projection_learns_in_two_processes_as_in_one(name, one, two):
    single, double = one(name), two[0] / name
    assert losses(double) == pytest.approx(losses(single), abs=1e-5)
    assert farthest(single, double) < 1e-4
    first, second = (torch.load(x / "projection.pt") for x in (single, double))
    for key in ("weight", "bias"):
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "sgd_fsdp", "tags", "tags_fsdp"])
def test_gradients_are_summed_not_averaged(name, one, two, monkeypatch):
    """Adam and Muon do not see a gradient's scale; gradient descent without clipping does. The
    processes hold unequal numbers of labels, and sums of weights in another proportion."""
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, **_: sgd(groups, lr=lr))
    single, double = one(name), two[0] / name
    start, end = losses(single)[0], losses(single)[-2]
    assert start - end > 0.1  # it went far enough to show a wrong scale
    assert losses(double) == pytest.approx(losses(single), abs=1e-5)
    assert farthest(single, double) < 1e-5


def test_two_processes_equal_two_microbatches_to_the_bit(one, two, monkeypatch):
    """One process that adds up the gradients of the same rows in the same order; Muon, which
    rounds to bfloat16 and so makes much of the smallest difference."""

    def of_both(batch, parts, padded):
        for rank in (0, 1):
            yield from batches.pieces_of_rank(batch, parts, padded, rank, 2)

    monkeypatch.setattr("run.run.micro_batches", of_both)
    assert farthest(one("muon"), two[0] / "muon") == 0.0


def test_muon_on_sharded_matrices(one, two):
    """Its sums are in bfloat16, and here in another order: close, not equal."""
    single, double = one("muon_fsdp"), two[0] / "muon_fsdp"
    assert losses(double) == pytest.approx(losses(single), abs=1e-3)
    assert farthest(single, double) < 2e-3


@pytest.mark.parametrize("whole, killed", [("pretrain", "killed"), ("muon_fsdp", "killed_fsdp")])
def test_a_killed_run_resumes_to_the_same_bits(whole, killed, two):
    """The second one is sharded, and has a projection beside the student."""
    whole, killed = two[0] / whole, two[0] / killed
    assert farthest(whole, killed) == 0.0
    assert logged(whole) == logged(killed)
    assert not (killed / "resume").exists()


def test_a_sharded_run_goes_on_in_one_process(prepared_folder, teacher, two):
    folder, _ = two
    (path,) = (folder / "elsewhere" / "resume").glob("state-000000004-*.pt")
    state = torch.load(path, weights_only=True)
    assert state["step"] == 4
    script, *words = argv_of("pretrain", prepared_folder, teacher)
    run(script, *words, *ADAMW, "--out", folder / "elsewhere", "--resume")
    assert farthest(folder / "pretrain", folder / "elsewhere") < 1e-4


def test_one_process_writes_and_prints(two):
    folder, result = two
    record = read_json(folder / "pretrain_fsdp" / "run.json")
    assert record["processes"] == 2
    assert record["parameters"] == load_model(folder / "pretrain").num_parameters()
    assert record["tokens"] == 8 * 7 * 32
    assert result.stdout.count("/pretrain_fsdp: val_loss") == 1
    assert result.stdout.count("resuming after step 4") == 2
    assert not list(folder.rglob("*.tmp"))


def test_patience_ends_all_processes(two):
    record = read_json(two[0] / "patience" / "run.json")
    assert record["steps"] == record["best_step"] + 2 * 2 < 99


# Rows and pieces, without processes.


@pytest.mark.parametrize("padded, columns", [(False, 5), (True, 70)])
@pytest.mark.parametrize("processes, rows", [(2, 6), (3, 7), (4, 3)])
def test_every_label_counts_once_over_all_processes(processes, rows, padded, columns, monkeypatch):
    ids = torch.arange(rows * columns).view(rows, columns)
    ends = 17 * torch.arange(rows)[:, None] % columns  # the first row has one label
    labels = torch.where(torch.arange(columns)[None] <= ends, ids, -100)
    monkeypatch.setattr(parallel, "world_size", lambda: processes)
    seen, counts = torch.zeros(rows * columns, dtype=torch.long), []
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        pieces = list(batches.micro_batches((ids, labels), 2, padded))
        counts.append(len(pieces))
        for (piece_ids, piece_labels), count in pieces:
            learned = piece_labels != -100
            assert count in (0, int(learned.sum()))
            assert piece_ids.shape == piece_labels.shape
            if padded:  # no more columns than there are labels, in steps of 32
                assert learned[:, -32:].any() or piece_ids.shape[1] == 70
            if count:
                seen[piece_ids[learned]] += 1
    assert torch.equal(seen.bool(), labels.flatten() != -100) and seen.max() == 1
    assert len(set(counts)) == 1  # with --fsdp all must run as often


# What goes wrong.


def ours(errors: str) -> list[str]:
    """Lines of tracebacks that name a file of this project; its folder may hold the libraries."""
    lines = [line for line in errors.splitlines() if f'File "{ROOT}' in line]
    return [line for line in lines if "site-packages" not in line]


def test_more_processes_than_sequences(prepared_folder, tmp_path):
    script = ["--model", "nano", "--data", prepared_folder, *SMALL, "--batch_size", 1]
    result = launch(ROOT / "train_pretrain.py", *script, "--out", tmp_path / "run")
    assert result.returncode != 0
    assert result.stderr.count("error: 2 processes cannot share a batch of 1 sequences") == 1
    assert "exitcode  : 2" in result.stderr
    assert not ours(result.stderr)


def test_a_mistake_of_one_process_ends_all(prepared_folder, tmp_path):
    """Process 1 fails alone; process 0, which waits for it, ends too, and says nothing."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import sys, train_pretrain as script\n"
        "from run import command_line, parallel\n"
        "loss = script.compute_loss\n"
        "def fail(*given):\n"
        "    if parallel.rank() == 1:\n"
        "        raise ValueError('only here')\n"
        "    return loss(*given)\n"
        "script.compute_loss = fail\n"
        "command_line(script.main, script.parse_args(sys.argv[1:]))\n"
    )
    words = ["--model", "nano", "--data", prepared_folder, *SMALL, "--out", tmp_path / "run"]
    result = launch(driver, *words)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1 and "error: only here" in result.stderr
    assert not ours(result.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are delivered otherwise there")
def test_ctrl_c_saves_once_in_all_processes(prepared_folder, tmp_path):
    words = ["--model", "nano", "--data", prepared_folder, *SMALL, "--steps", 100_000]
    words = command(ROOT / "train_pretrain.py", *words, "--out", tmp_path / "run")
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.time() + 120
    while not (tmp_path / "run" / "log.csv").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count("go on with the same command and --resume") == 1
    assert not ours(errors)
    newest = max((tmp_path / "run" / "resume").glob("state-*.pt"))
    state = torch.load(newest, weights_only=True)
    assert f"saved at step {state['step']};" in errors and state["step"] >= 4


@pytest.mark.parametrize(
    "words, message",
    [
        (["--fsdp"], "start two or more with torchrun --nproc_per_node=2"),
        ([], "the processes cannot meet"),
    ],
)
def test_a_start_that_cannot_work(words, message, prepared_folder, tmp_path):
    """--fsdp in one process; and, without --fsdp, a port that another program has taken."""
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
        place |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        place["MASTER_PORT"] = str(taken.getsockname()[1])
        result = subprocess.run(
            [sys.executable, ROOT / "train_pretrain.py", *words, "--out", tmp_path / "run"],
            capture_output=True,
            text=True,
            env=environment(**({} if words else place)),
            timeout=120,
        )
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")
    assert message in result.stderr and not ours(result.stderr)
