"""A teacher that is asked: a server of OpenAI's protocol writes what a student is to learn from.

    python -m dataset.ask_teacher --api http://127.0.0.1:8000/v1 --model NAME \\
        --prompts out/data/reason_prompts.jsonl                   # writes out/asked.jsonl
    python train_distill_reason.py --data out/asked.jsonl --out out/from_asked

Nothing is seen of such a teacher but its words (sequence-level distillation: Kim & Rush 2016,
1606.07947). Hosted models speak this protocol, and vLLM, llama.cpp, Ollama and eval/serve.py. The
key, where one is needed, is read from the environment variable OPENAI_API_KEY and written nowhere.

    --prompts P.jsonl               answers to the questions of conversations
    --seeds S.jsonl --expand 500    500 new questions like those (Self-Instruct, 2212.10560)
    --topics T.txt --expand 20      20 new questions about the topic on each line

New questions are written without answers: look at them, then ask for those with --prompts. Where
no answer is known, replies are kept on which samples agree: --keep agreed --samples 5.

Each reply is kept in OUT.replies.jsonl as it comes, and dataset/filters.py then chooses among them.
A second call asks only for what is missing: it resumes, or filters the same replies in another way,
or has more of them, by raised limits, --samples or --expand.
"""

import argparse
import json
import random
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import files
from files import atomic_path, check_ranges, command_line
from files.atomic import check_keys, parse_json

from .answers import FORMS, check_form
from .chat import with_system
from .filters import Near, keep_questions, keep_replies
from .replies import read_problems
from .sources import read_text
from .teacher_api import COUNTS, LIMITS, Budget, Teacher, ask_all, most_tokens, weighed

FORM = 'Write each on one line that begins with "Q: ", without an answer, and write nothing else.'
LIKE_THESE = "Here are some questions:\n\n{}\n\nWrite {} new questions of the same kind. " + FORM
ABOUT = "Write {1} different questions about this topic, from easy to hard: {0}\n\n" + FORM
AT_ONCE, SHOWN = 10, 5  # questions that one request asks for; examples that it shows
RANGES = LIMITS | dict.fromkeys(("price_in", "price_out"), (0.0, 1e6))
RANGES |= {"expand": (1, 10**6), "threads": (1, 256), "timeout": (0.1, 86400.0)}
RANGES |= {"max_words": (1, 10**6), "drop_unsure": (0.0, 0.99), "temperature": (0.0, 10.0)}
ASKED = "api model prompts seeds topics system temperature seed max_new_tokens logprobs".split()
CHOSEN = "samples expand keep answer_form max_words drop_unsure test".split()


def parse_args(argv=None) -> argparse.Namespace:
    parser = files.new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--api", default="http://127.0.0.1:8000/v1", help="address of the server")
    add("--model", default=None, help="name that the server gives it")
    add("--prompts", default=None, help="jsonl of conversations; the last user turn is answered")
    add("--seeds", default=None, help="jsonl of conversations: examples of questions")
    add("--topics", default=None, help="text file, a topic on a line")
    add("--expand", type=int, default=None, help="new questions, like the seeds or per topic")
    add("--out", type=Path, default=Path("out/asked.jsonl"), help="jsonl to write")
    add("--overwrite", action="store_true", help="ask all again, and replace --out")
    asking = parser.add_argument_group("how it is asked").add_argument
    asking("--system", default=None, help="words to tell the teacher first; --out has them not")
    asking("--samples", type=int, default=1, help="replies to each prompt")
    asking("--temperature", type=float, default=None, help="of sampling; else the server's own")
    asking("--seed", type=int, default=None, help="of the first reply, raised by one for each next")
    asking("--max_new_tokens", type=int, default=1024, help="of one reply; longer ones are cut")
    asking("--logprobs", action="store_true", help="of 20 candidates a token: how sure it is")
    asking("--threads", type=int, default=4, help="requests at once")
    asking("--timeout", type=float, default=600.0, help="seconds without a word; then try again")
    limits = parser.add_argument_group("limits, over all calls for one --out").add_argument
    limits("--max_requests", type=int, default=None, help="requests, those that fail included")
    limits("--max_tokens_total", type=int, default=None, help="tokens, of prompts and replies")
    limits("--max_cost", type=float, default=None, help="in the currency of the prices")
    limits("--price_in", type=float, default=None, help="of a million tokens of prompts")
    limits("--price_out", type=float, default=None, help="of a million tokens of replies")
    keep = parser.add_argument_group("what is kept").add_argument
    choices = ("verified", "agreed", "all")
    keep("--keep", choices=choices, default="verified", help="replies to --prompts, by answer")
    keep("--answer_form", choices=FORMS, default="tags", help="where the answer stands in a reply")
    keep("--max_words", type=int, default=2000, help="of a reply or a new question")
    keep("--drop_unsure", type=float, default=0.0, help="share of the replies, least sure first")
    keep("--test", default=None, help="jsonl of conversations; nothing near its questions is kept")
    return parser.parse_args(argv)


