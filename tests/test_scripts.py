"""The scripts, run for a few steps on tiny data: they learn, they log what they compute, every flag
does what it says, and they refuse what cannot work with one sentence and exit code 2.
(tests/robustness/test_resume.py stops and resumes them.)"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import run.training
import train_distill_reason
import train_distillation
import train_pretrain
from dataset import make_traces
from dataset.packing import PackedText
from dataset.tokenizer import encode_tagged, load_tokenizer
from distill import fused_loss
from distill.fused import compiled_once
from files import Finished, file_hash, read_json
from methods import cached_teacher
from model import generate, load_model, make_or_load
from tests.short_runs import (
    ALL,
    SMALL,
    argv_of,
    cached,
    logged,
    make_teacher,
    nearly_equal,
    same_bits,
)  # fmt: skip
from tests.short_runs import run as run_script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("runs"), prepared_folder)


def test_training_lowers_the_loss(prepared_folder, tmp_path):
    words = ["--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL]
    run_script(train_pretrain, *words, "--steps", "40", "--eval_every", "10")
    losses = [float(value) for (value,) in logged(tmp_path / "run", "val_loss") if value]
    assert losses[-1] < losses[0] - 1.0


@pytest.mark.parametrize("name", ["distill", "distill_chat", "distill_fused", "reason_kl"])
def test_accumulation_gives_the_same_student(name, prepared_folder, teacher, tmp_path):
    script, *flags = argv_of(name, prepared_folder, teacher)
    for parts in (1, 4):
        words = ["--steps", 3, "--accumulation_steps", parts, "--optimizer", "adamw"]
        run_script(script, *flags, *words, "--out", tmp_path / str(parts))
    assert nearly_equal(tmp_path / "1", tmp_path / "4")


def test_the_log_has_the_whole_batch_s_loss(prepared_folder, tmp_path):
    """The first logged loss is the cross-entropy of a fresh model on the first batch."""
    run_script(
        train_pretrain,
        *("--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL),
    )
    torch.manual_seed(0)
    text = PackedText(prepared_folder, "train", 32)
    model = make_or_load("nano", text.vocab_size)
    input_ids, labels = text.batch(0, 4, 0)
    expected = torch.nn.functional.cross_entropy(model(input_ids).flatten(0, 1), labels.flatten())
    first = float(logged(tmp_path / "run", "train_loss")[0][0])
    assert first == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_log_has_the_loss_and_its_parts(name, prepared_folder, teacher, tmp_path):
    """train_loss = alpha * ce + (1 - alpha) * T^2 * kl, and what the run has cost."""
    script, *flags = argv_of(name, prepared_folder, teacher)
    alpha, temperature = (1.0, 1.0) if name in ("pretrain", "pretrain_chat", "reason") else (0.3, 2)
    if alpha < 1 and name != "cached":
        flags += ["--alpha", alpha, "--temperature", temperature]
    elif name == "cached":
        alpha, temperature = 0.5, 1
    run_script(script, *flags, "--steps", 2, "--out", tmp_path / "run")
    columns = ["step", "tokens", "flops", "seconds", "train_loss", "learning_rate", "ce"]
    columns += ["kl"] if alpha < 1 else []
    header = (tmp_path / "run" / "log.csv").read_text().splitlines()[0].split(",")
    assert header == [*columns, "val_loss"]
    for row in logged(tmp_path / "run", *columns[4:]):
        loss, _, ce, *kl = map(float, row)
        expected = alpha * ce + (1 - alpha) * temperature**2 * (kl[0] if kl else 0)
        assert loss == pytest.approx(expected, rel=1e-5)
    costs = [tuple(map(float, row)) for row in logged(tmp_path / "run", *columns[1:4])]
    assert all(low < high for low, high in zip(costs[0], costs[1], strict=True))


@pytest.mark.parametrize("fused", ["yes", "no"])
def test_alpha_one_is_plain_training_without_a_teacher(fused, prepared_folder, tmp_path):
    flags = ["--data", prepared_folder, *SMALL, "--fused", fused]
    run_script(train_pretrain, "--model", "nano", "--out", tmp_path / "plain", *flags)
    words = ["--alpha", "1", "--teacher", tmp_path / "no such teacher"]
    run_script(train_distillation, *words, "--out", tmp_path / "distilled", *flags)
    assert same_bits(tmp_path / "plain", tmp_path / "distilled")
    assert logged(tmp_path / "plain") == logged(tmp_path / "distilled")


@pytest.mark.parametrize("name", ["pretrain", "pretrain_chat", "distill", "reason_kl"])
def test_fused_and_plain_train_the_same(name, prepared_folder, teacher, tmp_path, monkeypatch):
    script, *flags = argv_of(name, prepared_folder, teacher)
    for fused in ("no", "yes"):
        words = ["--fused", fused, "--steps", 3, "--optimizer", "adamw"]
        with monkeypatch.context() as patch:
            counted = Mock(wraps=fused_loss)
            patch.setattr(script, "fused_loss", counted)
            run_script(script, *flags, *words, "--out", tmp_path / fused)
        assert counted.called == (fused == "yes")
    assert nearly_equal(tmp_path / "no", tmp_path / "yes")


def test_alpha_zero_never_reads_labels(prepared_folder, teacher, tmp_path, monkeypatch):
    """With every label replaced by another valid one, the student is the same."""
    flags = ["--teacher", teacher, "--data", prepared_folder, "--alpha", "0", *SMALL]
    run_script(train_distillation, *flags, "--out", tmp_path / "true")
    batch = PackedText.batch

    def wrong_labels(self, *place):
        input_ids, labels = batch(self, *place)
        return input_ids, (labels + 17) % 300

    monkeypatch.setattr(PackedText, "batch", wrong_labels)
    run_script(train_distillation, *flags, "--out", tmp_path / "wrong")
    assert same_bits(tmp_path / "true", tmp_path / "wrong")


@pytest.mark.parametrize(
    "method, k, words", [("hidden", 1, ()), ("topk", 400, ()), ("topk", 400, ("--no_tail",))]
)
def test_cached_teacher_teaches_the_same(method, k, words, prepared_folder, teacher, tmp_path):
    """Hidden states, or all of the vocabulary: what the live teacher says, but for float16."""
    flags = ["--teacher", teacher, "--data", prepared_folder, "--alpha", "0", *SMALL]
    run_script(train_distillation, *flags, "--out", tmp_path / "live")
    flags += ["--teacher_cache", cached(teacher, prepared_folder, method, k), *words]
    run_script(cached_teacher, *flags, "--out", tmp_path / "cached")
    live = [float(v) for (v,) in logged(tmp_path / "live", "train_loss")]
    from_cache = [float(v) for (v,) in logged(tmp_path / "cached", "train_loss")]
    assert from_cache == pytest.approx(live, abs=5e-3)


def test_teacher_cache_says_where_it_moved(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_distillation.parse_args(["--teacher_cache", "file"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert (
        "--teacher_cache has moved: python -m methods.cached_teacher --teacher_cache FILE" in said
    )


def test_best_weights_and_patience(prepared_folder, tmp_path):
    """At an absurd rate the loss rises again: the run stops early and best/ is not the last."""
    words = ["--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL]
    words += ["--learning_rate", "3", "--steps", "200", "--warmup", "40", "--patience", "3"]
    record = run_script(train_pretrain, *words)
    assert record["steps"] < 200
    assert record["steps"] == record["best_step"] + 3 * 4
    assert not same_bits(tmp_path / "run", tmp_path / "run" / "best")


def test_run_json_says_what_ran(teacher):
    record = read_json(teacher / "run.json")
    assert record["args"]["model"] == "nano" and record["seed"] == 0
    assert record["tokens"] == 12 * 4 * 32
    assert record["parameters"] == load_model(teacher).num_parameters()
    for key in ("argv", "git_commit", "git_dirty", "versions", "device", "seconds", "flops"):
        assert key in record


def test_run_json_says_what_it_was_made_from(prepared_folder, teacher, tmp_path):
    """The hashes of data, tokenizer and teacher."""
    script, *flags = argv_of("distill", prepared_folder, teacher)
    record = run_script(script, *flags, "--steps", 1, "--out", tmp_path / "run")
    assert record["sources"] == {
        "data_sha256": file_hash(prepared_folder / "train.bin"),
        "tokenizer_sha256": file_hash(teacher / "tokenizer.json"),
        "teacher_sha256": [file_hash(teacher / "model.safetensors")],
    }
    script, *flags = argv_of("reason", prepared_folder, teacher)
    record = run_script(script, *flags, "--steps", 1, "--out", tmp_path / "reason")
    assert record["sources"] == {
        "data_sha256": file_hash(prepared_folder / "reason_train.jsonl"),
        "tokenizer_sha256": file_hash(teacher / "tokenizer.json"),
    }


def test_a_run_ends_when_its_flops_are_spent(prepared_folder, teacher, tmp_path):
    """A teacher costs: of two runs of one budget the distilled one has fewer steps."""
    steps = []
    for name in ("pretrain", "distill"):
        script, *flags = argv_of(name, prepared_folder, teacher)
        flags = [flag for flag in flags if flag not in ("--steps", "12")]
        record = run_script(script, *flags, "--flops", 2e9, "--out", tmp_path / name)
        each = record["flops"] / record["steps"]
        assert 2e9 <= record["flops"] < 2e9 + 1.01 * each
        rates = [float(rate) for (rate,) in logged(tmp_path / name, "learning_rate")]
        assert rates[-1] < 0.3 * max(rates)  # the schedule knows how much is left
        steps.append(record["steps"])
    assert 1.2 * steps[1] < steps[0] < 2 * steps[1]


def test_every_step_of_a_student_can_be_sampled(teacher):
    model = load_model(teacher)
    assert len(generate(model, [[5, 6, 7]], 4, stop_ids=())[0]) == 4


@pytest.mark.parametrize(
    "name, models, losses",
    [("pretrain", 1, 0), ("distill", 2, 0), ("distill_fused", 2, 1), ("reason", 1, 0)],
)
def test_compiled_runs(name, models, losses, prepared_folder, teacher, tmp_path, monkeypatch):
    """--compile reaches every model that the step runs, and the fused loss; without it nothing."""
    compiled = {"models": [], "losses": []}
    compiled_once.cache_clear()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled["models"].append(model))
    monkeypatch.setattr(torch, "compile", lambda loss: compiled["losses"].append(loss) or loss)
    script, *flags = argv_of(name, prepared_folder, teacher)
    run_script(script, *flags, "--steps", 2, "--out", tmp_path / "plain")
    assert compiled == {"models": [], "losses": []}
    run_script(script, *flags, "--compile", "--steps", 2, "--out", tmp_path / "compiled")
    compiled_once.cache_clear()
    assert (len(compiled["models"]), len(compiled["losses"])) == (models, losses)
    assert same_bits(tmp_path / "plain", tmp_path / "compiled")  # nothing was really compiled


@pytest.mark.parametrize("name", ["pretrain", "distill", "reason_kl"])
def test_bfloat16_is_close_to_float32(name, prepared_folder, teacher, tmp_path):
    """Emulated on most CPUs, and very slow there: one small step."""
    script, *flags = argv_of(name, prepared_folder, teacher)
    flags += ["--steps", 1, "--batch_size", 1, "--final_eval", 1]
    flags += ["--seq_len", 256 if name == "reason_kl" else 8]
    for dtype in ("float32", "bfloat16"):
        run_script(script, *flags, "--dtype", dtype, "--out", tmp_path / dtype)
    exact = [float(v) for (v,) in logged(tmp_path / "float32", "train_loss")]
    coarse = [float(v) for (v,) in logged(tmp_path / "bfloat16", "train_loss")]
    assert coarse == pytest.approx(exact, rel=0.02)
    assert coarse != exact


@pytest.mark.parametrize("most", (2, 5))
@pytest.mark.parametrize("name", ("pretrain", "distill", "reason"))
def test_evaluations_are_of_as_many_as_asked(
    name, most, prepared_folder, teacher, tmp_path, monkeypatch
):
    """The last one of --final_eval; those before it of no more than that, and of EVALUATED."""
    script, *words = argv_of(name, prepared_folder, teacher)
    seen = []

    def evaluate(student, batches, *more, **options):
        seen.append(sum(len(input_ids) for input_ids, _ in batches))
        return {"val_loss": 1.0, "teacher_loss": 1.0}

    monkeypatch.setattr(run.training, "evaluate", evaluate)
    monkeypatch.setattr(run.training, "EVALUATED", 3)
    run_script(script, *words, "--final_eval", str(most), "--out", tmp_path / "run")
    assert seen[-1] == most and set(seen[:-1]) == {min(3, most)}


def test_answers_only_learns_no_trace(prepared_folder, teacher, tmp_path):
    _, *flags = argv_of("reason", prepared_folder, teacher)
    run_script(train_distill_reason, *flags, "--out", tmp_path / "traces")
    run_script(train_distill_reason, *flags, "--answers_only", "--out", tmp_path / "answers")
    with_traces = read_json(tmp_path / "traces" / "run.json")["tokens"]
    alone = read_json(tmp_path / "answers" / "run.json")["tokens"]
    assert alone < 0.6 * with_traces


# Traces.


def test_an_untrained_teacher_s_traces_do_not_pass(prepared_folder, teacher, tmp_path):
    flags = ["--teacher", teacher, "--prompts", prepared_folder / "reason_prompts.jsonl"]
    with pytest.raises(ValueError, match="no trace"):
        run_script(make_traces, *flags, "--out", tmp_path / "none.jsonl", "--device", "cpu")


@pytest.mark.parametrize("keep", ["verified", "all"])
def test_a_cut_reply_is_no_trace(keep, prepared_folder, teacher, tmp_path, monkeypatch, capsys):
    """However right it is: it is counted, and --max_new_tokens is what to raise."""
    tokenizer = load_tokenizer(prepared_folder)
    right, wrong = (
        encode_tagged(tokenizer, f"<think>\nhm\n</think>\n<answer>\n{n}\n</answer>") for n in (7, 8)
    )
    most = len(right) + 2
    newline = encode_tagged(tokenizer, "\n")
    replies = [right, wrong, right + newline, right + 2 * newline, [*wrong, *right][:most]]
    lines = [{"conversations": [{"role": "user", "content": f"{n}?"}], "answer": "7"}
             for n in range(len(replies))]  # fmt: skip
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    monkeypatch.setattr(make_traces, "write_replies", lambda *_, **__: replies)
    flags = ["--teacher", teacher, "--prompts", prompts, "--keep", keep, "--device", "cpu"]
    flags += ["--max_new_tokens", most, "--out", tmp_path / "x.jsonl"]
    counts = run_script(make_traces, *flags)
    kept = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text("utf-8").splitlines()]
    asked = [line["conversations"][0]["content"] for line in kept]
    assert asked == (["0?", "2?"] if keep == "verified" else ["0?", "1?", "2?"])
    assert counts == {"problems": 5, "written": 5, "kept": len(kept), "cut": 2}
    assert f"; 2 were cut at {most} tokens\n" in capsys.readouterr().out


# What goes wrong.


def test_a_finished_run_is_not_written_over(prepared_folder, tmp_path):
    words = ["--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL]
    words += ["--steps", 2]
    run_script(train_pretrain, *words)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a run"):
        run_script(train_pretrain, *words, "--seed", 1)
    with pytest.raises(Finished):
        run_script(train_pretrain, *words, "--resume")
    with pytest.raises(ValueError, match="--seed 1"):
        run_script(train_pretrain, *words, "--seed", 1, "--resume")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    run_script(train_pretrain, *words, "--seed", 1, "--overwrite")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [  # robustness/test_bad_input.py has the others, without a process for each
        ("train_pretrain.py", ["--data", "nowhere"], "python -m dataset.prepare"),
        ("train_distillation.py", ["--teacher", "nobody"], "python train_pretrain.py"),
        ("train_distill_reason.py", [], "reason_train.jsonl"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    script, words, message, prepared_folder, tmp_path
):
    words = [*words] if "--data" in words else [*words, "--data", str(prepared_folder)]
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
    folder = shutil.copytree(prepared_folder, tmp_path / "data")
    content = read_json(folder / "tokenizer.json")
    ids = content["model"]["vocab"]
    first, second = list(ids)[-2:]
    ids[first], ids[second] = ids[second], ids[first]  # of the same size: two tokens change places
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    meta = read_json(folder / "meta.json")
    meta["tokenizer_sha256"] = file_hash(folder / "tokenizer.json")
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    words = ["--teacher", teacher, "--data", folder, "--out", tmp_path / "run", *SMALL]
    with pytest.raises(ValueError, match="one tokenizer"):
        run_script(train_distillation, *words)


def test_a_loss_that_is_not_finite_stops_before_saving(prepared_folder, tmp_path, monkeypatch):
    loss = train_pretrain.compute_loss
    monkeypatch.setattr(
        train_pretrain, "compute_loss", lambda *given: (loss(*given)[0] * float("nan"), {})
    )
    words = ["--model", "nano", "--data", prepared_folder, "--out", tmp_path / "run", *SMALL]
    with pytest.raises(ValueError, match="loss at step 1 is nan"):
        run_script(train_pretrain, *words)
    assert not (tmp_path / "run" / "model.safetensors").exists()
