"""A language whose true distribution is known: a random Markov source of order 2, and text of it.

    P(c | a, b) = softmax_c( near[b, c] + far[a, c] + both[a, b, c] )

a and b are the two tokens before c; the three tables are drawn once from a seed, normal with the
deviations NEAR, FAR and BOTH. near and far are what a tiny model learns first; both, a number for
each of 32^3 triples, is what needs size and data.

Real text hides its distribution: a held-out loss is cross-entropy, of which nobody knows how much
is the text's own entropy. Here it is known, so the exact KL(true || student) can be measured.

    python -m dataset.oracle                                  # writes out/oracle
    python train_pretrain.py --data out/oracle --out out/markov
    python train_distillation.py --data out/oracle --teacher out/markov

The folder is like one of dataset.prepare, so every method runs on it with --data out/oracle. Its
text is one stream without ends of documents, its tokenizer has one letter per token and no control
token. meta.json has what rebuilds the source. Shapes: B batch, S sequence, V vocabulary.
"""

import argparse
import bisect
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor

import files
from distill.divergences import forward_kl
from files import check_ranges, command_line, new_parser, read_json, write_json
from files.atomic import TOKENIZER_FILES, atomic_folder, check_keys

from .packing import PackedText, check_prepared

V = 32
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEF"  # of the tokens 0 to V - 1
NEAR, FAR, BOTH = 1.0, 1.0, 1.0
RANGES = {"tokens": (1000, 10**7)}


class MarkovSource:
    """The source of a seed. probs (V, V, V): P(c | a, b) at [a, b, c]; pairs (V, V): how often the
    tokens a, b follow one another in a long text; entropy_rate: nats per token of it. float64."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)
        near, far = NEAR * rng.standard_normal((V, V)), FAR * rng.standard_normal((V, V))
        logits = near + far[:, None] + BOTH * rng.standard_normal((V, V, V))  # (a, b, c)
        self.probs = torch.from_numpy(logits).softmax(-1)
        pairs = torch.full((V, V), V**-2.0, dtype=torch.float64)
        for _ in range(200):  # b, c come next with sum_a pairs(a, b) P(c | a, b)
            pairs = torch.einsum("ab,abc->bc", pairs, self.probs)
        self.pairs = pairs
        self.entropy_rate = float((pairs[..., None] * torch.special.entr(self.probs)).sum())
        self.after_one = torch.einsum("ab,abc->bc", pairs, self.probs) / pairs.sum(0)[:, None]

    def log_probs(self, input_ids: Tensor) -> Tensor:
        """The log of what comes next, as exactly as it can be known: (B, S) -> (B, S, V), float32.
        The first token of a window has an unknown one before it, over which the mean is taken."""
        ids = input_ids.cpu()
        probs = self.probs[ids[:, :-1], ids[:, 1:]]  # (B, S - 1, V)
        probs = torch.cat([self.after_one[ids[:, :1]], probs], dim=1)
        return probs.log().float().to(input_ids.device)

    def sample(self, count: int, seed: int) -> np.ndarray:
        """A text of `count` tokens, (count,): another for each seed."""
        rng = np.random.default_rng([seed, 1])
        cumulative = self.probs.cumsum(-1)[..., :-1].tolist()  # the last one is 1
        a, b = divmod(int(rng.choice(V * V, p=self.pairs.flatten().numpy())), V)
        text = []
        for number in rng.random(count).tolist():
            text.append(a)
            a, b = b, bisect.bisect(cumulative[a][b], number)
        return np.array(text)


def open_source(folder) -> MarkovSource:
    """The source of a folder that this command wrote. Raises ValueError for another folder, and
    where this machine's random numbers give another source."""
    path, make = Path(folder) / "meta.json", "make it again with: python -m dataset.oracle"
    made_from = read_json(path, made_from=dict)["made_from"]
    if "entropy_rate" not in made_from:
        raise ValueError(f"{folder} is not text of a known source: {make}, and pass its --out")
    made_from = check_keys(made_from, path, seed=int, entropy_rate=float)
    source = MarkovSource(made_from["seed"])
    if abs(source.entropy_rate - made_from["entropy_rate"]) > 1e-6:
        raise ValueError(f"{folder} was made by other random numbers than this machine has: {make}")
    return source


@torch.no_grad()
def kl_to_truth(folder, model, seq_len: int = 128, windows: int = 200) -> float:
    """KL(true || model), nats per token: its exact value at every position of some held-out windows
    of the folder, the mean over them. model(input_ids) gives logits (B, S, V)."""
    source, text, values = open_source(folder), PackedText(folder, "val", seq_len), []
    for input_ids, _ in text.evaluation(16, windows):
        input_ids = input_ids.to(next(model.parameters()).device)
        values.append(forward_kl(model(input_ids), source.log_probs(input_ids)).double().flatten())
    return float(torch.cat(values).mean())


def parse_args(argv=None) -> argparse.Namespace:
    parser = new_parser(__doc__, **RANGES)
    parser.add_argument("--out", type=Path, default=Path("out/oracle"), help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument(
        "--tokens", type=int, default=10**6, help="to train on; a tenth is held out"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the source and of the text")
    return parser.parse_args(argv)


def main(args) -> None:
    check_ranges(args, **RANGES)
    files.check_apart(args)
    source = MarkovSource(args.seed)
    made_from = {"seed": args.seed, "tokens": args.tokens, "entropy_rate": source.entropy_rate}
    check_prepared(args.out, made_from, args.overwrite)
    text = source.sample(args.tokens + args.tokens // 10, args.seed).astype(np.uint16)
    with atomic_folder(args.out, "meta.json", stale=TOKENIZER_FILES) as out:
        tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
        tokenizer.decoder = decoders.Fuse()  # no spaces between the letters
        tokenizer.save(str(out / "tokenizer.json"))
        about = {"vocab_size": V, "tokenizer_sha256": files.tokenizer_hash(out)}
        for split, part in (("train", text[: args.tokens]), ("val", text[args.tokens :])):
            with files.atomic_path(out / f"{split}.bin") as temporary:
                part.tofile(temporary)
            digest = files.file_hash(out / f"{split}.bin")
            about[split] = {"dtype": "uint16", "tokens": len(part), "bytes": len(part)}
            about[split] |= {"documents": 1, "sha256": digest}
        write_json(out / "meta.json", {**about, "made_from": made_from})
    files.unlock(args.out)
    print(f"{args.out}: {args.tokens:,} tokens; entropy {source.entropy_rate:.4f} nats per token")


if __name__ == "__main__":
    command_line(main, parse_args())
