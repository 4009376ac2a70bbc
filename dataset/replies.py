"""Asking a model to answer problems: read them, and write its replies, batched."""

from contextlib import nullcontext

from files.progress import progress_bar
from model import generate
from model.generate import check_room

from .chat import check_conversation, encode_prompt
from .problems import check_problem, check_response
from .sources import read_jsonl
from .tokenizer import special_id

MAX_NEW_TOKENS = 160
BATCH = 100  # more at once are not faster on a CPU, and take memory


def read_problems(path) -> list[dict]:
    """The jsonl's problems: their turns up to the last user turn, answer, and steps (0 for none).
    checkable: whether lines of a reply can be verified, as those of its gold reply can; without a
    gold reply, whether it has steps, as generated problems do."""

    def parse(value: dict, where: str) -> dict:
        turns = check_conversation(value, where, need_answer=False)
        asked = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
        gold, turns = turns[asked + 1 :], turns[: asked + 1]
        check_problem(value, turns, where)
        checkable, steps = "steps" in value, value.get("steps", 0)
        if gold:
            checkable = check_response(turns[-1]["content"], gold[0]["content"]).verified
        return {"turns": turns, "answer": value["answer"], "steps": steps, "checkable": checkable}

    return read_jsonl(path, parse)


def write_replies(
    model, tokenizer, problems: list[dict], max_new_tokens=MAX_NEW_TOKENS, bar=None, **sampling
) -> list[list[int]]:
    """The model's reply to every problem, as token ids; like lengths are batched together.
    bar: the progress of a caller who has more problems than these."""
    prompts = [encode_prompt(tokenizer, problem["turns"]) for problem in problems]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    check_room(model, max(map(len, prompts), default=0), max_new_tokens)  # now, not after hours
    replies: dict[int, list[int]] = {}
    sampling["stop_ids"] = [special_id(tokenizer, t) for t in ("<|im_end|>", "<|endoftext|>")]
    alone = bar is None
    with progress_bar(len(prompts), "replies", unit="reply") if alone else nullcontext(bar) as bar:
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            written = generate(model, [prompts[i] for i in rows], max_new_tokens, **sampling)
            replies.update(zip(rows, written, strict=True))
            bar.update(len(rows))
    return [replies[i] for i in range(len(prompts))]
