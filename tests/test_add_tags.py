"""Promise: a model gets the four tags, computes what it computed before, and can learn lesson 3."""

import hashlib
import json

import pytest
import torch

import train_distill_reason
from dataset import add_tags
from dataset.tokenizer import TAGS, load_tokenizer, save_tokenizer, train_tokenizer
from files import read_json
from model import ModelConfig, Transformer, load_model, save_model
from tests.short_runs import run

SMALL = ["--steps", 2, "--batch_size", 2, "--seq_len", 128, "--device", "cpu", "--warmup", 1]


def make_model(folder, rows: int = 0, dtype=torch.float32, tied=True, known=()):
    """A model of 300 tokens, none of the tags but `known`, and at least 300 rows."""
    content = json.loads(train_tokenizer(["the sea, 12 ships and 7 kings\n"] * 9, 300).to_str())
    vocab = content["model"]["vocab"]
    names = {tag: f"unused{i}" for i, tag in enumerate(TAGS) if tag not in known}
    content["model"]["vocab"] = {names.get(token, token): i for token, i in vocab.items()}
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in names]
    folder.mkdir()
    save_tokenizer(train_tokenizer(["x"], 263), folder)  # for its tokenizer_config.json
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    tokens = load_tokenizer(folder).get_vocab_size()
    torch.manual_seed(0)
    config = ModelConfig(rows or tokens, 16, 2, 2, 1, 8, 32, 256, tie_word_embeddings=tied)
    save_model(Transformer(config).to(dtype), folder)
    return folder, tokens


def hashes_of(folder) -> dict:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [0, 2, 40])
def test_rows_are_the_mean_and_the_others_stay(tied, spare, tmp_path, capsys):
    folder, tokens = make_model(tmp_path / "model", 0, tied=tied)
    if spare:
        folder, tokens = make_model(tmp_path / "padded", tokens + spare, tied=tied)
    before, old = hashes_of(folder), load_model(folder)
    run(add_tags, "--model", folder, "--out", tmp_path / "tagged")
    new, tokenizer = load_model(tmp_path / "tagged"), load_tokenizer(tmp_path / "tagged")
    rows = tokens + max(spare, 4)
    assert new.config.vocab_size == read_json(tmp_path / "tagged/config.json")["vocab_size"] == rows
    assert [tokenizer.token_to_id(tag) for tag in TAGS] == [tokens + i for i in range(4)]
    for name in ("model.embed_tokens", "lm_head"):
        a, b = (model.get_submodule(name).weight for model in (old, new))
        assert torch.equal(b[:tokens], a[:tokens])
        assert torch.equal(b[tokens + 4 :], a[tokens + 4 :])
        mean = sum(row.double() for row in a[:tokens]) / tokens
        assert (b[tokens : tokens + 4].double() - mean).abs().max() < 1e-6
    ids = torch.tensor([[5, 17, 99]])
    assert torch.equal(new(ids)[..., :tokens], old(ids)[..., :tokens])
    assert hashes_of(folder) == before
    added = f"{4 - spare} rows added" if spare < 4 else "in rows that were spare"
    assert added in capsys.readouterr().out


def test_dtype_ids_and_template_are_kept_and_known_tags_too(tmp_path):
    folder, tokens = make_model(tmp_path / "model", 0, torch.bfloat16, known=TAGS[:2])
    (folder / "chat_template.jinja").write_text("{{ 7 }}")
    config = read_json(folder / "config.json") | {"bos_token_id": None, "eos_token_id": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    (folder / "manifest.json").unlink()  # of another config.json
    listed = {"added_tokens_decoder": {"0": {"content": "<|endoftext|>"}}, "eos_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(listed))
    run(add_tags, "--model", folder, "--out", tmp_path / "tagged")
    out, tokenizer = tmp_path / "tagged", load_tokenizer(tmp_path / "tagged")
    assert [tokenizer.token_to_id(tag) for tag in TAGS] == [3, 4, tokens, tokens + 1]
    assert load_model(out, dtype=torch.bfloat16).config.vocab_size == tokens + 2
    saved = read_json(out / "config.json")
    assert (saved["dtype"], saved["bos_token_id"], saved["eos_token_id"]) == ("bfloat16", None, 8)
    assert (out / "model.safetensors").stat().st_size < 1.1 * (
        folder / "model.safetensors").stat().st_size  # fmt: skip
    assert (out / "chat_template.jinja").read_text() == "{{ 7 }}"
    decoder = read_json(out / "tokenizer_config.json")["added_tokens_decoder"]
    assert decoder[str(tokens)]["content"] == "<answer>" and decoder[str(tokens)]["special"]


def test_lesson_3_learns_with_them_and_without_names_the_command(tmp_path):
    folder, _ = make_model(tmp_path / "model")
    turns = [{"role": "user", "content": "2+2?"}]
    turns += [{"role": "assistant", "content": "<think>\n2\n</think>\n<answer>\n4\n</answer>"}]
    asked = [[{**turns[0], "content": f"{n}?"}, turns[1]] for n in range(20)]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps({"conversations": x}) + "\n" for x in asked), "utf-8")
    words = ["--data", path, *SMALL, "--tag_weight", 3]
    with pytest.raises(ValueError, match="no token '<think>'.*python -m dataset.add_tags --model"):
        run(train_distill_reason, *words, "--student", folder, "--out", tmp_path / "no")
    run(add_tags, "--model", folder, "--out", tmp_path / "tagged")
    words += ["--student", tmp_path / "tagged"]
    run(train_distill_reason, *words, "--out", tmp_path / "yes")
    before, after = load_model(tmp_path / "tagged"), load_model(tmp_path / "yes")
    rows = slice(before.config.vocab_size - 4, None)
    assert not torch.equal(before.lm_head.weight[rows], after.lm_head.weight[rows])


def test_what_is_refused(tmp_path):
    folder, _ = make_model(tmp_path / "model", known=TAGS)
    with pytest.raises(ValueError, match="has the four tags already"):
        run(add_tags, "--model", folder, "--out", tmp_path / "tagged")
    assert not (tmp_path / "tagged").exists()
    folder, _ = make_model(tmp_path / "plain")
    with pytest.raises(ValueError, match="--out .* would write where --model"):
        run(add_tags, "--model", folder, "--out", folder)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="mine holds files that this command did not make"):
        run(add_tags, "--model", folder, "--out", mine)
    run(add_tags, "--model", folder, "--out", tmp_path / "tagged")
    with pytest.raises(ValueError, match="tagged holds a model: pass --overwrite"):
        run(add_tags, "--model", folder, "--out", tmp_path / "tagged")
    (tmp_path / "tagged/chat_template.jinja").write_text("of another model")
    (tmp_path / "tagged/LICENSE").write_text("of another model")
    (folder / "NOTICE").write_text("by others")
    run(add_tags, "--model", folder, "--out", tmp_path / "tagged", "--overwrite")
    assert not (tmp_path / "tagged/chat_template.jinja").exists()
    assert not (tmp_path / "tagged/LICENSE").exists()
    assert (tmp_path / "tagged/NOTICE").read_text() == "by others"
