import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CONTEXT_LENGTH, VOCAB_SIZE, logits, random_tokens, tiny_model
from test_model import SWITCHES, numpy_gpt2, with_larger_weights

from outside_in.inference import generation
from outside_in.inference.generation import ALL, Sampling, generate, generate_all, restrict, stream

PROMPT = [int(token) for token in random_tokens(3)]
NUM_SAMPLES = 4000
BROAD = Sampling(temperature=4.0)  # the larger weights make peaked distributions; this makes them broad again


@pytest.fixture(scope="module")
def model():
    return with_larger_weights(tiny_model(n_layers=1))


def reference_logits(model, text):
    """The next token's logits in float64."""
    return numpy_gpt2(model, np.array(text))[-1]


def reference_greedy(model, prompt, num_tokens):
    new, visible = [], list(prompt)[-CONTEXT_LENGTH:]
    for _ in range(num_tokens):
        if len(visible) > CONTEXT_LENGTH:
            visible = visible[-CONTEXT_LENGTH // 2 :]
        new.append(int(reference_logits(model, visible).argmax()))
        visible.append(new[-1])
    return new


@pytest.mark.parametrize(
    ("prompt_length", "num_tokens"), [(1, 1), (1, 6), (3, 5), (3, 6), (16, 1), (10, 12), (1, 40), (20, 4)], ids=str
)
def test_greedy_is_the_argmax_of_a_numpy_gpt2_also_when_the_text_outgrows_the_context(model, prompt_length, num_tokens):
    prompt = random_tokens(prompt_length).tolist()
    [completion] = generate(model, prompt, num_tokens=num_tokens)
    assert completion.tolist() == reference_greedy(model, prompt, num_tokens)
    assert num_tokens == 1 or len(set(completion.tolist())) > 1  # else the claim would be an easy one


@pytest.mark.parametrize(("num_samples", "num_tokens"), [(1, 0), (1, 8), (2, 8)])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.0), BROAD], ids=str)
def test_completions_are_int32_ids_below_the_vocabulary_size(model, num_samples, num_tokens, sampling):
    completions = generate(model, PROMPT, num_tokens=num_tokens, num_samples=num_samples, sampling=sampling)
    assert completions.shape == (num_samples, num_tokens)
    assert completions.dtype == np.int32
    assert ((completions >= 0) & (completions < VOCAB_SIZE)).all()


def test_a_model_with_remat_completes_as_one_without(model):
    expected = generate(model, PROMPT, num_tokens=8)
    again = nnx.clone(model)
    again.remat = "blocks"
    np.testing.assert_array_equal(generate(again, PROMPT, num_tokens=8), expected)


def test_a_seed_says_which_samples_are_drawn(model):
    first, again, other = (
        generate(model, PROMPT, num_tokens=8, sampling=BROAD, seed=seed, num_samples=2) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


def test_every_token_of_a_sample_is_drawn_anew(model):
    [drawn] = generate(model, PROMPT, num_tokens=8, sampling=Sampling(1e6))  # all tokens are equally likely
    assert len(set(drawn.tolist())) >= 6


def test_a_sample_is_the_same_alone_and_among_others(model):
    alone, two = (generate(model, PROMPT, num_tokens=8, sampling=BROAD, num_samples=count) for count in (1, 2))
    np.testing.assert_array_equal(alone[0], two[0])


def test_top_1_is_greedy(model):
    greedy = generate(model, PROMPT, num_tokens=8)
    sampled = generate(model, PROMPT, num_tokens=8, sampling=Sampling(4.0, top_k=1), num_samples=2)
    np.testing.assert_array_equal(sampled, np.tile(greedy, (2, 1)))


def counts(model, sampling):
    drawn = generate(model, PROMPT, num_tokens=1, num_samples=NUM_SAMPLES, sampling=sampling)
    return np.bincount(drawn[:, 0], minlength=VOCAB_SIZE)


def softmax(logits):
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def chi_square_excess(observed, shares):
    """How many standard deviations the chi-square statistic lies above its mean, over bins that are well filled."""
    expected = shares * observed.sum()
    filled = expected >= 5
    assert filled.sum() >= 5
    freedom = filled.sum() - 1
    return ((observed - expected)[filled] ** 2 / expected[filled]).sum() / np.sqrt(2 * freedom) - np.sqrt(freedom / 2)


def test_samples_are_as_frequent_as_the_softmax_says(model):
    logits = reference_logits(model, PROMPT)
    observed = counts(model, BROAD)
    assert chi_square_excess(observed, softmax(logits / BROAD.temperature)) < 5
    assert chi_square_excess(observed, softmax(logits / BROAD.temperature / 1.5)) > 5  # another temperature would show


@pytest.mark.parametrize("k", [2, 7, VOCAB_SIZE, VOCAB_SIZE + 1])
def test_top_k_draws_from_all_of_the_k_likeliest_tokens_and_no_other(model, k):
    logits = reference_logits(model, PROMPT)
    likeliest = np.argsort(-logits)[:k]
    observed = counts(model, Sampling(BROAD.temperature, top_k=k))
    assert set(np.flatnonzero(observed)) <= set(likeliest)
    shares = np.zeros(VOCAB_SIZE)
    shares[likeliest] = softmax(logits[likeliest] / BROAD.temperature)
    expected = shares * NUM_SAMPLES
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected) + 1).all()


