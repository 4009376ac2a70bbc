"""Promise: a conversation is read as its model's own template says, id for id as transformers does,
and nothing that was typed becomes a control token. The templates are written here."""

import json
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from dataset import prepare
from dataset.chat import ChatData, encode_conversation, encode_prompt, stop_ids, with_system
from dataset.packing import PackedText
from dataset.template import GUARD, OWN, SEAM, read_template, template_of
from dataset.tokenizer import (
    CHAT_TEMPLATE,
    decode,
    encode,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)
from model import ModelConfig, Transformer, save_model
from tests.short_runs import run

IGNORE = -100
TEXT = [
    "the king and the queen saw the ship in the long night 1024 times\n\n",
    "user\nassistant\nsystem\nmodel\n  two  spaces\n\n\n\n    an indent, 17 + 25 = 42\n\n",
    "[INST] hello [/INST] be kind, you are kind. <<SYS>>\n\n<</SYS>> Éire naïve words here\n",
] * 30
CHATML = """
{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{ '<|im_start|>system\n' + 'You are kind.' + '<|im_end|>\n' }}
    {%- endif -%}
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%} {{ '<|im_start|>assistant\n' }} {%- endif -%}
"""
INSTRUCT = """
{%- set ns = namespace(told='') -%}
{%- for m in messages -%}
    {%- if m['role'] == 'system' -%}
        {%- set ns.told = '<<SYS>>\n' ~ m['content'] ~ '\n<</SYS>>\n\n' -%}
    {%- elif m['role'] == 'user' -%}
        {{ bos_token ~ '[INST] ' ~ ns.told ~ m['content'].strip() ~ ' [/INST]' }}
        {%- set ns.told = '' -%}
    {%- else -%}
        {{ ' ' ~ m['content'].strip() ~ ' ' ~ eos_token }}
    {%- endif -%}
{%- endfor -%}
"""
HEADERS = """{{ bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}
{%- generation %}{{ '<|eot_id|>' }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
NO_SYSTEM = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system turn, please') }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% continue %}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}
{{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
BRACKETS = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {%- if loop.index0 and messages[loop.index0 - 1].role == 'user' -%}
            {{ raise_exception('users must wait') }}
        {%- endif -%}
        {{ '[INST]' + m.content + '[/INST]' }}
    {%- elif m.role == 'system' -%} {{ '[SYSTEM_PROMPT]' ~ m.content ~ '[/SYSTEM_PROMPT]' }}
    {%- else -%} {{ m.content + eos_token + bos_token }} {%- endif %}
{%- endfor %}"""
THINKER = """
{%- set ns = namespace(asked=-1) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}
{%- endfor -%}
{%- for m in messages -%}
    {%- set words = m.content -%}
    {%- if m.role == 'assistant' and '</think>' in words and loop.index0 < ns.asked -%}
        {%- set words = words.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {{ '<|im_start|>' ~ m.role ~ '\n' ~ words ~ '<|im_end|>' ~ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%} {{ '<|im_start|>assistant\n' }} {%- endif -%}
"""
JOINED = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
JOINED += "{% endfor %}"
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADER_TOKENS = [BEGIN, END, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
BRACKET_TOKENS = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
FAMILIES = {  # template, control tokens, begin and end, ids that end a reply
    "chatml": (CHATML, CHATML_TOKENS, {"eos_token": "<|im_end|>"}, ["<|im_end|>"]),
    "instruct": (INSTRUCT, ["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"},
                 ["</s>"]),
    "headers": (HEADERS, HEADER_TOKENS, {"bos_token": BEGIN, "eos_token": END}, ["<|eot_id|>"]),
    "no_system": (NO_SYSTEM, ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
                  {"bos_token": {"__type": "AddedToken", "content": "<bos>"}, "eos_token": "<eos>"},
                  ["<end_of_turn>"]),
    "brackets": (BRACKETS, ["<s>", "</s>", *BRACKET_TOKENS],
                 {"bos_token": "<s>", "eos_token": "</s>"}, ["</s>"]),
    "thinker": (THINKER, CHATML_TOKENS, {"eos_token": "<|im_end|>"}, ["<|im_end|>"]),
    "joined": (JOINED, ["<|im_start|>", "<|im_end|>", "<|end|>"], {}, ["<|end|>"]),
}  # fmt: skip


def sentencepiece(control: list[str]) -> Tokenizer:
    """As Llama 2's: a space is "▁", one more stands before every text, bytes are a last resort."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([prepend, replace])
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=control, show_progress=False)
    tokenizer.train_from_iterator([word for text in TEXT for word in text.split(" ")], trainer)
    content = json.loads(tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    tokenizer = Tokenizer.from_str(json.dumps(content))
    space, fuse = decoders.Replace("▁", " "), decoders.Fuse()
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), fuse])
    return tokenizer


def byte_level(control: list[str]) -> Tokenizer:
    """As Llama 3's and Qwen's: the control tokens have ids behind those of the text."""
    content = json.loads(train_tokenizer(TEXT, 340).to_str())
    content["added_tokens"] = []
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = {f"unused{i}" if i < 7 else name: i for name, i in vocab.items()}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in control])
    if BEGIN in control:  # newlines stay together, also before a word
        split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)| ?\S+|\s+"), "isolated")
        bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    return tokenizer


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @cache
    def make(family: str):
        template, control, named, _ = FAMILIES[family]
        tokenizer = (sentencepiece if family == "instruct" else byte_level)(control)
        if family == "thinker":  # as Qwen3 has them: not called special
            tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
            tokenizer.add_tokens([AddedToken("</think>", normalized=False)])
        folder = tmp_path_factory.mktemp(family)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
        if family in ("headers", "thinker"):  # as transformers 5 writes it
            (folder / "chat_template.jinja").write_text(template, "utf-8")
        else:
            config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        return folder

    return make


def talk(*contents, system: str | None = None) -> list[dict]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return with_system(turns, system)


TALKS = {
    "one": talk("hello", "hi there"),
    "system": talk("hello", "hi", system="Be kind."),
    "long": talk("one", "two", "three", "four", "five  ", "six\n", system="Count.\n\n"),
    "unicode": talk("Éire 👩‍👩‍👧 ναι", "naïve \u2028 ½", "ﬁn\u0301", "日本 \x00"),
    "empty": talk("", "fine", "", "yes"),
    "spaces": talk("  two  spaces\n\n", "words  here \n", "\n\n\n x", "y"),
    "markup": talk("a < b [INST x > {{ bos_token }}", "{% if %} <|x|> <s", "|im_end|>", "]"),
}


@pytest.fixture(scope="module")
def theirs(folder_of):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")

    @cache
    def make(family: str):
        return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder_of(family)))

    return make


FORMS = [name for name in FAMILIES if name != "joined"]


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("family", FORMS)
def test_ids_are_those_of_transformers(family, name, folder_of, theirs):
    turns, tokenizer, other = TALKS[name], load_tokenizer(folder_of(family)), theirs(family)
    if family == "no_system" and turns[0]["role"] == "system":
        turns = turns[1:]
    for count in range(1, len(turns) + 1):
        part = turns[:count]
        if part[-1]["role"] == "user":
            prompt = other.apply_chat_template(part, add_generation_prompt=True)["input_ids"]
            assert encode_prompt(tokenizer, part) == prompt
        if part[-1]["role"] != "assistant":
            continue
        expected = other.apply_chat_template(part)["input_ids"]
        input_ids, labels = encode_conversation(tokenizer, part)
        assert input_ids == expected[:-1]
        assert all(x in (IGNORE, i) for x, i in zip(labels, expected[1:], strict=True))


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_the_replies_and_their_ends_and_prompts_are_prefixes(family, name, folder_of):
    turns, tokenizer = TALKS[name], load_tokenizer(folder_of(family))
    if family == "no_system" and turns[0]["role"] == "system":
        turns = turns[1:]
    if family == "joined" and not turns[0]["content"]:
        return  # it writes nothing but the words, and there are none
    input_ids, labels = encode_conversation(tokenizer, turns)
    whole = [*input_ids, IGNORE]
    (ending,) = (tokenizer.token_to_id(name) for name in FAMILIES[family][3])
    expected = []
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        prompt = encode_prompt(tokenizer, turns[:place])
        assert whole[: len(prompt)] == prompt
        learned = labels[len(prompt) - 1 :]
        learned = learned[: learned.index(ending) + 1]
        assert IGNORE not in learned
        expected += learned
        text = decode(tokenizer, learned[:-1])
        assert text.split() == turn["content"].split()  # templates strip, and put a space
        if family in ("chatml", "brackets", "thinker", "joined"):
            assert text == turn["content"]
    assert [x for x in labels if x != IGNORE] == expected


def test_labels_by_hand(folder_of):
    """Of a template without spaces, letter for letter."""
    tokenizer = load_tokenizer(folder_of("brackets"))
    begin, end, ask, asked = (
        tokenizer.token_to_id(name) for name in ("<s>", "</s>", "[INST]", "[/INST]")
    )
    hello, hi, ship = (encode(tokenizer, word) for word in ("hello", "hi", "ship"))
    ids = [begin, ask, *hello, asked, *hi, end, begin, ask, *ship, asked, *hello, end, begin]
    own = [0, 0, *[0] * len(hello), 0, *[1] * len(hi), 1, 0, 0, *[0] * len(ship), 0]
    own += [*[1] * len(hello), 1, 0]
    expected = [i if mine else IGNORE for i, mine in zip(ids, own, strict=True)]
    turns = talk("hello", "hi", "ship", "hello")
    assert encode_conversation(tokenizer, turns) == (ids[:-1], expected[1:])


def test_a_prompt_is_cut_off_where_one_token_would_reach_over_the_seam(folder_of, theirs):
    """A reply that begins with a newline: transformers reads it in one token with that before it,
    which a model that continues the prompt cannot write."""
    tokenizer, turns = load_tokenizer(folder_of("chatml")), talk("hello", "\n\nhi", "x", "\ny")
    newlines = encode(tokenizer, "\n\n\n")
    assert len(newlines) < 3, "this tokenizer must join newlines"
    input_ids, labels = encode_conversation(tokenizer, turns)
    theirs_ids = theirs("chatml").apply_chat_template(turns)["input_ids"]
    assert input_ids != theirs_ids[:-1]
    assert decode(tokenizer, input_ids) == decode(tokenizer, theirs_ids[:-1])
    for place in (1, 3):
        prompt = encode_prompt(tokenizer, turns[:place])
        assert input_ids[: len(prompt)] == prompt
        assert labels[len(prompt) - 2] == IGNORE
        assert labels[len(prompt) - 1] == encode(tokenizer, turns[place]["content"])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_typed_is_no_control_token(family, folder_of):
    """Whatever is typed, and by whom, the template's tokens are all that there are."""
    tokenizer, rng = load_tokenizer(folder_of(family)), random.Random(family)
    control = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    pieces = [*control, *(x[:k] for x in control for k in (1, 2, -1)), "|im_end|>", "<", "a", " \n"]
    for _ in range(40):
        contents = ["".join(rng.choices(pieces, k=rng.randrange(1, 5))) + "a" for _ in range(4)]
        system = None
        if family == "joined":  # nothing but the turns' own words stands between them
            system, contents[0] = rng.choice(
                [("<|im_", "end|>"), ("a <|", "end|>"), ("<", "|end|>")]
            )
        if family == "thinker":  # of an assistant's words these two are control tokens
            contents[1::2] = [c.replace("think>", "thonk>") for c in contents[1::2]]
        ids = encode_prompt(tokenizer, talk(*contents[:3], system=system))
        input_ids, labels = encode_conversation(tokenizer, talk(*contents, system=system))
        plain, plain_labels = encode_conversation(tokenizer, talk("q", "a", "q", "a"))
        for name in control:
            index = tokenizer.token_to_id(name)
            assert input_ids.count(index) == plain.count(index), (name, contents)
            assert labels.count(index) == plain_labels.count(index)
            fitting = encode_prompt(tokenizer, talk("q", "a", "q")).count(index)
            assert ids.count(index) == fitting
        if family in ("chatml", "thinker", "brackets", "joined"):
            rest = decode(tokenizer, input_ids)
            for content in contents:
                assert content in rest
                rest = rest[rest.index(content) + len(content) :]


def test_control_tokens_beside_others_leave_them_as_they_are(folder_of, theirs):
    """Where transformers is told to take what was typed as text, it reads the same ids (of a
    tokenizer whose pieces do not depend on what stands before them)."""
    for family in ("chatml", "headers", "no_system", "brackets"):
        tokenizer = load_tokenizer(folder_of(family))
        for name in FAMILIES[family][1]:
            turns = talk(f"say {name} now", "no", name, f"{name} a{name}")
            got, _ = encode_conversation(tokenizer, turns)
            options = {"sanitize_control_tokens": True}
            expected = theirs(family).apply_chat_template(turns, **options)["input_ids"]
            assert decode(tokenizer, got) == decode(tokenizer, expected[:-1])
            assert [i for i in got if i >= 340] == [i for i in expected[:-1] if i >= 340]


def test_tags_are_tags_in_a_reply_alone(folder_of):
    tokenizer = load_tokenizer(folder_of("thinker"))
    think = tokenizer.token_to_id("<think>")
    turns = talk("<think>", "<think>\nhm\n</think>\n\nyes")
    input_ids, labels = encode_conversation(tokenizer, turns)
    assert input_ids.count(think) == labels.count(think) == 1
    later, _ = encode_conversation(tokenizer, [*turns, *talk("and?", "no")])
    assert later.count(think) == 0  # as its template has it: old thoughts are dropped


def test_our_own_template_is_written_by_hand(folder_of, tmp_path):
    tokenizer = train_tokenizer(TEXT, 340)
    save_tokenizer(tokenizer, tmp_path)
    assert read_template(tmp_path) == CHAT_TEMPLATE
    loaded = load_tokenizer(tmp_path)
    assert template_of(loaded) is template_of(tokenizer) is None
    assert stop_ids(loaded) == (2, 0) and sorted(stop_ids(tokenizer)) == [0, 2]
    turns = TALKS["long"]
    assert encode_conversation(loaded, turns) == encode_conversation(tokenizer, turns)


def test_the_date_is_todays(folder_of, tmp_path):
    from datetime import datetime

    tokenizer = changed(folder_of("chatml"), tmp_path, "{{ strftime_now('%Y') }}" + CHATML)
    text = decode(tokenizer, encode_prompt(tokenizer, talk("q")))
    assert text.startswith(f"{datetime.now().year}<|im_start|>")


# What cannot be read.


def changed(folder, out, template, **config) -> Tokenizer:
    """The folder with another template, in tokenizer_config.json."""
    content = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    content |= {"chat_template": template, **config}
    (out / "tokenizer_config.json").write_text(json.dumps(content), "utf-8")
    (out / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return load_tokenizer(out)


def test_a_system_turn_that_a_template_refuses_is_one_sentence(folder_of):
    tokenizer = load_tokenizer(folder_of("no_system"))
    for call in (encode_conversation, encode_prompt):
        with pytest.raises(ValueError, match=r"\(system, user.*no system turn, please.*leave out"):
            call(tokenizer, TALKS["system"][: 3 if call is encode_conversation else 2])


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% if %}", "is broken"),
        ("{{ messages[0].nothing.more }}", "cannot write these turns"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "cannot write these turns"),
        ("{% for m in messages %}{{ m.content if m.role == 'assistant' }}<|im_end|>{% endfor %}",
         "drops the turn of the user"),
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "ends no reply"),
        (CHATML.replace("+ '<|im_end|>'", "+ ('<|im_end|>' if 'words' in message.content else '')"),
         "ends replies by <.im_end.>, but not "),
        (CHATML.replace("assistant\n'", "assistant\n<x>'"), "opens a reply with .*<x>"),
        ([{"name": "tool", "template": CHATML}], "no chat template called 'default'"),
        (7, "is no text"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used_is_refused(template, said, folder_of, tmp_path):
    tokenizer = changed(folder_of("chatml"), tmp_path, template)
    with pytest.raises(ValueError, match=said) as error:
        encode_conversation(tokenizer, TALKS["one"])
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_drops_thoughts_is_no_form_for_them(folder_of, tmp_path):
    """As DeepSeek's: the labels would be of the answer alone, and nothing would say so."""
    template = CHATML.replace("message.content", "message.content.split('</think>')[-1]")
    tokenizer = changed(folder_of("chatml"), tmp_path, template)
    assert template != CHATML
    turns = talk("2?", "<think>\n1+1\n</think>\n2")
    with pytest.raises(ValueError, match="drops the <think> of a reply.*--answers_only"):
        encode_conversation(tokenizer, turns)
    encode_prompt(tokenizer, [*turns, *talk("3?")])  # thoughts of before are not asked for
    encode_conversation(tokenizer, [*turns, *talk("3?", "3")])


def test_one_of_several_templates_is_the_default(folder_of, tmp_path):
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": CHATML}]
    tokenizer = changed(folder_of("chatml"), tmp_path, named)
    expected = encode_conversation(load_tokenizer(folder_of("chatml")), TALKS["one"])
    assert encode_conversation(tokenizer, TALKS["one"]) == expected


def test_a_template_without_an_end_can_still_be_talked_to(folder_of, tmp_path):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    tokenizer = changed(folder_of("chatml"), tmp_path, template, eos_token="<|endoftext|>")
    text = decode(tokenizer, encode_prompt(tokenizer, talk("q", "a", "r")))
    assert text == "user: q\nassistant: a\nuser: r\n"
    assert set(stop_ids(tokenizer)) == {
        tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>")
    }


@pytest.mark.parametrize("odd", [GUARD, OWN, SEAM])
def test_the_characters_that_mark_are_refused_in_a_turn(odd, folder_of):
    tokenizer = load_tokenizer(folder_of("chatml"))
    with pytest.raises(ValueError, match="turn of the user holds U.FDD.*remove it"):
        encode_prompt(tokenizer, talk(f"a{odd}b"))


def test_neither_a_template_nor_chatml_is_no_conversation(folder_of, tmp_path):
    tokenizer = changed(folder_of("headers"), tmp_path, None)
    for call in (encode_conversation, encode_prompt):
        with pytest.raises(ValueError, match="no chat template.*<.im_start.>.*taught to chat"):
            call(tokenizer, TALKS["one"][: 2 if call is encode_conversation else 1])


def test_what_pads_a_batch_changes_nothing(folder_of, tmp_path, monkeypatch):
    """Whichever id that is: of a folder of others 0 may be a word."""
    lines = [{"conversations": talk("hello " * n, "hi")} for n in range(1, 5)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    data = ChatData(path, folder_of("headers"), "train", 64, val_share=0.0)
    model, found = Transformer(ModelConfig.preset("nano", data.vocab_size)), []
    for pad in (0, 5, data.vocab_size - 1):
        monkeypatch.setattr("dataset.chat.PAD_ID", pad)
        input_ids, labels = data.batch(0, 4, seed=0)
        assert (input_ids[-1, -1] == pad) and (labels[-1, -1] == IGNORE)
        found.append(model(input_ids)[labels != IGNORE])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", FORMS)
def test_conversations_are_data_whatever_their_form(family, folder_of, tmp_path):
    lines = [{"conversations": talk(f"question {n}", f"answer {n}")} for n in range(20)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    data = ChatData(path, folder_of(family), "train", 64, val_share=0.2)
    named = {"tokenizer.json", "tokenizer_config.json", "chat.jsonl", "chat_template.jinja"}
    assert {Path(name).name for name in data.files} == {
        name for name in named if name == "chat.jsonl" or (folder_of(family) / name).is_file()
    }
    assert data.size + data.held_out.size == 20
    (ending,) = (data.tokenizer.token_to_id(name) for name in FAMILIES[family][3])
    for input_ids, labels in data.evaluation(4, 100):
        assert input_ids.shape == labels.shape
        assert ((labels == ending).sum(1) == 1).all()


@pytest.mark.parametrize("family", ["instruct", "headers"])
def test_a_student_of_prepared_text_talks_and_stops_as_its_tokenizers_model(
    family, folder_of, theirs, tmp_path
):
    """What training saves is read by transformers: the same chat, the same ends."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    source, (_, _, named, (ending,)) = tmp_path / "source", FAMILIES[family]
    shutil.copytree(folder_of(family), source)
    tokenizer = load_tokenizer(source)
    ends = [tokenizer.token_to_id(ending), tokenizer.token_to_id(named["eos_token"])]
    generation = {"eos_token_id": ends, "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "text.txt").write_text("".join(TEXT) * 3, "utf-8")
    words = ["--text", tmp_path / "text.txt", "--tokenizer", source, "--out", tmp_path / "data"]
    words += ["--problems", 9, "--prompts", 3, "--test_problems", 3]
    run(prepare, *words)
    text = PackedText(tmp_path / "data", "train", 16)
    save_model(
        Transformer(ModelConfig.preset("nano", text.vocab_size)), tmp_path / "out", text.folder
    )
    saved = transformers.GenerationConfig.from_pretrained(str(tmp_path / "out"))
    assert saved.eos_token_id == list(dict.fromkeys(ends))
    assert saved.bos_token_id == tokenizer.token_to_id(named["bos_token"])
    assert saved.pad_token_id is None and not saved.do_sample
    other = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "out"))
    turns, own = TALKS["long"], load_tokenizer(tmp_path / "out")
    expected = theirs(family).apply_chat_template(turns)["input_ids"]
    assert other.apply_chat_template(turns)["input_ids"] == expected
    assert encode_conversation(own, turns)[0] == expected[:-1]
    assert set(stop_ids(own)) == set(ends)
