"""JSON headers read member by member: bounded memory, every repetition and oddity refused.

A decoder that builds the whole document first takes many times the size of a hostile one.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from ema_cli.errors import DamagedFile
from ema_cli.text import shorten

# The longest entry of a tensor: 32 dimensions of 19 digits, two offsets, and room for spaces.
ENTRY_LIMIT = 4096
# What nearly all headers consist of, in one step: a name without escapes and its colon, a comma
# before the next name. Whatever else stands there is looked at character by character.
_KEY = re.compile(r'"([^"\\\x00-\x1f]*)"[ \n\r\t]*:[ \n\r\t]*')
_COMMA = re.compile(r'[ \n\r\t]*,[ \n\r\t]*(?=")')


class Repeated(NamedTuple):
    """Stands for a JSON object with a field that occurs twice."""

    field: str


def unique(pairs: list[tuple[str, Any]]) -> Any:
    """Return the object as a dict, or `Repeated`: a hook for the JSON decoder."""
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            return Repeated(key)
        seen.add(key)
    return value


def _not_a_number(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=_not_a_number)


class Scanner:
    """Walks the text of a header; `path` is for its errors, each a `DamagedFile`."""

    def __init__(self, path: str, text: str) -> None:
        self._path = path
        self._text = text
        self._at = 0
        if not text.startswith("{"):
            raise DamagedFile(path, f"expected the header to begin with '{{', found {text[:1]!a}")

    def enter(self) -> bool:
        """Step into an object; False when it is empty (and left again)."""
        self._expect("{")
        return not self._closed()

    def next(self) -> bool:
        """Step over a comma to the next member; False at the closing brace, which is passed."""
        comma = _COMMA.match(self._text, self._at)
        if comma is not None:
            self._at = comma.end()
            return True
        self._skip()
        if self._closed():
            return False
        self._expect(",")
        if self._text[self._at : self._at + 1] == "}":
            raise self._error("expected a name after ','")
        return True

    def key(self) -> str:
        """Return the name of the next member and pass its colon."""
        plain = _KEY.match(self._text, self._at)
        if plain is not None:
            self._at = plain.end()
            return plain[1]
        name = self.string()
        self._skip()
        self._expect(":")
        return name

    def string(self) -> str:
        """Return the string that begins here."""
        if not self.at_string():
            raise self._error("expected a string")
        value, self._at = self._decode(self._text, self._at)
        return str(value)

    def entry(self) -> Any:
        """Return the value that begins here, of at most `ENTRY_LIMIT` characters."""
        window = self._text[self._at : self._at + ENTRY_LIMIT]
        try:
            value, length = self._decode(window, 0)
        except DamagedFile:
            if len(window) == ENTRY_LIMIT:
                raise self._error(f"an entry is longer than {ENTRY_LIMIT} characters") from None
            raise
        self._at += length
        return value

    def end(self) -> None:
        """Check that only padding follows."""
        if self._text[self._at :].strip(" "):
            raise DamagedFile(self._path, "expected only spaces after the header's closing brace")

    def at_object(self) -> bool:
        """Whether an object begins here."""
        return self._text[self._at : self._at + 1] == "{"

    def at_string(self) -> bool:
        """Whether a string begins here."""
        return self._text[self._at : self._at + 1] == '"'

    def _decode(self, text: str, at: int) -> tuple[Any, int]:
        try:
            return _DECODER.raw_decode(text, at)
        except RecursionError:
            raise DamagedFile(self._path, "the header is nested too deeply") from None
        except ValueError as error:
            raise self._error(shorten(str(error))) from None

    def _closed(self) -> bool:
        if self._text[self._at : self._at + 1] != "}":
            return False
        self._at += 1
        return True

    def _skip(self) -> None:
        while self._text[self._at : self._at + 1] in (" ", "\n", "\r", "\t"):
            self._at += 1

    def _expect(self, character: str) -> None:
        found = self._text[self._at : self._at + 1]
        if found != character:
            shown = ascii(found) if found else "its end"
            raise self._error(f"expected '{character}' at byte {self._at}, found {shown}")
        self._at += 1
        self._skip()

    def _error(self, reason: str) -> DamagedFile:
        return DamagedFile(self._path, f"the header is not JSON: {reason}")
