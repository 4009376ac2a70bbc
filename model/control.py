"""How a model talks: which tokens begin, end and pad, and its chat template, as the files of its
or its tokenizer's folder say.

    generation_config.json    ids; the end of a turn is often named only here (Llama 3, Gemma)
    config.json               ids, of the model before it was taught to talk
    tokenizer_config.json     names, and before it existed special_tokens_map.json

What none of them says follows ChatML's names, and without a tokenizer our own 1, 2 and 0.
"""

from contextlib import suppress
from pathlib import Path

from files import as_value_error, check_file, read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
CURE = "use a model that was taught to chat, or put its chat_template.jinja into the folder"
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # of ChatML: 0, 1, 2


def content_of(folder, name: str) -> dict:
    """The JSON file's object; {} where there is none that can be read."""
    with suppress(ValueError):
        return read_json(Path(folder, name))
    return {}


def named_tokens(folder) -> dict[str, str]:
    """Those of NAMED that a folder gives: {"bos_token": "<s>", ...}."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the later one decides
        content = content_of(folder, file)
        for name in NAMED:
            token = content.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found[name] = token
    return found


def read_template(folder) -> str | None:
    """The source of a folder's chat template. Raises ValueError for what is not one."""
    folder = Path(folder)
    if (path := folder / "chat_template.jinja").exists():
        with as_value_error(f"{path} is not text", "download it again"):
            return check_file(path).read_text("utf-8")
    if not (path := folder / "tokenizer_config.json").is_file():
        return None
    found = read_json(path).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
        found = named.get("default")
        if found is None:
            raise ValueError(f"{path} has no chat template called 'default': {CURE}")
    if not isinstance(found, str | None):
        raise ValueError(f"{path}: chat_template is no text: {CURE}")
    return found


def control_ids(folder) -> dict:
    """bos_token_id and pad_token_id, each an id or None; eos_token_id, the ids that end a turn or a
    text, the most usual first: [] where nothing says one."""
    content = content_of(folder, "tokenizer.json")
    added = content.get("added_tokens")
    vocab = content["model"].get("vocab") if isinstance(content.get("model"), dict) else None
    known = dict(vocab) if isinstance(vocab, dict) else {}
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            known[token["content"]] = token.get("id")
    known = {name: index for name, index in known.items() if type(index) is int}
    if not content:
        known = {END_OF_TEXT: 0, START: 1, END: 2}
    names = named_tokens(folder)
    configs = [content_of(folder, name) for name in ("generation_config.json", "config.json")]

    def ids_of(which: str) -> list[int]:
        """What the files say, up to the first that says one."""
        for config in configs:
            value = config.get(f"{which}_token_id")
            values = value if isinstance(value, list) else [value]
            if ids := [x for x in values if type(x) is int and 0 <= x < 2**31]:
                return ids
        return []

    def first(which: str, usual: str) -> int | None:
        ids = [*ids_of(which), known.get(names.get(f"{which}_token"))]
        if not any(configs):  # of a model that has none, null is kept
            ids.append(known.get(usual))
        return next((x for x in ids if x is not None), None)

    ends = [*ids_of("eos"), *(known.get(x) for x in (names.get("eos_token"), END, END_OF_TEXT))]
    ends = list(dict.fromkeys(x for x in ends if x is not None))
    return {"bos_token_id": first("bos", START), "eos_token_id": ends,
            "pad_token_id": first("pad", END_OF_TEXT)}  # fmt: skip
