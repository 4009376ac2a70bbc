"""A teacher behind an address: one question, its reply, and what that has cost (ask_teacher.py).

A request that fails is tried again after 1, 2, 4, ... seconds, or when the server says; one that
cannot succeed (no such model, a wrong key) ends all, in a sentence. No try starts that could pass a
limit: its prompt has at most a token per byte, its reply at most --max_new_tokens. A try that ends
without a word of its cost (it stalls, the line breaks) is counted at the most it can have cost.
"""

import json
import os
import queue
import random
import threading
from contextlib import suppress

from files import printable
from files.atomic import parse_json
from files.progress import progress_bar

from .filters import confidence

NO_CLIENT = "the openai client is not installed: pip install -r requirements-real.txt"
RETRIES, WAIT, LONGEST = 6, 1.0, 120.0  # tries after the first; seconds, of the first wait and any
TEMPLATE, TURN = 200, 8  # tokens that a server's chat template may add, in all and per turn
FAILURES = 5  # requests in a row that fail for good: then it ends
COUNTS = ("requests", "prompt_tokens", "reply_tokens")  # what is spent
SECRET = 12  # characters; what is shorter ("ollama") is a word that may stand in a reply
LIMITS = {"max_requests": (1, 10**9), "max_tokens_total": (1, 10**15), "max_cost": (1e-6, 1e9)}


class Limit(Exception):
    """The next request could pass a limit, which it names; or nothing more is to start."""


class Failed(Exception):
    """A request that got no reply."""


class Budget:
    """What was spent, and what requests under way can cost at most: together within the limits.
    An amount is a list: requests, tokens of prompts, tokens of replies."""

    def __init__(self, args):
        self.prices = [0.0, (args.price_in or 0.0) / 1e6, (args.price_out or 0.0) / 1e6]
        kinds = zip(LIMITS, ([1, 0, 0], [0, 1, 1], self.prices), strict=True)
        self.limits = [(name, getattr(args, name), weights) for name, weights in kinds]
        self.limits = [limit for limit in self.limits if limit[1] is not None]
        self.spent, self.under_way = [0, 0, 0], [0, 0, 0]
        self.changed, self.is_open = threading.Condition(), True

    def take(self, most: list[int]) -> None:
        """Wait until `most` is free. Raises Limit where it never will be."""
        with self.changed:
            while self.is_open:
                whole = [sum(x) for x in zip(self.spent, self.under_way, most, strict=True)]
                passed = [name for name, limit, by in self.limits if weighed(whole, by) > limit]
                if not passed:
                    self.under_way = [a + b for a, b in zip(self.under_way, most, strict=True)]
                    return
                if not any(self.under_way):
                    raise Limit(passed[0])
                self.changed.wait()  # for those under way, that mostly cost less than they can
        raise Limit("")

    def settle(self, most: list[int], used: list[int]) -> None:
        """What took `most` has ended, and cost `used`."""
        with self.changed:
            self.under_way = [a - b for a, b in zip(self.under_way, most, strict=True)]
            self.spent = [a + b for a, b in zip(self.spent, used, strict=True)]
            self.changed.notify_all()

    def close(self) -> None:
        with self.changed:
            self.is_open = False
            self.changed.notify_all()


def weighed(amount: list[int], weights: list[float]) -> float:
    return sum(a * b for a, b in zip(amount, weights, strict=True))


