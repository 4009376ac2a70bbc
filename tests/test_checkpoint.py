"""A checkpoint folder comes back bit for bit, and is a Hugging Face folder; a folder that is not
whole, not of this architecture or not of these sizes is refused with the key, shape or file."""

import json
import os
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from files import tokenizer_hash
from model import ModelConfig, Transformer, load_model, make_or_load, read_config, save_model
from model.checkpoint import is_finite
from model.config import Llama3Scaling
from model.control import control_ids
from model.device import give_back_memory, peak_memory_mb, reset_peak_memory

TINY = ModelConfig(
    vocab_size=17, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=6, intermediate_size=12, max_position_embeddings=64,
    rope_theta=500.0, rms_norm_eps=3e-4,
)  # fmt: skip
VARIANTS = {
    "llama": TINY,
    "untied": replace(TINY, tie_word_embeddings=False),
    "qwen2": replace(TINY, attention_bias=True),
    "qwen3": replace(TINY, qk_norm=True, tie_word_embeddings=False),
}
ONE = "model.layers.0.self_attn.q_proj.weight"


def random_model(config=TINY, seed=0):
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.fixture
def folder(tmp_path):
    save_model(random_model(), tmp_path)
    return tmp_path


def change_json(path, remove=(), **values):
    content = json.loads(path.read_text())
    for name in remove:
        del content[name]
    path.write_text(json.dumps(content | values))
    (path.parent / "manifest.json").unlink(missing_ok=True)  # as a user who means it is told to


def change_weights(folder, change):
    """Read model.safetensors, let `change` edit the dict, write it back."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    (folder / "manifest.json").unlink()  # as a user who changes weights is told to


def assert_same_bits(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


# What comes back.


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_is_bit_equal(name, tmp_path):
    model = random_model(VARIANTS[name])
    save_model(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert_same_bits(loaded, model)
    ids = torch.tensor([[1, 5, 16, 2]])
    assert torch.equal(loaded(ids), model(ids))


def test_a_loaded_model_can_train_and_stays_tied(folder):
    loaded = load_model(folder)
    assert not loaded.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    loaded(torch.tensor([[1, 2]])).sum().backward()
    with torch.no_grad():
        loaded.model.embed_tokens.weight.zero_()
    assert loaded(torch.tensor([[1, 2]])).abs().max() == 0


def test_loaded_weights_do_not_hang_on_the_file(folder):
    """Overwriting the folder that a model was loaded from must not change the model."""
    loaded, expected = load_model(folder), random_model()
    save_model(random_model(seed=1), folder)
    assert_same_bits(loaded, expected)
    assert_same_bits(load_model(folder), random_model(seed=1))


def test_dtypes(tmp_path):
    model = random_model().bfloat16()
    save_model(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors")[ONE].dtype == torch.bfloat16
    assert_same_bits(load_model(tmp_path, dtype=torch.bfloat16), model)
    assert_same_bits(load_model(tmp_path), model.float())  # float32 by default


@pytest.mark.parametrize("name", ["llama", "untied"])
def test_a_sharded_checkpoint(name, tmp_path):
    model = random_model(VARIANTS[name])
    save_model(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate((names[:7], names[7:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    assert_same_bits(load_model(tmp_path), model)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors does not exist"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "weight_map", [{}, {ONE: "../model.safetensors"}, {ONE: "/etc/passwd"}, [ONE], {ONE: 3}]
)
def test_a_bad_shard_index_is_refused(folder, weight_map):
    """A file outside of the folder is never opened."""
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="weight_map"):
        load_model(folder)


def test_old_exports_store_rotary_tables_and_the_tied_head_too(folder):
    def change(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    change_weights(folder, change)
    assert_same_bits(load_model(folder), random_model())


# What the folder says.


@pytest.mark.parametrize(
    "name, architecture, model_type",
    [
        ("llama", "LlamaForCausalLM", "llama"),
        ("qwen2", "Qwen2ForCausalLM", "qwen2"),
        ("qwen3", "Qwen3ForCausalLM", "qwen3"),
    ],
)
def test_config_json_has_hugging_face_fields(name, architecture, model_type, tmp_path):
    save_model(random_model(VARIANTS[name]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [architecture]
    assert config["model_type"] == model_type
    expected = {
        "vocab_size": 17, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 6, "intermediate_size": 12,
        "max_position_embeddings": 64, "rope_theta": 500.0, "rms_norm_eps": 3e-4,
        "hidden_act": "silu", "tie_word_embeddings": name != "qwen3",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected


def test_the_weights_file_holds_hugging_face_names(folder):
    names = set(load_file(folder / "model.safetensors"))
    assert ONE in names and "model.norm.weight" in names
    assert "lm_head.weight" not in names  # tied: stored once
    generation = json.loads((folder / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {0, 2}


def test_what_ends_a_turn_is_named_by_the_tokenizers_own_ids(tmp_path):
    """Or Hugging Face's generate would stop at tokens 0 and 2 of a tokenizer made elsewhere."""
    ids = {"<|endoftext|>": 9, "<|im_start|>": 10, "<|im_end|>": 11}
    added = [{"content": content, "id": number} for content, number in ids.items()]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    save_model(random_model(), tmp_path / "out", tmp_path / "data")
    for name, end in (("config.json", 11), ("generation_config.json", [11, 9])):
        content = json.loads((tmp_path / "out" / name).read_text())
        found = [content[f"{what}_token_id"] for what in ("bos", "eos", "pad")]
        assert found == [10, end, 9]


