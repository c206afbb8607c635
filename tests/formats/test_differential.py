"""Our header parser against the reference one on damaged headers: never more lenient."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers import CODES, dtype_of, raw_safetensors
from hostile import FILE, entry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from ema_cli import formats
from ema_cli.errors import InputError

Seen = dict[str, tuple[str, list[int]]]

SMALL = raw_safetensors(
    {"__metadata__": {"k": "v"}, "b": entry("BF16", [2, 1], [0, 4]), "w": entry("U8", [3], [4, 7])},
    bytes(range(7)),
)
HEADER_END = len(SMALL) - 7
# What we refuse and the library takes, by the words of our refusal.
STRICTER = (
    "stands twice",
    "twice",
    "expected the fields",
    "dimensions",
    "overflows",
    "must map strings to strings",
    "begin with '{'",
    "lone surrogate",
    "expected a list of integers",
    "at least 8 bytes",
)

many = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def by_the_library(path: Path) -> Seen | None:
    """Return names, dtypes and shapes as the reference library reads them; None if it refuses."""
    try:
        with safe_open(path, framework="np") as reader:
            slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except SafetensorError:
        return None


def by_us(path: Path) -> Seen | str:
    """Return the same as we read it, or the message of the refusal."""
    codes = {**CODES, "float4_e2m1fn": "F4", "float6_e2m3fn": "F6_E2M3", "float6_e3m2fn": "F6_E3M2"}
    try:
        tensors = formats.read(str(path), {}).index.tensors
    except InputError as error:
        assert error.message.isprintable()
        return error.message
    return {t.name: (codes[t.dtype.name], list(t.shape)) for t in tensors}


def compared(path: Path) -> bool:
    """Check that we accept nothing the library refuses or reads otherwise; True if we accept."""
    ours, theirs = by_us(path), by_the_library(path)
    if isinstance(ours, str):
        assert theirs is None or any(words in ours for words in STRICTER), ours
        return False
    assert ours == theirs
    return True


def test_every_flipped_byte_of_a_header_is_refused_or_read_as_the_library_reads_it(
    tmp_path: Path,
) -> None:
    """Single bits and telling characters in every place of the length and the header."""
    path = tmp_path / FILE
    accepted = 0
    for place in range(HEADER_END):
        others = {SMALL[place] ^ (1 << bit) for bit in range(8)} | set(b'019-.[]{}":, \\en\x00\xff')
        for other in sorted(others - {SMALL[place]}):
            path.write_bytes(SMALL[:place] + bytes([other]) + SMALL[place + 1 :])
            accepted += compared(path)
    assert accepted > 50  # letters of names and metadata may change


def test_every_byte_left_out_of_a_header_is_refused_or_read_alike(tmp_path: Path) -> None:
    """The same for bytes removed or doubled, with the length put right."""
    path = tmp_path / FILE
    text, data = SMALL[8:HEADER_END], SMALL[HEADER_END:]
    accepted = 0
    for place in range(len(text)):
        for piece in (b"", text[place : place + 1] * 2, b" ", b"\n", b"\\u0041"):
            changed = text[:place] + piece + text[place + 1 :]
            path.write_bytes(raw_safetensors(changed, data))
            accepted += compared(path)
    assert accepted > 50  # spaces may be doubled


sizes = (0, 1, 2, 3, 8, -1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)
edges: st.SearchStrategy[Any] = st.sampled_from((*sizes, 1.0, 0.5, True, None, "1", [], {}))
strange: dict[str, st.SearchStrategy[Any]] = {
    "dtype": st.sampled_from(["", "f32", "F31", "C128", "I4", "F32", "U8", None, 1, ["F32"]]),
    "shape": st.lists(edges, max_size=3) | edges,
    "data_offsets": st.lists(edges, max_size=3) | edges,
    "more": edges,
}
WIDTHS = {code: dtype_of(name).itemsize for name, code in CODES.items()}


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """Draw a sound header and break at most two things in it; also the size of its data."""
    tensors: list[tuple[str, dict[str, Any]]] = []
    end = 0
    for name in draw(st.lists(st.text(max_size=3), min_size=1, max_size=4, unique=True)):
        code, shape = draw(st.sampled_from(sorted(WIDTHS))), draw(st.lists(st.integers(0, 3)))
        begin, end = end, end + math.prod(shape) * WIDTHS[code]
        tensors.append((name, entry(code, shape, [begin, end])))
    for _ in range(draw(st.integers(0, 2))):
        field = draw(st.sampled_from(sorted(strange)))
        draw(st.sampled_from(tensors))[1][field] = draw(strange[field])
    if draw(st.integers(0, 7)) == 0:
        tensors.append(draw(st.sampled_from(tensors)))
    metadata = draw(st.none() | st.dictionaries(st.text(max_size=2), st.text(max_size=2)) | edges)
    members = [f"{json.dumps(name)}:{json.dumps(fields)}" for name, fields in tensors]
    if metadata is not None:
        members.insert(0, f'"__metadata__":{json.dumps(metadata)}')
    return ("{" + ",".join(members) + "}").encode(), end


@many
@given(drawn=headers())
def test_nearly_right_headers_are_refused_or_read_alike(
    tmp_path: Path, drawn: tuple[bytes, int]
) -> None:
    """Edge values in every field: what we accept the library accepts and reads the same."""
    header, size = drawn
    path = tmp_path / FILE
    path.write_bytes(raw_safetensors(header, bytes(size)))
    compared(path)


@pytest.mark.parametrize("padding", [b"", b" ", b" " * 4096])
def test_only_spaces_may_pad_a_header(tmp_path: Path, padding: bytes) -> None:
    """Padding with spaces is read by both; anything else behind the brace is refused."""
    path = tmp_path / FILE
    text = SMALL[8:HEADER_END].rstrip()
    path.write_bytes(raw_safetensors(text + padding, SMALL[HEADER_END:]))
    assert compared(path)
    for other in (b"\0", b"}", b"x"):
        path.write_bytes(raw_safetensors(text + padding + other, SMALL[HEADER_END:]))
        assert not compared(path)
