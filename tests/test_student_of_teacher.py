"""Students that begin as layers of their teacher (--student layers:N), and teachers whose weights
are kept in fewer bytes (--teacher_dtype): held against models that are put together by hand."""

import shutil
from dataclasses import replace

import pytest
import torch

import train_distill_reason
import train_distillation
from dataset.packing import PackedText
from files import read_json
from methods import (
    born_again,
    experts_to_dense,
    init_from_teacher,
    lora,
    progressive_layers,
    self_distillation,
)
from model import (
    ModelConfig,
    Transformer,
    load_model,
    make_or_load,
    save_model,
    store_weights,
    stored_bytes,
)
from model.prune import layers_named, take_layers
from model.quantize import channel_scale, fake_quantize
from run.flags import choose_optimizer
from tests.short_runs import SIX, check_resume, run, same_bits, weights

V, D = 400, 64
CONFIG = ModelConfig(V, D, 5, 4, 2, 16, 192)


def random_model(config=CONFIG, seed=0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        for weight in model.parameters():  # norms and biases too
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers") / "teacher"
    save_model(random_model(), folder, prepared_folder)
    return folder


@pytest.fixture(scope="module")
def chats(prepared_folder, teacher):
    lines = (prepared_folder / "reason_train.jsonl").read_text("utf-8").splitlines(keepends=True)
    path = teacher.parent / "chats.jsonl"
    path.write_text("".join(lines[:10]), "utf-8")
    return path


def flags(prepared_folder, teacher, *more) -> list:
    return ["--data", prepared_folder, "--teacher", teacher, *SIX, *more]


# layers:N


def test_names():
    assert layers_named("layers:15") == 15 and layers_named("layers:1") == 1
    for name in ("nano", "out/layers:3", "out/student", None):
        assert layers_named(name) is None
    for wrong in ("layers:", "layers:0", "layers:-1", "layers:1.5", "layers:x", "layers:²"):
        with pytest.raises(ValueError, match=f"--student {wrong}: write layers:N"):
            layers_named(wrong)


@pytest.mark.parametrize("count, kept", [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (5, [*range(5)])])
def test_some_of_the_teachers_layers_and_all_else(count, kept, prepared_folder, teacher):
    text = PackedText(prepared_folder, "val", 32)
    student = make_or_load(f"layers:{count}", text.vocab_size, text, teacher)
    found, whole = student.state_dict(), load_model(teacher).state_dict()
    assert student.config.num_hidden_layers == count == len(student.model.layers)
    for name, weight in found.items():
        if ".layers." in name:
            number = int(name.split(".")[2])
            name = name.replace(f"layers.{number}.", f"layers.{kept[number]}.", 1)
        assert torch.equal(weight, whole[name]), name
    assert len(found) == len(Transformer(student.config).state_dict()), "a weight is missing"
    assert all(weight.requires_grad for weight in student.parameters())


def test_a_loaded_file_of_it_is_the_same_model(tmp_path, prepared_folder, teacher):
    student = take_layers(load_model(teacher), 2)
    save_model(student, tmp_path, prepared_folder)
    assert all(torch.equal(weights(tmp_path)[k], v) for k, v in student.state_dict().items())


def test_layers_of_a_file_in_bfloat16_learn_in_float32(tmp_path, prepared_folder):
    """It is read in its own dtype, so that what is not taken need not fit in float32."""
    text = PackedText(prepared_folder, "val", 32)
    for tied in (True, False):
        config = replace(CONFIG, tie_word_embeddings=tied)
        save_model(random_model(config).bfloat16(), tmp_path / str(tied), prepared_folder)
        folder = tmp_path / str(tied)
        student = make_or_load("layers:2", V, text, folder)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in student.parameters())
        assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
        expected = take_layers(load_model(folder), 2).state_dict()
        assert all(torch.equal(w, expected[name]) for name, w in student.state_dict().items())


def test_a_rate_that_goes_with_its_width_unless_one_is_typed():
    def chosen(*words, script=train_distillation, width=576):
        args = script.parse_args(["--student", "layers:15", *words])
        choose_optimizer(args, args.student, width)
        return args.optimizer, args.learning_rate

    assert chosen() == ("adamw", 0.00035)  # 0.2 / 576
    assert chosen(script=init_from_teacher) == ("adamw", 0.00035)
    assert chosen("--learning_rate", "0.012", "--optimizer", "muon") == ("muon", 0.012)


