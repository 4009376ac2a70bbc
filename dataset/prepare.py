"""Make everything that training reads: tokenizer, token streams, reasoning problems.

    python -m dataset.prepare                          # Shakespeare's plays and generated problems
    python -m dataset.prepare --text my_notes/         # your own .txt and .md files
    python -m dataset.prepare --jsonl pretrain.jsonl   # MiniMind's {"text": ...} lines
    python -m dataset.prepare --text a/ --held_out b/  # you say what is held out
    python -m dataset.prepare --reason gsm8k.jsonl     # your own reasoning traces
    python -m dataset.prepare --tokenizer Qwen3-0.6B/  # for a teacher that was made elsewhere

It writes to --out:

    tokenizer.json, tokenizer_config.json   byte-level BPE, trained on all of the training text
    train.bin, val.bin, meta.json           token streams; whole documents are held out
    reason_train.jsonl                      problems with gold traces, 1-4 steps
    reason_prompts.jsonl                    other problems without traces, for make_traces
    reason_test.jsonl                       held-out problems, 1-5 steps (5 is never trained)

A call that fails leaves what was there before; meta.json also says what all was made from.
"""

import argparse
import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path

import files
from files import command_line
from files.atomic import TOKENIZER_FILES, atomic_folder

from .chat import check_conversation, gsm8k_conversation, held_out_below, question_place
from .packing import check_prepared, write_stream
from .problems import ANSWER_TEXT, TIERS, Problem, answer_of, check_problem, make_problems
from .sources import (
    jsonl_texts,
    read_jsonl,
    shakespeare,
    share_repeated,
    split_documents,
    text_files,
)
from .tokenizer import (
    document_end,
    encode_all,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    vocabulary_of,
)  # fmt: skip

NOTABLE = 0.02  # share of the held-out text that is in the training text too


