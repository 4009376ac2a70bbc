"""Serve a model to chat clients: the part of OpenAI's protocol that they need.

    python -m eval.serve --model out/reasoner         # a client's base URL: http://127.0.0.1:8000/v1

It knows GET /health, /v1/models, and POST /v1/chat/completions: messages, max_tokens, temperature,
top_p, seed, stream, stream_options. Others that would change a reply (tools, stop) are refused.
Greedy unless a temperature is asked for; one reply at a time. No key: --host decides who gets in.
"""

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

import torch

from dataset.chat import check_conversation, encode_prompt, stop_ids
from dataset.tokenizer import decode, load_tokenizer
from files import check_ranges, command_line, new_parser, parse_json
from model import load_model, stream
from model.device import choose_device

RANGES = {"port": (0, 65535), "wait": (0, 10**6), "max_new_tokens": (1, 10**6)}
LARGEST, IDLE = 2**20, 30  # bytes of a request; seconds that a client may keep the server waiting
LIMITS = {"temperature": (0.0, 10.0), "top_p": (1e-6, 1.0), "seed": (0, 2**31), "n": (1, 1)}
LIMITS |= dict.fromkeys(("max_tokens", "max_completion_tokens"), (1, 10**9))
OTHERS = ("messages", "stream", "model", "user", "stream_options")


class Server(ThreadingHTTPServer):  # the model, and whose turn it is
    def __init__(self, args):
        self.args, self.turn = args, Lock()
        self.model = load_model(args.model, choose_device(args.device))
        self.tokenizer = load_tokenizer(args.model)
        super().__init__((args.host, args.port), Handler)

    def read(self, body: dict) -> tuple[list[int], int, dict]:
        """Ids of the prompt, the most tokens of the reply, and options of `stream`. Raises
        ValueError for a request that cannot be answered as it is meant."""
        for name, value in body.items():
            low, high = LIMITS.get(name, (0, 0))  # of others, only what changes nothing
            if name not in OTHERS and value not in (None, "", [], {}):
                if not isinstance(value, (int, float)) or not low <= value <= high:
                    raise ValueError(f"{name} = {value!r:.60}: only {low:g} to {high:g} works")
        lost, turns = {}, {"conversations": body.get("messages")}
        turns = check_conversation(turns, "messages", need_answer=False, tags=False, left_out=lost)
        if more := lost.keys() - {"empty replies"}:
            raise ValueError(f"messages have {min(more)}, which are not read: leave them out")
        ids = encode_prompt(self.tokenizer, turns)
        if (room := self.model.config.max_position_embeddings - len(ids)) < 1:
            raise ValueError(f"messages of {len(ids)} tokens leave no room for a reply: send fewer")
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or room
        generator = torch.Generator(self.model.lm_head.weight.device)
        options = {name: body[name] for name in ("temperature", "top_p") if body.get(name)}
        options["generator"] = generator.manual_seed(int(body.get("seed") or 0))
        return ids, min(int(asked), self.args.max_new_tokens, room), options

    def reply(self, prompt: list[int], most: int, options: dict, streams: bool):
        """Yield pieces of text, or all at once, the tokens so far and, at last, why it ended."""
        ids, shown = [], ""
        for token in stream(self.model, prompt, most, stop_ids=stop_ids(self.tokenizer), **options):
            ids.append(token)
            text = decode(self.tokenizer, ids) if streams else "\ufffd"
            if not text.endswith("\ufffd"):  # a character of several bytes may not be whole yet
                yield text[len(shown) :], len(ids), None
                shown = text
        text = decode(self.tokenizer, ids).rstrip("\ufffd")
        yield text[len(shown) :], len(ids), "length" if len(ids) == most else "stop"


class Handler(BaseHTTPRequestHandler):
    timeout = IDLE

    def log_message(self, *_) -> None: ...  # not a line for each request

    def send(self, status: int, value: dict, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode() if value else b"")

    def refuse(self, status: int, message: str) -> None:
        self.send(status, {"error": {"message": message, "type": "error", "code": str(status)}})

    def do_GET(self) -> None:
        model = {"id": self.server.args.model, "object": "model", "created": 0, "owned_by": "local"}
        pages = {"/health": {"status": "ok"}, "/v1/models": {"object": "list", "data": [model]}}
        if self.path in pages:
            return self.send(200, pages[self.path])
        self.refuse(404, f"nothing to get at {self.path[:80]}: try {' or '.join(pages)}")

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if self.path != "/v1/chat/completions":
            return self.refuse(404, f"nothing at {self.path[:80]}: post to /v1/chat/completions")
        if not size.isdecimal() or len(size) > 9 or int(size) > LARGEST:
            return self.refuse(413, f"a request has a Content-Length of at most {LARGEST:,} bytes")
        try:
            body = parse_json(self.rfile.read(int(size)), "the request")
            if not self.server.turn.acquire(timeout=self.server.args.wait):
                return self.refuse(503, "others are being answered: try again later")
            try:
                self.complete(self.server.read(body), body)
            finally:
                self.server.turn.release()
        except ValueError as error:
            self.refuse(400, str(error))
        except OSError:
            pass  # the client has gone, or sent nothing for too long

    def complete(self, asked: tuple[list[int], int, dict], body: dict) -> None:
        streams, more = body.get("stream") is True, body.get("stream_options")
        counts, size = isinstance(more, dict) and more.get("include_usage") is True, len(asked[0])
        about = {"id": f"chatcmpl-{time.time_ns()}", "created": int(time.time())}
        about |= {"model": self.server.args.model, "object": "chat.completion" + ".chunk" * streams}
        if streams:
            self.send(200, {}, "text/event-stream")
        for text, count, reason in self.server.reply(*asked, streams):  # noqa: B007, count is told
            said = {"delta" if streams else "message": {"role": "assistant", "content": text}}
            about["choices"] = [{"index": 0, "finish_reason": reason, **said}]
            if streams:
                self.wfile.write(f"data: {json.dumps(about)}\n\n".encode())
        usage = {"prompt_tokens": size, "completion_tokens": count, "total_tokens": size + count}
        if not streams:
            return self.send(200, {**about, "usage": usage})
        for last in [json.dumps({**about, "choices": [], "usage": usage})] * counts + ["[DONE]"]:
            self.wfile.write(f"data: {last}\n\n".encode())


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--model", default="out/reasoner", help="checkpoint folder")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: for all who reach it")
    add("--port", type=int, default=8000, help="0: one that is free")
    add("--wait", type=int, default=60, help="seconds that a request waits for its turn")
    add("--max_new_tokens", type=int, default=512, help="of one reply, at most")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args) -> None:
    check_ranges(args, **RANGES)
    with Server(args) as server:
        print(f"{args.model}: http://{args.host}:{server.server_port}/v1", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    command_line(main, parse_args())
