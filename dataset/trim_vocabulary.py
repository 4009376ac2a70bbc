"""A model with a smaller vocabulary: the tokens that some data uses, and what spells all others.

    python -m dataset.trim_vocabulary --model TEACHER --data out/data --out out/trimmed
    python -m dataset.prepare --tokenizer out/trimmed --text notes/ --out out/data_trimmed
    python train_distillation.py --data out/data_trimmed --teacher out/trimmed --student layers:15

Most of a small student can be its embedding: SmolLM2's 49,152 tokens of 576 numbers are 28 of 135
million parameters, and its logits the largest tensors of a step. Text of one field needs a part.

Kept are the tokens of the data, all control tokens, the 256 bytes, and what any of those is merged
from: the data is cut into the same tokens as before (dataset/smaller_tokenizer.py), numbered anew
in the same order. A text with other tokens is cut into smaller ones.

Rows of embedding and head go with their tokens. With p the whole model's distribution and P the sum
of p over the kept tokens, what is left computes

    p(v | the token is a kept one) = p(v) / P          its loss = the whole one's - mean(-log P)

The mass 1 - P could be one more outcome, "some other token", with a row of the student's own. By
the chain rule that is, with Q the student's mass of kept tokens,

    KL over kept tokens and rest   = KL(P || Q) + P * KL over kept tokens alone

It would teach how often the teacher meant a token that this data never has, against every label,
and the row would be in the way afterwards. To condition on what is known is simpler, and lowers the
teacher's loss on the data, by the mean(-log P) that is printed. A teacher with the whole tokenizer
is cut in the same way where the data was read with the trimmed one (model/vocabulary.py).

trimmed.json has the old id of each token, and what all was made from.
"""

import argparse
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import files
from files import command_line, new_parser, read_json, write_json
from files.atomic import UNFINISHED, atomic_folder, copy_terms, of_model_in
from model import Transformer, load_model, save_model
from model.checkpoint import checkpoint_files
from model.vocabulary import select_rows

from .chat import ChatData, check_conversation
from .packing import PackedText
from .smaller_tokenizer import kept_tokens, trimmed_tokenizer
from .sources import jsonl_texts, read_jsonl
from .tokenizer import TAG_PATTERN, encode_all, load_tokenizer

RECORD = "trimmed.json"
WINDOWS, LENGTH = 16, 128  # of the data, on which the mass of what is left out is measured
BLOCK = 2**24  # tokens of a stream that are looked through at once


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, default=Path("out/teacher"), help="checkpoint folder")
    data = "what is to be read: a folder of dataset.prepare --tokenizer MODEL, or a jsonl"
    add("--data", type=Path, default=Path("out/data"), help=data)
    add("--skip_bad", action="store_true", help="leave out bad lines of a jsonl, and count them")
    add("--out", type=Path, default=Path("out/trimmed"), help="folder to write")
    add("--overwrite", action="store_true", help="replace what was trimmed in --out")
    return parser.parse_args(argv)


def turns_of(value: dict, where: str) -> list[dict]:
    return check_conversation(value, where, need_answer=False)


