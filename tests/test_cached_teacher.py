"""A teacher that is read from a file: what each way of keeping it is worth (by hand, at k = V, and
on average), what stands in the file, and for what it is refused."""

import hashlib
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_distillation
from dataset import teacher_cache
from dataset.packing import PackedText
from dataset.teacher_cache import HASH_BYTES, HEADER_BYTES, CachedText, read_header, record_dtype
from distill import kl_divergence
from distill.sparse import sample, top_k
from files import Finished
from methods import cached_teacher
from methods.cached_teacher import compute_loss
from model import ModelConfig, Transformer, load_model, save_model
from tests.short_runs import Killed

LN = math.log
IGNORE = -100


def distribution(rows=1, V=40, seed=0, scale=2.0):
    logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return (scale * logits).log_softmax(-1)


def logs(*values):
    """(1, 1, ...) log-probabilities."""
    return torch.tensor([[values]], dtype=torch.float64).log()


def number(value):
    return torch.tensor([[value]], dtype=torch.float64)


# What is kept of a distribution (distill/sparse.py).


def test_topk_keeps_the_largest_and_the_mass_of_the_rest():
    log_probs = torch.tensor([[0.5, 0.05, 0.3, 0.15]]).log()
    ids, kept, rest = top_k(log_probs, 2)
    assert ids.tolist() == [[0, 2]]
    torch.testing.assert_close(kept.exp(), torch.tensor([[0.5, 0.3]]))
    torch.testing.assert_close(rest.exp(), torch.tensor([0.2]))
    assert top_k(log_probs, 4)[2].exp().item() == 0.0


@pytest.mark.parametrize("V, k, scale", [(40, 8, 2.0), (40, 8, 0.1), (40, 1, 1.0), (40, 39, 3.0)])
def test_a_sample_is_right_on_average(V, k, scale):
    """The mean of 20,000 draws is p, within 5 standard errors for every token."""
    draws = 20_000
    log_probs = distribution(V=V, scale=scale)
    ids, kept, entropy = sample(log_probs.expand(draws, V), k, torch.Generator().manual_seed(0))
    weights = torch.zeros(draws, V, dtype=torch.double).scatter_add(-1, ids, kept.exp())
    probs = log_probs[0].exp()
    error = weights.std(0) / draws**0.5
    assert ((weights.mean(0) - probs).abs() <= 5 * error + 1e-9).all()
    assert entropy[0].item() == pytest.approx(-(probs * probs.log()).sum().item())


@pytest.mark.parametrize("k", [1, 5, 40])
def test_a_sample_has_k_different_tokens_whose_weights_sum_to_one(k):
    ids, kept, _ = sample(distribution(rows=500), k, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == k for row in ids.tolist())
    torch.testing.assert_close(kept.exp().sum(-1), torch.ones(500, dtype=torch.double))
    if k == 40:  # every token has its place: nothing is left to chance
        probs = torch.zeros(500, 40, dtype=torch.double).scatter(-1, ids, kept.exp())
        torch.testing.assert_close(probs, distribution(rows=500).exp())


def test_a_sample_varies_less_than_independent_draws():
    """The paper's k draws from p have variance p (1 - p) / k at every token."""
    k, draws = 8, 5000
    log_probs = distribution()
    ids, kept, _ = sample(log_probs.expand(draws, 40), k, torch.Generator().manual_seed(0))
    weights = torch.zeros(draws, 40, dtype=torch.double).scatter_add(-1, ids, kept.exp())
    probs = log_probs[0].exp()
    independent = (probs * (1 - probs) / k).sum()
    assert weights.var(0).sum() < 0.5 * independent


def test_a_certain_teacher():
    """All mass on one token: no NaN, and that token has weight 1."""
    log_probs = torch.full((1, 10), -torch.inf, dtype=torch.double)
    log_probs[0, 7] = 0.0
    ids, kept, entropy = sample(log_probs, 3, torch.Generator().manual_seed(0))
    probs = torch.zeros(1, 10, dtype=torch.double).scatter_add(-1, ids, kept.exp())
    assert probs[0, 7] == 1 and probs.sum() == 1 and entropy == 0
    ids, kept, rest = top_k(log_probs, 3)
    assert ids[0, 0] == 7 and kept[0, 0] == 0 and rest[0] == -torch.inf


# The KL from k numbers, worked by hand. The teacher says 1/2, 1/4, 1/8, 1/8; the student 1/4 each.


