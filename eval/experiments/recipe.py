"""One field, end to end: a language model that others trained, and students that know the field.

    python -m eval.experiments.recipe                      # Python's own documentation
    python -m eval.experiments.recipe --text my_notes/     # your folder of .txt and .md files

Each stage is a command of this project, printed before it runs in a process of its own; what is
done is not done again. docs/recipe.md tells them one by one.

    whole       the teacher as it comes (dataset.fetch_teacher)
    trimmed     with the tokens that the field uses (dataset.trim_vocabulary)
    adapted     trimmed, and taught the field's text through an adapter (methods.lora)
    plain       a student of --layers of the adapted teacher's layers, which learns from labels
    distilled   the same student, half from labels, half from what the adapted teacher said once
                (dataset.teacher_cache, methods.cached_teacher): as many tokens as plain
    plain, equal seconds    plain, for as long as the cache and distilled took together

results.csv has for each: bits per byte on held-out text of the field, and off it on Shakespeare's
plays (what was forgotten); tokens per second of one greedy continuation; megabytes of the file as
bfloat16, int8 and int4, embedding included, and the field's loss with weights rounded to these.
answers.md has what each answers to twenty questions, or to those of --questions.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dataset.sources import text_paths
from files import (
    atomic_path,
    check_apart,
    check_ranges,
    command_line,
    hashes,
    lock,
    new_parser,
    read_json,
    write_json,
)  # fmt: skip
from model import number_of_layers
from model.checkpoint import checkpoint_files
from model.device import keep_freed_memory
from model.prune import even_layers

from .recipe_table import MODELS, answers, measure, summary, write_csv

RANGES = {"adapt_steps": (1, 10**6), "layers": (1, 1000), "windows": (1, 10**6)}


def commands(root: Path, args) -> Iterator[tuple[str, list[str]]]:
    """(what it makes, its command) of each stage, in order."""
    teacher, text, trimmed = args.teacher or root / "teacher", args.text, root / "trimmed"
    if args.teacher is None:
        yield "teacher", ["-m", "dataset.fetch_teacher", "--out", teacher]
    even_layers(args.layers, number_of_layers(teacher))  # raises for too many, before the work
    few = ["--problems", 20, "--prompts", 5, "--test_problems", 5]
    field = ["--text", text]
    if text is None:
        docs = root / "python_docs"
        yield "python_docs", ["-m", "dataset.python_docs", "--out", docs]
        field = ["--jsonl", docs / "train.jsonl", "--held_out", docs / "held_out.jsonl"]

    def prepare(name: str, tokenizer: Path, source: list) -> tuple[str, list]:
        more = ["--tokenizer", tokenizer, *few, "--out", root / name]
        return name, ["-m", "dataset.prepare", *source, *more]

    yield prepare("whole_data", teacher, field)
    words = ["--model", teacher, "--data", root / "whole_data", "--out", trimmed]
    yield "trimmed", ["-m", "dataset.trim_vocabulary", *words]
    yield prepare("data", trimmed, field)
    other = ["--text", args.other] if args.other else ["--cache", root / "cache"]
    yield prepare("whole_other", teacher, other)
    yield prepare("other", trimmed, other)
    data = ["--data", root / "data", "--seq_len", args.seq_len]
    budget = ["--batch_size", 8, "--warmup", 5, "--eval_every", 10**6, "--final_eval", 16]
    adapted, cache, budget = root / "adapted", root / "sample.cache", data + budget
    own = ["--student", trimmed, "--teacher", trimmed, "--teacher_steps", 0, "--alpha", 1.0]
    own += ["--rank", 8, "--learning_rate", 0.001, "--steps", args.adapt_steps]
    yield "adapted", ["-m", "methods.lora", *own, *budget, "--out", adapted]
    words = ["--teacher", adapted, *data, "--method", "sample", "--k", 64, "--out", cache]
    yield "sample.cache", ["-m", "dataset.teacher_cache", *words]
    pair = ["--teacher", adapted, "--student", f"layers:{args.layers}", *budget]
    steps, seed = ["--steps", args.steps], ["--seed", args.seed]
    words = [*pair, *steps, *seed, "--teacher_cache", cache, "--out", root / "distilled"]
    yield "distilled", ["-m", "methods.cached_teacher", *words]
    labels = ["train_distillation.py", *pair, *seed, "--alpha", 1.0]
    yield "plain", [*labels, *steps, "--out", root / "plain"]
    took = read_json(root / "stages.json")
    seconds = read_json(root / "distilled" / "run.json")["seconds"]
    seconds += took["sample.cache"]["seconds"]
    words = ["--seconds", f"{max(1, seconds):.0f}", "--out", root / "plain_longer"]
    yield "plain_longer", [*labels, *words]


def run_stages(root: Path, args) -> None:
    """Run what is not done yet; stages.json has the command of each, and the seconds it took.
    Raises ValueError where a stage was done by another command, or fails."""
    path, cure = root / "stages.json", "pass another --root, or delete this one"
    done = read_json(path) if path.is_file() else {}
    write_json(path, done)
    check_inputs(root / "inputs.json", args, cure)
    for name, words in commands(root, args):
        command = shlex.join(["python", *map(str, words)])
        before, spent = done.get(name), 0.0
        if before is not None and before.get("finished", True):
            if before["command"] != command:
                other = f"{root / name} was made by another command ({before['command']})"
                raise ValueError(f"{other}: {cure}")
            continue
        if before is not None and before["command"] == command:  # it goes on
            spent = before["seconds"]
        begun = any((root / name / part).exists() for part in ("resume", "run.json"))
        more = ["--resume"] if begun else []
        print(f"\n$ {command}", *more, flush=True)
        started, code = time.perf_counter(), None
        try:
            code = run_command([*map(str, words), *more])
        finally:
            if code != 2:  # which is a mistake, and no work
                spent += time.perf_counter() - started
                about = {"command": command, "seconds": round(spent, 1), "finished": code == 0}
                write_json(path, done := done | {name: about})
        if code:
            raise ValueError(f"the command above ended with exit code {code}: see what it says")


def check_inputs(path: Path, args, cure: str) -> None:
    """Raise ValueError where the user's texts or teacher are not those of the first call, whose
    stages are not run again."""
    read = [] if args.teacher is None else checkpoint_files(args.teacher)
    for text in filter(None, (args.text, args.other)):
        read += text_paths(text)
    now = hashes(*read)
    before = read_json(path) if path.is_file() else now
    if other := sorted(k for k in before | now if before.get(k) != now.get(k)):
        raise ValueError(f"{path.parent} was made from other content: {other[0]} differs; {cure}")
    write_json(path, now)


def run_command(words: list[str]) -> int:
    """Its exit code. A process of its own: what it takes of memory is given back."""
    return subprocess.run([sys.executable, *words]).returncode


def parse_args(argv=None):
    parser = new_parser(__doc__, **RANGES)
    add = parser.add_argument
    add("--teacher", type=Path, help="checkpoint folder; default: fetched (SmolLM2-135M-Instruct)")
    add("--text", type=Path, help="the field: a text or a folder; default Python's documentation")
    add("--other", type=Path, help="a text off the field; default Shakespeare's plays")
    add("--root", type=Path, default=Path("out/recipe"), help="folder of all that is made")
    add("--results", type=Path, help="folder of results.csv and answers.md; default ROOT/results")
    asked = "text file, one on a line, to ask all models; default: of Python, without --text"
    add("--questions", type=Path, help=asked)
    add("--layers", type=int, default=15, help="of the student")
    add("--adapt_steps", type=int, default=50, help="of the teacher's adapter")
    add("--steps", type=int, default=100, help="of the students, 8 sequences each")
    add("--seq_len", type=int, default=128, help="tokens of a sequence")
    add("--windows", type=int, default=64, help="held-out sequences of the field, at most")
    add("--seed", type=int, default=0, help="of the students' batches")
    return parser.parse_args(argv)


def main(args) -> list[dict]:
    check_ranges(args, **RANGES)
    args.results = args.results or args.root / "results"
    for flag, mark in (("root", "stages.json"), ("results", "results.csv")):
        folder = getattr(args, flag)
        texts = {"text": args.text, "other": args.other, "questions": args.questions}
        check_apart(argparse.Namespace(**{flag: folder}, **texts), flag=flag)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
            others = f"--{flag} {folder} holds files that this command did not make"
            raise ValueError(f"{others}: pass another --{flag}")
        lock(folder)
    keep_freed_memory()
    run_stages(args.root, args)
    rows = [measure(args.root, name, args) for name in MODELS]
    took = read_json(args.root / "stages.json")
    write_csv(args.results / "results.csv", rows)
    texts = {"table.md": summary(rows, took)}
    if args.questions is not None or args.text is None:
        texts["answers.md"] = answers(args.root, args)
    for name, text in texts.items():
        with atomic_path(args.results / name) as temporary:
            temporary.write_text(text, "utf-8")
    print(f"\n{texts['table.md']}\n{args.results}: results.csv, {', '.join(texts)}")
    return rows


if __name__ == "__main__":
    command_line(main, parse_args())
