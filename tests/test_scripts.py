"""The three scripts and the trace writer, run for a few steps on tiny data: they learn, they
resume to the same bits, and they refuse what cannot work with one sentence and exit code 2."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_distill_reason
import train_distillation
import train_pretrain
from dataset import cache_teacher, make_traces
from dataset.packing import PackedText
from distill.fused import compiled_loss_and_gradient
from model import generate, load_model
from run.files import Finished, read_json

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "12", "--batch_size", "4", "--seq_len", "32", "--eval_every", "4"]
SMALL += ["--warmup", "2", "--device", "cpu"]


def run(script, *words):
    return script.main(script.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "teacher"
    run(train_pretrain, "--model", "nano", "--data", prepared_folder, "--out", out, *SMALL)
    return out


def cached(teacher, data, method="hidden"):
    """The teacher's cache of `data`, made once."""
    path = teacher.parent / f"{teacher.name}-{method}.cache"
    if not path.exists():
        flags = ["--teacher", teacher, "--data", data, "--seq_len", "32", "--method", method]
        run(cache_teacher, *flags, "--k", "8", "--out", path)
    return path


def argv_of(name, prepared_folder, teacher) -> list:
    """The flags of a short run of each script, without --out."""
    traces = prepared_folder / "reason_train.jsonl"
    chat = [*SMALL, "--seq_len", "256"]
    return {
        "pretrain": [train_pretrain, "--model", "nano", "--data", prepared_folder, *SMALL],
        "distill": [train_distillation, "--teacher", teacher, "--data", prepared_folder, *SMALL],
        "cached": [
            *(train_distillation, "--teacher", teacher, "--data", prepared_folder, *SMALL),
            *("--teacher_cache", cached(teacher, prepared_folder)),
        ],
        "chat": [train_distillation, "--teacher", teacher, "--data", traces, *chat],
        "reason": [train_distill_reason, "--student", teacher, "--data", traces, *chat],
        "reason_kl": [
            *(train_distill_reason, "--student", "nano", "--tokenizer", prepared_folder),
            *("--data", traces, "--teacher", teacher, *chat),
        ],
    }[name]


ALL = ("pretrain", "distill", "cached", "chat", "reason", "reason_kl")


def weights(folder) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def same_bits(first, second) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def logged(folder, *columns) -> list[tuple]:
    with open(Path(folder) / "log.csv", newline="", encoding="utf-8") as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


class Killed(Exception):
    """Stands for a kill: nothing of the script's own code runs after it."""


@pytest.mark.parametrize("name", ALL)
def test_a_killed_run_resumes_to_the_same_bits(
    name, prepared_folder, teacher, tmp_path, monkeypatch
):
    script, *flags = argv_of(name, prepared_folder, teacher)
    record = run(script, *flags, "--out", tmp_path / "whole")
    assert record["metrics"]["val_loss"] < 6.5
    assert not (tmp_path / "whole" / "resume").exists()

    update = script.Optimizer.update

    def update_and_die(self, number):
        if number == 9:  # the last saved state is of step 8
            raise Killed
        return update(self, number)

    monkeypatch.setattr(script.Optimizer, "update", update_and_die)
    with pytest.raises(Killed):
        run(script, *flags, "--out", tmp_path / "killed")
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "run.json").exists()
    run(script, *flags, "--out", tmp_path / "killed", "--resume")
    assert same_bits(tmp_path / "whole", tmp_path / "killed")
    assert same_bits(tmp_path / "whole" / "best", tmp_path / "killed" / "best")
    columns = ("step", "tokens", "train_loss", "val_loss")
    assert logged(tmp_path / "whole", *columns) == logged(tmp_path / "killed", *columns)


