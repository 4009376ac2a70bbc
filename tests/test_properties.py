"""Properties that hold for every input, looked for by machine: losses of extreme logits against
plain Python, and readers that are fed rubbish.

Each property is tried some hundred times; with --slow the fuzzers try 100,000 inputs."""

import contextlib
import hashlib
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_distill_reason
import train_distillation
import train_pretrain
from dataset import prepare
from dataset.chat import check_conversation, encode_conversation
from dataset.packing import PackedText
from dataset.problems import check_response, make_problem
from dataset.replies import read_problems
from dataset.sources import jsonl_texts
from dataset.teacher_cache import HEADER_BYTES, read_header
from dataset.tokenizer import TAGS, decode, encode_tagged, load_tokenizer, special_id
from distill import fused_loss, reasoning_weights, weighted_cross_entropy
from distill.sparse import sample, top_k
from files import GrowingFile, read_json
from files.atomic import parse_json
from methods import cached_teacher
from model import ModelConfig
from model.checkpoint import check_manifest, read_config, weight_files

SETTINGS = settings(
    max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


# Losses.


@st.composite
def batches(draw):
    """Logits of both models (B, S, V), labels, weights, temperature, alpha; as extreme as it gets:
    up to 1e4, with -inf, one-hot teachers, V = 1, S = 1, nothing valid."""
    B, S, V = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scales = draw(st.tuples(*[st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])] * 2))
    student, teacher = (scale * rng.standard_normal((B, S, V)) for scale in scales)
    labels = rng.integers(-1, V, (B, S))
    labels[labels < 0] = -100
    kind = draw(st.sampled_from(["plain", "one-hot", "masked"]))
    if kind == "one-hot":
        teacher = np.where(np.arange(V) == rng.integers(0, V, (B, S, 1)), 0.0, -np.inf)
    elif kind == "masked" and V > 1:  # the same tokens ruled out for both, never the label
        ruled_out = rng.random((B, S, V)) < 0.4
        ruled_out[..., 0] = False
        np.put_along_axis(ruled_out, np.maximum(labels, 0)[..., None], False, axis=-1)
        student[ruled_out] = teacher[ruled_out] = -np.inf
    weights = rng.choice([0.0, 1.0, 0.3, 10.0], (B, S))
    if draw(st.booleans()):
        weights[:] = 0.0
    temperature = draw(st.sampled_from([0.1, 1.0, 3.0, 100.0]))
    alpha = draw(st.sampled_from([0.0, 0.5, 1.0]))
    return student, teacher, labels, weights, temperature, alpha


def log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    total = math.log(sum(math.exp(value - top) for value in values))
    return [value - top - total for value in values]


def slow_loss(student, teacher, labels, weights, temperature, alpha) -> float:
    """alpha * CE + (1 - alpha) * T^2 * KL, a number at a time; -100 counts 0."""
    loss = total = 0.0
    for index in np.ndindex(labels.shape):
        weight = float(weights[index]) if labels[index] != -100 else 0.0
        if weight == 0:
            continue
        total += weight
        if alpha > 0:
            loss -= weight * alpha * log_softmax(student[index].tolist())[labels[index]]
        if alpha < 1:
            p = log_softmax((teacher[index] / temperature).tolist())
            q = log_softmax((student[index] / temperature).tolist())
            terms = [math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if math.exp(a) > 0]
            loss += weight * (1 - alpha) * temperature**2 * sum(terms)
    return loss / (total or 1.0)


def tolerance_of(dtype, student, teacher, temperature):
    if dtype == torch.float64:
        return {"rel": 1e-9, "abs": 1e-9}
    # float32: logits are rounded to 1 part in 10^7 before anything else
    sizes = [np.abs(x[np.isfinite(x)]).max(initial=1.0) for x in (student, teacher)]
    return {"rel": 1e-4, "abs": 1e-5 * max(sizes) * max(temperature, 1.0)}