def kept_kl(student, method, ids, log_p, rest):
    return cached_teacher.kept_kl(student.gather(-1, ids), method, log_p, rest)


STUDENT = logs(0.25, 0.25, 0.25, 0.25)
KEPT = torch.tensor([[[0, 1]]]), logs(0.5, 0.25)  # ids and log-probabilities of the two likeliest
WHOLE = 0.5 * LN(2) + 0.25 * LN(1) + 2 * 0.125 * LN(0.5)


@pytest.mark.parametrize(
    "method, rest, expected",
    [
        # renormalised: 2/3, 1/3 against 1/2, 1/2
        ("topk", LN(0.25), 2 / 3 * LN(4 / 3) + 1 / 3 * LN(2 / 3)),
        # three buckets: 1/2, 1/4, 1/4 against 1/4, 1/4, 1/2
        ("tail", LN(0.25), 0.5 * LN(2) + 0.25 * LN(1) + 0.25 * LN(0.5)),
    ],
)
def test_topk_and_tail_by_hand(method, rest, expected):
    kl = kept_kl(STUDENT, method, *KEPT, number(rest))
    assert kl.shape == (1, 1)
    assert kl.item() == pytest.approx(expected, rel=1e-9)


def test_a_sample_by_hand():
    """Weights 1/2 and 1/2 for tokens 0 and 2, entropy H: -H + ln 4, whatever was drawn here."""
    entropy = 0.5 * LN(2) + 0.25 * LN(4) + 2 * 0.125 * LN(8)
    ids, kept = torch.tensor([[[0, 2]]]), logs(0.5, 0.5)
    kl = kept_kl(STUDENT, "sample", ids, kept, number(entropy))
    assert kl.item() == pytest.approx(LN(4) - entropy, rel=1e-9)
    assert kl.item() == pytest.approx(WHOLE, rel=1e-9)  # as the student is uniform
    skewed = logs(0.7, 0.1, 0.1, 0.1)
    kl = kept_kl(skewed, "sample", ids, kept, number(entropy))
    assert kl.item() == pytest.approx(-0.5 * LN(0.7) - 0.5 * LN(0.1) - entropy, rel=1e-9)


def test_topk_is_blind_to_what_it_dropped():
    """A student that spreads the kept mass alike pays nothing, though it has only a third of it."""
    student = logs(0.2, 0.1, 0.35, 0.35)
    rest = number(LN(0.25))
    assert kept_kl(student, "topk", *KEPT, rest).item() == pytest.approx(0.0, abs=1e-12)
    expected = 0.75 * LN(0.75 / 0.3) + 0.25 * LN(0.25 / 0.7)
    assert kept_kl(student, "tail", *KEPT, rest).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method, k", [("topk", 8), ("tail", 8), ("tail", 40), ("sample", 40)])
def test_float16_probabilities_that_do_not_sum_to_one_are_normalised(method, k):
    """Off by a percent, they would move every loss by a percent of log q."""
    ids, kept, rest = top_k(distribution(), k)
    off = rest + LN(1.01)  # of a tail the mass is off too
    if method == "sample":
        off = rest = -(kept.exp() * kept).sum(-1)  # an entropy is not
    student = distribution(seed=1)[None]
    exact = kept_kl(student, method, ids[None], kept[None], rest[None])
    found = kept_kl(student, method, ids[None], kept[None] + LN(1.01), off[None])
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["topk", "tail", "sample"])
def test_a_kept_token_of_probability_0_adds_nothing(method):
    """A point of a sample may fall on one, and float16 rounds small ones to 0: 0 log 0 = 0."""
    student, found = logs(0.4, 0.3, 0.2, 0.1).requires_grad_(), []
    for values in ((0.75, 0.25), (0.75, 0.25, 0.0)):
        ids = torch.arange(len(values))[None, None]
        rest = torch.full((1, 1), -math.inf if method == "tail" else 0.0).double()
        if method == "topk":  # q is renormalised on what was kept: a third token changes it
            student = logs(0.75, 0.25, 0.0, 0.0).requires_grad_()
        kl = kept_kl(student, method, ids, logs(*values), rest)
        assert kl.isfinite().all()
        found.append(kl.detach())
    torch.testing.assert_close(*found)


# compute_loss: the same as lesson 2's where nothing is left out.


