"""What a soft label looks like: the teacher's distribution after three real contexts, at several T.

    python -m eval.experiments.soft_labels --preset quick

A rule chooses the contexts among all places of 200 held-out windows. A place counts where the four
likeliest tokens and the true next one are frequent whole words, and the last 45 characters, or what
the window has before it, are a piece of one sentence. Where a text has fewer than three such, as in
Chinese, a place counts where all of this is whole characters; with fewer than three of those, every
place does. Of them it takes those whose entropies at T = 1 are nearest to 0, 3 and 5 nats: the
surest, a middle one, an open one. Rows hold the probabilities of the four likeliest tokens, of the
true next one where it is none of them, and of all others together (`count` of them, rank 0): the
rows of a context and a temperature sum to one.
"""

import re
from collections import Counter

import torch
from torch import Tensor

from dataset.packing import PackedText
from dataset.tokenizer import decode, load_tokenizer
from model import load_model

from .common import experiment_main, teacher_of
from .jobs import run_jobs
from .rows import append_rows, read_rows

TEMPERATURES, ENTROPIES, TOP = (1.0, 2.0, 4.0), (0.0, 3.0, 5.0), 4
WINDOWS, CHARACTERS, FREQUENT = 200, 45, 20
PIECE = re.compile(r"[A-Z]?([a-z ,;:'’-]|\bI\b)+")  # of one sentence, with no name


def frequent_words(text: PackedText, tokenizer, tokens: list[str]) -> Tensor:
    """Which of all tokens are a space and a whole word that the text uses often: (V,), bool."""
    words = Counter(re.findall(r" [A-Za-z]+\b", decode(tokenizer, text.stream.tolist())))
    return torch.tensor([words[token] >= FREQUENT for token in tokens])


def token_text(tokenizer, token: int) -> str:
    """A token as text; if it ends within a character, its bytes: "<e4 ba>"."""
    text, own = decode(tokenizer, [token]), [*range(33, 127), *range(161, 173), *range(174, 256)]
    if "\ufffd" not in text:
        return text
    # A byte-level tokenizer writes a byte as a character: as itself, or as one from 256 on.
    others = [byte for byte in range(256) if byte not in own]
    byte_of = {chr(byte): byte for byte in own}
    byte_of |= {chr(256 + number): byte for number, byte in enumerate(others)}
    name = tokenizer.id_to_token(token)
    return f"<{bytes(byte_of[c] for c in name).hex(' ')}>" if set(name) <= set(byte_of) else name


def choose(teacher, tokenizer, text: PackedText) -> list[tuple[str, Tensor, int]]:
    """The contexts, each with the teacher's logits (V,) and the true next token."""
    ids, labels = next(text.evaluation(WINDOWS, WINDOWS))  # (B, S)
    tokens = [decode(tokenizer, [token]) for token in range(text.vocab_size)]
    words = frequent_words(text, tokenizer, tokens)
    characters = torch.tensor(["\ufffd" not in token and bool(token.strip()) for token in tokens])
    entropy, whole = torch.zeros(ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
    readable = whole.clone()
    for row in range(len(ids)):  # one at a time: logits are large
        logits = teacher(ids[row : row + 1])[0]  # (S, V)
        log_probs = logits.log_softmax(-1)
        entropy[row] = -(log_probs.exp() * log_probs).sum(-1)
        for mask, good in ((whole, words), (readable, characters)):
            mask[row] = good[logits.topk(TOP).indices].all(-1) & good[labels[row]]

    def context(row: int, place: int) -> str:
        words = " ".join(decode(tokenizer, ids[row, : place + 1].tolist()).split())
        return words[-CHARACTERS:].split(" ", 1)[-1]  # from the beginning of a word

    places = [place for place in whole.nonzero().tolist() if PIECE.fullmatch(context(*place))]
    if len(places) < len(ENTROPIES):
        places = [place for place in readable.nonzero().tolist() if "\ufffd" not in context(*place)]
    if len(places) < len(ENTROPIES):
        places = torch.ones_like(whole).nonzero().tolist()
    chosen = []
    for target in ENTROPIES:
        row, place = min(places, key=lambda place: abs(float(entropy[tuple(place)]) - target))
        logits = teacher(ids[row : row + 1, : place + 1])[0, -1]  # (V,)
        chosen.append((context(row, place), logits, int(labels[row, place])))
        places = [place for place in places if context(*place) != chosen[-1][0]]
    return chosen


@torch.no_grad()
def run(scale, results) -> None:
    path = results / "soft_labels" / "results.csv"
    if read_rows(path):
        return
    job = teacher_of(scale, 0)
    run_jobs([job])
    teacher, tokenizer = load_model(job.out), load_tokenizer(job.out)
    rows = []
    contexts = choose(teacher, tokenizer, PackedText(scale.data, "val", scale.seq_len))
    for number, (context, logits, true) in enumerate(contexts, start=1):
        ranked = logits.argsort(descending=True).tolist()
        shown = {token: rank for rank, token in enumerate(ranked, start=1)
                 if rank <= TOP or token == true}  # fmt: skip
        for temperature in TEMPERATURES:
            chances = (logits.double() / temperature).softmax(-1)
            bars = [(rank, token_text(tokenizer, token), 1, float(chances[token]), token == true)
                    for token, rank in shown.items()]  # fmt: skip
            rest = 1 - sum(chance for *_, chance, _ in bars)
            bars.append((0, "", len(ranked) - len(shown), max(0.0, rest), False))
            entropy = float(torch.special.entr(chances).sum())
            for rank, token, count, chance, is_next in bars:
                rows.append({
                    "experiment": "soft_labels", "arm": f"context {number}, T={temperature:g}",
                    "seed": 0, "teacher_params": teacher.num_parameters(),
                    "temperature": temperature, "rank": rank, "token": token, "count": count,
                    "probability": chance, "entropy": entropy, "is_next": int(is_next),
                    "context": context, "command": job.command,
                })  # fmt: skip
    append_rows(path, rows)
    print(f"{path}: written")


if __name__ == "__main__":
    experiment_main(__doc__, run)
