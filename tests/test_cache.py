"""The teacher's cache: what each method keeps is right (hidden and full exactly, topk but for its
tail, sample on average), it goes on where it was stopped, and it is never used for another teacher,
text, tokenizer, window length or temperature."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from dataset import cache_teacher
from dataset.cache_file import HEADER_BYTES, TeacherCache, read_header, record_dtype
from dataset.cache_teacher import sample, top_k
from dataset.packing import PackedText
from distill import SparseTeacher, fused_mixed_loss, mixed_loss
from model import ModelConfig, Transformer, load_model, save_model
from run.files import Finished


def distribution(rows=1, V=40, seed=0, scale=2.0):
    logits = torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return (scale * logits).log_softmax(-1)


# What is kept of a distribution.


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
    ids, logs, entropy = sample(log_probs.expand(draws, V), k, torch.Generator().manual_seed(0))
    weights = torch.zeros(draws, V, dtype=torch.double).scatter_add(-1, ids, logs.exp())
    probs = log_probs[0].exp()
    error = weights.std(0) / draws**0.5
    assert ((weights.mean(0) - probs).abs() <= 5 * error + 1e-9).all()
    assert entropy[0].item() == pytest.approx(-(probs * probs.log()).sum().item())


@pytest.mark.parametrize("k", [1, 5, 40])
def test_a_sample_has_k_different_tokens_whose_weights_sum_to_one(k):
    ids, logs, _ = sample(distribution(rows=500), k, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == k for row in ids.tolist())
    torch.testing.assert_close(logs.exp().sum(-1), torch.ones(500, dtype=torch.double))
    if k == 40:  # every token has its place: nothing is left to chance
        probs = torch.zeros(500, 40, dtype=torch.double).scatter(-1, ids, logs.exp())
        torch.testing.assert_close(probs, distribution(rows=500).exp())


def test_a_sample_varies_less_than_independent_draws():
    """The paper's k draws from p have variance p (1 - p) / k at every token."""
    k, draws = 8, 5000
    log_probs = distribution()
    ids, logs, _ = sample(log_probs.expand(draws, 40), k, torch.Generator().manual_seed(0))
    weights = torch.zeros(draws, 40, dtype=torch.double).scatter_add(-1, ids, logs.exp())
    probs = log_probs[0].exp()
    independent = (probs * (1 - probs) / k).sum()
    assert weights.var(0).sum() < 0.5 * independent


def test_a_certain_teacher():
    """All mass on one token: no NaN, and that token has weight 1."""
    log_probs = torch.full((1, 10), -torch.inf, dtype=torch.double)
    log_probs[0, 7] = 0.0
    ids, logs, entropy = sample(log_probs, 3, torch.Generator().manual_seed(0))
    probs = torch.zeros(1, 10, dtype=torch.double).scatter_add(-1, ids, logs.exp())
    assert probs[0, 7] == 1 and probs.sum() == 1 and entropy == 0
    ids, kept, rest = top_k(log_probs, 3)
    assert ids[0, 0] == 7 and kept[0, 0] == 0 and rest[0] == -torch.inf


# The bias of the gradient: what a student learns wrongly.


def gradient(teacher, hidden, head):
    labels = torch.zeros(hidden.shape[:-1], dtype=torch.long)
    loss = fused_mixed_loss(hidden, head, teacher, labels, alpha=0.0)
    return torch.autograd.grad(loss, head)[0]


