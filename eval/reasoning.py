"""Greedy answers on held-out problems: how many are right, and is the reasoning true?

    python -m eval.reasoning --model out/reasoner
    python -m eval.reasoning --model out/reasoner --problems mine.jsonl --out answers.jsonl

For every number of steps:

    accuracy      share of answers that equal the problem's, as numbers ("1,234" is 1234)
    well_formed   share of the form <think>...</think> <answer>...</answer> and nothing else
    verified      share of which every line is a true equation on known numbers, the last the
                  answer; "-" where gold traces are in another form (GSM8K's prose)
    think_tokens  mean tokens inside <think>...</think>

Every answer is written to a jsonl: counts can be wrong, and the words show how.
"""

import argparse
import json
from pathlib import Path

from dataset.problems import check_response, is_answer
from dataset.replies import MAX_NEW_TOKENS, read_problems, write_replies
from dataset.tokenizer import decode, load_tokenizer, special_id
from eval.beside import settle_out
from files import atomic_path, check_ranges, command_line, new_parser
from model import load_model
from model.device import choose_device, keep_freed_memory


def think_tokens(tokenizer, ids: list[int]) -> int:
    """Tokens between <think> and </think>, or to the end where it is not closed."""
    opening, closing = special_id(tokenizer, "<think>"), special_id(tokenizer, "</think>")
    if opening not in ids:
        return 0
    rest = ids[ids.index(opening) + 1 :]
    return rest.index(closing) if closing in rest else len(rest)


def judge(tokenizer, problem: dict, ids: list[int]) -> dict:
    """One line of the answers jsonl."""
    question, reply = problem["turns"][-1]["content"], decode(tokenizer, ids)
    check = check_response(question, reply)
    return {
        "question": question, "reply": reply, "answer": problem["answer"],
        "steps": problem["steps"],
        "correct": is_answer(reply, problem["answer"]), "well_formed": check.well_formed,
        "verified": check.verified if problem.get("checkable", True) else None,
        "think_tokens": think_tokens(tokenizer, ids),
    }  # fmt: skip


def summarise(judged: list[dict]) -> dict[int, dict]:
    """Means by number of steps; 0 stands for all problems together."""
    table = {}
    for steps in [0, *sorted({line["steps"] for line in judged} - {0})]:
        lines = [line for line in judged if steps in (0, line["steps"])]
        means = {}
        for name in ("correct", "well_formed", "verified", "think_tokens"):
            values = [line[name] for line in lines if line[name] is not None]
            means[name] = sum(values) / len(values) if values else None
        table[steps] = {"problems": len(lines), "accuracy": means.pop("correct"), **means}
    return table


def evaluate_reasoning(
    folder, problems_path, answers_path, device, max_new_tokens: int = MAX_NEW_TOKENS
) -> dict[int, dict]:
    """Answer all problems greedily; write the answers; return `summarise`'s table."""
    student, tokenizer = load_model(folder, device), load_tokenizer(folder)
    problems = read_problems(problems_path)
    replies = write_replies(student, tokenizer, problems, max_new_tokens)
    if cut := sum(len(ids) == max_new_tokens for ids in replies):
        limit = f"cut at {max_new_tokens} tokens: raise --max_new_tokens"
        print(f"{cut:,} of {len(replies):,} replies of {folder} were {limit}")
    judged = [judge(tokenizer, p, ids) for p, ids in zip(problems, replies, strict=True)]
    with atomic_path(answers_path) as temporary:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in judged]
        temporary.write_text("".join(lines), "utf-8")
    return summarise(judged)


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--model", default="out/reasoner", help="checkpoint folder")
    parser.add_argument(
        "--problems", default="out/data/reason_test.jsonl", help="jsonl of problems"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="jsonl of answers; default MODEL/answers.jsonl"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file in --out")
    limit = "of one reply; longer ones are cut, and counted"
    parser.add_argument("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help=limit)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args) -> None:
    check_ranges(args)
    keep_freed_memory()
    settle_out(args, "answers.jsonl")
    device, most = choose_device(args.device), args.max_new_tokens
    table = evaluate_reasoning(args.model, args.problems, args.out, device, most)
    print(
        f"{'steps':>5} {'problems':>8} {'accuracy':>8} {'formed':>8} {'verified':>8} {'thought':>8}"
    )
    for steps, row in table.items():
        verified = "-" if row["verified"] is None else f"{row['verified']:.1%}"
        print(
            f"{steps or 'all':>5} {row['problems']:8d} {row['accuracy']:8.1%} "
            f"{row['well_formed']:8.1%} {verified:>8} {row['think_tokens']:8.1f}"
        )
    print(f"every answer: {args.out}")


if __name__ == "__main__":
    command_line(main, parse_args())
