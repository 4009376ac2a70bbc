"""Generation writes the tokens that plain, uncached forward passes of one row would choose: the
cache, the left padding and the batch change nothing; sampling draws from the softmax it names."""

import pytest
import torch

from model import ModelConfig, Transformer, generate, stream
from model.generate import choose_token

V = 31
PROMPTS = [[5, 9, 14, 3], [7], [11, 12, 13, 14, 15, 16, 17], [20, 21]]


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    """Wide random weights: the continuation of every prompt wanders, and no two logits tie."""
    torch.manual_seed(9)
    config = ModelConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, intermediate_size=24, max_position_embeddings=64,
        tie_word_embeddings=False, qk_norm=request.param == "qwen3",
    )  # fmt: skip
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.7)
    return model


@torch.no_grad()
def slow_greedy(model, prompt, count, stop_ids=()):
    """One row, the whole sequence at every step, no padding, no cache."""
    ids = list(prompt)
    for _ in range(count):
        token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_of_one_prompt(model, prompt, use_cache):
    expected = slow_greedy(model, prompt, 20)
    assert len(set(expected)) > 3  # otherwise this would prove little
    assert generate(model, [prompt], 20, stop_ids=(), use_cache=use_cache) == [expected]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_of_a_batch_equals_each_prompt_alone(model, use_cache):
    expected = [slow_greedy(model, prompt, 20) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 20, stop_ids=(), use_cache=use_cache) == expected


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_stop_on_their_own(model, use_cache):
    """Rows that end early are dropped from the batch and must not disturb the others."""
    plain = [slow_greedy(model, prompt, 24) for prompt in PROMPTS]
    stop_ids = (plain[0][2], plain[1][7], plain[2][12])
    expected = [slow_greedy(model, prompt, 24, stop_ids) for prompt in PROMPTS]
    lengths = [len(tokens) for tokens in expected]
    assert len(set(lengths)) > 1 and min(lengths) < 24
    got = generate(model, PROMPTS, 24, stop_ids=stop_ids, use_cache=use_cache)
    assert got == expected


@pytest.mark.parametrize("count", range(1, 5))
def test_every_way_of_dropping_rows(model, count):
    """With few stop tokens in turn, each row is at some time the one that ends first."""
    prompts = PROMPTS[:count]
    for stop in range(0, V, 3):
        expected = [slow_greedy(model, prompt, 8, (stop,)) for prompt in prompts]
        assert generate(model, prompts, 8, stop_ids=(stop,)) == expected


def test_default_stop_tokens_end_a_turn_or_a_document(model):
    prompt = next(
        [a, b]
        for a in range(V)
        for b in range(V)
        if any(t in (0, 2) for t in slow_greedy(model, [a, b], 12))
    )
    expected = slow_greedy(model, prompt, 12, (0, 2))
    assert len(expected) < 12
    assert generate(model, [prompt], 12) == [expected]


def test_a_padding_token_in_the_prompt_is_a_token(model):
    """What is masked is decided by lengths, not by the id 0."""
    prompts = [[0, 0, 5], [9, 0, 4, 0, 7]]
    expected = [slow_greedy(model, prompt, 10) for prompt in prompts]
    assert generate(model, prompts, 10, stop_ids=()) == expected


def test_stream_equals_generate(model):
    expected = slow_greedy(model, PROMPTS[0], 15)
    assert list(stream(model, PROMPTS[0], 15, stop_ids=())) == expected
    options = {"temperature": 1.0, "top_k": 5, "stop_ids": (3,)}
    whole = generate(model, [PROMPTS[0]], 15, generator=seeded(4), **options)
    assert list(stream(model, PROMPTS[0], 15, generator=seeded(4), **options)) == whole[0]


def test_stream_leaves_gradients_on_between_tokens(model):
    tokens = stream(model, PROMPTS[0], 5, stop_ids=())
    next(tokens)
    assert not torch.is_inference_mode_enabled()
    assert model(torch.tensor([PROMPTS[0]])).requires_grad


def test_no_new_tokens(model):
    assert generate(model, PROMPTS, 0) == [[], [], [], []]


# Refusals.


