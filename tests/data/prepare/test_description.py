"""What is in a folder of token files, against counting by hand and against a search by brute force."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from outside_in.data.prepare import description, leakage
from outside_in.data.prepare.description import describe, describe_split, lines, recorded_leakage
from outside_in.data.prepare.leakage import find_leakage
from outside_in.data.tokenizer import gpt2

END = gpt2().end_of_text
INTEGER_TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]


def write(path, ids, dtype=np.uint16):
    save_file({"tokens": np.asarray(ids, dtype)}, path)
    return path


@pytest.fixture(params=[1, 3, 7, 64, 10**6])
def slice_tokens(request, monkeypatch):
    """Read in slices that are shorter and longer than what is looked for."""
    monkeypatch.setattr(leakage, "SLICE_TOKENS", request.param)


@pytest.fixture
def folder(tmp_path):
    """A folder of text: two documents to train on, the second held out as well."""
    texts = ["The cat sat on the mat.\nThen it left.", " ".join(f"word {number}" for number in range(40))]
    train, held_out = ([*gpt2().encode(text), END] for text in texts)
    write(tmp_path / "train.safetensors", train + held_out)
    write(tmp_path / "validation.safetensors", held_out)
    return tmp_path


def refusal(function, path, *arguments):
    with pytest.raises(ValueError) as caught:
        function(path, *arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


# One split


@pytest.mark.parametrize(
    ("ids", "documents", "longest"),
    [
        ([], 0, 0),
        ([5], 1, 1),
        ([END], 1, 0),
        ([END, END], 2, 0),
        ([1, 2, 3, END], 1, 3),
        ([1, 2, 3, END, 4, END], 2, 3),
        ([1, END, 2, 3, 4, 5, END], 2, 4),
        ([1, END, 2, 3], 2, 2),
        ([1, 2, 3, END, 4], 2, 3),
        ([END, 7] * 9, 10, 1),
        ([8] * 20 + [END], 1, 20),
    ],
)
@pytest.mark.usefixtures("slice_tokens")
def test_documents_end_with_their_end_of_text_or_with_the_file(ids, documents, longest, tmp_path):
    counts = describe_split(write(tmp_path / "a.safetensors", ids), gpt2())
    assert counts["tokens"] == len(ids)
    assert counts["documents"] == documents
    assert counts["longest_document"] == longest
    json.dumps(counts)


@pytest.mark.parametrize(
    ("counts", "entropy"),
    [
        ([], 0.0),
        ([7], 0.0),
        ([5, 5], math.log(2)),
        ([1, 3], 2 * math.log(2) - 0.75 * math.log(3)),
        ([8, 0, 4, 0, 2, 1, 1], 1.875 * math.log(2)),
    ],
)
@pytest.mark.usefixtures("slice_tokens")
def test_the_unigram_entropy_is_that_of_the_formula_over_all_tokens(counts, entropy, tmp_path):
    ids = np.repeat(np.arange(len(counts)), counts)
    described = describe_split(write(tmp_path / "a.safetensors", ids), gpt2())
    assert described["unigram_entropy"] == pytest.approx(entropy, abs=1e-12)
    assert math.copysign(1, described["unigram_entropy"]) == 1  # not -0.0


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_tokens_may_be_any_integers_as_in_training(dtype, tmp_path):
    path = write(tmp_path / "a.safetensors", [100, 101, 100, 102] * 20, dtype)
    other = write(tmp_path / "b.safetensors", [100, 101, 100, 102] * 20)
    assert describe_split(path, gpt2()) == describe_split(other, gpt2())
    assert find_leakage(path, other) == find_leakage(other, path) == find_leakage(other, other)


@pytest.mark.parametrize(
    ("dtype", "bad"), [("uint16", 50_257), ("uint16", 65_535), ("int64", -1), ("int32", 65_536), ("uint64", 2**63 + 5)]
)
@pytest.mark.usefixtures("slice_tokens")
def test_an_id_that_the_tokenizer_does_not_have_is_named_with_its_place(dtype, bad, tmp_path):
    ids = np.zeros(200, dtype)
    ids[[123, 190]] = bad
    path, good = write(tmp_path / "a.safetensors", ids, dtype), write(tmp_path / "b.safetensors", [1] * 64)
    line = refusal(describe_split, path, gpt2())
    assert line.startswith(f"{path}: token 123 is id {bad}, expected ids from 0 to 50256; ")
    if 0 <= bad < 2**16:
        assert find_leakage(good, path)["sequences"] == 6  # of any tokenizer
        return
    for line in (refusal(find_leakage, path, good), refusal(find_leakage, good, path)):
        assert line.startswith(f"{path}: token 123 is id {bad}, expected ids from 0 to 65535; ")


def test_the_largest_id_is_one_that_the_tokenizer_has(tmp_path):
    assert describe_split(write(tmp_path / "a.safetensors", [50_256]), gpt2())["tokens"] == 1


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        (np.zeros((2, 3), np.uint16), "shape (2, 3) of U16"),
        (np.array(3, np.uint16), "shape () of U16"),
        (np.zeros(6, np.float32), "shape (6,) of F32"),
        (np.zeros(6, bool), "shape (6,) of BOOL"),
    ],
)
def test_what_is_no_row_of_integers_is_refused(tokens, found, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"tokens": tokens}, path)
    assert f"{path}: expected 'tokens' to be one-dimensional integers, got {found};" in refusal(
        describe_split, path, gpt2()
    )


def test_a_file_without_tokens_names_what_it_has(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"id\ns": np.zeros(6, np.uint16)}, path)
    assert r"expected a tensor named 'tokens', got id\ns; rename it" in refusal(describe_split, path, gpt2())


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    assert "expected a token file, found nothing" in refusal(describe_split, path, gpt2())
    path.write_bytes(b"no tensors here")
    assert "not a readable safetensors file" in refusal(describe_split, path, gpt2())


# Leakage


def by_brute_force(train, validation, length):
    windows = {tuple(train[start : start + length]) for start in range(len(train) - length + 1)}
    starts = range(0, len(validation) - length + 1, length)
    return len(starts), sum(tuple(validation[start : start + length]) in windows for start in starts)


def counted(train, validation, length=32):
    with tempfile.TemporaryDirectory() as folder:
        paths = write(Path(folder) / "a.safetensors", train), write(Path(folder) / "b.safetensors", validation)
        leaked = find_leakage(*paths, length=length)
    assert leaked["sequence_length"] == length
    assert leaked["share"] == (leaked["found"] / leaked["sequences"] if leaked["sequences"] else 0)
    json.dumps(leaked)
    return leaked["sequences"], leaked["found"]


@pytest.mark.parametrize("slice_size", [1, 5, 32, 33, 1000, 10**6])
def test_planted_sequences_are_found_wherever_they_lie(slice_size, monkeypatch):
    monkeypatch.setattr(leakage, "SLICE_TOKENS", slice_size)
    rng = np.random.default_rng(0)
    train, validation = rng.integers(0, 50_000, 3_000), rng.integers(0, 50_000, 40 * 32 + 31)
    starts = [0, 63, 990, 1_000 - 31, 2_000 - 16, 2_999 - 31]  # both ends of the file, both sides of a border
    for sequence, start in enumerate(starts):
        validation[sequence * 192 : sequence * 192 + 32] = train[start : start + 32]
    assert counted(train, validation) == (40, len(starts)) == by_brute_force(train.tolist(), validation.tolist(), 32)


@pytest.mark.parametrize("place", range(32))
def test_a_sequence_with_one_other_token_is_not_found(place):
    train = np.random.default_rng(0).integers(0, 50_000, 100)
    validation = train[20:52].copy()
    assert counted(train, validation) == (1, 1)
    validation[place] ^= 1
    assert counted(train, validation) == (1, 0)


@settings(deadline=None, max_examples=150)
@given(
    train=st.lists(st.integers(0, 2), max_size=150),
    validation=st.lists(st.integers(0, 2), max_size=60),
    length=st.integers(1, 9),
    slice_size=st.sampled_from([1, 2, 5, 16, 1000]),
)
def test_leakage_is_what_brute_force_finds(train, validation, length, slice_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leakage, "SLICE_TOKENS", slice_size)
        assert counted(train, validation, length) == by_brute_force(train, validation, length)


@pytest.mark.usefixtures("slice_tokens")
def test_leakage_among_many_sequences_is_what_brute_force_finds():
    rng = np.random.default_rng(3)
    train, validation = rng.integers(0, 4, 2_000), rng.integers(0, 4, 2_000)
    expected = by_brute_force(train.tolist(), validation.tolist(), 5)
    assert 0 < expected[1] < expected[0]
    assert counted(train, validation, 5) == expected


@pytest.mark.usefixtures("slice_tokens")
def test_a_file_of_one_token_repeated_leaks_all_of_it():
    assert counted([7] * 500, [7] * 200) == (6, 6)
    assert counted([7] * 500, [8] * 200) == (6, 0)


def test_a_sequence_that_validation_repeats_counts_each_time():
    copied, other = list(range(32)), list(range(100, 132))
    assert counted([9, *copied, 9], copied + other + copied + copied) == (4, 3)


@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [([], [], (0, 0)), ([1] * 31, [1] * 32, (1, 0)), ([1] * 32, [1] * 31, (0, 0)), ([1] * 32, [1] * 32, (1, 1))],
)
@pytest.mark.usefixtures("slice_tokens")
def test_what_is_shorter_than_a_sequence_leaks_nothing(train, validation, expected):
    assert counted(train, validation) == expected


def test_equal_hashes_of_unequal_tokens_are_no_leak(monkeypatch):
    monkeypatch.setattr(leakage, "MULTIPLIER", np.uint64(1))  # the hash is the sum of the tokens
    sequence = list(range(32))
    assert counted(sequence[::-1], sequence) == (1, 0)
    assert counted(sequence[::-1] + sequence, sequence) == (1, 1)


def test_the_table_of_bits_rules_out_nearly_all_other_hashes():
    rng = np.random.default_rng(0)
    known, others = rng.integers(2**64, size=(2, 10_000), dtype=np.uint64)
    table = leakage._bit_table(known)
    assert table.nbytes <= 16 * known.size
    assert leakage._places_in(table, known).tolist() == list(range(known.size))
    assert leakage._places_in(table, others).size < 0.02 * others.size


def test_hashes_of_windows_that_are_much_alike_do_not_collide():
    ids = np.random.default_rng(0).integers(0, 3, 300_000).astype(np.uint16)
    hashes = leakage._window_hashes(ids, 32)
    windows = np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint8), 32)
    assert np.unique(hashes).size == len({window.tobytes() for window in windows})


def test_progress_tells_the_training_tokens_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(leakage, "SLICE_TOKENS", 40)
    told = []
    paths = write(tmp_path / "a.safetensors", [1] * 100), write(tmp_path / "b.safetensors", [1] * 70)
    find_leakage(*paths, progress=told.append)
    assert told == [40, 80, 100]


def test_memory_does_not_grow_with_the_files(tmp_path):
    rng = np.random.default_rng(0)
    train, validation = rng.integers(0, 50_000, 40_000_000, np.uint16), rng.integers(0, 50_000, 8_000_000, np.uint16)
    validation[:3_200] = train[-3_200:]
    write(tmp_path / "train.safetensors", train), write(tmp_path / "validation.safetensors", validation)
    program = """
