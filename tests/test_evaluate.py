"""`evaluate.py` and what it is made of, on a bigram model whose losses follow from a table."""

import json
import math

import numpy as np
import pytest
from flax import nnx
from helpers import CONTEXT_LENGTH, VOCAB_SIZE, complaint, logits, random_tokens, tiny_model
from safetensors.numpy import save_file
from test_model import with_larger_weights
from test_smoke_scripts import save_model

from outside_in.data.tokenizer import gpt2
from outside_in.inference.evaluation import completion_losses, num_windows, standard_error, windowed_losses
from outside_in.inference.held_out import dataset_of
from outside_in.inference.hellaswag import Question, answer, read_questions
from outside_in.inference.load import load_saved_model
from outside_in.weights import host_arrays, save_weights

BIGRAM = {
    "n_layers": 0,
    "n_heads": 1,
    "emb_dim": VOCAB_SIZE,
    "position_embedding": False,
    "output_norm": False,
}
TABLE = np.random.default_rng(5).normal(size=(VOCAB_SIZE, VOCAB_SIZE)).astype(np.float32) * 2  # [token before, token]


def bigram(table):
    model = tiny_model(**BIGRAM)
    model.token_embedding.embedding[...] = np.eye(VOCAB_SIZE, dtype=np.float32)
    model.head.embedding[...] = table.T
    return model


def bigram_losses(tokens, table=TABLE):
    rows = np.float64(table[tokens[:-1]])
    return np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), tokens[1:]]


def losses(model, tokens, **options):
    return np.concatenate(list(windowed_losses(model, tokens, **options)))


@pytest.mark.parametrize("stride", [None, 1, 5, 16])
@pytest.mark.parametrize("num_tokens", [2, 10, 16, 17, 18, 33, 100])
def test_the_losses_of_a_bigram_model_are_those_of_its_table(num_tokens, stride):
    tokens = random_tokens(num_tokens)
    found = losses(bigram(TABLE), tokens, stride=stride, windows_per_batch=3)
    np.testing.assert_allclose(found, bigram_losses(tokens), rtol=1e-4)
    assert found.dtype == np.float32


@pytest.mark.parametrize("stride", [CONTEXT_LENGTH, 6, 1])
def test_a_stride_counts_each_token_once_with_what_comes_before_it_in_its_window(stride):
    model, tokens = with_larger_weights(tiny_model()), random_tokens(50)
    expected = np.zeros(49)
    counted = 0
    for start in range(0, 50, stride):
        window = tokens[start : start + CONTEXT_LENGTH + 1].astype(np.int32)
        shares = np.float64(logits(model, window[None, :-1]))[0]
        of_window = np.log(np.exp(shares).sum(axis=1)) - shares[np.arange(len(shares)), window[1:]]
        expected[counted : start + len(of_window)] = of_window[counted - start :]
        counted = start + len(of_window)
        if counted == 49:
            break
    np.testing.assert_allclose(losses(model, tokens, stride=stride), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "length", "stride", "windows"), [(1, 16, 16, 1), (16, 16, 1, 1), (17, 16, 16, 2), (18, 16, 1, 3)]
)
def test_windows_are_as_many_as_reach_the_end(targets, length, stride, windows):
    assert num_windows(targets, length, stride) == windows


def test_the_standard_error_is_that_of_the_means_of_blocks():
    values = np.random.default_rng(0).normal(size=(50, 40)).cumsum(axis=1).ravel()  # neighbors are alike
    means = values.reshape(50, 40).mean(axis=1)
    assert standard_error(np.append(values, 1e9), 40) == pytest.approx(means.std(ddof=1) / math.sqrt(50))
    assert standard_error(values[:79], 40) is None


def save(path, model):
    path.mkdir()
    save_weights(path / "model.safetensors", host_arrays(nnx.state(model, nnx.Param)), model.config.model_dump_json())
    return path


