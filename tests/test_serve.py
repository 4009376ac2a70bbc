"""Promise: a chat client gets what the model says, and whoever asks badly is told so, at no cost to
the others."""

import http.client
import json
import re
import socket
import threading
from dataclasses import replace

import pytest
import torch

from dataset.chat import encode_prompt, stop_ids
from dataset.tokenizer import decode, load_tokenizer
from eval import serve
from model import ModelConfig, Transformer, generate, load_model, save_model

HELLO = [{"role": "user", "content": "How many apples?"}]
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def folder(prepared_folder, tmp_path_factory):
    """A model that says many things, for no reason."""
    torch.manual_seed(0)
    model = Transformer(replace(ModelConfig.preset("nano", 400), tie_word_embeddings=False))
    for weight in model.parameters():
        weight.data.mul_(5 if weight.ndim > 1 else 1)
    save_model(model, path := tmp_path_factory.mktemp("serve") / "model", prepared_folder)
    return path


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(serve.Handler, "timeout", 0.5)
    args = serve.parse_args(["--model", str(folder), "--port", "0", "--max_new_tokens", "15"])
    with serve.Server(args) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method: str, path: str, body=None, **headers):
    """The status and the text of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    content = json.dumps(body) if isinstance(body, dict) else body
    connection.request(method, path, content, headers)
    answer = connection.getresponse()
    text = answer.read().decode("utf-8")
    connection.close()
    return answer.status, text


def post(server, **body):
    status, text = ask(server, "POST", PATH, {"messages": HELLO, **body})
    return status, json.loads(text)


def expected(folder, most: int, **options) -> tuple[str, int]:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prompt = encode_prompt(tokenizer, HELLO)
    [ids] = generate(model, [prompt], most, stop_ids=stop_ids(tokenizer), **options)
    return decode(tokenizer, ids).rstrip("\ufffd"), len(prompt)


def test_a_reply_is_what_the_model_says(server, folder):
    text, length = expected(folder, 7)
    status, found = post(server, max_tokens=7)
    assert status == 200 and found["object"] == "chat.completion"
    assert found["choices"][0]["message"] == {"role": "assistant", "content": text}
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["prompt_tokens"] == length
    assert found["usage"]["completion_tokens"] == 7
    assert found["usage"]["total_tokens"] == length + 7
    # --max_new_tokens is the most, whatever is asked for.
    assert post(server, max_completion_tokens=500)[1]["usage"]["completion_tokens"] == 15


def test_a_reply_that_ends_says_so(server, folder, monkeypatch):
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    [ids] = generate(model, [encode_prompt(tokenizer, HELLO)], 20)
    last = next(i for i, token in enumerate(ids) if token not in ids[:i] and i > 2)
    monkeypatch.setattr(serve, "stop_ids", lambda _: [ids[last]])
    choice = post(server)[1]["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == decode(tokenizer, ids[:last]).rstrip("\ufffd")


def test_pieces_of_a_stream_are_the_whole(server, folder):
    body = {"messages": HELLO, "stream": True, "max_tokens": 15}
    status, text = ask(server, "POST", PATH, body)
    *events, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert status == 200 and last == "[DONE]"
    choices = [json.loads(event)["choices"][0] for event in events]
    assert "".join(choice["delta"]["content"] for choice in choices) == expected(folder, 15)[0]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [
        "length"
    ]
    assert len(choices) > 3, "all came at once"


def test_sampling_is_repeatable(server, folder):
    options = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    texts = [post(server, **options)[1]["choices"][0]["message"]["content"] for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    whole, _ = expected(folder, 15, temperature=1.5, top_p=0.9, generator=generator)
    assert texts == [whole, whole]
    other = post(server, **{**options, "seed": 4})[1]["choices"][0]["message"]["content"]
    assert other != whole


def test_health_and_models(server, folder):
    assert ask(server, "GET", "/health") == (200, '{"status": "ok"}')
    status, text = ask(server, "GET", "/v1/models")
    assert status == 200 and json.loads(text)["data"][0]["id"] == str(folder)


@pytest.mark.parametrize(
    "body, said",
    [
        ({"messages": []}, 'messages needs "conversations"'),
        ({"messages": "Hello"}, 'messages needs "conversations"'),
        ({"messages": [{"role": "pope", "content": "x"}]}, "role 'pope' must be one of"),
        ({"messages": [{"role": "user", "content": 3}]}, '"content" that is text'),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "leave no room for a reply"),
        ({"messages": [*HELLO, {"role": "tool", "content": "7"}]}, "have turns of tools, which"),
        ({"messages": [{**HELLO[0], "name": "Eve"}]}, "messages have name, which are not read"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools = .* only 0 to 0 works"),
        ({"messages": HELLO, "n": 2}, "n = 2: only 1 to 1 works"),
        ({"messages": HELLO, "stop": ["x"]}, "stop = "),
        ({"messages": HELLO, "logprobs": True}, "logprobs = True"),
        ({"messages": HELLO, "temperature": "warm"}, "temperature = 'warm': only 0 to 10 works"),
        ({"messages": HELLO, "temperature": -1}, "temperature = -1"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens = 0"),
        ('{"messages": ', "the request is not valid JSON"),
        ("[" * 50_000, "the request is not valid JSON"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(body, said, server):
    status, text = ask(server, "POST", PATH, body)
    message = json.loads(text)["error"]["message"]
    assert status == 400 and "\n" not in message
    assert re.search(said, message), message
    assert post(server, max_tokens=1)[0] == 200, "the next one is not answered"


def test_fields_that_change_nothing_are_taken(server):
    status, _ = post(
        server, n=1, tools=[], logprobs=False, presence_penalty=0, stop=None, model="x"
    )
    assert status == 200


def test_places_and_sizes(server):
    assert ask(server, "GET", "/v1")[0] == ask(server, "POST", "/v1/completions", {})[0] == 404
    long = "x" * (serve.LARGEST + 1)
    for size in ("-5", "9" * 5000):
        assert ask(server, "POST", PATH, None, **{"Content-Length": size})[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest("POST", PATH)
    connection.putheader("Content-Length", str(len(long)))
    connection.endheaders()  # and none of the bytes: it is refused by its length
    assert connection.getresponse().status == 413


def test_one_at_a_time(server):
    """Who waits too long is told so."""
    server.args.wait = 0
    with server.turn:
        status, found = post(server)
    assert status == 503 and "try again later" in found["error"]["message"]
    assert post(server, max_tokens=1)[0] == 200


def test_clients_that_stall_or_go_harm_nobody(server):
    stalled = socket.create_connection(("127.0.0.1", server.server_port))
    stalled.sendall(f"POST {PATH} HTTP/1.1\r\nContent-Length: 100\r\n\r\n".encode())
    body = json.dumps({"messages": HELLO, "stream": True})
    gone = socket.create_connection(("127.0.0.1", server.server_port))
    head = f"POST {PATH} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    gone.sendall(head.encode())
    gone.close()
    assert post(server, max_tokens=2)[0] == 200
    stalled.settimeout(10)
    assert stalled.recv(100) == b"", "a client that sends nothing keeps its connection"
    assert not server.turn.locked()


def test_openais_client(server, folder):
    openai = pytest.importorskip("openai")
    base = f"http://127.0.0.1:{server.server_port}/v1"
    client = openai.OpenAI(base_url=base, api_key="none", max_retries=0)
    whole = client.chat.completions.create(model="x", messages=HELLO, max_tokens=9)
    assert whole.choices[0].message.content == expected(folder, 9)[0]
    assert whole.usage.completion_tokens == 9
    chunks = client.chat.completions.create(model="x", messages=HELLO, max_tokens=9, stream=True)
    assert "".join(c.choices[0].delta.content for c in chunks) == expected(folder, 9)[0]
    asked = {"include_usage": True, "include_obfuscation": False}
    asked = {"stream": True, "stream_options": asked}
    *pieces, last = client.chat.completions.create(model="x", messages=HELLO, max_tokens=9, **asked)
    assert (last.choices, last.usage) == ([], whole.usage) and not any(p.usage for p in pieces)
    assert [model.id for model in client.models.list()] == [str(folder)]
    with pytest.raises(openai.BadRequestError, match="n = 3"):
        client.chat.completions.create(model="x", messages=HELLO, n=3)