import sys, threading, time
from pathlib import Path
from outside_in.data.prepare.description import describe

def own_bytes():  # without the pages of mapped files, which the system may drop
    return int(dict(line.split(":") for line in open("/proc/self/status"))["RssAnon"].split()[0]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, own_bytes())
        time.sleep(0.002)

before = peak = own_bytes()
threading.Thread(target=watch, daemon=True).start()
facts, _ = describe(Path(sys.argv[1]))
assert facts["leakage"]["found"] == 100, facts
print(peak - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60_000_000  # of files of 96 million bytes, the tokenizer's tables included


# A folder


def recorded_of(folder, **changes):
    """What prepare_data.py would write into a folder."""
    facts, _ = describe(folder)
    source = {
        "name": "cats.txt",
        "size_bytes": 1_234,
        "sha256": "ab" * 32,
        "documents": 2,
        "tokens": 4_321,
        "share": 0.25,
    }
    return {
        "format": 1,
        "sources": [source],
        "tokenizer": gpt2().name,
        "tokenizer_sha256": gpt2().sha256,
        "end_of_text": gpt2().end_token,
        "seed": 42,
        "options": {"reading": {"field": "text"}, "shuffle": True},
        "duplicates_dropped": 1_000,
        **facts,
        **changes,
    }


def record(folder, **changes):
    recorded = recorded_of(folder, **changes)
    (folder / "data.json").write_text(json.dumps(recorded))
    return recorded


def warnings_of(folder):
    return [line for line in describe(folder)[1] if line.startswith("WARNING ")]


def test_a_folder_without_data_json_is_described_by_its_tokens(folder):
    facts, printed = describe(folder)
    assert facts == {
        "splits": {split: describe_split(folder / f"{split}.safetensors", gpt2()) for split in ("train", "validation")},
        "leakage": find_leakage(folder / "train.safetensors", folder / "validation.safetensors"),
    }
    train, held_out = facts["splits"].values()
    per_token = [f"{split['bytes'] / split['tokens']:.2f} bytes a token" for split in (train, held_out)]
    sequences = facts["leakage"]["sequences"]
    assert sequences == held_out["tokens"] // 32 > 1
    assert held_out["bytes"] == len(" ".join(f"word {number}" for number in range(40)))
    assert printed == [
        f"train: {train['tokens']:,} tokens in 2 documents, mean length {train['tokens'] / 2:.1f}, "
        f"longest {held_out['tokens'] - 1}, {per_token[0]}, unigram entropy {train['unigram_entropy']:.3f} nats",
        f"validation: {held_out['tokens']:,} tokens in 1 document, mean length {held_out['tokens']}.0, "
        f"longest {held_out['tokens'] - 1}, {per_token[1]}, unigram entropy {held_out['unigram_entropy']:.3f} nats",
        f"leakage {sequences} of {sequences} validation sequences of 32 tokens (100.0%) occur in the training tokens",
        "no data.json: it is not known where these tokens come from",
        r"sample 'The cat sat on the mat.\nThen it left.'",
    ]


def test_numbers_have_thousands_separators():
    leaked = {"sequence_length": 32, "sequences": 3_192, "found": 12, "share": 12 / 3_192}
    counts = {
        "tokens": 9_876_543,
        "documents": 4_000,
        "longest_document": 12_345,
        "bytes": 43_210_987,
        "unigram_entropy": 7.65432,
    }
    assert lines({"splits": {"train": counts}, "leakage": leaked})[:2] == [
        "train: 9,876,543 tokens in 4,000 documents, mean length 2,469.1, longest 12,345, 4.38 bytes a token, "
        "unigram entropy 7.654 nats",
        "leakage 12 of 3,192 validation sequences of 32 tokens (0.4%) occur in the training tokens",
    ]


def test_a_folder_without_validation_is_described(folder):
    (folder / "validation.safetensors").unlink()
    facts, printed = describe(folder)
    assert facts["splits"].keys() == {"train"}
    assert facts["leakage"] is None
    assert "leakage unknown: there is no validation file" in printed


def test_a_folder_without_training_tokens_is_refused(folder):
    (folder / "train.safetensors").unlink()
    assert "train.safetensors: expected a token file, found nothing" in refusal(describe, folder)


def test_the_lines_say_where_the_tokens_come_from(folder):
    record(folder)
    _, printed = describe(folder)
    assert printed[3:-1] == [
        f"source cats.txt: 2 documents, 4,321 tokens, 25.0% of all tokens, 1,234 bytes, sha256 {'ab' * 32}",
        f"tokenizer gpt2 (sha256 {gpt2().sha256}), seed 42",
        "options field=text, shuffle=True",
        "duplicates dropped: 1,000",
    ]


def test_what_data_json_says_is_said_without_the_token_files(folder):
    recorded = record(folder)
    assert lines(recorded) == describe(folder)[1][:-1]


def test_what_was_not_recorded_is_not_made_up(folder):
    source = {"name": "owner/name", "size_bytes": None, "sha256": None, "documents": 1, "tokens": 9, "share": 1.0}
    printed = lines(recorded_of(folder, sources=[source], duplicates_dropped=None, options={}))
    assert printed[3] == "source owner/name: 1 document, 9 tokens, 100.0% of all tokens"
    assert printed[-2:] == ["options none", "duplicates: not checked"]


def test_a_folder_that_is_as_recorded_gives_no_warning(folder):
    record(folder)
    assert warnings_of(folder) == []


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("name", ["tokens", "documents", "longest_document", "bytes", "unigram_entropy"])
def test_a_recorded_count_that_differs_gives_a_warning(split, name, folder):
    recorded = record(folder)
    value = recorded["splits"][split][name]
    recorded["splits"][split][name] = value + 1
    (folder / "data.json").write_text(json.dumps(recorded))
    (line,) = warnings_of(folder)
    assert line.startswith(
        f"WARNING data.json: {split} has {name} {value + 1:,.6g}, the token files have {value:,.6g}; "
    )


def test_what_is_counted_is_said_whatever_is_recorded(folder):
    recorded = record(folder)
    counted = describe(folder)[1][:3]
    for part in (*recorded["splits"].values(), recorded["leakage"]):
        part |= dict.fromkeys(part, 0)
    (folder / "data.json").write_text(json.dumps(recorded))
    assert describe(folder)[1][:3] == counted


def test_one_token_of_billions_is_a_difference():
    assert not description._same(20_000_000_001, 20_000_000_000)
    assert description._same(7.6543210000001, 7.654321)
    assert not description._same(7.6544, 7.654321)


def test_a_recorded_leakage_that_differs_gives_a_warning(folder):
    recorded = record(folder)
    recorded["leakage"]["found"] = 0
    (folder / "data.json").write_text(json.dumps(recorded))
    (line,) = warnings_of(folder)
    assert line.startswith("WARNING data.json: leakage has found 0, the token files have ")


def test_a_recorded_split_that_is_gone_gives_a_warning(folder):
    record(folder)
    (folder / "validation.safetensors").unlink()
    assert [line.split(",")[0] for line in warnings_of(folder)] == [
        "WARNING data.json: has numbers of validation",
        "WARNING data.json: has numbers of leakage",
    ]


def test_the_sample_is_the_beginning_of_the_first_document_with_text(folder):
    words = gpt2().encode(" ".join(f"word {number}" for number in range(100)))
    write(folder / "train.safetensors", [END, END, *words, END])
    assert describe(folder)[1][-1] == f"sample {gpt2().decode(words[:60])!r}"
    write(folder / "train.safetensors", [END, *words[:5], END, *words])
    assert describe(folder)[1][-1] == f"sample {gpt2().decode(words[:5])!r}"


@pytest.mark.parametrize("ids", [[], [END], [END] * 3])
def test_the_sample_of_no_text_is_empty(ids, folder):
    write(folder / "train.safetensors", ids)
    assert describe(folder)[1][-1] == "sample ''"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": 2}, "expected format 1, got 2; "),
        ({"format": None}, "expected format 1, got None; "),
        ({"sources": None}, "got another form"),
        ({"sources": ["a"]}, "got another form"),
        ({"sources": [{"tokens": 1}]}, "got another form (KeyError 'name')"),
        ({"sources": [{"name": "a", "tokens": "many"}]}, "got another form"),
        ({"splits": []}, "got another form"),
        ({"splits": {"train": {"tokens": 1}}}, "got another form (KeyError 'documents')"),
        (
            {"splits": {"train": {"tokens": 10**400, "documents": 1, "longest_document": 1, "unigram_entropy": 1}}},
            "got another form",
        ),
        ({"leakage": [1]}, "got another form"),
        ({"options": "none"}, "got another form"),
        ({"duplicates_dropped": "few"}, "got another form"),
    ],
)
def test_a_data_json_of_another_form_is_refused_before_any_counting(changes, complaint, folder):
    record(folder, **changes)
    (folder / "train.safetensors").unlink()
    line = refusal(describe, folder)
    assert line.startswith(f"{folder / 'data.json'}: expected ")
    assert complaint in line


