"""What is for validation when there are only a few documents."""

import pytest
from helpers import complaint
from safetensors.numpy import load_file

from outside_in.data.tokenizer_files import load

TEXT = "One document, and nothing else. " * 50


def prepare(call_program, tmp_path, *options):
    (tmp_path / "text.txt").write_text(TEXT)
    return call_program("prepare_data", tmp_path / "out", "--text", tmp_path / "text.txt", *options)


@pytest.mark.parametrize("tokenizer", ["bytes", "train:270"])
@pytest.mark.parametrize("share", ["50%", "10%", "99%"])
@pytest.mark.parametrize("seed", range(4))  # wherever chance puts it
def test_of_a_single_document_the_end_is_held_out(call_program, tmp_path, tokenizer, share, seed):
    finished = prepare(call_program, tmp_path, "--validation", share, "--tokenizer", tokenizer, "--seed", seed)
    if (tokenizer, share) == ("train:270", "99%"):  # the rest is too short for a tokenizer
        assert "ask for fewer ids" in complaint(finished)
        return
    assert finished.returncode == 0, finished.stderr
    ids = [load_file(tmp_path / "out" / f"{split}.safetensors")["tokens"].tolist() for split in ("train", "validation")]
    made = load(tokenizer if tokenizer == "bytes" else tmp_path / "out")
    assert made.decode(ids[0] + ids[1][:-1]) == TEXT and ids[1][-1] == made.end_of_text
    held_out = len(made.decode(ids[1][:-1])) / len(TEXT)
    assert abs(held_out - int(share[:-1]) / 100) < 0.02


def test_several_that_are_all_in_validation_get_advice_that_helps(call_program, tmp_path):
    options = ("--validation", "90%", "--separator", ", ", "--deduplicate", "--tokenizer", "bytes", "--overwrite")
    finished = (prepare(call_program, tmp_path, *options, "--seed", seed) for seed in range(40))
    told = next(complaint(one) for one in finished if one.returncode)
    assert "is in train; use another --seed, or a smaller --validation than 90.00%" in told
