"""Every class of error and every code of a warning, as docs/errors.md shows it.

The page is what docs/generate/errors.py makes; tests/test_docs.py holds each of its commands to the
exact output and exit code that it shows.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from documents import ROOT, Example, examples, execute, prepare

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


def load() -> ModuleType:
    """Return the generator as a module."""
    spec = importlib.util.spec_from_file_location(
        "errors_page", ROOT / "docs" / "generate" / "errors.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MADE = load()
CLASSES = MADE.classes()
NAMES = [kind.__name__ for kind in CLASSES]


def section(title: str) -> list[Example]:
    """Return the commands under a heading of the page."""
    _, _, rest = PAGE.partition(f"# {title}\n")
    return examples(re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0])


def is_hinted(output: str) -> bool:
    """Whether an error is one line, a blank one, and a hint, with no period at an end."""
    lines = output.splitlines()
    at = next(k for k, line in enumerate(lines) if line.startswith("ema-avg: error: "))
    return (
        lines[at + 1] == ""
        and lines[at + 2].startswith("hint: ")
        and not any(line.endswith(".") and not line.endswith("...") for line in lines[at:])
    )


# ---------------------------------------------------------------------------- the page


def test_the_page_is_what_the_generator_makes() -> None:
    """With the outputs it shows, which tests/test_docs.py compares with those of the commands."""
    shown = examples(PAGE)
    assert [e.command for e in shown] == [MADE._EXIT.sub("", line) for line in MADE.commands()]
    assert MADE.page([example.output for example in shown]) == PAGE


def test_every_class_has_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without fails the generator; what has none says why."""
    assert {"EmaError", "UsageError", "DamagedFile", "Outlier", "Stopped"} <= set(NAMES)
    assert set(NAMES) == set(MADE.ERRORS) | ({"EmaError"} & set(MADE.WITHOUT_EXAMPLE))
    errors = {name: blocks for name, blocks in MADE.ERRORS.items() if name != "Locked"}
    monkeypatch.setattr(MADE, "ERRORS", errors)
    with pytest.raises(SystemExit, match="Locked: expected an example"):
        MADE.commands()


@pytest.mark.parametrize("kind", CLASSES[1:], ids=NAMES[1:])
def test_the_examples_end_with_the_codes_of_their_class(kind: type) -> None:
    """One line, a hint, and an exit code of the class for each block."""
    shown = [example for example in section(kind.__name__) if example.code]
    assert shown
    for example in shown:
        assert example.code in MADE.codes_of(kind)
        assert is_hinted(example.output), example.command


def test_every_code_of_a_warning_has_an_example_that_shows_it() -> None:
    """All that occur in the source, with what they mean."""
    codes = MADE.warning_codes()
    assert {"first-dominates", "disk-space", "already-averaged", "output-exists"} <= codes
    assert codes == set(MADE.WARNINGS) | (set(MADE.WITHOUT_EXAMPLE) - set(NAMES))
    assert codes <= set(MADE.MEANINGS)
    for code in MADE.WARNINGS:
        assert any(f" [{code}]\n" in example.output for example in section(code)), code


# ---------------------------------------------------------------------------- the classes


def test_each_example_raises_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback that ``EMA_AVG_DEBUG=1`` shows names the class of the section."""
    prepare(tmp_path)
    monkeypatch.setenv("EMA_AVG_DEBUG", "1")
    for name in NAMES:
        for example in section(name) if name != "Stopped" else ():
            done = execute(example, tmp_path)
            assert done.returncode == example.code, f"{example.shown}\n{done.stdout}"
            if example.code:
                raised = re.findall(r"^ema_cli\.[\w.]+\.([A-Z]\w+): ", done.stdout, re.MULTILINE)
                assert raised[-1:] == [name], f"{example.shown}\n{done.stdout}"


@pytest.mark.parametrize("kind", CLASSES, ids=NAMES)
def test_every_class_knows_what_to_do(kind: type) -> None:
    """Where an error is given no hint it has that of its class, one line without a period."""
    error = kind("where", 1, "") if kind.__name__ == "Stopped" else kind("where", "what")
    assert error.hint or kind.__name__ == "Stopped"
    assert "\n" not in error.hint and not error.hint.endswith(".")


def test_the_environment_is_no_part_of_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator runs them without the settings of whoever runs it."""
    monkeypatch.setenv("EMA_AVG_PLAN_LAST", "many")
    assert MADE.run(["ema-avg plan fixtures/npz/run --average mean > /dev/null"]) == [""]
    with pytest.raises(SystemExit, match="exit code 2"):
        MADE.run(["EMA_AVG_PLAN_LAST=many ema-avg plan fixtures/npz/run"])
