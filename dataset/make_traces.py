"""A teacher writes reasoning traces for problems that have no gold trace.

    python -m dataset.make_traces --teacher out/reason_teacher      # writes out/traces.jsonl
    python train_distill_reason.py --data out/traces.jsonl --out out/from_teacher

The student then learns from the teacher's words alone (sequence-level distillation: Kim & Rush
2016, 1606.07947). --keep verified keeps a trace if its answer is the problem's, --keep all any, but
none that was cut at --max_new_tokens; --samples > 1 gives every problem several tries. A second
call resumes after the last whole chunk, if teacher and prompts are still the same.

A teacher that others made writes its answers in a form of its own (--answer_form, see
dataset/answers.py), and may have to be asked for it; the traces do not repeat that:

    python -m dataset.make_traces --teacher MODEL --max_new_tokens 600 --answer_form gsm8k \\
        --system "Think step by step. End with #### and the number."
"""

import argparse
import json
from pathlib import Path

import torch

import files
from files import check_ranges, command_line
from files.progress import progress_bar
from model import load_model
from model.checkpoint import checkpoint_files
from model.device import choose_device, keep_freed_memory

from .answers import FORMS, check_form, is_answer
from .chat import with_system
from .replies import MAX_NEW_TOKENS, read_problems, write_replies
from .tokenizer import decode, load_tokenizer

CHUNK, OF_LARGE = 1000, 20  # problems between two writes; of a teacher that takes minutes for them
LARGE = 20_000_000  # parameters
TEMPERATURES = (0.0, 10.0)  # of sampling


def parse_args(argv=None) -> argparse.Namespace:
    parser = files.new_parser(__doc__, temperature=TEMPERATURES)
    add = parser.add_argument
    add("--teacher", default="out/reason_teacher", help="checkpoint folder")
    add("--prompts", default="out/data/reason_prompts.jsonl", help="problems")
    add("--out", type=Path, default=Path("out/traces.jsonl"), help="jsonl to write")
    add("--samples", type=int, default=1, help="tries for a problem")
    add("--temperature", type=float, default=0.0, help="of sampling; 0: greedy")
    limit = "of one trace; those that are cut here are counted, and not kept"
    add("--max_new_tokens", type=int, default=MAX_NEW_TOKENS, help=limit)
    add("--keep", choices=("verified", "all"), default="verified", help="traces of right answers")
    add("--answer_form", choices=FORMS, default="tags", help="where the answer stands in a trace")
    add("--system", default=None, help="words to tell the teacher first; default its template's")
    add("--seed", type=int, default=0, help="of sampling")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--overwrite", action="store_true", help="replace the traces in --out")
    return parser.parse_args(argv)


def main(args) -> dict:
    check_ranges(args, temperature=TEMPERATURES)
    files.check_apart(args, is_folder=False)
    keep_freed_memory()
    device = choose_device(args.device)
    if args.samples > 1 and args.temperature == 0:
        same = f"--samples {args.samples} at --temperature 0 writes one trace several times"
        raise ValueError(f"{same}: raise --temperature (0.7, say)")
    problems = read_problems(args.prompts)
    check_form(problems if args.keep == "verified" else [], args.answer_form)
    teacher, tokenizer = load_model(args.teacher, device), load_tokenizer(args.teacher)
    files.lock(args.out)
    left_out, finished = ("out", "device", "overwrite"), Path(f"{args.out}.finished.json")
    options = {k: str(v) for k, v in vars(args).items() if k not in left_out}
    read = [*checkpoint_files(args.teacher), *files.tokenizer_paths(args.teacher), args.prompts]
    options["made_from"] = files.hashes(*read)
    if args.overwrite:
        finished.unlink(missing_ok=True)
    counts = dict.fromkeys(("problems", "written", "kept", "cut"), 0)
    out = files.GrowingFile(args.out, options, args.overwrite, **counts)
    size = CHUNK if teacher.num_parameters() < LARGE else OF_LARGE
    first, kept, cut = (out.record[name] for name in ("problems", "kept", "cut"))
    written, done = args.samples * len(problems), args.samples * first
    with out.file, progress_bar(written, args.out.name, done, unit="trace") as bar:
        for start in range(first, len(problems), size):
            chunk = problems[start : start + size]
            found, more = traces(teacher, tokenizer, chunk, args, args.seed * 10**6 + start, bar)
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in found)
            out.file.writelines(line.encode("utf-8") for line in lines)
            last, kept, cut = start + len(chunk), kept + len(found), cut + more
            out.commit(problems=last, written=last * args.samples, kept=kept, cut=cut)
    cuts = f"; {cut:,} were cut at {args.max_new_tokens} tokens" if cut else ""
    print(f"{args.out}: kept {kept:,} of {written:,} traces ({kept / written:.1%}){cuts}")
    if not kept:
        args.out.unlink()  # or what the advice says would find it in its way
        out.record_path.unlink()
        cure = "raise --max_new_tokens" if 2 * cut > written else "use --keep all"
        raise ValueError(f"no trace of {args.teacher} passed{cuts}: train it longer, or {cure}")
    counts = {name: out.record[name] for name in counts}
    files.write_json(finished, {"args": options, **counts})
    files.unlock(args.out)
    return counts


def traces(teacher, tokenizer, problems, args, seed: int, bar) -> tuple[list[dict], int]:
    """The jsonl lines of the tries that are kept, and how many tries were cut."""
    generator = torch.Generator(device=teacher.lm_head.weight.device).manual_seed(seed)
    tries = [problem for problem in problems for _ in range(args.samples)]
    asked = [{**problem, "turns": with_system(problem["turns"], args.system)} for problem in tries]
    sampling = {"temperature": args.temperature, "generator": generator, "bar": bar}
    kept, cut, most = {}, 0, args.max_new_tokens
    for number, ids in enumerate(write_replies(teacher, tokenizer, asked, most, **sampling)):
        problem, content = tries[number], decode(tokenizer, ids)
        cut += len(ids) == most
        right = is_answer(content, problem["answer"], args.answer_form)
        passed = args.keep == "all" or right
        if passed and content.strip() and len(ids) < most:  # the same words twice are one trace
            turns = [*problem["turns"], {"role": "assistant", "content": content}]
            line = {"conversations": turns, "answer": problem["answer"], "steps": problem["steps"]}
            if args.answer_form != "tags":
                line["answer_form"] = args.answer_form
            kept.setdefault((number // args.samples, content), line)
    return list(kept.values()), cut


if __name__ == "__main__":
    command_line(main, parse_args())
