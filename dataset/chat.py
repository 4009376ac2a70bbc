"""Conversations as token ids in ChatML, with labels on the assistant's words only.

    <|im_start|>user\\nQUESTION<|im_end|>\\n<|im_start|>assistant\\nANSWER<|im_end|>\\n
    |------------- label -100 -------------------------------||- labels ------|

The labels cover the assistant's content and the <|im_end|> that ends it, so a model learns to
stop. Labels are shifted here, once: labels[s] is the token after input_ids[s]. A batch is a random
draw, sorted by length: cut into micro-batches, each at its own longest row, little is padding.

A model that others made reads conversations in its own form: dataset/template.py. The promises are
the same: nothing that a user types is a control token, and a prompt is a prefix of the whole.
"""

import hashlib
import json
import re
from collections import Counter
from copy import copy

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from files import known_hash, tokenizer_hash

from .packing import epoch_order
from .problems import answer_of, number_of
from .sources import LeftOut, read_jsonl
from .template import template_files, template_of
from .tokenizer import (
    TAGS,
    encode,
    encode_tagged,
    end_ids,
    load_tokenizer,
    special_id,
    vocabulary_of,
)  # fmt: skip

IGNORE = -100
PAD_ID = 0  # any would do: it has no label, and no token looks at what stands to its right
ROLES, TOOLS = ("system", "user", "assistant"), ("tool", "function")
THINK_SPAN = re.compile(r"<think>.*?(?:</think>\s*|\Z)", re.DOTALL)


def check_conversation(
    value: dict, where: str, need_answer: bool = True, tags: bool = True, left_out=None
) -> list[dict]:
    """The "conversations" of a jsonl line, of each turn its role and content; reasoning_content
    becomes a <think> span where the tokenizer has `tags`. What no lesson reads is left out: turns
    of tools, other fields, empty replies; left_out, a Counter, counts it. Raises ValueError naming
    what is wrong, LeftOut where the assistant does nothing but call tools."""
    turns, kept, found = value.get("conversations"), [], Counter()
    if not isinstance(turns, list) or not turns:
        form = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
        raise ValueError(f'{where} needs "conversations": {form}')
    for turn in turns:
        role = turn.get("role") if isinstance(turn, dict) else turn
        if not isinstance(turn, dict) or role not in (*ROLES, *TOOLS):
            raise ValueError(f"{where}: role {role!r} must be one of {', '.join(ROLES)}")
        if role in TOOLS:
            found["turns of tools"] += 1
            continue
        content, thought = (turn.get(name) for name in ("content", "reasoning_content"))
        if content is None and turn.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise ValueError(f'{where}: the {role} turn needs a "content" that is text')
        read = ["role", "content"]
        if role == "assistant" and tags and isinstance(thought, str) and "<think>" not in content:
            read.append("reasoning_content")
        found.update(name for name in turn if turn[name] and name not in read)
        if role == "assistant" and not content.strip():
            found["empty replies"] += 1
            continue
        if thought and "reasoning_content" in read:
            content = f"<think>\n{thought}\n</think>\n{content}"
        kept.append({"role": role, "content": content})
    if left_out is not None:
        left_out.update(found)
    if need_answer and not any(turn["role"] == "assistant" for turn in kept):
        kind = LeftOut if found.keys() - {"empty replies"} else ValueError
        raise kind(f"{where} has no assistant turn with words in it: nothing to learn from")
    return kept


def encode_conversation(tokenizer: Tokenizer, turns: list[dict]) -> tuple[list[int], list[int]]:
    """input_ids and labels of one conversation, both of one length, labels shifted already. Raises
    ValueError where the tokenizer's model cannot read one."""
    ids, learned = encode_turns(tokenizer, turns)
    labels = [token if own else IGNORE for token, own in zip(ids, learned, strict=True)]
    return ids[:-1], labels[1:]


