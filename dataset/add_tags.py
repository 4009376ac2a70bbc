"""Give a model that others made the four reasoning tags, so that it can learn lesson 3.

    python -m dataset.add_tags --model MODEL --out out/tagged
    python train_distill_reason.py --student out/tagged --out out/reasoner

<think>, </think>, <answer> and </answer> become tokens of its tokenizer (those that are missing),
and each gets a row of the embedding and of the head: a spare one where the model has more rows than
its tokenizer has tokens, as Qwen's have, or a new one. A row begins as the mean of the rows in use:
a token of which nothing is known yet is then about as likely as the average word, where a random
row could be likelier than all (Hewitt 2021, "Initializing new word embeddings").
"""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from torch import nn

import files
from files import command_line
from files.atomic import UNFINISHED, atomic_folder, copy_terms, of_model_in
from model import load_model, save_model
from model.control import content_of

from .tokenizer import TAGS, load_tokenizer


def parse_args(argv=None) -> argparse.Namespace:
    parser = files.new_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    return parser.parse_args(argv)


@torch.no_grad()
def grow_rows(model, tokens: int, new: int) -> None:
    """Give a model whose tokenizer has had `tokens` tokens rows for `new` more, in place: each is
    the mean of the first `tokens` rows."""
    config = model.config
    rows = max(config.vocab_size, tokens + new)
    tied = config.tie_word_embeddings
    for module in [model.model.embed_tokens, *([] if tied else [model.lm_head])]:
        old = module.weight  # (V, D)
        grown = old.new_empty(rows, config.hidden_size)
        grown[: len(old)] = old
        grown[tokens : tokens + new] = old[:tokens].float().mean(0).to(old.dtype)
        module.weight = nn.Parameter(grown)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.config = replace(config, vocab_size=rows)


def main(args) -> None:
    files.check_apart(args)
    known = load_tokenizer(args.model)
    missing = [tag for tag in TAGS if known.token_to_id(tag) is None]
    if not missing:
        raise ValueError(f"{args.model} has the four tags already: use it as it is")
    files.lock(args.out)
    files.check_free(args.out, ("manifest.json", UNFINISHED), args.overwrite)
    if (args.out / "manifest.json").exists() and not args.overwrite:
        raise ValueError(f"{args.out} holds a model: pass --overwrite to replace it")
    model = load_model(args.model, dtype=None)
    tokens, before = known.get_vocab_size(), model.config.vocab_size
    grow_rows(model, tokens, len(missing))
    stale = of_model_in(args.out, "manifest.json")
    with atomic_folder(args.out, "model.safetensors", stale) as out:
        files.copy_tokenizer(args.model, out)
        shutil.copyfile(Path(args.model, "config.json"), out / "config.json")  # its ids are kept
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken(tag, normalized=False) for tag in missing])
        if tokenizer.get_vocab_size() != tokens + len(missing):
            raise ValueError(f"the tokenizer of {args.model} leaves ids out: use another model")
        tokenizer.save(str(out / "tokenizer.json"))
        path = out / "tokenizer_config.json"
        config = content_of(out, path.name)
        if isinstance(listed := config.get("added_tokens_decoder"), dict):
            for tag in missing:
                token = {"content": tag, "lstrip": False, "normalized": False, "rstrip": False}
                token |= {"single_word": False, "special": True}
                listed[str(tokenizer.token_to_id(tag))] = token
            files.write_json(path, config)
        save_model(model, out)
        copy_terms(args.model, out)
    files.unlock(args.out)
    rows = model.config.vocab_size
    grown = f"{rows - before} rows added" if rows > before else "in rows that were spare"
    print(f"{args.out}: {', '.join(missing)} are tokens {tokens} to {tokens + len(missing) - 1}, "
          f"{grown} ({rows:,} in all)")  # fmt: skip


if __name__ == "__main__":
    command_line(main, parse_args())