def test_training_lowers_the_loss(prepared_folder, tmp_path):
    words = ["--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL]
    run(train_pretrain, *words, "--steps", "60", "--eval_every", "5")
    losses = [float(value) for (value,) in logged(tmp_path / "run", "val_loss") if value]
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("name", ["distill", "chat", "reason_kl"])
def test_accumulation_gives_the_same_student(name, prepared_folder, teacher, tmp_path):
    script, *flags = argv_of(name, prepared_folder, teacher)
    for parts in (1, 4):
        words = ["--steps", 3, "--accumulation_steps", parts, "--optimizer", "adamw"]
        run(script, *flags, *words, "--out", tmp_path / str(parts))
    one, four = weights(tmp_path / "1"), weights(tmp_path / "4")
    assert all(torch.allclose(one[key], four[key], atol=2e-4) for key in one)


def test_the_log_has_the_whole_batch_s_loss(prepared_folder, tmp_path):
    """The first logged loss is the cross-entropy of a fresh model on the first batch."""
    run(
        train_pretrain,
        *("--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL),
    )
    torch.manual_seed(0)
    text = PackedText(prepared_folder, "train", 32)
    model = train_pretrain.make_or_load("nano", text.vocab_size)
    input_ids, labels = text.batch(0, 4, 0)
    expected = torch.nn.functional.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten())
    first = float(logged(tmp_path / "run", "train_loss")[0][0])
    assert first == pytest.approx(expected.item(), abs=1e-4)


def test_alpha_one_is_plain_training_without_a_teacher(prepared_folder, tmp_path):
    flags = ["--data", prepared_folder, *SMALL]
    run(train_pretrain, "--model", "nano", "--out", tmp_path / "plain", *flags)
    words = ["--alpha", "1", "--teacher", tmp_path / "no such teacher"]
    run(train_distillation, *words, "--out", tmp_path / "distilled", *flags)
    for column in ("train_loss", "val_loss"):  # sums in another order: not the same bits
        plain, distilled = (
            [float(value or 0) for (value,) in logged(tmp_path / name, column)]
            for name in ("plain", "distilled")
        )
        assert distilled == pytest.approx(plain, rel=1e-3)


def test_alpha_zero_never_reads_labels(prepared_folder, teacher, tmp_path, monkeypatch):
    """With every label replaced by another valid one, the student is the same."""
    flags = ["--teacher", teacher, "--data", prepared_folder, "--alpha", "0", *SMALL]
    run(train_distillation, *flags, "--out", tmp_path / "true")
    batch = PackedText.batch

    def wrong_labels(self, *place):
        input_ids, labels = batch(self, *place)
        return input_ids, (labels + 17) % 300

    monkeypatch.setattr(PackedText, "batch", wrong_labels)
    run(train_distillation, *flags, "--out", tmp_path / "wrong")
    assert same_bits(tmp_path / "true", tmp_path / "wrong")


@pytest.mark.parametrize("method", ["hidden", "full"])
def test_cached_teacher_teaches_the_same(method, prepared_folder, teacher, tmp_path):
    flags = ["--teacher", teacher, "--data", prepared_folder, "--alpha", "0", *SMALL]
    run(train_distillation, *flags, "--out", tmp_path / "live")
    cache = cached(teacher, prepared_folder, method)
    run(train_distillation, *flags, "--teacher_cache", cache, "--out", tmp_path / "cached")
    live = [float(v) for (v,) in logged(tmp_path / "live", "train_loss")]
    from_cache = [float(v) for (v,) in logged(tmp_path / "cached", "train_loss")]
    assert from_cache == pytest.approx(live, abs=5e-3)


def test_best_weights_and_patience(prepared_folder, tmp_path):
    """At an absurd rate the loss rises again: the run stops early and best/ is not the last."""
    words = ["--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL]
    words += ["--learning_rate", "3", "--steps", "200", "--warmup", "40", "--patience", "3"]
    record = run(train_pretrain, *words)
    assert record["steps"] < 200
    assert record["steps"] == record["best_step"] + 3 * 4
    assert not same_bits(tmp_path / "run", tmp_path / "run" / "best")


def test_run_json_says_what_ran(teacher):
    record = read_json(teacher / "run.json")
    assert record["args"]["model"] == "nano" and record["seed"] == 0
    assert record["tokens"] == 12 * 4 * 32
    assert record["parameters"] == load_model(teacher).num_parameters()
    for key in ("argv", "git_commit", "git_dirty", "versions", "device", "seconds"):
        assert key in record


def test_every_step_of_a_student_can_be_sampled(teacher):
    model = load_model(teacher)
    assert len(generate(model, [[5, 6, 7]], 4, stop_ids=())[0]) == 4


@pytest.mark.parametrize("name", ["pretrain", "distill", "reason"])
def test_compiled_runs(name, prepared_folder, teacher, tmp_path, monkeypatch):
    """--compile reaches torch.compile for every model that the step runs, and for the loss."""
    compiled = []
    compiled_loss_and_gradient.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(model) or model)
    script, *flags = argv_of(name, prepared_folder, teacher)
    run(script, *flags, "--compile", "--steps", 2, "--out", tmp_path / "run")
    compiled_loss_and_gradient.cache_clear()
    assert len(compiled) == (3 if name == "distill" else 2)


@pytest.mark.parametrize("name", ["pretrain", "distill", "reason_kl"])
def test_bfloat16_is_close_to_float32(name, prepared_folder, teacher, tmp_path):
    script, *flags = argv_of(name, prepared_folder, teacher)
    for dtype in ("float32", "bfloat16"):
        run(script, *flags, "--dtype", dtype, "--out", tmp_path / dtype)
    exact = [float(v) for (v,) in logged(tmp_path / "float32", "train_loss")]
    coarse = [float(v) for (v,) in logged(tmp_path / "bfloat16", "train_loss")]
    assert coarse == pytest.approx(exact, rel=0.02)
    assert coarse != exact


@pytest.mark.parametrize("name", ("pretrain", "distill", "reason"))
def test_the_last_evaluation_is_of_as_many_as_asked(
    name, prepared_folder, teacher, tmp_path, monkeypatch
):
    script, *words = argv_of(name, prepared_folder, teacher)
    seen = []

    def evaluate(student, batches, *more, **options):
        seen.append(sum(len(input_ids) for input_ids, _ in batches))
        return {"val_loss": 1.0}

    monkeypatch.setattr(script, "evaluate", evaluate)
    run(script, *words, "--final_eval", "2", "--out", tmp_path / "run")
    assert seen[-1] == 2 < seen[0]


def test_answers_only_learns_no_trace(prepared_folder, teacher, tmp_path):
    _, *flags = argv_of("reason", prepared_folder, teacher)
    run(train_distill_reason, *flags, "--out", tmp_path / "traces")
    run(train_distill_reason, *flags, "--answers_only", "--out", tmp_path / "answers")
    with_traces = read_json(tmp_path / "traces" / "run.json")["tokens"]
    alone = read_json(tmp_path / "answers" / "run.json")["tokens"]
    assert alone < 0.6 * with_traces


# Traces.


def test_traces_resume_and_keep(prepared_folder, teacher, tmp_path, monkeypatch):
    flags = ["--teacher", teacher, "--prompts", prepared_folder / "reason_prompts.jsonl"]
    flags += ["--keep", "all", "--temperature", "1", "--samples", "2", "--device", "cpu"]
    monkeypatch.setattr(make_traces, "CHUNK", 7)
    run(make_traces, *flags, "--out", tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text("utf-8").splitlines()
    record = read_json(tmp_path / "whole.jsonl.finished.json")
    assert len(lines) == record["kept"] <= record["written"] == 2 * record["problems"]
    assert json.loads(lines[0])["conversations"][-1]["role"] == "assistant"

    calls = []
    write_json = make_traces.write_json

    def die_at_third(path, value):
        calls.append(path)
        if len(calls) == 3:
            raise Killed
        write_json(path, value)

    monkeypatch.setattr(make_traces, "write_json", die_at_third)
    with pytest.raises(Killed):
        run(make_traces, *flags, "--out", tmp_path / "killed.jsonl")
    monkeypatch.setattr(make_traces, "write_json", write_json)
    run(make_traces, *flags, "--out", tmp_path / "killed.jsonl")
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_traces_that_were_deleted_are_made_again(prepared_folder, teacher, tmp_path):
    """And a file that is not what its record says, or has none, is left as it is."""
    flags = ["--teacher", teacher, "--prompts", prepared_folder / "reason_prompts.jsonl"]
    flags += ["--keep", "all", "--device", "cpu", "--out", tmp_path / "x.jsonl"]
    run(make_traces, *flags)
    made = (tmp_path / "x.jsonl").read_bytes()
    (tmp_path / "x.jsonl").unlink()
    run(make_traces, *flags)
    assert (tmp_path / "x.jsonl").read_bytes() == made
    (tmp_path / "x.jsonl").write_bytes(made[:-5])
    with pytest.raises(ValueError, match=f"has {len(made) - 5:,} bytes, its record says"):
        run(make_traces, *flags)
    (tmp_path / "x.jsonl.progress.json").unlink()
    with pytest.raises(ValueError, match="is not a trace file to go on with"):
        run(make_traces, *flags)
    assert (tmp_path / "x.jsonl").read_bytes() == made[:-5]


def test_an_untrained_teacher_s_traces_do_not_pass(prepared_folder, teacher, tmp_path):
    flags = ["--teacher", teacher, "--prompts", prepared_folder / "reason_prompts.jsonl"]
    with pytest.raises(ValueError, match="no trace"):
        run(make_traces, *flags, "--out", tmp_path / "none.jsonl", "--device", "cpu")


# What goes wrong.


def test_a_finished_run_is_not_written_over(prepared_folder, tmp_path):
    words = ["--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL]
    run(train_pretrain, *words)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        run(train_pretrain, *words, "--seed", 1)
    with pytest.raises(Finished):
        run(train_pretrain, *words, "--resume")
    with pytest.raises(ValueError, match="--seed 1"):
        run(train_pretrain, *words, "--seed", 1, "--resume")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    run(train_pretrain, *words, "--seed", 1, "--overwrite")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("train_pretrain.py", ["--data", "nowhere"], "python -m dataset.prepare"),
        ("train_pretrain.py", ["--model", "huge"], "nano, micro"),
        ("train_pretrain.py", ["--learning_rate", "nan"], "--learning_rate nan"),
        ("train_pretrain.py", ["--steps", "0"], "--steps 0"),
        ("train_pretrain.py", ["--accumulation_steps", "99"], "--accumulation_steps 99"),
        ("train_pretrain.py", ["--device", "tpu"], "--device tpu"),
        ("train_pretrain.py", ["--seq_len", "999999"], "one window"),
        ("train_distillation.py", ["--teacher", "nobody"], "python train_pretrain.py"),
        ("train_distillation.py", ["--temperature", "0"], "--temperature 0"),
        ("train_distillation.py", ["--alpha", "1.5"], "--alpha 1.5"),
        ("train_distillation.py", ["--data", "no.jsonl", "--teacher", "TEACHER"], "no.jsonl"),
        ("train_distill_reason.py", ["--student", "out/student"], "train_distillation.py"),
        ("train_distill_reason.py", ["--tag_weight", "-1"], "--tag_weight -1"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    script, words, message, prepared_folder, teacher, tmp_path
):
    words = [str(teacher) if word == "TEACHER" else word for word in words]
    if "--data" not in words and script != "train_distill_reason.py":
        words += ["--data", str(prepared_folder)]
    result = subprocess.run(
        [sys.executable, ROOT / script, *words, "--out", "made"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "made" / "model.safetensors").exists()


def test_another_tokenizer_is_refused_with_the_cure(prepared_folder, teacher, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in prepared_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    meta = read_json(folder / "meta.json")
    meta["tokenizer_sha256"] = "0" * 64
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    words = ["--teacher", teacher, "--data", folder, "--out", tmp_path / "run", *SMALL]
    with pytest.raises(ValueError, match="one tokenizer"):
        run(train_distillation, *words)


def test_a_loss_that_is_not_finite_stops_before_saving(prepared_folder, tmp_path, monkeypatch):
    loss = train_pretrain.compute_loss
    monkeypatch.setattr(train_pretrain, "compute_loss", lambda *given: loss(*given) * float("nan"))
    words = ["--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL]
    with pytest.raises(ValueError, match="loss at step 1 is nan"):
        run(train_pretrain, *words)
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are delivered otherwise there")
def test_ctrl_c_saves_and_says_how_to_go_on(prepared_folder, tmp_path):
    command = [sys.executable, ROOT / "train_pretrain.py", "--model", "nano", *SMALL]
    command += ["--data", prepared_folder, "--out", tmp_path / "run", "--steps", "100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.time() + 60
    while not (tmp_path / "run" / "log.csv").exists() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors.strip().splitlines()[-1]
    assert "Traceback" not in errors
    newest = max((tmp_path / "run" / "resume").glob("state-*.pt"))
    state = torch.load(newest, weights_only=True)
    assert state["step"] >= 4
