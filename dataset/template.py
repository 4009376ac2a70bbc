"""The chat template of a model that others made: conversations as that model was taught to read.

A template is a small program in the folder (jinja, in tokenizer_config.json or chat_template.jinja)
that writes all turns as one text, control tokens and all. It is rendered as transformers renders
it, in a sandbox, and gives the ids of its `apply_chat_template`, with two exceptions:

    What was typed stays text. Before rendering, a control token written out in a turn gets a
    character in its middle that no text has (GUARD). In what the template then writes, every whole
    control token is the template's own: it is respelled (OWN before it), and the GUARDs go. The
    reader is the folder's tokenizer, whose control tokens are called by that other spelling, so in
    one pass over the whole text it takes the template's for control tokens, and no others. In an
    assistant's turn the four reasoning tags are control tokens too, as in dataset/chat.py.

    A prompt is a prefix of the whole. Where one token would reach over the seam between prompt and
    reply (a newline that ends the one, and one that begins the other), the two are cut there.

Control tokens are those that the tokenizer calls special, those that the template itself writes,
and the tags. A template that gives today's date does so here, too.
"""

import json
import re
from datetime import datetime
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from files import as_value_error, tokenizer_paths
from model.control import CURE, named_tokens, read_template

from .tokenizer import CHAT_TEMPLATE, TAGS

GUARD, OWN, SEAM = "\ufdd0", "\ufdd1", "\ufdd2"  # Unicode's noncharacters: no text has them


def template_of(tokenizer: Tokenizer) -> "Template | None":
    """The template of the folder that `tokenizer` was loaded from; None where there is none, or
    where it is our own, which dataset/chat.py writes by hand."""
    if not hasattr(tokenizer, "template"):
        folder = getattr(tokenizer, "folder", None)
        source = read_template(folder) if folder is not None else None
        is_other = source is not None and source != CHAT_TEMPLATE
        tokenizer.template = Template(tokenizer, source) if is_other else None
    return tokenizer.template


def template_files(tokenizer: Tokenizer) -> list[Path]:
    """The files that conversations are read by; tokenizer.json alone by our own template."""
    if template_of(tokenizer) is None:
        return [Path(tokenizer.folder, "tokenizer.json")]
    return tokenizer_paths(tokenizer.folder)