def batch(V=40):
    """Student's and teacher's logits (2, 5, V) and labels (2, 5), some ignored."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = 2 * torch.randn(2, 2, 5, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(V, (2, 5), generator=generator)
    labels[0, 3:] = IGNORE
    return student.requires_grad_(), teacher, labels


def kept_of(teacher, method, k, temperature=1.0, seed=0):
    """What a file would hold of teacher logits (B, S, V): fields (B, S, ...)."""
    log_probs = (teacher / temperature).log_softmax(-1).flatten(0, 1)
    if method == "sample":
        fields = sample(log_probs, k, torch.Generator().manual_seed(seed))
    else:
        fields = top_k(log_probs, k)
    return [field.unflatten(0, teacher.shape[:2]) for field in fields]


@pytest.mark.parametrize("method", ["topk", "tail", "sample", "hidden"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_with_every_token_kept_it_is_lesson_2(method, temperature, alpha):
    student, teacher, labels = batch()
    kept = [teacher] if method == "hidden" else kept_of(teacher, method, 40, temperature)
    found = compute_loss(student, labels, method, kept, temperature, alpha)
    expected = train_distillation.compute_loss(student, teacher, labels, temperature, alpha)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if method == "tail" else {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **tolerance)  # loss and parts; tail clamps at 1e-6
    grads = [torch.autograd.grad(loss, student)[0] for loss, _ in (found, expected)]
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize("temperature, alpha, k", [(1.0, 0.0, 6), (2.0, 0.5, 1), (0.5, 0.3, 39)])
def test_a_tail_is_the_kl_between_k_plus_1_buckets(temperature, alpha, k):
    """Against autograd through the buckets, written the long way."""
    student, teacher, labels = batch()
    kept = kept_of(teacher, "topk", k, temperature)
    probs, q = kept[1].exp(), (student / temperature).softmax(-1)
    inside = torch.zeros(2, 5, 40, dtype=torch.bool).scatter(-1, kept[0], True)
    tail, q_tail = 1 - probs.sum(-1), torch.where(inside, 0.0, q).sum(-1)
    kl = (probs * (probs / q.gather(-1, kept[0])).log()).sum(-1) + tail * (tail / q_tail).log()
    expected = (1 - alpha) * temperature**2 * kl[labels != IGNORE].mean()
    expected = expected + alpha * F.cross_entropy(student.flatten(0, 1), labels.flatten())
    loss, _ = compute_loss(student, labels, "tail", kept, temperature, alpha)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(x, student)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-9)


def test_a_tail_loses_information_and_nothing_else():
    """Merging tokens into one bucket can only lower a KL (the data-processing inequality)."""
    student, teacher, labels = batch()
    values = [
        compute_loss(student, labels, "tail", kept_of(teacher, "topk", k), 1.0, 0.0)[0].item()
        for k in (1, 4, 16, 39, 40)
    ]
    whole = kl_divergence(student, teacher, 1.0)[labels != IGNORE].mean().item()
    assert values == sorted(values) and values[0] < 0.9 * values[-1]
    assert values[-1] == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("method", ["topk", "tail"])
def test_without_a_tail_nothing_depends_on_it_and_with_one_it_does(method):
    student, teacher, labels = batch()
    ids, kept, rest = kept_of(teacher, "topk", 8)
    found = [
        compute_loss(student, labels, method, (ids, kept, x), 1.0, 0.0)[0].item()
        for x in (rest, rest - 1.0)
    ]
    assert (found[0] == found[1]) == (method == "topk")


def test_bias_of_the_gradient_of_each_method():
    """Against the whole teacher: topk and tail are biased, less with more k; a sample's error falls
    as the root of the number of draws, so its bias is 0."""
    student, teacher, labels = batch()

    def gradient(method, kept):
        loss, _ = compute_loss(student, labels, method, kept, 1.0, 0.0)
        return torch.autograd.grad(loss, student)[0]

    exact = gradient("hidden", [teacher])

    def error(grad):
        return ((grad - exact).norm() / exact.norm()).item()

    def sample_error(k, draws):
        grads = (gradient("sample", kept_of(teacher, "sample", k, seed=n)) for n in range(draws))
        return error(sum(grads) / draws)

    for method in ("topk", "tail"):
        biased = [error(gradient(method, kept_of(teacher, "topk", k))) for k in (2, 4, 16, 40)]
        assert biased[0] > biased[1] > biased[2] > 0.005 and biased[3] < 1e-4, method
    once, often = sample_error(4, 1), sample_error(4, 400)
    assert often < 0.1 * once  # 1 / 20 on average
    assert often < 0.5 * error(gradient("tail", kept_of(teacher, "topk", 4)))


@pytest.mark.parametrize("method", ["topk", "tail", "sample", "hidden"])
@pytest.mark.parametrize("alpha, names", [(0.0, {"kl"}), (0.3, {"ce", "kl"}), (1.0, {"ce"})])
def test_parts_have_no_factors_and_make_up_the_loss(method, alpha, names):
    student, teacher, labels = batch()
    kept = [teacher] if method == "hidden" else kept_of(teacher, method, 8, 2.0)
    loss, parts = compute_loss(student, labels, method, kept, 2.0, alpha)
    assert parts.keys() == names
    factors = {"ce": alpha, "kl": (1 - alpha) * 4}
    total = sum(factors[name] * value.item() for name, value in parts.items())
    assert loss.item() == pytest.approx(total, rel=1e-9)
    if "ce" in parts:
        library = F.cross_entropy(student.flatten(0, 1), labels.flatten())
        assert parts["ce"].item() == pytest.approx(library.item())


@pytest.mark.parametrize("method", ["topk", "tail", "sample", "hidden"])
def test_ignored_labels_count_nothing(method):
    """Whatever stands there; and no label at all gives 0 with a gradient path."""
    student, teacher, labels = batch()
    kept = [teacher] if method == "hidden" else kept_of(teacher, method, 8, 2.0)
    expected = compute_loss(student, labels, method, kept, 2.0, 0.3)[0]
    ignored = labels == IGNORE
    spoilt = student.detach().masked_fill(ignored[..., None], 50.0)
    spoilt_kept = [x.clone() for x in kept]
    spoilt_kept[-1][ignored] = math.nan
    assert torch.equal(compute_loss(spoilt, labels, method, spoilt_kept, 2.0, 0.3)[0], expected)
    loss, _ = compute_loss(student, torch.full_like(labels, IGNORE), method, kept, 2.0, 0.3)
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, student)[0].any()


@pytest.mark.parametrize("method", ["topk", "tail", "sample", "hidden"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_nan_at_a_valid_token_is_not_hidden(method, whose):
    student, teacher, labels = batch()
    student = student.detach()
    kept = [teacher] if method == "hidden" else kept_of(teacher, method, 8)
    kept = [x.clone() for x in kept]
    if whose == "student":
        student[1, 2] = math.nan
    else:
        kept[0 if method == "hidden" else 1][1, 2] = math.nan
    assert compute_loss(student, labels, method, kept, 1.0, 0.0)[0].isnan()


@pytest.mark.parametrize("method", ["topk", "tail", "sample", "hidden"])
def test_half_precision_is_computed_in_float32(method):
    """Logits in bfloat16, what the file holds in float16."""
    student, teacher, labels = batch()
    kept = [teacher] if method == "hidden" else kept_of(teacher, method, 8)
    low = student.bfloat16()
    kept = [x.half() if x.is_floating_point() else x for x in kept]
    loss = compute_loss(low, labels, method, kept, 1.0, 0.5)[0]
    assert loss.dtype == torch.float32
    kept = [x.double() if x.is_floating_point() else x for x in kept]
    exact = compute_loss(low.double(), labels, method, kept, 1.0, 0.5)[0]
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


# The file (dataset/teacher_cache.py).


@pytest.fixture
def teacher(tmp_path, prepared_folder):
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("nano", 400))
    save_model(model, tmp_path / "teacher", prepared_folder)
    return tmp_path / "teacher"


def write(teacher, data, out, *words):
    argv = ["--teacher", teacher, "--data", data, "--out", out, "--seq_len", 16, "--k", 8, *words]
    return teacher_cache.main(teacher_cache.parse_args([str(word) for word in argv]))


def open_cache(path, teacher, data, temperature=1.0, seq_len=16, share=1.0):
    return CachedText(PackedText(data, "train", seq_len, share), path, teacher, temperature)


@pytest.mark.parametrize("method", ["hidden", "topk", "tail", "sample"])
def test_the_file_holds_what_the_teacher_says(tmp_path, teacher, prepared_folder, method):
    """A student's loss from the file is the loss from the live teacher (at k = V), for the right
    windows of the right step."""
    path = tmp_path / "cache"
    kind = "topk" if method == "tail" else method
    write(teacher, prepared_folder, path, "--method", kind, "--k", 400, "--data_share", 0.3)
    cache = open_cache(path, teacher, prepared_folder, share=0.3)
    assert cache.method == kind
    ids, labels, *kept = cache.batch(2, 4, 1)
    expected = PackedText(prepared_folder, "train", 16, 0.3).batch(2, 4, 1)
    assert torch.equal(ids, expected[0]) and torch.equal(labels, expected[1])
    assert all(field.shape[:2] == ids.shape for field in kept)
    torch.manual_seed(1)
    student, says = Transformer(ModelConfig.preset("nano", 400)), load_model(teacher)
    with torch.no_grad():
        live = train_distillation.compute_loss(student(ids), says(ids), labels, 1.0, 0.3)
        kept = [says.lm_head(kept[0].float())] if method == "hidden" else kept
        cached = compute_loss(student(ids), labels, method, kept, 1.0, 0.3)
    assert cached[0].item() == pytest.approx(live[0].item(), rel=2e-4, abs=2e-4)


def test_a_cached_text_is_the_text(tmp_path, teacher, prepared_folder):
    """A run asks it for what any text has."""
    write(teacher, prepared_folder, tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", teacher, prepared_folder)
    assert cache.size == cache.text.size and cache.vocab_size == 400 and not cache.padded
    assert cache.held_out is cache.text.held_out


def test_temperature(tmp_path, teacher, prepared_folder):
    """Probabilities in the file are at its temperature; a run at another one is refused, but for
    hidden states, which serve all."""
    write(teacher, prepared_folder, tmp_path / "hot", "--temperature", 4, "--method", "topk")
    cache = open_cache(tmp_path / "hot", teacher, prepared_folder, temperature=4.0)
    ids, _ = cache.text.take(np.array([3]))
    _, log_probs, _ = cache.take(np.array([3]))
    expected = (load_model(teacher)(ids) / 4).softmax(-1).topk(8).values
    torch.testing.assert_close(log_probs.float().exp(), expected, rtol=1e-2, atol=1e-5)
    with pytest.raises(ValueError, match="made with temperature 4.0, this run has 1.0: .*hidden"):
        open_cache(tmp_path / "hot", teacher, prepared_folder, temperature=1.0)
    write(teacher, prepared_folder, tmp_path / "all", "--temperature", 4, "--method", "hidden")
    for temperature in (0.5, 4.0):
        open_cache(tmp_path / "all", teacher, prepared_folder, temperature=temperature)


def stop_after(monkeypatch, passes: int) -> list[int]:
    """From now on the teacher dies after so many passes; returns the windows they began at."""
    begun, output = [], teacher_cache.teacher_output

    def output_or_die(*args):
        if len(begun) == passes:
            raise Killed
        begun.append(args[-1])
        return output(*args)

    monkeypatch.setattr(teacher_cache, "teacher_output", output_or_die)
    return begun


@pytest.mark.parametrize("method", ["topk", "sample"])
@pytest.mark.parametrize("passes, zeros", [(0, 0), (0, 100), (1, 0), (2, 0), (3, 33_333), (4, 5)])
def test_a_stopped_call_goes_on(
    tmp_path, teacher, prepared_folder, monkeypatch, method, passes, zeros
):
    """The same call ends with the same file. What a kill or a power cut left after the last sync,
    every second pass here (windows, half of one, zeros), is made again, and nothing else."""
    monkeypatch.setattr(teacher_cache, "SYNCED", 64)
    write(teacher, prepared_folder, tmp_path / "whole", "--method", method)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, passes)
        write(teacher, prepared_folder, tmp_path / "cut", "--method", method)
    with open(tmp_path / "cut.partial", "ab") as file:
        file.write(bytes(zeros))
    begun = stop_after(monkeypatch, 10**6)
    write(teacher, prepared_folder, tmp_path / "cut", "--method", method)
    assert begun[0] == passes // 2 * 64
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("[cw]*")) == ["cut", "whole"]


def test_a_cache_is_synced_while_it_grows(tmp_path, teacher, prepared_folder, monkeypatch):
    monkeypatch.setattr(teacher_cache, "SYNCED", 32)
    sizes, fsync = [], os.fsync

    def remember(handle):
        fsync(handle)
        if os.fstat(handle).st_size > HEADER_BYTES:  # a file: the folder is synced at the end
            sizes.append(os.fstat(handle).st_size)

    monkeypatch.setattr(os, "fsync", remember)
    write(teacher, prepared_folder, tmp_path / "cache")
    header = read_header(tmp_path / "cache")
    record = record_dtype(header).itemsize
    ends = [*range(32, header["windows"], 32), header["windows"]]
    ends = [HEADER_BYTES + end * record for end in ends]
    assert sizes == [*ends, ends[-1] + HASH_BYTES]


def test_what_was_begun_with_other_flags_is_not_continued(
    tmp_path, teacher, prepared_folder, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 1)
        write(teacher, prepared_folder, tmp_path / "cut", "--k", 9)
    before = (tmp_path / "cut.partial").read_bytes()
    with pytest.raises(ValueError, match="cut.partial was begun with other flags .*'k': 9"):
        write(teacher, prepared_folder, tmp_path / "cut")
    assert (tmp_path / "cut.partial").read_bytes() == before


def test_a_finished_cache_is_neither_made_again_nor_lost(tmp_path, teacher, prepared_folder):
    path = tmp_path / "cache"
    header = write(teacher, prepared_folder, path)
    assert read_header(path) == header
    assert record_dtype(header).itemsize == 16 * (8 * 4 + 2)  # ids and logs of 8 tokens, the rest
    before = path.read_bytes()
    with pytest.raises(Finished, match="finished already"):
        write(teacher, prepared_folder, path)
    with pytest.raises(ValueError, match="cache was made with another k: pass --overwrite"):
        write(teacher, prepared_folder, path, "--k", 9)
    assert path.read_bytes() == before


def test_a_full_disk_is_noticed_before(tmp_path, teacher, prepared_folder, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="needs .* MB more at .*make room, or lower --k"):
        write(teacher, prepared_folder, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_something_else_is_refused(tmp_path, teacher, prepared_folder):
    path = tmp_path / "cache"
    write(teacher, prepared_folder, path, "--data_share", 0.5)
    open_cache(path, teacher, prepared_folder, share=0.5)
    open_cache(path, teacher, prepared_folder, share=0.25)  # a prefix of its windows
    with pytest.raises(ValueError, match="holds .* windows, this run needs .*--data_share"):
        open_cache(path, teacher, prepared_folder)
    with pytest.raises(ValueError, match="made with seq_len 16, this run has 8"):
        open_cache(path, teacher, prepared_folder, seq_len=8)
    other = tmp_path / "other"
    save_model(Transformer(ModelConfig.preset("nano", 400)), other, prepared_folder)
    with pytest.raises(ValueError, match="made with teacher_sha256"):
        open_cache(path, other, prepared_folder, share=0.5)
    for name, file in (("text_sha256", "train.bin"), ("tokenizer_sha256", "tokenizer.json")):
        data = shutil.copytree(prepared_folder, tmp_path / name)
        content = bytearray((data / file).read_bytes())
        content[-2 if file == "train.bin" else -1] ^= 1  # of an id: its lower byte
        (data / file).write_bytes(content)
        meta = json.loads((data / "meta.json").read_text())
        holder, key = (meta["train"], "sha256") if file == "train.bin" else (meta, name)
        holder[key] = hashlib.sha256(content).hexdigest()
        (data / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match=f"made with {name}"):
            open_cache(path, teacher, data, share=0.5)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is not a teacher cache"),
        (b"\x80" * 5000, "is not a teacher cache"),
        (b"[1]".ljust(HEADER_BYTES), "is not a teacher cache"),
        (b'{"method": "magic"}'.ljust(HEADER_BYTES), "is not a teacher cache .*magic"),
        (b'{"method": "topk"}'.ljust(HEADER_BYTES), "is not a teacher cache"),
    ],
)
def test_a_file_that_is_no_cache(tmp_path, content, message):
    (tmp_path / "cache").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "cache")
    with pytest.raises(ValueError, match="no teacher cache in .*make it with"):
        read_header(tmp_path / "nothing")


def test_a_cut_cache_is_refused(tmp_path, teacher, prepared_folder):
    write(teacher, prepared_folder, tmp_path / "cache")
    content = (tmp_path / "cache").read_bytes()
    (tmp_path / "cache").write_bytes(content[:-2])
    with pytest.raises(ValueError, match="its header says .*delete it"):
        read_header(tmp_path / "cache")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--k", 0], "--k 0 must be between 1"),
        (["--k", 401], "--k 401 must be between 1 and the vocabulary, 400"),
        (["--temperature", 0], "--temperature 0.0 must be between"),
        (["--data_share", 2], "--data_share 2.0 must be between"),
        (["--teacher", "nowhere"], "no checkpoint in 'nowhere'"),
        (["--data", "nowhere"], "no prepared data in 'nowhere'"),
    ],
)
def test_bad_flags(tmp_path, teacher, prepared_folder, words, message):
    with pytest.raises(ValueError, match=message):
        write(teacher, prepared_folder, tmp_path / "cache", *words)
    assert not (tmp_path / "cache").exists()
