"""A teacher writes reasoning traces for problems that have no gold trace.

    python -m dataset.make_traces --teacher out/reason_teacher      # writes out/traces.jsonl
    python train_distill_reason.py --data out/traces.jsonl --out out/from_teacher

The student then learns from the teacher's words alone (sequence-level distillation: Kim & Rush
2016, 1606.07947). A trace is kept if its answer is the problem's ("--keep verified"), or in any
case ("--keep all"); --samples > 1 gives every problem several tries, of which every different one
that passes is kept.

It is resumable: every batch of problems is added to the end of the output as it is finished, and
a second call of the same command goes on after the last of them.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from model import load_model
from run.files import command_line, hold, read_json, release, sync_folder, write_json
from run.flags import new_parser
from run.setup import choose_device, keep_freed_memory

from .problems import check_response
from .replies import read_problems, write_replies
from .tokenizer import decode, load_tokenizer, tokenizer_hash

CHUNK = 1000  # problems between two writes


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--teacher", default="out/reason_teacher", help="checkpoint folder")
    parser.add_argument("--prompts", default="out/data/reason_prompts.jsonl", help="problems")
    parser.add_argument("--out", type=Path, default=Path("out/traces.jsonl"), help="jsonl to write")
    parser.add_argument("--samples", type=int, default=1, help="tries for a problem, 1 or more")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="of sampling; 0 is greedy; 0 to 10"
    )
    parser.add_argument("--keep", choices=("verified", "all"), default="verified", help="which")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, 0 or more")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args) -> dict:
    keep_freed_memory()
    device = choose_device(args.device)
    if args.samples < 1 or not 0 <= args.temperature <= 10:
        raise ValueError("--samples must be at least 1, --temperature between 0 and 10")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError(
            f"--samples {args.samples} at --temperature 0 would write one trace "
            f"{args.samples} times: raise --temperature (0.7, say)"
        )
    problems = read_problems(args.prompts)
    teacher, tokenizer = load_model(args.teacher, device), load_tokenizer(args.teacher)
    hold(args.out)
    progress_path = args.out.with_name(args.out.name + ".progress.json")
    options = {k: str(v) for k, v in vars(args).items() if k not in ("out", "device")}
    options["tokenizer"] = tokenizer_hash(args.teacher)
    progress = progress_so_far(args.out, progress_path, options)
    write_json(progress_path, progress)  # before the file: a file without it is not ours
    with open(args.out, "ab") as file:
        file.truncate(progress["bytes"])  # what a killed call wrote after its last record
        sync_folder(args.out.parent)
        while progress["problems"] < len(problems):
            first = progress["problems"]
            chunk = problems[first : first + CHUNK]
            for line in traces(teacher, tokenizer, chunk, args, seed=args.seed * 10**6 + first):
                progress["written"] += 1
                if line is not None:
                    progress["kept"] += 1
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())  # the record below must not outlive the lines in a power cut
            progress["problems"] = first + len(chunk)
            progress["bytes"] = file.tell()
            write_json(progress_path, progress)
    share = progress["kept"] / max(1, progress["written"])
    print(
        f"{args.out}: kept {progress['kept']:,} of {progress['written']:,} traces ({share:.1%}) "
        f"of {progress['problems']:,} problems"
    )
    if not progress["kept"]:
        raise ValueError(f"no trace of {args.teacher} passed: train it longer, or use --keep all")
    record = {"args": options, **{k: progress[k] for k in ("problems", "written", "kept")}}
    write_json(args.out.with_name(args.out.name + ".finished.json"), record)
    release(args.out)
    return progress


def progress_so_far(out: Path, progress_path: Path, options: dict) -> dict:
    """Where an earlier call of the same command stopped. Raises ValueError for another's file."""
    nothing = {"options": options, "problems": 0, "written": 0, "kept": 0, "bytes": 0}
    if not progress_path.is_file():
        if out.exists():
            raise ValueError(f"{out} exists and is not a trace file to go on with: pass another")
        return nothing
    progress = read_json(progress_path)
    if progress.keys() != nothing.keys():
        raise ValueError(f"{progress_path} is not the record of a trace file: delete it")
    if progress["options"] != options:
        raise ValueError(
            f"{out} was begun with other flags ({progress['options']}): use those, or another --out"
        )
    if not out.exists():  # deleted: make it again
        return nothing
    if (size := out.stat().st_size) < progress["bytes"]:
        raise ValueError(
            f"{out} has {size:,} bytes, its record says {progress['bytes']:,}: delete it, and the "
            "same command makes it again"
        )
    return progress


def traces(teacher, tokenizer, problems: list[dict], args, seed: int):
    """Yield for every try its jsonl line, or None where it is not kept."""
    generator = torch.Generator(device=teacher.lm_head.weight.device).manual_seed(seed)
    tries = [problem for problem in problems for _ in range(args.samples)]
    replies = write_replies(
        teacher, tokenizer, tries, temperature=args.temperature, generator=generator
    )
    seen = set()
    for number, (problem, ids) in enumerate(zip(tries, replies, strict=True)):
        content = decode(tokenizer, ids)
        question = problem["turns"][-1]["content"]
        answer = check_response(question, content).answer
        passed = args.keep == "all" or (answer is not None and answer == problem["answer"])
        key = (number // args.samples, content)
        if not passed or not content or key in seen:
            yield None
            continue
        seen.add(key)
        turns = [*problem["turns"], {"role": "assistant", "content": content}]
        yield {"conversations": turns, "answer": problem["answer"], "steps": problem["steps"]}


if __name__ == "__main__":
    command_line(main, parse_args())
