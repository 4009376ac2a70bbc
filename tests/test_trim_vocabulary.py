"""A trimmed vocabulary: the data's texts are cut into the same tokens, the rows that are left give
the conditional distribution, and what is written is a model and tokenizer like any other."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

import train_distillation
from dataset import prepare, trim_vocabulary
from dataset.packing import PackedText
from dataset.smaller_tokenizer import kept_tokens, parts_of, trimmed_tokenizer
from dataset.tokenizer import CHAT_TEMPLATE, decode, encode, load_tokenizer, train_tokenizer
from files import Finished, read_json, write_json
from model import ModelConfig, Transformer, load_for, load_model, save_model
from model.vocabulary import kept_rows, vocabulary
from tests.conftest import WORDS, small_text
from tests.robustness.test_bad_input import snapshot
from tests.short_runs import run, same_bits

FEW = ["--problems", 30, "--prompts", 3, "--test_problems", 5]
CASES = 60


@pytest.fixture(scope="module")
def whole():
    """Of 700 tokens, also of words that no other text here has."""
    rng, syllables = random.Random(0), "ba ke lo mi su tra von pel qui zar dol fen".split()
    words = ["".join(rng.choices(syllables, k=3)) for _ in range(400)]
    tokenizer = train_tokenizer([small_text(0), small_text(1), " ".join(words)], 700)
    assert tokenizer.get_vocab_size() == 700
    return tokenizer


def parsed(tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def trimmed_for(tokenizer, texts) -> tuple[Tokenizer, list[int]]:
    """The trimmed tokenizer, and the old ids of its tokens."""
    used = {index for text in texts for index in encode(tokenizer, text)}
    kept = kept_tokens(parsed(tokenizer), used)
    small = Tokenizer.from_str(json.dumps(trimmed_tokenizer(parsed(tokenizer), kept)))
    small.encode_special_tokens = True
    return small, list(kept.values())


def some_text(rng: random.Random) -> str:
    """Words, halves of words, letters of any script, digits and spaces."""
    odd = ["é", "字", "🙂", "\n", "  ", "q", "x9", "17", "<think>", "<|im_end|>", "kingking"]
    words = [word[: rng.randint(1, len(word))] for word in WORDS.split()] + odd
    words += ["".join(rng.choices(["ba", "ke", "lo", "tra"], k=3)) for _ in range(9)]
    return rng.choice(["", " "]).join(rng.choices(words, k=rng.randint(1, 25)))


@pytest.mark.parametrize("seed", range(5))
def test_texts_are_cut_into_the_same_tokens(seed, whole):
    """Those that it was trimmed for, and every other whose tokens are left; no text is lost."""
    rng = random.Random(seed)
    texts = [some_text(rng) for _ in range(CASES)]
    small, old = trimmed_for(whole, texts[: CASES // 4])
    assert small.get_vocab_size() == len(old) < whole.get_vocab_size()
    same, others = 0, 0
    for number, text in enumerate(texts):
        ids, expected = encode(small, text), encode(whole, text)
        assert decode(small, ids) == text
        is_kept = set(expected) <= set(old)
        assert is_kept or number >= CASES // 4, "a token of the data is gone"
        assert not is_kept or [old[index] for index in ids] == expected
        same, others = same + is_kept, others + (not is_kept)
    assert same > CASES // 4 and others, "the test has no text of the other kind"


def test_several_merges_of_one_token():
    """As in vocabularies that tiktoken made, where "abc" is a + bc and ab + c: which one is used
    depends on what was learned first, and its parts must stay."""
    letters = {letter: i for i, letter in enumerate("abcd")}
    vocab = letters | {"ab": 4, "bc": 5, "abc": 6, "cd": 7, "abcd": 8}
    merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c"), ("c", "d"), ("ab", "cd")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    assert parts_of("abc", ranks) == {"a", "b", "c", "bc", "abc"}, "ab is not on its way"
    assert parts_of("abcd", ranks) >= {"abcd", "bc"}
    for text in ("abc", "cd", "abcabc", "bcd"):
        kept = kept_tokens(parsed(tokenizer), set(tokenizer.encode(text).ids))
        small = Tokenizer.from_str(json.dumps(trimmed_tokenizer(parsed(tokenizer), kept)))
        assert small.encode(text).tokens == tokenizer.encode(text).tokens
    kept = kept_tokens(parsed(tokenizer), {6})
    assert set(kept) == {"a", "b", "c", "d", "bc", "abc"}, "d is a byte, ab is on no way"
    small = trimmed_tokenizer(parsed(tokenizer), kept)
    assert [tuple(pair) for pair in small["model"]["merges"]] == [("b", "c"), ("a", "bc")]


def test_control_tokens_wherever_they_are_named(whole):
    content = parsed(whole)
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [
            {"type": "RobertaProcessing", "sep": ["<|im_end|>", 2], "cls": ["<|im_start|>", 1]},
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "</answer>", "type_id": 0}}],
                "special_tokens": {
                    "</answer>": {"id": "</answer>", "ids": [6], "tokens": ["</answer>"]}
                },
            },
        ],
    }
    size = len(vocabulary(content))
    last = {**content["added_tokens"][0], "content": "<last>", "id": size}  # outside the model
    content["added_tokens"].append(last)
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    kept = kept_tokens(content, {400, 410})
    small = trimmed_tokenizer(content, kept)
    ids = vocabulary(small)
    assert sorted(ids.values()) == list(range(len(ids)))
    assert [ids[token["content"]] for token in content["added_tokens"]] == [*range(7), len(ids) - 1]
    assert all(token["id"] == ids[token["content"]] for token in small["added_tokens"])
    first, second = small["post_processor"]["processors"]
    assert first["sep"] == ["<|im_end|>", 2] and first["cls"] == ["<|im_start|>", 1]
    assert second["special_tokens"]["</answer>"]["ids"] == [6]
    content["post_processor"]["processors"][0]["sep"] = ["<last>", size]
    moved = trimmed_tokenizer(content, kept)["post_processor"]["processors"][0]["sep"]
    assert moved == ["<last>", len(ids) - 1]
    content["post_processor"]["processors"][0]["sep"] = ["x", 420]
    with pytest.raises(ValueError, match="names the id 420, of no control token"):
        trimmed_tokenizer(content, kept)


def test_only_plain_byte_pair_encoding():
    for model in ({"type": "Unigram", "vocab": []}, {"type": "WordPiece", "vocab": {}}):
        with pytest.raises(ValueError, match=f"type {model['type']} cannot be trimmed"):
            kept_tokens({"model": model}, set())


# The command.


@pytest.fixture(scope="module")
def world(tmp_path_factory, whole):
    """A teacher with ids, template and licence of its own, and text that needs a part of it."""
    world = tmp_path_factory.mktemp("trim")
    folder = world / "teacher"
    folder.mkdir()
    whole.save(str(folder / "tokenizer.json"))
    by_id = {str(i): {"content": "x"} for i in (0, 6)}
    about = {
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": by_id,
        "eos_token": "<|im_end|>",
    }
    write_json(folder / "tokenizer_config.json", about)
    torch.manual_seed(0)
    config = ModelConfig(720, 32, 3, 2, 1, 16, 48, tie_word_embeddings=False)  # 20 rows too many
    model = Transformer(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # far from even
    save_model(model.bfloat16(), folder)
    config = read_json(folder / "config.json")
    end = whole.token_to_id("Ġking")
    write_json(folder / "config.json", config | {"eos_token_id": end})
    write_json(folder / "generation_config.json", {"eos_token_id": [end, 0], "pad_token_id": 0})
    (folder / "manifest.json").unlink()  # of another config.json
    (folder / "LICENSE").write_text("Apache-2.0")
    (world / "notes").mkdir()
    for number in range(4):
        lines = small_text(number, 40).replace("king", "hat").replace("star", "gem")
        (world / "notes" / f"{number}.txt").write_text(lines, "utf-8")
    prepared(world, folder, "data")
    run(trim_vocabulary, *paths(world))
    prepared(world, world / "small", "data_small")
    return world


def prepared(world, tokenizer, name) -> None:
    run(prepare, "--tokenizer", tokenizer, "--text", world / "notes", "--out", world / name, *FEW)


def paths(world, out="small") -> list:
    return ["--model", world / "teacher", "--data", world / "data", "--out", world / out]


def test_the_data_has_the_same_tokens_renumbered(world):
    record = read_json(world / "small" / "trimmed.json")
    old = np.array(record["kept"])
    assert (np.diff(old) > 0).all() and len(old) == record["tokens"] < 700
    for split in ("train", "val"):
        before, now = (PackedText(world / x, split, 8).stream for x in ("data", "data_small"))
        np.testing.assert_array_equal(old[now], before)
    assert kept_rows(world / "teacher", world / "small") == record["kept"]
    small, whole = (load_tokenizer(world / x) for x in ("small", "teacher"))
    for line in (world / "data" / "reason_test.jsonl").read_text("utf-8").splitlines():
        for turn in json.loads(line)["conversations"]:  # the problems are data, too
            ids = encode(small, f"{turn['role']}\n{turn['content']}")
            assert old[ids].tolist() == encode(whole, f"{turn['role']}\n{turn['content']}")


def test_the_files_are_a_checkpoint_like_any_other(world):
    small, model = load_tokenizer(world / "small"), load_model(world / "small")
    end = small.token_to_id("Ġking")
    assert end is not None, "no text has it, but config.json names it"
    config = read_json(world / "small" / "config.json", eos_token_id=int)
    assert config["eos_token_id"] == end and config["dtype"] == "bfloat16"
    generation = read_json(world / "small" / "generation_config.json")
    assert generation["eos_token_id"] == [end, 0] and generation["pad_token_id"] == 0
    about = read_json(world / "small" / "tokenizer_config.json")
    assert about["chat_template"] == CHAT_TEMPLATE and about["added_tokens_decoder"].keys() == {
        "0",
        "6",
    }
    assert (world / "small" / "LICENSE").read_text() == "Apache-2.0"
    kept = read_json(world / "small" / "trimmed.json")["kept"]
    before = load_model(world / "teacher")
    for name, weight in model.state_dict().items():
        rows = kept if "embed" in name or "lm_head" in name else slice(None)
        assert torch.equal(weight, before.state_dict()[name][rows])
    assert model.config.vocab_size == small.get_vocab_size() == len(kept)


def test_what_is_left_is_the_conditional_distribution(world):
    """In float64: p(v) / P of the whole model's tokens, and the chain rule with one rest."""
    record = read_json(world / "small" / "trimmed.json")
    kept, text = record["kept"], PackedText(world / "data", "val", 32)
    whole = load_for(world / "teacher", text).double()
    small = load_for(world / "teacher", PackedText(world / "data_small", "val", 32)).double()
    ids, labels = next(text.evaluation(4, 4))
    new = torch.full((700,), -1).scatter(0, torch.tensor(kept), torch.arange(len(kept)))
    with torch.no_grad():
        p, conditional = whole(ids).softmax(-1), small(new[ids]).softmax(-1)
    P = p[..., kept].sum(-1)
    torch.testing.assert_close(conditional, p[..., kept] / P[..., None], rtol=1e-10, atol=1e-14)
    chosen = (p.gather(-1, labels[..., None]), conditional.gather(-1, new[labels][..., None]))
    whole_loss, small_loss = (-x.log().mean() for x in chosen)
    torch.testing.assert_close(small_loss, whole_loss + P.log().mean(), rtol=1e-10, atol=0)
    # KL over kept tokens and one rest, against a q of its own, is what the docstring says.
    q = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double().softmax(-1)
    Q = q[..., kept].sum(-1)
    rest = (1 - P) * ((1 - P) / (1 - Q)).log()
    with_rest = (p * (p / q).log())[..., kept].sum(-1) + rest
    of_masses = P * (P / Q).log() + rest
    alone = (conditional * (conditional / (q[..., kept] / Q[..., None])).log()).sum(-1)
    torch.testing.assert_close(with_rest, of_masses + P * alone, rtol=1e-9, atol=1e-12)


