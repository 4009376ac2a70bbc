"""Make everything that training reads: tokenizer, token streams, reasoning problems.

    python -m dataset.prepare                          # Shakespeare's plays and generated problems
    python -m dataset.prepare --text my_notes/         # your own .txt and .md files
    python -m dataset.prepare --jsonl pretrain.jsonl   # MiniMind's {"text": ...} lines
    python -m dataset.prepare --reason gsm8k.jsonl     # your own reasoning traces
    python -m dataset.prepare --tokenizer Qwen3-0.6B/  # for a teacher that was made elsewhere

It writes to --out:

    tokenizer.json, tokenizer_config.json   byte-level BPE, trained on all of the training text
    train.bin, val.bin, meta.json           token streams; whole documents are held out
    reason_train.jsonl                      problems with gold traces, 1-4 steps
    reason_prompts.jsonl                    other problems without traces, for make_traces
    reason_test.jsonl                       held-out problems, 1-5 steps (5 is never trained)
"""

import argparse
import hashlib
import json
from pathlib import Path

from run.files import atomic_path, command_line, copy_tokenizer, hold, release, write_json
from run.flags import new_parser

from .chat import check_conversation, gsm8k_conversation, held_out
from .packing import write_stream
from .problems import ANSWER, Problem, make_problems
from .sources import (
    jsonl_texts,
    read_jsonl,
    shakespeare,
    split_documents,
    tell_bad_lines,
    text_files,
    tolerate,
)
from .tokenizer import (
    SMALLEST_VOCABULARY,
    encode_all,
    load_tokenizer,
    save_tokenizer,
    special_id,
    tokenizer_hash,
    train_tokenizer,
)


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, help="a .txt/.md file or a folder of them")
    source.add_argument("--jsonl", type=Path, help='a jsonl of {"text": ...} lines')
    parser.add_argument(
        "--reason", type=Path, help="your own traces: r1-style conversations, or GSM8K lines"
    )
    parser.add_argument(
        "--skip_bad", action="store_true", help="leave out bad lines of a jsonl, and count them"
    )
    parser.add_argument("--out", type=Path, default=Path("out/data"), help="folder to write")
    parser.add_argument(
        "--cache", type=Path, default=Path("out/cache"), help="where downloaded text is kept"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer to use, instead of training one"
    )
    parser.add_argument("--vocab_size", type=int, default=2048, help="tokens, 263 or more")
    parser.add_argument("--val_share", type=float, default=0.08, help="share held out, 0.01-0.5")
    parser.add_argument("--problems", type=int, default=20000, help="training problems, 1 or more")
    parser.add_argument("--prompts", type=int, default=10000, help="problems without traces")
    parser.add_argument("--test_problems", type=int, default=1000, help="held-out problems")
    parser.add_argument("--seed", type=int, default=0, help="of the generated problems")
    return parser.parse_args(argv)


