"""Short runs of every script on tiny data, for the tests that make some: argv_of(name, ...) is the
script and its flags, without --out."""

import csv
from pathlib import Path

import pytest
import torch

import train_distill_reason
import train_distillation
import train_pretrain
from dataset import teacher_cache
from eval.experiments.jobs import execute, unfinished
from methods import cached_teacher
from model import load_model
from run.optimizer import Optimizer

SMALL = ["--steps", "12", "--batch_size", "4", "--seq_len", "32", "--eval_every", "4"]
SMALL += ["--warmup", "2", "--device", "cpu", "--dtype", "float32"]
ALL = ("pretrain", "pretrain_chat", "distill", "distill_chat", "distill_fused")
ALL += ("reason", "reason_kl", "cached")


def run(script, *words) -> dict:
    return script.main(script.parse_args([str(word) for word in words]))


def run_here(jobs, after_each=lambda: None) -> None:
    """eval.experiments.jobs.run_jobs without its pool, whose processes import torch for seconds."""
    for job in unfinished(jobs):
        execute(job)
        after_each()


def make_teacher(folder, data):
    run(train_pretrain, "--model", "nano", "--data", data, "--out", folder / "teacher", *SMALL)
    return folder / "teacher"


def cached(teacher, data, method="sample", k=8):
    """The teacher's cache of `data`, made once."""
    path = teacher.parent / f"{teacher.name}-{method}{k}.cache"
    if not path.exists():
        flags = ["--teacher", teacher, "--data", data, "--seq_len", "32", "--method", method]
        run(teacher_cache, *flags, "--k", k, "--dtype", "float32", "--out", path)
    return path


def argv_of(name: str, data: Path, teacher: Path) -> list:
    text = ["--teacher", teacher, "--data", data, *SMALL]
    chats = ["--data", data / "reason_train.jsonl", *SMALL, "--seq_len", "256"]
    fresh = ["--student", "nano", "--tokenizer", data]
    return {
        "pretrain": lambda: [train_pretrain, "--model", "nano", "--data", data, *SMALL],
        "pretrain_chat": lambda: [train_pretrain, "--model", teacher, *chats],
        "distill": lambda: [train_distillation, *text],
        "distill_chat": lambda: [train_distillation, "--teacher", teacher, *chats],
        "distill_fused": lambda: [train_distillation, *text, "--fused", "yes"],
        "reason": lambda: [train_distill_reason, "--student", teacher, *chats],
        "reason_kl": lambda: [train_distill_reason, *fresh, "--teacher", teacher, *chats],
        "cached": lambda: [cached_teacher, *text, "--teacher_cache", cached(teacher, data)],
    }[name]()


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def same_bits(first, second) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def nearly_equal(first, second) -> bool:
    """Equal but for rounding. AdamW divides a gradient by its size, so where one is as small as its
    rounding error the sign decides: one weight in 10,000 may be 20 times farther off."""
    one, two = weights(first), weights(second)
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one])
    return bool((apart > 2e-4).float().mean() < 1e-4 and apart.max() < 4e-3)


def logged(folder, *columns) -> list[tuple]:
    """Those columns of log.csv; all that two runs can share, where none is named."""
    with open(Path(folder) / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = columns or [column for column in rows[0] if column != "seconds"]
    return [tuple(row[column] for column in columns) for row in rows]


class Killed(Exception):
    """Stands for a kill: nothing of the script's own code runs after it."""


def kill_in_update(monkeypatch, number: int) -> None:
    """From now on the `number`-th update of an optimizer never comes."""
    update, left = Optimizer.update, [number]

    def update_or_die(self, rate):
        left[0] -= 1
        if not left[0]:
            raise Killed
        update(self, rate)

    monkeypatch.setattr(Optimizer, "update", update_or_die)


SIX = ["--steps", "6", "--batch_size", "4", "--seq_len", "32", "--warmup", "2", "--eval_every", "2"]
SIX += ["--final_eval", "8", "--device", "cpu", "--dtype", "float32"]


def check_resume(script, flags: list, tmp_path: Path, monkeypatch, update: int = 5) -> dict:
    """Six steps of `script` with `flags` (after SIX), whole, and killed before the `update`-th
    update of an optimizer and resumed: equal bits, rows and metrics. Returns the whole one's
    record; its folder is tmp_path/"whole"."""
    record = run(script, *SIX, *flags, "--out", tmp_path / "whole")
    with monkeypatch.context() as killing, pytest.raises(Killed):
        kill_in_update(killing, update)
        run(script, *SIX, *flags, "--out", tmp_path / "killed")
    assert not (tmp_path / "killed" / "run.json").exists(), "the kill came too late"
    resumed = run(script, *SIX, *flags, "--out", tmp_path / "killed", "--resume")
    assert same_bits(tmp_path / "whole", tmp_path / "killed"), "resumed to other weights"
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed"), "resumed to another log.csv"
    assert record["metrics"] == resumed["metrics"]
    return record