@SETTINGS
@given(batches(), st.sampled_from([torch.float32, torch.float64]))
def test_losses_of_extreme_logits(batch, dtype):
    """Lesson 3 (lesson 2 where weights are 1; lesson 1 at alpha 1) and the fused loss equal plain
    Python and each other's gradient, which is finite."""
    student, teacher, labels, weights, temperature, alpha = batch
    weights = np.where(labels == -100, 0.0, weights)
    V, tolerance = student.shape[-1], tolerance_of(dtype, student, teacher, temperature)
    logits = torch.tensor(student, dtype=dtype).view(-1, V).requires_grad_()
    others = torch.tensor(teacher, dtype=dtype).view(-1, V)
    flat, share = torch.tensor(labels).flatten(), torch.tensor(weights, dtype=dtype).flatten()
    lesson3 = train_distill_reason.compute_loss(logits, others, flat, share, temperature, alpha)[0]
    grad = torch.autograd.grad(lesson3, logits)[0]
    assert grad.isfinite().all()
    assert lesson3.item() == pytest.approx(slow_loss(*batch), **tolerance)
    # Lessons 1 and 2 have no weights.
    expected = slow_loss(student, teacher, labels, np.ones_like(weights), temperature, alpha)
    lesson2 = train_distillation.compute_loss(logits, others, flat, temperature, alpha)[0]
    assert torch.autograd.grad(lesson2, logits)[0].isfinite().all()
    assert lesson2.item() == pytest.approx(expected, **tolerance)
    if alpha == 1:
        lesson1 = train_pretrain.compute_loss(logits, flat)[0]
        assert lesson1.item() == pytest.approx(expected, **tolerance)
    # The fused loss, with hidden states that are logits and a head that is the identity.
    if np.isfinite(student).all() and np.isfinite(teacher).all():
        eye = torch.eye(V, dtype=dtype)
        rest = ((others, eye), flat, share, temperature, alpha)
        lesson = train_distill_reason.compute_loss
        fused, _ = fused_loss(lesson, (logits, eye), *rest, weight=share, chunk=2)
        torch.testing.assert_close(
            torch.autograd.grad(fused, logits)[0], grad, rtol=1e-4, atol=1e-5
        )
        assert fused.item() == pytest.approx(lesson3.item(), **tolerance)


@SETTINGS
@given(batches(), st.integers(1, 3))
def test_a_batch_cut_into_pieces_is_the_same_loss(batch, size):
    """Weighted by the sums of their weights, as run.step is told."""
    student, teacher, labels, weights, temperature, alpha = (
        torch.tensor(x) if isinstance(x, np.ndarray) else x for x in batch
    )
    weights = torch.where(labels == -100, 0.0, weights)
    rows = [x.flatten(0, 1) for x in (student, teacher, labels, weights)]

    def loss(piece):
        *tensors, share = piece
        value = train_distill_reason.compute_loss(*tensors, share, temperature, alpha)[0]
        return float(value), float(share.sum())

    pieces = [loss(piece) for piece in zip(*(x.split(size) for x in rows), strict=True)]
    whole, total = loss(rows)
    found = sum(value * share for value, share in pieces) / (total or 1.0)
    assert found == pytest.approx(whole, rel=1e-9, abs=1e-9)


@SETTINGS
@given(batches(), st.sampled_from(["topk", "tail", "sample"]))
def test_every_token_kept_is_the_whole_teacher(batch, method):
    """k = V: what a cache file would hold, in float64, gives lesson 2."""
    student, teacher, labels, _, temperature, alpha = batch
    B, S, V = student.shape
    logits, others = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
    log_probs = (others / temperature).log_softmax(-1).view(-1, V)
    ids, kept, rest = top_k(log_probs, V)
    if method == "sample":
        ids, kept, rest = sample(log_probs, V, torch.Generator().manual_seed(0))
    fields = [x.view(B, S, *x.shape[1:]) for x in (ids, kept, rest)]
    cached, _ = cached_teacher.compute_loss(
        logits, torch.tensor(labels), method, fields, temperature, alpha
    )
    whole, _ = train_distillation.compute_loss(
        logits, others, torch.tensor(labels), temperature, alpha
    )
    near = {"rtol": 1e-6, "atol": 1e-6 * max(1.0, temperature**2)}
    if method == "tail":  # the student's tail is at least 1e-6
        near = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, temperature**2)}
    torch.testing.assert_close(cached, whole, **near)
    assert torch.autograd.grad(cached, logits)[0].isfinite().all()


@SETTINGS
@given(
    st.lists(st.sampled_from([-100, 2, 3, 4, 5, 6, 7, 8]), min_size=1, max_size=12),
    st.floats(0, 100), st.floats(0, 100), st.floats(0, 100),
)  # fmt: skip
def test_weights_are_one_of_the_four(labels, tag, think, answer):
    """Nothing on the prompt; every other token has one of the weights that were asked for."""
    tensor = torch.tensor([labels])
    weights = reasoning_weights(tensor, tag, think, answer)
    assert (weights[tensor == -100] == 0).all()
    tags = (tensor >= 3) & (tensor <= 6)
    torch.testing.assert_close(weights[tags], torch.full_like(weights[tags], tag))
    allowed = torch.tensor([tag, think, answer, 1.0])
    for value in weights[(tensor != -100) & ~tags]:
        assert (value - allowed).abs().min() <= 1e-4 * max(1.0, float(value))
    loss = weighted_cross_entropy(torch.zeros(1, len(labels), 9), tensor, weights)
    assert loss.item() == pytest.approx(math.log(9) if weights.sum() > 0 else 0.0, rel=1e-4)


