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

A model that others made answers in a form of its own (--answer_form, see dataset/answers.py), and
may have to be asked for it (--system). well_formed is then the share of replies that have an answer
in that form, verified is "-", and so is think_tokens where the tokenizer has no tags.
"""

import argparse
import json
from pathlib import Path

from dataset.answers import FORMS, check_form, is_answer, read_answer
from dataset.chat import with_system
from dataset.problems import check_response
from dataset.replies import MAX_NEW_TOKENS, read_problems, write_replies
from dataset.tokenizer import TAGS, decode, load_tokenizer
from eval.beside import settle_out
from files import atomic_path, check_ranges, command_line, new_parser
from model import load_model
from model.device import choose_device, keep_freed_memory


def think_tokens(tokenizer, ids: list[int]) -> int | None:
    """Tokens between <think> and </think>, or to the end where it is not closed; None where the
    tokenizer has no such tokens."""
    opening, closing = (tokenizer.token_to_id(tag) for tag in TAGS[:2])
    if opening is None or closing is None:
        return None
    if opening not in ids:
        return 0
    rest = ids[ids.index(opening) + 1 :]
    return rest.index(closing) if closing in rest else len(rest)


def judge(tokenizer, problem: dict, ids: list[int], form: str = "tags") -> dict:
    """One line of the answers jsonl."""
    question, reply = problem["turns"][-1]["content"], decode(tokenizer, ids)
    check, formed, checkable = check_response(question, reply), None, form == "tags"
    if not checkable:
        formed = read_answer(reply, form) is not None
    return {
        "question": question, "reply": reply, "answer": problem["answer"],
        "steps": problem["steps"],
        "correct": is_answer(reply, problem["answer"], form), "answer_form": form,
        "well_formed": check.well_formed if checkable else formed,
        "verified": check.verified if checkable and problem.get("checkable", True) else None,
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
    folder, problems_path, answers_path, device, max_new_tokens: int = MAX_NEW_TOKENS,
    form: str = "tags", system: str | None = None,
) -> dict[int, dict]:  # fmt: skip
    """Answer all problems greedily; write the answers; return `summarise`'s table."""
    student, tokenizer = load_model(folder, device), load_tokenizer(folder)
    problems = read_problems(problems_path)
    check_form(problems, form)
    asked = [{**problem, "turns": with_system(problem["turns"], system)} for problem in problems]
    replies = write_replies(student, tokenizer, asked, max_new_tokens)
    if cut := sum(len(ids) == max_new_tokens for ids in replies):
        limit = f"cut at {max_new_tokens} tokens: raise --max_new_tokens"
        print(f"{cut:,} of {len(replies):,} replies of {folder} were {limit}")
    judged = [judge(tokenizer, p, ids, form) for p, ids in zip(problems, replies, strict=True)]
    for line, ids in zip(judged, replies, strict=True):
        if len(ids) == max_new_tokens:  # cut: the next token may be a digit, or another number
            last = form == "last"
            line["correct"] &= not last and is_answer(f"{line['reply']}1", line["answer"], form)
            line["well_formed"] &= not last
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
    stands = "where the answer stands in a reply"
    parser.add_argument("--answer_form", choices=FORMS, default="tags", help=stands)
    told = "words to tell the model first; default its template's"
    parser.add_argument("--system", default=None, help=told)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args) -> None:
    check_ranges(args)
    keep_freed_memory()
    settle_out(args, "answers.jsonl")
    device, most = choose_device(args.device), args.max_new_tokens
    form, told = args.answer_form, args.system
    table = evaluate_reasoning(args.model, args.problems, args.out, device, most, form, told)
    print(
        f"{'steps':>5} {'problems':>8} {'accuracy':>8} {'formed':>8} {'verified':>8} {'thought':>8}"
    )
    for steps, row in table.items():
        verified = "-" if row["verified"] is None else f"{row['verified']:.1%}"
        thought = "-" if row["think_tokens"] is None else f"{row['think_tokens']:.1f}"
        print(
            f"{steps or 'all':>5} {row['problems']:8d} {row['accuracy']:8.1%} "
            f"{row['well_formed']:8.1%} {verified:>8} {thought:>8}"
        )
    print(f"every answer: {args.out}")


if __name__ == "__main__":
    command_line(main, parse_args())