def reference_nucleus(logits, p):
    """The likeliest tokens, one after the other, until their share reaches p."""
    shares, kept, total = softmax(logits), [], 0.0
    for token in np.argsort(-logits):
        if total >= p:
            break
        kept.append(token)
        total += shares[token]
    return set(kept)


@pytest.mark.parametrize("p", [1e-6, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("k", [None, 5])
def test_top_p_leaves_the_likeliest_tokens_that_together_have_this_share(p, k):
    logits_BV = np.random.default_rng(0).normal(size=(20, VOCAB_SIZE)) * 2
    restricted_BV = np.asarray(jax.jit(restrict)(jnp.float32(logits_BV), Sampling(0.7, top_k=k, top_p=p)))
    for logits_V, restricted_V in zip(logits_BV / 0.7, restricted_BV, strict=True):
        likeliest = np.argsort(-logits_V)[:k]
        among_them = np.full(VOCAB_SIZE, -np.inf)
        among_them[likeliest] = logits_V[likeliest]
        kept = np.flatnonzero(np.isfinite(restricted_V))
        assert set(kept) == reference_nucleus(among_them, p)
        np.testing.assert_allclose(restricted_V[kept], logits_V[kept], rtol=1e-5)


def test_top_p_draws_as_the_softmax_of_what_is_left(model):
    sampling = Sampling(BROAD.temperature, top_p=0.6)
    logits = reference_logits(model, PROMPT) / BROAD.temperature
    kept = sorted(reference_nucleus(logits, 0.6))
    observed = counts(model, sampling)
    assert set(np.flatnonzero(observed)) <= set(kept) and len(kept) < VOCAB_SIZE / 2
    expected = softmax(logits[kept]) * NUM_SAMPLES
    assert (np.abs(observed[kept] - expected) <= 5 * np.sqrt(expected) + 1).all()


def test_a_top_p_of_1_leaves_every_token(model):
    options = {"num_tokens": 8, "num_samples": 4}
    np.testing.assert_array_equal(
        generate(model, PROMPT, sampling=Sampling(50.0, top_p=1.0), **options),
        generate(model, PROMPT, sampling=Sampling(50.0), **options),
    )


def test_a_low_temperature_is_greedy(model):
    greedy = generate(model, PROMPT, num_tokens=8)
    np.testing.assert_array_equal(generate(model, PROMPT, num_tokens=8, sampling=Sampling(1e-4)), greedy)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-45, 1e-38, 1.17e-38, 2.0**-126, 1.2e-38, 1e-30])
@pytest.mark.parametrize("restricted", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_no_temperature_is_too_low(model, temperature, restricted):
    greedy = generate(model, PROMPT, num_tokens=8)
    sampling = Sampling(temperature, **restricted)
    drawn = generate(model, PROMPT, num_tokens=8, num_samples=2, sampling=sampling)
    np.testing.assert_array_equal(drawn, np.tile(greedy, (2, 1)))


def test_tokens_that_left_the_context_have_no_influence(model):
    tail = random_tokens(CONTEXT_LENGTH, seed=1).tolist()
    texts = [random_tokens(5, seed=seed).tolist() + tail for seed in (2, 3)]
    first, second, cropped = (
        generate(model, text, num_tokens=6, sampling=BROAD, num_samples=2) for text in (*texts, tail)
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, cropped)


@pytest.mark.parametrize("switches", [*SWITCHES, {"tied_head": True}], ids=str)
def test_logits_with_a_cache_are_those_without_one_at_every_position(switches):
    model = with_larger_weights(tiny_model(**({"n_layers": 2} | switches)))
    tokens_BT = random_tokens(2 * CONTEXT_LENGTH).reshape(2, CONTEXT_LENGTH).astype(np.int32)
    graph, params = nnx.split(model)
    cache = generation.prefill(graph, params, np.pad(tokens_BT[:, :5], ((0, 0), (0, 3))), CONTEXT_LENGTH, 1)
    step = nnx.jit(generation.next_logits)
    found = []
    for position in range(5, CONTEXT_LENGTH):
        logits_BV, cache = step(model, cache, tokens_BT[:, position], jnp.int32(position))
        found.append(logits_BV)
    expected = logits(model, tokens_BT)[:, 5:]
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=2e-4, atol=2e-4)


