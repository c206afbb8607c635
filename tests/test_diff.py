"""``ema-avg diff``: exact by default, honest about what a tolerance means."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CODES, cmd, dtype_of, raw_safetensors, write_checkpoint

import ema_cli
from ema_cli.comparison import Difference
from ema_cli.errors import UsageError

Array = np.ndarray[Any, Any]
NAN = math.nan
INF = math.inf


def differences(folder: Path, a: Any, b: Any, **tolerance: float) -> list[Difference]:
    """Compare two checkpoints with the one tensor `v`."""
    paths = [write_checkpoint(folder / n, {"v": v}) for n, v in (("a", a), ("b", b))]
    return list(ema_cli.diff(*paths, **tolerance).differences)


def differing(folder: Path, a: Any, b: Any, **tolerance: float) -> int:
    """Return how many elements of `v` differ."""
    return sum(difference.count for difference in differences(folder, a, b, **tolerance))


# ---------------------------------------------------------------------------- exact


def test_equal_checkpoints_do_not_differ(digits_run: Path, tmp_path: Path) -> None:
    """Exit 0, nothing on stdout, also when order and metadata differ."""
    path = digits_run / "digits-step-0100.safetensors"
    outcome = cmd("diff", path, path)
    assert (outcome.out, outcome.err) == ("", "no difference\n")
    values = {"a": np.float32([1]), "b": np.float32([NAN, -0.0])}
    first = write_checkpoint(tmp_path / "a", values, {"made": "today"})
    cmd("diff", first, write_checkpoint(tmp_path / "b", dict(reversed(values.items()))))


def test_what_differs_is_listed_in_order_with_exit_code_13(tmp_path: Path) -> None:
    """First A's tensors in their order, then what only B has; each with what it is."""
    one = np.float32([1, 2])
    a = {"gone": one, "shape": one, "dtype": one, "same": one, "values": np.float32([1, 2, 4])}
    b = {
        "shape": np.float32([[1, 2]]),
        "values": np.float32([1, 3, 8]),
        "dtype": np.float16([1, 2]),
        "same": one,
        "new": np.int8([1]),
    }
    paths = [write_checkpoint(tmp_path / name, values) for name, values in (("a", a), ("b", b))]
    outcome = cmd("diff", *paths, code=13)
    assert [line.split("\t") for line in outcome.out.splitlines()] == [
        ["tensor", "difference", "A", "B", "elements", "max abs", "max rel", "rel norm"],
        ["gone", "only in A", "float32 [2]", "", "", "", "", ""],
        ["shape", "shape", "float32 [2]", "float32 [1, 2]", "", "", "", ""],
        ["dtype", "dtype", "float32 [2]", "float16 [2]", "", "", "", ""],
        ["values", "values", "", "", "2 of 3", "4", "0.5", "0.479301"],
        ["new", "only in B", "", "int8 [1]", "", "", "", ""],
    ]
    assert outcome.err == "5 tensors differ\n"


def test_exact_means_bits(tmp_path: Path) -> None:
    """Zeros of either sign differ, so do NaNs with other payloads; equal NaNs do not."""
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert differing(tmp_path, np.float32([0.0, 1, NAN]), np.float32([-0.0, 1, NAN])) == 1
    assert differing(tmp_path, nans, nans) == 0
    assert differing(tmp_path, nans, nans[::-1]) == 2
    (found,) = differences(tmp_path, np.float32([0.0]), np.float32([-0.0]))
    assert (found.count, found.total, found.max_abs, found.max_rel) == (1, 1, 0, 0)


@pytest.mark.parametrize("dtype", sorted(CODES))
def test_one_bit_in_any_dtype_is_a_difference(tmp_path: Path, dtype: str) -> None:
    """Integers, complex numbers, bools and float8 are compared like everything else."""
    size = dtype_of(dtype).itemsize
    raw = bytearray(np.random.default_rng(1).bytes(8 * size) if dtype != "bool" else bytes(8))
    a = np.frombuffer(bytes(raw), dtype_of(dtype))
    raw[3 * size] ^= 1
    b = np.frombuffer(bytes(raw), dtype_of(dtype))
    assert differences(tmp_path, a, a) == []
    (found,) = differences(tmp_path, a, b)
    assert (found.tensor, found.kind, found.count, found.total) == ("v", "values", 1, 8)