# Readers.


@pytest.fixture(scope="module")
def tokenizer(prepared_folder):
    return load_tokenizer(prepared_folder)


AMOUNT = pytest.mark.parametrize(
    "count", [1000, pytest.param(100_000, marks=pytest.mark.slow)], ids=["some", "many"]
)
PIECES = [
    *TAGS, "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think", "think>", "</", "\n", " ", "",
    "a", "12", "=", "+", "é", "日本", "\x00", "\x1b[2J", "\u202e", "😀", "system", "user\n", "-100",
]  # fmt: skip


def rubbish(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randrange(8)))


@AMOUNT
def test_any_line_is_an_object_or_an_error(count):
    rng = random.Random(count)
    good = json.dumps({"conversations": [{"role": "user", "content": "é 1"}]}).encode()
    for _ in range(count):
        line = bytearray(good)
        for _ in range(rng.randrange(4)):
            line[rng.randrange(len(line))] = rng.choice(b'{}[]",:\\u0d8\xff\x00 etn9-')
        line = bytes(line[: rng.choice([None, rng.randrange(len(line))])])
        try:
            value = parse_json(line, "x line 1")
            assert isinstance(value, dict)
            check_conversation(value, "x line 1")
        except ValueError as error:
            assert str(error).startswith("x line 1")


@AMOUNT
def test_any_header_is_read_or_refused(count, tmp_path):
    """config.json and the header of a cache: whatever stands in them, nothing is allocated."""
    rng = random.Random(count)
    config = ModelConfig().to_json()
    header = dict(method="topk", windows=0, seq_len=2, k=1, vocab_size=9, teacher_width=4)
    values = [
        None,
        True,
        -1,
        0,
        3,
        1.5,
        10**9,
        10**30,
        float("nan"),
        "",
        "7",
        [],
        [8],
        {},
        {"a": 1},
    ]
    for _ in range(count // 10):
        wrong = {rng.choice([*config, "rope_scaling"]): rng.choice(values) for _ in range(2)}
        with contextlib.suppress(ValueError):
            read = ModelConfig.from_json({**config, **wrong})
            assert read.num_hidden_layers <= 1000 and read.vocab_size <= 10**7
        wrong = {rng.choice(list(header)): rng.choice(values) for _ in range(2)}
        content = json.dumps({**header, **wrong}).encode().ljust(HEADER_BYTES)
        (tmp_path / "x").write_bytes(content + hashlib.sha256(content).digest())
        with contextlib.suppress(ValueError):
            assert read_header(tmp_path / "x")["windows"] == 0


# What a file may hold: any JSON, of any depth. Words that readers know are among its keys.
WORDS = "role content text conversations answer steps options bytes sha256 type model vocab".split()
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([10**9, 10**30, -(10**400)]),
    st.floats(), st.sampled_from(WORDS), st.text(max_size=3),
)  # fmt: skip


def in_containers(inner):
    keys = st.sampled_from(WORDS) | st.text(max_size=2)
    return st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)


ANY = st.recursive(LEAVES, in_containers, max_leaves=8)


def nested(value, depth: int):
    for _ in range(depth):
        value = [value]
    return value


def spoil(draw, good):
    """`good` with one to three of its values replaced, left out, or put into lists."""
    spoilt = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 3))):
        place, inside = spoilt, []
        while isinstance(place, (dict, list)) and place:
            keys = sorted(place) if isinstance(place, dict) else range(min(len(place), 4))
            inside.append((place, draw(st.sampled_from(list(keys)))))
            place = place[inside[-1][1]]
        if not inside:
            continue
        place, key = inside[draw(st.integers(0, len(inside) - 1))]
        kind = draw(st.sampled_from(["other", "nested", "gone"]))
        if kind == "gone":
            del place[key]
        else:
            depth = draw(st.sampled_from([1, 3, 50]))
            place[key] = draw(ANY) if kind == "other" else nested(place[key], depth)
    return spoilt


CONVERSATION = {
    "conversations": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "2+2=4", "tool_calls": []},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "<think>\n2+2=4\n</think>\n<answer>\n4\n</answer>"},
    ],
    "answer": 4, "steps": 1,
}  # fmt: skip
RECORD = {"options": {"a": "1", "made_from": {"x": "0"}}, "kept": 1, "bytes": 0}
CACHE = dict(method="topk", windows=0, seq_len=2, k=1, vocab_size=9, teacher_width=4)
W, VAL = "model.safetensors", ("val", 4)


def read_line(path: Path) -> None:
    """A jsonl line by everything that reads one."""
    with contextlib.suppress(ValueError):
        prepare.user_reasoning(path, False, 0.5)
    with contextlib.suppress(ValueError):
        jsonl_texts(path)
    read_problems(path)


