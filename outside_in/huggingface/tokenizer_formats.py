"""Tokenizers in Hugging Face's folders: which one a model comes with, and the files that `AutoTokenizer` loads."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import tokenizers
from tiktoken_ext.openai_public import ENDOFTEXT
from tokenizers import decoders, models, pre_tokenizers

from outside_in.config import ModelConfig
from outside_in.data.tokenizer import TOKENIZER_FILE, Tokenizer, assumed, gpt2, vocabulary_files
from outside_in.data.tokenizer_files import MAX_FILE_BYTES, byte_alphabet, from_file, load
from outside_in.storage.strict_json import read_json

GPT2_FILES = ("vocab.json", "merges.txt")
ADDED_TOKENS = "added_tokens.json"


def find(folder: Path, end_id: Any, vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer that a model of Hugging Face comes with; `end_id` is that of its end of a text.

    Without any, GPT-2's is assumed for a vocabulary of its size, and None returned for others, with a notice.
    Raises ValueError when it cannot be used, or has more ids than the model.
    """
    vocabulary, merges = (folder / name for name in GPT2_FILES)
    if (folder / TOKENIZER_FILE).is_file():
        found = load(folder, _token(folder / TOKENIZER_FILE, end_id))
    elif vocabulary.is_file() and merges.is_file():
        found = _byte_level(vocabulary, merges, end_id)
    elif vocabulary.is_file():
        if read_json(vocabulary, MAX_FILE_BYTES) != read_json(vocabulary_files()[0], MAX_FILE_BYTES):
            raise ValueError(
                f"{vocabulary}: not GPT-2's vocabulary; put its {merges.name} or {TOKENIZER_FILE} beside it"
            )
        found = gpt2()
    else:
        found = assumed(vocab_size)
        then = f"{found.name} is assumed" if found else f"so it completes no text; put its {TOKENIZER_FILE} there"
        print(f"notice: {folder} has no {TOKENIZER_FILE} and no {vocabulary.name}; {then}", file=sys.stderr)
    if found and found.vocab_size > vocab_size:
        raise ValueError(f"{folder}: its tokenizer {found} has more ids than its model, {vocab_size:,}")
    return found


def _token(path: Path, end_id: Any) -> str | None:
    """Return the text of the token with an id; None where a tokenizer.json has none."""
    try:
        return tokenizers.Tokenizer.from_file(str(path)).id_to_token(end_id)
    except Exception:  # no such tokenizer, of which `load` says more; or no number
        return None


def _byte_level(vocabulary: Path, merges: Path, end_id: Any) -> Tokenizer:
    """Return the byte-level BPE of a vocab.json and a merges.txt."""
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises nothing else
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{vocabulary}: no vocabulary that fits {merges.name} ({reason})") from None
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    end = library.id_to_token(end_id) if isinstance(end_id, int) and end_id >= 0 else None
    if end_id == library.get_vocab_size():  # an added token, by default GPT-2's
        path = vocabulary.with_name(ADDED_TOKENS)
        added = read_json(path) if path.is_file() else {}
        end = next((token for token, i in added.items() if i == end_id), ENDOFTEXT)
    if end:
        library.add_special_tokens([end])
    return from_file(library.to_str(pretty=True).encode(), str(vocabulary), end)


def write(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Write the files of a tokenizer, and the configs of it and of generation."""
    if tokenizer.name == "gpt2":
        for file, name in zip(vocabulary_files(), GPT2_FILES):
            shutil.copyfile(file, folder / name)
    else:
        (folder / TOKENIZER_FILE).write_bytes(tokenizer.file or _of_bytes(tokenizer))
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text)
    if lacking := list(range(tokenizer.vocab_size, config.vocab_size)):
        ids["suppress_tokens"] = lacking
    write_json(folder / "generation_config.json", ids)
    options = {
        "tokenizer_class": "GPT2Tokenizer" if tokenizer.name == "gpt2" else "PreTrainedTokenizerFast",
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": False,
        **({"add_prefix_space": False} if tokenizer.name == "gpt2" else {}),
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), tokenizer.end_token),
    }
    write_json(folder / "tokenizer_config.json", options)


def _of_bytes(tokenizer: Tokenizer) -> bytes:
    """Return a tokenizer.json with the ids of bytes: byte-level BPE without merges."""
    library = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([tokenizer.end_token])
    return library.to_str(pretty=True).encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
