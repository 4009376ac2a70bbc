"""A part of a byte-pair tokenizer that cuts some texts into the same tokens as the whole.

Byte-pair encoding starts from single characters and applies, again and again, of all merges that
fit the one that was learned first. What a token was merged from does not depend on what stands
around it, as no merge crossed its ends. So keep the tokens of the texts, all that those are merged
from, and the merges among them: every merge that a text needs is there, none is new, and of those
that fit the first is still the same. Single bytes are kept too, so any other text can be written,
in smaller tokens. Works on the parsed tokenizer.json, of the library `tokenizers`.
"""

from tokenizers import pre_tokenizers

from model.vocabulary import merges_of, vocabulary


def parts_of(token: str, ranks: dict[tuple[str, str], int]) -> set[str]:
    """`token` and all that it is merged from, as byte-pair encoding merges it: of the neighbours
    that have a merge, first those whose merge was learned first, the leftmost of equals."""
    pieces = list(token)
    found = {token, *pieces}
    while len(pieces) > 1:
        places = [ranks.get(pair, len(ranks)) for pair in zip(pieces, pieces[1:], strict=False)]
        if (best := min(places)) == len(ranks):
            break
        i = places.index(best)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        found.add(pieces[i])
    return found


def kept_tokens(content: dict, used: set[int]) -> dict[str, int]:
    """The tokens that are left of a parsed tokenizer.json, and their old ids, in order. Raises
    ValueError for a tokenizer that is not plain byte-pair encoding."""
    model = content["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix"):
        kind = f"{model.get('type')} {model.get('continuing_subword_prefix') or ''}".strip()
        raise ValueError(f"a tokenizer of type {kind} cannot be trimmed, only plain BPE can")
    ids = vocabulary(content)
    ranks = {pair: rank for rank, pair in enumerate(merges_of(content))}
    spelling = [*pre_tokenizers.ByteLevel.alphabet(), *(f"<0x{i:02X}>" for i in range(256))]
    control = [token["content"] for token in content.get("added_tokens") or []]
    kept = {token for token in (*spelling, *control, model.get("unk_token")) if token in ids}
    for token, index in ids.items():
        if index in used and token not in kept:
            kept |= parts_of(token, ranks) & ids.keys()
    return {token: ids[token] for token in sorted(kept, key=ids.get)}


def trimmed_tokenizer(content: dict, kept: dict[str, int]) -> dict:
    """A parsed tokenizer.json with the tokens of `kept` alone, numbered anew in that order. Raises
    ValueError where it puts a token around texts that is not kept."""
    new = {token: number for number, token in enumerate(kept)}
    moved = {old: new[token] for token, old in kept.items()}

    def left(pair) -> bool:
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        return first in new and second in new and first + second in new

    def number(old: int) -> int:
        if old not in moved:
            named = f"the tokenizer's post_processor names the id {old}, of no control token"
            raise ValueError(f"{named}: add that to added_tokens, or leave the post_processor out")
        return moved[old]

    def renumbered(value):  # of a post-processor, which may put control tokens around a text
        if isinstance(value, list):
            if len(value) == 2 and type(value[0]) is str and type(value[1]) is int:  # sep, cls
                return [value[0], number(value[1])]
            return [renumbered(item) for item in value]
        if not isinstance(value, dict):
            return value
        changed = {name: renumbered(item) for name, item in value.items()}
        if isinstance(ids := value.get("ids"), list):
            changed["ids"] = [number(index) for index in ids]
        return changed

    model = content["model"]
    vocab = {token: new[token] for token in model["vocab"] if token in new}
    vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
    added = content.get("added_tokens") or []
    return content | {
        "model": model | {"vocab": vocab, "merges": list(filter(left, model.get("merges") or []))},
        "added_tokens": [{**token, "id": new[token["content"]]} for token in added],
        "post_processor": renumbered(content.get("post_processor")),
        "padding": None, "truncation": None,
    }  # fmt: skip
