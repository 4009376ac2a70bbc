"""What a run says and chooses by itself: the learning rate of weights that know something already,
and how well a teacher knows the data."""

import re
import shlex
import shutil

import pytest
import torch

import train_distill_reason
import train_distillation
import train_pretrain
from dataset.packing import PackedText
from files import read_json, write_json
from model import ModelConfig, Transformer, load_model, save_model
from run import evaluate, training
from run.flags import choose_optimizer
from run.training import Training
from tests.robustness.test_provenance import other_tokenizer
from tests.short_runs import SMALL, make_teacher, run, same_bits


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("advice"), prepared_folder)


@pytest.fixture(scope="module")
def untrained(prepared_folder, tmp_path_factory):
    """A folder as it is downloaded: weights and tokenizer, no run.json."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("untrained")
    vocab_size = PackedText(prepared_folder, "val", 32).vocab_size
    save_model(Transformer(ModelConfig.preset("nano", vocab_size)), folder, prepared_folder)
    return folder


def chosen(student, *words, script=train_pretrain, width=64):
    args = script.parse_args(list(words))
    choose_optimizer(args, str(student), width)
    assert type(args.learning_rate) is float  # a state on disk holds plain values only
    return args.optimizer, args.learning_rate


def test_a_new_model_keeps_the_rate_of_its_lesson():
    assert chosen("nano") == ("muon", 0.012)
    assert chosen("nano", script=train_distillation) == ("muon", 0.012)
    assert chosen("nano", script=train_distill_reason) == ("muon", 0.006)


@pytest.mark.parametrize(
    "record, width, rate",
    [
        (None, 896, 2e-5),  # downloaded
        ({"args": {"learning_rate": 0.012}}, 64, 0.0031),  # 0.2 / 64 = 0.003125
        ({"args": {"learning_rate": 0.012}}, 128, 0.0016),  # 0.0015625
        ({"args": {"learning_rate": 0.001}}, 64, 0.001),  # no faster than it was made
        ({"args": {"learning_rate": 2e-5}}, 896, 2e-5),  # downloaded, then trained here
        ({"args": {"learning_rate": "x"}}, 64, 2e-5),
        ({"args": []}, 64, 2e-5),
        ({}, 64, 2e-5),
    ],
)
def test_weights_of_a_folder_get_a_rate_that_keeps_them(tmp_path, record, width, rate):
    if record is not None:
        write_json(tmp_path / "run.json", record)
    for script in (train_pretrain, train_distillation, train_distill_reason):
        for folder in (tmp_path, tmp_path / "best"):
            assert chosen(folder, script=script, width=width) == ("adamw", rate)


def test_what_is_typed_wins(tmp_path):
    assert chosen(tmp_path, "--learning_rate", "0.012") == ("adamw", 0.012)
    assert chosen(tmp_path, "--optimizer", "muon") == ("muon", 2e-5)
    assert chosen(tmp_path, "--optimizer", "muon", "--learning_rate", "0.1") == ("muon", 0.1)
    assert chosen("nano", "--optimizer", "adamw") == ("adamw", 0.012)
    assert chosen("nano", "--learning_rate", "0.1") == ("muon", 0.1)


def test_the_rate_is_told_and_recorded(teacher, prepared_folder, tmp_path, capsys):
    """A run with the rate that is chosen equals one where it is typed."""
    words = ["--model", teacher, "--data", prepared_folder, *SMALL, "--steps", 3]
    run(train_pretrain, *words, "--out", tmp_path / "chosen")
    assert f"{teacher}: learns by adamw at rate 0.0031 from" in capsys.readouterr().out
    args = read_json(tmp_path / "chosen" / "run.json")["args"]
    assert (args["optimizer"], args["learning_rate"]) == ("adamw", 0.0031)
    typed = ["--optimizer", "adamw", "--learning_rate", 0.0031]
    run(train_pretrain, *words, *typed, "--out", tmp_path / "typed")
    assert same_bits(tmp_path / "chosen", tmp_path / "typed")


def distil(teacher, student, data, out, *more):
    words = ["--teacher", teacher, "--student", student, "--data", data, "--out", out]
    return run(train_distillation, *words, *SMALL, "--steps", 4, *more)


def test_the_teacher_is_judged_first(teacher, prepared_folder, tmp_path, capsys):
    record = distil(teacher, "nano", prepared_folder, tmp_path / "a")
    out = capsys.readouterr().out
    text = PackedText(prepared_folder, "val", 32)
    own = evaluate(load_model(teacher), text.evaluation(8, training.EVALUATED))["val_loss"]
    found = re.search(r"the first step: teacher ([0-9.]+), student ([0-9.]+)\n", out)
    assert float(found[1]) == pytest.approx(own, abs=1e-3)
    assert float(found[2]) == pytest.approx(6.0, abs=0.5)  # log(400): it knows nothing yet
    assert record["metrics"]["teacher_loss"] == pytest.approx(
        evaluate(load_model(teacher), text.evaluation(8, 400))["val_loss"], abs=1e-4
    )
    assert "is worse" not in out
    distil(teacher, "nano", prepared_folder, tmp_path / "b", "--alpha", 1)
    assert "held-out loss" not in capsys.readouterr().out


def test_judging_the_teacher_changes_no_bit(teacher, prepared_folder, tmp_path, monkeypatch):
    distil(teacher, "nano", prepared_folder, tmp_path / "judged")
    begin = Training.begin
    monkeypatch.setattr(Training, "begin", lambda self, data, *_: begin(self, data))
    distil(teacher, "nano", prepared_folder, tmp_path / "not")
    assert same_bits(tmp_path / "judged", tmp_path / "not")


def test_a_teacher_that_is_worse_than_its_student_is_told(
    teacher, untrained, prepared_folder, tmp_path, capsys
):
    """At the start, and once more in the end."""
    rate = ["--alpha", 0.9, "--learning_rate", 1e-5]
    distil(untrained, teacher, prepared_folder, tmp_path / "worse", *rate)
    said = capsys.readouterr().out
    assert said.count("the first step: teacher") == 1
    assert said.count("the teacher is worse on this data than its student") == 2


# Advice that works for the case at hand.


@pytest.mark.parametrize("data", ["", "reason_train.jsonl"])
def test_the_command_that_makes_a_missing_teacher(prepared_folder, tmp_path, data):
    """Also for conversations: the teacher is to learn what the student will learn from it."""
    words = ["--data", prepared_folder / data, "--tokenizer", prepared_folder, *SMALL]
    words += ["--steps", 1, "--seq_len", 200, "--teacher", tmp_path / "t", "--out", tmp_path / "s"]
    with pytest.raises(ValueError, match="no checkpoint in .*/t'.* make one") as error:
        run(train_distillation, *words)
    command = re.search(r"make one with: python train_pretrain.py (.*?) \(", str(error.value))[1]
    same = [*words[: words.index("--teacher")], "--model", "nano"]
    run(train_pretrain, *shlex.split(command), *same)  # DATA is what the student will learn from
    assert run(train_distillation, *words)["steps"] == 1


def test_a_finished_run_is_not_to_be_resumed(teacher, prepared_folder):
    words = ["--model", "nano", "--data", prepared_folder, "--out", teacher, *SMALL]
    with pytest.raises(ValueError, match="already holds a run: pass --overwrite"):
        run(train_pretrain, *words)


def test_what_a_run_cannot_be_resumed_with(teacher, prepared_folder):
    words = ["--model", "nano", *SMALL, "--data", prepared_folder, "--out", teacher, "--resume"]
    with pytest.raises(ValueError, match="--skip_bad True: it ran without it, or pass another"):
        run(train_pretrain, *words, "--skip_bad")
    with pytest.raises(ValueError, match="--seed 1: it ran with 0; use that, or pass another"):
        run(train_pretrain, *words, "--seed", 1)


def test_a_student_of_conversations_gets_its_teachers_tokenizer(teacher, prepared_folder, tmp_path):
    """The tokenizer of the teacher differs from that of the folder from which a student starts."""
    tokens, other = tmp_path / "tokens", tmp_path / "other"
    shutil.copytree(prepared_folder, tokens)
    other_tokenizer(tokens)
    words = ["--data", prepared_folder / "reason_train.jsonl", *SMALL, "--seq_len", 200]
    run(train_pretrain, *words, "--model", "nano", "--tokenizer", tokens, "--out", other)
    words += ["--teacher", other, "--steps", 1, "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match="start the student from a preset, with --tokenizer .*r$"):
        run(train_distillation, "--student", teacher, *words)
    assert run(train_distillation, "--student", "nano", "--tokenizer", other, *words)["steps"] == 1