ADDED = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 5, "<|eot|>": 7, "<|endoftext|>": 9}


@pytest.mark.parametrize(
    "files, begin, ends, pad",
    [
        ({}, None, [5, 9], 9),  # ChatML's names
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, 1, [2, 5, 9],
         9),
        ({"special_tokens_map": {"bos_token": "<s>", "pad_token": "<unk>"},
          "tokenizer_config": {"bos_token": None, "eos_token": "<|eot|>"}}, 1, [7, 5, 9], 0),
        ({"config": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}}, 1, [2, 5, 9],
         None),  # null is kept: id 0 is a word
        ({"config": {"bos_token_id": 1, "eos_token_id": 2}, "generation_config": {
            "eos_token_id": [7, 2], "pad_token_id": 7}}, 1, [7, 2, 5, 9], 7),
        ({"config": {"bos_token_id": 3, "eos_token_id": "2"}, "generation_config": {
            "bos_token_id": -1, "eos_token_id": [True, 10**30, 4]}}, 3, [4, 5, 9], None),
        ({"generation_config": {"eos_token_id": 8}, "tokenizer_config": {"pad_token": "<unk>"}},
         None, [8, 5, 9], 0),
    ],
)  # fmt: skip
def test_the_ids_of_a_model_made_elsewhere_are_kept(files, begin, ends, pad, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    added = [{"content": content, "id": number} for content, number in ADDED.items()]
    tokenizer = {"added_tokens": added, "model": {"vocab": {"a": 11}}}
    for name, content in {"tokenizer": tokenizer, **files}.items():
        (source / f"{name}.json").write_text(json.dumps(content))
    assert control_ids(source) == {"bos_token_id": begin, "eos_token_id": ends, "pad_token_id": pad}
    save_model(random_model(), tmp_path / "one", source)
    save_model(random_model(), tmp_path / "two", tmp_path / "one")  # a student of that student
    for folder in ("one", "two"):
        generation = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert generation == {**control_ids(source), "do_sample": False}
        config = json.loads((tmp_path / folder / "config.json").read_text())
        ids = [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
        assert ids == [begin, ends[0], pad]


def test_weights_of_half_precision_say_so(tmp_path):
    save_model(random_model().bfloat16(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_files_of_another_tokenizer_do_not_stay_beside_a_new_one(tmp_path):
    """An old chat template would decide how the new model is asked."""
    source, out = tmp_path / "data", tmp_path / "out"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("old")
    save_model(random_model(), out, source)
    assert (out / "chat_template.jinja").read_text() == "old"
    (source / "chat_template.jinja").unlink()
    save_model(random_model(), out, source)
    assert not (out / "chat_template.jinja").exists()


def test_the_tokenizer_is_copied(tmp_path):
    source, out = tmp_path / "data", tmp_path / "out"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text(f'{{"content": "of {name}"}}')
    save_model(random_model(), out, source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_text() == f'{{"content": "of {name}"}}'
    save_model(random_model(), out, out)  # into the folder where it lies already
    assert (out / "tokenizer.json").read_text() == '{"content": "of tokenizer.json"}'
    assert not list(out.glob("*.tmp"))


def test_a_config_of_transformers_4_and_its_defaults(folder):
    """An older Llama config.json names neither head_dim nor rope_theta nor the tied head."""
    old = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 17, "hidden_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
        "rope_scaling": None, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(old))
    assert read_config(folder) == ModelConfig(
        vocab_size=17, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4, intermediate_size=12, max_position_embeddings=2048,
        rope_theta=10000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
    )  # fmt: skip


def test_a_config_of_transformers_5(folder):
    change_json(
        folder / "config.json",
        remove=["rope_theta"],
        rope_parameters={"rope_theta": 777.0, "rope_type": "default"},
    )
    assert asdict(read_config(folder)) == asdict(replace(TINY, rope_theta=777.0))


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize("theirs", [
    {"rope_theta": 777.0, "rope_scaling": LLAMA3},  # transformers 4
    {"rope_parameters": {"rope_theta": 777.0, **LLAMA3}},  # transformers 5
])  # fmt: skip
def test_llama_3_scaling_in_both_forms_and_saved_again(folder, theirs):
    change_json(folder / "config.json", remove=["rope_theta"], **theirs)
    model = load_model(folder)
    assert model.config == replace(
        TINY, rope_theta=777.0, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32)
    )
    save_model(model, folder / "again")
    written = json.loads((folder / "again/config.json").read_text())
    assert written["rope_theta"] == 777.0 and written["rope_scaling"] == LLAMA3
    assert read_config(folder / "again") == model.config


@pytest.mark.skipif(sys.platform != "linux", reason="no peak of a part of a process here")
def test_loading_takes_the_memory_of_the_weights(tmp_path):
    """67 MB of bfloat16 in two shards, into bfloat16 and, twice as large, into float32. A reader
    that holds a file and its copy needs half as much again."""
    config = replace(TINY, vocab_size=2**14, hidden_size=512, intermediate_size=2**13)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in Transformer(config).state_dict().items()}
    del shapes["lm_head.weight"]
    tensors = {name: torch.full(shape, 0.1).bfloat16() for name, shape in shapes.items()}
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    first = {n: tensors.pop(n) for n in list(tensors) if "layers.1" not in n}
    save_file(first, tmp_path / "1.safetensors")
    save_file(tensors, tmp_path / "2.safetensors")
    index = dict.fromkeys(first, "1.safetensors") | dict.fromkeys(tensors, "2.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    del first, tensors
    cpu = torch.device("cpu")
    for dtype, weights in ((torch.bfloat16, size), (torch.float32, 2 * size)):
        give_back_memory()  # what an earlier test freed would be used again, and not be seen
        reset_peak_memory()
        before = peak_memory_mb(cpu)
        model = load_model(tmp_path, dtype=dtype)
        taken = peak_memory_mb(cpu) - before
        # Less where this process reuses what another test has freed; not much less.
        assert 0.6 * weights < taken < 1.1 * weights
        del model


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_no_number_is_found(bad, dtype):
    tensor = torch.arange(12, dtype=dtype).view(3, 4)
    assert is_finite(tensor) and is_finite(tensor[:0])
    tensor[1, 2] = bad
    assert not is_finite(tensor)


# What is refused.


def test_a_missing_key(folder):
    change_weights(folder, lambda weights: weights.pop(ONE))
    with pytest.raises(ValueError, match=rf"Missing key.*{ONE}.*save or download"):
        load_model(folder)


def test_an_unexpected_key(folder):
    change_weights(folder, lambda weights: weights.update({"model.extra.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match='Unexpected key.*"model.extra.weight"'):
        load_model(folder)


def test_a_missing_head(folder):
    """Without tying, a folder that stores no head is not whole."""
    change_json(folder / "config.json", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lm_head.weight"):
        load_model(folder)


@pytest.mark.parametrize("shape", [(12, 9), (8, 12), (96,), (1, 12, 8)])
def test_a_wrong_shape(folder, shape):
    """(8, 12) and (96,) have the right number of values: a reshape would go unnoticed."""
    change_weights(folder, lambda weights: weights.update({ONE: torch.ones(shape)}))
    with pytest.raises(ValueError, match=rf"{ONE}: .*\[{shape[0]}.*\[12, 8\]"):
        load_model(folder)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 18}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}]
)
def test_a_config_of_another_model(folder, change):
    change_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match="embed_tokens|layers"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_file(folder, keep):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file"):
        load_model(folder)


def test_a_pickle_is_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save(random_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="only safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "none"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor = None"),
        ({"rope_scaling": LLAMA3 | {"factor": "8"}}, "llama3 rope_scaling: factor = '8'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "4 and 4 the low must be lower"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"rope_scaling": "linear"}, "linear"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling without a type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotary factor = 0.5"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"rope_theta": "many"}, "many"),
        ({"num_key_value_heads": 4}, "4 key-value heads"),
    ],
)
def test_what_this_model_cannot_compute(folder, change, named):
    change_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match=f"config.json: .*{named}"):
        load_model(folder)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size"])