def read_all(folder: Path) -> None:
    """A tokenizer, used as every script does."""
    found = load_tokenizer(folder)
    decode(found, encode_tagged(found, "the king <think> 12 é"))


def read_record(path: Path) -> None:
    path.with_name("grown").write_text("")
    GrowingFile(path.with_name("grown"), {"a": "1"}, kept=0).file.close()


@pytest.mark.parametrize(
    "name, good, read",
    [
        ("config.json", lambda _: ModelConfig().to_json(), lambda p: read_config(p.parent)),
        ("manifest.json", lambda _: {"sha256": ["0" * 64]}, lambda p: check_manifest(p.parent / W)),
        (f"{W}.index.json", lambda _: {"weight_map": {"a": W}}, lambda p: weight_files(p.parent)),
        ("meta.json", lambda d: read_json(d / "meta.json"), lambda p: PackedText(p.parent, *VAL)),
        ("tokenizer.json", lambda d: read_json(d / "tokenizer.json"), lambda p: read_all(p.parent)),
        ("grown.progress.json", lambda _: RECORD, read_record),
        ("x.jsonl", lambda _: CONVERSATION, read_line),
        ("y.jsonl", lambda _: {"question": "?", "answer": "so\n#### 1,234"}, read_line),
        ("z.jsonl", lambda _: {"text": "<|im_start|>a<|im_end|>"}, read_line),
        ("x.cache", lambda _: CACHE, read_header),
    ],
)  # fmt: skip
def test_any_structure_is_read_or_refused_in_a_sentence(
    name, good, read, prepared_folder, tmp_path
):
    """Types, depths, missing keys: no file ends in a traceback, or is read for ever."""
    if name == "meta.json":
        for needed in ("val.bin", "tokenizer.json"):
            shutil.copy(prepared_folder / needed, tmp_path)
    if name == "manifest.json":
        (tmp_path / W).write_bytes(b"")
    path, whole = tmp_path / name, good(prepared_folder)

    @settings(SETTINGS, max_examples=100 if name != "tokenizer.json" else 40)
    @given(st.data())
    def tried(data):
        value = spoil(data.draw, whole)
        content = json.dumps(value).encode("utf-8")
        path.write_bytes(content.ljust(HEADER_BYTES) if name == "x.cache" else content)
        try:
            read(path)
        except ValueError as error:
            assert str(error), "an error has a sentence"

    tried()
    for content in (b"[" * 10**5, b'{"a":' * 10**5, b"9" * 5000, b"\xef\xbb\xbf", b"\x00", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            read(path)


@AMOUNT
def test_any_conversation_is_encoded_faithfully(count, tokenizer):
    """A user's words give no control token; labels are the assistant's words, all of them."""
    rng = random.Random(count)
    start, end = (special_id(tokenizer, name) for name in ("<|im_start|>", "<|im_end|>"))
    tags = {special_id(tokenizer, tag) for tag in TAGS}
    for _ in range(count):
        turns = [
            {"role": rng.choice(["system", "user", "assistant"]), "content": rubbish(rng)}
            for _ in range(rng.randrange(1, 4))
        ]
        ids, labels = encode_conversation(tokenizer, turns)
        assert len(ids) == len(labels)
        assert ids.count(start) == len(turns)
        told = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        said = [label for label in labels if label != -100]
        assert said.count(end) == len(told)
        assert decode(tokenizer, said) == "".join(text + "<|im_end|>" for text in told)
        learned = {place + 1 for place, label in enumerate(labels) if label != -100}
        for place, token in enumerate(ids):  # outside the assistant's words no tag is a tag
            assert token not in tags or place in learned


@AMOUNT
def test_the_checker_never_fails_and_never_verifies_nonsense(count):
    """Gold traces verify; a trace with one character changed never verifies a wrong sum."""
    rng = random.Random(count)
    problem = make_problem(rng, 3)
    for number in range(count):
        if number % 50 == 0:
            problem = make_problem(rng, rng.randrange(1, 5))
            gold = check_response(problem.question, problem.response())
            assert gold.verified and gold.answer == problem.answer
        text = list(problem.response())
        for _ in range(rng.randrange(1, 3)):
            text[rng.randrange(len(text))] = rng.choice([*"0123456789+-*/=:\n <>", rubbish(rng)])
        text = "".join(text)
        check = check_response(problem.question, text)
        assert check.well_formed or not check.verified
        if check.verified:
            assert f"<answer>\n{check.answer}\n</answer>" in text
            for line in text.split("<think>\n")[1].split("\n</think>")[0].split("\n"):
                parts = line.rpartition(":")[2].strip().split("=")[1:]
                if len(parts) == 2:
                    assert eval(parts[0].replace("/", "//")) == int(parts[1])
