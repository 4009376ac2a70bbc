"""Asking a model to answer problems: read them, and write its replies, batched."""

from contextlib import nullcontext

from files.progress import progress_bar
from model import generate
from model.generate import check_room

from .chat import check_conversation, encode_prompt, stop_ids
from .problems import check_problem, check_response
from .sources import read_jsonl

MAX_NEW_TOKENS = 160
BATCH = 100  # replies at once: more are not faster on a CPU, and take memory
CACHE_BYTES = 2**30  # of their keys and values, which for a real model and long replies decide


def read_problems(path, need_answer: bool = True) -> list[dict]:
    """The jsonl's problems: their turns up to the last user turn, steps (0 for none), and answer;
    without need_answer it may be None. checkable: whether lines of a reply can be verified, as
    those of its gold reply can; without a gold reply, whether it has steps, as generated ones."""

    def parse(value: dict, where: str) -> dict:
        turns = check_conversation(value, where, need_answer=False)
        asked = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
        gold, turns = turns[asked + 1 :], turns[: asked + 1]
        answer = value.get("answer")
        if need_answer or answer is not None:
            check_problem(value, turns, where)
        elif not turns:
            raise ValueError(f"{where} needs a user turn")
        checkable, steps = "steps" in value, value.get("steps", 0)
        if gold:
            checkable = check_response(turns[-1]["content"], gold[0]["content"]).verified
        return {"turns": turns, "answer": answer, "steps": steps, "checkable": checkable}

    return read_jsonl(path, parse)


def batch_rows(model, positions: int) -> int:
    """How many replies are written at once where prompt and reply fill `positions`: 1 to BATCH. It
    follows from the model's shape alone, so that a call that resumes has the same batches."""
    shape, size = model.config, model.lm_head.weight.element_size()
    row = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * size  # bytes
    return max(1, min(BATCH, CACHE_BYTES // (row * positions)))


def write_replies(
    model, tokenizer, problems: list[dict], max_new_tokens=MAX_NEW_TOKENS, bar=None, **sampling
) -> list[list[int]]:
    """The model's reply to every problem, as token ids without the one that ends it; like lengths
    are batched together. One that has max_new_tokens was cut: its end did not come. bar: the
    progress of a caller who has more problems than these."""
    prompts = [encode_prompt(tokenizer, problem["turns"]) for problem in problems]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    longest = max(map(len, prompts), default=0)
    check_room(model, longest, max_new_tokens)  # now, not after hours
    rows_at_once = batch_rows(model, longest + max_new_tokens)
    replies: dict[int, list[int]] = {}
    sampling["stop_ids"] = stop_ids(tokenizer)
    alone = bar is None
    with progress_bar(len(prompts), "replies", unit="reply") if alone else nullcontext(bar) as bar:
        for start in range(0, len(order), rows_at_once):
            rows = order[start : start + rows_at_once]
            written = generate(model, [prompts[i] for i in rows], max_new_tokens, **sampling)
            replies.update(zip(rows, written, strict=True))
            bar.update(len(rows))
    return [replies[i] for i in range(len(prompts))]
