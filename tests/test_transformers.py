"""The library that people use computes the same: it reads what is written here, and what it writes,
or what others wrote as GGUF, is read here.

Tests of models that import transformers or peft are all in this file: the import takes 8 seconds.
"""

from dataclasses import replace

import pytest
import torch

from dataset.tokenizer import encode, load_tokenizer
from model import load_model, save_model
from model.config import Llama3Scaling
from model.lora import merge_lora, save_lora
from tests import test_experts, test_method_lora
from tests.test_model import IDS, VARIANTS, random_model

transformers = pytest.importorskip("transformers")
INPUT = torch.tensor(IDS)
SCALED = Llama3Scaling(8.0, 1.0, 4.0, 16)


def assert_same(theirs, ours, ids=INPUT):
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=1e-4, atol=1e-4)


# It reads what is written here.


@pytest.mark.parametrize("name", ["llama", "untied", "qwen2", "qwen3", "scaled"])
def test_our_folder(name, tmp_path):
    config = VARIANTS[name] if name in VARIANTS else replace(VARIANTS["llama"], rope_scaling=SCALED)
    model = random_model(config).eval()
    save_model(model, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    expected = {"qwen2": "Qwen2", "qwen3": "Qwen3"}.get(name, "Llama")
    assert type(theirs).__name__ == f"{expected}ForCausalLM"
    assert_same(theirs.eval(), model)


def test_our_experts(tmp_path):
    # Heads D / H wide for its older versions, rows of whole 16 bytes for its newer ones.
    sizes = {"hidden_size": 24, "intermediate_size": 12}
    config = replace(test_experts.TINY, tie_word_embeddings=False, **sizes)
    model = test_experts.random_model(config)
    save_model(model, tmp_path)
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(theirs.eval(), model, test_experts.IDS)


def test_our_adapter_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    save_model(test_method_lora.small_model(), tmp_path / "base")
    model = test_method_lora.trained(test_method_lora.small_model(), rank=4, alpha=24.0)
    save_lora(model, tmp_path / "adapter", str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_same(opened, model, test_method_lora.IDS)
    assert_same(opened.merge_and_unload(), merge_lora(model), test_method_lora.IDS)


# What it writes is read here.

SHAPE = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "max_position_embeddings": 64,
}  # fmt: skip
THEIRS = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "untied": ("Llama", {"tie_word_embeddings": False}),
    "scaled": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | dict(
        zip(SCALED._fields, SCALED, strict=True))}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False}),
}  # fmt: skip


def made_by_them(name):
    kind, options = THEIRS[name]
    config = getattr(transformers, f"{kind}Config")(**SHAPE | options)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for _, weight in theirs.named_parameters():
            if weight.ndim == 1:  # norms are 1 and biases 0 at first
                weight.add_(0.3 * torch.randn_like(weight))
    return theirs.eval()


@pytest.mark.parametrize(
    "name, dtype", [(name, "bfloat16") for name in THEIRS] + [("qwen3", "float16")]
)
def test_their_folder_in_shards(name, dtype, tmp_path):
    stored = made_by_them(name).to(getattr(torch, dtype))
    stored.save_pretrained(tmp_path, max_shard_size="15KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    ours, theirs = load_model(tmp_path), type(stored).from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(1))
    assert_same(theirs, ours, ids)
    assert load_model(tmp_path, dtype=None).lm_head.weight.dtype == getattr(torch, dtype)
    prompt, options = ids[:1, :6], {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        replied = theirs.generate(prompt, max_new_tokens=12, **options)
        for _ in range(12):
            prompt = torch.cat((prompt, ours(prompt)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(prompt, replied)


# GGUF: it has a reader of its own, and reads the folders that ours makes.


@pytest.mark.parametrize("name", ["untied", "qwen2", "qwen3"])
def test_gguf_files_in_both_directions(name, tmp_path):
    pytest.importorskip("gguf")
    from tests import test_gguf

    tokenizer = test_gguf.train_tokenizer([test_gguf.small_text(1)], 300)
    model = test_gguf.random_model(test_gguf.KINDS[name])
    folder, file = test_gguf.exported(tmp_path, model, tokenizer, "--dtype", "f32")
    auto = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(folder)  # of GGUF it reads no head width
    options = {"gguf_file": file.name, "config": config, "dtype": torch.float32}
    opened = auto.from_pretrained(tmp_path, **options).eval()
    assert_same(opened, model, test_gguf.IDS)
    again = test_gguf.convert(file, tmp_path / "again", "--dtype", "float32")
    assert_same(auto.from_pretrained(again).eval(), model, test_gguf.IDS)


def test_words_and_chats_have_the_same_ids(tmp_path):
    pytest.importorskip("gguf")
    from tests import test_gguf

    tokenizer = test_gguf.train_tokenizer([test_gguf.small_text(1)], 300)
    folder, file = test_gguf.exported(tmp_path, test_gguf.random_model(test_gguf.LLAMA), tokenizer)
    again = test_gguf.convert(file, tmp_path / "again")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(again), load_tokenizer(again)
    for text in test_gguf.TEXTS:
        plain = text.replace("<|im_end|>", "").replace("<think>", "")  # they read control tokens
        assert theirs.encode(plain, add_special_tokens=False) == encode(ours, plain)
    turns = [{"role": "user", "content": "the king 17"}, {"role": "assistant", "content": "ships"}]
    written = [1, *encode(ours, "user\nthe king 17"), 2, *encode(ours, "\n")]
    written += [1, *encode(ours, "assistant\nships"), 2, *encode(ours, "\n")]
    assert theirs.apply_chat_template(turns, return_dict=True)["input_ids"] == written
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