def test_bias_of_the_gradient_of_each_method():
    """Against the full teacher: topk is biased, less with more k; a sample's error falls as the
    root of the number of draws, so its bias is 0."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 64, 16, generator=generator, dtype=torch.double)
    head = torch.randn(40, 16, generator=generator, dtype=torch.double).requires_grad_()
    log_probs = distribution(rows=64)
    exact = gradient(log_probs[None], hidden, head)

    def error(grad):
        return ((grad - exact).norm() / exact.norm()).item()

    def topk_error(k):
        ids, kept, rest = top_k(log_probs, k)
        says = SparseTeacher(ids[None], kept.exp()[None], tail=rest.exp()[None])
        return error(gradient(says, hidden, head))

    def sample_error(k, draws):
        total = torch.zeros_like(exact)
        for draw in range(draws):
            ids, logs, entropy = sample(log_probs, k, torch.Generator().manual_seed(draw))
            says = SparseTeacher(ids[None], logs.exp()[None], entropy=entropy[None])
            total += gradient(says, hidden, head)
        return error(total / draws)

    assert topk_error(4) > topk_error(8) > topk_error(16) > 0.01
    assert topk_error(40) < 1e-9
    once, often = sample_error(8, 1), sample_error(8, 400)
    assert often < 0.1 * once  # 1 / 20 on average
    assert often < 0.2 * topk_error(8)


# The file.


@pytest.fixture
def teacher(tmp_path, prepared_folder):
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("nano", 400))
    save_model(model, tmp_path / "teacher", prepared_folder)
    return tmp_path / "teacher"


def write(teacher, data, out, *words):
    argv = ["--teacher", teacher, "--data", data, "--out", out, "--seq_len", 16, "--k", 8, *words]
    return cache_teacher.main(cache_teacher.parse_args([str(word) for word in argv]))


def open_cache(path, teacher, data, temperature=1.0, seq_len=16, share=1.0):
    text = PackedText(data, "train", seq_len, share)
    return TeacherCache(path, teacher, text, temperature, load_model(teacher).lm_head.weight), text


@pytest.mark.parametrize("method", ["hidden", "full", "topk", "sample"])
def test_the_file_holds_what_the_teacher_says(tmp_path, teacher, prepared_folder, method):
    """A student's loss from the file is the loss from the live teacher, for every method that can
    (topk and sample: with k = V)."""
    path = tmp_path / "cache"
    write(teacher, prepared_folder, path, "--method", method, "--k", 400, "--data_share", 0.3)
    cache, text = open_cache(path, teacher, prepared_folder, share=0.3)
    windows = text.window_ids(2, 4, seed=1)
    ids, labels = text.take(windows)
    fields = cache.take(windows)
    assert all(field.shape[:2] == ids.shape for field in fields)
    torch.manual_seed(1)
    student = Transformer(ModelConfig.preset("nano", 400))
    with torch.no_grad():
        plain = mixed_loss(student(ids), load_model(teacher)(ids), labels, alpha=0.3)
        cached = fused_mixed_loss(
            student.model(ids), student.lm_head.weight, cache.teacher(*fields), labels, alpha=0.3
        )
    assert cached.item() == pytest.approx(plain.item(), rel=2e-4, abs=2e-4)


def test_temperature(tmp_path, teacher, prepared_folder):
    """Probabilities in the file are at its temperature; a run at another one is refused."""
    write(teacher, prepared_folder, tmp_path / "hot", "--temperature", 4, "--method", "topk")
    cache, text = open_cache(tmp_path / "hot", teacher, prepared_folder, temperature=4.0)
    ids, _ = text.take(np.array([3]))
    _, log_probs, _ = cache.take(np.array([3]))
    expected = (load_model(teacher)(ids) / 4).softmax(-1).topk(8).values
    torch.testing.assert_close(log_probs.float().exp(), expected, rtol=1e-2, atol=1e-5)
    with pytest.raises(ValueError, match="at --temperature 4, this run has 1"):
        open_cache(tmp_path / "hot", teacher, prepared_folder, temperature=1.0)


@pytest.mark.parametrize("method", ["topk", "sample"])
@pytest.mark.parametrize("left", [100, HEADER_BYTES, HEADER_BYTES + 33_333])
def test_a_stopped_call_goes_on(tmp_path, teacher, prepared_folder, method, left):
    """Killed after any number of bytes, the same call ends with the same file."""
    write(teacher, prepared_folder, tmp_path / "whole", "--method", method)
    whole = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut.partial").write_bytes(whole[:left])
    write(teacher, prepared_folder, tmp_path / "cut", "--method", method)
    assert (tmp_path / "cut").read_bytes() == whole
    assert not (tmp_path / "cut.partial").exists()


@pytest.mark.parametrize("written, zeros", [(0, 32), (32, 1), (32, 31), (64, 5)])
def test_a_power_cut_leaves_no_zeros(
    tmp_path, teacher, prepared_folder, monkeypatch, written, zeros
):
    """Windows that had a length but no bytes on the disk are made again; synced ones are not."""
    monkeypatch.setattr(cache_teacher, "SYNCED", 32)
    asked = []
    says = cache_teacher.teacher_says
    monkeypatch.setattr(
        cache_teacher, "teacher_says", lambda *args: asked.append(args[-1]) or says(*args)
    )
    write(teacher, prepared_folder, tmp_path / "whole")
    whole, every_pass = (tmp_path / "whole").read_bytes(), list(asked)
    asked.clear()
    record = record_dtype(read_header(tmp_path / "whole")).itemsize
    cut = whole[: HEADER_BYTES + written * record] + bytes(zeros * record)
    (tmp_path / "cut.partial").write_bytes(cut)
    write(teacher, prepared_folder, tmp_path / "cut")
    assert (tmp_path / "cut").read_bytes() == whole
    assert asked == [start for start in every_pass if start >= written]


def test_a_cache_is_synced_while_it_grows(tmp_path, teacher, prepared_folder, monkeypatch):
    monkeypatch.setattr(cache_teacher, "SYNCED", 32)
    sizes, sync = [], cache_teacher.sync

    def remember(file):
        sync(file)
        sizes.append(os.fstat(file.fileno()).st_size)

    monkeypatch.setattr(cache_teacher, "sync", remember)
    write(teacher, prepared_folder, tmp_path / "cache")
    header = read_header(tmp_path / "cache")
    record = record_dtype(header).itemsize
    ends = [*range(32, header["windows"], 32), header["windows"]]
    assert sizes == [HEADER_BYTES + end * record for end in ends]


def test_what_was_begun_with_other_flags_is_not_continued(tmp_path, teacher, prepared_folder):
    write(teacher, prepared_folder, tmp_path / "other", "--k", 9)
    write(teacher, prepared_folder, tmp_path / "whole")
    (tmp_path / "cut.partial").write_bytes((tmp_path / "other").read_bytes()[:50_000])
    write(teacher, prepared_folder, tmp_path / "cut")
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_finished_cache_is_neither_made_again_nor_lost(tmp_path, teacher, prepared_folder):
    path = tmp_path / "cache"
    record = write(teacher, prepared_folder, path)
    assert json.loads((tmp_path / "cache.finished.json").read_text()) == record
    assert record["bytes_per_token"] == 8 * 4 + 2
    before = path.read_bytes()
    with pytest.raises(Finished, match="finished already"):
        write(teacher, prepared_folder, path)
    with pytest.raises(ValueError, match="holds another cache"):
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
    data = shutil.copytree(prepared_folder, tmp_path / "data")
    meta = json.loads((data / "meta.json").read_text())
    for name, holder in (("text_sha256", meta["train"]), ("tokenizer_sha256", meta)):
        key = "sha256" if name == "text_sha256" else name
        kept, holder[key] = holder[key], "0" * 64
        (data / "meta.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match=f"made with {name}"):
            open_cache(path, teacher, data, share=0.5)
        holder[key] = kept


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