@pytest.mark.parametrize("prompts", [[], [[]], [[4, 5], []]])
def test_empty_prompts_are_refused(model, prompts):
    with pytest.raises(ValueError, match="prompt"):
        generate(model, prompts, 4)


@pytest.mark.parametrize("length, count, fits", [(40, 24, True), (40, 25, False), (65, 1, False)])
def test_more_positions_than_the_model_has_are_refused(model, length, count, fits):
    if fits:
        assert len(generate(model, [[5] * length], count, stop_ids=())[0]) == count
    else:
        with pytest.raises(ValueError, match="64 positions"):
            generate(model, [[7], [5] * length], count)


@pytest.mark.parametrize(
    "option",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": -0.5}],
)
def test_sampling_options_that_mean_nothing_are_refused(model, option):
    """A negative temperature would prefer the least likely token; top_p 0 leaves no token."""
    with pytest.raises(ValueError, match=next(iter(option))):
        generate(model, PROMPTS, 2, **{"temperature": 1.0, **option})


# Sampling.


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("option", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_narrow_sampling_is_greedy(model, option):
    expected = [slow_greedy(model, prompt, 15) for prompt in PROMPTS]
    options = {"temperature": 1.0, **option}
    assert generate(model, PROMPTS, 15, stop_ids=(), generator=seeded(0), **options) == expected


def test_sampling_is_repeatable_with_a_generator(model):
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "stop_ids": ()}
    state = torch.get_rng_state()
    first, again, other = (
        generate(model, PROMPTS, 15, generator=seeded(s), **options) for s in (7, 7, 8)
    )
    assert first == again
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from the global one


PROBABILITIES = (0.5, 0.3, 0.15, 0.05)


@pytest.mark.parametrize(
    "options, expected",
    [
        ((1.0, 0, 1.0), (0.5, 0.3, 0.15, 0.05)),
        ((1.0, 4, 1.0), (0.5, 0.3, 0.15, 0.05)),
        ((1.0, 9, 1.0), (0.5, 0.3, 0.15, 0.05)),  # more than there are tokens
        ((0.5, 0, 1.0), tuple(x / 0.365 for x in (0.25, 0.09, 0.0225, 0.0025))),  # squares
        ((1.0, 2, 1.0), (0.625, 0.375, 0, 0)),
        ((1.0, 0, 0.7), (0.625, 0.375, 0, 0)),  # 0.5 is less than 0.7; 0.5 + 0.3 reaches it
        ((1.0, 0, 0.4), (1, 0, 0, 0)),
        ((1.0, 0, 0.9), (0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0)),
        ((1.0, 3, 0.55), (0.625, 0.375, 0, 0)),  # top_p counts what top_k left: 0.526 < 0.55
    ],
)
def test_frequencies_match_the_softmax(options, expected):
    """Within 5 standard deviations of 20,000 draws; what is cut is never drawn."""
    draws = 20_000
    order = [2, 0, 3, 1]  # the likeliest token is not the first
    logits = torch.tensor([PROBABILITIES]).log()[:, order].expand(draws, 4)
    tokens = choose_token(logits, *options, seeded(0))
    counts = torch.bincount(tokens, minlength=4).tolist()
    for place, which in enumerate(order):
        p = expected[which]
        assert abs(counts[place] - draws * p) <= 5 * (draws * p * (1 - p)) ** 0.5 + 1e-3


def test_sampled_rows_follow_their_own_prompt(model):
    """The first sampled token of every row comes from that row's softmax."""
    prompts = [PROMPTS[1]] * 1500 + [PROMPTS[2]] * 1500
    tokens = generate(model, prompts, 1, temperature=1.0, stop_ids=(), generator=seeded(0))
    for first, prompt in ((0, PROMPTS[1]), (1500, PROMPTS[2])):
        counts = torch.bincount(torch.tensor(tokens[first : first + 1500])[:, 0], minlength=V)
        p = model(torch.tensor([prompt]))[0, -1].detach().double().softmax(-1)
        assert ((counts - 1500 * p).abs() <= 5 * (1500 * p * (1 - p)).sqrt() + 1).all()
