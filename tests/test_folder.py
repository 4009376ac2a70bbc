"""A run's folder loses nothing: it resumes to the same bits, passes over what is damaged, and lets
no number that is not finite near the weights."""

import csv
import json
import math
import os
import signal

import pytest
import torch

from model import save_model
from run.files import (
    Finished,
)
from run.folder import Run, first_nonfinite
from run.optim import Optimizer
from tests.test_run import flags, tiny_model

# The run's folder.


def open_run(out, *argv):
    args = flags("--out", out, "--steps", 12, "--warmup", 2, "--eval_every", 4, *argv)
    student = tiny_model(seed=args.seed)
    optimizer = Optimizer(student, args)
    return Run(args, student, optimizer, torch.device("cpu"), lambda to: save_model(student, to))


def train(run, stop_at=None, losses=None):
    """Learn random tokens that depend on the step alone; `losses` are the held-out losses."""
    for step in run.steps():
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(11, (4, 9), generator=generator)
        logits = run.student(tokens[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        loss.backward()
        rate = run.optimizer.step(step)
        if run.log(loss.detach(), rate, tokens=32):
            run.evaluated(losses[run.step // 4 - 1] if losses else 3.0 - 0.1 * step)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
    return run.finish({"hidden_size": 8}, {"val_loss": 1.5})


def final_weights(run):
    return torch.cat([p.detach().flatten() for p in run.student.parameters()])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stop_at", [0, 4, 7])
def test_a_run_that_was_stopped_resumes_bit_for_bit(tmp_path, optimizer, stop_at, capsys):
    whole = open_run(tmp_path / "whole", "--optimizer", optimizer)
    train(whole)
    with pytest.raises(KeyboardInterrupt, match=f"saved at step {stop_at + 1};.*--resume"):
        train(open_run(tmp_path / "cut", "--optimizer", optimizer), stop_at)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are put back
    assert not (tmp_path / "cut" / "run.json").exists()
    resumed = open_run(tmp_path / "cut", "--optimizer", optimizer, "--resume")
    assert resumed.step == stop_at + 1
    train(resumed)
    assert torch.equal(final_weights(resumed), final_weights(whole))
    logs = [list(csv.DictReader(open(tmp_path / x / "log.csv"))) for x in ("whole", "cut")]
    for row in logs[0] + logs[1]:
        del row["seconds"]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0]] == ["1", "4", "8", "10", "12"]


def test_a_finished_run_has_its_record_and_no_resume_state(tmp_path):
    run = open_run(tmp_path / "a", "--seed", 3)
    record = train(run)
    assert json.loads((tmp_path / "a" / "run.json").read_text()) == record
    assert record["steps"] == 12 and record["tokens"] == 12 * 32 and record["seed"] == 3
    assert record["parameters"] == run.student.num_parameters()
    assert record["metrics"] == {"val_loss": 1.5}
    assert record["args"]["out"] == str(tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "resume" not in names
    assert names >= {"config.json", "model.safetensors", "run.json", "log.csv", "best"}


def test_an_existing_run_is_not_lost(tmp_path):
    train(open_run(tmp_path / "a"))
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run.*--overwrite"):
        open_run(tmp_path / "a")
    with pytest.raises(Finished):
        open_run(tmp_path / "a", "--resume")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    assert open_run(tmp_path / "a", "--overwrite").step == 0
    with pytest.raises(KeyboardInterrupt):
        train(open_run(tmp_path / "b"), stop_at=2)
    with pytest.raises(ValueError, match="already holds a run"):
        open_run(tmp_path / "b")


def test_resuming_with_other_flags_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(open_run(tmp_path / "a"), stop_at=2)
    with pytest.raises(ValueError, match="--learning_rate 0.5: it ran with 0.012"):
        open_run(tmp_path / "a", "--resume", "--learning_rate", 0.5)


def spoil(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "a flipped bit":
        content[len(content) // 2] ^= 1
    elif how == "empty":
        content = b""
    path.write_bytes(content)


DAMAGES = ["cut", "a flipped bit", "empty"]


@pytest.mark.parametrize("how", [*DAMAGES, "another name"])
def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path, how, capsys):
    whole = open_run(tmp_path / "whole")
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(open_run(tmp_path / "a"), stop_at=9)
    older, newest = sorted((tmp_path / "a" / "resume").glob("state-*.pt"))
    assert (older.name[:15], newest.name[:15]) == ("state-000000008", "state-000000010")
    if how == "another name":
        newest = newest.rename(newest.with_stem(newest.stem[:-3] + "xyz"))
    else:
        spoil(newest, how)
    resumed = open_run(tmp_path / "a", "--resume")
    assert resumed.step == 8
    said = capsys.readouterr().out
    assert f"from {older.name}; {newest.name} is damaged" in said
    train(resumed)
    assert torch.equal(final_weights(resumed), final_weights(whole))


@pytest.mark.parametrize("how", DAMAGES)
def test_when_no_state_is_whole_nothing_is_resumed(tmp_path, how):
    with pytest.raises(KeyboardInterrupt):
        train(open_run(tmp_path / "a"), stop_at=5)
    for path in (tmp_path / "a" / "resume").glob("state-*.pt"):
        spoil(path, how)
    with pytest.raises(ValueError, match="cannot be read .*damaged.*--overwrite"):
        open_run(tmp_path / "a", "--resume")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(open_run(tmp_path / "a"), stop_at=5)
    (tmp_path / "a" / "resume" / "state-000000099.pt.123.tmp").write_bytes(b"half")
    assert open_run(tmp_path / "a", "--resume").step == 6
    assert not list((tmp_path / "a").glob("**/*.tmp"))


# Numbers that go wrong.


def spoilt_at(run, bad_step, value=math.nan):
    """Train, with a gradient of `value` at one step or more."""
    bad = {bad_step} if isinstance(bad_step, int) else set(bad_step)
    for step in run.steps():
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(11, (4, 9), generator=generator)
        loss = torch.nn.functional.cross_entropy(
            run.student(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        (loss * (value if step + 1 in bad else 1.0)).backward()
        if run.update(loss.detach(), 32, tokens[:, :-1]):
            run.evaluated(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step", [1, 3, 10])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, value, bad_step):
    run = open_run(tmp_path / "a", "--eval_every", 100)
    before = []
    update = run.optimizer.update
    run.optimizer.update = lambda step: (update(step), before.append(final_weights(run).clone()))[0]
    start = final_weights(run).clone()
    with pytest.raises(
        ValueError, match=f"loss at step {bad_step} is .*the weights were not changed"
    ):
        spoilt_at(run, bad_step, value)
    assert torch.equal(final_weights(run), before[-1] if before else start)
    dump = json.loads((tmp_path / "a" / "nonfinite.json").read_text())
    tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(bad_step - 1))
    assert dump["step"] == bad_step and dump["input_ids"] == tokens[:, :-1].tolist()
    assert dump["layer"] == "the forward pass is finite"


def test_skipping_leaves_out_the_batch_alone(tmp_path, capsys):
    run = open_run(tmp_path / "a", "--on_nonfinite", "skip", "--eval_every", 100)
    spoilt_at(run, [3, 5, 6])
    assert run.step == 12 and all(map(math.isfinite, (row["train_loss"] for row in run.rows)))
    assert final_weights(run).isfinite().all()
    said = capsys.readouterr()
    assert (said.out + said.err).count("batch left out") == 3


def test_at_most_ten_batches_in_a_row_are_skipped(tmp_path):
    run = open_run(tmp_path / "a", "--on_nonfinite", "skip", "--steps", 40, "--eval_every", 100)
    spoilt_at(run, range(5, 15))  # ten
    assert run.step == 40
    run = open_run(tmp_path / "b", "--on_nonfinite", "skip", "--steps", 40, "--eval_every", 100)
    with pytest.raises(ValueError, match="loss at step 15 is"):
        spoilt_at(run, range(5, 16))


def test_the_first_layer_that_overflows_is_named():
    student = tiny_model()
    ids = torch.randint(11, (2, 5))
    assert first_nonfinite(student, ids) == "the forward pass is finite"
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    assert first_nonfinite(student, ids) == "first in model.layers.1.mlp.up_proj"


def test_the_best_weights_are_kept(tmp_path):
    run = open_run(tmp_path / "a")
    record = train(run, losses=[2.0, 1.0, 1.5])
    assert (record["best_step"], record["best_val_loss"]) == (8, 1.0)
    files = [tmp_path / "a" / name / "model.safetensors" for name in ("", "best")]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.parametrize(
    "patience, losses, steps",
    [(0, [1.0, 2.0, 3.0, 4.0, 5.0], 20), (2, [2.0, 1.0, 1.5, 1.2, 0.5], 16), (1, [1, 2], 8)],
)
def test_patience(tmp_path, patience, losses, steps):
    """It stops after that many evaluations in a row that were not better than the best."""
    run = open_run(tmp_path / "a", "--steps", 20, "--patience", patience)
    assert train(run, losses=losses)["steps"] == steps


@pytest.mark.parametrize("eval_every, bad_step", [(10, 10), (4, 4), (4, 12), (3, 6)])
def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, eval_every, bad_step):
    """Whatever the logging interval, weights of a run that broke must not replace good ones."""
    run = open_run(tmp_path / "a", "--eval_every", eval_every)
    with pytest.raises(ValueError, match="loss at step .* is nan: lower --learning_rate"):
        for _ in run.steps():
            value = math.nan if run.step + 1 >= bad_step else 1.0
            if run.log(torch.tensor(value), 0.1, tokens=1):
                assert run.step < bad_step, "an evaluation after a loss of nan saves its weights"
                run.evaluated(1.0)
