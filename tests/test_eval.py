"""Metrics, answers, experiments, pictures and the one command, at toy size."""

import csv
import dataclasses
import json
import math
import re
import runpy
import shlex
import shutil
import sys
import threading
import types
from contextlib import nullcontext
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import train_pretrain
from dataset.packing import PackedText
from dataset.prepare import problem_line
from dataset.problems import make_problems
from dataset.replies import read_problems
from dataset.tokenizer import decode, encode_tagged, load_tokenizer
from eval import chat, drawing, perplexity, plots, reasoning, report, reproduce
from eval.experiments import (
    cache,
    common,
    curves,
    headline,
    jobs,
    methods,
    mode_seeking,
    scales,
    soft_labels,
)
from eval.experiments import rows as sheet
from eval.experiments.jobs import Job
from eval.pictures.reasoning import percent
from files import Finished, file_hash, lock, locks, progress, read_json
from model import ModelConfig, Transformer, load_model
from run import evaluate
from tests.short_runs import run, run_here

ROOT = Path(__file__).parent.parent


class Fixed(torch.nn.Module):
    """A "model" whose logits are a table by input id."""

    def __init__(self, logits):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(torch.tensor(logits))
        self.lm_head = torch.nn.Linear(self.table.embedding_dim, self.table.embedding_dim, False)
        self.lm_head.weight.data = torch.eye(self.table.embedding_dim)

    def model(self, input_ids):
        return self.table(input_ids)


def test_metrics_worked_by_hand():
    """Two tokens that count: p(label) = 3/4 and 1/4; the third, -100, does not."""
    log3 = math.log(3.0)
    student = Fixed([[log3, 0.0], [log3, 0.0]])  # always 3/4, 1/4
    teacher = Fixed([[0.0, 0.0], [0.0, log3]])  # 1/2, 1/2 and 1/4, 3/4
    batches = [(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, -100]]))]
    metrics = evaluate(student, batches, bytes_per_token=2.0, teacher=teacher)
    loss = -(math.log(0.75) + math.log(0.25)) / 2
    assert metrics["val_loss"] == pytest.approx(loss, abs=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(loss / math.log(2) / 2, rel=1e-5)
    kl_first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    kl_second = 0.25 * math.log(0.25 / 0.75) + 0.75 * math.log(0.75 / 0.25)
    assert metrics["kl"] == pytest.approx((kl_first + kl_second) / 2, abs=1e-6)
    assert metrics["agreement"] == pytest.approx(0.5)  # a tie ranks token 0 first
    of_teacher = -(math.log(0.5) + math.log(0.75)) / 2
    assert metrics["teacher_loss"] == pytest.approx(of_teacher, abs=1e-6)
    assert metrics["ece"] == pytest.approx(0.25, abs=1e-6)  # sure at 3/4, right half the time


def test_metrics_do_not_depend_on_batching():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("nano", 300))
    ids = torch.randint(0, 300, (6, 9))
    labels = torch.randint(0, 300, (6, 9))
    labels[2, 4:] = -100
    whole = evaluate(model, [(ids, labels)], 1.0, model)
    parts = evaluate(model, [(ids[:1], labels[:1]), (ids[1:], labels[1:])], 1.0, model)
    assert parts == pytest.approx(whole, abs=1e-5)
    assert whole["kl"] == pytest.approx(0.0, abs=1e-6) and whole["agreement"] == 1.0


def test_nothing_to_evaluate_is_an_error():
    model = Transformer(ModelConfig.preset("nano", 300))
    with pytest.raises(ValueError, match="no token"):
        evaluate(model, [(torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), -100))])


def test_answers_are_judged(prepared_folder):
    tokenizer = load_tokenizer(prepared_folder)
    problem = make_problems("test", (2,), 1, 0)[0]
    told = {"turns": [{"role": "user", "content": problem.question}], "steps": 2}
    told["answer"] = problem.answer
    gold = reasoning.judge(tokenizer, told, encode_tagged(tokenizer, problem.response()))
    assert gold["correct"] and gold["well_formed"] and gold["verified"]
    wrong = problem.response().replace("<answer>\n", "<answer>\n9")
    wrong = reasoning.judge(tokenizer, told, encode_tagged(tokenizer, wrong))
    assert not wrong["correct"] and wrong["well_formed"] and not wrong["verified"]
    bare = reasoning.judge(tokenizer, told, encode_tagged(tokenizer, f"{problem.answer}"))
    assert not bare["correct"] and not bare["well_formed"] and bare["think_tokens"] == 0
    table = reasoning.summarise([gold, wrong, {**bare, "steps": 3}])
    assert table[0]["accuracy"] == pytest.approx(1 / 3)
    assert table[2]["accuracy"] == pytest.approx(1 / 2) and table[3]["problems"] == 1