@pytest.fixture
def ending(model):
    """A token that a sample chooses in the middle of what it would say."""
    return int(generate(model, PROMPT, num_tokens=20)[0, 10])


def test_a_completion_ends_with_the_token_that_stops_it(model, ending):
    free = generate(model, PROMPT, num_tokens=20)[0].tolist()
    [stopped] = generate(model, PROMPT, num_tokens=20, stop_id=ending)
    assert stopped.tolist() == free[: free.index(ending) + 1]


def test_samples_that_have_ended_wait_for_the_others(model):
    options = {"num_tokens": 30, "num_samples": 20, "sampling": BROAD}
    free = generate(model, PROMPT, **options)
    stop_id = int(free[0, 4])
    stopped = generate(model, PROMPT, **options, stop_id=stop_id)
    lengths = [row.index(stop_id) + 1 if stop_id in row else 30 for row in free.tolist()]
    assert len(set(lengths)) > 1 and stopped.shape[1] == max(lengths)
    for before, row, length in zip(free, stopped, lengths):
        np.testing.assert_array_equal(row[:length], before[:length])
        assert (row[length:] == stop_id).all()


def test_a_stream_is_the_completion_in_parts(model):
    parts = list(stream(model, PROMPT, num_tokens=30))
    assert len(parts) > 3
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), generate(model, PROMPT, num_tokens=30))


def test_each_shape_is_compiled_once():
    model = tiny_model()
    for number in range(3):
        generate(model, PROMPT, num_tokens=7, sampling=Sampling(1.0 + number, top_p=0.9), seed=number)
    sizes = generation.prefill._cache_size(), generation.decode._cache_size()
    generate(model, PROMPT[:2], num_tokens=6, sampling=Sampling(0.3, top_p=0.1), seed=5)
    assert (generation.prefill._cache_size(), generation.decode._cache_size()) == sizes


def test_a_given_size_of_the_cache_and_every_top_p_need_no_other_program():
    model = tiny_model(context_length=64)
    options = {"size": 64, "stop_id": 3}
    generate(model, PROMPT, num_tokens=7, sampling=Sampling(1.0, top_p=ALL), **options)
    sizes = generation.prefill._cache_size(), generation.decode._cache_size()
    for num_tokens, temperature, top_p in [(1, 0.7, 0.5), (12, 1e-30, 0.9), (50, 3.0, ALL)]:
        found = generate(model, PROMPT, num_tokens, sampling=Sampling(temperature, top_p=top_p), seed=4, **options)
        assert (generation.prefill._cache_size(), generation.decode._cache_size()) == sizes
        plain = Sampling(temperature, top_p=None if top_p == ALL else top_p)
        expected = generate(model, PROMPT, num_tokens, sampling=plain, seed=4, stop_id=3)
        np.testing.assert_array_equal(found, expected)
        sizes = generation.prefill._cache_size(), generation.decode._cache_size()


PROMPTS = [random_tokens(length, seed=length).tolist() for length in (3, 1, 15, 9)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(4.0, top_p=0.9)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("prompts", [PROMPTS, [PROMPTS[0], PROMPT]], ids=["of several lengths", "of one length"])
def test_prompts_at_once_get_what_each_gets_alone(model, sampling, prompts):
    num_samples = 1 if sampling.temperature is None else 2
    options = {"num_samples": num_samples, "sampling": sampling, "seed": 5}
    together = generate_all(model, prompts, 30, **options)  # so many that each text outgrows the context
    for prompt, found in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(found, generate(model, prompt, 30, **options))
    assert len({tuple(row) for row in together.reshape(-1, 30).tolist()}) == len(prompts) * num_samples


def test_a_text_that_ends_waits_for_those_of_other_prompts(model):
    free = generate_all(model, PROMPTS, 30, sampling=BROAD)
    stop_id = int(free[2, 0, 4])
    together = generate_all(model, PROMPTS, 30, sampling=BROAD, stop_id=stop_id)
    for prompt, row in zip(PROMPTS, together[:, 0].tolist(), strict=True):
        [alone] = generate(model, prompt, 30, sampling=BROAD, stop_id=stop_id).tolist()
        assert row[: len(alone)] == alone and set(row[len(alone) :]) <= {stop_id}


@pytest.mark.parametrize("switches", [SWITCHES[0], SWITCHES[2], SWITCHES[-1]], ids=str)
def test_positions_may_differ_whatever_the_model_is_made_of(switches):
    model = with_larger_weights(tiny_model(**switches))
    together = generate_all(model, PROMPTS, 8)
    for prompt, found in zip(PROMPTS, together, strict=True):
        np.testing.assert_array_equal(found, generate(model, prompt, 8))
