"""Promise: one command makes all data, the same bytes every time, and loses no text on the way."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dataset import prepare
from dataset.answers import is_answer
from dataset.chat import ChatData, question_place
from dataset.packing import PackedText
from dataset.problems import check_response
from dataset.replies import read_problems
from dataset.tokenizer import decode, load_tokenizer
from files import tokenizer_hash

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "meta.json",
    "reason_prompts.jsonl",
    "reason_test.jsonl",
    "reason_train.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
    "train.bin",
    "val.bin",
}
SMALL = {"vocab_size": 300, "problems": 20, "prompts": 8, "test_problems": 10}


def run_prepare(out, **flags):
    argv = ["--out", str(out)]
    for name, value in {**SMALL, **flags}.items():
        argv += [f"--{name}"] if value is True else [f"--{name}={value}"]
    prepare.main(prepare.parse_args(argv))
    return out


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_lines(path, lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def stored_documents(folder, split) -> list[str]:
    """The texts of a stream: cut at the end tokens and decoded."""
    tokenizer, meta = load_tokenizer(folder), json.loads((folder / "meta.json").read_text("utf-8"))
    ids = np.fromfile(folder / f"{split}.bin", meta[split]["dtype"]).tolist()
    assert ids[-1] == 0
    documents, start = [], 0
    for place in (i for i, token in enumerate(ids) if token == 0):
        documents.append(decode(tokenizer, ids[start:place]))
        start = place + 1
    return documents


@pytest.fixture
def texts(tmp_path):
    """A folder of 12 documents of 300 to 900 characters, with all kinds of characters."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        text = f"# Día {i} <|endoftext|> 🙂\n" + f"the wind {i} and the sea.\n" * (12 + 2 * i)
        (folder / f"{i}.{'md' if i % 2 else 'txt'}").write_text(text, "utf-8")
    return folder


# --- End to end ---


def test_all_files_and_all_text_are_there(tmp_path, texts):
    out = run_prepare(tmp_path / "out", text=texts, val_share=0.2)
    assert {p.name for p in out.iterdir()} == FILES
    given = Counter(p.read_text("utf-8") for p in texts.iterdir())
    training, validation = (stored_documents(out, split) for split in ("train", "val"))
    assert Counter(training + validation) == given
    assert 1 <= len(validation) <= 5
    meta = json.loads((out / "meta.json").read_text("utf-8"))
    assert meta["tokenizer_sha256"] == tokenizer_hash(out)
    assert meta["vocab_size"] == load_tokenizer(out).get_vocab_size() == 300
    for split, documents in (("train", training), ("val", validation)):
        assert meta[split]["documents"] == len(documents)
        assert meta[split]["bytes"] == sum(len(text.encode("utf-8")) for text in documents)
        assert PackedText(out, split, 16).vocab_size == 300


@pytest.mark.parametrize("val_share", [0.01, 0.1, 0.5])
def test_single_file_is_cut_once(tmp_path, val_share):
    text = "".join(f"line {i} of a long story\n" for i in range(400))
    (tmp_path / "story.txt").write_text(text)
    out = run_prepare(tmp_path / "out", text=tmp_path / "story.txt", val_share=val_share)
    (training,), (validation,) = (stored_documents(out, split) for split in ("train", "val"))
    assert training + validation == text
    assert len(validation) == pytest.approx(val_share * len(text), abs=30)


def test_jsonl(tmp_path):
    stories = [f"story {i}: once\n\nthere was 🌊 and {i * 'so '}\n" for i in range(40)]
    path = write_lines(tmp_path / "text.jsonl", [{"text": story} for story in stories])
    out = run_prepare(tmp_path / "out", jsonl=path, val_share=0.25)
    assert Counter(stored_documents(out, "train") + stored_documents(out, "val")) == Counter(
        stories
    )


def test_the_default_is_shakespeare(tmp_path, monkeypatch):
    plays = [(f"{i}.md", f"Act {i}.\n" * 50) for i in range(5)]
    monkeypatch.setattr(prepare, "shakespeare", lambda cache: plays if cache.name == "c" else None)
    out = run_prepare(tmp_path / "out", cache=tmp_path / "c")
    stored = stored_documents(out, "train") + stored_documents(out, "val")
    assert sorted(stored) == [text for _, text in plays]


