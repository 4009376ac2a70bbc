"""Conversations as token ids in ChatML, with labels on the assistant's words only.

    <|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\nANSWER<|im_end|>\\n
    |------------- label -100 -------------------------------||- labels ------|

The labels cover the assistant's content and the <|im_end|> that ends it, so a model learns to
stop. Labels are shifted here, once: labels[s] is the token after input_ids[s].

A batch is a random draw, sorted by length, longest first. The scripts cut it into micro-batches
(`parts_of`) and each of these at its own longest row, so little of what is computed is padding, yet
short and long conversations are learned from in every step. (Batches of one length each, the usual
bucketing, made the loss jump from 0.1 to 0.9 from step to step: a batch was then all one-step
problems or all four-step ones.)
"""

import hashlib
import json
import re

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .packing import epoch_order
from .sources import read_jsonl, tell_bad_lines, tolerate
from .tokenizer import encode, encode_tagged, special_id

IGNORE = -100
PARTS, ROWS = 4, 8  # micro-batches of a batch: at most so many, of at least so many rows
PAD_ID = 0
ROLES = ("system", "user", "assistant")
THINK_SPAN = re.compile(r"<think>.*?(?:</think>\s*|\Z)", re.DOTALL)


def check_conversation(value: dict, where: str, need_answer: bool = True) -> list[dict]:
    """The "conversations" list of a jsonl line. Raises ValueError naming what is wrong in it."""
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(
            f'{where} needs "conversations": [{{"role": "user", "content": "..."}}, '
            '{"role": "assistant", "content": "..."}]'
        )
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            role = turn.get("role") if isinstance(turn, dict) else turn
            raise ValueError(f"{where}: role {role!r} must be one of {', '.join(ROLES)}")
        if not isinstance(turn.get("content"), str):
            raise ValueError(f'{where}: the {turn["role"]} turn needs a "content" that is text')
    if need_answer and not any(t["role"] == "assistant" and t["content"] for t in turns):
        raise ValueError(f"{where} has no assistant turn with words in it: nothing to learn from")
    return turns


def encode_conversation(tokenizer: Tokenizer, turns: list[dict]) -> tuple[list[int], list[int]]:
    """input_ids and labels of one conversation, both of one length, labels shifted already."""
    start, end = special_id(tokenizer, "<|im_start|>"), special_id(tokenizer, "<|im_end|>")
    newline = encode(tokenizer, "\n")
    ids, learned = [], []  # learned[i]: token i is the assistant's own
    for turn in turns:
        by_assistant = turn["role"] == "assistant"
        # A user's words are encoded together with what stands before them, as the chat template
        # has it; the assistant's apart, so that a prompt is a prefix of the whole.
        opening = turn["role"] + "\n" + ("" if by_assistant else turn["content"])
        head = [start, *encode(tokenizer, opening)]
        content = [*encode_tagged(tokenizer, turn["content"])] if by_assistant else []
        content.append(end)
        ids += head + content + newline
        learned += [False] * len(head) + [by_assistant] * len(content) + [False] * len(newline)
    labels = [token if own else IGNORE for token, own in zip(ids, learned, strict=True)]
    return ids[:-1], labels[1:]


def encode_prompt(tokenizer: Tokenizer, turns: list[dict]) -> list[int]:
    """Ids of `turns` and the opening of the assistant's next turn, ready for generation."""
    opening, _ = encode_conversation(tokenizer, [*turns, {"role": "assistant", "content": ""}])
    return opening[: len(opening) - 1]  # without the <|im_end|> of the empty turn


def only_answer(turns: list[dict]) -> list[dict]:
    """The same conversation with every <think> span removed from the assistant's turns."""
    return [
        {**turn, "content": THINK_SPAN.sub("", turn["content"])}
        if turn["role"] == "assistant"
        else turn
        for turn in turns
    ]


def gsm8k_conversation(value: dict, where: str) -> dict:
    """A GSM8K line, {"question", "answer": "reasoning #### 42"}, in the form of this project."""
    question, answer = value.get("question"), value.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise ValueError(f'{where} needs "question" and "answer": "... #### 42" (GSM8K)')
    reasoning, final = answer.rsplit("####", 1)
    reasoning = re.sub(r"<<.*?>>", "", reasoning).strip()  # calculator notes
    final = final.strip().replace(",", "")
    if not re.fullmatch(r"-?[0-9]{1,40}", final):
        raise ValueError(f"{where}: the answer after #### is {final[:40]!r}, not a whole number")
    content = f"<think>\n{reasoning}\n</think>\n<answer>\n{final}\n</answer>"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
    return {"conversations": turns, "answer": int(final)}