def test_alpha_1_has_no_teacher_but_its_layers(prepared_folder, teacher, tmp_path, capsys):
    """Almost no step at all: what is saved is what it began as."""
    words = flags(prepared_folder, teacher, "--student", "layers:2", "--alpha", 1)
    record = run(train_distillation, *words, "--learning_rate", 1e-12, "--out", tmp_path / "run")
    assert "teacher_loss" not in record["metrics"] and "teacher_sha256" not in record["sources"]
    assert str(teacher / "model.safetensors") in record["made_from"], "what it was made from"
    for name, weight in take_layers(load_model(teacher), 2).state_dict().items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], weight, rtol=1e-6, atol=1e-7)
    assert "layers:2: learns by adamw at rate 1e-12" in capsys.readouterr().out


def test_the_licence_goes_with_the_weights(prepared_folder, teacher, tmp_path):
    """Of layers that were copied, and of a checkpoint that was trained on; not of a teacher whose
    weights are not in the student, nor what is left of other weights."""
    licensed = shutil.copytree(teacher, tmp_path / "licensed")
    (licensed / "LICENSE.txt").write_text("Apache-2.0")
    words = ["--teacher", licensed, "--data", prepared_folder, *SIX]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "LICENSE").write_text("mine")
    for name, student, kept in (
        ("made", "layers:2", True),
        ("trained", licensed, True),
        ("made", "nano", False),
        ("theirs", "nano", False),
    ):
        out = tmp_path / name
        run(train_distillation, *words, "--student", student, "--out", out, "--overwrite")
        for folder in (out, out / "best"):
            assert (folder / "LICENSE.txt").is_file() == kept
    assert (tmp_path / "theirs" / "LICENSE").read_text() == "mine"


def test_resumed_to_the_same_bits(prepared_folder, teacher, tmp_path, monkeypatch):
    words = ["--data", prepared_folder, "--teacher", teacher, "--student", "layers:2"]
    record = check_resume(train_distillation, [*words, "--teacher_dtype", "int8"], tmp_path,
                          monkeypatch)  # fmt: skip
    assert record["args"]["learning_rate"] == 0.0031 and record["args"]["optimizer"] == "adamw"
    assert record["args"]["teacher_dtype"] == "int8"
    (tmp_path / "whole" / "run.json").rename(tmp_path / "run.json")
    (tmp_path / "whole" / "resume").mkdir()
    shutil.copy(tmp_path / "run.json", tmp_path / "whole" / "run.json")
    with pytest.raises(ValueError, match="with --teacher_dtype bfloat16: it ran with int8"):
        more = ["--teacher_dtype", "bfloat16", "--out", tmp_path / "whole", "--resume"]
        run(train_distillation, *words, *SIX, *more)


def test_conversations_are_read_with_the_tokenizer_of_the_teacher(chats, teacher, tmp_path):
    words = ["--data", chats, *SIX, "--seq_len", 256, "--steps", 1, "--teacher", teacher]
    words += ["--student", "layers:3", "--tokenizer", tmp_path / "nowhere"]
    record = run(train_distill_reason, *words, "--out", tmp_path / "run")
    assert record["config"]["num_hidden_layers"] == 3


