"""Whatever a user gives: exit code 2, one sentence that names the value and the cure, and nothing
on disk changed.

A case is the command, the files that it is given (name: content) and what the sentence must say.
In commands {data} is a prepared folder, {teacher} a checkpoint of its vocabulary, {in} the folder
of the files. Copies of both, to be spoilt, are made by "copy: what to do" entries. FIFO is a pipe
that nobody writes to: whoever opens it waits for ever.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_distill_reason
import train_distillation
import train_pretrain
from bench import benchmark, costs
from dataset import ask_teacher, make_traces, prepare, teacher_cache
from dataset.teacher_cache import HEADER_BYTES
from dataset.tokenizer import encode, load_tokenizer
from eval import chat, perplexity, plots, reasoning
from files import command_line, printable
from methods import cached_teacher
from model import ModelConfig, Transformer, load_model, save_model
from model.lora import add_lora, load_lora, save_lora

COMMANDS = {
    "prepare": prepare,
    "pretrain": train_pretrain,
    "distill": train_distillation,
    "reason": train_distill_reason,
    "traces": make_traces,
    "ask": ask_teacher,
    "cache": teacher_cache,
    "cached": cached_teacher,
    "perplexity": perplexity,
    "eval.reasoning": reasoning,
    "chat": chat,
    "plots": plots,
    "benchmark": benchmark,
    "costs": costs,
}
FIFO = object()
NESTED = b"[" * 100_000  # deeper than Python can read
FAST = "--steps 2 --batch_size 2 --seq_len 32 --device cpu"


def line(*turns, **more) -> str:
    names = {"u": "user", "a": "assistant", "s": "system"}
    listed = [{"role": names.get(role, role), "content": content} for role, content in turns]
    return json.dumps({"conversations": listed, **more}) + "\n"


GOOD = "".join(
    line(
        ("u", f"How many {n}?"),
        ("a", f"<think>\n{n}\n</think>\n<answer>\n{n}\n</answer>"),
        answer=n,
    )
    for n in range(80)
)
PRETRAIN_CHAT = f"pretrain --model {{teacher}} --data {{in}}/x.jsonl {FAST} --seq_len 200"
CHAT = f"distill --teacher {{teacher}} --data {{in}}/x.jsonl {FAST} --seq_len 200"
REASON = f"reason --student {{teacher}} --data {{in}}/x.jsonl {FAST} --seq_len 200"
DISTILL = f"distill --teacher {{teacher}} --data {{data}} {FAST}"
CACHED = f"cached --teacher {{teacher}} --data {{data}} {FAST}"
PRETRAIN = f"pretrain --model nano --data {{data}} {FAST}"
TEXT = "--text {in}/x.txt"
JSONL = "--jsonl {in}/x.jsonl"
BAD_DATA = "--data {in}/d"
BAD_TEACHER = "--teacher {in}/t"
NO_STUDENT = "no model preset or checkpoint folder 'out/student': use .* makes out/student"
PREPARE = "prepare --vocab_size 300 --problems 20 --prompts 5 --test_problems 5 --out new"


def edit_json(name, **values):
    """Change a JSON file of a copied folder."""

    def edit(folder: Path):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def put(name, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def flip(name):
    def edit(folder):
        content = bytearray((folder / name).read_bytes())
        content[-100] ^= 8
        (folder / name).write_bytes(content)

    return edit


def edit_split(split, **values):
    """Change what meta.json says about one split."""

    def edit(folder: Path):
        about = json.loads((folder / "meta.json").read_text())
        edit_json("meta.json", **{split: {**about[split], **values}})(folder)

    return edit


def empty_split(split):
    def edit(folder: Path):
        (folder / f"{split}.bin").write_bytes(b"")
        edit_split(split, tokens=0, bytes=0)(folder)

    return edit


def edit_weights(change):
    """Change the first matrix of a checkpoint; its manifest goes, as of a model made elsewhere."""

    def edit(folder: Path):
        (folder / "manifest.json").unlink()
        state = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.down_proj.weight"
        state[name] = change(state[name].clone())
        save_file(state, folder / "model.safetensors")

    return edit


def fifo(name):
    def edit(folder: Path):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return edit


def overflowing(folder: Path):
    """Finite weights that give logits of nan."""
    (folder / "manifest.json").unlink()
    state = load_file(folder / "model.safetensors")
    for name in (name for name in state if "norm" in name):
        state[name] *= 1e30
    save_file(state, folder / "model.safetensors")


def made_elsewhere(spoil):
    """Without a manifest, which would notice before anything is read."""

    def edit(folder: Path):
        remove("manifest.json")(folder)
        spoil(folder)

    return edit


def remove(name):
    return lambda folder: (folder / name).unlink()


def other_vocabulary(folder):
    (folder / "manifest.json").unlink()
    save_model(Transformer(ModelConfig.preset("nano", 300)), folder)


def untagged(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace("<think>", "<thonk>"), "utf-8")


def cache_file(**wrong) -> bytes:
    """A teacher cache of no window, but for what `wrong` changes in its header."""
    header = dict(method="hidden", windows=0, seq_len=2, k=0, vocab_size=9, teacher_width=4)
    return json.dumps({**header, **wrong}).encode().ljust(HEADER_BYTES)


# (command, files and copies, what the sentence says)
CASES = [
    # Text and jsonl for prepare.
    (f"{PREPARE} --text {{in}}/no.txt", {}, "no.txt does not exist"),
    (f"{PREPARE} {TEXT}", {"x.txt": ""}, "x.txt is empty"),
    (f"{PREPARE} {TEXT}", {"x.txt": " \n\t\n"}, "x.txt is empty"),
    (f"{PREPARE} {TEXT}", {"x.txt": b"abc\xff\xfe"}, "x.txt is not UTF-8.*byte 3"),
    (f"{PREPARE} {TEXT}", {"x.txt": bytes(range(128, 256)) * 9}, "not UTF-8"),
    (f"{PREPARE} --text {{in}}", {"x.pdf": "text"}, "no .txt or .md file in the folder"),
    (f"{PREPARE} {TEXT}", {"x.txt": "a"}, "too short|needs|add"),
    (f"{PREPARE} --jsonl {{in}}/no.jsonl", {}, "no.jsonl does not exist"),
    (f"{PREPARE} {JSONL}", {"x.jsonl": ""}, "x.jsonl is empty"),
    (f"{PREPARE} {JSONL}", {"x.jsonl": '{"text": "a"}\n{"te'}, "line 2 is not valid"),
    (f"{PREPARE} {JSONL}", {"x.jsonl": "[1, 2]\n"}, "line 1 must be a JSON object"),
    (f"{PREPARE} {JSONL}", {"x.jsonl": "7\n"}, "line 1 must be .* not a int"),
    (f"{PREPARE} {JSONL}", {"x.jsonl": '{"txt": "a"}\n'}, 'line 1 needs .*"text"'),
    (f"{PREPARE} {JSONL}", {"x.jsonl": '{"text": 3}\n'}, 'line 1 needs .*"text"'),
    (f"{PREPARE} {JSONL}", {"x.jsonl": '{"text": ""}\n'}, 'line 1 needs .*"text"'),
    (f"{PREPARE} {JSONL}", {"x.jsonl": b"\xff\xfe{}\n"}, "line 1 is not valid"),
    (f"{PREPARE} {JSONL}", {"x.jsonl": b"\x00" * 99 + b"\n"}, "line 1 is not valid"),
    (f"{PREPARE} {JSONL}", {"x.jsonl": "[" * 100_000 + "\n"}, "line 1 is not valid"),
    (f"{PREPARE} {JSONL}", {"x.jsonl": '{"text": "\\ud800"}\n'}, "line 1 is not"),
    (f"{PREPARE} {TEXT} --vocab_size 10", {"x.txt": "a b\n" * 99}, "--vocab_size 10"),
    (f"{PREPARE} {TEXT} --val_share 0.9", {"x.txt": "a\n"}, "--val_share 0.9"),
    (f"{PREPARE} {TEXT} --val_share nan", {"x.txt": "a\n"}, "--val_share nan"),
    (f"{PREPARE} {TEXT} --problems 0", {"x.txt": "a\n"}, "--problems 0 must be"),
    (f"{PREPARE} {TEXT} --tokenizer nowhere", {"x.txt": "a b\n" * 99}, "no tokenizer"),
    (f"{PREPARE} {TEXT} --reason {{in}}/r", {"x.txt": "a\n" * 9, "r": "{}"}, "r line 1"),
    (
        f"{PREPARE} {TEXT} --reason {{in}}/r",
        {"x.txt": "a\n" * 9, "r": '{"question": "?", "answer": "4"}\n'},
        "r line 1 needs .*#### 42",
    ),
    (
        f"{PREPARE} {TEXT} --reason {{in}}/r",
        {"x.txt": "a\n" * 9, "r": '{"question": "?", "answer": "so #### four"}\n'},
        "r line 1: the answer after #### is 'four'",
    ),
    *(
        (
            f"{PREPARE} {TEXT} --reason {{in}}/r",
            {"x.txt": "a b\n" * 99, "r": GOOD + line(("u", "?"), ("a", "words"), **more)},
            f"r line 81{said}",
        )
        for more, said in (
            ({}, ' needs a user turn and an "answer", a number or a text'),
            ({"answer": [1]}, ' needs a user turn and an "answer", a number or a text'),
            ({"answer": 1, "steps": "two"}, """: "steps" 'two' must be a whole number"""),
        )
    ),
    # Prepared folders that are not whole.
    (f"pretrain --data nowhere {FAST}", {}, "no prepared data in 'nowhere': make it with"),
    (f"{PRETRAIN} {BAD_DATA}", {"d": ("data", cut("train.bin", 50))}, "train.bin does not hold"),
    (f"{PRETRAIN} {BAD_DATA}", {"d": ("data", remove("val.bin"))}, "val.bin does not hold"),
    (f"{PRETRAIN} {BAD_DATA}", {"d": ("data", put("meta.json", b"{"))}, "not valid JSON"),
    (f"{PRETRAIN} {BAD_DATA}", {"d": ("data", put("meta.json", b"[]"))}, "must be a JSON"),
    (f"{PRETRAIN} {BAD_DATA}", {"d": ("data", put("meta.json", b"{}"))}, "meta.json is damaged"),
    (f"{PRETRAIN} {BAD_DATA}", {"d": ("data", edit_json("meta.json", train=3))}, "is damaged"),
    (f"{PRETRAIN} --seq_len 999999", {}, "less than one window of 999999: lower --seq_len"),
    *(
        (f"{PRETRAIN} {BAD_DATA}", {"d": ("data", spoil)}, said)
        for spoil, said in (
            (put("meta.json", NESTED), "meta.json is not valid JSON .maximum recursion"),
            (put("meta.json", b'{"a": ' + b"9" * 5000 + b"}"), "meta.json is not valid JSON"),
            (fifo("meta.json"), "no prepared data in"),
            (fifo("train.bin"), "train.bin does not hold"),
            (edit_json("meta.json", vocab_size="400"), "is damaged .'vocab_size' is '400'"),
            (edit_json("meta.json", vocab_size=True), "is damaged .'vocab_size' is True"),
            (edit_json("meta.json", tokenizer_sha256=None), "'tokenizer_sha256' is None"),
            (edit_json("meta.json", val=[1]), "is damaged .'val' is .1"),
            (edit_split("train", tokens=-1), "is damaged .'tokens' is -1"),
            (edit_split("train", tokens=10**30), "train.bin does not hold"),
            (edit_split("train", tokens=2.5), "is damaged .'tokens' is 2.5"),
            (edit_split("train", dtype="O"), "meta.json is damaged"),
            (edit_split("val", dtype=["u2"]), "is damaged .'dtype'"),
            (edit_split("val", sha256=7), "is damaged .'sha256' is 7"),
            (empty_split("val"), "meta.json is damaged .no tokens"),
            (put("train.bin", b"\xff" * 60), "train.bin does not hold"),
            (edit_json("meta.json", vocab_size=90), "has the id .* outside its vocabulary of 90"),
        )
    ),
    (f"pretrain --data {{in}}/x.txt {FAST}", {"x.txt": "a b"}, "x.txt': it is a file"),
    # Where nothing can be written, which is said before the work is done.
    *(
        (command, {"x": "y", "d/x": "y", "p": line(("u", "?"), answer=1)}, said)
        for command, said in (
            (f"{PRETRAIN} --out {{in}}/x", "/x cannot be made: .*/x is there and is no folder"),
            (f"{PRETRAIN} --out {{in}}/x/y", "/x/y cannot be made: .*/x is there and is no folder"),
            (f"{DISTILL} --out {{in}}/x", "/x is there and is no folder: pass another path"),
            (f"{PREPARE} --text {{in}}/p --out {{in}}/x", "/x is there and is no folder"),
            ("traces --teacher {teacher} --prompts {in}/p --out {in}/d", "is there and is no file"),
            ("traces --teacher {teacher} --prompts {in}/p --out {in}/x/y", "/x is .* no folder"),
            ("traces --teacher {teacher} --prompts {in}/p --out {in}/x", "is not a file to go on"),
            ("cache --teacher {teacher} --data {data} --out {in}/d", "is there and is no file"),
            ("eval.reasoning --model {teacher} --problems {in}/p --out {in}/d", "and is no file"),
            (f"{PRETRAIN} --out=", "--out is empty or no text: give it a value in UTF-8"),
            (f"{PRETRAIN} --out a\0b", "--out is empty or no text: give it a value in UTF-8"),
            (f"{PRETRAIN} --out a\udcff", "--out is empty or no text"),
            (f"{PRETRAIN} --model=", "--model is empty"),
            ("plots --results=", "--results is empty"),
        )
    ),
    (
        "cache --teacher {teacher} --data {data} --out {in}/x",
        {"x": FIFO},
        "x is there and is no file",
    ),
    # What an unfinished or finished run left, spoilt.
    *(
        (f"{PRETRAIN} --out {{in}}/r --resume", {"r/run.json": content}, said)
        for content, said in (
            ("{}", "run.json is damaged .'args' is missing"),
            ('{"args": [1]}', "run.json is damaged .'args' is .1"),
            (NESTED, "run.json is not valid JSON"),
        )
    ),
    *(
        (
            "traces --teacher {teacher} --prompts {in}/p --out {in}/x --device cpu",
            {"p": line(("u", "?"), answer=1), "x": "", "x.progress.json": content},
            said,
        )
        for content, said in (
            ("{}", "x.progress.json is damaged .'options' is missing"),
            ('{"options": 3}', "x.progress.json is damaged .'options' is 3"),
            ('{"options": {}, "problems": "1"}', "is damaged .'problems' is '1'"),
            ('{"options": {}, "problems": 0, "written": -1}', "is damaged .'written' is -1"),
            (NESTED, "x.progress.json is not valid JSON"),
            ("[]", "must be a JSON object, not a list"),
        )
    ),
    # Flags.
    *(
        (f"{PRETRAIN} {flag}", {}, flag.replace("+", "").replace(" ", " ").split(" ")[0])
        for flag in (
            *("--steps 0", "--steps -5", "--batch_size 0", "--seq_len 1", "--seed -1"),
            *("--accumulation_steps 0", "--accumulation_steps 3", "--learning_rate 0"),
            *("--learning_rate nan", "--learning_rate inf", "--learning_rate -1", "--warmup -1"),
            *("--weight_decay -1", "--grad_clip -1", "--grad_clip nan", "--eval_every 0"),
            *(
                "--final_eval 0",
                "--patience -1",
                "--data_share 0",
                "--data_share 1.5",
                "--device abacus",
            ),
        )
    ),
    *(
        (f"pretrain --data {{data}} --device cpu {flag}", {}, flag.split(" ")[0])
        for flag in ("--flops 0", "--flops nan", "--flops inf", "--seconds 0", "--seconds -3")
    ),
    (f"{PRETRAIN} --model huge", {}, "no model preset or checkpoint folder 'huge'"),
    (f"{PRETRAIN} --fsdp", {}, "--fsdp shards .* torchrun"),
    (f"{DISTILL} --alpha 1.5", {}, "--alpha 1.5 must be between 0 and 1"),
    (f"{DISTILL} --alpha nan", {}, "--alpha nan must be between"),
    (f"{DISTILL} --temperature 0", {}, "--temperature 0.0 must be between"),
    (f"{DISTILL} --temperature -2", {}, "--temperature -2.0 must be between"),
    (f"{REASON} --tag_weight -1", {"x.jsonl": GOOD}, "--tag_weight -1.0 must be between"),
    (f"{CHAT} --data_share 0.5", {"x.jsonl": GOOD}, "--data_share is of a prepared folder"),
    # Checkpoints.
    (f"{DISTILL} --teacher nowhere", {}, "no checkpoint in 'nowhere'.* make one with"),
    (f"{DISTILL} --teacher {{in}}", {"x": "y"}, "no checkpoint in|no tokenizer in|does not exist"),
    (f"{DISTILL} {BAD_TEACHER}", {"t": ("teacher", cut("model.safetensors", 99))}, "readable"),
    (f"{DISTILL} {BAD_TEACHER}", {"t": ("teacher", flip("model.safetensors"))}, "is damaged"),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", put("model.safetensors", pickle.dumps({"a": 1})))},
        "is not a readable safetensors file",
    ),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", put("model.safetensors", b"\xff" * 8 + b"{}"))},
        "is not a readable safetensors file",
    ),
    (f"{DISTILL} {BAD_TEACHER}", {"t": ("teacher", remove("model.safetensors"))}, "only safet"),
    (f"{DISTILL} {BAD_TEACHER}", {"t": ("teacher", put("config.json", b"not"))}, "valid JSON"),
    (f"{DISTILL} {BAD_TEACHER}", {"t": ("teacher", remove("config.json"))}, "config.json does"),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", edit_json("config.json", architectures=["GPT2LMHeadModel"]))},
        "architecture 'GPT2LMHeadModel' is not supported",
    ),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", edit_json("config.json", hidden_size=128))},
        "config.json is not the one that these weights were saved with",
    ),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", edit_json("config.json", num_hidden_layers=-1))},
        "num_hidden_layers = -1 must be a positive integer",
    ),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", edit_json("config.json", hidden_act="gelu"))},
        "hidden_act = 'gelu' is not supported",
    ),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", edit_json("config.json", rope_scaling={"rope_type": "yarn"}))},
        "rope_type = 'yarn' is not supported",
    ),
    *(
        (command, {"t": ("teacher", put("tokenizer.json", b"{}")), "x.jsonl": GOOD}, said)
        for said in (
            "t/tokenizer.json is not the one that these weights were saved with: copy that back",
        )
        for command in (
            f"{DISTILL} {BAD_TEACHER}",
            f"{REASON} {BAD_TEACHER}",
            f"{CACHED} {BAD_TEACHER}",
        )
    ),
    *(
        (f"{DISTILL} {BAD_TEACHER}", {"t": ("teacher", spoil)}, said)
        for spoil, said in (
            (put("config.json", NESTED), "config.json is not valid JSON"),
            (fifo("config.json"), "config.json does not exist"),
            (fifo("model.safetensors"), "model.safetensors is a folder, a pipe or a device"),
            (put("manifest.json", b"{}"), "manifest.json is damaged .'sha256' is missing"),
            (put("manifest.json", b'{"sha256": 3}'), "manifest.json is damaged .'sha256' is 3"),
            (put("manifest.json", NESTED), "manifest.json is not valid JSON"),
            (put("config.json", b"\xef\xbb\xbf[]"), "config.json must be a JSON object"),
            (edit_json("config.json", tie_word_embeddings="no"), "'no' must be true or false"),
            (edit_json("config.json", rope_theta=-1), "rope_theta = -1.0 must be a number, 0"),
            (edit_json("config.json", rms_norm_eps=float("nan")), "rms_norm_eps = nan must be"),
            (edit_json("config.json", rope_theta=10**400), "value of the wrong type"),
            (edit_json("config.json", rope_theta="big"), "config.json: could not convert"),
            (edit_json("config.json", num_attention_heads=0), "wrong type|num_attention_heads = 0"),
            (edit_json("config.json", rope_parameters={"full": {"rope_type": "default"}}), "rope"),
            (edit_json("config.json", partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
            (
                edit_json("config.json", quantization_config={"quant_method": "gptq"}),
                "quantization_config = .*gptq.* is not supported",
            ),
            (
                edit_weights(lambda w: w.index_fill(0, torch.tensor([3]), torch.nan)),
                "down_proj.weight has values that are inf or nan: the model is broken",
            ),
            (edit_weights(lambda w: w / 0), "has values that are inf or nan"),
            (edit_weights(lambda w: w.to(torch.int8)), "is of torch.int8, integer or quantised"),
            (edit_weights(lambda w: w.bool()), "is of torch.bool, integer or quantised"),
            (
                edit_weights(lambda w: w.to(torch.float8_e4m3fn)),
                "is of torch.float8_e4m3fn, integer or quantised: use a checkpoint of float32",
            ),
        )
    ),
    *(
        (command, {"t": ("teacher", other_vocabulary), "p": line(("u", "?"), answer=1)}, said)
        for said in ("the tokenizer of '.*/t' has 400 tokens, its model 300: copy in the one",)
        for command in (
            "chat --model {in}/t",
            "eval.reasoning --model {in}/t --problems {in}/p",
            "traces --teacher {in}/t --prompts {in}/p",
        )
    ),
    (f"{DISTILL} {BAD_TEACHER}", {"t": ("teacher", other_vocabulary)}, "both must use one token"),
    *(
        ("chat --model {in}/t", {"t": ("teacher", made_elsewhere(spoil))}, said)
        for spoil, said in (
            (fifo("tokenizer.json"), "no tokenizer in .*/t.*pipe"),
            (put("tokenizer.json", NESTED), "no tokenizer in .*/t"),
            (put("tokenizer.json", b"\xff\xfe"), "no tokenizer in .*/t"),
            (remove("tokenizer.json"), "no tokenizer in .*/t"),
        )
    ),
    (f"{DISTILL} --student {{in}}/t", {"t": ("teacher", other_vocabulary)}, "has vocabulary 300"),
    (f"{PRETRAIN} --model {{in}}/t", {"t": ("teacher", other_vocabulary)}, "has vocabulary 300"),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", edit_json("config.json", num_hidden_layers=10**9))},
        "num_hidden_layers = 1000000000 must be .* at most 1000",
    ),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", edit_json("config.json", vocab_size=10**18))},
        "vocab_size = 10+ must be .* at most",
    ),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", edit_json("config.json", architectures=7))},
        "architecture '7' is not supported",
    ),
    (
        f"{DISTILL} {BAD_TEACHER}",
        {"t": ("teacher", edit_json("config.json", architectures=["\x1b]0;owned\x07\x9b2J"]))},
        "architecture '\ufffd]0;owned\ufffd\ufffd2J' is not supported",
    ),
    # Teacher caches.
    (CACHED, {}, "no teacher cache in .*sample.cache': make it with: python -m dataset.teach"),
    (f"{CACHED} --fsdp", {}, "--fsdp has no whole teacher"),
    (f"{CACHED} --data {{in}}/x.jsonl", {"x.jsonl": GOOD}, "no prepared data in .*x.jsonl"),
    (f"{CACHED} --alpha -1", {"x": "rubbish"}, "--alpha -1.0 must be between 0 and 1"),
    (f"{CACHED} --teacher_cache {{in}}/no.cache", {}, "no teacher cache in .*no.cache"),
    (f"{CACHED} --teacher_cache {{in}}/x", {"x": "rubbish"}, "x is not a teacher cache"),
    (f"{CACHED} --teacher_cache {{in}}/x", {"x": b"\x80" * 9000}, "x is not a teacher cache"),
    *(
        (f"{CACHED} --teacher_cache {{in}}/x", {"x": cache_file(**wrong)}, said)
        for wrong, said in (
            ({"windows": -1}, "x is not a teacher cache .windows -1"),
            ({"windows": 2.0}, "x is not a teacher cache .windows 2.0"),
            ({"seq_len": 10**11}, "x is not a teacher cache|its header says"),
            ({"windows": 10**12}, "its header says 16,000,000,004,128"),
            ({"method": "\x1b[2J"}, "x is not a teacher cache .method"),
            ({"k": "8"}, "x is not a teacher cache .k '8'"),
            ({"k": 10**12, "method": "topk"}, "x is not a teacher cache|its header says"),
            ({"vocab_size": {}}, "x is not a teacher cache .vocab_size"),
            ({"method": ["topk"]}, "x is not a teacher cache .method"),
        )
    ),
    (f"{CACHED} --teacher_cache {{in}}/x", {"x": NESTED[:4096]}, "x is not a teacher cache"),
    (f"{CACHED} --teacher_cache {{in}}/x", {"x": FIFO}, "no teacher cache in"),
    ("cache --teacher nowhere --data {data} --seq_len 16", {}, "no checkpoint in 'nowhere'"),
    ("cache --teacher {teacher} --data {data} --seq_len 16 --k 500", {}, "--k 500 must be between"),
    ("cache --teacher {teacher} --data {data} --seq_len 1", {}, "--seq_len 1 must be between"),
    # Pipes.
    (f"{PREPARE} {TEXT}", {"x.txt": FIFO}, "x.txt is a folder, a pipe or a device: pass a text"),
    (f"{PREPARE} {JSONL}", {"x.jsonl": FIFO}, "x.jsonl is a folder, a pipe or a device"),
    (
        f"{PREPARE} --reason {{in}}/x {TEXT}",
        {"x": FIFO, "x.txt": "a b\n" * 99},
        "/x is a folder, a",
    ),
    (CHAT, {"x.jsonl": FIFO}, "x.jsonl is a folder, a pipe or a device: pass a jsonl file"),
    # Conversations.
    (CHAT, {}, "x.jsonl does not exist"),
    (CHAT, {"x.jsonl": ""}, "x.jsonl is empty"),
    (CHAT, {"x.jsonl": GOOD + "{\n"}, "x.jsonl line 81 is not valid JSON"),
    (CHAT, {"x.jsonl": GOOD + '{"conversations": []}\n'}, 'line 81 needs "conversations"'),
    (CHAT, {"x.jsonl": GOOD + '{"conversations": "hi"}\n'}, 'line 81 needs "conversations"'),
    (CHAT, {"x.jsonl": GOOD + '{"messages": []}\n'}, 'line 81 needs "conversations"'),
    (CHAT, {"x.jsonl": GOOD + line(("robot", "hi"), ("a", "yes"))}, "line 81: role 'robot' must"),
    (CHAT, {"x.jsonl": GOOD + line(("u", "hi"))}, "line 81 has no assistant turn"),
    (CHAT, {"x.jsonl": GOOD + line(("u", "hi"), ("a", ""))}, "line 81 has no assistant turn"),
    (CHAT, {"x.jsonl": GOOD + line(("u", "hi"), ("a", None))}, "line 81: the assistant turn needs"),
    (CHAT, {"x.jsonl": GOOD + '{"conversations": [3]}\n'}, "line 81: role 3 must be one of"),
    (
        CHAT,
        {"x.jsonl": GOOD + line(("u", "long " * 300), ("a", "short"))},
        "line 81: no word of the assistant is within the first 200 tokens",
    ),
    (CHAT, {"x.jsonl": line(("u", "one"), ("a", "line"))}, "none of its 1 conversations"),
    (CHAT, {"x.jsonl": line(("u", "one"), ("a", "line")) * 9}, "none of its 9 conversations"),
    (CHAT, {"x.jsonl": line(("u", "?"), ("a", " \n"))}, "has no assistant turn with words in it"),
    (
        CHAT,
        {"x.jsonl": line(("u", "?"), ("tool", "12:00")) * 3},
        "every line is bad, nothing is left to learn from .*line 1 has no assistant turn",
    ),
    (PRETRAIN_CHAT, {"x.jsonl": GOOD + "{\n"}, "x.jsonl line 81 is not valid JSON"),
    (
        f"{PRETRAIN_CHAT} --model nano --tokenizer nowhere",
        {"x.jsonl": GOOD},
        "no tokenizer in 'nowhere'",
    ),
    (REASON, {}, "x.jsonl does not exist"),
    (REASON, {"x.jsonl": GOOD + "nope\n"}, "x.jsonl line 81 is not valid JSON"),
    (f"{REASON} --teacher nowhere", {"x.jsonl": GOOD}, "no checkpoint in 'nowhere'.* make"),
    (f"{REASON} --student out/student --tokenizer {{data}}", {"x.jsonl": GOOD}, NO_STUDENT),
    (
        f"{REASON} --student nano --tokenizer nowhere",
        {"x.jsonl": GOOD},
        "no tokenizer in 'nowhere'",
    ),
    (
        f"{REASON} --student {{in}}/t",
        {"x.jsonl": GOOD, "t": ("teacher", untagged)},
        "the tokenizer has no token '<think>'|tokenizer",
    ),
    # Writing and judging replies.
    ("traces --teacher nowhere --prompts {data}/reason_prompts.jsonl", {}, "no checkpoint in"),
    ("traces --teacher {teacher} --prompts {in}/no", {}, "no does not exist"),
    ("traces --teacher {teacher} --prompts {in}/x", {"x": line(("u", "?"))}, '1 needs .*"answer"'),
    *(
        (
            "eval.reasoning --model {teacher} --problems {in}/x --out {in}/y",
            {"x": line(("u", "?"), answer=1, steps=2) + line(("u", "?"), **more)},
            said,
        )
        for more, said in (
            ({"answer": 1, "steps": "2"}, """x line 2: "steps" '2' must be a whole number"""),
            ({"answer": 1, "steps": [1]}, """x line 2: "steps" .1. must be a whole number"""),
            ({"answer": 1, "steps": -1}, 'x line 2: "steps" -1 must be'),
            ({"answer": 1, "steps": True}, 'x line 2: "steps" True must be'),
            ({"answer": None}, 'x line 2 needs .*"answer", a number or a text'),
            ({"answer": True}, 'x line 2 needs .*"answer", a number or a text'),
            ({"answer": [1]}, 'x line 2 needs .*"answer", a number or a text'),
            ({"answer": " "}, 'x line 2 needs .*"answer", a number or a text'),
            ({"answer": float("nan")}, 'x line 2 needs .*"answer", a number or a text'),
        )
    ),
    (
        "eval.reasoning --model {teacher} --max_new_tokens 0",
        {},
        "--max_new_tokens 0 must be between",
    ),
    ("traces --teacher {teacher} --max_new_tokens 0", {}, "--max_new_tokens 0 must be between"),
    ("traces --teacher {teacher} --samples 0", {}, "--samples 0 must be between"),
    ("traces --teacher {teacher} --samples 2", {}, "--samples 2 at --temperature 0"),
    ("eval.reasoning --model nowhere", {}, "no checkpoint in 'nowhere'|does not exist"),
    ("eval.reasoning --model {teacher} --problems {in}/x", {"x": "{}\n"}, "line 1 needs"),
    ("perplexity --model {teacher} --data nowhere", {}, "no prepared data in 'nowhere'"),
    ("perplexity --model {teacher} --data {data} --seq_len 0", {}, "--seq_len 0 must be between"),
    ("perplexity --model nowhere --data {data}", {}, "no checkpoint in 'nowhere'"),
    ("chat --model nowhere", {}, "no checkpoint in 'nowhere'"),
    ("chat --model {teacher} --temperature -1", {}, "--temperature -1.0 must be between"),
    ("chat --model {teacher} --max_new_tokens 5000", {}, "--max_new_tokens 5000 must be"),
    # Asking a server, before it is asked.
    ("ask --model m", {}, "nothing says what to ask"),
    ("ask --model m --prompts {in}/x --samples 0", {}, "--samples 0 must be between"),
    ("ask --model m --prompts {in}/x", {"x": line(("u", "?"))}, '1 needs .*"answer"'),
    ("ask --model m --keep all --prompts {in}/x", {"x": line(("a", "?"))}, "1 needs a user turn"),
    ("ask --model m --seeds {in}/x --expand 3", {"x": "nope\n"}, "line 1 is not valid JSON"),
    ("ask --model m --topics {in}/x --expand 3", {"x": b"\xff"}, "x is not UTF-8 text"),
    ("ask --model m --topics {in}/x --expand 3", {"x": FIFO}, "x is a folder, a pipe"),
    # Pictures and numbers.
    ("plots --results nowhere", {}, "no results.csv below 'nowhere'"),
    *(
        ("plots --results {in}/r", {"r/headline/results.csv": content}, said)
        for content, said in (
            ("arm,seed\nplain\n", "results.csv: row 1 has more or fewer columns"),
            ("arm,seed\nplain,0,1\n", "results.csv: row 1 has more or fewer columns"),
            (b"arm,seed\n\xff\xfe\n", "results.csv is not a CSV"),
            ("seed\n0\n", "headline cannot be drawn .KeyError: 'arm'"),
            ("arm,seed,val_loss\ndistilled,0,low\n", "headline cannot be drawn"),
        )
    ),
    ("benchmark --out {in}", {}, "is there and is no file: pass another path"),
    ("benchmark --out {in}/x", {"x": "group,size,variant\n1,2,3\n"}, "x is not a CSV of this"),
    ("costs --results {in}/x", {"x": "group,size,variant\n1,2,3\n"}, "x is not a CSV of this"),
    # Numbers that overflow, and what has none.
    *(
        (command, {"t": ("teacher", overflowing)}, "guess is (inf or )?nan.*download it again")
        for command in (
            "perplexity --model {in}/t --data {data} --seq_len 32",
            "perplexity --model {teacher} --teacher {in}/t --data {data} --seq_len 32",
            f"distill {BAD_TEACHER} --data {{data}} {FAST}",
            "eval.reasoning --model {in}/t --problems {data}/reason_test.jsonl --out {in}/y",
        )
    ),
    (
        "perplexity --model {in}/t --data {data} --seq_len 32",
        {"t": ("teacher", made_elsewhere(edit_json("config.json", rope_theta=0)))},
        "a model's guess is nan: train it, or download it again",
    ),
    (f"{PRETRAIN} --device meta", {}, "--device meta is not usable"),
    ("perplexity --model {teacher} --data {data} --device meta", {}, "--device meta is not usable"),
    (
        "eval.reasoning --model {teacher} --problems {in}/x --out {in}/y",
        {"x": line(("u", "?"), answer=1) + line(("u", "long " * 2000), answer=1)},
        "and 160 new ones need more than the model's 1024 positions: ask for less",
    ),
    ("benchmark --against {in}/x", {"x": "a,b\n"}, "x is not a CSV of this benchmark|no size"),
    ("costs --results nowhere.csv", {}, "nowhere.csv is not a CSV"),
]


@pytest.fixture(scope="module")
def teacher(prepared_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "teacher"
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig.preset("nano", 400)), folder, prepared_folder)
    return folder


def snapshot(*folders) -> dict:
    """Hash of every file; the empty files that stand for locks do not count."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def test_there_are_enough_cases():
    assert len(CASES) >= 80 and {case[0].split()[0] for case in CASES} == set(COMMANDS)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{n}-{CASES[n][0].split()[0]}")
