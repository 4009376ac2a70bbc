"""A teacher writes reasoning traces for problems that have no gold trace.

    python -m dataset.make_traces --teacher out/reason_teacher      # writes out/traces.jsonl
    python train_distill_reason.py --data out/traces.jsonl --out out/from_teacher

The student then learns from the teacher's words alone (sequence-level distillation: Kim & Rush
2016, 1606.07947). --keep verified keeps a trace if its answer is the problem's, --keep all any;
--samples > 1 gives every problem several tries. A second call resumes after the last whole chunk.
"""

import argparse
import json
import os
from pathlib import Path

import torch

import files
from files import command_line, write_json
from model import load_model
from model.device import choose_device, keep_freed_memory

from .problems import check_response
from .replies import read_problems, write_replies
from .tokenizer import decode, load_tokenizer

CHUNK = 1000  # problems between two writes


def parse_args(argv=None) -> argparse.Namespace:
    parser = files.new_parser(__doc__)
    add = parser.add_argument
    add("--teacher", default="out/reason_teacher", help="checkpoint folder")
    add("--prompts", default="out/data/reason_prompts.jsonl", help="problems")
    add("--out", type=Path, default=Path("out/traces.jsonl"), help="jsonl to write")
    add("--samples", type=int, default=1, help="tries for a problem, 1 or more")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy; 0 to 10")
    add("--keep", choices=("verified", "all"), default="verified", help="which traces")
    add("--seed", type=int, default=0, help="of sampling, 0 or more")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def main(args) -> dict:
    keep_freed_memory()
    device = choose_device(args.device)
    if args.samples < 1 or not 0 <= args.temperature <= 10:
        raise ValueError("--samples must be at least 1, --temperature between 0 and 10")
    if args.samples > 1 and args.temperature == 0:
        same = f"--samples {args.samples} at --temperature 0 writes one trace several times"
        raise ValueError(f"{same}: raise --temperature (0.7, say)")
    problems = read_problems(args.prompts)
    teacher, tokenizer = load_model(args.teacher, device), load_tokenizer(args.teacher)
    files.lock(args.out)
    progress_path = args.out.with_name(f"{args.out.name}.progress.json")
    options = {k: str(v) for k, v in vars(args).items() if k not in ("out", "device")}
    options["tokenizer"] = files.tokenizer_hash(args.teacher)
    progress = progress_so_far(args.out, progress_path, options)
    write_json(progress_path, progress)  # before the file: a file without it is not ours
    with open(args.out, "ab") as file:
        file.truncate(progress["bytes"])  # what a killed call wrote after its last record
        files.sync_folder(args.out.parent)
        while (first := progress["problems"]) < len(problems):
            chunk = problems[first : first + CHUNK]
            kept = traces(teacher, tokenizer, chunk, args, seed=args.seed * 10**6 + first)
            file.writelines(json.dumps(x, ensure_ascii=False).encode("utf-8") + b"\n" for x in kept)
            file.flush()
            os.fsync(file.fileno())  # the record below must not outlive the lines in a power cut
            progress["problems"] += len(chunk)
            progress["written"] += len(chunk) * args.samples
            progress["kept"] += len(kept)
            progress["bytes"] = file.tell()
            write_json(progress_path, progress)
    kept, written = progress["kept"], progress["written"]
    print(f"{args.out}: kept {kept:,} of {written:,} traces ({kept / max(1, written):.1%})")
    if not kept:
        raise ValueError(f"no trace of {args.teacher} passed: train it longer, or use --keep all")
    record = {"args": options, **{k: progress[k] for k in ("problems", "written", "kept")}}
    write_json(args.out.with_name(f"{args.out.name}.finished.json"), record)
    files.unlock(args.out)
    return progress


def progress_so_far(out: Path, progress_path: Path, options: dict) -> dict:
    """Where this command stopped before. Raises ValueError for another's file."""
    nothing = {"options": options, "problems": 0, "written": 0, "kept": 0, "bytes": 0}
    progress = files.read_json(progress_path) if progress_path.is_file() else nothing
    if progress is nothing and out.exists():
        raise ValueError(f"{out} exists and is not a trace file to go on with: pass another")
    if progress.keys() != nothing.keys():
        raise ValueError(f"{progress_path} is not the record of a trace file: delete it")
    if progress["options"] != options:
        other = f"{out} was begun with other flags ({progress['options']})"
        raise ValueError(f"{other}: use those, or another --out")
    if not out.exists():
        return nothing
    if (size := out.stat().st_size) < progress["bytes"]:
        short = f"{out} has {size:,} bytes, its record says {progress['bytes']:,}"
        raise ValueError(f"{short}: delete it, and the same command makes it again")
    return progress


def traces(teacher, tokenizer, problems: list[dict], args, seed: int) -> list[dict]:
    """The jsonl lines of the tries that are kept."""
    generator = torch.Generator(device=teacher.lm_head.weight.device).manual_seed(seed)
    tries = [problem for problem in problems for _ in range(args.samples)]
    sampling = {"temperature": args.temperature, "generator": generator}
    kept = {}
    for number, ids in enumerate(write_replies(teacher, tokenizer, tries, **sampling)):
        problem, content = tries[number], decode(tokenizer, ids)
        answer = check_response(problem["turns"][-1]["content"], content).answer
        passed = args.keep == "all" or (answer is not None and answer == problem["answer"])
        if passed and content:  # the same words twice are one trace
            turns = [*problem["turns"], {"role": "assistant", "content": content}]
            line = {"conversations": turns, "answer": problem["answer"], "steps": problem["steps"]}
            kept.setdefault((number // args.samples, content), line)
    return list(kept.values())


if __name__ == "__main__":
    command_line(main, parse_args())