def test_packed_dtypes_are_compared_too(tmp_path: Path) -> None:
    """Four-bit numbers have no NumPy dtype; their bytes still differ or not."""
    entry = {"v": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    paths = [tmp_path / name for name in "ab"]
    for path, data in zip(paths, (b"\x12\x34", b"\x12\x35"), strict=True):
        path.write_bytes(raw_safetensors(entry, data))
    assert not ema_cli.diff(paths[0], paths[0])
    (found,) = ema_cli.diff(*paths).differences
    assert (found.tensor, found.kind) == ("v", "values")


def test_big_integers_differ_by_their_last_bit(tmp_path: Path) -> None:
    """Beyond 2**53 too, where float64 sees no difference."""
    assert differing(tmp_path, np.int64([2**60]), np.int64([2**60 + 1])) == 1
    assert differing(tmp_path, np.uint64([2**64 - 1]), np.uint64([2**64 - 2])) == 1


@pytest.mark.parametrize("place", [0, (1 << 18) - 1, 1 << 18, (1 << 19) + 4])
def test_a_tensor_larger_than_a_block_is_read_to_its_end(tmp_path: Path, place: int) -> None:
    """One element out of half a million is found wherever it is, and largest gaps add up."""
    a = np.zeros((1 << 19) + 5, np.float16)
    b = a.copy()
    b[place] = 2
    b[7] = -3
    (found,) = differences(tmp_path, a, b)
    assert (found.count, found.total, found.max_abs) == (2, a.size, 3)


# ---------------------------------------------------------------------------- tolerances


@pytest.mark.parametrize(
    "a, b, atol, rtol, count",
    [
        ([1.0, 100.0], [1.5, 100.5], 0.5, 0, 0),
        ([1.0, 100.0], [1.5, 100.75], 0.5, 0, 1),
        ([1.0, 100.0], [1.5, 100.5], 0, 0.01, 1),
        ([90.0], [100.0], 0, 0.1, 0),
        ([100.0], [90.0], 0, 0.1, 1),
        ([1.0], [2.5], 1, 0.2, 0),
        ([0.0, NAN], [-0.0, NAN], 1e-9, 0, 0),
        ([NAN, 1.0], [1.0, NAN], 1e9, 0, 2),
        ([INF, -INF, 1.0], [INF, -INF, 1.25], 0.5, 0, 0),
        ([INF, -INF, 1.0], [INF, -INF, 1.25], 0, 0.5, 0),
        ([INF, 1.0, INF], [-INF, INF, 1.0], 0.5, 0, 3),
        ([INF, 1.0, INF], [-INF, INF, 1.0], 0, 0.5, 3),
    ],
)
def test_values_agree_within_atol_plus_rtol_times_b(
    tmp_path: Path, a: list[float], b: list[float], atol: float, rtol: float, count: int
) -> None:
    """Both ends included; NaN agrees with NaN, an infinity with itself and nothing else."""
    arrays = np.float64(a), np.float64(b)
    assert differing(tmp_path, *arrays, atol=atol, rtol=rtol) == count


def test_with_a_tolerance_dtypes_may_differ(tmp_path: Path) -> None:
    """Whatever their dtypes, values are compared in float64; shapes still have to be equal."""
    a = np.float32([1.0, 0.1])
    b = a.astype(dtype_of("bfloat16"))
    assert differing(tmp_path, a, b, rtol=0.01) == 0
    assert differing(tmp_path, a, b, rtol=1e-6) == 1
    (found,) = differences(tmp_path, a, b[None], rtol=0.01)
    assert found.kind == "shape"


def test_tolerances_hold_for_integers_and_complex_numbers(tmp_path: Path) -> None:
    """Unsigned numbers do not wrap around, and a complex gap is the distance in the plane."""
    assert differing(tmp_path, np.uint8([1, 255]), np.uint8([2, 0]), atol=1) == 1
    a, b = np.complex64([1 + 1j, 5]), np.complex64([4 + 5j, 5])
    assert differing(tmp_path, a, b, atol=5) == 0
    (found,) = differences(tmp_path, a, b, atol=4.99)
    assert (found.count, found.max_abs) == (1, 5)


def test_the_largest_gaps_are_told(tmp_path: Path) -> None:
    """Absolute, and relative to B; a NaN against a number makes the absolute one NaN."""
    (found,) = differences(tmp_path, np.float32([1, 10, 4]), np.float32([2, 14, 4]))
    assert (found.count, found.max_abs, found.max_rel) == (2, 4, 0.5)
    (found,) = differences(tmp_path, np.float32([1, NAN]), np.float32([3, 1]))
    assert math.isnan(found.max_abs)
    (found,) = differences(tmp_path, np.float32([1]), np.float32([0]))
    assert (found.max_abs, found.max_rel) == (1, INF)


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
@pytest.mark.parametrize("option", ["--atol", "--rtol"])
def test_a_tolerance_is_a_finite_number_from_zero_on(
    tmp_path: Path, option: str, value: str
) -> None:
    """Everything else is exit 2, and an error of the function as well."""
    path = write_checkpoint(tmp_path / "a", {"v": np.float32([1])})
    assert "expected numbers >= 0" in cmd("diff", path, path, option, value, code=2).err
    with pytest.raises(UsageError):
        ema_cli.diff(path, path, **{option[2:]: float(value)})


def test_options_reach_the_comparison(tmp_path: Path) -> None:
    """The command with a tolerance: 13 becomes 0 as soon as it is wide enough."""
    values = (np.float32([1, 1000]), np.float32([1.25, 1100]))
    a, b = (write_checkpoint(tmp_path / n, {"v": v}) for n, v in zip("ab", values, strict=True))
    cmd("diff", a, b, code=13)
    cmd("diff", a, b, "--rtol", "0.1", code=13)
    cmd("diff", a, b, "--atol", "0.25", code=13)
    cmd("diff", a, b, "--atol", "0.25", "--rtol", "0.1")


# ---------------------------------------------------------------------------- inputs, output


def test_folder_and_file_are_compared_by_tensors(digits_bf16: Path, tmp_path: Path) -> None:
    """A copy in another format does not differ; another checkpoint of the run does."""
    folder, copy = digits_bf16 / "checkpoint-100", tmp_path / "copy.safetensors"
    cmd("rename", folder, "-o", copy, "-q")
    cmd("diff", folder, copy)
    table = cmd("diff", digits_bf16 / "checkpoint-200", copy, code=13).out.splitlines()[1:]
    assert len(table) == 14
    assert {line.split("\t")[1] for line in table} == {"values"}


def test_an_unreadable_side_is_exit_12(tmp_path: Path) -> None:
    """It is named, whichever side it is."""
    path = write_checkpoint(tmp_path / "a", {"v": np.float32([1])})
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(path.read_bytes()[:-1])
    for pair in ((path, broken), (broken, path)):
        assert "broken.safetensors" in cmd("diff", *pair, code=12).err


def strict_json(text: str) -> Any:
    """Parse as every JSON parser does; Python's own would also take NaN and Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_one_valid_document(tmp_path: Path) -> None:
    """Every difference with its fields, also when a gap is infinite or NaN."""
    a = {"v": np.float32([1, 2]), "w": np.float32([1])}
    b = {"v": np.float32([1, 4]), "x": np.float32([1])}
    paths = [write_checkpoint(tmp_path / n, v) for n, v in (("a", a), ("b", b))]
    found = strict_json(cmd("diff", *paths, "--json", code=13).out)
    assert (found["type"], found["schema"], found["command"]) == ("result", 1, "diff")
    assert [(d["tensor"], d["kind"]) for d in found["differences"]] == [
        ("v", "values"),
        ("w", "only in A"),
        ("x", "only in B"),
    ]
    fields = ("count", "total", "max_abs", "max_rel")
    assert [found["differences"][0][f] for f in fields] == [1, 2, 2, 0.5]
    assert strict_json(cmd("diff", paths[0], paths[0], "--json").out)["differences"] == []
    for x, y in ((1, 0), (NAN, 1), (INF, 1)):
        write_checkpoint(paths[0], {"v": np.float32([x])})
        write_checkpoint(paths[1], {"v": np.float32([y])})
        strict_json(cmd("diff", *paths, "--json", code=13).out)


def test_hostile_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """Control characters of names are shown escaped, one row per tensor."""
    name = "a\x1b[2J\nb\tc"
    paths = [write_checkpoint(tmp_path / n, {name: np.float32([k])}) for k, n in enumerate("ab")]
    table = cmd("diff", *map(os.fspath, paths), code=13).out.splitlines()
    assert len(table) == 2
    assert table[1].startswith(r"a\x1b[2J\nb\tc" + "\tvalues\t")