def test_held_out_text_does_not_teach_the_tokenizer(tmp_path, texts):
    out = run_prepare(tmp_path / "one", text=texts)
    before = tokenizer_hash(out)
    (held_out_text, *_) = stored_documents(out, "val")
    for path in texts.iterdir():
        if path.read_text("utf-8") == held_out_text:
            path.write_text("zyzzyva " * (len(held_out_text) // 8 + 1), "utf-8")
    assert tokenizer_hash(run_prepare(tmp_path / "two", text=texts)) == before


def test_reasoning_files_keep_their_promises(prepared_folder):
    lines = {
        s: read_lines(prepared_folder / f"reason_{s}.jsonl") for s in ("train", "prompts", "test")
    }
    assert [len(lines[s]) for s in ("train", "prompts", "test")] == [150, 20, 20]
    for split in ("train", "test"):
        for line in lines[split]:
            question, reply = line["conversations"]
            assert (question["role"], reply["role"]) == ("user", "assistant")
            check = check_response(question["content"], reply["content"])
            assert check.verified and check.answer == line["answer"]
            assert line["steps"] == sum(reply["content"].count(sign) for sign in "+-*") + (
                reply["content"].count("/") - 2  # the closing tags have one each
            )
    for line in lines["prompts"]:
        assert [turn["role"] for turn in line["conversations"]] == ["user"]
    assert {line["steps"] for line in lines["train"] + lines["prompts"]} == {1, 2, 3, 4}
    assert Counter(line["steps"] for line in lines["test"]) == dict.fromkeys((1, 2, 3, 4, 5), 4)
    questions = [line["conversations"][0]["content"] for s in lines for line in lines[s]]
    assert len(set(questions)) == 190


def test_the_same_command_makes_the_same_bytes(tmp_path, texts):
    one, two = (run_prepare(tmp_path / name, text=texts) for name in ("one", "two"))
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_seed_moves_the_problems_and_not_the_text(tmp_path, texts):
    one, two = (run_prepare(tmp_path / str(seed), text=texts, seed=seed) for seed in (0, 1))
    assert (one / "reason_train.jsonl").read_bytes() != (two / "reason_train.jsonl").read_bytes()
    assert stored_documents(one, "val") == stored_documents(two, "val")


def test_an_interrupted_prepare_leaves_what_was_there(tmp_path, texts, monkeypatch):
    out = run_prepare(tmp_path / "out", text=texts)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "write_stream", killed)
    with pytest.raises(KeyboardInterrupt):
        run_prepare(out, text=texts, vocab_size=310, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_no_document_stands_in_both_splits(tmp_path, capsys):
    """Copies, but for the space around them, are left out, and counted."""
    stories = [f"story {i}: once upon a time there were {i * 'so '}many\n" for i in range(12)]
    copies = [stories[3], f"\n{stories[3]}", stories[5].strip(), *stories[8:]]
    path = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in stories + copies])
    out = run_prepare(tmp_path / "out", jsonl=path, val_share=0.4)
    stored = [stored_documents(out, split) for split in ("train", "val")]
    assert all(stored) and sorted(stored[0] + stored[1]) == sorted(stories)
    assert "repeated documents left out: 7\n" in capsys.readouterr().out


def test_held_out_text_that_is_trained_on_is_told(tmp_path, capsys):
    """Documents may differ and yet share paragraphs. Of 2 + 2 held-out ones of 40 characters, two
    are in the training text; "or", which may stand anywhere, counts as not."""
    new, old = (
        "what only this page says, word for word.",
        "what other pages say too, word for word.",
    )
    assert len(new) == len(old) == 40
    held_out = [{"text": f"{old}\n\n{new}"}, {"text": f"{new} \n\n {old}\n\nor"}]
    training = [{"text": f"page {i}\n\n{old}\n\nor"} for i in range(20)]
    out, text = tmp_path / "out", write_lines(tmp_path / "text.jsonl", training)
    run_prepare(out, jsonl=text, held_out=write_lines(tmp_path / "held_out.jsonl", held_out))
    said = "49% of the held-out text is in the training text, word for word"  # 80 of 162
    assert said in capsys.readouterr().out
    run_prepare(tmp_path / "other", jsonl=text, val_share=0.1)
    assert "word for word" in capsys.readouterr().out  # all of it, but the numbers of the pages
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph {i} of a long text" for i in range(99)))
    run_prepare(tmp_path / "third", text=tmp_path / "a.txt")
    assert "word for word" not in capsys.readouterr().out


CONTROL = "<|im_start|>one<|im_end|> <|im_start|>two<|im_end|>"


