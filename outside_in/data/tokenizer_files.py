"""Tokenizers from a `tokenizer.json`, the format of Hugging Face's `tokenizers`; and which one a name means."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tiktoken_ext.openai_public import ENDOFTEXT

from outside_in.data.tokenizer import (
    GPT2_VOCAB_SIZE,
    MAX_VOCAB_SIZE,
    TOKENIZER_FILE,
    ByteTokenizer,
    Tokenizer,
    gpt2,
    vocabulary_files,
)
from outside_in.storage.strict_json import read_json

MAX_FILE_BYTES = 2**28
DESCRIPTION = "data.json"  # what prepare_data.py writes beside token files
MAX_DESCRIPTION_BYTES = 2**28  # there may be a hundred thousand sources
ENDS_OF_TEXT = (ENDOFTEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")  # tried in this order, unless one is named
RARE = "\N{OLD ITALIC LETTER A}\N{GRINNING FACE}"  # of which few tokenizers have tokens
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # of vocabularies in SentencePiece's form


class JSONTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`, from the content of its file.

    Raises ValueError, naming `source`, when it cannot encode every text, or has ids that uint16 cannot hold.
    """

    def __init__(self, content: bytes, source: str, end_of_text: str | None = None) -> None:
        form, self._library = _parse(content, source)
        vocab = self._library.get_vocab()
        if vocab and max(vocab.values()) >= MAX_VOCAB_SIZE:
            raise ValueError(
                f"{source}: expected at most {MAX_VOCAB_SIZE:,} ids, which uint16 holds, got id {max(vocab.values()):,}"
            )
        end = _end_token(form, vocab, end_of_text, source)
        self._library.add_special_tokens([end])
        self._library.encode_special_tokens = True  # as the text that they are
        token_bytes = _token_bytes(form, vocab, source)
        self.file = content
        self._form = form
        self.cuts_before_spaces = _cuts_before_spaces(form, end)
        super().__init__(TOKENIZER_FILE, hashlib.sha256(content).hexdigest(), token_bytes, vocab[end])
        try:
            probe = self._library_ids("a")
            self._library_ids(RARE)
            self._breaks_end = self.end_of_text in self._library_ids(end)
        except BaseException as error:  # a panic of the library is no Exception
            raise _refusal(error, f"{source}: fails, so that it cannot encode every text; use another") from None
        self.adds_space = self.decode_bytes(probe) == b" a" and self._library.decode(probe) == "a"

    def is_gpt2(self) -> bool:
        """Return whether text has the ids that GPT-2 gives it. Special tokens, which no text has, do not count."""
        special = {i for i, token in self._library.get_added_tokens_decoder().items() if token.special}
        pattern = self._form["pre_tokenizer"]
        is_same = self.end_token == ENDOFTEXT and self.cuts_before_spaces and not pattern.get("add_prefix_space", True)
        are_special = special >= set(range(GPT2_VOCAB_SIZE, self.vocab_size))
        same_tokens = is_same and are_special and self.token_bytes[:GPT2_VOCAB_SIZE] == gpt2().token_bytes
        return same_tokens and [_pair(merge) for merge in self._form["model"]["merges"]] == _gpt2_merges()

    def _encode(self, text: str) -> list[int]:
        if not self._breaks_end or self.end_token not in text:
            return self._library_ids(text)
        first, *others = text.split(self.end_token)  # cut in two, it is text
        parts = [first, *(self.end_token[1:] + other for other in others)]
        parts[:-1] = [part + self.end_token[0] for part in parts[:-1]]
        return [i for part in parts for i in self._library_ids(part)]

    def _library_ids(self, text: str) -> list[int]:
        [encoding] = self._library.encode_batch_fast([text], add_special_tokens=False)  # releases Python's lock
        return encoding.ids


def _parse(content: bytes, source: str) -> tuple[dict[str, Any], tokenizers.Tokenizer]:
    """Return the form of a tokenizer, and itself, without what depends on chance or on other texts."""
    try:
        form = json.loads(content)
        form |= {"truncation": None, "padding": None}
        form["model"] |= {"dropout": None} if form["model"].get("dropout") else {}
        library = tokenizers.Tokenizer.from_str(json.dumps(form))
        form = json.loads(library.to_str())
    except BaseException as error:  # a panic of the library is no Exception
        raise _refusal(error, f"{source}: expected a {TOKENIZER_FILE} of Hugging Face's tokenizers") from None
    model = form["model"]
    of_parts = model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")
    if model["type"] not in ("BPE", "Unigram") or of_parts:
        kind = f"{model['type']} with marked parts of words" if of_parts else model["type"]
        raise ValueError(f"{source}: is a {kind}, so it cannot encode every text; use another")
    return form, library


def _refusal(error: BaseException, message: str) -> BaseException:
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        return error
    return ValueError(f"{message} ({' '.join(str(error).split())[:200]})")


def _pair(merge: Any) -> tuple[str, ...]:
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)


def _gpt2_merges() -> list[tuple[str, ...]]:
    lines = vocabulary_files()[1].read_text(encoding="utf-8").split("\n")
    return [_pair(line) for line in lines if line and not line.startswith("#version")]


def _end_token(form: dict[str, Any], vocab: Mapping[str, int], named: str | None, source: str) -> str:
    added = {token["content"] for token in form["added_tokens"]}
    for token in (named,) if named else ENDS_OF_TEXT:
        if token in added or (token in vocab and token in ENDS_OF_TEXT):
            return token
    if named:
        if named not in vocab:
            raise ValueError(f"{source}: has no token {named!r}")
        raise ValueError(f"{source}: its token {named!r} is ordinary text, so it cannot end one; name a special token")
    raise ValueError(f"{source}: has no end-of-text token such as {ENDOFTEXT} or </s>; name one with --end-of-text")