def test_bad_input(number, prepared_folder, teacher, tmp_path, monkeypatch, capsys):
    command, files, message = CASES[number]
    given = tmp_path / "in"
    given.mkdir()
    for name, content in files.items():
        if isinstance(content, tuple):
            source, spoil = content
            shutil.copytree({"data": prepared_folder, "teacher": teacher}[source], given / name)
            spoil(given / name)
        else:
            (given / name).parent.mkdir(parents=True, exist_ok=True)
            if content is FIFO:
                os.mkfifo(given / name)
                continue
            content = content if isinstance(content, bytes) else content.encode("utf-8")
            (given / name).write_bytes(content)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    name, *words = command.replace("{data}", "{0}").replace("{teacher}", "{1}").split()
    words = [w.replace("{in}", str(given)).format(prepared_folder, teacher) for w in words]
    before = snapshot(tmp_path, prepared_folder, teacher)
    module = COMMANDS[name]
    with pytest.raises(SystemExit) as stopped:
        command_line(module.main, module.parse_args(words))
    said = capsys.readouterr().err.strip()
    sentence = said.splitlines()[-1]
    assert stopped.value.code == 2
    assert sentence.startswith("error: ") and "Traceback" not in said
    assert re.search(message, sentence), sentence
    assert printable(sentence) == sentence
    assert len(said.splitlines()) == 1 or "it/s" in said, said
    assert snapshot(tmp_path, prepared_folder, teacher) == before


