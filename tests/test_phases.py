"""A run of several phases: a finished one is loaded, a killed one resumed, their costs added up."""

import pytest

import train_distillation
import train_pretrain
from files import read_json
from run import run_phase
from tests.short_runs import Killed, kill_in_update, same_bits, weights

STEPS = ["--steps", "4", "--batch_size", "4", "--seq_len", "32", "--warmup", "2"]
STEPS += ["--eval_every", "2", "--device", "cpu", "--dtype", "float32", "--final_eval", "4"]


def chain(data, out, *words) -> dict:
    """A teacher, an assistant and a student, each taught by the one before."""
    words = ["--data", data, "--out", out, *STEPS, *words]
    args = train_distillation.parse_args([str(word) for word in words])
    teacher = run_phase(args, "teacher", train_pretrain.main, model="nano", tokenizer=str(data))
    assistant = run_phase(args, "assistant", train_distillation.main, teacher=str(teacher))
    args.teacher = str(assistant)
    return train_distillation.main(args)


def test_a_chain_killed_in_its_second_phase_resumes_to_the_same_bits(
    prepared_folder, tmp_path, monkeypatch
):
    record = chain(prepared_folder, tmp_path / "whole")
    with monkeypatch.context() as killing, pytest.raises(Killed):
        kill_in_update(killing, 4 + 3)  # the last saved state is of the assistant's step 2
        chain(prepared_folder, tmp_path / "killed")
    phases = tmp_path / "killed" / "phases"
    taught = read_json(phases / "teacher" / "run.json")
    assert not (phases / "assistant" / "run.json").exists()
    resumed = chain(prepared_folder, tmp_path / "killed", "--resume")
    assert read_json(phases / "teacher" / "run.json") == taught, "a finished phase was run again"
    for folder in ("", "phases/teacher", "phases/assistant"):
        assert same_bits(tmp_path / "whole" / folder, tmp_path / "killed" / folder)
    assert resumed["metrics"] == record["metrics"]


def test_costs_are_those_of_all_phases(prepared_folder, tmp_path):
    record = chain(prepared_folder, tmp_path)
    own = [read_json(tmp_path / "phases" / name / "run.json") for name in ("teacher", "assistant")]
    assert list(record["phases"]) == ["teacher", "assistant", "last"]
    assert record["tokens"] == 3 * 4 * 4 * 32  # phases x steps x sequences x tokens
    student = record["phases"]["last"]["flops"]
    assert record["flops"] == student + sum(phase["flops"] for phase in own)
    given = record["args"]["given"]["teacher"], record["args"]["teacher"]
    assert given == ("out/teacher", str(tmp_path / "phases" / "assistant"))
    assert own[1]["flops"] > own[0]["flops"], "an assistant's cost has its teacher's passes"


def test_what_is_in_out_is_asked_before_the_first_phase(prepared_folder, tmp_path):
    (tmp_path / "phases").mkdir()
    (tmp_path / "phases" / "moon.txt").write_text("of the user's own")
    with pytest.raises(ValueError, match="did not make"):
        chain(prepared_folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["phases"], "something was written"
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a run"):
        chain(prepared_folder, tmp_path)


def test_other_flags_refuse_a_finished_phase_and_overwrite_replaces_it(prepared_folder, tmp_path):
    chain(prepared_folder, tmp_path)
    before = weights(tmp_path / "phases" / "teacher")
    (tmp_path / "run.json").rename(tmp_path / "resume.json")
    (tmp_path / "resume").mkdir()  # as if it had been killed before its last phase
    with pytest.raises(ValueError, match="--seed 1: it ran with 0"):
        chain(prepared_folder, tmp_path, "--seed", 1)
    chain(prepared_folder, tmp_path, "--seed", 1, "--overwrite")
    after = weights(tmp_path / "phases" / "teacher")
    assert any((before[name] != after[name]).any() for name in before)
