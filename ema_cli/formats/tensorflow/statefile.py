r"""The ``checkpoint`` file beside TensorFlow's checkpoints: which there are, and the latest.

It is a CheckpointState message in protobuf's text format::

    model_checkpoint_path: "model-300"
    all_model_checkpoint_paths: "model-200"
    all_model_checkpoint_paths: "model-300"

Strings have C escapes, either kind of quotes, and continue in a string that follows. Fields we do
not need (timestamps) are skipped, whatever they hold. Paths are relative to the file's folder, or
absolute. Source: checkpoint_state.proto and checkpoint_management.py of TensorFlow; the text
format specification of protobuf.dev.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ema_cli.formats.tensorflow.wire import Malformed

_LATEST = b"model_checkpoint_path"
_LISTED = b"all_model_checkpoint_paths"

# The nesting at which protobuf's own parsers stop.
_DEPTH_LIMIT = 100
_CLOSING = {b"{": b"}", b"<": b">", b"[": b"]"}

_SPACE = re.compile(rb"(?:\s++|#[^\n]*+)*+")
_TOKEN = re.compile(
    rb"""(?P<string>"(?:[^"\\\n]++|\\.)*+"|'(?:[^'\\\n]++|\\.)*+')"""
    rb"""|(?P<word>[\w.+-]++)|(?P<mark>[][{}<>:;,/])""",
    re.DOTALL,
)
_ESCAPE = re.compile(
    rb"\\(?:x([0-9a-fA-F]{1,2})|([0-7]{1,3})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL
)
_CHARACTERS = {
    b"a": b"\a",
    b"b": b"\b",
    b"f": b"\f",
    b"n": b"\n",
    b"r": b"\r",
    b"t": b"\t",
    b"v": b"\v",
    b"\\": b"\\",
    b"'": b"'",
    b'"': b'"',
    b"?": b"?",
}


class State(NamedTuple):
    """What a state file says.

    Attributes:
        latest: the latest checkpoint, empty when the file names none.
        listed: all checkpoints, oldest first.
    """

    latest: str
    listed: tuple[str, ...]


# ---------------------------------------------------------------------------- reading


def parse(text: bytes) -> State:
    """Return the paths in a state file; bytes that are not UTF-8 become lone surrogates."""
    tokens = _Tokens(text)
    latest: list[str] = []
    listed: list[str] = []
    while tokens.kind:
        name = _name(tokens)
        if name == _LATEST:
            latest += _paths(tokens)
        elif name == _LISTED:
            listed += _paths(tokens)
        else:
            _skip_value(tokens)
        tokens.accept(b",") or tokens.accept(b";")
    if len(latest) > 1:
        raise Malformed(f"expected one {_LATEST.decode()}, found {len(latest)}")
    return State(latest[0] if latest else "", tuple(listed))


class _Tokens:
    """The tokens of a text, of which one is in sight.

    Attributes:
        kind: "string", "word" or "mark" (punctuation); empty at the end of the text.
        value: the token as it stands.
    """

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0
        self.kind = ""
        self.value = b""
        self.step()

    def step(self) -> None:
        """Go on to the next token."""
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space else self._at
        token = _TOKEN.match(self._text, self._at)
        if token:
            self.kind, self.value = token.lastgroup or "", token[0]
            self._at = token.end()
        elif self._at == len(self._text):
            self.kind, self.value = "", b""
        else:
            raise Malformed(f"byte {self._at:,} begins neither a word nor a whole string")

    def accept(self, mark: bytes) -> bool:
        """Step over this mark if it is in sight; return whether it was."""
        if self.value != mark:
            return False
        self.step()
        return True

    def expect(self, mark: bytes) -> None:
        """Step over this mark, which must be in sight."""
        if not self.accept(mark):
            raise self.unexpected(mark.decode())

    def unexpected(self, expected: str) -> Malformed:
        """Return the error that says what was expected here."""
        found = repr(self.value[:40])[1:] if self.kind else "the end"
        return Malformed(f"expected {expected} before byte {self._at:,}, found {found}")