def test_the_mass_that_is_printed(world, capsys):
    """Over windows of the held-out stream, written out with torch's own softmax."""
    record = run(trim_vocabulary, *paths(world, "again"))
    stream, whole = PackedText(world / "data", "val", 8).stream, load_model(world / "teacher")
    logs = []
    for start in np.linspace(0, len(stream) - 128, 16).astype(int):
        ids = torch.tensor(stream[start : start + 128].astype(int))[None]
        with torch.no_grad():
            p = whole(ids)[..., :700].softmax(-1)  # 20 rows have no token
        logs.append(p[..., record["kept"]].sum(-1).log())
    logs = torch.cat(logs)
    assert record["mass_left_out"] == pytest.approx(float((1 - logs.exp()).mean()), rel=1e-4)
    assert record["nats_left_out"] == pytest.approx(float(-logs.mean()), rel=1e-4)
    said = capsys.readouterr().out
    assert f"700 -> {record['tokens']} tokens" in said and record["mass_left_out"] > 0.01
    assert f"{record['mass_left_out']:.2%}" in said and f"{record['nats_left_out']:.4f}" in said


STEPS = "--steps 2 --batch_size 2 --seq_len 32 --eval_every 2 --warmup 1 --final_eval 4"
STEPS = f"{STEPS} --device cpu --dtype float32 --alpha 0.5".split()