def check_flags(args) -> None:
    """Raise ValueError for flags that do not go together."""
    given = [f"--{name}" for name in ("prompts", "seeds", "topics") if getattr(args, name)]
    if len(given) != 1:
        one = "pass one of --prompts, --seeds and --topics"
        raise ValueError(f"{' and '.join(given) or 'nothing'} says what to ask: {one}")
    url = urlsplit(args.api)
    if (
        url.scheme not in ("http", "https")
        or not url.hostname
        or url.username
        or url.query
        or url.fragment
    ):
        form = "http://HOST:PORT/v1, without a password or a key in it"
        raise ValueError(f"--api is no address of the form {form}: OPENAI_API_KEY holds the key")
    new, several = not args.prompts, args.samples > 1
    mistakes = [
        (not args.model, "--model is missing: pass the name that the server gives it"),
        (new and not args.expand, f"{given[0]} needs --expand, the number of new questions"),
        (args.expand and not new, "--expand is of --seeds and --topics: leave it out"),
        (several and new, "--samples is of --prompts: leave it out"),
        (several and args.temperature == 0, "--samples at --temperature 0 are alike: raise that"),
        (args.keep == "agreed" and not several, "--keep agreed needs --samples, 2 or more"),
        (args.drop_unsure and (new or not args.logprobs), "--drop_unsure is of --logprobs: add it"),
        (args.logprobs and new, "--logprobs is of --prompts: leave it out"),
        (
            args.max_cost is not None and None in (args.price_in, args.price_out),
            "--max_cost needs --price_in and --price_out",
        ),
    ]
    for applies, mistake in mistakes:
        if applies:
            raise ValueError(mistake)