@pytest.fixture
def judged(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    save_file({"tokens": random_tokens(3000, seed=7)}, folder / "validation.safetensors")
    save_file({"tokens": random_tokens(100)}, folder / "train.safetensors")
    return folder


def test_the_program_prints_and_writes_what_the_tables_say(call_program, tmp_path, judged):
    first, second = save(tmp_path / "one", bigram(TABLE)), save(tmp_path / "two", bigram(TABLE / 2))
    options = ("--dataset", judged, "--start-token", 10, "--tokens", 2500, "--json", tmp_path / "out.json")
    finished = call_program("evaluate", first, second, *options)
    assert finished.returncode == 0, finished.stderr
    tokens = random_tokens(3000, seed=7)[10:2511]
    one, two = bigram_losses(tokens), bigram_losses(tokens, TABLE / 2)
    table = " ".join(finished.stdout.split())
    assert f"| {first} | 20,402 | {one.mean():.4f} |" in table
    assert f"| {second} | 20,402 | {two.mean():.4f} |" in table
    assert f"{(two - one).mean():+.4f}" in finished.stdout and "bits per byte" not in finished.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["judged_on"]["tokens"] == 2500 and written["judged_on"]["start_token"] == 10
    assert written["models"][0]["loss"] == pytest.approx(one.mean(), rel=1e-5)
    assert written["models"][1]["perplexity"] == pytest.approx(math.exp(two.mean()), rel=1e-4)
    blocks = (two - one)[:2048].reshape(2, 1024).mean(axis=1)
    assert written["models"][1]["difference_error"] == pytest.approx(blocks.std(ddof=1) / math.sqrt(2), rel=1e-3)


def test_all_of_a_split_is_taken_unless_told(call_program, tmp_path, judged):
    model = save(tmp_path / "one", bigram(TABLE))
    finished = call_program("evaluate", model, "--dataset", judged, "--split", "train")
    assert f"{judged}, train: 99 tokens from 0 on" in finished.stdout
    assert f"{bigram_losses(random_tokens(100)).mean():.4f} | " in finished.stdout.splitlines()[-1]


def test_a_run_is_judged_by_its_best_checkpoint_on_its_own_dataset(call_program, make_run):
    run = make_run(train={"min_train_tokens": 800, "val_tokens": 176})
    assert call_program("train", run).returncode == 0
    for path in (run, run / "checkpoints" / "latest", run / "checkpoints" / "best" / "model.safetensors"):
        finished = call_program("evaluate", path)
        assert finished.returncode == 0, finished.stderr
        assert "validation: 199 tokens from 0 on" in finished.stdout


def test_the_dataset_of_a_run_is_the_one_that_it_was_trained_on(make_run):
    run = make_run()
    own = json.loads((run / "train.json").read_text())["dataset"]
    assert dataset_of(run) == own
    checkpoint = run / "checkpoints" / "20261121T093000Z-iteration-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "meta.json").write_text(json.dumps({"overrides": {"dataset": "elsewhere", "epochs": 2}}))
    assert dataset_of(run) == dataset_of(checkpoint) == "elsewhere"


def test_bits_per_byte_count_the_bytes_of_the_text(call_program, tmp_path):
    text = "A cat, una naïve 猫. " * 20
    ids = [50256, *gpt2().encode(text), 50256]
    folder = tmp_path / "tokens"
    folder.mkdir()
    save_file({"tokens": np.array(ids, np.uint16)}, folder / "validation.safetensors")
    save_file({"tokens": np.array(ids, np.uint16)}, folder / "train.safetensors")
    weights = save_model(tmp_path, lambda embedding: 0 * embedding)  # a uniform guess
    finished = call_program("evaluate", weights, "--dataset", folder, "--json", tmp_path / "out.json")
    assert finished.returncode == 0, finished.stderr
    [model] = json.loads((tmp_path / "out.json").read_text())["models"]
    assert model["loss"] == pytest.approx(math.log(50257))
    expected = (len(ids) - 1) * math.log2(50257) / len(text.encode())
    assert model["bits_per_byte"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tokens", 0), "--tokens: expected a number of at least 1"),
        (("--start-token", -1), "--start-token: expected a number of at least 0"),
        (("--stride", 0), "--stride: expected a number of at least 1"),
        (("--stride", 17), "--stride: expected at most the context, 16 tokens, got 17"),
        (("--tokens", 3000), "expected at least 3,001 tokens, got 3,000"),
        (("--start-token", 2999), "expected tokens after --start-token 2,999"),
        (("--dataset", "nowhere"), "no folder 'nowhere'"),
        (("--hellaswag", "nowhere.jsonl"), "nowhere.jsonl: expected a .jsonl file"),
        (("--json", "nowhere/out.json"), "--json: expected a file in an existing folder"),
    ],
    ids=str,
)
def test_options_without_sense_are_one_line(call_program, tmp_path, judged, options, words):
    model = save(tmp_path / "one", bigram(TABLE))
    assert words in complaint(call_program("evaluate", model, "--dataset", judged, *options))


def test_paths_and_runs_that_cannot_be_judged_are_one_line(call_program, tmp_path, make_run):
    model = save(tmp_path / "one", bigram(TABLE))
    assert "is not in a run, so its dataset is unknown" in complaint(call_program("evaluate", model))
    assert "found nothing" in complaint(call_program("evaluate", tmp_path / "two"))
    run = make_run(train={"objective": "a-to-a"})
    assert "found a folder without one" in complaint(call_program("evaluate", run))
    weights = save(run / "initial", bigram(TABLE))
    assert "trained a-to-a, not to predict" in complaint(call_program("evaluate", weights))


# HellaSwag


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


ROW = {"ctx": "She says no and", "endings": ["yes", "no no", "perhaps", "well then"], "label": 1, "ind": 4}


