"""Which `tokenizer.json` is GPT-2's: also one whose end of a text stands among its added tokens only."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outside_in.data.tokenizer import gpt2, vocabulary_files
from outside_in.data.tokenizer_files import load
from outside_in.huggingface import tokenizer_formats

TEXT = "Every effort moves you, naïve 猫 🙂!\n\n  Twice  "


def tokenizer_json(*added, end_in_vocabulary=False, **options):
    """Return GPT-2's tokenizer.json as a form to change, with added tokens."""
    encoder, merges = vocabulary_files()
    library = Tokenizer(models.BPE.from_file(str(encoder), str(merges)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    form = json.loads(library.to_str())
    if not end_in_vocabulary:
        del form["model"]["vocab"]["<|endoftext|>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} | options
    form["added_tokens"] = [{"id": 50256 + i, "content": content, **flags} for i, content in enumerate(added)]
    return form


@pytest.fixture
def write(tmp_path):
    def write(form):
        (tmp_path / "tokenizer.json").write_text(json.dumps(form))
        return tmp_path

    return write


@pytest.mark.parametrize("end_in_vocabulary", [False, True])
@pytest.mark.parametrize("options", [{}, {"special": False}, {"normalized": True}], ids=str)
def test_it_is_gpt2s(write, end_in_vocabulary, options):
    folder = write(tokenizer_json("<|endoftext|>", end_in_vocabulary=end_in_vocabulary, **options))
    for found in (load(folder), tokenizer_formats.find(folder, 50256, 50257)):
        assert found is gpt2()
        assert found.end_of_text == 50256


def test_with_a_special_token_more_it_is_still_gpt2s(write):
    assert load(write(tokenizer_json("<|endoftext|>", "[PAD]"))) is gpt2()


def test_with_an_ordinary_token_more_it_is_another(write):
    assert load(write(tokenizer_json("<|endoftext|>", "effort moves", special=False))) is not gpt2()


def test_with_another_end_of_text_it_is_another(write):
    assert load(write(tokenizer_json("</s>"))) is not gpt2()


def test_what_is_gpt2s_tokenizes_alike(write):
    """The library's own ids, of a file that has the end of a text among its added tokens only."""
    library = Tokenizer.from_str(json.dumps(tokenizer_json("<|endoftext|>")))
    assert library.encode(TEXT).ids == gpt2().encode(TEXT).tolist()
    assert library.encode("a<|endoftext|>").ids == gpt2().encode("a<|endoftext|>", special=True).tolist()


def test_vocabulary_files_whose_end_of_text_is_an_added_token_are_gpt2s(tmp_path):
    encoder, merges = vocabulary_files()
    vocabulary = json.loads(encoder.read_text())
    del vocabulary["<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_bytes(merges.read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": 50256}))
    assert tokenizer_formats.find(tmp_path, 50256, 50257) is gpt2()
    (tmp_path / "added_tokens.json").unlink()
    assert tokenizer_formats.find(tmp_path, 50256, 50257) is gpt2()