def requests_of(args) -> tuple[list[dict], list[dict]]:
    """Every request's "turns", by number, and the problems or examples that they are of. A raised
    --samples or --expand only adds to them."""
    if args.prompts:
        problems = read_problems(args.prompts, need_answer=args.keep == "verified")
        check_form(problems if args.keep == "verified" else [], args.answer_form)
        asked = [{"turns": with_system(x["turns"], args.system)} for x in problems]
        return asked * args.samples, problems
    rounds, examples = range(-(-args.expand // AT_ONCE)), []
    if args.seeds:
        examples = read_problems(args.seeds, need_answer=False)
        lines = [f"Q: {' '.join(x['turns'][-1]['content'].split())}" for x in examples]
        shown = (random.Random(r).sample(lines, min(SHOWN, len(lines))) for r in rounds)
        asked = [{"words": LIKE_THESE.format("\n".join(some), AT_ONCE)} for some in shown]
    else:
        topics = [x.strip() for x in read_text(Path(args.topics)).splitlines() if x.strip()]
        topics = list(dict.fromkeys(topics))
        asked = [{"topic": x, "words": ABOUT.format(x, AT_ONCE)} for _ in rounds for x in topics]
    for request in asked:
        turns = [{"role": "user", "content": request["words"]}]
        request["turns"] = with_system(turns, args.system)
    return asked, examples


def read_replies(path: Path) -> dict[int, dict]:
    """The replies that are kept already, by number."""
    parse = partial(check_keys, number=int, content=str, thought=str, finish=str, model=str)
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    found = (parse(parse_json(line, f"{path} line {n}"), f"{path} line {n}") for n, line in lines)
    return {reply["number"]: reply for reply in sorted(found, key=lambda reply: reply["number"])}


def estimate(args, asked: list[dict], todo: list[int], budget: Budget) -> str:
    """What is to be asked and what it will cost, before it starts."""
    prompts = sum(most_tokens(asked[number]["turns"]) for number in todo) // 4
    amount = [len(todo), prompts, len(todo) * args.max_new_tokens]
    said = f"{args.model} at {args.api}: {len(todo):,} of {len(asked):,} requests to make, about "
    said += f"{amount[1]:,} tokens of prompts, at most {amount[2]:,} of replies"
    if any(budget.prices):
        said += f": at most about {weighed(amount, budget.prices):,.4f}"
    limits = [f"--{name} {limit:,}" for name, limit, _ in budget.limits]
    return said + f"; it ends before {' or '.join(limits)} is passed" * bool(limits)


def report(args, counts: dict, cost: float) -> str:
    """What was kept, and why the rest was not."""
    what = "replies" if args.prompts else "new questions"
    told = f"{args.out}: kept {counts['kept']:,} {what} from {counts['replies']:,} replies"
    if reasons := [f"{count:,} {reason}" for reason, count in counts["left_out"].items()]:
        told += f", left out {', '.join(reasons)}"
    spent = [f"{count:,} {name.replace('_', ' ')}" for name, count in counts["spent"].items()]
    told += f"; spent in all {', '.join(spent)}" + f" at a cost of {cost:,.4f}" * (cost > 0)
    if counts["near_the_test"]:
        told += f"; {counts['near_the_test']:,} are near the test and were not asked"
    if counts["failed"]:
        told += f"; {counts['failed']:,} requests failed, and the same command tries them again"
    if name := counts["ended_by"]:
        told += f"; it ended before --{name} {getattr(args, name):,} was passed: raise it to go on"
    return told


def main(args) -> dict:
    check_ranges(args, **RANGES)
    files.check_apart(args, is_folder=False)
    check_flags(args)
    asked, given = requests_of(args)
    tests = read_problems(args.test, need_answer=False) if args.test else []
    test = Near(problem["turns"][-1]["content"] for problem in tests)
    teacher = Teacher(args, Budget(args))
    files.lock(args.out)
    path = Path(f"{args.out}.replies.jsonl")
    if args.out.exists() and not args.overwrite and not Path(f"{path}.progress.json").exists():
        cure = "pass another --out, or --overwrite to replace it"
        raise ValueError(f"{args.out} exists and was not made by this command: {cure}")
    options = {name: str(getattr(args, name)) for name in ASKED}
    read = [args.prompts or args.seeds or args.topics]
    options["made_from"] = files.hashes(*read)
    out = files.GrowingFile(path, options, args.overwrite, **dict.fromkeys(COUNTS, 0))
    teacher.budget.spent = [out.record[name] for name in COUNTS]
    with out.file, closing(teacher):
        rest = sorted(set(range(len(asked))) - read_replies(path).keys())
        todo = rest
        if args.prompts:  # no money for what would not be kept
            todo = [n for n in rest if not test.has(asked[n]["turns"][-1]["content"])]
        print(estimate(args, asked, todo, teacher.budget), flush=True)
        limit, failed = ask_all(teacher, asked, todo, out)
    replies = {n: reply for n, reply in read_replies(path).items() if n < len(asked)}
    if args.prompts:
        lines, left_out = keep_replies(given, replies, args, test)
    else:
        lines, left_out = keep_questions(asked, given, replies, args, test)
    counts = {
        "asked": len(asked) - len(rest) + len(todo),
        "replies": len(replies),
        "kept": len(lines),
    }
    counts["near_the_test"] = len(rest) - len(todo)  # and so not asked
    counts |= {"left_out": dict(left_out.most_common()), "failed": failed, "ended_by": limit}
    counts["spent"] = dict(zip(COUNTS, teacher.budget.spent, strict=True))
    told = report(args, counts, weighed(teacher.budget.spent, teacher.budget.prices))
    if not lines:
        raise ValueError(f"{told}: pass other flags; what came is in {path}, to be chosen from")
    print(told)
    finished = Path(f"{args.out}.finished.json")
    finished.unlink(missing_ok=True)
    with atomic_path(args.out) as temporary, open(temporary, "wb") as file:
        for line in lines:
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))
    options |= {name: str(getattr(args, name)) for name in CHOSEN}
    options["made_from"] = files.hashes(*read, *([args.test] if args.test else []), path)
    models = dict(Counter(reply["model"] for reply in replies.values()))
    files.write_json(finished, {"args": options, **counts, "models": models})
    files.unlock(args.out)
    return counts


if __name__ == "__main__":
    command_line(main, parse_args())