def write_jsonl(path: Path, lines: list[dict]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def problem_line(problem: Problem, with_trace: bool) -> dict:
    """A problem in the jsonl schema, with its answer and number of steps beside."""
    turns = [{"role": "user", "content": problem.question}]
    if with_trace:
        turns.append({"role": "assistant", "content": problem.response()})
    return {"conversations": turns, "answer": problem.answer, "steps": problem.steps}


def user_reasoning(path: Path, skip_bad: bool) -> tuple[list[dict], list[dict]]:
    """The user's traces as training and test lines; a tenth is held out by the question's hash."""
    train, test, bad = [], [], [] if skip_bad else None
    for number, value in read_jsonl(path, bad):
        with tolerate(bad):
            where = f"{path} line {number}"
            if "conversations" not in value:
                value = gsm8k_conversation(value, where)
            turns = check_conversation(value, where)
            if turns[-1]["role"] != "assistant":
                raise ValueError(
                    f"{where} ends with the {turns[-1]['role']}'s turn: end with an answer"
                )
            found = ANSWER.search(turns[-1]["content"])
            if "answer" not in value and found:
                value["answer"] = int(found.group(1))
            (test if held_out(turns, 0.1, salt="test ") else train).append(value)
    tell_bad_lines(path, bad)
    if not train or not test:
        raise ValueError(
            f"{path}: {len(train)} conversations for training and {len(test)} for the test "
            "(a tenth, by hash): add more"
        )
    return train, test


def before_answer(turns: list[dict]) -> list[dict]:
    """The turns before the last assistant's."""
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    return turns[:last]


def reasoning_lines(args) -> dict[str, list[dict]]:
    """What reason_train, reason_prompts and reason_test.jsonl hold."""
    if args.reason is not None:
        train, test = user_reasoning(args.reason, args.skip_bad)
        prompts = [{**v, "conversations": before_answer(v["conversations"])} for v in train]
        return {"train": train, "prompts": prompts, "test": test}
    counts = {"train": args.problems, "prompts": args.prompts, "test": args.test_problems}
    lines = {}
    for split, count in counts.items():
        steps = (1, 2, 3, 4, 5) if split == "test" else (1, 2, 3, 4)
        made = make_problems(split, steps, count, args.seed)
        lines[split] = [problem_line(problem, with_trace=split != "prompts") for problem in made]
    return lines


def main(args) -> None:
    if not 0.01 <= args.val_share <= 0.5:
        raise ValueError(f"--val_share {args.val_share} must be between 0.01 and 0.5")
    for name in ("problems", "prompts", "test_problems"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"--vocab_size {args.vocab_size} must be at least {SMALLEST_VOCABULARY}")
    # 1. Text, and which documents are held out.
    if args.text is not None:
        documents = text_files(args.text)
    elif args.jsonl is not None:
        documents = jsonl_texts(args.jsonl, args.skip_bad)
    else:
        documents = shakespeare(args.cache)
    training, validation = split_documents(documents, args.val_share)
    # 2. Reasoning problems. From here on files change: without meta.json the folder is not whole.
    reasoning = reasoning_lines(args)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    hold(args.out, wait=True)  # a second call makes the same files after the first
    (args.out / "meta.json").unlink(missing_ok=True)
    for split, lines in reasoning.items():
        write_jsonl(args.out / f"reason_{split}.jsonl", lines)
    # 3. One tokenizer for both. Held-out text is not read.
    if tokenizer is not None:
        copy_tokenizer(args.tokenizer, args.out)
    else:
        lines = reasoning["train"][:5000]
        traces = [turn["content"] for value in lines for turn in value["conversations"]]
        tokenizer = train_tokenizer([*training, *traces], args.vocab_size)
        save_tokenizer(tokenizer, args.out)
    # 4. Token streams.
    end = special_id(tokenizer, "<|endoftext|>")
    about = {"vocab_size": tokenizer.get_vocab_size(), "tokenizer_sha256": tokenizer_hash(args.out)}
    for split, texts in (("train", training), ("val", validation)):
        ids = encode_all(tokenizer, texts)
        about[split] = write_stream(args.out / f"{split}.bin", ids, about["vocab_size"], end)
        about[split]["bytes"] = sum(len(text.encode("utf-8")) for text in texts)
        about[split]["documents"] = len(texts)
        content = (args.out / f"{split}.bin").read_bytes()
        about[split]["sha256"] = hashlib.sha256(content).hexdigest()
        print(
            f"{split}: {about[split]['documents']} documents, {about[split]['tokens']:,} tokens, "
            f"{about[split]['bytes'] / about[split]['tokens']:.2f} bytes a token"
        )
    if about["vocab_size"] < args.vocab_size and args.tokenizer is None:
        print(f"the text fills a vocabulary of {about['vocab_size']}, not {args.vocab_size}")
    counts = ", ".join(f"{len(lines):,} {split}" for split, lines in reasoning.items())
    print(f"reasoning problems: {counts}\nwrote {args.out}")
    write_json(args.out / "meta.json", about)
    release(args.out)


if __name__ == "__main__":
    command_line(main, parse_args())