@pytest.mark.parametrize("script", [PRETRAIN_CHAT, CHAT, REASON])
def test_bad_lines_are_counted_and_left_out(script, prepared_folder, teacher, tmp_path, capsys):
    """The same weights as without them; the first three are shown."""
    bad = ["{", '{"a": 1}', line(("robot", "hi")), line(("u", "?")), "[]"]
    lines = GOOD.splitlines(keepends=True)
    mixed = "".join(lines[:40]) + "\n".join(bad) + "\n" + "".join(lines[40:])
    weights = []
    for name, content, more in (("good", GOOD, ""), ("mixed", mixed, "--skip_bad")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text(content, "utf-8")
        command = f"{script} {more} --out {tmp_path}/{name}/out"
        command = command.replace("{in}", f"{tmp_path}/{name}")
        command = command.format(data=prepared_folder, teacher=teacher)
        module = COMMANDS[command.split()[0]]
        module.main(module.parse_args(command.split()[1:]))
        weights.append((tmp_path / name / "out" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    said = capsys.readouterr().out
    assert "5 bad lines were left out:" in said and "and 2 more" in said
    assert said.count("line 41 is not valid JSON") == 1


# Hostile files.


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_no_pickle_is_ever_loaded(prepared_folder, teacher, tmp_path, monkeypatch, capsys):
    """As weights, as other files of a folder, and as the state of a run."""
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(teacher, tmp_path / "t")
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="only safetensors checkpoints are read"):
        load_model(folder)
    folder = tmp_path / "run" / "resume"
    folder.mkdir(parents=True)
    torch.save(Bomb(), folder / "state")
    digest = hashlib.sha256((folder / "state").read_bytes()).hexdigest()
    state = (folder / "state").rename(folder / f"state-000000002-{digest[:16]}.pt")
    words = PRETRAIN.format(data=prepared_folder).split()[1:]
    with pytest.raises(ValueError, match=rf"{state.stem}\.pt is damaged"):
        train_pretrain.main(train_pretrain.parse_args([*words, "--out", "run", "--resume"]))
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))  # the bomb works
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("state", [{}, [], 3, {"flags": 3}, {"flags": {}, "made_from": 3}])
def test_a_state_of_another_form_is_refused(state, prepared_folder, tmp_path, monkeypatch):
    """Its name has the sha256 of its bytes: whoever made it knew how."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run" / "resume"
    folder.mkdir(parents=True)
    torch.save(state, folder / "state")
    digest = hashlib.sha256((folder / "state").read_bytes()).hexdigest()
    (folder / "state").rename(folder / f"state-000000002-{digest[:16]}.pt")
    words = PRETRAIN.format(data=prepared_folder).split()[1:]
    with pytest.raises(ValueError, match="damaged|cannot resume run with"):
        train_pretrain.main(train_pretrain.parse_args([*words, "--out", "run", "--resume"]))


@pytest.mark.parametrize("rate", [-5, 0, -1.0, 0.0, 10**400, "nan", [1], None])
def test_a_record_that_is_wrong_sets_no_rate(rate, prepared_folder, teacher, tmp_path, capsys):
    """run.json of a stranger's student: the rate is then that of any folder."""
    student = shutil.copytree(teacher, tmp_path / "s")
    (student / "run.json").write_text(json.dumps({"args": {"learning_rate": rate}}))
    command = f"pretrain --model {student} --data {prepared_folder} {FAST} --out {tmp_path}/out"
    train_pretrain.main(train_pretrain.parse_args(command.split()[1:]))
    assert "at rate 2e-05" in capsys.readouterr().out


