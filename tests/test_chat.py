"""Promise: labels stand on the assistant's words alone, and no conversation is lost on the way."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from dataset.chat import (
    ChatData,
    encode_conversation,
    encode_prompt,
    gsm8k_conversation,
    held_out_below,
    only_answer,
    question_place,
)
from dataset.prepare import problem_line
from dataset.problems import make_problems
from dataset.tokenizer import decode, load_tokenizer, save_tokenizer, train_tokenizer
from files import tokenizer_hash
from run.batches import count_parts

IGNORE, PAD, START, END, THINK, UNTHINK, ANSWER, UNANSWER = -100, 0, 1, 2, 3, 4, 5, 6
TRACE = "<think>\n2+2=4\n</think>\n<answer>\n4\n</answer>"


@pytest.fixture(scope="module")
def letters():
    """A tokenizer without merges: every ASCII character is a token, so ids can be spelled."""
    return train_tokenizer([""], 263)


@pytest.fixture(scope="module")
def letters_folder(letters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    save_tokenizer(letters, folder)
    return folder


def spell(tokenizer, text: str) -> list[int]:
    """Ids of ASCII `text` by the definition of byte-level tokens, without encoding it."""
    return [tokenizer.token_to_id({" ": "Ġ", "\n": "Ċ"}.get(c, c)) for c in text]


def talk(*contents, roles=("user", "assistant")) -> list[dict]:
    """Turns by user and assistant, one after the other."""
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def write(path, *conversations):
    """A jsonl of conversations (lists of turns), or of raw lines (text)."""
    lines = [c if isinstance(c, str) else json.dumps({"conversations": c}) for c in conversations]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


# --- Labels, token by token ---


def test_labels_by_hand(letters):
    turns = [{"role": "system", "content": "be good"}, *talk("2+2?", TRACE, "ok <answer>", "bye")]
    learned_trace = [THINK, *spell(letters, "\n2+2=4\n"), UNTHINK, *spell(letters, "\n"), ANSWER]
    learned_trace += [*spell(letters, "\n4\n"), UNANSWER, END]
    pieces = [  # (tokens, whether the assistant wrote them)
        ([START, *spell(letters, "system\nbe good"), END, *spell(letters, "\n")], False),
        ([START, *spell(letters, "user\n2+2?"), END, *spell(letters, "\n")], False),
        ([START, *spell(letters, "assistant\n")], False),
        (learned_trace, True),
        (spell(letters, "\n"), False),
        ([START, *spell(letters, "user\nok <answer>"), END, *spell(letters, "\n")], False),
        ([START, *spell(letters, "assistant\n")], False),
        ([*spell(letters, "bye"), END], True),
        (spell(letters, "\n"), False),
    ]
    ids = [token for tokens, _ in pieces for token in tokens]
    own = [by_assistant for tokens, by_assistant in pieces for _ in tokens]
    input_ids, labels = encode_conversation(letters, turns)
    assert input_ids == ids[:-1]
    expected = [t if mine else IGNORE for t, mine in zip(ids[1:], own[1:], strict=True)]
    assert labels == expected


def test_prompt_is_masked_and_the_first_label_is_the_assistants_first_token(letters):
    input_ids, labels = encode_conversation(letters, talk("question", "reply"))
    first = labels.index(letters.token_to_id("r"))
    assert set(labels[:first]) == {IGNORE}
    assert decode(letters, input_ids[: first + 1]).endswith("<|im_start|>assistant\n")
    assert decode(letters, [x for x in labels if x != IGNORE]) == "reply<|im_end|>"


@pytest.mark.parametrize("control", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>"])
def test_control_tokens_typed_by_the_user_stay_text(letters, control):
    index = letters.token_to_id(control)
    plain, _ = encode_conversation(letters, talk("", "x"))
    typed, labels = encode_conversation(letters, talk(control, "x"))
    assert typed.count(index) == plain.count(index)
    assert len(typed) == len(plain) + len(control)
    assert [x for x in labels if x != IGNORE] == [*spell(letters, "x"), END]


def test_assistant_cannot_write_an_end_of_turn_into_the_middle(letters):
    _, labels = encode_conversation(letters, talk("q", "a<|im_end|>b"))
    assert [x for x in labels if x != IGNORE] == [*spell(letters, "a<|im_end|>b"), END]


def test_prompt_is_a_prefix_of_the_whole_conversation(prepared_folder):
    tokenizer = load_tokenizer(prepared_folder)
    rng = random.Random(0)
    alphabet = "ab 12\n\t.é🙂<>|"
    for _ in range(300):
        contents = ["".join(rng.choices(alphabet, k=rng.randint(0, 12))) for _ in range(4)]
        contents[3] = rng.choice(["", "\n", " ", TRACE, "\n\n"]) + contents[3]
        turns = talk(*contents)
        prompt = encode_prompt(tokenizer, turns[:3])
        input_ids, labels = encode_conversation(tokenizer, turns)
        assert input_ids[: len(prompt)] == prompt
        # What is left to learn starts exactly where the prompt ends.
        assert labels[len(prompt) - 2] == IGNORE and labels[len(prompt) - 1] != IGNORE


def test_prompt_by_hand(letters):
    expected = [START, *spell(letters, "user\nhi"), END, *spell(letters, "\n")]
    expected += [START, *spell(letters, "assistant\n")]
    assert encode_prompt(letters, talk("hi")) == expected


# --- only_answer, GSM8K ---


@pytest.mark.parametrize(
    "content, left",
    [
        (TRACE, "<answer>\n4\n</answer>"),
        ("<think>a</think>b<think>c\n\nd</think>  e", "be"),
        ("no span", "no span"),
        ("<answer>4</answer>", "<answer>4</answer>"),
    ],
)
def test_only_answer_removes_what_the_assistant_thought(content, left):
    turns = talk("why <think>user</think>?", content)
    assert only_answer(turns) == talk("why <think>user</think>?", left)
    assert turns[1]["content"] == content  # the caller's turns are untouched


@pytest.mark.parametrize(
    "answer, reasoning, final",
    [
        (
            "He sold 48/2 = <<48/2=24>>24 clips.\nAll: 48+24 = <<48+24=72>>72.\n#### 72",
            "He sold 48/2 = 24 clips.\nAll: 48+24 = 72.",
            72,
        ),
        ("So much.\n#### 1,234", "So much.", 1234),
        ("Less.\n#### -3", "Less.", -3),
        ("It is #### marked.\n#### 1,000,000 ", "It is #### marked.", 1000000),
        ("It costs\n#### $10", "It costs", 10),
        ("He owes\n#### -$1,250", "He owes", -1250),
        ("Half.\n#### 50%", "Half.", 50),
        ("Per day.\n#### 3.5", "Per day.", "3.5"),  # a float would lose digits of a long one
        ("A part.\n#### $.75", "A part.", ".75"),
    ],
)
def test_gsm8k_conversion(answer, reasoning, final):
    """The answer is a number without its units; what is not whole stays as it is written."""
    line = gsm8k_conversation({"question": "How many?", "answer": answer}, "f line 1")
    content = f"<think>\n{reasoning}\n</think>\n<answer>\n{final}\n</answer>"
    assert line == {"conversations": talk("How many?", content), "answer": final}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"question": "q"},
        {"question": "q", "answer": "no mark, 72"},
        {"question": 1, "answer": "#### 1"},
        {"question": "q", "answer": 72},
        {"question": "q", "answer": "reasoning\n####  "},  # no answer behind the mark
        {"question": "q", "answer": "reasoning\n#### 1/2"},  # not a whole number
    ],
)
def test_gsm8k_line_without_an_answer_is_refused(value):
    with pytest.raises(ValueError, match="f line 7.*####"):
        gsm8k_conversation(value, "f line 7")


# --- Refusals ---

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def turns_line(*turns) -> str:
    return json.dumps({"conversations": list(turns)})


GOOD = turns_line(USER, REPLY)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not valid JSON"),
        ("{}", '"conversations"'),
        ('{"conversation": []}', '"conversations"'),
        ('{"conversations": []}', '"conversations"'),
        ('{"conversations": {"role": "user"}}', '"conversations"'),
        ('{"conversations": "hello"}', '"conversations"'),
        (turns_line("hello", REPLY), "'hello'.*system, user, assistant"),
        (turns_line({"role": "robot", "content": "x"}, REPLY), "'robot'.*system, user, assistant"),
        (turns_line({"role": ["user"], "content": "x"}, REPLY), "role"),
        (turns_line({"content": "x"}, REPLY), "role None"),
        (turns_line({"role": "user"}, REPLY), 'user turn needs a "content"'),
        (turns_line(USER, {"role": "assistant", "content": None}), 'assistant turn.*"content"'),
        (turns_line({"role": "user", "content": ["x"]}, REPLY), 'user turn needs a "content"'),
        (turns_line(USER), "no assistant turn"),
        (turns_line(USER, {"role": "assistant", "content": ""}), "nothing to learn"),
        (turns_line({"role": "user", "content": "\ud83d"}, REPLY), ""),  # half an emoji
    ],
)
def test_bad_conversation_is_refused_by_its_line(tmp_path, letters_folder, line, message):
    path = write(tmp_path / "chat.jsonl", GOOD, line, GOOD)
    with pytest.raises(ValueError, match=f"chat.jsonl line 2.*{message}"):
        ChatData(path, letters_folder, "train", 100, val_share=0.0)


def test_bad_conversations_may_be_left_out(tmp_path, letters, letters_folder, capsys):
    """From both splits; they are told once."""
    good = many(60)
    path = write(tmp_path / "chat.jsonl", "{", *good, turns_line(USER), "[]")
    options = {"val_share": 0.3, "skip_bad": True}
    data = ChatData(path, letters_folder, "train", 10_000, **options)
    rows = rows_of(data.evaluation(8, 1000)) + rows_of(data.held_out.evaluation(8, 1000))
    assert sorted(rows) == expected_rows(letters, good)
    assert capsys.readouterr().out.count("3 bad lines were left out") == 1
    with pytest.raises(ValueError, match="chat.jsonl line 1 is not valid JSON"):
        ChatData(path, letters_folder, "train", 10_000, val_share=0.3)


def test_prompt_longer_than_max_len_leaves_nothing_to_learn(tmp_path, letters_folder):
    path = write(tmp_path / "chat.jsonl", talk("q", "a"), talk("long " * 50, "a"))
    with pytest.raises(ValueError, match="line 2.*100 tokens.*--seq_len"):
        ChatData(path, letters_folder, "train", 100, val_share=0.0)


def test_thinking_alone_leaves_nothing_to_learn_without_it(tmp_path, letters_folder):
    # Or the student would be taught to answer with silence.
    path = write(tmp_path / "chat.jsonl", talk("q", "a"), talk("q", "<think>\nhm\n</think>\n"))
    assert ChatData(path, letters_folder, "train", 100, val_share=0.0).size == 2
    with pytest.raises(ValueError, match="line 2"):
        ChatData(path, letters_folder, "train", 100, val_share=0.0, answers_only=True)


@pytest.mark.parametrize("split, val_share", [("val", 0.0), ("train", 1.0)])
def test_empty_split_is_refused(tmp_path, letters_folder, split, val_share):
    path = write(tmp_path / "chat.jsonl", talk("q", "a"))
    with pytest.raises(ValueError, match=f"none of its 1 conversations.*{split}"):
        ChatData(path, letters_folder, split, 100, val_share=val_share)


# --- What no lesson reads ---


def said(capsys, path) -> str:
    """What was said about that file."""
    return " ".join(x for x in capsys.readouterr().out.splitlines() if x.startswith(str(path)))


CALL = [{"name": "clock", "arguments": {}}]


def test_tools_are_left_out_and_counted_and_no_empty_reply_is_trained(
    tmp_path, letters, letters_folder, capsys
):
    called = [
        {"role": "system", "content": "be good", "tools": "[clock]"},
        {"role": "user", "content": "what time?"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "12:00"},
        {"role": "assistant", "content": "noon"},
    ]
    null = [{**turn, "content": turn["content"] or None} for turn in called]
    silent = talk("say nothing", " \n", "and now?", "now")
    path = write(tmp_path / "chat.jsonl", called, null, silent, called[:4])
    data = ChatData(path, letters_folder, "train", 100, val_share=0.0)
    clean = [{"role": "system", "content": "be good"}, *talk("what time?", "noon")]
    kept = [{"role": "user", "content": "say nothing"}, *talk("and now?", "now")]
    assert sorted(rows_of(data.evaluation(9, 9))) == expected_rows(letters, [clean, clean, kept])
    for _, labels in rows_of(data.evaluation(9, 9)):
        spoken = [place for place, label in enumerate(labels) if label == END]
        assert all(labels[place - 1] not in (IGNORE, END) for place in spoken)
    out = said(capsys, path)
    assert "1 bad line was left out" in out  # it only calls a tool; the file is not refused
    assert "3 tools, 3 tool_calls, 4 empty replies, 3 turns of tools" in out


def test_reasoning_content_becomes_a_think_span(tmp_path, letters, letters_folder, capsys):
    thought = [USER, {"role": "assistant", "content": "4", "reasoning_content": "2+2"}]
    twice = [USER, {**thought[1], "content": "<think>\nhm\n</think>\n4"}]
    path = write(tmp_path / "chat.jsonl", thought, twice)
    data = ChatData(path, letters_folder, "train", 100, val_share=0.0)
    spans = [talk("q", f"<think>\n{words}\n</think>\n4") for words in ("2+2", "hm")]
    assert sorted(rows_of(data.evaluation(2, 2))) == expected_rows(letters, spans)
    # Two trains of thought for one reply: that of the content is kept.
    assert said(capsys, path) == f"{path}: left out of its lines: 1 reasoning_content"


def test_without_tags_reasoning_content_is_left_out_and_counted(tmp_path, letters, capsys):
    tokenizer = Tokenizer.from_str(letters.to_str().replace("think>", "thonk>"))
    save_tokenizer(tokenizer, tmp_path)
    tokenizer.encode_special_tokens = True
    path = write(tmp_path / "chat.jsonl", [USER, {**REPLY, "reasoning_content": "2+2"}])
    data = ChatData(path, tmp_path, "train", 100, val_share=0.0)
    assert rows_of(data.evaluation(2, 2)) == expected_rows(tokenizer, [[USER, REPLY]])
    assert said(capsys, path) == f"{path}: left out of its lines: 1 reasoning_content"


def test_answers_alone_train_no_empty_reply(tmp_path, letters, letters_folder):
    turns = talk("q", "<think>\nhm\n</think>\n", "r", TRACE)
    path = write(tmp_path / "chat.jsonl", turns)
    data = ChatData(path, letters_folder, "train", 100, val_share=0.0, answers_only=True)
    left = [turns[0], *talk("r", "<answer>\n4\n</answer>")]
    assert rows_of(data.evaluation(2, 2)) == expected_rows(letters, [left])


# --- Small sets ---


@pytest.mark.parametrize("count", [2, 3, 5, 30])
@pytest.mark.parametrize("val_share", [0.01, 0.05, 0.5, 0.99])
def test_both_splits_have_a_conversation_however_few_there_are(
    tmp_path, letters, letters_folder, count, val_share
):
    for first in range(0, 60, count):
        conversations = [talk(f"question {first + i}", "a") for i in range(count)]
        path = write(tmp_path / "chat.jsonl", *conversations)
        data = ChatData(path, letters_folder, "train", 100, val_share=val_share)
        rows = [rows_of(part.evaluation(99, 99)) for part in (data, data.held_out)]
        assert all(rows) and sorted(rows[0] + rows[1]) == expected_rows(letters, conversations)


def test_equal_questions_are_on_one_side(tmp_path, letters_folder):
    conversations = [talk(f"q{i % 2}", f"a{i}") for i in range(20)]
    path = write(tmp_path / "chat.jsonl", *conversations)
    data = ChatData(path, letters_folder, "train", 100)
    assert (data.size, data.held_out.size) == (10, 10)


@pytest.mark.parametrize(
    "places, share, limit",
    [
        ([0.2, 0.4, 0.6], 0.3, 0.3),  # as asked
        ([0.2, 0.4, 0.6], 0.1, 0.2 + 2**-32),  # the least is held out
        ([0.2, 0.4, 0.6], 0.9, 0.6),  # the largest is trained on
        ([0.2], 0.5, 0.2),  # one alone is trained on
        ([0.2, 0.4], 0.0, 0.0),  # none is wanted
    ],
)
def test_the_limit_of_what_is_held_out_by_hand(places, share, limit):
    assert held_out_below(places, share) == limit


# --- Batches ---


def many(count: int) -> list[list[dict]]:
    """Conversations of very different lengths, some of many turns; no two are equal."""
    rng = random.Random(1)
    made = []
    for i in range(count):
        rounds = rng.randint(1, 3)
        made.append(talk(*(f"{i} " + "x" * rng.randint(0, 60) for _ in range(2 * rounds))))
    return made


def rows_of(batches) -> list[tuple]:
    """(input_ids, labels) of every row, without its padding; checks that the rest is padding."""
    rows = []
    for input_ids, labels in batches:
        assert input_ids.shape == labels.shape
        assert input_ids.dtype == labels.dtype == torch.int64
        longest = 0
        for ids, targets in zip(input_ids.tolist(), labels.tolist(), strict=True):
            length = len(ids) - next((i for i, x in enumerate(reversed(ids)) if x != PAD), len(ids))
            assert set(targets[length:]) <= {IGNORE}
            rows.append((tuple(ids[:length]), tuple(targets[:length])))
            longest = max(longest, length)
        assert longest == input_ids.shape[1]  # padded to its own longest, no further
    return rows


def expected_rows(tokenizer, conversations) -> list[tuple]:
    return sorted(tuple(map(tuple, encode_conversation(tokenizer, c))) for c in conversations)


def epoch(data, batch_size, seed, number=0):
    steps = -(-data.size // batch_size)
    return [data.batch(n, batch_size, seed) for n in range(number * steps, (number + 1) * steps)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 37, 64])
def test_every_conversation_stands_once_in_every_epoch(
    tmp_path, letters, letters_folder, batch_size
):
    conversations = many(37)
    path = write(tmp_path / "chat.jsonl", *conversations)
    data = ChatData(path, letters_folder, "train", 10_000, val_share=0.0)
    assert data.cut == 0
    for number in range(3):
        rows = rows_of(epoch(data, batch_size, seed=0, number=number))
        assert sorted(rows) == expected_rows(letters, conversations)


def test_train_and_val_share_nothing_and_lose_nothing(tmp_path, letters, letters_folder):
    conversations = many(200)
    path = write(tmp_path / "chat.jsonl", *conversations)
    parts = [ChatData(path, letters_folder, s, 10_000, val_share=0.3) for s in ("train", "val")]
    train, val = (rows_of(data.evaluation(16, 1000)) for data in parts)
    assert sorted(train + val) == expected_rows(letters, conversations)
    assert 35 < len(val) < 85  # 60 expected, standard deviation 6.5


def test_the_training_split_has_the_other_as_held_out(tmp_path, letters, letters_folder):
    path = write(tmp_path / "chat.jsonl", *many(60))
    options = {"val_share": 0.3, "answers_only": True}
    train = ChatData(path, letters_folder, "train", 150, **options)
    val = ChatData(path, letters_folder, "val", 150, **options)
    assert [len(ids) for ids, _ in train.held_out.examples] == list(val.lengths)
    assert val.held_out is None
    assert train.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert train.tokenizer_sha256 == tokenizer_hash(letters_folder)
    assert train.special_ids() == ((THINK, UNTHINK, ANSWER, UNANSWER), END)
    assert train.vocab_size == 263


def test_split_follows_from_the_question_alone(tmp_path, letters_folder):
    conversations = many(100)
    before = [question_place(turns) < 0.3 for turns in conversations]
    for turns in conversations:
        turns[-1]["content"] = TRACE  # another teacher's answer
    assert [question_place(turns) < 0.3 for turns in conversations] == before
    path = write(tmp_path / "a.jsonl", *conversations)
    back = write(tmp_path / "b.jsonl", *conversations[::-1])
    rows = [
        rows_of(ChatData(p, letters_folder, "val", 10_000, val_share=0.3).evaluation(8, 1000))
        for p in (path, back)
    ]
    assert sorted(rows[0]) == sorted(rows[1])
    sizes = [
        ChatData(path, letters_folder, "val", 10_000, val_share=0.3, answers_only=only).size
        for only in (False, True)
    ]
    assert sizes[0] == sizes[1] == sum(before)


def test_larger_val_share_only_adds(letters):
    conversations = many(200)
    small = {i for i, turns in enumerate(conversations) if question_place(turns) < 0.1}
    large = {i for i, turns in enumerate(conversations) if question_place(turns) < 0.5}
    assert small < large


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batch_depends_on_data_seed_and_step_alone(tmp_path, letters_folder):
    path = write(tmp_path / "chat.jsonl", *many(30))

    def reader():
        return ChatData(path, letters_folder, "train", 10_000, val_share=0.0)

    fresh = {n: reader().batch(n, 4, 5) for n in range(20)}  # two and a half epochs
    used = reader()
    for n in [*reversed(range(20)), 3, 19, 0, 9, 9]:
        assert same(used.batch(n, 4, 5), fresh[n])


@pytest.mark.parametrize("asked", [[(4, 0), (4, 1), (4, 0)], [(4, 0), (7, 0), (4, 0)]])
def test_one_reader_may_be_asked_for_other_seeds_and_sizes(tmp_path, letters_folder, asked):
    path = write(tmp_path / "chat.jsonl", *many(30))
    used = ChatData(path, letters_folder, "train", 10_000, val_share=0.0)
    for batch_size, seed in asked:
        fresh = ChatData(path, letters_folder, "train", 10_000, val_share=0.0)
        assert same(used.batch(1, batch_size, seed), fresh.batch(1, batch_size, seed))


def test_seeds_and_epochs_give_other_orders(tmp_path, letters_folder):
    path = write(tmp_path / "chat.jsonl", *many(40))
    data = [ChatData(path, letters_folder, "train", 10_000, val_share=0.0) for _ in range(2)]
    orders = [tuple(rows_of(epoch(data[s], 4, s, number))) for s in (0, 1) for number in (0, 1)]
    assert len(set(orders)) == 4


def test_a_batch_is_sorted_by_length_and_the_batches_are_not(tmp_path, letters_folder):
    path = write(tmp_path / "chat.jsonl", *many(400))
    data = ChatData(path, letters_folder, "train", 10_000, val_share=0.0)
    means = []
    for batch in epoch(data, 8, 0):
        lengths = [len(ids) for ids, _ in rows_of([batch])]
        assert lengths == sorted(lengths, reverse=True)
        means.append(sum(lengths) / 8)
    # Means of random draws of 8 spread 0.35 as much as the lengths; of sorted ones, as much.
    assert np.std(means) == pytest.approx(np.std(data.lengths) / 8**0.5, rel=0.3)


def test_evaluation_set_has_no_seed_and_a_limit(tmp_path, letters, letters_folder):
    conversations = many(30)
    path = write(tmp_path / "chat.jsonl", *conversations)
    data = ChatData(path, letters_folder, "train", 10_000, val_share=0.0)
    data.batch(5, 4, seed=3)
    rows = rows_of(data.evaluation(4, 10))
    assert sorted(rows) == expected_rows(letters, conversations[:10])
    assert len(rows_of(data.evaluation(4, 1000))) == 30


@pytest.mark.parametrize("batch_size", [64, 128])
def test_padding_of_generated_problems_is_small(tmp_path, prepared_folder, batch_size):
    problems = make_problems("train", (1, 2, 3, 4), 6 * 128, seed=0)
    lines = [json.dumps(problem_line(problem, with_trace=True)) for problem in problems]
    path = write(tmp_path / "reason.jsonl", *lines)
    data = ChatData(path, prepared_folder, "train", 10_000, val_share=0.0)
    tokens = computed = 0
    parts = count_parts(batch_size, 1, data.padded)
    for input_ids, _ in epoch(data, batch_size, seed=4):
        for piece in input_ids.chunk(parts):  # each is cut at its own longest row
            lengths = (piece != PAD).sum(1).tolist()
            tokens += sum(lengths)
            computed += len(lengths) * max(lengths)
    assert tokens == sum(len(ids) for ids, _ in data.examples)
    assert 1 - tokens / computed < 0.15


@pytest.mark.parametrize(
    "batch_size, accumulation_steps, parts",
    [(1, 1, 1), (7, 1, 1), (16, 1, 2), (32, 1, 4), (512, 1, 4), (16, 8, 8), (64, 2, 4)],
)
def test_micro_batches_of_conversations(batch_size, accumulation_steps, parts):
    assert count_parts(batch_size, accumulation_steps, ChatData.padded) == parts


def test_cut_conversations_are_counted_and_kept(tmp_path, letters, letters_folder):
    conversations = many(60)
    lengths = sorted(len(encode_conversation(letters, c)[0]) for c in conversations)
    path = write(tmp_path / "chat.jsonl", *conversations)
    limit = lengths[-5]
    assert lengths[-6] < limit < lengths[-4]
    data = ChatData(path, letters_folder, "train", limit, val_share=0.0)
    assert (data.cut, data.size) == (4, 60)
    expected = sorted(
        tuple(tuple(part[:limit]) for part in encode_conversation(letters, c))
        for c in conversations
    )
    assert sorted(rows_of(data.evaluation(8, 1000))) == expected
