"""What all tests share: one thread (two would only fight), and one small prepared folder."""

import os
import random

import pytest
import torch

import train_pretrain
from dataset import prepare, teacher_cache
from model.device import available_cores

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--gpu", action="store_true", help="let tests see the GPU: tests/test_gpu.py")


def pytest_configure(config):
    """The tests are about the CPU, on a machine with a GPU too: theirs are equal bits."""
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first asked for


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config) -> int:
    """A process for each core, at most 8 (they take 0.4 GB each); none more for a single file."""
    named = {word.split("::")[0] for word in config.args}
    alone = len(named) == 1 and named.pop().endswith(".py")
    return 0 if alone else min(8, available_cores())


# Minutes each: they come first, so that no process waits for another one's in the end.
LONGEST = ("test_parallel", "test_crash_points", "test_eval", "test_kill")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run it with --slow"))


WORDS = "the sea ship wind king queen crown night day star song stone river long cold old and but "
WORDS += "of to in sings falls rises burns sleeps calls 1 27 394 Éire naïve"


def small_text(seed: int, lines: int = 120) -> str:
    """About 4 kB of random sentences, the same for the same seed."""
    rng = random.Random(seed)
    words = WORDS.split()
    return "".join(" ".join(rng.choices(words, k=8)) + ".\n" for _ in range(lines))


@pytest.fixture(scope="module", autouse=True)
def few_held_out():
    """Runs are evaluated on 8 windows on their way: half of a short run's time went into that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("run.training.EVALUATED", 8)
        yield


@pytest.fixture(autouse=True)
def same_numbers(request):
    """Tests of methods draw the same numbers whatever ran before: what passes once passes again."""
    if request.path.stem.startswith(("test_method_", "test_experts")):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory):
    """A folder made by dataset.prepare from 6 small documents, with a vocabulary of 400.

    Read-only: a test that changes a file must copy the folder first.
    """
    texts, out = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("prepared")
    for number in range(6):
        (texts / f"{number}.txt").write_text(small_text(number), "utf-8")
    flags = ["--text", texts, "--out", out, "--vocab_size", 400, "--val_share", 0.2]
    flags += ["--problems", 150, "--prompts", 20, "--test_problems", 20]
    prepare.main(prepare.parse_args([str(flag) for flag in flags]))
    return out


@pytest.fixture(scope="session")
def kill_teacher(prepared_folder, tmp_path_factory):
    """A small teacher and what it says about the text. Read-only."""
    from tests.robustness.test_kill import command_of
    from tests.short_runs import run

    folder = tmp_path_factory.mktemp("kill")
    teacher = folder / "teacher"
    run(train_pretrain, *command_of("pretrain", prepared_folder, None, teacher)[1:])
    words = command_of("cache", prepared_folder, teacher, folder / "sample.cache")[2:]
    run(teacher_cache, *words, "--seq_len", "32")
    return teacher
