import numpy as np
import pytest
from conftest import CONTEXT_LENGTH, VOCAB_SIZE, random_tokens, tiny_model
from test_model import numpy_gpt2, with_larger_weights

from generation import generate

PROMPT = [int(token) for token in random_tokens(3)]
NUM_SAMPLES = 4000
TEMPERATURE = 4.0  # the larger weights make peaked distributions; this makes them broad again


@pytest.fixture(scope="module")
def model():
    return with_larger_weights(tiny_model(n_layers=1))


def reference_logits(model, text):
    """The next token's logits in float64, over exactly the positions that the model can see."""
    return numpy_gpt2(model, np.array(text[-CONTEXT_LENGTH:]))[-1]


def reference_greedy(model, prompt, num_tokens):
    text = list(prompt)
    for _ in range(num_tokens):
        text.append(int(reference_logits(model, text).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(
    ("prompt_length", "num_tokens"), [(1, 1), (1, 6), (3, 5), (3, 6), (16, 1), (10, 12), (1, 20), (20, 4)], ids=str
)
def test_greedy_is_the_argmax_of_a_numpy_gpt2_also_when_the_text_outgrows_the_context(model, prompt_length, num_tokens):
    prompt = random_tokens(prompt_length).tolist()
    [completion] = generate(model, prompt, num_tokens=num_tokens)
    assert completion.tolist() == reference_greedy(model, prompt, num_tokens)
    assert num_tokens == 1 or len(set(completion.tolist())) > 1  # else the claim would be an easy one


@pytest.mark.parametrize(("num_samples", "num_tokens"), [(1, 0), (1, 8), (2, 8)])
@pytest.mark.parametrize("temperature", [0.0, TEMPERATURE])
def test_completions_are_int32_ids_below_the_vocabulary_size(model, num_samples, num_tokens, temperature):
    completions = generate(model, PROMPT, num_tokens=num_tokens, num_samples=num_samples, temperature=temperature)
    assert completions.shape == (num_samples, num_tokens)
    assert completions.dtype == np.int32
    assert ((completions >= 0) & (completions < VOCAB_SIZE)).all()


def test_a_seed_says_which_samples_are_drawn(model):
    first, again, other = (
        generate(model, PROMPT, num_tokens=8, temperature=TEMPERATURE, seed=seed, num_samples=2) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()


def test_every_token_of_a_sample_is_drawn_anew(model):
    [drawn] = generate(model, PROMPT, num_tokens=8, temperature=1e6)  # all tokens are equally likely
    assert len(set(drawn.tolist())) >= 6


def test_a_sample_is_the_same_alone_and_among_others(model):
    alone, two = (generate(model, PROMPT, num_tokens=8, temperature=TEMPERATURE, num_samples=count) for count in (1, 2))
    np.testing.assert_array_equal(alone[0], two[0])


def test_top_1_is_greedy(model):
    greedy = generate(model, PROMPT, num_tokens=8)
    sampled = generate(model, PROMPT, num_tokens=8, temperature=TEMPERATURE, top_k=1, num_samples=2)
    np.testing.assert_array_equal(sampled, np.tile(greedy, (2, 1)))


def counts(model, **options):
    drawn = generate(model, PROMPT, num_tokens=1, num_samples=NUM_SAMPLES, temperature=TEMPERATURE, **options)
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
    observed = counts(model)
    assert chi_square_excess(observed, softmax(logits / TEMPERATURE)) < 5
    assert chi_square_excess(observed, softmax(logits / TEMPERATURE / 1.5)) > 5  # another temperature would show


@pytest.mark.parametrize("k", [2, 7, VOCAB_SIZE, VOCAB_SIZE + 1])
def test_top_k_draws_from_all_of_the_k_likeliest_tokens_and_no_other(model, k):
    logits = reference_logits(model, PROMPT)
    likeliest = np.argsort(-logits)[:k]
    observed = counts(model, top_k=k)
    assert set(np.flatnonzero(observed)) <= set(likeliest)
    shares = np.zeros(VOCAB_SIZE)
    shares[likeliest] = softmax(logits[likeliest] / TEMPERATURE)
    expected = shares * NUM_SAMPLES
    assert (np.abs(observed - expected) <= 5 * np.sqrt(expected) + 1).all()


def test_tokens_that_left_the_context_have_no_influence(model):
    tail = random_tokens(CONTEXT_LENGTH, seed=1).tolist()
    texts = [random_tokens(5, seed=seed).tolist() + tail for seed in (2, 3)]
    first, second, cropped = (
        generate(model, text, num_tokens=6, temperature=TEMPERATURE, num_samples=2) for text in (*texts, tail)
    )
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, cropped)