class ChatData:
    """Conversations of a jsonl as padded batches.

    split: "train" or "val"; a conversation's split follows from the hash of its user turns,
    so the held-out part is the same for every seed. max_len cuts a longer conversation, and
    `cut` counts them. answers_only drops the reasoning. skip_bad leaves out lines that are not
    conversations, and says how many, instead of refusing the file.
    """

    def __init__(
        self,
        path,
        tokenizer: Tokenizer,
        split: str,
        max_len: int,
        val_share: float = 0.05,
        answers_only: bool = False,
        skip_bad: bool = False,
    ):
        self.path = path
        self.cut = 0
        self.examples: list[tuple[np.ndarray, np.ndarray]] = []
        total, bad = 0, [] if skip_bad else None
        for number, value in read_jsonl(path, bad):
            with tolerate(bad):
                where = f"{path} line {number}"
                turns = check_conversation(value, where)
                total += 1
                if held_out(turns, val_share) != (split == "val"):
                    continue
                if answers_only:
                    turns = only_answer(turns)
                    check_conversation({"conversations": turns}, f"{where}, answers only")
                self.add(*encode_conversation(tokenizer, turns), max_len, where)
        if split == "train":
            tell_bad_lines(path, bad)
        if not self.examples:
            raise ValueError(
                f"{path}: none of its {total} conversations falls into the {split} split "
                f"({val_share:.0%} are held out): add more"
            )
        self.size = len(self.examples)
        self.lengths = np.array([len(ids) for ids, _ in self.examples])
        self.epoch, self.order = None, None

    def add(self, ids: list[int], labels: list[int], max_len: int, where: str) -> None:
        """Keep an example, cut to max_len; count it if it had to be cut."""
        if len(ids) > max_len:
            self.cut += 1
            ids, labels = ids[:max_len], labels[:max_len]
        if all(label == IGNORE for label in labels):
            raise ValueError(
                f"{where}: no word of the assistant is within the first {max_len} tokens: raise "
                "--seq_len or shorten the prompt"
            )
        self.examples.append((np.array(ids, np.int32), np.array(labels, np.int32)))

    def rows(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """The examples of one step, longest first. Every epoch has each example once; its last
        batch holds what is left."""
        epoch, place = divmod(step, -(-self.size // batch_size))
        if (seed, epoch) != self.epoch:
            self.epoch, self.order = (seed, epoch), epoch_order(self.size, seed, epoch)
        chosen = self.order[place * batch_size : (place + 1) * batch_size]
        return chosen[np.argsort(self.lengths[chosen], kind="stable")[::-1]]

    def padding_share(self, batch_size: int, parts: int) -> float:
        """The share of padding in what is computed for one epoch, with `parts` micro-batches."""
        computed = 0
        for step in range(-(-self.size // batch_size)):
            rows = self.rows(step, batch_size, 0)
            size = -(-len(rows) // parts)  # as torch.chunk cuts
            for start in range(0, len(rows), size):
                piece = self.lengths[rows[start : start + size]]
                computed += len(piece) * piece.max()
        return float(1.0 - self.lengths.sum() / computed)

    def collate(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Examples `rows` as input_ids and labels (B, S), padded on the right to their longest."""
        shape = (len(rows), int(self.lengths[rows].max()))
        input_ids, labels = np.full(shape, PAD_ID, np.int64), np.full(shape, IGNORE, np.int64)
        for place, row in enumerate(rows):
            ids, targets = self.examples[row]
            input_ids[place, : len(ids)] = ids
            labels[place, : len(ids)] = targets
        return torch.from_numpy(input_ids), torch.from_numpy(labels)

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """input_ids and labels (B, S) of one training step, a function of (data, seed, step)."""
        return self.collate(self.rows(step, batch_size, seed))

    def evaluation_batches(self, batch_size: int, most_examples: int):
        """The first most_examples conversations, longest first; the same set for every seed."""
        chosen = np.argsort(self.lengths[:most_examples], kind="stable")[::-1]
        for start in range(0, len(chosen), batch_size):
            yield self.collate(chosen[start : start + batch_size])


def parts_of(batch_size: int, accumulation_steps: int = 1) -> int:
    """Micro-batches of a batch. More of them are less padding, but each costs some time by itself;
    --accumulation_steps may ask for more, to save memory."""
    return max(accumulation_steps, min(PARTS, batch_size // ROWS), 1)


def held_out(turns: list[dict], val_share: float, salt: str = "") -> bool:
    """Whether a conversation is held out, by a hash of what the user asked.

    Two splits of one file need two salts, or the second finds nothing left to hold out.
    """
    asked = salt + json.dumps([turn["content"] for turn in turns if turn["role"] == "user"])
    digest = hashlib.sha256(asked.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") < val_share * 2**32
