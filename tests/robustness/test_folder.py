"""A run's folder loses nothing: it resumes to the same bits, passes over what is damaged, and lets
no number that is not finite near the weights."""

import csv
import json
import math
import os
import signal

import pytest
import torch

from files import Finished
from run import Run
from run.guard import first_nonfinite
from tests.test_run import flags, tiny_model


class RandomTokens:
    """Data whose batches, 4 rows of 8 tokens, depend on the step alone."""

    vocab_size, padded = 11, False
    tokenizer_folder = bytes_per_token = None
    tokenizer_sha256 = sha256 = "0" * 64

    def __init__(self):
        self.held_out = self

    def batch(self, step, batch_size=4, seed=0):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(11, (batch_size, 9), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    def evaluation(self, batch_size, most):
        yield self.batch(10**6)


def open_run(out, *argv):
    """A run of 12 steps, as a lesson opens it, of a smaller student than any preset."""
    words = ["--steps", 12, "--batch_size", 4, "--seq_len", 8, "--warmup", 2, "--eval_every", 4]
    run = Run(flags("--out", out, "--device", "cpu", "--dtype", "float32", *words, *argv))
    run.training.students.append(tiny_model(seed=run.args.seed))
    run.optimize(*run.training.students)
    return run


def opened(out, *argv):
    """What a run keeps, as it is just before its first step."""
    run = open_run(out, *argv)
    run.training.begin(RandomTokens())
    return run.training


def mean_loss(run, input_ids, labels):
    logits = run.training.students[0](input_ids)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def train(run, stop_at=None, losses=None):
    """A lesson. `losses` are the held-out losses; a SIGTERM comes in the step after stop_at."""
    training = run.training
    if losses:
        training.evaluate = lambda *_: {"val_loss": losses[training.step // 4 - 1]}
    for input_ids, labels in run.batches(RandomTokens()):
        if training.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        run.step(mean_loss(run, input_ids, labels))
    return run.finish()


def weights_now(run):
    return torch.cat([p.detach().flatten() for p in run.training.students[0].parameters()])


# Stop and resume.


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
    train(resumed)
    assert f"resuming after step {stop_at + 1}, from state-" in capsys.readouterr().out
    assert torch.equal(weights_now(resumed), weights_now(whole))
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
    assert record["parameters"] == run.training.students[0].num_parameters()
    assert record["metrics"]["val_loss"] > 0 and record["flops"] > 0
    assert record["args"]["out"] == str(tmp_path / "a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "resume" not in names
    assert names >= {"config.json", "model.safetensors", "run.json", "log.csv", "best"}


def test_an_existing_run_is_not_lost(tmp_path):
    train(open_run(tmp_path / "a"))
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run.*--overwrite"):
        opened(tmp_path / "a")
    with pytest.raises(Finished):
        opened(tmp_path / "a", "--resume")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before
    assert opened(tmp_path / "a", "--overwrite").step == 0
    with pytest.raises(KeyboardInterrupt):
        train(open_run(tmp_path / "b"), stop_at=2)
    with pytest.raises(ValueError, match="already holds a run"):
        opened(tmp_path / "b")


def test_resuming_with_other_flags_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(open_run(tmp_path / "a"), stop_at=2)
    with pytest.raises(ValueError, match="--learning_rate 0.5: it ran with 0.012"):
        opened(tmp_path / "a", "--resume", "--learning_rate", 0.5)


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
    train(resumed)
    said = capsys.readouterr().out
    assert f"resuming after step 8, from {older.name}; {newest.name} is damaged" in said
    assert torch.equal(weights_now(resumed), weights_now(whole))


@pytest.mark.parametrize("how", DAMAGES)
def test_when_no_state_is_whole_nothing_is_resumed(tmp_path, how):
    with pytest.raises(KeyboardInterrupt):
        train(open_run(tmp_path / "a"), stop_at=5)
    for path in (tmp_path / "a" / "resume").glob("state-*.pt"):
        spoil(path, how)
    with pytest.raises(ValueError, match="no state can be read .*damaged.*--overwrite"):
        opened(tmp_path / "a", "--resume")


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(open_run(tmp_path / "a"), stop_at=5)
    (tmp_path / "a" / "resume" / "state-000000099.pt.123.tmp").write_bytes(b"half")
    assert opened(tmp_path / "a", "--resume").step == 6
    assert not list((tmp_path / "a").glob("**/*.tmp"))


# Numbers that go wrong.


def spoilt_at(run, bad_step, value=math.nan):
    """Train, with a gradient of `value` at one step or more; the loss itself stays finite."""
    bad = {bad_step} if isinstance(bad_step, int) else set(bad_step)
    for input_ids, labels in run.batches(RandomTokens()):
        loss = mean_loss(run, input_ids, labels)
        if run.training.step + 1 in bad:
            loss.register_hook(lambda gradient: gradient * value)
        run.step(loss)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step", [1, 3, 10])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, value, bad_step):
    run = open_run(tmp_path / "a", "--eval_every", 100)
    before, (optimizer,) = [weights_now(run)], run.training.optimizers
    update = optimizer.update
    optimizer.update = lambda rate: (update(rate), before.append(weights_now(run)))
    with pytest.raises(
        ValueError, match=f"loss at step {bad_step} is .*the weights were not changed"
    ):
        spoilt_at(run, bad_step, value)
    assert torch.equal(weights_now(run), before[-1]) and len(before) == bad_step
    dump = json.loads((tmp_path / "a" / "nonfinite.json").read_text())
    input_ids, _ = RandomTokens().batch(bad_step - 1)
    assert dump["step"] == bad_step and dump["input_ids"] == input_ids.tolist()
    assert dump["layer"] == "the forward pass is finite"


def test_skipping_leaves_out_the_batch_alone(tmp_path, capsys):
    run = open_run(tmp_path / "a", "--on_nonfinite", "skip", "--eval_every", 100)
    spoilt_at(run, [3, 5, 6])
    rows = run.training.log.rows
    assert run.training.step == 12 and all(math.isfinite(row["train_loss"]) for row in rows)
    assert weights_now(run).isfinite().all()
    said = capsys.readouterr()
    assert (said.out + said.err).count("batch left out") == 3


def test_at_most_ten_batches_in_a_row_are_skipped(tmp_path):
    run = open_run(tmp_path / "a", "--on_nonfinite", "skip", "--steps", 40, "--eval_every", 100)
    spoilt_at(run, range(5, 15))  # ten
    assert run.training.step == 40
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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("eval_every, bad_step", [(10, 10), (4, 4), (4, 11), (3, 6)])
def test_a_loss_that_is_not_finite_is_never_saved(tmp_path, eval_every, bad_step, device):
    """Whatever the logging interval, weights of a run that broke must not replace good ones. On
    CUDA the loss is looked at in logged steps only (here the path is taken, on a CPU)."""
    run = open_run(tmp_path / "a", "--eval_every", eval_every)
    evaluate, steps = run.training.evaluate, []
    run.training.evaluate = lambda *given: steps.append(run.training.step) or evaluate(*given)
    with pytest.raises(ValueError, match="loss at step .* is nan.*: lower --learning_rate"):
        for input_ids, labels in run.batches(RandomTokens()):
            run.training.device = torch.device(device)
            bad = run.training.step + 1 >= bad_step
            run.step(mean_loss(run, input_ids, labels) * (math.nan if bad else 1.0))
    assert steps == [step for step in range(1, bad_step) if step % eval_every == 0]
    assert weights_now(run).isfinite().all()
