"""What is kept of what a teacher that is asked wrote (ask_teacher.py), and why the rest is not.

A reply must be whole and say something; it is no refusal, not too long, no loop, and far from the
test questions. Then its answer decides (--keep): verified, it is the problem's; agreed, more than
half of the replies to one question give it (self-consistency: Wang et al. 2022, 2203.11171). Each
reply that is left out is counted under the first reason that applies.

With --logprobs a reply has a confidence, that of DeepConf (Fu et al. 2025, 2508.15260): of a token,
minus the mean log-probability of its 20 likeliest candidates (large where one has nearly all); of a
reply, the mean over its tokens. It weighs the votes, and --drop_unsure leaves out the least sure.
No more of the log-probabilities is kept: as targets they need a student of the same tokenizer.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from .answers import is_answer, number_in, read_answer
from .chat import THINK_SPAN, check_conversation

GRAM = 8  # words in a row: in an arithmetic problem shorter ones recur by chance
NEAR = 0.5  # a text with this share of a question's n-grams is near it
LOOP = 0.3  # a reply with this share of n-grams that stood in it before goes round in circles
FLOOR = -20.0  # servers write -9999, or worse, where a log-probability is too small
CHINESE = "\u3040-\u30ff\u3400-\u9fff"  # and Japanese: each character counts as a word
WORD = re.compile(rf"[{CHINESE}]|[^\W_{CHINESE}]+")
CANNOT = (
    r"i(?:(?: am|'m) (?:not able|unable) to| can't| cannot| can not| won't| will not) (?:help|"
    r"assist|answer|provide|comply|fulfil|share|discuss|support|engage|create|generate|write|do)"
)
REFUSAL = re.compile(  # at the start of what follows the thought
    rf"\W*(?:as an ai\b|(?:i'm |i am )?(?:very |so )?sorry,? but\b|(?:sorry\W+|unfortunately\W+)?"
    rf"{CANNOT}|(?:很?抱歉|对不起).{{0,9}}(?:无法|不能))",
    re.IGNORECASE,
)
QUESTION = re.compile(r"^\s*Q:[ \t]*(\S.*?)\s*$", re.MULTILINE)


def grams_of(words: list[str]) -> list[tuple[str, ...]]:
    """The runs of GRAM words, in order; none where there are fewer words."""
    return [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


class Near:
    """Questions, and whether a text is near one of them: it has a share of NEAR of its n-grams or,
    where the question is too short to have any, the same words."""

    def __init__(self, questions: Iterable[str] = ()):
        self.sizes, self.holders, self.short = [], defaultdict(list), set()
        for question in questions:
            self.add(question)

    def add(self, question: str) -> None:
        words = words_of(question)
        if not (grams := set(grams_of(words))):
            return self.short.add(tuple(words))
        for gram in grams:
            self.holders[gram].append(len(self.sizes))
        self.sizes.append(len(grams))

    def has(self, question: str, reply: str = "") -> bool:
        grams = {*grams_of(words_of(question)), *grams_of(words_of(reply))}
        found = Counter(number for gram in grams for number in self.holders.get(gram, ()))
        is_near = any(count >= NEAR * self.sizes[number] for number, count in found.items())
        return is_near or tuple(words_of(question)) in self.short


def is_refusal(content: str) -> bool:
    return REFUSAL.match(THINK_SPAN.sub("", content).replace("\u2019", "'").lstrip()) is not None


def is_loop(words: list[str]) -> bool:
    grams = grams_of(words)
    return len(grams) - len(set(grams)) > LOOP * len(grams)


def confidence(logprobs) -> float | None:
    """Of a reply, by what stands as "logprobs" of its choice; None where the server gave none.
    Raises LookupError, TypeError or AttributeError where that has another form."""
    tops = [token["top_logprobs"] for token in (logprobs or {}).get("content") or []]
    means = [-sum(max(t["logprob"], FLOOR) for t in top) / len(top) for top in tops if top]
    return sum(means) / len(means) if means else None


def said_by(reply: dict) -> str:
    """The teacher's words, its thought as a <think> span."""
    content = reply["content"]
    if "</think>" in content and "<think>" not in content:  # the prompt had opened the span
        content = f"<think>\n{content}"
    turn = {"role": "assistant", "content": content, "reasoning_content": reply["thought"]}
    kept = check_conversation({"conversations": [turn]}, "the reply", need_answer=False)
    return kept[0]["content"] if kept else ""


