"""Promise: a teacher behind an address is asked once for each reply, within the limits, however
badly it behaves; what it wrote is kept for a reason, and the key stands nowhere."""

import json
import ssl
import sys
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dataset import ask_teacher, teacher_api
from dataset.answers import is_answer
from dataset.filters import Near, answer_in, confidence, is_loop, is_refusal, majority, words_of
from dataset.teacher_api import Budget, Limit
from eval import serve
from files import file_hash, growing, read_json
from model import ModelConfig, Transformer, save_model
from tests.short_runs import run

KEY = "sk-0123456789abcdef"
tls = cache(ssl.create_default_context)  # a tenth of a second


def said(content, finish="stop", tokens=(10, 5), message=None, **more) -> dict:
    """The body of a server's answer."""
    choice = {"index": 0, "finish_reason": finish, **more}
    choice["message"] = {"role": "assistant", "content": content, **(message or {})}
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
    return {"model": "fake-1", "choices": [choice], "usage": usage}


class Fake(ThreadingHTTPServer):
    """Answers by `script(body, number)`: a body, or a status with headers and a body."""

    daemon_threads = True

    def __init__(self, script):
        self.script, self.bodies, self.keys, self.turn = script, [], set(), threading.Lock()
        super().__init__(("127.0.0.1", 0), FakeHandler)

    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for body in self.bodies]


class FakeHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.turn:
            self.server.bodies.append(body)
            self.server.keys.add(self.headers["Authorization"])
            number = len(self.server.bodies)
        answer = self.server.script(body, number)
        status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake(script): a server, and ask(*flags) that asks it in this folder."""
    pytest.importorskip("openai")
    servers = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(teacher_api, "WAIT", 0.001)
    monkeypatch.setattr(ssl, "create_default_context", tls)  # which no test here needs

    def start(script):
        server = Fake(script)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        api = f"http://127.0.0.1:{server.server_port}/v1"

        def ask(*flags, out="asked.jsonl"):
            flags = ["--api", api, "--model", "m", "--threads", "1", "--out", out, *flags]
            return run(ask_teacher, *flags)

        return server, ask

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def problems(count: int, name="p.jsonl", **more) -> str:
    """A file of problems n + n."""
    turns = [[{"role": "user", "content": f"What is {n} plus {n}?"}] for n in range(count)]
    lines = [{"conversations": x, "answer": 2 * n, **more} for n, x in enumerate(turns)]
    Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return name


def lines_of(path="asked.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def right(body, number=0, **more) -> dict:
    """What a teacher that can add says."""
    n = int(body["messages"][-1]["content"].split()[2])
    return said(f"<think>\n{n}+{n}\n</think>\n<answer>\n{2 * n}\n</answer>", **more)


def test_replies_become_traces(fake):
    """In the form of dataset.make_traces, with a record of what they were made from."""
    server, ask = fake(lambda body, _: right(body))
    counts = ask("--prompts", problems(3), "--system", "Be brief.", "--seed", "7")
    assert (counts["kept"], counts["left_out"]) == (3, {})
    assert counts["spent"] == {"requests": 3, "prompt_tokens": 30, "reply_tokens": 15}
    for n, line in enumerate(lines_of()):
        user, reply = line["conversations"]
        assert user == {"role": "user", "content": f"What is {n} plus {n}?"}, "the system is kept"
        assert (line["answer"], line["steps"]) == (2 * n, 0)
        assert is_answer(reply["content"], 2 * n)
    told = server.bodies[2]
    assert told["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (told["model"], told["max_tokens"], told["seed"]) == ("m", 1024, 9)
    assert "temperature" not in told and "logprobs" not in told
    record = read_json("asked.jsonl.finished.json")
    read = ("p.jsonl", "asked.jsonl.replies.jsonl")
    assert record["args"]["made_from"] == {path: file_hash(path) for path in read}
    assert (record["args"]["keep"], record["models"]) == ("verified", {"fake-1": 3})
    assert server.keys == {f"Bearer {KEY}"}


def test_our_own_server_is_asked(prepared_folder, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig.preset("nano", 400)), tmp_path / "model", prepared_folder)
    flags = ["--model", tmp_path / "model", "--port", 0, "--device", "cpu"]
    with serve.Server(serve.parse_args([str(flag) for flag in flags])) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        flags = ["--api", f"http://127.0.0.1:{server.server_port}/v1", "--model", "m"]
        flags += ["--prompts", problems(3), "--out", "asked.jsonl", "--max_new_tokens", "4"]
        with pytest.raises(ValueError, match="kept 0 replies .* left out 6 cut at --max_new_tok"):
            run(ask_teacher, *flags, "--keep", "all", "--samples", "2", "--temperature", "1")
        server.shutdown()
        thread.join()
    replies = lines_of("asked.jsonl.replies.jsonl")
    assert [reply["finish"] for reply in replies] == ["length"] * 6
    spent = read_json("asked.jsonl.replies.jsonl.progress.json")
    assert (spent["requests"], spent["reply_tokens"]) == (6, 24)


def test_a_call_that_was_killed_asks_for_the_rest(fake, monkeypatch):
    """Killed between what is written and its record, and between two replies."""
    server, ask = fake(lambda body, _: right(body))
    commit, calls = growing.GrowingFile.commit, []

    def die(self, **counts):
        calls.append(counts)
        if len(calls) == 3:  # written, not recorded
            self.file.flush()
            raise KeyboardInterrupt
        commit(self, **counts)

    monkeypatch.setattr(growing.GrowingFile, "commit", die)
    with pytest.raises(KeyboardInterrupt):
        ask("--prompts", problems(6))
    assert len(lines_of("asked.jsonl.replies.jsonl")) == 3 and not Path("asked.jsonl").exists()
    assert ask("--prompts", "p.jsonl")["kept"] == 6
    kept = [f"What is {n} plus {n}?" for n in range(2)]
    assert [server.questions().count(question) for question in kept] == [1, 1]
    assert server.questions().count("What is 2 plus 2?") == 2, "what has no record is asked again"
    assert [line["answer"] for line in lines_of()] == [0, 2, 4, 6, 8, 10]


def test_other_filters_and_more_samples_cost_only_what_is_new(fake):
    server, ask = fake(lambda body, _: said("#### 4"))
    with pytest.raises(ValueError, match="kept 0 replies from 4 replies, left out 4 another ans"):
        ask("--prompts", problems(4))
    assert not Path("asked.jsonl").exists()
    counts = ask("--prompts", "p.jsonl", "--answer_form", "gsm8k")
    assert (counts["kept"], counts["left_out"]) == (1, {"another answer": 3})
    assert lines_of()[0]["answer_form"] == "gsm8k"
    assert ask("--prompts", "p.jsonl", "--keep", "all")["kept"] == 4
    assert len(server.bodies) == 4
    counts = ask("--prompts", "p.jsonl", "--keep", "all", "--samples", "3")
    assert (counts["kept"], counts["left_out"]) == (4, {"said twice": 8})
    assert len(server.bodies) == 12
    for flags, why in ((["--seed", "1"], "was begun with other flags"), ([], "has changed")):
        if not flags:
            problems(5)
        with pytest.raises(ValueError, match=why):
            ask("--prompts", "p.jsonl", "--keep", "all", *flags)
    assert ask("--prompts", "p.jsonl", "--keep", "all", "--overwrite")["kept"] == 5
    assert len(server.bodies) == 17


def test_a_server_that_recovers_is_asked_again(fake):
    broken = {
        1: (429, {"Retry-After": "0"}, {"error": {"message": "slow down"}}),
        2: (500, {}, b"oh"),
        3: b"<html>not JSON",
        4: {"choices": []},
        5: {"choices": [{"message": {"content": ["a", "list"]}}]},
        6: {"error": {"message": "inside a 200"}},
    }
    server, ask = fake(lambda body, number: broken.get(number) or right(body))
    counts = ask("--prompts", problems(2))
    assert (counts["kept"], counts["failed"], len(server.bodies)) == (2, 0, 8)
    # Without a count of tokens, the most that it can have been; of an error none.
    most = teacher_api.most_tokens([{"content": "What is 0 plus 0?"}])
    assert counts["spent"] == {
        "requests": 8, "prompt_tokens": 20 + 4 * most, "reply_tokens": 10 + 4 * 1024
    }  # fmt: skip


def test_how_long_it_waits(fake, monkeypatch):
    """Ever longer, but as long as the server says where that is no eternity."""
    waited = []
    event = SimpleNamespace(wait=waited.append, set=lambda: None)
    real = {"Condition": threading.Condition, "Thread": threading.Thread}
    names = SimpleNamespace(Event=lambda: event, **real)
    monkeypatch.setattr(teacher_api, "WAIT", 1.0)
    monkeypatch.setattr(teacher_api, "threading", names)
    after = {3: "7.5", 4: "1e9", 5: "nan", 6: "soon"}

    def script(body, number):
        headers = {"Retry-After": after[number]} if number in after else {}
        return right(body) if number == 7 else (503, headers, b"")

    fake(script)[1]("--prompts", problems(1))
    assert 0.75 <= waited[0] <= 1 < 1.5 <= waited[1] <= 2 and waited[2] == 7.5
    assert len(waited) == 6 <= waited[3] <= 8 and 12 <= waited[4] <= 16 and 24 <= waited[5] <= 32


def test_a_server_that_fails_for_ever_ends_it(fake, monkeypatch):
    monkeypatch.setattr(teacher_api, "RETRIES", 2)
    server, ask = fake(lambda body, n: right(body) if n == 1 else (500, {}, b'{"error": "x"}'))
    with pytest.raises(ValueError, match="m at http.*500.*: 5 requests in a row have failed"):
        ask("--prompts", problems(20))
    assert len(server.bodies) == 1 + 5 * 3
    assert len(lines_of("asked.jsonl.replies.jsonl")) == 1, "what came is kept"
    assert read_json("asked.jsonl.replies.jsonl.progress.json")["requests"] == len(server.bodies)


def test_one_request_that_fails_is_told_and_asked_again(fake):
    def script(body, number):
        return (400, {}, {"error": {"message": "too long"}}) if number == 2 else right(body)

    server, ask = fake(script)
    counts = ask("--prompts", problems(3))
    assert (counts["kept"], counts["failed"], len(server.bodies)) == (2, 1, 3)
    assert ask("--prompts", "p.jsonl")["kept"] == 3 and len(server.bodies) == 4


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_retry_mends_ends_it_at_once(status, fake, capsys):
    """And a server that repeats the key does not get it into a sentence."""
    body = {"error": {"message": f"no such\nkey: {KEY}"}}
    server, ask = fake(lambda *_: (status, {}, body))
    with pytest.raises(ValueError, match=rf"^m at http[^\n]*{status}[^\n]*\[key\][^\n]*$") as told:
        ask("--prompts", problems(9))
    assert KEY not in str(told.value) and len(server.bodies) == 1


def test_no_server_is_told_at_once(fake, monkeypatch):
    monkeypatch.setattr(teacher_api, "WAIT", 100.0)
    server, ask = fake(None)
    server.server_close()
    with pytest.raises(ValueError, match="gave no reply .*: start the server"):
        ask("--prompts", problems(1))


def test_a_server_that_stalls_is_asked_again(fake):
    """And what it may have cost is counted at the most."""

    asked_again = threading.Event()

    def script(body, number):
        if number == 1:
            asked_again.wait(20)
        asked_again.set()
        return right(body)

    server, ask = fake(script)
    counts = ask("--prompts", problems(2), "--timeout", "1", "--max_new_tokens", "50")
    assert counts["kept"] == 2 and len(server.bodies) == 3
    assert counts["spent"]["requests"] == 3 and counts["spent"]["reply_tokens"] == 50 + 10


@pytest.mark.parametrize(
    "flags, most",
    [
        (["--max_requests", 3], 3),
        # One takes at most 200 + 8 + 17 tokens of a prompt and 100 of a reply, and in truth 15.
        (["--max_tokens_total", 15 * 3 + 325], 4),
        (["--max_tokens_total", 15 * 3 + 324], 3),
    ],
)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_limit_is_not_passed(flags, most, threads, fake, capsys):
    server, ask = fake(lambda body, _: right(body))
    flags = ["--prompts", problems(9), *flags, "--max_new_tokens", 100, "--threads", threads]
    counts = ask(*flags)
    assert len(server.bodies) == most == counts["kept"] and counts["ended_by"] == flags[2][2:]
    assert f"it ended before {flags[2]} {flags[3]} was passed" in capsys.readouterr().out
    assert ask(*flags)["kept"] == most == len(server.bodies), "what was spent is forgotten"
    assert ask("--prompts", "p.jsonl", "--max_new_tokens", 100)["kept"] == 9
    assert len(server.bodies) == 9


def test_a_cost_is_shown_before_and_not_passed(fake, capsys):
    shown = []
    server, ask = fake(lambda body, _: shown.append(capsys.readouterr().out) or right(body))
    flags = ["--prompts", problems(9), "--price_in", 100, "--price_out", 200, "--max_cost", 0.05]
    counts = ask(*flags, "--max_new_tokens", 100)
    # 10 and 5 tokens cost 0.002, the most that a request can, 0.0425.
    assert counts["kept"] == 4 and counts["ended_by"] == "max_cost"
    assert shown[0].startswith("m at http://127.0.0.1") and "9 of 9 requests" in shown[0]
    assert (
        "at most 900 of replies: at most about 0.2306; it ends before --max_cost 0.05" in shown[0]
    )
    assert "spent in all 4 requests, 40 prompt tokens, 20 reply tokens at a cost of 0.0080;" in (
        capsys.readouterr().out
    )


def test_requests_wait_for_what_others_give_back():
    limits = {"max_requests": None, "max_tokens_total": 100, "max_cost": None}
    budget = Budget(SimpleNamespace(**limits, price_in=None, price_out=None))
    budget.take([1, 50, 30])
    other = threading.Thread(target=budget.take, args=([1, 40, 10],))
    other.start()
    other.join(0.05)
    assert other.is_alive()
    budget.settle([1, 50, 30], [1, 20, 5])
    other.join(5)
    assert not other.is_alive() and budget.under_way == [1, 40, 10]
    budget.settle([1, 40, 10], [1, 40, 10])
    with pytest.raises(Limit, match="max_tokens_total"):
        budget.take([1, 20, 6])
    budget.take([1, 20, 5])
    budget.close()
    with pytest.raises(Limit):
        budget.take([1, 0, 0])


def test_requests_are_made_at_once(fake):
    together = threading.Barrier(3)

    def script(body, _):
        together.wait(20)  # broken unless three are under way
        return right(body)

    assert fake(script)[1]("--prompts", problems(6), "--threads", 3)["kept"] == 6


def test_the_name_of_the_limit_of_newer_models(fake):
    """Which all requests that were under way learn."""
    together = threading.Barrier(2)

    def script(body, _):
        message = "Unsupported parameter: use 'max_completion_tokens' instead."
        if "max_completion_tokens" in body and "max_tokens" not in body:
            return right(body)
        together.wait(20)
        return 400, {}, {"error": {"message": message}}

    server, ask = fake(script)
    counts = ask("--prompts", problems(4), "--threads", 2)
    assert (counts["kept"], counts["failed"], len(server.bodies)) == (4, 0, 6)


THOUGHTS = [
    (said("<answer>4</answer>", message={"reasoning_content": "2+2"}), True),
    (said("<answer>4</answer>", message={"reasoning": "2+2"}), True),
    (said("2+2\n</think>\n<answer>4</answer>"), True),
    (said("<answer>4</answer>", message={"reasoning_content": None}), False),
]


@pytest.mark.parametrize("reply, thinks", THOUGHTS)
def test_a_thought_becomes_a_span(reply, thinks, fake):
    fake(lambda *_: reply)[1]("--prompts", problems(3))
    (line,) = lines_of()
    thought = "<think>\n2+2\n</think>\n" if thinks else ""
    assert line["conversations"][-1]["content"] == f"{thought}<answer>4</answer>"


def test_each_reply_that_is_left_out_has_its_reason(fake):
    loop = "so we add one and one and get two, "
    replies = [
        said("<answer>0</answer>", "length"),
        said("<answer>2</answer>", "content_filter"),
        said("<answer>4</answer>", message={"refusal": "I will not."}),
        said("I'm sorry, but I can't help with that. <answer>6</answer>"),
        said(None),
        said("one " + " ".join(map(str, range(60))) + "<answer>10</answer>"),
        said(loop * 6 + "<answer>12</answer>"),
        said("<answer>1</answer>"),
        said("no answer"),
        said("As is asked: how far is it from the old mill to the new bridge? <answer>18</answer>"),
        said("<answer>20</answer>"),
    ]
    ask = fake(lambda body, number: replies[number - 1])[1]
    test = {"conversations": [{"role": "user", "content": "How far is it from the old mill to the "
                               "new bridge over there?"}]}  # fmt: skip
    near = {"conversations": [{"role": "user", "content": "what is 11 PLUS 11"}]}
    Path("test.jsonl").write_text(json.dumps(test) + "\n" + json.dumps(near) + "\n")
    counts = ask("--prompts", problems(12), "--max_words", 60, "--test", "test.jsonl")
    assert counts["left_out"] == {
        "cut at --max_new_tokens": 1, "refusals": 3, "empty": 1, "longer than --max_words": 1,
        "loops": 1, "another answer": 2, "near the test": 1,
    }  # fmt: skip
    assert [counts[name] for name in ("asked", "replies", "near_the_test")] == [11, 11, 1]
    assert [line["answer"] for line in lines_of()] == [20]
    assert read_json("asked.jsonl.finished.json")["left_out"] == counts["left_out"]


def test_replies_on_which_samples_agree(fake):
    """Of questions without answers, which the majority then gives."""
    answers = {0: ["3", "3.0", "5"], 1: ["1", "2", "3"], 2: ["#", "7", "7"]}
    given = {n: iter(x) for n, x in answers.items()}

    def script(body, _):
        number = next(given[int(body["messages"][-1]["content"].split()[2])])
        return said(f"so #### {number}", "length" if number == "#" else "stop")

    problems(3)
    questions = [{"conversations": line["conversations"]} for line in lines_of("p.jsonl")]
    Path("p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    server, ask = fake(script)
    with pytest.raises(ValueError, match='p.jsonl line 1 needs a user turn and an "answer"'):
        ask("--prompts", "p.jsonl")
    assert not server.bodies and not list(Path().glob("asked*"))
    flags = ["--prompts", "p.jsonl", "--keep", "agreed", "--samples", "3", "--answer_form"]
    counts = ask(*flags, "gsm8k")
    assert counts["left_out"] == {"of no majority": 3, "another answer": 1, "said twice": 1,
                                  "cut at --max_new_tokens": 1}  # fmt: skip
    kept = [(line["answer"], line["conversations"][-1]["content"]) for line in lines_of()]
    assert kept == [(3, "so #### 3"), (3, "so #### 3.0"), (7, "so #### 7")]


def logprobs(*tokens) -> dict:
    tops = [[{"token": "x", "logprob": value} for value in token] for token in tokens]
    return {"content": [{"token": "x", "logprob": 0.0, "top_logprobs": top} for top in tops]}


def test_how_sure_a_teacher_is():
    """By hand: the mean over tokens of minus the mean over candidates."""
    assert confidence(logprobs([-1.0, -3.0], [-0.5, -3.5, -8.0])) == (2.0 + 4.0) / 2
    assert confidence(logprobs([0.0, -9999.0])) == 10.0
    assert confidence(None) is confidence({"content": None}) is confidence(logprobs([])) is None


def reply(number, sure=None, finish="stop"):
    return {"finish": finish, "confidence": sure}, f"<answer>{number}</answer>"


def test_votes_are_weighed():
    assert majority([reply(1), reply(1), reply(2)], "tags") == 1
    assert majority([reply(1), reply(2)], "tags") is majority([reply(1)], "tags") is None
    assert majority([reply(1, 2.0), reply(1, 2.0), reply(2, 5.0)], "tags") == 2
    assert majority([reply(1, 2.0), reply(2, 2.0), reply(3, 4.0)], "tags") is None
    assert majority([reply(1), reply(1), reply(1, finish="length"), reply("")], "tags") is None


def test_the_least_sure_are_left_out(fake):
    def script(body, number):
        return right(body, logprobs=None if number == 6 else logprobs([0.0, -float(number)]))

    server, ask = fake(script)
    flags = ["--prompts", problems(5), "--logprobs"]
    counts = ask(*flags, "--drop_unsure", "0.4")
    assert counts["left_out"] == {"among the least sure": 2}
    assert [line["answer"] for line in lines_of()] == [4, 6, 8]
    assert (server.bodies[0]["logprobs"], server.bodies[0]["top_logprobs"]) == (True, 20)
    assert lines_of("asked.jsonl.replies.jsonl")[1]["confidence"] == 1.0
    with pytest.raises(ValueError, match="gives no log-probabilities: leave --drop_unsure out"):
        ask("--prompts", problems(1), *flags[2:], "--drop_unsure", "0.4", out="other.jsonl")


def test_new_questions_like_a_few(fake):
    """Asked for by showing five at most; those that are not new are told from those that are."""
    first = "Here you are:\nQ: How many pens are in the first of the nine boxes?\n Q: Why?\nBye."
    second = first + "\nQ: How many pens are in the first of the nine boxes now?\nQ: Who?\nQ: What"
    replies = [said(first), said("None."), said(second, "length")]
    server, ask = fake(lambda body, number: replies[number - 1])
    counts = ask("--seeds", problems(8), "--expand", 21)
    found = [line["conversations"] for line in lines_of()]
    texts = ["How many pens are in the first of the nine boxes?", "Why?", "Who?"]
    assert found == [[{"role": "user", "content": text}] for text in texts]
    assert counts["left_out"] == {"like others": 3, "replies without a question": 1}
    words = server.questions()
    assert len(words) == len(set(words)) == 3
    assert all(word.count("\nQ: What is ") == 5 and "10 new questions" in word for word in words)
    replies.append(said("Q: What is 3 plus 3?\nQ: Whence?\nQ: Whither?"))
    test = {"conversations": [{"role": "user", "content": "Whence?"}]}
    Path("test.jsonl").write_text(json.dumps(test) + "\n")
    counts = ask("--seeds", "p.jsonl", "--expand", 31, "--test", "test.jsonl")
    assert len(server.bodies) == 4, "a raised --expand only adds"
    assert counts["kept"] == 4 and counts["left_out"]["near the test"] == 1
    # They can be asked next.
    server, ask = fake(lambda *_: said("Because."))
    assert ask("--prompts", "asked.jsonl", "--keep", "all", out="next.jsonl")["kept"] == 4


def test_questions_about_topics(fake):
    def script(body, number):
        topic = body["messages"][-1]["content"].split("hard: ")[1].split("\n")[0]
        return said("".join(f"Q: {topic} {number} {n}?\n" for n in range(10)))

    Path("t.txt").write_text("lists {}\n\nsets\nlists {}\n", "utf-8")
    server, ask = fake(script)
    counts = ask("--topics", "t.txt", "--expand", 12)
    assert len(server.bodies) == 4
    assert [line["topic"] for line in lines_of()].count("sets") == 12 == counts["kept"] / 2
    assert counts["left_out"] == {"more than --expand": 16}
    asked = ask("--topics", "t.txt", "--expand", 30)
    assert len(server.bodies) == 6 and asked["kept"] == 60


def test_the_key_is_in_no_file(fake, tmp_path, capsys):
    """Not even where the server repeats it."""
    fake(lambda body, _: said(f"{KEY} <answer>4</answer>", message={"reasoning_content": KEY}))[1](
        "--prompts", problems(3)
    )
    assert lines_of()[0]["conversations"][-1]["content"].count("[key]") == 2
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "flags, told",
    [
        ([], "nothing says what to ask: pass one of --prompts"),
        (["--prompts", "p.jsonl", "--topics", "t"], "--prompts and --topics says what to ask"),
        (["--prompts", "p.jsonl", "--model", " "], "x"),
        (["--prompts", "no.jsonl"], "no.jsonl does not exist"),
        (["--seeds", "p.jsonl"], "--seeds needs --expand"),
        (["--prompts", "p.jsonl", "--expand", 3], "--expand is of --seeds and --topics"),
        (["--seeds", "p.jsonl", "--expand", 3, "--samples", 2], "--samples is of --prompts"),
        (["--prompts", "p.jsonl", "--samples", 2, "--temperature", 0], "--temperature 0 are alike"),
        (["--prompts", "p.jsonl", "--keep", "agreed"], "agreed needs --samples, 2 or more"),
        (["--prompts", "p.jsonl", "--drop_unsure", 0.1], "--drop_unsure is of --logprobs"),
        (["--seeds", "p.jsonl", "--expand", 3, "--logprobs"], "--logprobs is of --prompts"),
        (["--prompts", "p.jsonl", "--max_cost", 1], "--max_cost needs --price_in and --price_out"),
        (["--prompts", "p.jsonl", "--price_in", -1], "--price_in -1.0 must be between"),
        (["--prompts", "p.jsonl", "--api", "localhost:80/v1"], "--api is no address of the form"),
        (["--prompts", "p.jsonl", "--api", f"http://a:{KEY}@b/v1"], "OPENAI_API_KEY holds the key"),
        (["--prompts", "p.jsonl", "--api", f"http://b/v1?key={KEY}"], "without a password or "),
        (["--prompts", "p.jsonl", "--out", "p.jsonl", "--overwrite"], "would write where --p"),
        (["--prompts", "p.jsonl", "--test", "p.jsonl", "--out", "theirs"], "theirs exists and was"),
        (["--prompts", "p.jsonl", "--answer_form", "last", "--test", "t"], "t does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(flags, told, fake, tmp_path):
    problems(2)
    Path("theirs").write_text("Dear")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    server, ask = fake(lambda body, _: right(body))
    if told == "x":
        with pytest.raises(ValueError, match="--model is missing"):
            run(ask_teacher, "--prompts", "p.jsonl")
    else:
        with pytest.raises(ValueError, match=told) as error:
            ask(*flags)
        assert KEY not in str(error.value)
    assert not server.bodies
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir() if ".lock" not in p.name}


@pytest.mark.parametrize("flag", ["prompts", "seeds", "topics", "test"])
@pytest.mark.parametrize("beside", ["", "link", ".replies.jsonl", ".finished.json"])
def test_what_it_reads_is_never_what_it_writes(flag, beside, fake):
    """Nor what it writes beside --out, even with --overwrite."""
    flags = ["--expand", 3] if flag in ("seeds", "topics") else []
    flags += ["--prompts", problems(2)] if flag == "test" else []
    read = problems(2, f"x{beside.removeprefix('link')}")
    Path("link").symlink_to("x")
    before = Path(read).read_bytes()
    server, ask = fake(lambda body, _: right(body))
    with pytest.raises(ValueError, match=f"would write where --{flag} {read} is read"):
        ask(f"--{flag}", read, *flags, "--overwrite", out="link" if beside == "link" else "x")
    assert Path(read).read_bytes() == before and not server.bodies


def test_replies_to_other_prompts_are_not_gone_on_with(fake):
    server, ask = fake(right)
    ask("--prompts", problems(2))
    before = Path("asked.jsonl").read_bytes()
    with pytest.raises(ValueError, match="p.jsonl"):
        ask("--prompts", problems(3))
    assert Path("asked.jsonl").read_bytes() == before and len(server.bodies) == 2
    assert ask("--prompts", "p.jsonl", "--overwrite")["kept"] == 3


def test_without_the_client_a_sentence_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="pip install -r requirements-real.txt"):
        run(ask_teacher, "--prompts", problems(1), "--model", "m")
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_key_that_is_none_is_not_quoted(fake, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ключ")
    with pytest.raises(ValueError, match="^OPENAI_API_KEY has characters that no key has") as told:
        fake(None)[1]("--prompts", problems(1))
    assert "ключ" not in str(told.value)


# The filters by themselves.


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but as an AI I have no pens.", True),
        ("As an AI language model, I have none.", True),
        ("I cannot provide that.", True),
        ("Unfortunately, I am unable to answer.", True),
        ("<think>\nHow to say it?\n</think>\nSorry, I won't do that.", True),
        ("很抱歉,我无法回答这个问题。", True),
        ("I can't take 7 from 5, so I borrow 10.", False),
        ("Sorry is what Ann says to Ben. She cannot answer.", False),
        ("<think>\nI can't help but add.\n</think>\n12", False),
        ("An AI can add.", False),
    ],
)
def test_refusals(text, is_one):
    assert is_refusal(text) == is_one


def test_loops():
    """Of 2 x 20 words that are said twice, 13 of 33 n-grams are."""
    once = [str(n) for n in range(20)]
    assert is_loop(once * 2) and is_loop(["so"] * 20)
    assert not is_loop(once) and not is_loop(once * 2 + [str(n) for n in range(20, 40)])
    assert not is_loop(["so"] * 8) and not is_loop([])
    assert is_loop(words_of("我们把五个苹果和三个苹果加起来" * 4))


def test_near():
    """13 words have 6 n-grams of 8: half of them are near, 2 are not. Short ones are the same."""
    words = "a b c d e f g h i j k l m".split()
    near = Near([" ".join(words), "Why not?"])
    assert near.has("x " + " ".join(words[:10])) and not near.has("x " + " ".join(words[:9]))
    assert near.has("?", "It asks: " + " ".join(words[3:])) and near.has("WHY, not")
    assert not near.has("why not now") and not near.has("why", "why not")
    assert Near(["从前有一座山山里有一座庙"]).has("说从前有一座山山里有一座庙吗")
    assert not Near().has("") and not Near(["a b"]).has("")


@pytest.mark.parametrize(
    "form, one, other",
    [("tags", "<answer>7</answer>", "<answer> 7.0 </answer>"), ("gsm8k", "#### $1,000", "####1000"),
     ("boxed", "\\boxed{5\\%}", "\\boxed{5.0}"), ("last", "it is 3.", "2 and 3.00"),
     ("tags", "<answer>Rome</answer>", "<answer>\nRome\n</answer>"),
     ("boxed", "\\boxed{1/2}", "so \\boxed{1/2}")],
)  # fmt: skip
def test_answers_that_are_the_same_are_alike(form, one, other):
    answer = answer_in(one, form)
    assert answer is not None and answer == answer_in(other, form)
    assert is_answer(one, answer, form) and is_answer(other, answer, form)
    assert answer_in("nothing", form) is answer_in("", form) is None
