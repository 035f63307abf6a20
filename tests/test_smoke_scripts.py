"""`test_a_to_a.py` and `test_generation.py`, run as programs on a small model with GPT-2's vocabulary."""

import numpy as np
import pytest
from flax import nnx
from helpers import run_program
from safetensors.numpy import save_file

from checkpointing import MODEL_FILE
from model import GPTModel
from outside_in.config import ModelConfig
from outside_in.data.tokenizer import gpt2
from outside_in.inference import completions

pytestmark = pytest.mark.slow

SHELL = ModelConfig(
    vocab_size=50257,
    context_length=16,
    emb_dim=64,
    n_heads=1,
    n_layers=0,
    qkv_bias=False,
    position_embedding=False,
    output_norm=False,
)
GREEDY = ("--temperature", 0)


def save_model(folder, head):
    embedding = np.array(GPTModel(SHELL, nnx.Rngs(0)).token_embedding.embedding[...])
    arrays = {"token_embedding.embedding": embedding, "head.embedding": np.ascontiguousarray(head(embedding))}
    save_file(arrays, folder / MODEL_FILE, metadata={"model.json": SHELL.model_dump_json()})
    return folder / MODEL_FILE


@pytest.fixture(scope="module")
def repeating(tmp_path_factory):
    """A model that repeats its input: the head is the embedding, whose rows are nearly orthogonal."""
    return save_model(tmp_path_factory.mktemp("repeating"), lambda embedding: embedding)


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("forgetful"), lambda embedding: embedding[::-1])


def test_a_repeating_model_maps_the_poem_to_itself(repeating):
    finished = run_program("test_a_to_a.py", repeating)
    assert finished.returncode == 0, finished.stderr
    read, repeated = finished.stdout.split("\n\noutput:\n")
    text = read.removeprefix("input:\n")
    assert read == f"input:\n{text}" and text.startswith("It is an ancient Mariner,\n")
    assert repeated == f"{text}\n\n38 of 38 tokens map to themselves\n"


def test_a_forgetful_model_fails_the_check(call_program, forgetful):
    finished = call_program("test_a_to_a", forgetful, "--text", "Water, water, every where")
    assert finished.returncode == 1
    assert finished.stdout.endswith("0 of 6 tokens map to themselves\n")


def test_generation_at_temperature_0_is_greedy(repeating):
    finished = run_program("test_generation.py", repeating, "--tokens", 20, *GREEDY)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "Every effort moves you" + 20 * " you" + "\n"


def test_generation_samples_50_tokens_at_temperature_0_7_by_default(call_program, forgetful):
    by_default, asked_for, greedy = (
        call_program("test_generation", forgetful, *options)
        for options in ((), ("--tokens", 50, "--temperature", 0.7, "--seed", 0), ("--tokens", 50, *GREEDY))
    )
    assert by_default.returncode == 0 and by_default.stdout == asked_for.stdout != greedy.stdout


@pytest.mark.parametrize("option", ["--prompt-file", "-"])
def test_a_prompt_comes_from_a_file_or_standard_input(repeating, tmp_path, option):
    (tmp_path / "prompt.txt").write_text("Every effort moves you\n")
    arguments = ("--prompt-file", tmp_path / "prompt.txt") if option != "-" else ("--prompt", "-")
    with (tmp_path / "prompt.txt").open() as prompt:
        finished = run_program("test_generation.py", repeating, *arguments, "--tokens", 2, *GREEDY, stdin=prompt)
    assert finished.stdout == "Every effort moves you you you\n", finished.stderr


