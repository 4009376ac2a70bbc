"""Parts of a packed text, for models that each learn from another part."""

import numpy as np
from torch import Tensor

from .packing import PackedText


class PartOfText(PackedText):
    """Some windows of the training text that `args` names: "examples", args.examples of them spread
    over it; "all" but these; or a number: that one of args.parts equal pieces of "all", one after
    another in the text, so of other documents each. Held out is what is held out of the whole text.
    Raises ValueError where there are too few windows."""

    def __init__(self, args, which: int | str):
        super().__init__(args.data, "train", args.seq_len, args.data_share)
        spread = np.unique(np.linspace(0, self.size - 1, args.examples).astype(int))
        rest = np.setdiff1d(np.arange(self.size), spread)
        if len(rest) < args.parts:
            few = f"{args.data}: {self.size} windows of {args.seq_len} tokens are too few for"
            cure = "ask for fewer of both, or lower --seq_len"
            raise ValueError(f"{few} {args.examples} examples and {args.parts} parts: {cure}")
        pieces = dict(enumerate(np.array_split(rest, args.parts)))
        self.windows = {"examples": spread, "all": rest, **pieces}[which]
        self.size = len(self.windows)

    def take(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        return super().take(self.windows[windows])