def parse_args(argv=None) -> argparse.Namespace:
    parser = files.new_parser(__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--text", type=Path, help="a .txt/.md file or a folder of them")
    add("--jsonl", type=Path, help='a jsonl of {"text": ...} lines')
    add = parser.add_argument
    add("--held_out", type=Path, help="what --text or --jsonl holds out, in a file of its own")
    add("--reason", type=Path, help="your own traces: r1-style conversations, or GSM8K lines")
    add("--skip_bad", action="store_true", help="leave out bad lines of a jsonl, and count them")
    add("--out", type=Path, default=Path("out/data"), help="folder to write")
    add("--overwrite", action="store_true", help="replace what was prepared in --out")
    add("--cache", type=Path, default=Path("out/cache"), help="folder for downloaded text")
    add("--tokenizer", type=Path, help="folder of a tokenizer to use, instead of training one")
    add("--vocab_size", type=int, default=2048, help="tokens of a new tokenizer")
    share = "share that is held out; default 0.08 of the text, 0.1 of --reason"
    add("--val_share", type=float, help=share)
    add("--tier", choices=tuple(TIERS), default="easy", help="numbers and order of the problems")
    add("--problems", type=int, default=20000, help="training problems")
    add("--prompts", type=int, default=10000, help="problems without traces")
    add("--test_problems", type=int, default=1000, help="held-out problems")
    add("--seed", type=int, default=0, help="of the generated problems")
    return parser.parse_args(argv)


def read_documents(args) -> tuple[list, list]:
    """What is held out by --held_out, and what --text, --jsonl or nothing name: two lists of (name,
    text). Of equal texts the first is kept: none may be trained on and held out."""
    if args.held_out is not None and args.val_share and args.reason is None:
        raise ValueError("--held_out leaves --val_share nothing to hold out: pass one of them")
    if args.held_out is not None and args.text is None and args.jsonl is None:
        raise ValueError(f"--held_out {args.held_out} goes with --text or --jsonl: pass one too")
    if args.text is None and args.jsonl is None:
        parts = [], shakespeare(args.cache)
    else:
        read = text_files if args.text else partial(jsonl_texts, skip_bad=args.skip_bad)
        parts = [
            [] if path is None else read(path) for path in (args.held_out, args.text or args.jsonl)
        ]
    seen: set[str] = set()
    found = [], []
    for part, documents in zip(found, parts, strict=True):
        for name, text in documents:
            if text.strip() not in seen:
                part.append((name, text))
                seen.add(text.strip())
    if repeated := sum(map(len, parts)) - sum(map(len, found)):
        print(f"repeated documents left out: {repeated:,}")
    return found


def problem_line(problem: Problem, with_trace: bool) -> dict:
    """A problem in the jsonl schema, with its answer and number of steps."""
    turns = [{"role": "user", "content": problem.question}]
    if with_trace:
        turns.append({"role": "assistant", "content": problem.response()})
    return {"conversations": turns, "answer": problem.answer, "steps": problem.steps}


def user_reasoning(path: Path, skip_bad: bool, share: float) -> tuple[list[dict], list[dict]]:
    """The user's traces as training and test lines; a share is held out by the question's hash."""

    def parse(value: dict, where: str) -> dict:
        if "conversations" not in value:
            value = gsm8k_conversation(value, where)
        turns = check_conversation(value, where, left_out=left_out)
        if (last := turns[-1])["role"] != "assistant":
            raise ValueError(f"{where} ends with the {last['role']}'s turn: end with an answer")
        if found := ANSWER_TEXT.search(last["content"]):
            value.setdefault("answer", answer_of(found[1]))
        check_problem(value, turns, where)
        return {**value, "conversations": turns}

    left_out: Counter[str] = Counter()
    lines = read_jsonl(path, parse, skip_bad, left_out)
    places = [question_place(line["conversations"], salt="test ") for line in lines]
    limit, train, test = held_out_below(places, share), [], []
    for line, place in zip(lines, places, strict=True):
        (test if place < limit else train).append(line)
    if not test:
        raise ValueError(f"{path}: all lines ask the same question: add others, to hold out")
    return train, test


def reasoning_lines(args) -> dict[str, list[dict]]:
    """What reason_train, reason_prompts and reason_test.jsonl hold."""
    if args.reason is not None:
        train, test = user_reasoning(args.reason, args.skip_bad, args.val_share or 0.1)
        prompts = [{**v, "conversations": v["conversations"][:-1]} for v in train]
        return {"train": train, "prompts": prompts, "test": test}
    counts = {"train": args.problems, "prompts": args.prompts, "test": args.test_problems}
    lines = {}
    for split, count in counts.items():
        steps = (1, 2, 3, 4, 5) if split == "test" else (1, 2, 3, 4)
        made = make_problems(split, steps, count, args.seed, args.tier)
        lines[split] = [problem_line(problem, with_trace=split != "prompts") for problem in made]
    return lines


def main(args) -> None:
    files.check_ranges(args)
    files.check_apart(args)
    # 1. Text, and which documents are held out.
    held_out, documents = read_documents(args)
    val_share = args.val_share or 0.08
    if not held_out:
        training, validation = split_documents(documents, val_share)
    elif not documents:
        raise ValueError(f"all of the text stands in --held_out {args.held_out}: add other text")
    else:
        training, validation = ([text for _, text in x] for x in (documents, held_out))
    # 2. Reasoning problems; and is it made already?
    reasoning = reasoning_lines(args)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    if tokenizer is not None:
        document_end(tokenizer)  # raises without
    content = [documents, reasoning, held_out] if held_out else [documents, reasoning]
    content = json.dumps(content).encode("ascii")
    made_from = {k: v for k, v in vars(args).items() if type(v) in (int, float, str)} | {
        "val_share": val_share, "content": hashlib.sha256(content).hexdigest(),
        "tokenizer": args.tokenizer and files.tokenizer_hash(args.tokenizer),
    }  # fmt: skip
    if args.tokenizer is not None:  # its chat template, and the ids that end a text
        paths = files.tokenizer_paths(args.tokenizer)
        made_from["tokenizer_files"] = {path.name: files.known_hash(path) for path in paths}
    check_prepared(args.out, made_from, args.overwrite)
    if (repeated := share_repeated(training, validation)) > NOTABLE:
        cure = "take that out before you believe a held-out loss"
        print(f"{repeated:.0%} of the held-out text is in the training text, word for word: {cure}")
    with atomic_folder(args.out, "meta.json", stale=TOKENIZER_FILES) as out:
        for split, lines in reasoning.items():
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            with files.atomic_path(out / f"reason_{split}.jsonl") as temporary:
                temporary.write_text(text, "utf-8")
        # 3. One tokenizer for both. Held-out text is not read.
        if tokenizer is not None:
            files.copy_tokenizer(args.tokenizer, out)
        else:
            lines = reasoning["train"][:5000]
            traces = [turn["content"] for value in lines for turn in value["conversations"]]
            tokenizer = train_tokenizer([*training, *traces], args.vocab_size)
            save_tokenizer(tokenizer, out)
        # 4. Token streams.
        end = document_end(tokenizer)
        size = vocabulary_of(args.tokenizer or out, tokenizer)
        about = {"vocab_size": size, "tokenizer_sha256": files.tokenizer_hash(out)}
        for split, texts in (("train", training), ("val", validation)):
            path, count = out / f"{split}.bin", sum(len(text.encode("utf-8")) for text in texts)
            about[split] = write_stream(path, encode_all(tokenizer, texts), size, end)
            about[split] |= {"bytes": count, "documents": len(texts)}
            about[split]["sha256"] = files.file_hash(path)
        if size < args.vocab_size and args.tokenizer is None:
            print(f"the text fills a vocabulary of {size}, not {args.vocab_size}")
        written = {path.name: files.file_hash(path) for path in sorted(out.iterdir())}
        files.write_json(out / "meta.json", {**about, "files": written, "made_from": made_from})
    files.unlock(args.out)
    train, val = (f"{about[split]['tokens']:,}" for split in ("train", "val"))
    problems = " + ".join(f"{len(lines):,} ({split})" for split, lines in reasoning.items())
    tokens = f"{train} tokens for training, {val} held out, a vocabulary of {size:,}"
    print(f"{args.out}: {tokens}; problems: {problems}")


if __name__ == "__main__":
    command_line(main, parse_args())
