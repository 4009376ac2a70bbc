"""dataset/oracle.py: a source whose distribution is known; that its numbers are true, and that its
folder is one that every method reads and no command overwrites."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

import train_distillation
from dataset import oracle, prepare
from dataset.oracle import MarkovSource, kl_to_truth, open_source
from dataset.packing import PackedText
from dataset.tokenizer import decode, encode, load_tokenizer
from files import Finished
from files.atomic import UNFINISHED
from model import ModelConfig, Transformer, save_model
from tests.short_runs import SIX, run

V = 32


@pytest.fixture(scope="module")
def source():
    return MarkovSource(3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oracle") / "data"
    run(oracle, "--out", folder, "--tokens", 20_000, "--seed", 3)
    return folder


# The source.


def test_probabilities_are_what_the_docstring_says(source):
    rng = np.random.default_rng(3)
    near, far, both = (rng.standard_normal(shape) for shape in ((V, V), (V, V), (V, V, V)))
    for a, b in ((0, 0), (5, 17), (31, 2)):
        weights = [math.exp(near[b, c] + far[a, c] + both[a, b, c]) for c in range(V)]
        expected = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        torch.testing.assert_close(source.probs[a, b], expected)


def test_pairs_are_stationary_and_the_entropy_is_theirs(source):
    assert source.pairs.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(source.pairs.sum(0), source.pairs.sum(1))
    for b, c in ((0, 1), (30, 30)):
        after = sum(source.pairs[a, b] * source.probs[a, b, c] for a in range(V))
        assert after.item() == pytest.approx(source.pairs[b, c].item(), rel=1e-9)
    entropy = 0.0
    for a in range(V):
        for b in range(V):
            p = source.probs[a, b].numpy()
            entropy -= float(source.pairs[a, b]) * float((p * np.log(p)).sum())
    assert source.entropy_rate == pytest.approx(entropy, rel=1e-12)
    assert 1.5 < entropy < 3 < math.log(V), "neither certain nor noise"


def test_log_probs_know_two_tokens_and_of_the_first_place_one(source):
    ids = torch.tensor([[4, 9, 1, 30], [9, 9, 9, 9]])
    found = source.log_probs(ids)
    assert found.shape == (2, 4, V) and found.dtype == torch.float32
    torch.testing.assert_close(found[0, 2].double().exp(), source.probs[9, 1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0, 1].double().exp(), source.probs[4, 9], rtol=1e-5, atol=0)
    weights = source.pairs[:, 4] / source.pairs[:, 4].sum()  # of the unknown token before
    mean = sum(weights[a] * source.probs[a, 4] for a in range(V))
    torch.testing.assert_close(found[0, 0].double().exp(), mean, rtol=1e-5, atol=0)
    assert torch.equal(found[1, 1], found[1, 3]), "more than two tokens before do not matter"


def test_a_text_has_the_frequencies_and_the_loss_that_were_promised(source):
    text = source.sample(100_000, seed=1)
    assert np.array_equal(text[:50], source.sample(50, seed=1))
    assert not np.array_equal(text[:50], source.sample(50, seed=2))
    pairs = np.bincount(text[:-1] * V + text[1:], minlength=V * V) / (len(text) - 1)
    expected = source.pairs.flatten().numpy()
    error = np.sqrt(expected / len(text))  # of a count, as if tokens were independent
    assert np.abs(pairs - expected).max() < 6 * error.max()
    # After the commonest pair, every token comes as often as its probability says.
    a, b = divmod(int(expected.argmax()), V)
    after = text[2:][(text[:-2] == a) & (text[1:-1] == b)]
    shares = np.bincount(after, minlength=V) / len(after)
    p = source.probs[a, b].numpy()
    assert (np.abs(shares - p) < 5 * np.sqrt(p / len(after)) + 1e-3).all()
    ids = torch.from_numpy(text)[None]
    chosen = source.log_probs(ids[:, :-1]).gather(-1, ids[:, 1:, None])
    assert -chosen.mean().item() == pytest.approx(source.entropy_rate, abs=0.02)


# The folder.


def test_the_folder_is_a_prepared_one(written, source):
    train, val = PackedText(written, "train", 64), PackedText(written, "val", 64)
    assert (len(train.stream), len(val.stream), train.vocab_size) == (20_000, 2_000, V)
    text = source.sample(22_000, seed=3)
    assert np.array_equal(np.concatenate([train.stream, val.stream]), text)
    ids, labels = train.batch(0, 4, seed=0)
    assert torch.equal(ids[:, 1:], labels[:, :-1])
    tokenizer = load_tokenizer(written)
    letters = decode(tokenizer, text[:40].tolist())
    assert len(letters) == 40 and encode(tokenizer, letters) == text[:40].tolist()
    assert train.bytes_per_token == 1


class Truth(torch.nn.Module):
    """A model that is the source, and mixes `noise` of the uniform distribution in."""

    def __init__(self, source, noise=0.0):
        super().__init__()
        self.source, self.noise = source, noise
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        probs = self.source.log_probs(ids).double().exp()
        return ((1 - self.noise) * probs + self.noise / V).log()


def test_kl_to_truth_is_exact(written, source):
    assert open_source(written).entropy_rate == source.entropy_rate
    assert kl_to_truth(written, Truth(source)) == pytest.approx(0, abs=1e-6)
    expected, count = 0.0, 0
    for ids, _ in PackedText(written, "val", 16).evaluation(7, 5):
        p = source.log_probs(ids).double().exp().numpy()
        expected += float((p * np.log(p / (0.7 * p + 0.3 / V))).sum())
        count += ids.numel()
    found = kl_to_truth(written, Truth(source, noise=0.3), seq_len=16, windows=5)
    assert found == pytest.approx(expected / count, rel=1e-5) and found > 0.05
    # An untrained model is about as far as the uniform distribution is.
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("nano", V))
    near = math.log(V) - source.entropy_rate
    assert kl_to_truth(written, model, windows=8) == pytest.approx(near, abs=0.35)


def test_a_lesson_learns_from_it(written, tmp_path):
    torch.manual_seed(0)
    save_model(Transformer(ModelConfig.preset("nano", V)), tmp_path / "teacher", written)
    flags = [*SIX, "--data", written, "--teacher", tmp_path / "teacher", "--alpha", 1]
    record = run(train_distillation, *flags, "--out", tmp_path / "out")
    assert record["metrics"]["val_loss"] < math.log(V) + 0.3
    assert record["metrics"]["bits_per_byte"] == pytest.approx(
        record["metrics"]["val_loss"] / math.log(2), rel=1e-6
    )


# Whose a folder is.


def test_the_same_call_finds_it_written_and_another_is_refused(written, tmp_path):
    flags = ["--out", written, "--tokens", 20_000]
    before = (written / "train.bin").read_bytes()
    with pytest.raises(Finished, match="prepared already"):
        run(oracle, *flags, "--seed", 3)
    with pytest.raises(ValueError, match="was prepared with another seed.*: pass --overwrite"):
        run(oracle, *flags, "--seed", 4)
    with pytest.raises(ValueError, match="was prepared with another"):
        few = ["--problems", 30, "--prompts", 5, "--test_problems", 5]
        run(prepare, "--out", written, "--text", make_text(tmp_path), *few)
    assert (written / "train.bin").read_bytes() == before
    assert not (written / UNFINISHED).exists()


def make_text(folder):
    path = folder / "text.txt"
    path.write_text("\n\n".join(f"line {number} of a text" for number in range(400)), "utf-8")
    return path


def test_overwrite_replaces_it(written, tmp_path):
    copy = shutil.copytree(written, tmp_path / "copy")
    run(oracle, "--out", copy, "--tokens", 5_000, "--seed", 4, "--overwrite")
    assert len(PackedText(copy, "train", 8).stream) == 5_000
    assert open_source(copy).entropy_rate == MarkovSource(4).entropy_rate


def test_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match="holds files that this command did not make"):
        run(oracle, "--out", tmp_path / "mine", "--tokens", 1000)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="cannot be made"):
        run(oracle, "--out", tmp_path / "file", "--tokens", 1000)
    assert (tmp_path / "mine" / "train.bin").read_bytes() == b"mine"
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["train.bin"]


def test_text_of_no_known_source_is_refused(prepared_folder, written, tmp_path):
    with pytest.raises(ValueError, match="is not text of a known source: make it again with"):
        open_source(prepared_folder)
    copy = shutil.copytree(written, tmp_path / "copy")
    meta = json.loads((copy / "meta.json").read_text("utf-8"))
    meta["made_from"]["entropy_rate"] += 1e-3
    (copy / "meta.json").write_text(json.dumps(meta), "utf-8")
    with pytest.raises(ValueError, match="was made by other random numbers"):
        open_source(copy)
