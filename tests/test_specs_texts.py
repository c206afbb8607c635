"""Weights files, windows of steps and sizes: how they are written and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import write_run
from hypothesis import given
from hypothesis import strategies as st

import ema_cli
from ema_cli.errors import UsageError
from ema_cli.specs import parse_size, parse_weights, parse_window


def test_weights_lines() -> None:
    """Step or name, then the weight after space, tab or comma; comments and blanks are skipped."""
    text = "# step weight\n\n100 0.5\n200,0.25\n300, 1e-3\n400\t2\r\n  500   0  \n"
    expected = [("100", 0.5), ("200", 0.25), ("300", 0.001), ("400", 2.0), ("500", 0.0)]
    assert parse_weights(text, "w") == tuple(expected)


@pytest.mark.parametrize("separator", [" ", ",", ", ", "\t", "  ,\t"])
@pytest.mark.parametrize(
    "name", ["epoch=3, step=1200.ckpt", "my model 5", "a,b,c", "x, y", "größe ☃", "1 #2"]
)
def test_names_may_hold_spaces_and_commas(name: str, separator: str) -> None:
    """Everything before the last separator is the name."""
    assert parse_weights(f"{name}{separator}0.5", "w") == ((name, 0.5),)


@pytest.mark.parametrize(
    "line", ["100", "100 x", "100 -1", "100 nan", "100 inf", "0.5", ", 0.5", "100 1 2 x", "100 0x1"]
)
def test_bad_weights_lines(line: str) -> None:
    """A line that is not a key and a weight >= 0 is exit code 2, with its number."""
    with pytest.raises(UsageError, match=r"list\.txt: line 2:") as caught:
        parse_weights(f"50 1\n{line}\n", "list.txt")
    assert caught.value.exit_code == 2


def test_weights_listed_twice_or_all_zero() -> None:
    """One key twice, or no weight above 0, is exit code 2."""
    with pytest.raises(UsageError, match=r"line 3.*'100' is listed twice"):
        parse_weights("100 1\n200 1\n100 2", "w")
    for text in ("", "# nothing\n", "100 0\n200 0.0\n"):
        with pytest.raises(UsageError, match="weight above 0"):
            parse_weights(text, "w")


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).filter(
            lambda text: text == text.strip(" \t,") and not text.startswith("#")
        ),
        st.floats(0, 1e300),
        min_size=1,
    ).filter(lambda table: any(table.values()))
)
def test_weights_round_trip(table: dict[str, float]) -> None:
    """Every name and float written line by line is read back, digits and all."""
    text = "\n".join(f"{name} {weight!r}" for name, weight in table.items())
    assert dict(parse_weights(text, "w")) == table


def test_weights_file_is_read(tmp_path: Path) -> None:
    """weights:FILE reads the file it names; one that is missing is an error that names it."""
    run = write_run(tmp_path / "run", [{"w": [1.0]}, {"w": [2.0]}])
    listing = tmp_path / "my weights, final.txt"
    listing.write_text("100 1\nmodel-step-200.safetensors 3\n", encoding="utf-8")
    plan = ema_cli.plan_run(run, average=[f"weights:{listing}"])
    assert plan.outcomes[0].weights == (0.25, 0.75)
    with pytest.raises(ema_cli.EmaError, match=r"missing\.txt"):
        ema_cli.plan_run(run, average=[f"weights:{tmp_path / 'missing.txt'}"])


# ---------------------------------------------------------------------------- steps and sizes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100:200", (100, 200, None)),
        (":200", (None, 200, None)),
        ("100:", (100, None, None)),
        ("::50", (None, None, 50)),
        ("100:200:50", (100, 200, 50)),
    ],
)
def test_steps(text: str, expected: tuple[int | None, ...]) -> None:
    """A:B[:C] with open ends."""
    assert parse_window(text) == expected


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:0", "-1:2", "1:2:", "1:2:3:4", "1.5:2"])
def test_bad_steps(text: str) -> None:
    """Anything else is exit code 2."""
    with pytest.raises(UsageError, match="--steps"):
        parse_window(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("1.5 kB", 1500),
        ("2TiB", 2 * 2**40),
        ("77", 77),
        (12345, 12345),
        ("10B", 10),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    """Decimal units as Hugging Face counts, binary ones with an i."""
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "5XB", "GB", "1e9", "nan"])
def test_bad_sizes(text: str) -> None:
    """A size that is none, or zero, is exit code 2."""
    with pytest.raises(UsageError, match="expected a size"):
        parse_size(text)