def test_control_tokens_of_a_jsonl_end_documents(tmp_path, capsys):
    """MiniMind's pretraining text has several pieces in a line."""
    lines = [CONTROL, "plain", "three<|endoftext|>four", *(f"more {i}" for i in range(20))]
    path = write_lines(tmp_path / "text.jsonl", [{"text": text} for text in lines])
    out = run_prepare(tmp_path / "out", jsonl=path, val_share=0.3)
    stored = stored_documents(out, "train") + stored_documents(out, "val")
    assert sorted(stored) == sorted(["one", "two", "three", "four", *lines[1:2], *lines[3:]])
    said = f"{path}: 5 control tokens (<|im_end|>, ...) were read as ends of documents\n"
    assert said in capsys.readouterr().out


def test_control_tokens_of_a_text_are_counted(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"{CONTROL}\n" * 50)
    out = run_prepare(tmp_path / "out", text=tmp_path / "a.txt")
    (training,), (validation,) = (stored_documents(out, split) for split in ("train", "val"))
    assert training + validation == f"{CONTROL}\n" * 50
    assert "a.txt: 200 control tokens" in capsys.readouterr().out


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa line\n" + b"and more\n" * 30)
    lines = [json.dumps({"text": f"story {i}"}).encode() for i in range(5)]
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    for source in ({"text": tmp_path / "a.txt"}, {"jsonl": tmp_path / "b.jsonl"}):
        out = run_prepare(tmp_path / next(iter(source)), **source)
        stored = "".join(stored_documents(out, "train") + stored_documents(out, "val"))
        assert "\ufeff" not in stored and ("a line" in stored or "story 0" in stored)


# --- The user's own traces ---


def r1_line(i: int) -> dict:
    content = f"<think>\n{i}+{i}={2 * i}\n</think>\n<answer>\n{2 * i}\n</answer>"
    turns = [{"role": "user", "content": f"{i}+{i}?"}, {"role": "assistant", "content": content}]
    return {"conversations": turns}


def gsm8k_line(i: int) -> dict:
    return {"question": f"{i}+{i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"}


def test_reasoning_of_the_users_own(tmp_path, texts):
    given = [r1_line(i) if i % 2 else gsm8k_line(i) for i in range(200)]
    path = write_lines(tmp_path / "own.jsonl", given)
    out = run_prepare(tmp_path / "out", text=texts, reason=path)
    train, prompts, test = (
        read_lines(out / f"reason_{s}.jsonl") for s in ("train", "prompts", "test")
    )
    expected = {}
    for i in range(200):
        (question, reply) = r1_line(i)["conversations"]
        if i % 2 == 0:
            content = f"<think>\nIt is {2 * i}.\n</think>\n<answer>\n{2 * i}\n</answer>"
            reply = {"role": "assistant", "content": content}
        expected[f"{i}+{i}?"] = ([question, reply], 2 * i)
    written = {line["conversations"][0]["content"]: line for line in train + test}
    assert len(train) + len(test) == len(written) == 200  # none lost, none twice
    for asked, line in written.items():
        assert (line["conversations"], line["answer"]) == expected[asked]
    assert 8 <= len(test) <= 35  # 20 expected, standard deviation 4.2
    for line in train + test:
        assert (question_place(line["conversations"], salt="test ") < 0.1) == (line in test)
    assert [line["conversations"] for line in prompts] == [
        line["conversations"][:1] for line in train
    ]


def test_thirty_problems_are_enough_for_lesson_3(tmp_path, texts):
    """Each of the three sets has a problem: trained on, watched while training, asked at the end.
    A share may be asked for."""
    for start in range(0, 300, 30):
        given = [gsm8k_line(start + i) for i in range(30)]
        path = write_lines(tmp_path / "own.jsonl", given)
        out = run_prepare(tmp_path / f"out{start}", text=texts, reason=path, val_share=0.2)
        data = ChatData(out / "reason_train.jsonl", out, "train", 256)
        test = read_lines(out / "reason_test.jsonl")
        assert data.size and data.held_out.size and test
        assert data.size + data.held_out.size + len(test) == 30
        places = [question_place(line["conversations"], salt="test ") for line in test]
        assert len(test) == 1 or max(places) < 0.2


