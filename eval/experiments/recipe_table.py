"""What the recipe's models can do: measured, asked, and in a table (recipe.py)."""

import csv
import time
from pathlib import Path

import torch

from dataset import PackedText
from dataset.chat import encode_prompt, stop_ids
from dataset.sources import read_text
from dataset.tokenizer import decode, encode, load_tokenizer
from eval.report import table
from files import atomic_path, read_json
from model import Transformer, generate, load_model
from model.device import choose_device, describe_device
from model.quantize import quantized_weights, save_quantized
from run import evaluate

WORDS, ANSWER, OFF_FIELD = 64, 48, 48  # tokens that are timed, of an answer; windows off the field
MODELS = {  # the folder of each
    "whole": "teacher", "trimmed": "trimmed", "adapted": "adapted", "plain": "plain",
    "distilled": "distilled", "plain, equal seconds": "plain_longer",
}  # fmt: skip
QUESTIONS = """
What does the pass statement do?
What is a lambda expression?
How do I raise an exception?
What does the with statement do?
What is the difference between a list and a tuple?
What does the nonlocal statement do?
How do I catch an exception?
What does the del statement do?
What is a dictionary?
What does the yield expression do?
What is the value of an empty list in a boolean test?
How do I write a comment?
What does the global statement do?
What is the difference between break and continue?
What does the assert statement do?
How do I define a class?
What is slicing?
What does the import statement do?
What is None?
What does the operator ** compute?
""".strip().splitlines()


def folder_of(root: Path, name: str, args) -> Path:
    return Path(args.teacher or root / "teacher") if name == "whole" else root / MODELS[name]


@torch.no_grad()
def measure(root: Path, name: str, args) -> dict:
    """The row of one model."""
    folder = folder_of(root, name, args)
    prefix, device = "whole_" if name == "whole" else "", choose_device("auto")
    model, row = load_model(folder, device), {"model": name}
    record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
    row |= {key: record.get(key, "") for key in ("tokens", "seconds", "flops", "peak_memory_mb")}
    row["parameters"] = model.num_parameters()
    field = PackedText(root / f"{prefix}data", "val", args.seq_len)
    other = PackedText(root / f"{prefix}other", "val", args.seq_len)
    for place, text, most in (("field", field, args.windows), ("other", other, OFF_FIELD)):
        found = evaluate(model, text.evaluation(8, most), text.bytes_per_token)
        row |= {
            f"{place}_loss": found["val_loss"],
            f"{place}_bits_per_byte": found["bits_per_byte"],
        }
    prompt = field.stream[:32].tolist()
    started = time.perf_counter()
    made = sum(map(len, generate(model, [prompt], WORDS, stop_ids=())))
    row["tokens_per_second"] = made / (time.perf_counter() - started)
    row["bfloat16_mb"] = 2 * model.num_parameters() / 1e6
    for bits in (8, 4):
        row[f"int{bits}_mb"] = save_quantized(model, root, bits, embeddings=True) / 1e6
        rounded = Transformer(model.config).to(device).eval()
        rounded.load_state_dict(quantized_weights(model, bits, True), strict=False)
        found = evaluate(rounded, field.evaluation(8, args.windows), field.bytes_per_token)
        row[f"int{bits}_bits_per_byte"] = found["bits_per_byte"]
    (root / "quantized.safetensors").unlink()
    return {**row, "seed": args.seed, "device": describe_device(device)}


def answers(root: Path, args) -> str:
    """Markdown: each question, of --questions or about Python, and the beginning of what each model
    writes to it, greedily. The teacher as it comes is asked in its chat template, too, if it has
    one."""
    written, questions, before = {}, QUESTIONS, "In Python: "
    if args.questions is not None:
        lines = read_text(args.questions).splitlines()
        questions, before = [line.strip() for line in lines if line.strip()], ""
    for name in MODELS:
        folder = folder_of(root, name, args)
        model, tokenizer = load_model(folder, choose_device("auto")), load_tokenizer(folder)
        prompts = [encode(tokenizer, f"Question: {q}\nAnswer:") for q in questions]
        asked = {name: prompts}
        if name == "whole":
            chat = [[{"role": "user", "content": before + q}] for q in questions]
            try:
                asked["whole, in a chat"] = [encode_prompt(tokenizer, turns) for turns in chat]
            except ValueError as error:
                print(f"not asked in a chat: {error}")
        for how, prompts in asked.items():
            found = generate(model, prompts, ANSWER, stop_ids=stop_ids(tokenizer))
            written[how] = [decode(tokenizer, ids) for ids in found]
    blocks = []
    for number, question in enumerate(questions):
        lines = [f"## {question}", ""]
        for name, texts in written.items():
            text = " ".join(texts[number].split("Question:")[0].split()).replace("`", "'")
            lines.append(f"- {name}: `{text or '(nothing)'}`")
        blocks.append("\n".join(lines))
    title = f"# Answers\n\nGreedy, {ANSWER} tokens, after `Question: ...` and `Answer:`.\n"
    return "\n\n".join([title.rstrip(), *blocks]) + "\n"


def write_csv(path: Path, rows: list[dict]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        short = ({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows)
        writer.writerows(short)


def summary(rows: list[dict], took: dict) -> str:
    """The table that is printed, and how long the stages took."""
    columns = ["model", "M parameters", "seconds", "bits/byte: field", "int8", "int4",
               "bits/byte: off it", "tokens/s", "MB: bf16", "int8", "int4"]  # fmt: skip
    cells = []
    for row in rows:
        seconds = f"{row['seconds']:.0f}" if row["seconds"] else "-"
        names = ("field", "int8", "int4", "other")
        field, int8, int4, other = (f"{row[f'{name}_bits_per_byte']:.3f}" for name in names)
        sizes = [f"{row[f'{name}_mb']:.0f}" for name in ("bfloat16", "int8", "int4")]
        cells.append([row["model"], f"{row['parameters'] / 1e6:.1f}", seconds, field, int8, int4,
                      other, f"{row['tokens_per_second']:.1f}", *sizes])  # fmt: skip
    spent = {name: stage["seconds"] / 60 for name, stage in took.items()}
    minutes = ", ".join(f"{name} {minutes:.1f}" for name, minutes in spent.items())
    total = sum(spent.values())
    return f"{table(columns, cells)}\n\nMinutes of each stage: {minutes}; together {total:.0f}.\n"