def test_an_incomplete_config(folder, name):
    change_json(folder / "config.json", remove=[name])
    with pytest.raises(ValueError, match=f"no key '{name}'"):
        load_model(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udc80"])
def test_a_damaged_config(folder, content):
    (folder / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="config.json"):
        load_model(folder)


@pytest.mark.parametrize("load", [load_model, read_config])
def test_a_missing_folder(tmp_path, load):
    with pytest.raises(ValueError, match="no checkpoint in .*nowhere"):
        load(tmp_path / "nowhere")


# make_or_load.


def test_make_a_preset():
    torch.manual_seed(3)
    model = make_or_load("nano", 300)
    torch.manual_seed(3)
    assert_same_bits(model, Transformer(ModelConfig.preset("nano", 300)))
    assert model.config.vocab_size == 300 and model.config.hidden_size == 64


def test_load_a_folder_with_the_same_vocabulary(folder):
    (folder / "tokenizer.json").write_text("{}")
    data = SimpleNamespace(tokenizer_sha256=tokenizer_hash(folder), vocab_size=17)
    assert_same_bits(make_or_load(str(folder), 17, data), random_model())
    data.vocab_size = 18
    with pytest.raises(ValueError, match="has vocabulary 17, the data 18: both must use one"):
        make_or_load(str(folder), 18, data)


def test_neither_preset_nor_folder(tmp_path):
    with pytest.raises(ValueError, match="no model preset or checkpoint folder"):
        make_or_load(str(tmp_path / "nowhere"), 17)
    with pytest.raises(ValueError, match="no checkpoint in"):
        make_or_load(str(tmp_path), 17, SimpleNamespace())


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_a_flipped_bit_is_noticed(folder, place):
    """safetensors alone would load it: every key and shape still fits."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 16
    path.write_bytes(content)
    load_file(path)
    with pytest.raises(ValueError, match="is damaged: its bytes are not those of manifest.json"):
        load_model(folder)
    (folder / "manifest.json").unlink()
    load_model(folder)


def test_a_config_that_was_edited_is_noticed(folder):
    """Its shapes fit, and it computes something else. Manifests of earlier versions say nothing."""
    path, before = folder / "config.json", (folder / "config.json").read_bytes()
    path.write_bytes(before.replace(b'"rope_theta": 500.0', b'"rope_theta": 900.0'))
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match="config.json is not the one .* delete .*manifest.json"):
        load_model(folder)
    path.write_bytes(before)
    load_model(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for odd in ("x", {}, 7):
        (folder / "manifest.json").write_text(json.dumps(manifest | {"config_sha256": odd}))
        with pytest.raises(ValueError, match="manifest.json is damaged .'config_sha256' is"):
            load_model(folder)
    del manifest["config_sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path.write_bytes(before.replace(b'"rope_theta": 500.0', b'"rope_theta": 900.0'))
    assert load_model(folder).config.rope_theta == 900.0


def test_a_crash_between_manifest_and_weights_leaves_a_model_that_loads(folder, monkeypatch):
    """Either file may be the newer one: the manifest knows both."""
    before = load_model(folder).state_dict()
    longer = random_model(replace(TINY, max_position_embeddings=128), seed=5)

    rename = os.replace

    def crash(source, target):
        if str(target).endswith("model.safetensors"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_model(longer, folder)
    monkeypatch.undo()
    after = load_model(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    save_model(longer, folder)
    assert load_model(folder).config.max_position_embeddings == 128
