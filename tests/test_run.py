"""What every run shares: the schedule, the optimizer's groups, the flags' ranges, files that are
whole or absent, and a run's folder, which loses nothing and resumes to the
same bits."""

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model import ModelConfig, Transformer, save_model
from run.files import (
    Finished,
    InUse,
    atomic_path,
    command_line,
    hold,
    read_json,
    release,
    write_json,
)
from run.flags import add_common_flags, check_flags
from run.folder import Run, first_nonfinite
from run.optim import Optimizer, learning_rate
from run.setup import autocast, available_cores, choose_device, setup

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(
    vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, intermediate_size=12, max_position_embeddings=32,
)  # fmt: skip


def flags(*argv, **defaults):
    """The common flags, as a script would parse them."""
    parser = argparse.ArgumentParser()
    add_common_flags(parser, out="out/none", **defaults)
    return parser.parse_args([str(word) for word in argv])


def tiny_model(seed=0, config=TINY):
    torch.manual_seed(seed)
    return Transformer(config)


# The schedule.


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.5),  # 2 * 1/4
        (1, 1.0),
        (3, 2.0),
        (4, 2.0),  # the cosine begins at the peak
        (6, 2 * (0.55 + 0.45 * math.sqrt(0.5))),  # a quarter of the way
        (8, 1.1),  # half of the way: (1 + 0.1) / 2 of the peak
        (12, 0.2),  # a tenth
    ],
)
def test_learning_rate_by_hand(step, expected):
    args = flags("--learning_rate", 2.0, "--warmup", 4, "--steps", 12)
    assert learning_rate(step, args) == pytest.approx(expected)


@pytest.mark.parametrize("warmup, steps", [(0, 10), (10, 10), (50, 10), (1, 1)])
def test_learning_rate_stays_in_range(warmup, steps):
    """A warm-up as long as the run, or longer, divides by nothing."""
    args = flags("--learning_rate", 1.0, "--warmup", warmup, "--steps", steps)
    rates = [learning_rate(step, args) for step in range(steps)]
    assert all(0 < rate <= 1.0 for rate in rates)
    assert rates[0] == pytest.approx(1.0 / max(1, warmup))


# The optimizer.


def held_by(part, student):
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return {names[id(p)]: group for group in part.param_groups for p in group["params"]}