def test_what_a_tokenizer_file_adds_to_texts_is_left_out(prepared_folder, tmp_path):
    """Others' tokenizer.json may cut texts to a length, or fill them up to one."""
    folder = shutil.copytree(prepared_folder, tmp_path / "d")
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    fill |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    edit_json("tokenizer.json", truncation=cut, padding=fill)(folder)
    for text in ("a", "the sea sings to the old king and the ship sleeps"):
        assert encode(load_tokenizer(folder), text) == encode(load_tokenizer(prepared_folder), text)


def test_a_vocabulary_may_have_more_rows_than_tokens(prepared_folder, teacher, tmp_path):
    """As Qwen's: data that is prepared for such a model, and students, have the tokens alone."""
    folder = shutil.copytree(teacher, tmp_path / "padded")
    made_elsewhere(edit_json("config.json", vocab_size=448))(folder)
    state = load_file(folder / "model.safetensors")
    rows = state["model.embed_tokens.weight"]
    state["model.embed_tokens.weight"] = torch.cat((rows, rows[:48]))
    save_file(state, folder / "model.safetensors")
    (tmp_path / "x.txt").write_text("the sea sings to the old king\n" * 200)
    out = f"--tokenizer {folder} --out {tmp_path}/data --problems 40 --test_problems 5 --prompts 5"
    prepare.main(prepare.parse_args(["--text", str(tmp_path / "x.txt"), *out.split()]))
    traces = f"{tmp_path}/data/reason_train.jsonl --tokenizer {tmp_path}/data --seq_len 512"
    for name, data in (("distill", f"{tmp_path}/data"), ("distill", traces), ("reason", traces)):
        words = f"--teacher {folder} --student nano {FAST} --data {data} --overwrite"
        module = COMMANDS[name]
        record = module.main(module.parse_args([*words.split(), "--out", f"{tmp_path}/out"]))
        assert record["config"]["vocab_size"] == 400


@pytest.mark.parametrize(
    "wrong, said",
    [
        *(({"lora_alpha": x}, "'lora_alpha' is") for x in (None, "16", [1], 0, float("nan"))),
        ({"r": 0}, "an adapter of rank 0"),
        ({"r": "8"}, "'r' is '8'"),
        ({"target_modules": [3]}, "no layer is called 3"),
        ({"target_modules": "q_proj"}, "'target_modules' is 'q_proj'"),
    ],
)
def test_an_adapter_of_another_form_is_refused(wrong, said, teacher, tmp_path):
    model = load_model(teacher)
    add_lora(model, 2, 4.0)
    save_lora(model, tmp_path, teacher)
    edit_json("adapter_config.json", **wrong)(tmp_path)
    with pytest.raises(ValueError, match=said):
        load_lora(load_model(teacher), tmp_path)
