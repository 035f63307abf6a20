"""JSON values one after the other, from an array or in sequence, without all of the file in memory."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from outside_in.data.prepare.compression import BLOCK_BYTES
from outside_in.data.prepare.formats import not_utf8

WHITE_SPACE = re.compile(r"[ \t\r\n]*")


def values(name: str, content: BinaryIO, errors: str, max_characters: int) -> Iterator[Any]:
    """Yield the elements of an array, or the values that follow each other.

    Raises ValueError, naming the row, for what is not JSON, is cut off, or takes more than `max_characters`.
    """
    text = _Text(name, content, errors, max_characters)
    in_array = text.peek() == "["
    text.place += in_array
    while character := text.peek():
        if in_array and character == "]":
            text.place += 1
            if text.peek():
                raise text.error("the end of the file after ]")
            return
        if in_array and text.row:
            if character != ",":
                raise text.error("a comma or ]")
            text.place += 1
            text.peek()
        yield text.value()
    if in_array:
        raise text.error("], but the file ends: it is cut off")


class _Text:
    """The text of a file, of which only what is being parsed is in memory."""

    def __init__(self, name: str, content: BinaryIO, errors: str, max_characters: int) -> None:
        self.place = self.row = 0  # where parsing goes on, and how many values came before
        self._text, self._is_end, self._bytes = "", False, 0
        self._name, self._content, self._max = name, content, max_characters
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
        self._parser = json.JSONDecoder()

    def peek(self) -> str:
        """Skip white space, and return the character that follows; "" at the end."""
        while True:
            self.place = WHITE_SPACE.match(self._text, self.place).end()  # pyrefly: ignore
            if self.place < len(self._text) or self._is_end:
                return self._text[self.place : self.place + 1]
            self._grow()

    def value(self) -> Any:
        """Parse the value that starts here."""
        while True:
            try:
                value, end = self._parser.raw_decode(self._text, self.place)
            except RecursionError:
                raise self.error("less nesting") from None
            except ValueError as error:
                if self._is_end or len(self._text) - self.place > self._max:
                    raise self.error(f"a JSON object, got other text ({error})") from None
            else:
                if end < len(self._text) or self._is_end:  # else a number may go on
                    self.place = end
                    self.row += 1
                    return value
            self._grow()

    def error(self, expected: str) -> ValueError:
        return ValueError(f"{self._name}: row {self.row + 1:,}: expected {expected}")

    def _grow(self) -> None:
        rest = self._text[self.place :]
        block = self._content.read(max(BLOCK_BYTES, len(rest)))  # so that a long value is parsed few times
        self._is_end = not block
        try:
            self._text, self.place = rest + self._decoder.decode(block, final=self._is_end), 0
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8(error.object, error, self._bytes, self._name)) from None
        self._bytes += len(block)