def test_several_prompts_print_what_each_prints_alone(call_program, forgetful, tmp_path, monkeypatch):
    monkeypatch.setattr(completions, "ROWS_PER_BATCH", 4)
    prompts = ["Every effort", "you", "Where is the water, captain", "to", " sea"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    options = ("--samples", 2, "--tokens", 20, "--seed", 3)
    alone = [call_program("test_generation", forgetful, "--prompt", prompt, *options).stdout for prompt in prompts]
    by_file = call_program("test_generation", forgetful, "--prompt-lines", tmp_path / "prompts.txt", *options)
    assert by_file.stdout == "".join(alone) and by_file.returncode == 0
    one_by_one = [option for prompt in prompts for option in ("--prompt", prompt)]
    assert call_program("test_generation", forgetful, *one_by_one, *options).stdout == "".join(alone)


def test_a_prompt_among_others_that_leaves_no_room_is_named(call_program, repeating):
    finished = call_program("test_generation", repeating, "--prompt", "yes", "--prompt", "no " * 20)
    assert finished.returncode == 2 and not finished.stdout
    assert finished.stderr.startswith("error: prompt 2 of 2: expected fewer than 16 tokens, the context, got 21")


def test_special_text_in_a_prompt_is_noticed(call_program, repeating):
    options = ("--prompt", "you<|endoftext|>", "--tokens", 1)
    noticed = call_program("test_generation", repeating, *options)
    assert noticed.stderr.startswith(
        "notice: '<|endoftext|>' is in the text 1 time, as ordinary text; --special-tokens"
    )
    assert call_program("test_generation", repeating, *options, "--no-special-tokens").stderr == ""


def test_generation_samples_with_a_seed(call_program, forgetful):
    options = ("--tokens", 5, "--temperature", 1, "--top-k", 50, "--samples", 2, "--seed", 3)
    first, again = (call_program("test_generation", forgetful, *options) for _ in range(2))
    other = call_program("test_generation", forgetful, *options[:-1], 4)
    assert first.stdout == again.stdout != other.stdout
    assert first.stdout.count("Every effort moves you") == 2


def test_a_prompt_that_leaves_no_room_is_one_line_and_exit_code_2(call_program, repeating):
    finished = call_program("test_generation", repeating, "--prompt", "no " * 20 + "yes", "--tokens", 2)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: --prompt: expected fewer than 16 tokens, the context, got 21")


def test_a_text_that_outgrows_the_context_says_so_and_goes_on(call_program, repeating):
    finished = call_program("test_generation", repeating, "--tokens", 30, *GREEDY)
    assert finished.returncode == 0
    assert finished.stderr == "notice: when the text fills the context of 16 tokens, only its second half is kept\n"
    assert finished.stdout == "Every effort moves you" + 30 * " you" + "\n"


def test_a_completion_stops_at_the_end_of_text_unless_told_to_go_on(call_program, tmp_path):
    ending = save_model(tmp_path, lambda embedding: np.concatenate([0 * embedding[:-1], embedding[345:346]]))
    finished = call_program("test_generation", ending, *GREEDY)  # " you" is 345
    assert (finished.returncode, finished.stdout) == (0, "Every effort moves you\n")
    options = ("--samples", 2, "--temperature", 1e-3)
    assert call_program("test_generation", ending, *options).stdout == 2 * "Every effort moves you\n"
    told = call_program("test_generation", ending, "--ignore-end", "--tokens", 1, *GREEDY)
    assert told.stdout == "Every effort moves you<|endoftext|>\n"


def test_an_empty_prompt_starts_a_new_text(call_program, tmp_path):
    starting = save_model(tmp_path, lambda embedding: np.where(np.arange(50257)[:, None] == 345, embedding[-1:], 0))
    finished = call_program("test_generation", starting, "--prompt", "", "--tokens", 1, *GREEDY)
    assert (finished.returncode, finished.stdout) == (0, " you\n")  # 345, after the end of a text


def test_a_character_of_several_tokens_comes_out_whole():
    ids = gpt2().encode("naïve 猫 🙂!").tolist()
    assert len(ids) > 6
    parts = list(gpt2().decode_stream([token] for token in ids))
    assert "".join(parts) == "naïve 猫 🙂!" and not any("\ufffd" in part for part in parts)
    assert list(gpt2().decode_stream([gpt2().encode("🙂")[:1].tolist()]))[-1] == "\ufffd"  # what never comes


@pytest.mark.parametrize("program", ["test_a_to_a", "test_generation"])
def test_a_missing_file_is_one_line_and_exit_code_2(call_program, program, tmp_path):
    finished = call_program(program, tmp_path / "nothing.safetensors")
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1 and finished.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "options",
    [
        ("--tokens", 0),
        ("--samples", 0),
        ("--top-k", 0),
        ("--top-p", 0),
        ("--top-p", 1.5),
        (*GREEDY, "--top-p", 0.5),
        ("--seed", -1),
        ("--temperature", -1),
        ("--temperature", 1e-38, "--samples", 2),
    ],
    ids=str,
)
def test_options_without_sense_are_one_line_and_exit_code_2(call_program, repeating, options):
    finished = call_program("test_generation", repeating, *options)
    assert finished.returncode == 2
    assert finished.stderr.count("\n") == 1 and finished.stderr.startswith("error: --")