def test_questions_are_read_as_hellaswag_writes_them(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text(lines(ROW, ROW | {"label": "3"}) + "\n")
    assert read_questions(str(path)) == [Question(ROW["ctx"], ROW["endings"], label) for label in (1, 3)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "expected questions, got none"),
        (lines(ROW) + "{", "line 2: expected a JSON object"),
        (lines([ROW]), "line 1: expected a text in 'ctx'"),
        (lines(ROW | {"ctx": ""}), "expected a text in 'ctx'"),
        (lines(ROW | {"endings": ["one"]}), "expected several texts in 'endings'"),
        (lines(ROW | {"endings": "abcd"}), "expected several texts in 'endings'"),
        (lines(ROW | {"label": 4}), "expected the number of an ending in 'label', got '4'"),
        (lines(ROW | {"label": ""}), "expected the number of an ending in 'label'"),
        ("x" * 200_000, "line 1: expected a JSON object"),
    ],
    ids=str,
)
def test_other_questions_are_refused_by_line(tmp_path, content, words):
    path = tmp_path / "val.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        read_questions(str(path))
    assert words in str(caught.value)


def test_completions_are_judged_as_each_would_be_alone():
    model = with_larger_weights(tiny_model())
    rng = np.random.default_rng(0)
    texts = [
        ([int(x) for x in random_tokens(rng.integers(1, 12))], [int(x) for x in random_tokens(rng.integers(1, 7))])
        for _ in range(11)
    ]
    texts.append((random_tokens(30).tolist(), random_tokens(4).tolist()))  # longer than the context
    texts.append((random_tokens(3).tolist(), random_tokens(30).tolist()))
    found = list(completion_losses(model, texts, rows_per_batch=4, multiple=5))
    assert len(found) == len(texts)
    for (context, completion), of_one in zip(texts, found):
        whole = np.array((context + completion)[-CONTEXT_LENGTH - 1 :], np.int32)
        shares = np.float64(logits(model, whole[None, :-1]))[0]
        each = np.log(np.exp(shares).sum(axis=1)) - shares[np.arange(len(shares)), whole[1:]]
        np.testing.assert_allclose(of_one, each[-len(completion) :], rtol=1e-3, atol=1e-4)


def test_the_answer_is_the_ending_with_the_lowest_loss_per_token(tmp_path):
    weights = save_model(tmp_path, lambda embedding: embedding * 10)  # repeats what it reads
    model = load_saved_model(weights)
    questions = [Question("no", ["no no no no", "yes"], 0), Question("no no", ["perhaps not", "no"], 1)]
    found = {number: (mean, whole) for number, mean, whole in answer(model, questions, gpt2())}
    assert found.keys() == {0, 1} and [found[n][0].argmin() for n in (0, 1)] == [0, 1]
    for number, question in enumerate(questions):
        for ending, mean, whole in zip(question.endings, *found[number]):
            assert whole == pytest.approx(mean * len(gpt2().encode(" " + ending)))


def test_the_program_answers_hellaswag(call_program, tmp_path):
    weights = save_model(tmp_path, lambda embedding: embedding * 10)
    path = tmp_path / "val.jsonl"
    repeated = {"ctx": "no", "endings": ["no no", "yes yes", "he went", "to sea"], "label": 0}
    path.write_text(lines(*[repeated] * 3, repeated | {"label": 2}))
    finished = call_program("evaluate", weights, "--hellaswag", path, "--json", tmp_path / "out.json")
    assert finished.returncode == 0, finished.stderr
    assert "| 75.00% | 25.00% |" in " ".join(finished.stdout.split()) and "loss" not in finished.stdout
    [model] = json.loads((tmp_path / "out.json").read_text())["models"]
    assert model["hellaswag"] == 0.75 and model["hellaswag_questions"] == 4
    assert model["hellaswag_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))


def test_options_that_hellaswag_would_not_heed_are_refused(call_program, tmp_path):
    weights = save_model(tmp_path, lambda embedding: embedding)
    told = complaint(call_program("evaluate", weights, "--hellaswag", "x.jsonl", "--tokens", 10))
    assert "expected a --dataset" in told


def test_a_model_whose_losses_are_not_finite_is_not_judged(call_program, tmp_path, judged):
    broken = bigram(TABLE)
    broken.head.embedding[...] = broken.head.embedding[...].at[3].set(3e38)
    broken.token_embedding.embedding[...] = broken.token_embedding.embedding[...] * 2
    told = complaint(call_program("evaluate", save(tmp_path / "one", broken), "--dataset", judged), code=1)
    assert "losses are not finite, so it cannot be evaluated" in told
    weights = save_model(tmp_path, lambda embedding: np.sign(embedding) * np.float32(3.4e38))
    path = tmp_path / "val.jsonl"
    path.write_text(lines(ROW))
    told = complaint(call_program("evaluate", weights, "--hellaswag", path), code=1)
    assert "not finite" in told


def test_a_huge_loss_has_no_perplexity(call_program, tmp_path, judged):
    finished = call_program("evaluate", save(tmp_path / "one", bigram(TABLE * 1e4)), "--dataset", judged)
    assert finished.returncode == 0 and "perplexity" not in finished.stdout


def test_questions_that_are_cut_are_counted(call_program, tmp_path):
    weights = save_model(tmp_path, lambda embedding: embedding)  # context 16
    path = tmp_path / "val.jsonl"
    path.write_text(lines(ROW, ROW | {"ctx": "no " * 30}))
    finished = call_program("evaluate", weights, "--hellaswag", path)
    assert "1 of 2 questions exceed its context and are truncated" in finished.stderr