def _name(tokens: _Tokens) -> bytes:
    """Step over the name of a field and return it; extensions have none."""
    name = b""
    if tokens.kind == "word":
        name = tokens.value
        tokens.step()
    elif tokens.value == b"[":
        _skip_group(tokens)
    else:
        raise tokens.unexpected("the name of a field")
    return name


def _paths(tokens: _Tokens) -> list[str]:
    """Return the path that is a field's value, or those in the list that is."""
    tokens.expect(b":")
    if not tokens.accept(b"["):
        return [_path(tokens)]
    paths: list[str] = []
    while not tokens.accept(b"]"):
        if paths:
            tokens.expect(b",")
        paths.append(_path(tokens))
    return paths


def _path(tokens: _Tokens) -> str:
    if tokens.kind != "string":
        raise tokens.unexpected("a string")
    parts = []
    while tokens.kind == "string":
        parts.append(_ESCAPE.sub(_unescaped, tokens.value[1:-1]))
        tokens.step()
    path = b"".join(parts)
    if b"\0" in path:
        raise Malformed("a path holds a zero byte")
    return path.decode("utf-8", "surrogateescape")


def _unescaped(escape: re.Match[bytes]) -> bytes:
    """Return the bytes that an escape stands for."""
    hexadecimal, octal, short, long, character = escape.groups()
    if character is not None and character in _CHARACTERS:
        return _CHARACTERS[character]
    if hexadecimal:
        return bytes([int(hexadecimal, 16)])
    if octal and int(octal, 8) < 256:
        return bytes([int(octal, 8)])
    code = int(short or long or b"110000", 16)
    if code > 0x10FFFF or 0xD800 <= code < 0xE000:
        raise Malformed(f"a string holds the unknown escape {repr(escape[0])[2:-1]}")
    return chr(code).encode()


def _skip_value(tokens: _Tokens) -> None:
    tokens.accept(b":")
    if tokens.value in _CLOSING:
        _skip_group(tokens)
    elif tokens.kind == "word":
        tokens.step()
    elif tokens.kind == "string":
        while tokens.kind == "string":
            tokens.step()
    else:
        raise tokens.unexpected("a value")


def _skip_group(tokens: _Tokens) -> None:
    """Step over a message or list, from its opening bracket to its closing one."""
    closing: list[bytes] = []
    while True:
        if tokens.value in _CLOSING:
            closing.append(_CLOSING[tokens.value])
            if len(closing) > _DEPTH_LIMIT:
                raise Malformed(f"expected at most {_DEPTH_LIMIT} levels of brackets, found more")
        elif tokens.value == closing[-1]:
            closing.pop()
        elif tokens.value in _CLOSING.values() or not tokens.kind:
            raise tokens.unexpected(closing[-1].decode())
        tokens.step()
        if not closing:
            return


# ---------------------------------------------------------------------------- writing


def encode(latest: str, listed: Sequence[str]) -> bytes:
    """Return the state file that names these paths, as TensorFlow writes it."""
    lines = [f'{_LATEST.decode()}: "{_escaped(latest)}"\n']
    lines += [f'{_LISTED.decode()}: "{_escaped(path)}"\n' for path in listed]
    return "".join(lines).encode()


def _escaped(path: str) -> str:
    return "".join(map(_escaped_character, path))


def _escaped_character(character: str) -> str:
    code = ord(character)
    if character in "\t\n\r\"'\\":
        return {"\t": "\\t", "\n": "\\n", "\r": "\\r"}.get(character, "\\" + character)
    if code < 0x20 or code == 0x7F:
        return f"\\{code:03o}"
    # A byte that is not UTF-8.
    return f"\\{code - 0xDC00:03o}" if 0xDC80 <= code <= 0xDCFF else character
