"""A field to learn, which every Python carries: the language's own reference, as help() shows it.

    python -m dataset.python_docs                      # writes out/python_docs
    python -m dataset.prepare --jsonl out/python_docs/train.jsonl \\
        --held_out out/python_docs/held_out.jsonl --tokenizer TEACHER --out out/field

pydoc_data.topics holds some 80 topics (0.46 MB in CPython 3.11), each a page; whole pages are held
out. Pages quote one another: of a held-out tenth three quarters would be in the training text too,
word for word. So a paragraph (or an example) of a held-out page is taken out of the others, and of
one that training pages share the first is kept.
"""

import argparse
import json
from pathlib import Path

import files
from files import check_ranges, command_line, new_parser
from files.atomic import UNFINISHED, atomic_folder

from .sources import SHORT, split_documents

NAMES = ("train.jsonl", "held_out.jsonl")


def split_pages(pages: list[tuple[str, str]], val_share: float) -> tuple[list[str], list[str]]:
    """Training and held-out pages of (name, text), which share no paragraph longer than SHORT; a
    page of which nothing is left is left out."""
    training, held_out = split_documents(pages, val_share)
    seen = {p.strip() for text in held_out for p in text.split("\n\n")}
    left = []
    for text in training:
        kept = []
        for paragraph in text.split("\n\n"):
            words = paragraph.strip()
            if len(words) <= SHORT or words not in seen:
                kept.append(paragraph)
                seen.add(words)
        if any(len(paragraph.strip()) > SHORT for paragraph in kept):
            left.append("\n\n".join(kept))
    return left, held_out


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/python_docs"), help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    share = "share of the text that is held out"
    parser.add_argument("--val_share", type=float, default=0.1, help=share)
    return parser.parse_args(argv)


def main(args) -> None:
    check_ranges(args)
    files.check_apart(args)
    try:
        from pydoc_data.topics import topics
    except ImportError:
        bare = "this Python has no pydoc_data.topics, the text of help()"
        raise ValueError(f"{bare}: use one of python.org, or prepare a text of your own") from None
    files.lock(args.out, wait=True)
    is_ours = files.check_free(args.out, (*NAMES, UNFINISHED), args.overwrite)
    split, written = split_pages(sorted(topics.items()), args.val_share), {}
    for name, texts in zip(NAMES, split, strict=True):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        written[name] = "".join(lines).encode("utf-8")
    if is_ours and not args.overwrite:
        paths = {name: args.out / name for name in NAMES}
        if all(p.is_file() and p.read_bytes() == written[name] for name, p in paths.items()):
            raise files.Finished(f"{args.out}: there already, the same")
        raise ValueError(f"{args.out} holds another text: pass --overwrite to replace it")
    with atomic_folder(args.out, last=NAMES[-1]) as out:  # never one of this and one of that
        for name, content in written.items():
            (out / name).write_bytes(content)
    files.unlock(args.out)
    pages = " and ".join(f"{len(texts)} pages, {sum(map(len, texts)):,} characters ({name})"
                         for name, texts in zip(NAMES, split, strict=True))  # fmt: skip
    print(f"{args.out}: {pages}")


if __name__ == "__main__":
    command_line(main, parse_args())