@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_the_hidden_matrices_only(tied):
    config = ModelConfig(**{**vars(TINY), "tie_word_embeddings": tied, "qk_norm": True})
    student = tiny_model(config=config)
    optimizer = Optimizer(student, flags("--weight_decay", 0.3))
    muon, adamw = (held_by(part, student) for part in optimizer.parts)
    layers = [f"model.layers.{n}." for n in (0, 1)]
    assert set(muon) == {
        f"{layer}{name}_proj.weight"
        for layer in layers
        for name in (*(f"self_attn.{x}" for x in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    everything = {name for name, _ in student.named_parameters()}
    assert set(adamw) == everything - set(muon)
    for name, group in adamw.items():
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.3), name
    assert {group["weight_decay"] for group in muon.values()} == {0.3}


def test_adamw_alone_holds_everything_once():
    student = tiny_model(config=ModelConfig(**{**vars(TINY), "attention_bias": True}))
    optimizer = Optimizer(student, flags("--optimizer", "adamw", "--weight_decay", 0.3))
    (held,) = (held_by(part, student) for part in optimizer.parts)
    assert sum(len(g["params"]) for g in optimizer.parts[0].param_groups) == len(held)
    assert set(held) == {name for name, _ in student.named_parameters()}
    for name, group in held.items():
        vector = "norm" in name or name.endswith("bias")
        assert group["weight_decay"] == (0.0 if vector else 0.3), name


def set_gradients(student, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_the_first_adamw_update_by_hand():
    """Bias-corrected, the first moment over the root of the second is the sign of the gradient."""
    student = tiny_model()
    args = flags("--learning_rate", 0.1, "--warmup", 10, "--weight_decay", 0.5)
    optimizer = Optimizer(student, args)
    set_gradients(student)
    embedding, norm = student.model.embed_tokens.weight, student.model.norm.weight
    before = [(p.detach().clone(), p.grad.sign()) for p in (embedding, norm)]
    rate = optimizer.step(0)
    assert rate == pytest.approx(0.01)  # 0.1 * 1/10
    (w, sign), (g, norm_sign) = before
    torch.testing.assert_close(embedding, w * (1 - 0.01 * 0.5) - 0.01 * sign, rtol=0, atol=1e-5)
    torch.testing.assert_close(norm, g - 0.01 * norm_sign, rtol=0, atol=1e-5)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_a_muon_update_is_nearly_orthogonal():
    """All singular values are near 0.2 * sqrt(larger side) * rate, whatever the gradient's are."""
    student = tiny_model(config=ModelConfig.preset("nano", 11))
    args = flags("--learning_rate", 0.1, "--warmup", 0, "--weight_decay", 0.0)
    optimizer = Optimizer(student, args)
    set_gradients(student)
    matrix = student.model.layers[0].mlp.up_proj.weight  # (192, 64)
    spread = torch.linalg.svdvals(matrix.grad)
    assert spread.max() / spread.min() > 3
    before = matrix.detach().clone()
    optimizer.step(0)
    values = torch.linalg.svdvals(before - matrix.detach()) / (0.1 * 0.2 * math.sqrt(192))
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("clip, expected", [(0.5, 0.5), (100.0, 8.0), (0.0, 8.0)])
def test_the_gradient_is_clipped_as_a_whole(clip, expected):
    """A plain step of rate 1 moves the weights by exactly the clipped gradient."""
    student = tiny_model()
    args = flags("--learning_rate", 1.0, "--warmup", 0, "--grad_clip", clip)
    optimizer = Optimizer(student, args)
    optimizer.parts = [torch.optim.SGD(student.parameters(), lr=9.9)]
    set_gradients(student)
    norm = torch.cat([p.grad.flatten() for p in student.parameters()]).norm()
    for parameter in student.parameters():
        parameter.grad *= 8.0 / norm
    before = torch.cat([p.detach().flatten() for p in student.parameters()])
    optimizer.step(0)
    after = torch.cat([p.detach().flatten() for p in student.parameters()])
    assert (after - before).norm().item() == pytest.approx(expected, rel=1e-4)


# Flags.


@pytest.mark.parametrize(
    "name, value",
    [
        ("seed", -1),
        ("steps", 0),
        ("batch_size", 0),
        ("seq_len", 1),
        ("accumulation_steps", 0),
        ("accumulation_steps", 17),  # the default batch has 16 rows
        ("learning_rate", 0.0),
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("grad_clip", -1.0),
        ("grad_clip", math.nan),
        ("eval_every", 0),
        ("patience", -1),
    ],
)
def test_common_flags_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        check_flags(flags(f"--{name}={value}"))


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("alpha", 0.0, 1.0),
        ("temperature", 1e-3, 1e3),
        ("data_share", 1e-6, 1.0),
        ("tag_weight", 0.0, None),
        ("think_weight", 0.0, None),
        ("answer_weight", 0.0, None),
    ],
)
def test_flags_of_single_scripts_have_ranges(name, low, high):
    args = flags()
    bad = [low - 1e-4, -math.inf, math.inf, math.nan] + ([] if high is None else [high * 1.01])
    for value in bad:
        setattr(args, name, value)
        with pytest.raises(ValueError, match=f"--{name} "):
            check_flags(args)
    for value in [low, 1.0] + ([] if high is None else [high]):
        setattr(args, name, value)
        check_flags(args)


def test_defaults_and_limits_pass():
    check_flags(flags())
    check_flags(flags("--batch_size", 1, "--steps", 1, "--warmup", 0, "--grad_clip", 0))
    check_flags(flags("--batch_size", 4, "--accumulation_steps", 4))


def test_a_script_can_change_defaults():
    assert flags(learning_rate=0.5).learning_rate == 0.5
    assert flags("--learning_rate", 0.25, learning_rate=0.5).learning_rate == 0.25


def test_resume_excludes_overwrite(capsys):
    with pytest.raises(SystemExit):
        flags("--resume", "--overwrite")
    assert "not allowed with" in capsys.readouterr().err


# Setup.


def test_setup_seeds_everything():
    draws = []
    for seed in (5, 5, 6):
        assert setup(flags("--seed", seed, "--device", "cpu")) == torch.device("cpu")
        draws.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(ValueError, match="--steps 0"):
        setup(flags("--steps", 0))


@pytest.mark.parametrize("name", ["gpu", "cuda:99", ""])
def test_a_device_that_is_not_there(name):
    with pytest.raises(ValueError, match="--device"):
        choose_device(name)


def test_precision_of_the_forward_pass():
    cpu, x = torch.device("cpu"), torch.ones(2, 2)
    for name, expected in (
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
    ):
        with autocast(cpu, name):
            assert (x @ x).dtype == expected


def test_available_cores():
    assert 1 <= available_cores() <= os.cpu_count()


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
        (b"[1, 2]", "must hold a JSON object, not a list"),
        (b"3", "must hold a JSON object, not a int"),
    ],
)
def test_json_errors_name_the_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json .*{message}|a.json {message}"):
        read_json(tmp_path / "a.json")


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


# Two processes.


def elsewhere(code: str, *words) -> subprocess.Popen:
    """Python code in a process of its own; it is ready when it has printed a line."""
    words = [sys.executable, "-c", "import sys; from run.files import *\n" + code, *map(str, words)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    process.stdout.readline()
    return process


HOLD = "hold(sys.argv[1]); print('held', flush=True); time.sleep(float(sys.argv[2]))"


def test_a_second_process_is_told_that_the_folder_is_in_use(tmp_path):
    process = elsewhere(HOLD, tmp_path / "a", 60)
    try:
        with pytest.raises(InUse, match="a is in use by another process: wait for it, or pass"):
            open_run(tmp_path / "a")
        assert not (tmp_path / "a").exists()
        open_run(tmp_path / "b")
    finally:
        process.kill()
        process.wait()
    open_run(tmp_path / "a")  # a killed process holds nothing


def test_a_second_process_can_wait(tmp_path):
    process = elsewhere(HOLD, tmp_path / "a", 1)
    started = time.perf_counter()
    hold(tmp_path / "a", wait=True)
    assert time.perf_counter() - started > 0.5
    hold(tmp_path / "a")  # again is no error
    release(tmp_path / "a")
    process.wait()


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