def compile_template(source: str):
    """A jinja template with what transformers gives one: the same filters, functions, extensions.
    Raises whatever jinja does."""
    import jinja2  # comes with torch
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks the assistant's words for others; here its content alone."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # fmt: skip

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def respelled(tokenizer: Tokenizer, control: set[str]) -> Tokenizer:
    """The same tokenizer, in which each of `control` is called OWN and its name, under its id."""
    content = json.loads(tokenizer.to_str())
    model, added = content["model"], content["added_tokens"]
    for token in added:
        token["content"] = OWN * (token["content"] in control) + token["content"]
    rename = {name: OWN + name for name in control}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {rename.get(name, name): i for name, i in model["vocab"].items()}
    else:  # Unigram: (name, score)
        model["vocab"] = [[rename.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in control:
        model["unk_token"] = rename[model["unk_token"]]
    content["post_processor"] = None  # would add what a template writes itself
    return Tokenizer.from_str(json.dumps(content))


class Template:
    """How a folder's model reads conversations: `encode`, and the ids that end a reply."""

    def __init__(self, tokenizer: Tokenizer, source: str):
        self.what = f"the chat template of '{tokenizer.folder}'"
        added = tokenizer.get_added_tokens_decoder().values()
        control = {token.content for token in added if token.special or token.content in TAGS}
        control |= {x.content for x in added if x.content in source and not x.content.isspace()}
        with as_value_error(f"{self.what} is broken", CURE):
            self.compiled = compile_template(source)
        self.named, self.reader = named_tokens(tokenizer.folder), respelled(tokenizer, control)
        self.reader.add_special_tokens([AddedToken(SEAM, normalized=False)])
        self.seam = self.reader.token_to_id(SEAM)
        self.control, self.typed = any_of(control), any_of(control - {*TAGS})
        self.beginnings = {name[:end] for name in control for end in range(1, len(name))}
        self.longest = max(map(len, control), default=0)
        self.endings = cache(self.find_endings)

    def guard(self, turn: dict) -> dict:
        """The turn, its written-out control tokens broken up, also one that only begins here."""
        content = turn["content"]
        if odd := next((c for c in (GUARD, OWN, SEAM) if c in content), None):
            character = f"U+{ord(odd):04X}, which is no character"
            raise ValueError(f"a turn of the {turn['role']} holds {character}: remove it")
        pattern = self.typed if turn["role"] == "assistant" else self.control
        content = pattern.sub(lambda match: f"{match[0][0]}{GUARD}{match[0][1:]}", content)
        tail = content.rstrip()
        for start in range(max(0, len(tail) - self.longest), len(tail)):
            if tail[start:] in self.beginnings:
                return {**turn, "content": content[: start + 1] + GUARD + content[start + 1 :]}
        return {**turn, "content": content}

    def render(self, turns: list[dict], opening: bool = False) -> str:
        """The text of `turns`; opening: and of the beginning of the assistant's next one. Raises
        ValueError where the template refuses them."""
        names = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
        cannot = f"{self.what} cannot write these turns ({names})"
        with as_value_error(cannot, "leave out what it refuses, or use another model"):
            return self.compiled.render(
                messages=turns, tools=None, documents=None, add_generation_prompt=opening,
                **self.named,
            )  # fmt: skip

    def ids(self, text: str) -> list[int]:
        """Ids of a rendered text; a SEAM in it cuts, and is no token."""
        text = self.control.sub(lambda match: OWN + match[0], text).replace(GUARD, "")
        with as_value_error("the tokenizer cannot read a conversation", "use another"):
            found = self.reader.encode(text, add_special_tokens=False).ids
        return [index for index in found if index != self.seam]

    def find_endings(self, roles: tuple[str, ...], opening: bool = False) -> list[str]:
        """What ends each turn of an assistant: the control token that the template writes behind
        its words ("": none). Raises ValueError where the template drops a turn."""
        words = [{"role": role, "content": f"words{i}here"} for i, role in enumerate(roles)]
        text, found = self.render(words, opening), []
        for i, turn in enumerate(words):
            _, kept, behind = text.partition(turn["content"])
            if not kept:
                cure = "leave such turns out, or use another model"
                raise ValueError(f"{self.what} drops the turn of the {turn['role']}: {cure}")
            if turn["role"] == "assistant":
                # Rendered up to here, so that it is not the beginning of the next turn.
                _, _, alone = self.render(words[: i + 1]).partition(turn["content"])
                ending = self.control.search(alone) and self.control.search(behind)
                found.append(ending[0] if ending else "")
        return found

    def encode(self, turns: list[dict], opening: bool = False) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, and for each whether a model has to write it itself: a reply's
        words and its end. opening: with the beginning of a reply, to generate from. Raises
        ValueError where the template cannot write the turns, drops some, or ends no reply."""
        roles = tuple(turn["role"] for turn in turns)
        endings, turns = self.endings(roles, opening), [self.guard(turn) for turn in turns]
        text, starts = self.render(turns, opening), []
        for place in (i for i, role in enumerate(roles) if role == "assistant"):
            prompt = self.render(turns[:place], opening=True)
            if not text.startswith(prompt):
                other = f"{self.what} opens a reply with {prompt[-20:]!r}, but writes it otherwise"
                cure = "begin the assistant's words as it does, or train on single replies"
                raise ValueError(f"{other} in the whole conversation: {cure}")
            starts.append(len(prompt))
            last = turns[place]["content"]
        written, own = text[: starts[0]] if starts else text, []
        for start, following, ending in zip(starts, [*starts[1:], None], endings, strict=False):
            reply, before = text[start:following], self.ids(written)  # with the prompt of the next
            if not ending and not opening:
                never = "so a student would never learn to stop"
                raise ValueError(f"{self.what} ends no reply by a control token, {never}: {CURE}")
            if self.ids(written + reply)[: len(before)] != before:
                written += SEAM
            lost = [tag for tag in TAGS if following is None and tag in last and tag not in reply]
            if lost and not opening:  # DeepSeek's drops all up to </think>
                cure = "leave such spans out (--answers_only), or use another model"
                raise ValueError(f"{self.what} drops the {lost[0]} of a reply: {cure}")
            if ending not in reply:
                other = f"{self.what} ends replies by {ending}, but not {reply[:40]!r}"
                raise ValueError(f"{other}: leave that out, or use another model")
            end = reply.find(ending) + len(ending)
            learned = len(self.ids(written + reply[:end]))
            own += [False] * (len(before) - len(own)) + [True] * (learned - len(before))
            written += reply
        ids = self.ids(written)
        return ids, own + [False] * (len(ids) - len(own))

    def end_ids(self) -> list[int]:
        """The control tokens that end a reply; [] where the template cannot write one."""
        try:
            (ending,) = self.endings(("user", "assistant"))
        except ValueError:
            return []
        return self.ids(ending)[:1] if ending else []


def any_of(names: set[str]) -> re.Pattern:
    """Matches any of `names`, the longest first, as the tokenizer does."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