def ids_of(args, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of the data's texts or conversations; of a prepared folder, of both its streams and its
    problems. Raises ValueError where that was prepared with another tokenizer."""
    if args.data.is_dir():
        text, problems = PackedText(args.data, "train", 1), []
        if text.tokenizer_sha256 != files.tokenizer_hash(args.model):
            cure = f"prepare it with: python -m dataset.prepare --tokenizer {args.model} --out NEW"
            raise ValueError(f"{args.data} was read with another tokenizer: {cure}")
        for path in sorted(args.data.glob("reason_*.jsonl")):
            for turn in chain(*read_jsonl(path, turns_of)):
                problems.append(f"{turn['role']}\n{turn['content']}")  # as a user's is read
                problems += TAG_PATTERN.split(turn["content"])  # as an assistant's is
        return [text.held_out.stream, text.stream, *map(np.array, encode_all(tokenizer, problems))]
    with open(files.check_file(args.data, "pass a prepared folder or a jsonl"), "rb") as file:
        is_chat = b'"conversations"' in file.readline()
    if is_chat:
        chats = ChatData(args.data, args.model, "train", 10**9, 0.0, skip_bad=args.skip_bad)
        # Labels are shifted: the last one may be a token that no input is.
        return [
            torch.cat((ids, labels[labels >= 0][-1:])).numpy() for ids, labels in chats.examples
        ]
    texts = [text for _, text in jsonl_texts(args.data, args.skip_bad)]
    return list(map(np.array, encode_all(tokenizer, texts)))


def named_ids(config: dict) -> dict[str, list[int]]:
    """The token ids that a config.json or generation_config.json names: bos_token_id, ..."""
    named = {name: value for name, value in config.items() if name.endswith("_token_id")}
    named = {k: value if isinstance(value, list) else [value] for k, value in named.items()}
    return {k: [index for index in value if type(index) is int] for k, value in named.items()}


@torch.no_grad()
def left_out(model: Transformer, rows: list[int], stream: np.ndarray) -> tuple[float, float]:
    """Over windows of the data: the mean mass 1 - P that `model` gives to tokens that are not
    `rows`, and mean(-log P), nats per token."""
    length = min(LENGTH, len(stream))
    starts = np.unique(np.linspace(0, len(stream) - length, WINDOWS).astype(int))
    logs = []
    for start in starts:
        ids = torch.from_numpy(stream[start : start + length].astype(np.int64))[None]
        log_probs = model(ids).float().log_softmax(-1)  # (1, S, V)
        logs.append(log_probs[..., rows].logsumexp(-1).double().clamp(max=0).flatten())
    log_kept = torch.cat(logs)
    return float((1 - log_kept.exp()).mean()), float(-log_kept.mean())


def write_trimmed(folder: Path, out: Path, model: Transformer, kept: dict[str, int]) -> None:
    """`model`, which has the rows of `kept`, and its tokenizer, to `out`; `folder`: where the whole
    one lies. Its own begin, end and padding ids, chat template and licence go along."""
    content = read_json(folder / "tokenizer.json")
    moved = {old: number for number, old in enumerate(kept.values())}
    files.copy_tokenizer(folder, out)
    write_json(out / "tokenizer.json", trimmed_tokenizer(content, kept))
    if (path := out / "tokenizer_config.json").is_file():
        config = read_json(path)
        if isinstance(by_id := config.get("added_tokens_decoder"), dict):
            numbers = {i: moved[int(i)] for i in by_id if i.isdigit() and int(i) in moved}
            config["added_tokens_decoder"] = {str(new): by_id[i] for i, new in numbers.items()}
        write_json(path, config)
    own = {}
    for path in (out / "config.json", out / "generation_config.json"):
        if (folder / path.name).is_file():
            before = read_json(folder / path.name)
            ids = {k: [moved[i] for i in v if i in moved] for k, v in named_ids(before).items()}
            ids = {k: v if type(before[k]) is list else (v or [None])[0] for k, v in ids.items()}
            own[path] = before | ids
            write_json(path, own[path])
    save_model(model, out)  # which keeps the ids that it finds there
    for path in (path for path in own if path.name == "generation_config.json"):
        write_json(path, own[path])  # as it was, with other settings
    copy_terms(folder, out)


def main(args) -> dict:
    files.check_apart(args)
    tokenizer, content = load_tokenizer(args.model), read_json(args.model / "tokenizer.json")
    data = args.data / "meta.json" if args.data.is_dir() else args.data
    documents = ids_of(args, tokenizer)
    read = [*checkpoint_files(args.model), *files.tokenizer_paths(args.model), data]
    made_from = {path.name: files.known_hash(path) for path in read}
    files.lock(args.out, wait=True)
    files.check_free(args.out, (RECORD, UNFINISHED), args.overwrite)
    if (args.out / RECORD).is_file() and not args.overwrite:
        cure = "pass --overwrite to replace it, or another --out"
        before = read_json(args.out / RECORD, made_from=dict, files=dict)
        written = {str(args.out / name): digest for name, digest in before["files"].items()}
        files.check_unchanged(written, args.out, cure)
        if before["made_from"] != made_from:
            raise ValueError(f"{args.out} was trimmed from another model or for other data: {cure}")
        raise files.Finished(f"{args.out}: trimmed already, from the same model and data")
    used = set()
    for ids in documents:
        for start in range(0, len(ids), BLOCK):
            used.update(np.unique(ids[start : start + BLOCK]).tolist())
    for name in ("config.json", "generation_config.json"):
        if (args.model / name).is_file():
            used.update(chain(*named_ids(read_json(args.model / name)).values()))
    kept = kept_tokens(content, used)
    rows, whole = list(kept.values()), load_model(args.model, dtype=None)
    stored = whole.lm_head.weight.dtype
    size, parameters = tokenizer.get_vocab_size(), whole.num_parameters()
    stream = documents[0] if args.data.is_dir() else np.concatenate(documents[:1000])
    mass, nats = left_out(select_rows(whole, range(size)).float(), rows, stream)
    model = select_rows(whole, rows).to(stored)
    record = {
        "made_from": made_from, "tokens_before": size, "tokens": len(rows),
        "mass_left_out": mass, "nats_left_out": nats, "kept": rows,
    }  # fmt: skip
    with atomic_folder(args.out, RECORD, of_model_in(args.out, RECORD)) as out:
        write_trimmed(args.model, out, model, kept)
        written = {path.name: files.file_hash(path) for path in sorted(out.iterdir())}
        write_json(out / RECORD, record | {"files": written})
    files.unlock(args.out)
    fewer = f"{size:,} -> {len(rows):,} tokens, {parameters:,} -> {model.num_parameters():,}"
    others = f"the others had {mass:.2%} of the model's mass on this data"
    print(f"{args.out}: {fewer} parameters; {others}, {nats:.4f} nats per token")
    if len(rows) == size:
        print(f"the data uses every token: {args.model} would have served as well")
    return record


if __name__ == "__main__":
    command_line(main, parse_args())