def test_where_there_is_no_teacher_to_take_them_from(prepared_folder, chats, teacher, tmp_path):
    few = ["--student", "layers:2", *SIX, "--seq_len", 256, "--out", tmp_path / "run"]
    text = ["--data", prepared_folder]
    for script, words, said in (
        (train_distill_reason, ["--data", chats, "--tokenizer", teacher, *few], "--teacher FOLDER"),
        (self_distillation, [*text, *few], "a command with --teacher"),
        (born_again, [*text, *few, "--teacher", teacher], "would copy the generation before"),
        (progressive_layers, [*text, *few, "--teacher", teacher], "leave --flops, .*layers:N out"),
        (experts_to_dense, [*text, *few, "--teacher", teacher], "leave .*layers:N out"),
        (train_distillation, [*flags(prepared_folder, teacher), "--student", "layers:6", "--out",
            tmp_path / "run"], "6 layers cannot be copied from 5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            run(script, *words)
    assert not (tmp_path / "run" / "run.json").exists()


def test_an_adapter_gets_a_base_of_those_layers(prepared_folder, chats, teacher, tmp_path):
    words = ["--data", chats, "--tokenizer", prepared_folder, "--teacher", teacher, *SIX]
    words += ["--student", "layers:2", "--teacher_steps", 0, "--steps", 1, "--seq_len", 256]
    run(lora, *words, "--out", tmp_path / "run")
    about = read_json(tmp_path / "run" / "adapter" / "adapter_config.json")
    assert about["base_model_name_or_path"] == str(tmp_path / "run" / "phases" / "base")


# --teacher_dtype

UNTIED = ModelConfig(V, D, 2, 4, 2, 16, 96, tie_word_embeddings=False, attention_bias=True)


def tokens():
    return torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def rounded(config, dtype) -> Transformer:
    """The model with weights in float32 that are what those bytes stand for."""
    model = random_model(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            to_int8 = dtype == "int8" and ".layers." in name
            weight.copy_(fake_quantize(weight, 8) if to_int8 else weight.bfloat16().float())
    return model


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied, biased"])
@pytest.mark.parametrize("dtype, most", [("bfloat16", 0.02), ("int8", 0.05)])
def test_logits_are_those_of_the_rounded_weights(config, dtype, most):
    with torch.no_grad():
        stored = store_weights(random_model(config), dtype)
        logits, exact = stored(tokens()), random_model(config)(tokens())
        torch.testing.assert_close(logits, rounded(config, dtype)(tokens()), rtol=1e-4, atol=1e-5)
        apart = (logits - exact).norm() / exact.norm()
        assert 1e-4 < apart < most, "not rounded, or not to those bits"
        with torch.autocast("cpu", torch.bfloat16):  # the products of a step
            torch.testing.assert_close(stored(tokens()).float(), logits, rtol=0.1, atol=0.1)
    assert logits.dtype == torch.float32 and not any(p.requires_grad for p in stored.parameters())


def test_memory_that_is_said_is_counted_by_hand():
    embedding = V * D
    layer = 2 * D * D + 2 * D * 32 + 3 * D * 192  # weights of q and o, k and v, and feed-forward
    rows = 2 * D + 2 * 32 + 2 * 192 + D  # their scales
    norms = 5 * 2 * D + D
    expected = {
        "float32": 4 * (embedding + 5 * layer + norms),
        "bfloat16": 2 * (embedding + 5 * layer) + 4 * norms,
        "int8": 2 * embedding + 5 * (layer + 4 * rows) + 4 * norms,
    }
    for dtype, size in expected.items():
        assert stored_bytes(store_weights(random_model(), dtype)) == size, dtype


def test_int8_rounds_each_row_on_its_own_grid():
    model = store_weights(random_model(), "int8")
    kept = model.model.layers[1].mlp.up_proj
    weight = random_model().model.layers[1].mlp.up_proj.weight
    assert kept.weight.dtype == torch.int8 and kept.weight.abs().max() > 100
    torch.testing.assert_close(kept.scale[:, None], channel_scale(weight, 8))
    levels = kept.weight.float() * kept.scale[:, None]
    assert ((levels - weight).abs() <= 0.5001 * kept.scale[:, None]).float().mean() > 0.99


def test_fused_and_plain_agree_on_such_a_teacher(prepared_folder, teacher, tmp_path, capsys):
    kl = {}
    for dtype, fused in (("float32", "no"), ("int8", "no"), ("int8", "yes")):
        more = ("--teacher_dtype", dtype, "--fused", fused, "--steps", 1, "--alpha", 0)
        out = tmp_path / f"{dtype}-{fused}"
        record = run(train_distillation, *flags(prepared_folder, teacher, *more), "--out", out)
        kl[dtype, fused] = record["metrics"]["kl"]
    assert kl["int8", "yes"] == pytest.approx(kl["int8", "no"], rel=1e-3)
    assert kl["int8", "no"] != kl["float32", "no"]
    size = stored_bytes(store_weights(random_model(), "int8")) / 1e6
    said = capsys.readouterr().out
    assert f"its weights take {size:,.1f} MB as int8" in said and "as float32" not in said


def test_what_is_cut_out_of_a_teacher_is_cut_out_of_its_file(prepared_folder, teacher, tmp_path):
    """--teacher_dtype is of its passes alone: at alpha 1 there are none, and no bit changes."""
    for out in "abc":
        dtype, student = "float32" if out == "a" else "int8", "layers:2" if out == "c" else "nano"
        more = ("--teacher_dtype", dtype, "--student", student, "--alpha", 1, "--steps", 1)
        words = flags(prepared_folder, teacher, *more)
        record = run(init_from_teacher, *words, "--out", tmp_path / out)
        assert record["config"]["num_hidden_layers"] == 2
        assert record["config"]["intermediate_size"] == 192
    assert same_bits(tmp_path / "a", tmp_path / "b")
    assert record["args"]["learning_rate"] == 0.0031, "0.2 / 64, of whole layers"


def test_fsdp_shards_no_such_weights(prepared_folder, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("run.parallel.world_size", lambda: 2)
    words = flags(prepared_folder, teacher, "--fsdp", "--teacher_dtype", "int8")
    with pytest.raises(ValueError, match="leave --teacher_dtype int8 out"):
        run(train_distillation, *words, "--out", tmp_path / "run")
