"""Promise: labels are the inputs shifted once; batch n is a function of (data, seed, n)."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch

from dataset.packing import PackedText, epoch_order, write_stream

END = 0


def sha256_of(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_folder(folder, documents, vocab_size=60000):
    """A prepared folder whose train and val streams hold `documents`."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text("{}")
    meta = {"vocab_size": vocab_size, "tokenizer_sha256": sha256_of(folder / "tokenizer.json")}
    for split in ("train", "val"):
        meta[split] = write_stream(folder / f"{split}.bin", documents, vocab_size, END)
        digest = sha256_of(folder / f"{split}.bin")
        meta[split] |= {"bytes": 3 * meta[split]["tokens"], "sha256": digest}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def counting(tmp_path, tokens: int):
    """A folder whose stream is 1, 2, ..., tokens-1, 0: a token tells its own place."""
    return make_folder(tmp_path / "data", [list(range(1, tokens))])


def test_stream_is_the_documents_each_ended(tmp_path):
    documents = [[5, 6, 7], [], [8], [9, 9]]
    about = write_stream(tmp_path / "a.bin", documents, 300, END)
    assert about == {"dtype": "uint16", "tokens": 10, "largest": 9}
    stored = np.fromfile(tmp_path / "a.bin", np.uint16)
    assert stored.tolist() == [5, 6, 7, 0, 0, 8, 0, 9, 9, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]  # no temporary file stays


@pytest.mark.parametrize("vocab_size, dtype", [(65536, "uint16"), (65537, "uint32")])
def test_large_vocabularies_are_stored_wide_enough(tmp_path, vocab_size, dtype):
    ids = [vocab_size - 1, 1, vocab_size - 1, 2]
    data = PackedText(make_folder(tmp_path / "data", [ids], vocab_size), "train", 2)
    assert data.stream.dtype == np.dtype(dtype)
    inputs, labels = data.take(np.array([0, 1]))
    assert inputs.tolist() == [ids[:2], ids[2:]]
    assert labels.tolist() == [ids[1:3], [2, END]]


@pytest.mark.parametrize("seq_len, batch_size", [(1, 1), (5, 3), (7, 4), (16, 5)])
def test_labels_are_inputs_shifted_once(tmp_path, seq_len, batch_size):
    rng = np.random.default_rng(0)
    folder = make_folder(tmp_path / "data", [rng.integers(1, 500, n).tolist() for n in (40, 90, 3)])
    raw = np.fromfile(folder / "train.bin", np.uint16).tolist()
    data = PackedText(folder, "train", seq_len)
    for step in range(8):
        windows = data.window_ids(step, batch_size, 0)
        inputs, labels = data.batch(step, batch_size, 0)
        assert inputs.shape == labels.shape == (batch_size, seq_len)
        assert inputs.dtype == labels.dtype == torch.int64
        for row, window in enumerate(windows.tolist()):
            first = window * seq_len
            assert inputs[row].tolist() == raw[first : first + seq_len]
            assert labels[row].tolist() == raw[first + 1 : first + seq_len + 1]


@pytest.mark.parametrize("tokens, seq_len", [(101, 10), (100, 10), (110, 10), (57, 7), (12, 11)])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_an_epoch_shows_every_token_once(tmp_path, tokens, seq_len, batch_size):
    data = PackedText(counting(tmp_path, tokens), "train", seq_len)
    whole_windows = (tokens - 1) // seq_len  # the last token of all is a label only
    rows = (row for n in itertools.count() for row in data.batch(n, batch_size, 3)[0].tolist())
    for _epoch in range(3):
        seen = sorted(sum(itertools.islice(rows, whole_windows), []))
        assert seen == list(range(1, whole_windows * seq_len + 1))


def test_batch_depends_on_data_seed_and_step_alone(tmp_path):
    folder = counting(tmp_path, 500)
    steps = list(range(40))  # three epochs of 49 windows
    fresh = {n: PackedText(folder, "train", 10).batch(n, 4, 5) for n in steps}
    used = PackedText(folder, "train", 10)
    for n in [*reversed(steps), 3, 39, 0, 17, 17, *steps]:
        for got, expected in zip(used.batch(n, 4, 5), fresh[n], strict=True):
            assert torch.equal(got, expected)


def test_one_reader_may_be_asked_for_two_seeds(tmp_path):
    folder = counting(tmp_path, 500)
    used = PackedText(folder, "train", 10)
    for seed in (0, 1, 0, 2):
        fresh = PackedText(folder, "train", 10)
        assert torch.equal(used.batch(2, 4, seed)[0], fresh.batch(2, 4, seed)[0])