def encode_turns(tokenizer: Tokenizer, turns: list[dict]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and for each whether it is the assistant's own."""
    if (template := template_of(tokenizer)) is not None:
        return template.encode(turns)
    start, end = control_tokens(tokenizer)
    newline = encode(tokenizer, "\n")
    ids, learned = [], []  # learned[i]: token i is the assistant's own
    for turn in turns:
        own = turn["role"] == "assistant"
        # A user's words are encoded together with what stands before them, as the chat template
        # has it; the assistant's apart, so that a prompt is a prefix of the whole.
        head = [start, *encode(tokenizer, f"{turn['role']}\n{'' if own else turn['content']}")]
        content = [*(encode_tagged(tokenizer, turn["content"]) if own else []), end]
        ids += head + content + newline
        learned += [False] * len(head) + [own] * len(content) + [False] * len(newline)
    return ids, learned


def control_tokens(tokenizer: Tokenizer) -> tuple[int, int]:
    """ChatML's begin and end of a turn. Raises ValueError where the tokenizer has none."""
    found = tuple(tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    if None in found:
        where = getattr(tokenizer, "folder", "the model")
        none = f"{where} has no chat template, and its tokenizer no <|im_start|> and <|im_end|>"
        cure = "use its version that was taught to chat, or put a chat_template.jinja into it"
        raise ValueError(f"{none}, so it reads no conversations: {cure}")
    return found


def encode_prompt(tokenizer: Tokenizer, turns: list[dict]) -> list[int]:
    """Ids of `turns` and the opening of the assistant's next turn, ready for generation."""
    if (template := template_of(tokenizer)) is not None:
        return template.encode(turns, opening=True)[0]
    opening, _ = encode_conversation(tokenizer, [*turns, {"role": "assistant", "content": ""}])
    return opening[:-1]  # without the <|im_end|> of the empty turn


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids at which a reply or a text ends. Raises ValueError where nothing says one."""
    template = template_of(tokenizer)
    found = [*(template.end_ids() if template is not None else []), *end_ids(tokenizer)]
    if not found:
        cure = 'add {"eos_token_id": ID} to its generation_config.json'
        raise ValueError(f"nothing in {tokenizer.folder} says which token ends a text: {cure}")
    return tuple(dict.fromkeys(found))


def with_system(turns: list[dict], system: str | None) -> list[dict]:
    """The turns, told `system` first, in place of a system turn of their own; None changes none."""
    if system is None:
        return turns
    kept = [turn for turn in turns if turn["role"] != "system"]
    return [{"role": "system", "content": system}, *kept]


def only_answer(turns: list[dict]) -> list[dict]:
    """The same conversation with every <think> span removed from the assistant's turns."""
    answers = [{**turn, "content": THINK_SPAN.sub("", turn["content"])} for turn in turns]
    pairs = zip(turns, answers, strict=True)
    return [new if new["role"] == "assistant" else old for old, new in pairs]


def gsm8k_conversation(value: dict, where: str) -> dict:
    """A GSM8K line, {"question", "answer": "reasoning #### 42"}, in the form of this project."""
    question, answer = value.get("question"), value.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str) or "####" not in answer:
        raise ValueError(f'{where} needs "question" and "answer": "... #### 42" (GSM8K)')
    reasoning, final = answer.rsplit("####", 1)
    reasoning = re.sub(r"<<.*?>>", "", reasoning).strip()  # calculator notes
    if number_of(final) is None:
        raise LeftOut(f"{where}: the answer after #### is {final.strip()[:40]!r}, not a number")
    final = re.sub("[$,%]", "", final.strip())
    content = f"<think>\n{reasoning}\n</think>\n<answer>\n{final}\n</answer>"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": content}]
    return {"conversations": turns, "answer": answer_of(final)}


class ChatData:
    """Conversations of a jsonl as padded batches, read with the tokenizer of a folder.

    split: "train" or "val", by a hash of the user turns, so the same for every seed; the training
    split has the other as `held_out`. max_len cuts longer conversations, `cut` counts them.
    answers_only drops the reasoning. skip_bad leaves out bad lines instead of refusing the file."""

    padded = True
    bytes_per_token = None  # of text alone

    def __init__(
        self, path, tokenizer_folder, split: str, max_len: int, val_share: float = 0.05,
        answers_only: bool = False, skip_bad: bool = False,
    ):  # fmt: skip
        self.path, self.tokenizer_folder = path, tokenizer_folder
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.vocab_size = vocabulary_of(tokenizer_folder, self.tokenizer)
        tags = all(self.tokenizer.token_to_id(tag) is not None for tag in TAGS[:2])
        left_out: Counter[str] = Counter()

        def parse(value: dict, where: str) -> tuple[float, bool, tuple[Tensor, Tensor]]:
            """The place of its question, whether it is cut, and input_ids and labels."""
            turns = check_conversation(value, where, tags=tags, left_out=left_out)
            place = question_place(turns)
            if answers_only:
                turns = only_answer(turns)
                turns = check_conversation({"conversations": turns}, f"{where}, answers only")
            ids, labels = encode_conversation(self.tokenizer, turns)
            if set(labels[:max_len]) == {IGNORE}:
                none = f"no word of the assistant is within the first {max_len} tokens"
                raise ValueError(f"{where}: {none}: raise --seq_len")
            kept = (torch.tensor(x[:max_len], dtype=torch.int32) for x in (ids, labels))
            return place, len(ids) > max_len, tuple(kept)

        found = read_jsonl(path, parse, skip_bad, left_out)
        limit = held_out_below([place for place, *_ in found], val_share)
        parts = {"train": [], "val": []}
        for place, *example in found:
            parts["val" if place < limit else "train"].append(example)
        for name, part in parts.items():
            if not part and (name == split or val_share > 0):
                none = f"none of its {len(found)} conversations falls into the {name} split"
                raise ValueError(f"{path}: {none} ({val_share:.0%} are held out): add more")
        self.sha256, self.tokenizer_sha256 = known_hash(path), tokenizer_hash(tokenizer_folder)
        self.files = [path, *template_files(self.tokenizer)]
        self.held_out = None
        if split == "train" and val_share > 0:
            self.held_out = copy(self)
            self.held_out.hold(parts["val"])
        self.hold(parts[split])

    def hold(self, part: list[tuple]) -> None:
        self.examples = [example for _, example in part]
        self.size, self.cut = len(part), sum(is_cut for is_cut, _ in part)
        self.lengths = np.array([len(ids) for ids, _ in self.examples])

    def special_ids(self) -> tuple[tuple[int, ...], int]:
        """Ids of the four reasoning tags, and of the end of a turn. Raises ValueError without."""
        tags = tuple(special_id(self.tokenizer, tag) for tag in TAGS)
        template = template_of(self.tokenizer)
        ends = template.end_ids() if template is not None else control_tokens(self.tokenizer)[1:]
        if not ends:
            raise ValueError(f"{template.what} ends no reply to a user's turn: use another model")
        return tags, ends[0]

    def collate(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """input_ids and labels (B, S) of `rows`, padded on the right to their longest."""
        ids, labels = zip(*(self.examples[row] for row in rows), strict=True)
        return pad_sequence(ids, True, PAD_ID).long(), pad_sequence(labels, True, IGNORE).long()

    def batch(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """input_ids and labels (B, S) of one step, longest first; an epoch has each row once."""
        epoch, number = divmod(step, -(-self.size // batch_size))
        chosen = epoch_order(self.size, seed, epoch)[number * batch_size :][:batch_size]
        return self.collate(chosen[np.argsort(self.lengths[chosen], kind="stable")[::-1]])

    def evaluation(self, batch_size: int, most: int):
        """The first `most` conversations, longest first; the same set for every seed."""
        chosen = np.argsort(self.lengths[:most], kind="stable")[::-1]
        for start in range(0, len(chosen), batch_size):
            yield self.collate(chosen[start : start + batch_size])


def question_place(turns: list[dict], salt: str = "") -> float:
    """A hash of what the user asked, as a number of at least 0 and below 1."""
    # Two splits of one file need two salts, or the second finds nothing left to hold out.
    asked = salt + json.dumps([turn["content"] for turn in turns if turn["role"] == "user"])
    return int.from_bytes(hashlib.sha256(asked.encode("utf-8")).digest()[:4], "big") / 2**32


def held_out_below(places: list[float], share: float) -> float:
    """The limit below which a question's place holds it out: `share`, moved so far that both sides
    have a question (unless there is only one, or a side is not wanted)."""
    if not 0 < share < 1:
        return share
    return min(max(share, min(places) + 2**-32), max(places))