class Teacher:
    """A model behind an address. `ask` may run in several threads."""

    def __init__(self, args, budget: Budget):
        try:
            import openai
        except ImportError:
            raise ValueError(NO_CLIENT) from None
        self.key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not self.key.isascii() or not self.key.isprintable():
            raise ValueError("OPENAI_API_KEY has characters that no key has: set it again")
        options = {"api_key": self.key or "none", "timeout": args.timeout, "max_retries": 0}
        try:
            self.client = openai.OpenAI(base_url=args.api, **options)
        except Exception as error:  # of several libraries
            raise ValueError(f"--api {args.api} cannot be used ({error})") from None
        self.args, self.budget, self.openai, self.in_a_row = args, budget, openai, 0
        self.most_name, self.has_answered, self.ended = "max_tokens", False, threading.Event()

    def close(self) -> None:
        """Start no more requests."""
        self.ended.set()
        self.budget.close()

    def ask(self, turns: list[dict], number: int) -> dict:
        """The reply. Raises Failed, Limit, or a ValueError for what no further request mends."""
        most, wait = [1, most_tokens(turns), self.args.max_new_tokens], 0.0
        for attempt in range(RETRIES + 1):
            if attempt:
                self.ended.wait(wait)
            self.budget.take(most)
            used, wait = most, WAIT * 2**attempt * random.uniform(0.75, 1.0)
            name = self.most_name
            try:
                body = self.post(turns, number, name)
                used, self.has_answered = usage_of(body, most), True
                reply, self.in_a_row = reply_of(body), 0
                return {"number": number, **reply}
            except self.openai.APIStatusError as error:
                status, used = error.status_code, [1, 0, 0]
                fault = self.told(f"{status}: {error.message}")
                if status in (401, 403, 404):
                    raise ValueError(fault) from None
                if "max_completion_tokens" in error.message and name == "max_tokens":
                    self.most_name, wait = "max_completion_tokens", 0.0  # as OpenAI now calls it
                elif status < 500 and status not in (408, 409, 429):
                    break
                with suppress(ValueError):
                    said = float(error.response.headers.get("retry-after", ""))
                    wait = said if 0 <= said <= LONGEST else wait
            except self.openai.APIConnectionError as error:
                fault = self.told(error.message)
                if not self.has_answered and not isinstance(error, self.openai.APITimeoutError):
                    start = "start the server, or pass its address with --api"
                    raise ValueError(f"{fault}: {start}") from None
            except ValueError as error:
                fault = self.told(str(error))
            finally:
                self.budget.settle(most, used)
        self.in_a_row += 1
        if self.in_a_row >= FAILURES:
            raise ValueError(f"{fault}: {self.in_a_row} requests in a row have failed")
        raise Failed(fault)

    def post(self, turns: list[dict], number: int, most_name: str) -> dict:
        """The body of the answer to one request."""
        args = self.args
        request = {"model": args.model, "messages": turns, most_name: args.max_new_tokens}
        if args.temperature is not None:
            request["temperature"] = args.temperature
        if args.seed is not None:
            request["seed"] = args.seed + number
        if args.logprobs:
            request |= {"logprobs": True, "top_logprobs": 20}
        create = self.client.chat.completions.with_raw_response.create
        return parse_json(create(**request).content, "what came")

    def told(self, fault: str) -> str:
        fault = printable(" ".join(self.hide(fault).split()))[:300]
        return f"{self.args.model} at {self.args.api} gave no reply ({fault})"

    def hide(self, text: str) -> str:
        """Without the key, should the server repeat it."""
        return text.replace(self.key, "[key]") if len(self.key) >= SECRET else text


def most_tokens(turns: list[dict]) -> int:
    return TEMPLATE + sum(TURN + len(turn["content"].encode()) for turn in turns)


def usage_of(body: dict, most: list[int]) -> list[int]:
    """What a request cost: by the server's count or, without one, the most that it can have."""
    usage = body.get("usage")
    names = ("prompt_tokens", "completion_tokens")
    found = [usage.get(name) for name in names] if isinstance(usage, dict) else [None]
    return [1, *found] if all(type(x) is int and x >= 0 for x in found) else most


def reply_of(body: dict) -> dict:
    """What is kept of a reply. Raises ValueError where it is none."""
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        words = {"content": message.get("content") or "", "thought": thought}
        if not all(isinstance(text, str) for text in words.values()):
            raise TypeError
        finish = "content_filter" if message.get("refusal") else finish
        sure = confidence(choice.get("logprobs"))
    except (LookupError, TypeError, AttributeError):
        raise ValueError(f"no reply is in {json.dumps(body)[:200]}") from None
    return {**words, "finish": str(finish), "confidence": sure, "model": str(body.get("model"))}


def ask_all(teacher: Teacher, asked: list[dict], todo: list[int], out) -> tuple[str, int]:
    """Ask for the replies of `todo`, numbers of requests in `asked`, in several threads; each one
    is committed to `out`, a GrowingFile, as it comes. Returns which limit was in the way, if one
    was, and how many requests failed. Raises ValueError where asking on is of no use; what was
    under way then is kept, too."""
    args, waiting, came = teacher.args, queue.SimpleQueue(), queue.SimpleQueue()
    for number in todo:
        waiting.put(number)

    def work() -> None:
        with suppress(queue.Empty):
            while True:
                number = waiting.get_nowait()
                try:
                    came.put(teacher.ask(asked[number]["turns"], number))
                except (Limit, Failed) as fault:
                    came.put(fault)
                except Exception as fault:
                    teacher.close()
                    came.put(fault)  # for the main thread to raise
        came.put(None)

    limit, failed, fatal = "", 0, None
    before = len(asked) - len(todo)
    with progress_bar(len(asked), args.out.name, before, unit="reply") as bar:
        for _ in range(args.threads):  # as daemons they keep nobody waiting who presses Ctrl-C
            threading.Thread(target=work, daemon=True).start()
        for reply in (x for _ in range(args.threads) for x in iter(came.get, None)):
            if isinstance(reply, Limit):
                limit = str(reply) or limit
                continue
            if isinstance(reply, dict):
                line = teacher.hide(json.dumps(reply, ensure_ascii=False))
                out.file.write(f"{line}\n".encode())
                bar.update()
            elif isinstance(reply, Failed):
                failed += 1
            else:
                fatal = fatal or reply
            out.commit(**dict(zip(COUNTS, teacher.budget.spent, strict=True)))
    out.commit(**dict(zip(COUNTS, teacher.budget.spent, strict=True)))  # of what failed last
    if fatal is not None:
        raise fatal
    return limit, failed
