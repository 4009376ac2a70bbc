"""Properties that hold for every input, looked for by machine: losses of extreme logits against
plain Python, and readers that are fed rubbish.

Each property is tried some hundred times; with --slow the fuzzers try 100,000 inputs."""

import contextlib
import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset.cache_file import HEADER_BYTES, read_header
from dataset.chat import check_conversation, encode_conversation
from dataset.problems import check_response, make_problem
from dataset.sources import parse_line
from dataset.tokenizer import TAGS, decode, load_tokenizer, special_id
from distill import (
    HiddenTeacher,
    fused_mixed_loss,
    mixed_loss,
    reasoning_weights,
    weighted_cross_entropy,
)
from model import ModelConfig

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
    """alpha * CE + (1 - alpha) * T^2 * KL, a number at a time."""
    sums = {"ce": 0.0, "ce weight": 0.0, "kl": 0.0, "kl weight": 0.0}
    for place in np.ndindex(labels.shape):
        weight = float(weights[place])
        if weight == 0:
            continue
        if labels[place] != -100:
            sums["ce"] -= weight * log_softmax(student[place].tolist())[labels[place]]
            sums["ce weight"] += weight
        p = log_softmax((teacher[place] / temperature).tolist())
        q = log_softmax((student[place] / temperature).tolist())
        terms = [math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if math.exp(a) > 0]
        sums["kl"] += weight * temperature**2 * sum(terms)
        sums["kl weight"] += weight
    ce = sums["ce"] / (sums["ce weight"] or 1.0)
    kl = sums["kl"] / (sums["kl weight"] or 1.0)
    return (alpha * ce if alpha else 0.0) + ((1 - alpha) * kl if alpha < 1 else 0.0)


@SETTINGS
@given(batches(), st.sampled_from([torch.float32, torch.float64]))
def test_losses_of_extreme_logits(batch, dtype):
    """Plain and fused equal plain Python, and every gradient is finite."""
    student, teacher, labels, weights, temperature, alpha = batch
    expected = slow_loss(*batch)
    tolerance = {"rel": 1e-9, "abs": 1e-9}
    if dtype == torch.float32:  # logits are rounded to 1 part in 10^7 before anything else
        size = max(1.0, *np.abs(np.where(np.isfinite(student), student, 0)).ravel())
        size = max(size, *np.abs(np.where(np.isfinite(teacher), teacher, 0)).ravel())
        tolerance = {"rel": 1e-4, "abs": 1e-5 * size * max(temperature, 1.0)}
    logits = torch.tensor(student, dtype=dtype, requires_grad=True)
    others = torch.tensor(teacher, dtype=dtype)
    rest = (torch.tensor(labels), torch.tensor(weights, dtype=dtype), temperature, alpha)
    plain = mixed_loss(logits, others, *rest)
    plain.backward()
    assert logits.grad.isfinite().all()
    # A hidden state for each token that is its logits, and a head that is the identity.
    V = student.shape[-1]
    if np.isfinite(student).all() and np.isfinite(teacher).all():
        hidden = torch.tensor(student, dtype=dtype, requires_grad=True)
        says = HiddenTeacher(others, torch.eye(V, dtype=dtype))
        fused = fused_mixed_loss(hidden, torch.eye(V, dtype=dtype), says, *rest, chunk=2)
        fused.backward()
        torch.testing.assert_close(hidden.grad, logits.grad, rtol=1e-4, atol=1e-5)
        assert fused.item() == pytest.approx(plain.item(), **tolerance)
    assert plain.item() == pytest.approx(expected, **tolerance)


@SETTINGS
@given(batches())
def test_a_fused_loss_takes_teacher_logits_of_minus_infinity(batch):
    student, teacher, labels, weights, temperature, alpha = batch
    student = np.where(np.isfinite(student), student, -1e3)  # no head gives a student -inf
    V = student.shape[-1]
    hidden = torch.tensor(student, requires_grad=True)
    rest = (torch.tensor(labels), torch.tensor(weights), temperature, alpha)
    fused = fused_mixed_loss(hidden, torch.eye(V).double(), torch.tensor(teacher), *rest)
    fused.backward()
    assert hidden.grad.isfinite().all()
    expected = slow_loss(student, teacher, labels, weights, temperature, alpha)
    assert fused.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


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
            value = parse_line(line, "x line 1")
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
        (tmp_path / "x").write_bytes(json.dumps({**header, **wrong}).encode().ljust(HEADER_BYTES))
        with contextlib.suppress(ValueError):
            assert read_header(tmp_path / "x")["windows"] == 0


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
