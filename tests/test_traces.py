"""Promise: a model is asked as it was taught to be, its whole replies are kept and its cut ones are
counted, and answers are looked for where they were said to be."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from dataset import make_traces, replies
from dataset.chat import encode_prompt, stop_ids
from dataset.tokenizer import decode, encode, load_tokenizer
from eval import chat, reasoning
from files import read_json
from model import ModelConfig, Transformer, load_model, save_model
from tests.short_runs import run

SYSTEM = "Think. End with  //  #### and/or ./a number."
SMOLLM2 = ModelConfig(49152, 576, 30, 9, 3, 64, 1536, 8192)


@pytest.fixture(scope="module")
def folder(prepared_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("untrained")
    save_model(Transformer(ModelConfig.preset("nano", 400)), out, prepared_folder)
    return out


@pytest.fixture
def prompts(tmp_path):
    lines = [
        {"conversations": [{"role": "system", "content": "Be kind."},
                           {"role": "user", "content": f"{n}+{n}?"}], "answer": 2 * n}
        for n in range(4)
    ]  # fmt: skip
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_replies_are_batched_by_the_memory_that_they_take():
    small, large, half = (
        SimpleNamespace(config=config, lm_head=SimpleNamespace(weight=torch.zeros(1, dtype=dtype)))
        for config, dtype in ((ModelConfig.preset("nano", 400), torch.float32),
                              (SMOLLM2, torch.float32), (SMOLLM2, torch.bfloat16))
    )  # fmt: skip
    assert replies.batch_rows(small, 1024) == 100  # as ever
    row = 30 * 3 * 64 * 2 * 4  # bytes: layers, heads, their width, key and value, float32
    for positions in (300, 1000, 8192):
        rows = replies.batch_rows(large, positions)
        assert rows * row * positions <= 2**30 < (rows + 1) * row * positions
    assert replies.batch_rows(half, 1000) == 2**30 // (row * 1000 // 2)
    assert replies.batch_rows(large, 10**6) == 1


def test_batches_of_any_size_give_the_same_replies(folder, prompts, monkeypatch):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    problems = replies.read_problems(prompts)
    whole = replies.write_replies(model, tokenizer, problems, 8)
    monkeypatch.setattr(replies, "CACHE_BYTES", 1)
    assert replies.write_replies(model, tokenizer, problems, 8) == whole


@pytest.mark.parametrize("length", [7, 8, 9])
def test_a_reply_is_cut_where_its_end_does_not_come_in_time(length, folder, prompts, monkeypatch):
    """Of 8 tokens: 7 and the end are whole, 8 without it are cut, however right they are."""
    tokenizer = load_tokenizer(folder)
    said = encode(tokenizer, "#### 4 a b c d e f g h i")[:length]
    assert decode(tokenizer, said).startswith("#### 4 ")
    words = iter([*said, stop_ids(tokenizer)[0]])

    def scripted(logits, *_):
        return torch.full((len(logits),), next(words))

    monkeypatch.setattr(sys.modules["model.generate"], "choose_token", scripted)
    flags = ["--teacher", folder, "--prompts", prompts, "--answer_form", "gsm8k", "--device", "cpu"]
    flags += ["--max_new_tokens", 8, "--out", prompts.parent / "traces.jsonl"]
    if length < 8:
        counts = run(make_traces, *flags)
        assert counts == {"problems": 4, "written": 4, "kept": 1, "cut": 0}
        return
    with pytest.raises(ValueError, match="4 were cut at 8 tokens.*raise --max_new_tokens"):
        run(make_traces, *flags)


def test_more_positions_than_the_model_has_are_refused_at_once(folder, prompts):
    flags = ["--teacher", folder, "--prompts", prompts, "--out", prompts.parent / "traces.jsonl"]
    with pytest.raises(ValueError, match="more than the model's 1024 positions"):
        run(make_traces, *flags, "--max_new_tokens", 1020, "--device", "cpu")


def test_what_the_teacher_is_told_is_not_in_its_traces(folder, prompts, monkeypatch):
    tokenizer, asked = load_tokenizer(folder), []

    def answer(model, tokenizer, problems, *_, **__):
        asked.extend(problem["turns"] for problem in problems)
        return [encode(tokenizer, f"so:\n#### {n}") for n in (0, 2, 5, 6)]

    monkeypatch.setattr(make_traces, "write_replies", answer)
    out = prompts.parent / "traces.jsonl"
    flags = ["--teacher", folder, "--prompts", prompts, "--out", out, "--device", "cpu"]
    flags += ["--answer_form", "gsm8k", "--system", SYSTEM]
    counts = run(make_traces, *flags)
    assert (counts["written"], counts["kept"]) == (4, 3)
    told = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "1+1?"}]
    assert asked[1] == told
    assert decode(tokenizer, encode_prompt(tokenizer, told)).count(SYSTEM) == 1
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    turns = [("system", "Be kind."), ("user", "1+1?"), ("assistant", "so:\n#### 2")]
    assert [(turn["role"], turn["content"]) for turn in lines[1]["conversations"]] == turns
    assert {line["answer_form"] for line in lines} == {"gsm8k"}
    options = read_json(f"{out}.finished.json")["args"]
    assert (options["answer_form"], options["system"]) == ("gsm8k", SYSTEM)
    for other in ("boxed", "tags"):
        with pytest.raises(ValueError, match="no trace of"):
            run(make_traces, *flags, "--answer_form", other, "--overwrite")


def test_a_text_is_no_last_number(folder, prompts):
    prompts.write_text(prompts.read_text("utf-8").replace('"answer": 6', '"answer": "six"'))
    flags = ["--answer_form", "last", "--out", prompts.parent / "o", "--device", "cpu"]
    for script, *names in ((make_traces, "--teacher", "--prompts"),
                           (reasoning, "--model", "--problems")):  # fmt: skip
        with pytest.raises(ValueError, match="'six' is no number"):
            run(script, names[0], folder, names[1], prompts, *flags)


@pytest.mark.parametrize("form, right", [("gsm8k", [1, 0, 0, 1]), ("last", [1, 1, 0, 1])])
def test_reasoning_reads_the_form_that_is_said(form, right, folder, prompts, monkeypatch, capsys):
    asked = []

    def answer(model, tokenizer, problems, *_):
        asked.extend(problem["turns"][0] for problem in problems)
        return [encode(tokenizer, text) for text in ("#### 0", "2", "none", "2\n#### 6")]

    def cut(model, tokenizer, problems, *_):
        return [encode(tokenizer, f"#### {2 * n}{behind}") for n in range(4)]

    monkeypatch.setattr(reasoning, "write_replies", answer)
    out = prompts.parent / "answers.jsonl"
    flags = ["--model", folder, "--problems", prompts, "--out", out, "--device", "cpu"]
    run(reasoning, *flags, "--answer_form", form, "--system", SYSTEM)
    assert asked == [{"role": "system", "content": SYSTEM}] * 4
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [line["correct"] for line in lines] == [bool(x) for x in right]
    assert {line["answer_form"] for line in lines} == {form}
    formed = {"gsm8k": "50.0%", "last": "75.0%"}[form]
    rows = [x.split() for x in capsys.readouterr().out.splitlines()]
    (row,) = [row for row in rows if row[:1] == ["all"]]
    assert row == ["all", "4", f"{sum(right) / 4:.1%}", formed, "-", "0.0"]
    # Of a reply that was cut, the last number is still to come, and 4 may be the begin of 42.
    monkeypatch.setattr(reasoning, "write_replies", cut)
    for behind in ("", "\n"):
        most = len(cut(None, load_tokenizer(folder), [])[0])
        run(reasoning, *flags, "--answer_form", form, "--max_new_tokens", most, "--overwrite")
        lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert [line["correct"] for line in lines] == [form == "gsm8k" and bool(behind)] * 4


def test_without_tags_no_thought_is_counted(folder):
    tokenizer = load_tokenizer(folder)
    ids = encode(tokenizer, "7")
    problem = {"turns": [{"role": "user", "content": "?"}], "answer": 7, "steps": 0}
    assert reasoning.judge(tokenizer, problem, ids, "last")["think_tokens"] == 0

    class Bare:
        """The tokenizer of a model that never saw the tags."""

        def token_to_id(self, token):
            return None

        def decode(self, ids, **options):
            return tokenizer.decode(ids, **options)

    line = reasoning.judge(Bare(), problem, ids, "last")
    assert line["correct"] and line["think_tokens"] is None
    assert reasoning.summarise([line])[0]["think_tokens"] is None


def test_chat_begins_with_the_words_of_the_system(folder, monkeypatch):
    said, asked = iter(["hi", "/new", "ho", ""]), []
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    monkeypatch.setattr(chat, "encode_prompt", lambda _, turns: asked.append(turns) or [1])
    flags = ["--model", folder, "--device", "cpu", "--max_new_tokens", 2]
    run(chat, *flags, "--system", SYSTEM)
    told = {"role": "system", "content": SYSTEM}
    assert asked == [[told, {"role": "user", "content": word}] for word in ("hi", "ho")]
    with pytest.raises(ValueError, match="--system is of turns"):
        run(chat, *flags, "--system", SYSTEM, "--complete")