def test_seeds_and_epochs_give_other_orders(tmp_path):
    folder = counting(tmp_path, 500)

    def order(seed, epoch):
        return PackedText(folder, "train", 10).window_ids(epoch, 49, seed).tolist()

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(sorted(o) == list(range(49)) for o in orders)
    assert len({tuple(o) for o in orders}) == 9 and list(range(49)) not in orders


def test_epoch_order_is_uniform():
    # Each of 5 windows comes first in a fifth of 2000 epochs: 400, standard deviation 17.9.
    first = np.bincount([epoch_order(5, 0, epoch)[0] for epoch in range(2000)], minlength=5)
    assert (abs(first - 400) < 90).all()


def test_share_uses_a_prefix_only(tmp_path):
    folder = counting(tmp_path, 1001)
    data = PackedText(folder, "train", 10, share=0.25)
    assert data.size == 25
    seen = {t for n in range(10) for t in data.batch(n, 5, 0)[0].flatten().tolist()}
    assert seen == set(range(1, 251))


@pytest.mark.parametrize("most, batch_size", [(1, 4), (7, 3), (49, 10), (1000, 16)])
def test_evaluation_set_is_fixed_and_spread(tmp_path, most, batch_size):
    folder = counting(tmp_path, 500)
    data, other = PackedText(folder, "val", 10), PackedText(folder, "val", 10)
    other.batch(3, 4, seed=9)  # training with any seed must not move it
    rows = [r for x, _ in data.evaluation(batch_size, most) for r in x.tolist()]
    assert rows == [r for x, _ in other.evaluation(batch_size, most) for r in x.tolist()]
    firsts = [row[0] for row in rows]
    assert len(set(firsts)) == len(firsts) == min(most, 49)
    assert firsts == sorted(firsts)
    if most > 1:
        assert firsts[0] == 1 and firsts[-1] == 48 * 10 + 1
        gaps = np.diff(firsts) // 10
        assert gaps.max() - gaps.min() <= 1
    for inputs, labels in data.evaluation(batch_size, most):
        assert len(inputs) <= batch_size and torch.equal(inputs[:, 1:], labels[:, :-1])


def test_what_is_known_of_a_text_comes_from_meta(tmp_path):
    data = PackedText(counting(tmp_path, 100), "val", 10)
    assert data.bytes_per_token == 3.0 and data.vocab_size == 60000
    hashes = tuple(sha256_of(tmp_path / "data" / name) for name in ("val.bin", "tokenizer.json"))
    assert (data.sha256, data.tokenizer_sha256) == hashes
    assert data.tokenizer_folder == data.folder == tmp_path / "data"


def test_the_training_split_has_the_other_as_held_out(tmp_path):
    """The whole of it, whatever share is trained on."""
    train = PackedText(counting(tmp_path, 100), "train", 10, share=0.5)
    assert (train.size, train.held_out.size) == (4, 9)
    assert train.held_out.sha256 == sha256_of(tmp_path / "data" / "val.bin")
    assert train.held_out.held_out is None


def test_folder_that_was_not_prepared_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*python -m dataset.prepare"):
        PackedText(tmp_path / "nowhere", "train", 10)


@pytest.mark.parametrize("damage", ["longer", "shorter", "empty", "gone"])
def test_stream_of_another_size_is_refused(tmp_path, damage):
    folder = counting(tmp_path, 100)
    path = folder / "train.bin"
    content = path.read_bytes()
    damaged = {"longer": content + b"\0\0", "shorter": content[:-1], "empty": b""}
    path.unlink() if damage == "gone" else path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match="train.bin does not hold the 100 tokens.*prepare"):
        PackedText(folder, "train", 10)
    assert PackedText(folder, "val", 10).size == 9


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"train": {"tokens": 3}}'])
def test_damaged_meta_is_refused(tmp_path, content):
    folder = counting(tmp_path, 100)
    (folder / "meta.json").write_text(content)
    with pytest.raises(ValueError, match="meta.json"):
        PackedText(folder, "train", 10)


@pytest.mark.parametrize(
    "seq_len, share, fits", [(99, 1.0, True), (100, 1.0, False), (10, 0.2, True), (10, 0.1, False)]
)
def test_text_shorter_than_a_window_is_refused(tmp_path, seq_len, share, fits):
    folder = counting(tmp_path, 100)
    if fits:
        assert PackedText(folder, "train", seq_len, share).size == 1
    else:
        with pytest.raises(ValueError, match="100 tokens.*--seq_len"):
            PackedText(folder, "train", seq_len, share)