def test_the_whole_teacher_teaches_like_the_trimmed_one(world):
    """Data of the trimmed tokenizer: the teacher with the whole one is cut where it is loaded."""
    for name in ("small", "teacher"):
        words = ["--data", world / "data_small", "--teacher", world / name, *STEPS]
        out = world / f"by_{name}"
        record = run(train_distillation, *words, "--student", "layers:2", "--out", out)
        assert record["config"]["vocab_size"] == read_json(world / "small/trimmed.json")["tokens"]
    assert same_bits(world / "by_small", world / "by_teacher")


def test_where_nothing_was_won_it_says_so(world, tmp_path, capsys):
    """The trimmed teacher, once more: its data, in its own tokens, uses all that is left."""
    prepared(world, world / "small", "small data")
    words = ["--model", world / "small", "--data", world / "small data", "--out", tmp_path / "out"]
    before, after = load_model(world / "small"), run(trim_vocabulary, *words)
    assert after["tokens"] == after["tokens_before"]
    assert f"{world / 'small'} would have served as well" in capsys.readouterr().out
    for name, weight in load_model(tmp_path / "out").state_dict().items():
        assert torch.equal(weight, before.state_dict()[name])


def test_jsonl_of_texts_and_of_conversations(world, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "the sea sings to the ship"}\n', "utf-8")
    turns = [{"role": "user", "content": "the sea?"}, {"role": "assistant", "content": "sings"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(
        json.dumps({"conversations": turns})
        + "\n"
        + json.dumps({"conversations": [turns[0], {**turns[1], "content": "the old stone"}]})
        + "\n",
        "utf-8",
    )
    whole = load_tokenizer(world / "teacher")
    for path, used in ((texts, "the sea sings to the ship"), (chats, "the old stone")):
        out = tmp_path / path.stem
        run(trim_vocabulary, "--model", world / "teacher", "--data", path, "--out", out)
        small = load_tokenizer(out)
        tokens = [whole.id_to_token(index) for index in encode(whole, used)]
        assert [small.id_to_token(index) for index in encode(small, used)] == tokens


def test_refusals_and_a_second_call(world, tmp_path):
    with pytest.raises(Finished, match="trimmed already, from the same model and data"):
        run(trim_vocabulary, *paths(world))
    other = shutil.copytree(world / "data", tmp_path / "other")
    shutil.copytree(world / "small", tmp_path / "small")
    meta = read_json(other / "meta.json")
    write_json(other / "meta.json", meta | {"note": 1})
    words = ["--model", world / "teacher", "--data", other, "--out", tmp_path / "small"]
    before = snapshot(tmp_path / "small")
    with pytest.raises(ValueError, match="was trimmed from another model or for other data"):
        run(trim_vocabulary, *words)
    assert snapshot(tmp_path / "small") == before
    run(trim_vocabulary, *words, "--overwrite")
    (tmp_path / "small" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="small/model.safetensors has changed .*--overwrite"):
        run(trim_vocabulary, *words)
    with pytest.raises(ValueError, match="holds files that this command did not make"):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "x").write_text("x")
        run(trim_vocabulary, *words[:-1], tmp_path / "mine")
    with pytest.raises(ValueError, match="was read with another tokenizer: prepare it with"):
        run(trim_vocabulary, *words[:3], world / "data_small", "--out", tmp_path / "new")
    with pytest.raises(ValueError, match="would write where --model"):
        run(trim_vocabulary, *words[:-1], world / "teacher", "--overwrite")
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        (bad := tmp_path / "bad.jsonl").write_text('{"text": "a"}\nx\n')
        run(trim_vocabulary, *words[:3], bad, "--out", tmp_path / "new")
    run(trim_vocabulary, *words[:3], bad, "--out", tmp_path / "new", "--skip_bad")


def test_a_chat_template_of_another_day_is_another_model(world, tmp_path):
    """Also one that goes: what is left of the model before would be read as the new one's."""
    model = shutil.copytree(world / "teacher", tmp_path / "model")
    words = ["--model", model, "--data", world / "data", "--out", tmp_path / "small"]
    (model / "chat_template.jinja").write_text("{{ 7 }}")
    (model / "NOTICE.txt").write_text("by others")
    run(trim_vocabulary, *words)
    assert (tmp_path / "small" / "NOTICE.txt").is_file()
    for name in ("chat_template.jinja", "tokenizer_config.json", "NOTICE.txt"):
        (model / name).unlink()
    with pytest.raises(ValueError, match="was trimmed from another model"):
        run(trim_vocabulary, *words)
    run(trim_vocabulary, *words, "--overwrite")
    left = {path.name for path in (tmp_path / "small").iterdir()}
    assert left.isdisjoint(["chat_template.jinja", "tokenizer_config.json", "NOTICE.txt"])
    load_model(tmp_path / "small")


def test_two_tokenizers_are_not_a_part_of_each_other(world, tmp_path):
    """Fewer tokens are not enough: other merges, another cut into words, or another order of the
    same tokens would give a teacher inputs that it does not know."""
    content = read_json(world / "small" / "tokenizer.json")
    assert kept_rows(world / "small", world / "teacher") is None, "the larger of the smaller"
    broken = read_json(world / "teacher" / "tokenizer.json")
    broken["model"]["vocab"]["a"] = ["not", "an", "id"]
    write_json(tmp_path / "tokenizer.json", broken)
    assert kept_rows(tmp_path, world / "small") is None

    def changed(**more) -> Path:
        write_json(tmp_path / "tokenizer.json", content | more)
        return tmp_path

    assert kept_rows(world / "teacher", changed()) is not None
    whole = read_json(world / "teacher" / "tokenizer.json")
    assert kept_rows(world / "teacher", changed(**whole)) == list(range(700)), "but for line ends"
    assert kept_rows(world / "teacher", changed(pre_tokenizer=None)) is None
    added = [{**token, "lstrip": True} for token in content["added_tokens"]]
    assert kept_rows(world / "teacher", changed(added_tokens=added)) is None
    model = content["model"]
    swapped = model | {"merges": [model["merges"][1], model["merges"][0], *model["merges"][2:]]}
    assert kept_rows(world / "teacher", changed(model=swapped)) is None
    first, second = list(model["vocab"])[-2:]
    ids = model["vocab"] | {first: model["vocab"][second], second: model["vocab"][first]}
    assert kept_rows(world / "teacher", changed(model=model | {"vocab": ids})) is None
    assert kept_rows(world / "teacher", changed(model={"type": "BPE", "vocab": []})) is None
