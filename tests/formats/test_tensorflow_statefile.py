"""The ``checkpoint`` file: as TensorFlow writes it, as the text format allows it, and otherwise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_cli.formats.tensorflow.statefile import State, encode, parse
from ema_cli.formats.tensorflow.wire import Malformed

# As CheckpointManager of TensorFlow 2.21 wrote it.
MANAGED = b"""\
model_checkpoint_path: "ckpt-2"
all_model_checkpoint_paths: "ckpt-1"
all_model_checkpoint_paths: "ckpt-2"
all_model_checkpoint_timestamps: 1795375898.6572003
all_model_checkpoint_timestamps: 1795375898.665008
last_preserved_timestamp: 1795375897.6309226
"""

# As update_checkpoint_state of TensorFlow 2.21 wrote them.
WRITTEN = {
    "dé\"'\\x\n\t\r\x01\x7f": b"d\xc3\xa9\\\"\\'\\\\x\\n\\t\\r\\001\\177",
    "/abs/p-3": b"/abs/p-3",
    "\u2028😀": b"\xe2\x80\xa8\xf0\x9f\x98\x80",
}


def test_the_file_of_a_manager_is_read() -> None:
    """Timestamps are skipped; the order is kept."""
    assert parse(MANAGED) == State("ckpt-2", ("ckpt-1", "ckpt-2"))


@pytest.mark.parametrize("path", WRITTEN)
def test_paths_are_written_as_tensorflow_writes_them(path: str) -> None:
    """Control characters and quotes are escaped, everything else is UTF-8."""
    quoted = b'"' + WRITTEN[path] + b'"\n'
    expected = b"model_checkpoint_path: " + quoted
    expected += b'all_model_checkpoint_paths: "x-2"\nall_model_checkpoint_paths: ' + quoted
    assert encode(path, ["x-2", path]) == expected
    assert parse(expected) == State(path, ("x-2", path))


def test_bytes_that_are_not_utf8_are_escaped() -> None:
    """Such paths exist; a text that is not UTF-8 is no message."""
    path = "a\udcff\udc80b\udcc3"
    assert encode(path, []) == b'model_checkpoint_path: "a\\377\\200b\\303"\n'
    assert parse(encode(path, [path])) == State(path, (path,))
    assert parse(b'model_checkpoint_path: "a\xff"') == State("a\udcff", ())


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9)
bytewise = st.binary(max_size=9).map(
    lambda raw: raw.replace(b"\0", b"").decode("utf-8", "surrogateescape")
)


@given(latest=names | bytewise, listed=st.lists(names | bytewise, max_size=4))
def test_what_is_written_is_read(latest: str, listed: list[str]) -> None:
    """Any paths that a file system can have."""
    assert parse(encode(latest, listed)) == State(latest, tuple(listed))


# Everything below was held against protobuf's own parser.
TEXTS = {
    "": State("", ()),
    "# nothing\n\t\r\n": State("", ()),
    'model_checkpoint_path:"a"': State("a", ()),
    "model_checkpoint_path : 'a'": State("a", ()),
    "model_checkpoint_path: 'a\"b'": State('a"b', ()),
    'model_checkpoint_path: "a" \'b\' # c\n "d"': State("abd", ()),
    'model_checkpoint_path: "#a"#b\nall_model_checkpoint_paths: "c"': State("#a", ("c",)),
    'all_model_checkpoint_paths: "a", all_model_checkpoint_paths: "b";': State("", ("a", "b")),
    'all_model_checkpoint_paths: ["a", \'b\' "c"]': State("", ("a", "bc")),
    "all_model_checkpoint_paths: []": State("", ()),
    r'model_checkpoint_path: "\303\251\xc3\xa9\u00e9\U0001f600"': State("ééé😀", ()),
    r'model_checkpoint_path: "\a\b\f\n\r\t\v\?\'\"\\"': State("\a\b\f\n\r\t\v?'\"\\", ()),
    r'model_checkpoint_path: "\1011\x4g\7"': State("A1\x04g\x07", ()),
    'a: 1 b: -2.5e-7 c: inf d: ENUM e: "x" "y" f: [1, 2]': State("", ()),
    'm { a: 1 n < b: "}" > } all_model_checkpoint_paths: "x"': State("", ("x",)),
    'm: { model_checkpoint_path: "no" l [{a: 1}, {}] } model_checkpoint_path: "y"': State("y", ()),
    '[type.googleapis.com/x.Y] { z: 1 } model_checkpoint_path: "y"': State("y", ()),
    "x {} " * 1000 + 'model_checkpoint_path: "y"': State("y", ()),
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:30])
def test_what_the_text_format_allows_is_read(text: str) -> None:
    """Quotes, escapes, lists, comments, separators, and fields of later versions."""
    assert parse(text.encode()) == TEXTS[text]


HOSTILE = {
    b'model_checkpoint_path "a"': "expected : before",
    b"model_checkpoint_path: a": "expected a string",
    b"model_checkpoint_path: 7": "expected a string",
    b"model_checkpoint_path: { }": "expected a string",
    b"model_checkpoint_path:": "found the end",
    b'model_checkpoint_path: "a': "neither a word nor a whole string",
    b'model_checkpoint_path: "a\n"': "neither a word nor a whole string",
    b'model_checkpoint_path: "a\\"': "neither a word nor a whole string",
    b'model_checkpoint_path: "a" model_checkpoint_path: "b"': "expected one .*, found 2",
    b'model_checkpoint_path: ["a", "b"]': "expected one .*, found 2",
    b'model_checkpoint_path: "a\\000"': "zero byte",
    b'model_checkpoint_path: "a\0"': "zero byte",
    b'model_checkpoint_path: "\\q"': r"unknown escape \\\\q",
    b'model_checkpoint_path: "\\x"': "unknown escape",
    b'model_checkpoint_path: "\\400"': "unknown escape",
    b'model_checkpoint_path: "\\ud800"': "unknown escape",
    b'model_checkpoint_path: "\\U00110000"': "unknown escape",
    b'all_model_checkpoint_paths: ["a" "b"': "expected , before",
    b'all_model_checkpoint_paths: ["a", ': "expected a string",
    b"all_model_checkpoint_paths: [1]": "expected a string",
    b'"a": 1': "expected the name of a field",
    b": 1": "expected the name of a field",
    b"} ": "expected the name of a field",
    b"a:": "expected a value",
    b"a: ,": "expected a value",
    b"a {": "expected } before",
    b"a { ]": "expected } before",
    b"a [ { ] }": "expected } before",
    b"a <b {>}": "expected } before",
    b"a: $": "neither a word",
    b"\xef\xbb\xbfa: 1": "neither a word",
    b"\x57\xfb\x80\x8b\x24\x75\x47\xdb": "expected|neither",
    b"a " + b"{" * 101: "at most 100 levels",
    b"a " + b"{" * 1_000_000: "at most 100 levels",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:30]))
def test_a_hostile_state_file_is_refused(text: bytes) -> None:
    """Each with the place and what was expected there."""
    with pytest.raises(Malformed, match=HOSTILE[text]):
        parse(text)


@pytest.mark.parametrize(
    "text", [b" " * 2_000_000, b"#" * 2_000_000, b'a: "' + b"\\\\" * 1_000_000, b"a:1 " * 200_000]
)
def test_long_texts_take_linear_time(text: bytes) -> None:
    """A regular expression that backtracks would not come back."""
    try:
        assert parse(text) == State("", ())
    except Malformed:
        assert text.startswith(b'a: "')


def test_mutated_state_files_are_refused_or_read() -> None:
    """Nothing but `Malformed` escapes."""
    chance = random.Random(2)
    good = [MANAGED, *[text.encode() for text in TEXTS if len(text) < 200]]
    refused = 0
    for _ in range(5000):
        text = bytearray(chance.choice(good) or b"#")
        for _ in range(chance.choice([1, 1, 2, 3])):
            at = chance.randrange(len(text) + 1)
            text[at : at + chance.randrange(3)] = bytes(
                chance.choices(b"\"'\\{}[]<>:,;#\0 \nx7\xff")
            )
        try:
            state = parse(bytes(text))
            assert parse(encode(*state)) == state
        except Malformed:
            refused += 1
    assert 1000 < refused < 5000