def user(question: str) -> dict:
    return {"role": "user", "content": question}


@pytest.mark.parametrize(
    "answer, written, right",
    [
        (42, "42", True),
        ("42", "42", True),  # as text: many files have it so
        ("42", "042", True),
        (42.0, "42", True),
        ("1,234", "1234", True),
        (1234, "1,234", True),
        ("$10", "10", True),
        (50, "50%", True),
        ("-3.50", "-3.5", True),
        (0.1, "0.1", True),
        (42, "43", False),
        ("42", "forty-two", False),
        ("Paris", "Paris", True),  # no number: as it is written
        ("Paris", "paris", False),
        ("Paris", "Paris, or London", False),
        (10**30 + 1, str(10**30), False),  # a float would not tell them apart
    ],
)
def test_an_answer_counts_as_the_number_that_it_is(prepared_folder, answer, written, right):
    tokenizer = load_tokenizer(prepared_folder)
    reply = encode_tagged(tokenizer, f"<think>\n?\n</think>\n<answer>\n{written}\n</answer>")
    problem = {"turns": [user("How many?")], "answer": answer, "steps": 0}
    assert reasoning.judge(tokenizer, problem, reply)["correct"] is right


def test_lines_are_verified_only_where_gold_lines_are(prepared_folder, tmp_path):
    """Prose as GSM8K has it says nothing about a reply's lines: "-", not 0 of 2."""
    tokenizer, made = load_tokenizer(prepared_folder), make_problems("test", (2,), 2, 0)
    gold = "<think>\n48/2 = 24 clips.\n</think>\n<answer>\n24\n</answer>"
    prose = [user("She sold 48, then half."), {"role": "assistant", "content": gold}]
    asked = [user(made[1].question)]
    lines = [
        problem_line(made[0], with_trace=True),
        {"conversations": asked, "answer": 1, "steps": 2},  # no gold reply, but made by us
        {"conversations": prose, "answer": 24},
        {"conversations": [user("How many?")], "answer": "24"},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    problems = read_problems(path)
    assert [problem["checkable"] for problem in problems] == [True, True, False, False]
    replies = [made[0].response(), "hm", gold, gold]
    judged = [
        reasoning.judge(tokenizer, problem, encode_tagged(tokenizer, reply))
        for problem, reply in zip(problems, replies, strict=True)
    ]
    assert [line["verified"] for line in judged] == [True, False, None, None]
    table = reasoning.summarise(judged)
    assert table[0]["verified"] == 1 / 2 and table[0]["accuracy"] == 3 / 4
    assert reasoning.summarise(judged[2:])[0]["verified"] is None


def test_what_cannot_be_verified_is_a_dash_and_cut_replies_are_counted(
    prepared_folder, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "x.jsonl"
    lines = [{"conversations": [user(f"{n}?")], "answer": n} for n in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    tokenizer = load_tokenizer(prepared_folder)
    told = encode_tagged(tokenizer, "<answer>\n1\n</answer>")
    replies = [told, told, [told[0]] * 50, [told[0]] * 49]
    monkeypatch.setattr(reasoning, "load_model", lambda *_: None)
    monkeypatch.setattr(reasoning, "write_replies", lambda *_: replies)
    words = ["--model", prepared_folder, "--problems", path, "--out", tmp_path / "answers.jsonl"]
    words += ["--max_new_tokens", "50", "--device", "cpu"]
    reasoning.main(reasoning.parse_args(words))
    out = capsys.readouterr().out
    assert f"1 of 4 replies of {prepared_folder} were cut at 50 tokens" in out
    row = next(line for line in out.splitlines() if line.strip().startswith("all")).split()
    assert row[:5] == ["all", "4", "25.0%", "0.0%", "-"]


TINY = dataclasses.replace(
    scales.SCALES["quick"],
    name="tiny",
    teacher="nano",
    student="nano",
    teacher_sizes=("nano",),
    seeds=1,
    more_seeds=2,
    teacher_steps=8,
    text_steps=4,
    text_batch=2,
    seq_len=32,
    text_warmup=1,
    text_final_eval=8,
    reason_final_eval=8,
    reason_teacher="nano",
    reason_teacher_steps=3,
    reason_steps=2,
    hard_steps=2,
    vocab_size=400,
    problems=150,
    prompts=20,
    test_problems=20,
    reason_batch=8,
    temperatures=(1.0, 2.0),
    data_shares=(0.5, 1.0),
    readings=(1.0, 2.0),
    with_kl=True,
    equal=scales.Scale("").equal,
    tag_weights=(1.0, 10.0),
)


@pytest.fixture(scope="module")
def reproduced(prepared_folder, tmp_path_factory):
    """The one command at toy size, in a folder of its own, with the small prepared text."""
    place = tmp_path_factory.mktemp("reproduce")
    (place / "out" / "tiny").mkdir(parents=True)
    for data in ("data", "data-hard"):
        folder = shutil.copytree(prepared_folder, place / "out" / "tiny" / data)
    meta = read_json(folder / "meta.json")
    meta["made_from"]["tier"] = "hard"  # or it would not be taken for the hard problems
    (folder / "meta.json").write_text(json.dumps(meta), "utf-8")
    patch = pytest.MonkeyPatch()
    patch.chdir(place)
    patch.setitem(scales.SCALES, "tiny", TINY)
    # An untrained teacher's traces do not verify; keep them all, to have something to learn from.
    from eval.experiments import reasoning as experiment

    traces_job = experiment.traces_job

    def keep_all(scale, seed):
        job = traces_job(scale, seed)
        more = (("keep", "all"), ("temperature", 1.0))  # greedy, it would never end a reply
        return dataclasses.replace(job, flags=(*job.flags, *more))

    patch.setattr(experiment, "traces_job", keep_all)
    for module in (common, curves, soft_labels):  # the pool has tests of its own
        patch.setattr(module, "run_jobs", run_here)
    most = 40  # max_new_tokens: no reply of theirs ends in time
    patch.setattr(reasoning.evaluate_reasoning, "__defaults__", (most, "tags", None))
    for name, value in (("KEPT", (4,)), ("SEEDS", 1), ("DRAWS", 4), ("WINDOWS", 4)):
        patch.setattr(cache, name, value)
    common.run_experiments([cache.experiment(TINY)], place / "out" / "tiny" / "results")
    patch.setattr(mode_seeking, "STEPS", 40)
    mode_seeking.run(TINY, place / "out" / "tiny" / "results")
    reproduce.main(reproduce.parse_args(["--preset", "tiny"]))
    yield place / "out" / "tiny"
    patch.undo()


NAMES = (
    "headline temperature alpha teacher_size teacher_reading data_share optimizer reasoning "
    "reasoning_hard cache"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_has_its_rows(name, reproduced):
    rows = sheet.read_rows(reproduced / "results" / name / "results.csv")
    assert list(rows[0])[: len(sheet.COLUMNS)] == sheet.COLUMNS
    keys = [(row["arm"], row["seed"]) for row in rows]
    assert len(keys) == len(set(keys))
    seeds = 2 if name in ("alpha", "reasoning") else 1
    assert {row["seed"] for row in rows} == {str(seed) for seed in range(seeds)}
    for row in rows:
        assert float(row["val_loss"]) > 0 and float(row["seconds"]) > 0
        assert row["command"].startswith(("python train_", "python -m methods."))


def test_rows_are_those_of_the_runs(reproduced):
    """The headline's numbers are the runs' own, and plain students are measured too."""
    rows = sheet.read_rows(reproduced / "results" / "headline" / "results.csv")
    distilled = next(r for r in rows if r["arm"] == "distilled")
    record = read_json(reproduced / "runs/distilled-from-teacher-nano-s0-T1-a0.5/run.json")
    assert float(distilled["val_loss"]) == pytest.approx(record["metrics"]["val_loss"], rel=1e-5)
    assert float(distilled["kl"]) == pytest.approx(record["metrics"]["kl"], rel=1e-4)
    assert int(distilled["tokens"]) == 4 * 2 * 32


def test_equal_cost_is_what_the_distilled_student_cost(reproduced):
    path = reproduced / "results" / "headline" / "results.csv"
    rows = {row["arm"]: row for row in sheet.read_rows(path)}
    for column in ("seconds", "flops"):
        for ending, arms in (("", ["distilled"]), (" and teacher", ["distilled", "teacher"])):
            words = shlex.split(rows[f"equal {column}{ending}"]["command"])
            budget = float(words[words.index(f"--{column}") + 1])
            assert budget == pytest.approx(sum(float(rows[arm][column]) for arm in arms), rel=1e-5)
            assert "--steps" not in words
    spent = float(rows["equal flops and teacher"]["flops"])
    step = float(rows["plain"]["flops"]) / 4
    assert 0 <= spent - budget < 1.5 * step and float(rows["plain"]["flops"]) < budget


def test_rows_say_what_runs_were_made_from(reproduced):
    """The first digits of the hashes of data, tokenizer and teacher, and what the run cost."""
    for name, arm in (("headline", "distilled"), ("reasoning", "traces and KL")):
        rows = sheet.read_rows(reproduced / "results" / name / "results.csv")
        row = next(row for row in rows if row["arm"] == arm)
        teacher = shlex.split(row["command"])
        teacher = reproduced.parent.parent / teacher[teacher.index("--teacher") + 1]
        assert row["teacher_sha256"] == file_hash(teacher / "model.safetensors")[:12]
        assert row["tokenizer_sha256"] == file_hash(teacher / "tokenizer.json")[:12]
        data = reproduced / "data" / {"headline": "train.bin"}.get(name, "reason_train.jsonl")
        assert row["data_sha256"] == file_hash(data)[:12]
        assert float(row["flops"]) > 1e6
        plain = next(row for row in rows if row["arm"] in ("plain", "answers alone"))
        assert plain["teacher_sha256"] == "" and len(plain["data_sha256"]) == 12
    assert sheet.short_hashes({"teacher_sha256": ["a" * 64, "b" * 64]}) == {
        "data_sha256": "",
        "tokenizer_sha256": "",
        "teacher_sha256": "a" * 12 + " " + "b" * 12,
    }


def test_what_a_cache_costs_and_loses(reproduced):
    rows = {r["arm"]: r for r in sheet.read_rows(reproduced / "results" / "cache" / "results.csv")}
    assert {arm: float(row["bytes_per_token"]) for arm, row in rows.items()} == {
        "hidden": 128,
        "topk 4": 18,
        "tail 4": 18,
        "sample 4": 18,
    }
    error = {arm: float(row["gradient_error"]) for arm, row in rows.items()}
    bias = {arm: float(row["gradient_bias"]) for arm, row in rows.items()}
    assert error["hidden"] == bias["hidden"] < 0.01
    for arm in ("topk 4", "tail 4"):  # no chance in it: all of its error is bias
        assert error[arm] == bias[arm] > 0.01
    assert 0.01 < bias["sample 4"] < 0.8 * error["sample 4"]  # four draws: about a half


def test_pictures_and_report(reproduced):
    for name in plots.PICTURES:
        image = plt.imread(reproduced / "results" / name / "plot.png")
        assert image.std() > 0.05, f"{name} is empty"
    text = (reproduced / "results" / "README.md").read_text("utf-8")
    assert "distilled" in text and "temperature/plot.png" in text


def test_pictures_come_from_csv_alone(reproduced, tmp_path):
    for source in (reproduced / "results").glob("*/results.csv"):
        (tmp_path / source.parent.name).mkdir()
        (tmp_path / source.parent.name / "results.csv").write_bytes(source.read_bytes())
    drawn = plots.draw_all(tmp_path)
    assert len(drawn) == len(plots.PICTURES)
    for path in drawn:
        again = reproduced / "results" / path.parent.name / "plot.png"
        assert (plt.imread(path) == plt.imread(again)).all()


def test_soft_labels_leave_no_probability_out(reproduced):
    """Bars of a context and a temperature sum to one, and the true next token is among them."""
    groups = drawing.by_arm(drawing.rows_of(reproduced / "results", "soft_labels"))
    tokens = read_json(reproduced / "data" / "meta.json")["vocab_size"]
    assert len(groups) == 9 and len({rows[0]["context"] for rows in groups.values()}) == 3
    for rows in groups.values():
        assert sum(float(row["probability"]) for row in rows) == pytest.approx(1, abs=1e-4)
        assert sum(int(row["count"]) for row in rows) == tokens
        assert [row["is_next"] for row in rows].count("1") == 1
        ranks = [int(row["rank"]) for row in rows]
        assert ranks[:4] == [1, 2, 3, 4] and ranks[-1] == 0  # the rest stands last
        chances = [float(row["probability"]) for row in rows[:-1]]
        assert chances == sorted(chances, reverse=True)
    entropies = [[float(groups[f"context {n}, T={T}"][0]["entropy"]) for T in (1, 2, 4)]
                 for n in (1, 2, 3)]  # fmt: skip
    assert all(low < middle < high for low, middle, high in entropies)


@pytest.mark.parametrize(
    "text, is_piece",
    [
        ("sir; for, by the power that made me, I tell", True),
        ("What dost", True),
        ("year. Therefore I beseech", False),  # two sentences
        ("**PROSPERO** If I", False),
        ("and good King Henry is", False),
    ],
)
def test_contexts_are_pieces_of_one_sentence(text, is_piece):
    assert bool(soft_labels.PIECE.fullmatch(text)) == is_piece


def test_frequent_words_are_whole_tokens(prepared_folder):
    tokenizer = load_tokenizer(prepared_folder)
    text = PackedText(prepared_folder, "val", 32)
    tokens = [decode(tokenizer, [token]) for token in range(text.vocab_size)]
    words = soft_labels.frequent_words(text, tokenizer, tokens)
    names = [decode(tokenizer, [token]) for token in words.nonzero().flatten().tolist()]
    whole = decode(tokenizer, text.stream.tolist())
    assert all(len(re.findall(rf"{name}\b", whole)) >= soft_labels.FREQUENT for name in names)
    assert names and all(re.fullmatch(" [A-Za-z]+", name) for name in names)


def test_the_last_point_of_a_curve_is_the_number_of_the_table(reproduced):
    results = reproduced / "results"
    table = {(r["arm"], r["seed"]): r["val_loss"] for r in drawing.rows_of(results, "headline")}
    curves = drawing.rows_of(results, "curves")
    last = {(row["arm"], row["seed"]): row for row in curves}
    assert {arm for arm, _ in last} == {"teacher", "plain", "distilled"}
    for key, row in last.items():
        assert float(row["val_loss"]) == pytest.approx(float(table[key]), rel=1e-5)


def test_a_second_call_trains_nothing_and_a_lost_row_comes_back(reproduced, capsys, monkeypatch):
    before = {p: p.read_bytes() for p in reproduced.rglob("results.csv")}
    path = reproduced / "results" / "alpha" / "results.csv"
    path.write_bytes(b"".join(before[path].splitlines(keepends=True)[:-1]))
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", None)  # would fail if anything were to run
    monkeypatch.setattr(plots, "draw_all", lambda results: [])  # as above: they take their time
    reproduce.main(reproduce.parse_args(["--preset", "tiny"]))
    assert {p: p.read_bytes() for p in reproduced.rglob("results.csv")} == before
    assert "pictures:" in capsys.readouterr().out


def test_a_folder_with_other_flags_is_not_taken_for_done(reproduced):
    job = common.plain(TINY, 0)
    other = dataclasses.replace(job, flags=(*job.flags, ("weight_decay", 0.5)))
    assert job.is_done()
    with pytest.raises(ValueError, match="--weight_decay 0.1"):
        other.is_done()


def test_a_cache_is_its_own_record(reproduced, monkeypatch):
    monkeypatch.chdir(reproduced.parent.parent)
    job = cache.cache_job(TINY, common.teacher_of(TINY, 0), "topk", 4)
    assert job.is_done() and job.record_path == Path(job.out)
    for flag, value in (("k", 8), ("seq_len", 64)):
        other = dataclasses.replace(job, flags=tuple({**dict(job.flags), flag: value}.items()))
        with pytest.raises(ValueError, match=f"--{flag} {dict(job.flags)[flag]}, .* needs {value}"):
            other.is_done()


def test_jobs_run_once_and_after_what_they_need():
    first = Job("train_pretrain", "a", ())
    second = Job("train_distillation", "b", (), (first,))
    third = Job("train_distillation", "c", (), (first, second))
    assert jobs.unfinished([third, second, third]) == [first, second, third]
    assert third.command == "python train_distillation.py --out c"
    flags = (("s", None), ("n", 2), ("compile", False))
    assert Job("dataset.x", "d", flags).argv == "--s --n 2 --no-compile --out d".split()


def test_a_failing_job_stops_the_pool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = Job("train_pretrain", str(tmp_path / "run"), (("data", "nowhere"),))
    with pytest.raises(ValueError, match="nowhere"):
        jobs.run_jobs([job])


def test_what_fails_after_a_job_is_raised(tmp_path, prepared_folder):
    """It runs in a thread of its own, from which nothing else would be heard."""
    flags = (("data", prepared_folder), ("model", "nano"), ("steps", 1), ("batch_size", 2))
    job = Job("train_pretrain", str(tmp_path / "run"), flags)
    calls = []

    def after_each():
        calls.append(threading.current_thread() is threading.main_thread())
        raise ValueError("no row")

    with pytest.raises(ValueError, match="no row"):
        jobs.run_jobs([job], after_each)
    assert calls == [False] and job.is_done()


def test_a_sweep_is_told_how_many_runs_at_once_and_in_which_precision(tmp_path, monkeypatch):
    """By default one on a GPU: a large model may need all its memory. Small ones leave it idle."""
    monkeypatch.setattr(jobs, "at_once", None)
    args = methods.parse_args(["--jobs", "3", "--dtype", "float32"])
    for bed in methods.BEDS:
        scale = common.settled(methods.scale_of("quick", bed), args)
        for _, job_of in methods.experiment(scale, bed).arms:
            whole = jobs.unfinished([job_of(0)])
            assert len(whole) > 1 and all(("dtype", "float32") in job.flags for job in whole)
    made, asked = scales.SCALES["quick"], common.settled(scales.SCALES["quick"], args)
    whole = jobs.unfinished([job_of(0) for _, job_of in cache.experiment(asked).arms])
    assert all(("dtype", "float32") in job.flags for job in whole)  # the teacher's file too
    arm, job_of = headline.experiment(made).arms[0]
    row = {"experiment": "headline", "arm": arm, "seed": 0, "command": job_of(0).command}
    sheet.append_rows(tmp_path / "headline/results.csv", [row])
    with pytest.raises(ValueError, match="made without --dtype float32: leave --dtype out"):
        common.run_experiments([headline.experiment(asked)], tmp_path)

    def pool(workers, *_):
        raise StopIteration(workers)

    monkeypatch.setattr(jobs, "ProcessPoolExecutor", pool)
    for asked, expected in ((3, 3), (None, min(4, jobs.available_cores()))):
        jobs.at_once = asked
        with pytest.raises(StopIteration, match=str(expected)):
            jobs.run_jobs([Job("train_pretrain", str(tmp_path / "run"), ())])
    with pytest.raises(ValueError, match="--jobs 0 must be between 1 and 1,000"):
        common.settled(scale, methods.parse_args(["--jobs", "0"]))


def test_report_means():
    rows = [{"x": "1.0"}, {"x": "3.0"}, {"x": ""}]
    assert report.mean_and_spread(rows, "x", digits=1) == "2.0 ± 1.4"
    assert report.mean_and_spread(rows[:1], "x", digits=1) == "1.0"
    assert report.mean_and_spread(rows, "y") == "-"


def test_plots_without_csv_say_how_to_make_them(tmp_path):
    with pytest.raises(ValueError, match="python -m eval.reproduce"):
        plots.main(plots.parse_args(["--results", str(tmp_path)]))


# Command lines.


@pytest.fixture(scope="module")
def model_folder(prepared_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("model") / "run"
    words = ["--model", "nano", "--data", prepared_folder, "--out", out, "--steps", 3]
    words += ["--batch_size", 2, "--seq_len", 32]
    train_pretrain.main(train_pretrain.parse_args([str(word) for word in words]))
    return out


def test_perplexity_beside_a_teacher(prepared_folder, model_folder, capsys):
    words = ["--model", model_folder, "--teacher", model_folder, "--data", prepared_folder]
    metrics = perplexity.main(perplexity.parse_args([*map(str, words), "--seq_len", "32"]))
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-6) and metrics["agreement"] == 1.0
    assert "perplexity" in capsys.readouterr().out


def test_perplexity_of_some_windows_shows_how_far_it_is(
    prepared_folder, model_folder, capsys, monkeypatch
):
    """Those that `evaluation` spreads over the split; more than there are is all."""
    monkeypatch.setattr(progress, "SHORTEST", 0)
    monkeypatch.setattr(perplexity, "BATCH", 2)
    words = ["--model", model_folder, "--data", prepared_folder, "--seq_len", 32]
    metrics = run(perplexity, *words, "--windows", 5)
    said, text = capsys.readouterr(), PackedText(prepared_folder, "val", 32)
    assert f"160 held-out tokens (5 of {text.size} windows) of" in said.out
    assert said.err.splitlines() == [f"perplexity: window {n} of 5" for n in (2, 4)]
    batches = text.evaluation(5, 5)
    expected = evaluate(load_model(model_folder), batches, text.bytes_per_token)
    assert metrics == pytest.approx(expected, rel=1e-4)
    everything = run(perplexity, *words)
    assert run(perplexity, *words, "--windows", 10**6) == everything != metrics
    assert f"({text.size} of {text.size} windows)" in capsys.readouterr().out


def test_reasoning_writes_every_answer(prepared_folder, model_folder, tmp_path, capsys):
    problems = prepared_folder / "reason_test.jsonl"
    words = ["--model", model_folder, "--problems", problems, "--out", tmp_path / "answers.jsonl"]
    reasoning.main(reasoning.parse_args([*map(str, words), "--device", "cpu"]))
    lines = (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()
    assert len(lines) == len(problems.read_text("utf-8").splitlines())
    assert {"question", "reply", "correct", "steps"} <= set(json.loads(lines[0]))
    assert "accuracy" in capsys.readouterr().out


def test_chat_replies_and_ends(model_folder, monkeypatch, capsys):
    said = iter(["How many?", "/new", "And now?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    words = ["--model", str(model_folder), "--teacher", str(model_folder), "--device", "cpu"]
    chat.main(chat.parse_args([*words, "--max_new_tokens", "5", "--temperature", "1"]))
    assert capsys.readouterr().out.count(f"[{model_folder}]") == 4


def test_chat_prints_no_terminal_commands():
    assert chat.printable("a\x1b[2Jb\nc") == "a\ufffd[2Jb\nc"


@pytest.mark.parametrize(
    "words",
    [
        ["eval.perplexity", "--model", "nobody"],
        ["eval.reasoning", "--model", "nobody"],
        ["eval.chat", "--model", "nobody"],
        ["eval.plots", "--results", "nowhere"],
        ["dataset.make_traces", "--samples", "3"],
    ],
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_mistakes_are_one_sentence(words, tmp_path, monkeypatch, capsys):
    """As `python -m` would run it, where there is no git; test_scripts.py starts processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    assert end.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("error: ") and "Traceback" not in "".join(told)


def test_a_title_does_not_hide_that_seeds_are_far_apart():
    assert percent(46.0, 23.0, 81.0) == "46% (23 to 81)" and percent(83.0, 79.0, 88.0) == "83%"


def test_the_usual_font_is_found_by_its_path_alone(monkeypatch):
    """From matplotlib 3.11 on a path of a font is more than its text, and equals no text."""

    class FontPath(str):
        __hash__, __eq__ = object.__hash__, object.__eq__

    found = drawing.font_manager.findfont
    monkeypatch.setattr(drawing.font_manager, "findfont", lambda name: FontPath(found(name)))
    assert drawing.fonts_for("To be") == (["DejaVu Sans"], set())


def measured(*losses, **columns):
    """Rows of one arm, a seed each."""
    return [{"seed": str(seed), "val_loss": str(loss), **columns}
            for seed, loss in enumerate(losses)]  # fmt: skip


def title_of(results, name: str, arms: dict[str, list[dict]]) -> str:
    """What is written over the picture of these rows."""
    for arm, rows in arms.items():
        sheet.append_rows(results / name / "results.csv", [{"arm": arm, **row} for row in rows])
    figure = plots.plt.figure()
    plots.PICTURES[name][0](results, figure)
    title = figure.get_suptitle() or figure.axes[0].get_title(loc="left")
    plots.plt.close(figure)
    return title


def test_two_arms_differ_by_more_than_twice_the_spread():
    """Standard deviations 0.01 and 0.02: a gap of 0.05 tells them apart, one of 0.03 does not."""
    tight, wide = measured(3.99, 4.00, 4.01), measured(3.93, 3.95, 3.97)
    assert drawing.differ(tight, wide) and drawing.differ(wide, tight)
    near = measured(3.95, 3.97, 3.99)
    assert not drawing.differ(tight, near)
    assert not drawing.differ(measured(4.0), measured(1.0)), "one seed shows no spread"
    assert drawing.verdict(wide, tight) == "wins by 0.05 nats"
    assert drawing.verdict(tight, wide) == "loses by 0.05 nats"
    assert drawing.verdict(near, tight) == "ties within the spread"
    assert drawing.amount(near, tight) == "0.03 (within the spread)"
    assert drawing.best(["a", "b"], [tight, wide]) == "b is best"
    both = drawing.best(["a", "b", "c"], [tight, near, measured(4.99, 5.0, 5.01)])
    assert both == "a and b are best: 3 seeds do not tell them apart"
    one = drawing.best(["a", "b"], [measured(4.0), measured(3.0)])
    assert one == "b is lowest, but one seed shows no spread"


@pytest.mark.parametrize(
    "half, title",
    [
        ((3.8, 3.81, 3.82), "alpha = 0.5 is best\nThe lowest is 0.19 nats below labels alone"),
        (
            (3.89, 3.91, 3.93),
            "alpha = 0 and 0.5 are best: 3 seeds do not tell them apart\n"
            "The lowest is 0.10 nats below labels alone",
        ),
    ],
)
def test_alpha_claims_a_best_only_beyond_the_spread(tmp_path, half, title):
    losses = {0: (3.89, 3.90, 3.91), 0.5: half, 1: (3.99, 4.0, 4.01)}
    arms = {f"alpha={alpha}": measured(*values, alpha=alpha) for alpha, values in losses.items()}
    assert title_of(tmp_path, "alpha", arms) == title


def test_the_headline_says_who_wins_at_which_cost(tmp_path):
    means = {
        "teacher": 3.7, "plain": 4.0, "distilled": 3.9, "equal seconds": 3.88,
        "equal flops": 3.901, "equal seconds and teacher": 3.8, "equal flops and teacher": 3.75,
    }  # fmt: skip
    costs = {"flops": 1e12, "seconds": 10, "tokens": 1e6}
    arms = {arm: measured(loss, loss + 0.002, **costs) for arm, loss in means.items()}
    assert title_of(tmp_path, "headline", arms).splitlines() == [
        "At equal tokens the distilled student wins by 0.10 nats",
        "At equal cost it loses by 0.02 nats (seconds), ties within the spread (flops)",
        "If its teacher must be trained too it loses by 0.10 nats (seconds), "
        "loses by 0.15 nats (flops)",
    ]


def test_one_seed_names_the_costs_that_were_measured(tmp_path):
    means = {"teacher": 3.7, "plain": 4.0, "distilled": 3.9, "equal flops": 3.8}
    costs = {"flops": 1e12, "seconds": 10, "tokens": 1e6}
    arms = {arm: measured(loss, **costs) for arm, loss in means.items()}
    assert title_of(tmp_path, "headline", arms).splitlines() == [
        "At equal tokens the distilled student wins by 0.10 nats",
        "At equal cost it loses by 0.10 nats (flops)",
    ]


def test_a_picture_says_how_many_seeds_its_arms_have():
    one, three = [{"arm": "a", "seed": "0"}], [{"arm": "b", "seed": seed} for seed in "012"]
    assert drawing.seeds_of(one) == "1 seed"
    assert drawing.seeds_of(three) == "3 seeds: mean, lowest, highest"
    assert drawing.seeds_of([*one, *three]) == "1 to 3 seeds: mean, lowest, highest"


def test_a_change_that_rounds_to_nothing_is_none():
    assert drawing.change_of(measured(4.1), measured(4.002)) == "gains 0.10"
    assert drawing.change_of(measured(4.0), measured(4.2)) == "loses 0.20"
    assert drawing.change_of(measured(4.0), measured(4.004)) == "stays within 0.01"


def test_tag_weights_are_drawn_where_there_are_several(tmp_path):
    def rows(*shares):
        return [{"seed": str(seed), "accuracy_3": share, "verified_3": share / 2}
                for seed, share in enumerate(shares)]  # fmt: skip

    path = tmp_path / "reasoning" / "results.csv"
    sheet.append_rows(path, [{"arm": "traces, tag 1", **row} for row in rows(0.6, 0.7)])
    assert not plots.is_measured(tmp_path, "tag_weight")
    sheet.append_rows(path, [{"arm": "traces, tag 10", **row} for row in rows(0.2, 0.3)])
    assert plots.is_measured(tmp_path, "tag_weight")
    title = "A tag weight of 10 costs 40 points at 3 steps:\n65% exact at 1, 25% at 10"
    assert title_of(tmp_path, "tag_weight", {}) == title
    path.unlink()  # the same means, but one arm's spread is as large as the difference
    sheet.append_rows(path, [{"arm": "traces, tag 1", **row} for row in rows(0.6, 0.7)])
    sheet.append_rows(path, [{"arm": "traces, tag 10", **row} for row in rows(0.0, 0.5)])
    title = "Seeds do not tell a tag weight of 10 from 1 at 3 steps:\n65% exact at 1, 25% at 10"
    assert title_of(tmp_path, "tag_weight", {}) == title


@pytest.mark.parametrize(
    "distilled, gap, share",
    [
        ((4.4, 4.0, 3.6), "wins by 0.40 nats", "67%"),
        ((4.6, 4.2, 3.8), "wins by 0.20 nats", "83%"),
        ((3.9, 3.8, 3.7), "wins by 0.30 nats", "33%"),
        ((4.8, 4.5, 4.2), "loses by 0.20 nats", None),
    ],
)
def test_the_curves_say_when_the_plain_student_is_passed(tmp_path, distilled, gap, share):
    """Where the line on equal windows crosses, not at the next point: with three points that is
    far away. The final evaluations, on more windows, are all 0.1 higher."""
    curves = {"teacher": (4.3, 3.9, 3.5), "plain": (5.0, 4.5, 4.0), "distilled": distilled}
    arms = {}
    for arm, losses in curves.items():
        rows = [
            *zip((100, 200, 300), losses, (100,) * 3, strict=True),
            (300, losses[-1] + 0.1, 400),
        ]
        arms[arm] = [{"seed": "0", "tokens": tokens, "val_loss": loss, "windows": windows}
                     for tokens, loss, windows in rows]  # fmt: skip
    passes = f";\nit passes the plain student's last loss after about {share} of the tokens"
    title = f"At the end the distilled student {gap}{passes if share else ''}"
    assert title_of(tmp_path, "curves", arms) == title


def test_csv_rows_keep_their_columns(tmp_path):
    path = tmp_path / "x" / "results.csv"
    row = {"experiment": "e", "arm": "a", "seed": 0, "extra": 0.1234567891}
    sheet.append_rows(path, [row, row])
    sheet.append_rows(path, [{"experiment": "e", "arm": "b", "seed": 0, "unknown": 1}])
    sheet.append_rows(path, [{**row, "extra": 2.0}])  # another sweep has written it
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["a", "a", "b"]
    assert rows[0]["extra"] == rows[1]["extra"] == "0.123457" and rows[2]["extra"] == ""


def test_a_worker_that_is_done_holds_no_folder(monkeypatch, tmp_path):
    """Finished, or failed: another sweep may wait for that folder, and this worker lives on."""
    for error in (None, Finished("done"), ValueError("broken")):

        def main(args, error=error):
            lock(tmp_path / "run")
            if error:
                raise error

        script = types.SimpleNamespace(main=main, parse_args=lambda argv: argv)
        monkeypatch.setitem(sys.modules, "train_nothing", script)
        with pytest.raises(ValueError) if isinstance(error, ValueError) else nullcontext():
            jobs.execute(jobs.Job("train_nothing", str(tmp_path / "run"), ()))
        assert not locks.held