def test_gsm8k_as_it_is_loads_whole(tmp_path, texts, capsys):
    """Thousands, dollars, percent, signs, decimals; what is no number is left out, and counted."""
    finals = ["1,234", "$10", "50%", "-3", "3.5", "$1,250.75", "7"] * 4
    given = [{"question": f"{i}?", "answer": f"So.\n#### {x}"} for i, x in enumerate(finals)]
    given[5]["answer"] = "Nobody knows.\n#### four"
    path = write_lines(tmp_path / "own.jsonl", given)
    out = run_prepare(tmp_path / "out", text=texts, reason=path)
    lines = read_lines(out / "reason_train.jsonl") + read_lines(out / "reason_test.jsonl")
    answers = {line["conversations"][0]["content"]: line["answer"] for line in lines}
    assert len(answers) == len(lines) == 27
    expected = [1234, 10, 50, -3, "3.5", "1250.75", 7] * 4
    assert answers == {f"{i}?": x for i, x in enumerate(expected) if i != 5}
    assert "own.jsonl: 1 bad line was left out:" in capsys.readouterr().out
    for line in lines:  # what a gold reply says is the answer
        assert is_answer(line["conversations"][1]["content"], line["answer"])
    assert len(read_problems(out / "reason_test.jsonl")) >= 1


def test_training_can_hold_out_some_of_the_users_own_traces(tmp_path, texts):
    # What train_distill_reason.py does next: both splits of reason_train.jsonl.
    path = write_lines(tmp_path / "own.jsonl", [r1_line(i) for i in range(400)])
    out = run_prepare(tmp_path / "out", text=texts, reason=path)
    path = out / "reason_train.jsonl"
    sizes = [ChatData(path, out, split, 256).size for split in ("train", "val")]
    assert sum(sizes) == len(read_lines(path))
    assert 5 <= sizes[1] <= 40  # a twentieth of about 360


def test_prompt_files_end_with_a_question(tmp_path, texts):
    """A conversation that goes on after the answer must not become a prompt without a question."""
    lines = [r1_line(i) for i in range(100)]
    thanks = {"role": "user", "content": "Thanks."}
    lines[2]["conversations"].append(thanks)
    path = write_lines(tmp_path / "own.jsonl", lines)
    try:
        out = run_prepare(tmp_path / "out", text=texts, reason=path)
    except ValueError as error:
        assert "own.jsonl line 3" in str(error)
    else:
        for line in read_lines(out / "reason_prompts.jsonl"):
            assert line["conversations"][-1]["role"] == "user"
            assert thanks not in line["conversations"]


@pytest.mark.parametrize(
    "line, message",
    [
        ({"conversations": [{"role": "user", "content": "q"}]}, "no assistant turn"),
        ({"question": "q", "answer": "42"}, "####"),
        ({"text": "a"}, "question"),
        ([1], "JSON object"),
    ],
)
def test_bad_trace_is_refused_by_its_line(tmp_path, texts, line, message):
    path = write_lines(tmp_path / "own.jsonl", [r1_line(0), line, r1_line(1)])
    with pytest.raises(ValueError, match=f"own.jsonl line 2.*{message}"):
        run_prepare(tmp_path / "out", text=texts, reason=path)
    assert not (tmp_path / "out").exists()


def test_too_few_traces_are_refused(tmp_path, texts):
    path = write_lines(tmp_path / "own.jsonl", [r1_line(0)] * 5)
    with pytest.raises(ValueError, match="own.jsonl: all lines ask the same question: add others"):
        run_prepare(tmp_path / "out", text=texts, reason=path)


# --- Mistakes ---


@pytest.mark.parametrize(
    "flag, value",
    [
        ("val_share", 0.0),
        ("val_share", 0.6),
        ("val_share", -1),
        ("val_share", "nan"),
        ("vocab_size", 262),
        ("problems", 0),
        ("prompts", -1),
        ("test_problems", 0),
    ],
)
def test_bad_flag_is_refused_before_anything_is_written(tmp_path, texts, flag, value):
    with pytest.raises(ValueError, match=f"{flag.split('_')[0]}.*{value}"):
        run_prepare(tmp_path / "out", text=texts, **{flag: value})
    assert not (tmp_path / "out").exists()


def test_two_sources_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare.parse_args(["--text", "a", "--jsonl", "b"])
    assert stop.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_command_line_ends_in_one_sentence_and_code_2(tmp_path):
    command = [sys.executable, "-m", "dataset.prepare", "--text", "missing", "--out"]
    result = subprocess.run(
        [*command, str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: missing does not exist")
    assert not (tmp_path / "out").exists()