def fault_of(reply: dict, content: str, question: str, max_words: int, test: Near) -> str:
    """Why a reply is left out whatever its answer is; "" where it is not."""
    words = words_of(content)
    reasons = {
        "cut at --max_new_tokens": reply["finish"] == "length",
        "refusals": reply["finish"] == "content_filter" or is_refusal(content),
        "empty": not words,
        "longer than --max_words": len(words) > max_words,
        "loops": is_loop(words),
        "near the test": test.has(question, content),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def answer_in(content: str, form: str) -> int | str | None:
    """A reply's answer, the same for all ways to write one number; None where it has none."""
    if not (words := read_answer(content, form)):
        return None
    number = number_in(words, form)
    return int(number) if number is not None and number.denominator == 1 else words


def majority(replies: list[tuple[dict, str]], form: str) -> int | str | None:
    """The answer of more than half of the replies, given with their words; each weighs as much as
    its confidence, if it has one. One that was cut, or has no answer, votes for none."""
    votes, total = Counter(), 0.0
    for reply, content in replies:
        total += (weight := 1.0 if reply["confidence"] is None else reply["confidence"])
        if reply["finish"] != "length" and (answer := answer_in(content, form)) is not None:
            votes[answer] += weight
    best = max(votes, key=votes.get, default=None)
    return best if len(replies) > 1 and votes[best] > total / 2 else None


def keep_replies(problems: list[dict], replies: dict[int, dict], args, test: Near):
    """The jsonl lines of the replies that are kept, and how many are left out for which reason.
    replies: those of problem n have the numbers n, n + len(problems), ..."""
    lines, left_out, sure = {}, Counter(), [r["confidence"] for r in replies.values()]
    if args.drop_unsure and None in sure:
        none = "the server gives no log-probabilities"
        raise ValueError(f"{none}: leave --drop_unsure out")
    least = sorted(sure)[int(args.drop_unsure * len(sure))] if args.drop_unsure and sure else None
    form = {} if args.answer_form == "tags" else {"answer_form": args.answer_form}
    for number, problem in enumerate(problems):
        places = range(number, args.samples * len(problems), len(problems))
        own = [(replies[n], said_by(replies[n])) for n in places if n in replies]
        answer, question = problem["answer"], problem["turns"][-1]["content"]
        if args.keep == "agreed":
            answer = majority(own, args.answer_form)
        for reply, content in own:
            reason = fault_of(reply, content, question, args.max_words, test)
            if not reason and least is not None and reply["confidence"] < least:
                reason = "among the least sure"
            if not reason and args.keep == "agreed" and answer is None:
                reason = "of no majority"
            if not reason and args.keep != "all":
                reason = "" if is_answer(content, answer, args.answer_form) else "another answer"
            if not reason and (number, content) in lines:
                reason = "said twice"
            if reason:
                left_out[reason] += 1
                continue
            turns = [*problem["turns"], {"role": "assistant", "content": content}]
            about = {} if answer is None else {"answer": answer, "steps": problem["steps"], **form}
            lines[number, content] = {"conversations": turns, **about}
    return list(lines.values()), left_out


def keep_questions(asked: list[dict], examples, replies: dict[int, dict], args, test: Near):
    """The jsonl lines of new questions, --expand of them or so many per topic, and how many are
    left out for which reason. The problems of `examples` are not new."""
    seen = Near(problem["turns"][-1]["content"] for problem in examples)
    lines, left_out, counts = [], Counter(), Counter()
    for number, reply in sorted(replies.items()):
        topic = {k: v for k, v in asked[number].items() if k == "topic"}
        found = QUESTION.findall(THINK_SPAN.sub("", said_by(reply)))
        if reply["finish"] == "length":
            found = found[:-1]  # the last may lack its end
        left_out["replies without a question"] += not found
        for question in found:
            reasons = {
                "longer than --max_words": len(words_of(question)) > args.max_words,
                "near the test": test.has(question),
                "like others": seen.has(question),
                "more than --expand": counts[topic.get("topic")] == args.expand,
            }
            if reason := next((name for name, applies in reasons.items() if applies), ""):
                left_out[reason] += 1
                continue
            seen.add(question)
            counts[topic.get("topic")] += 1
            lines.append({"conversations": [{"role": "user", "content": question}], **topic})
    return lines, +left_out