def _token_bytes(form: dict[str, Any], vocab: Mapping[str, int], source: str) -> list[bytes]:
    """Return the bytes that each id stands for. Ids without a token have none."""
    added = {token["content"]: token["content"].encode() for token in form["added_tokens"]}
    if "ByteLevel" in _kinds(form["pre_tokenizer"]) | _kinds(form["normalizer"]):
        alphabet = byte_alphabet()

        def of_token(token: str) -> bytes:
            return bytes(alphabet[character] for character in token)
    elif form["model"].get("byte_fallback"):

        def of_token(token: str) -> bytes:
            byte = BYTE_TOKEN.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else token.replace("\u2581", " ").encode()
    else:
        raise ValueError(
            f"{source}: has neither byte-level tokens nor byte fallback, so it cannot encode every text; use another"
        )
    token_bytes = [b""] * (max(vocab.values()) + 1)
    try:
        for token, i in vocab.items():
            token_bytes[i] = added[token] if token in added else of_token(token)
    except KeyError as error:
        raise ValueError(f"{source}: expected byte-level tokens, got one with {str(error)[:20]}; use another") from None
    if missing := 256 - len({token for token in token_bytes if len(token) == 1}):
        raise ValueError(f"{source}: lacks {missing} of the 256 bytes, so it cannot encode every text; use another")
    return token_bytes


def _kinds(part: dict[str, Any] | None) -> set[str]:
    """Return the types of a part of a tokenizer.json, and of what it is made of."""
    if part is None:
        return set()
    inner = [each for key in ("pretokenizers", "normalizers", "decoders") for each in part.get(key, [])]
    return {part["type"]}.union(*map(_kinds, inner))


def _cuts_before_spaces(form: dict[str, Any], end: str) -> bool:
    """Return whether a tokenizer splits text as GPT-2 does before it looks at anything else."""
    first = form["pre_tokenizer"] or {}
    others = (token for token in form["added_tokens"] if token["content"] != end)  # which is text in text
    are_special = all(token["special"] for token in others)  # else they are found in text before
    is_gpt2s = first.get("type") == "ByteLevel" and first.get("use_regex", True)
    return is_gpt2s and are_special and form["normalizer"] is None


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of byte-level tokens stands for.

    Printable characters of Latin-1 stand for themselves, those from U+0100 on for the other bytes, in order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def load(spec: str | Path, end_of_text: str | None = None) -> Tokenizer:
    """Return the tokenizer `gpt2`, `bytes`, or that of a tokenizer.json or the folder that holds it.

    A file with GPT-2's vocabulary, perhaps with special tokens added, is `gpt2`. `end_of_text` names the token that
    ends a text.
    Raises ValueError when there is none, or one that cannot encode every text.
    """
    if str(spec) in ("gpt2", "bytes"):
        if end_of_text not in (None, ENDOFTEXT):
            raise ValueError(f"{spec}: ends a text with {ENDOFTEXT}, not {end_of_text}")
        return gpt2() if str(spec) == "gpt2" else ByteTokenizer()
    path = Path(spec)
    path = path / TOKENIZER_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: expected gpt2, bytes, or a {TOKENIZER_FILE}, found no such file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_FILE_BYTES // 2**20} MiB, got a larger file")
    return from_file(path.read_bytes(), str(path), end_of_text)


def from_file(content: bytes, source: str, end_of_text: str | None = None) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json's content; see `load`."""
    loaded = JSONTokenizer(content, source, end_of_text)
    return gpt2() if loaded.is_gpt2() else loaded


def from_identity(identity: Mapping[str, Any], folder: Path, source: str) -> Tokenizer:
    """Return the tokenizer of an identity. Its tokenizer.json, if it has one, is in `folder`.

    Raises ValueError, naming `source`, when it is missing or another one.
    """
    name, sha256, end = [str(identity.get(key))[:100] for key in ("name", "sha256", "end_of_text")]
    if name not in ("gpt2", "bytes", TOKENIZER_FILE):
        raise ValueError(f"{source}: expected the tokenizer gpt2, bytes or {TOKENIZER_FILE}, got {name!r}")
    found = load(folder / TOKENIZER_FILE if name == TOKENIZER_FILE else name, end)
    if found.sha256 != sha256:
        raise ValueError(
            f"{folder / TOKENIZER_FILE}: expected the tokenizer of {source}, whose sha256 begins with {sha256[:8]}, "
            f"got {found}; put that one there"
        )
    return found


def folder_tokenizer(folder: Path) -> Tokenizer | None:
    """Return the tokenizer that the tokens of a folder were made with; None where nothing says which.

    Raises ValueError when the one that its `data.json` names is missing.
    """
    path = folder / DESCRIPTION
    recorded = read_json(path, MAX_DESCRIPTION_BYTES) if path.is_file() else {}
    if "tokenizer_sha256" in recorded:
        keys = {"name": "tokenizer", "sha256": "tokenizer_sha256", "end_of_text": "end_of_text"}
        return from_identity({name: recorded.get(key) for name, key in keys.items()}, folder, str(path))
    if recorded.get("tokenizer") == "gpt2":  # as it stood there before there were others
        return load("gpt2")
    return load(folder) if (folder / TOKENIZER_FILE).is_file() else None