def test_every_line_stays_one_line_whatever_data_json_says(folder):
    evil = "a\nb\x1b[2J"
    source = {"name": evil, "sha256": evil}
    changes = {"sources": [source], "tokenizer": evil, "seed": evil, "options": {evil: [evil]}}
    evils = record(folder, **changes, tokenizer_sha256=evil, end_of_text=evil)
    assert all(line.isprintable() for line in lines(evils))
    assert refusal(describe, folder).isprintable()  # there is no such tokenizer
    del evils["tokenizer_sha256"]  # as before there were others than GPT-2's
    (folder / "data.json").write_text(json.dumps(evils))
    assert all(line.isprintable() for line in describe(folder)[1])


def test_the_recorded_leakage_is_that_of_data_json(folder):
    assert recorded_leakage(folder) is None
    recorded = record(folder)
    assert recorded_leakage(folder) == recorded["leakage"]["share"] == 1.0
    for split in ("train", "validation"):
        (folder / f"{split}.safetensors").unlink()
    assert recorded_leakage(folder) == 1.0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "{", '{"format": 1}', '{"format": 1, "leakage": {"share": 0.5}}'],
)
def test_a_data_json_that_says_nothing_of_leakage_stops_no_training(text, folder):
    (folder / "data.json").write_text(text)
    assert recorded_leakage(folder) is None


@pytest.mark.parametrize("leaked", [None, {"share": "half"}, {"share": 1.5}, {"share": -0.1}, {"share": None}])
def test_a_recorded_leakage_that_is_no_share_is_none(leaked, folder):
    record(folder, leakage=leaked and {"sequence_length": 32, "sequences": 1, "found": 1} | leaked)
    assert recorded_leakage(folder) is None


def test_describing_needs_no_jax():
    program = "import outside_in.data.prepare.description, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
