"""Embeddings with more rows than the tokenizer has tokens: at every entry point both models of a
run are cut to the tokens there are. Held against the same models without those rows, bit by bit."""

import shutil

import pytest
import torch

import train_distill_reason
import train_distillation
import train_pretrain
from dataset import prepare, teacher_cache
from dataset.packing import PackedText
from eval import anytime, perplexity
from files import read_json
from methods import cached_teacher, quantize
from model import ModelConfig, Transformer, load_for, load_model, save_model
from tests.conftest import small_text
from tests.short_runs import run, same_bits

V = 400
STEPS = "--steps 1 --batch_size 2 --seq_len 32 --eval_every 2 --warmup 1 --final_eval 4"
STEPS = f"{STEPS} --device cpu --dtype float32".split()


def save_padded(folder, data, rows: int, seed: int, tied: bool = True) -> None:
    """A random model of `rows` rows; the first 400 are those that any size with this seed has, and
    the others are so large that a softmax over them would leave nothing for the tokens."""
    torch.manual_seed(seed)
    config = ModelConfig(V, 64, 2, 2, 1, 32, 192, tie_word_embeddings=tied)
    model = Transformer(config)
    if rows > V:
        wide = Transformer(ModelConfig(rows, 64, 2, 2, 1, 32, 192, tie_word_embeddings=tied))
        state = model.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            more = torch.full((rows - V, 64), 9.0)
            state[name] = torch.cat((state[name], more))
        wide.load_state_dict(state)
        model = wide
    save_model(model, folder, data)


@pytest.fixture(scope="module")
def world(prepared_folder, tmp_path_factory):
    """Teacher and student of 400 tokens: as they are, and padded to 448 and to 512 rows."""
    world = tmp_path_factory.mktemp("rows")
    for name, rows in (("exact", (V, V)), ("padded", (448, 512))):
        for role, count, seed in zip(("teacher", "student"), rows, (0, 1), strict=True):
            save_padded(world / name / role, prepared_folder, count, seed)
    lines = (prepared_folder / "reason_train.jsonl").read_text("utf-8").splitlines(keepends=True)
    (world / "chats.jsonl").write_text("".join(lines[:10]), "utf-8")
    return world


def pair(folder) -> list:
    return ["--teacher", folder / "teacher", "--student", folder / "student"]


CHATS = ["--seq_len", "256"]
RUNS = {  # entry point: script, its flags, of conversations or of text
    "lesson 1": (train_pretrain, [], "text"),
    "lesson 2, fused": (train_distillation, ["--fused", "yes"], "text"),
    "lesson 3, fused": (train_distill_reason, ["--fused", "yes"], "chat"),
    "lesson 2": (train_distillation, ["--teacher_dtype", "int8", "--fused", "no"], "text"),
    "quantize": (quantize, [], "text"),
    "cache, topk": (cached_teacher, ["--method", "topk", "--k", V], "text"),
    "cache, hidden": (cached_teacher, ["--method", "hidden"], "text"),
}


@pytest.mark.parametrize("name", RUNS)
def test_rows_without_a_token_change_nothing(name, world, prepared_folder, tmp_path):
    script, flags, kind = RUNS[name]
    data = world / "chats.jsonl" if kind == "chat" else prepared_folder
    records = {}
    for which in ("exact", "padded"):
        models, own = pair(world / which), list(flags)
        if script is train_pretrain:
            models = ["--model", models[-1]]
        elif script is cached_teacher:
            cache = tmp_path / f"{which}.cache"
            made = ["--teacher", world / which / "teacher", "--data", data, "--seq_len", 32]
            made += ["--dtype", "float32", "--device", "cpu", "--out", cache]
            header = run(teacher_cache, *made, *own)
            assert header["vocab_size"] == V
            own = ["--teacher_cache", cache]
        words = [*models, "--data", data, *STEPS, *(CHATS if kind == "chat" else []), *own]
        records[which] = run(script, *words, "--out", tmp_path / which)
    assert records["exact"]["metrics"] == records["padded"]["metrics"]
    assert same_bits(tmp_path / "exact", tmp_path / "padded")
    assert records["padded"]["config"]["vocab_size"] == V


def test_evaluation_alone(world, prepared_folder, capsys):
    for main in (perplexity, anytime):
        found = []
        for which in ("exact", "padded"):
            words = ["--model", world / which / "student", "--data", prepared_folder]
            words += ["--seq_len", 32, "--device", "cpu"]
            words += ["--teacher", world / which / "teacher"] if main is perplexity else []
            found.append(run(main, *words))
        assert found[0] == found[1]


def test_data_prepared_for_a_padded_model_has_its_tokens_alone(world, tmp_path):
    text = tmp_path / "x.txt"
    text.write_text(small_text(9), "utf-8")
    few = ["--problems", 20, "--prompts", 2, "--test_problems", 2]
    out = ["--out", tmp_path / "data", *few]
    run(prepare, "--text", text, "--tokenizer", world / "padded" / "teacher", *out)
    assert read_json(tmp_path / "data" / "meta.json")["vocab_size"] == V


def test_data_that_an_earlier_version_prepared(world, prepared_folder, tmp_path):
    """Its meta.json says how many rows the teacher had; models of more rows are cut to that, fewer
    are refused."""
    folder = shutil.copytree(prepared_folder, tmp_path / "data")
    meta = (folder / "meta.json").read_text("utf-8")
    (folder / "meta.json").write_text(meta.replace('"vocab_size": 400', '"vocab_size": 448', 1))
    text = PackedText(folder, "val", 32)
    assert load_for(world / "padded" / "student", text).config.vocab_size == 448
    with pytest.raises(ValueError, match="has vocabulary 400, the data 448"):
        load_for(world / "exact" / "student", text)


@pytest.mark.parametrize("tied", [True, False])
def test_cut_logits_are_those_of_the_tokens(tied, prepared_folder, tmp_path):
    """The distribution that is left: exp(logit) over the sum of the tokens' alone."""
    save_padded(tmp_path, prepared_folder, 448, seed=2, tied=tied)
    text = PackedText(prepared_folder, "val", 32)
    whole, cut = load_model(tmp_path).double(), load_for(tmp_path, text).double()
    ids = next(text.evaluation(2, 2))[0]
    with torch.no_grad():
        all_logits, logits = whole(ids), cut(ids)
    expected = all_logits[..., :V].exp() / all_logits[..., :V].exp().sum(-1, keepdim=True)
    torch.testing.assert_close(logits.softmax(-1), expected, rtol=1e-12, atol=1e-14)
    assert all_logits.softmax(-1)[..., V:].sum(-1).max() > 0.5, "rows that nobody would notice"
    assert cut.num_parameters() == whole.num_parameters() - 48 * 64 * (1 if tied else 2)
