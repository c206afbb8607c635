"""The reference of the Python API: made from docstrings, up to date, and nothing left out of it."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import ema_cli
from ema_cli import errors

ROOT = Path(__file__).resolve().parent.parent


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_api_page", ROOT / "docs/generate/api.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


API = _script()
FUNCTIONS = {name: member for name, member in API.public().items() if not inspect.isclass(member)}
RESULTS = {cls.__name__: cls for _, cls in API.results()}
CALLS = {
    **FUNCTIONS,
    "ExponentialMovingAverage": ema_cli.ExponentialMovingAverage,
    **{
        f"ExponentialMovingAverage.{name}": method
        for name, method in API.methods(ema_cli.ExponentialMovingAverage).items()
        if not isinstance(method, property)
    },
}

each_call = pytest.mark.parametrize("name", CALLS)
each_result = pytest.mark.parametrize("name", RESULTS)


def parameters(function: object) -> set[str]:
    """Return the names of the parameters a caller can give."""
    assert callable(function)
    return set(inspect.signature(function).parameters) - {"self"}


def test_the_page_is_what_the_script_makes() -> None:
    """docs/api.md is up to date; `make docs` makes it anew."""
    assert API.PAGE.read_text(encoding="utf-8") == API.page()


def test_every_public_name_is_on_the_page() -> None:
    """Everything in ``__all__``, and every error."""
    text = API.PAGE.read_text(encoding="utf-8")
    missing = [name for name in ema_cli.__all__ if f"# {name}\n" not in text]
    assert missing == []
    defined = [value for value in vars(errors).values() if inspect.isclass(value)]
    kinds = [kind.__name__ for kind in defined if issubclass(kind, errors.EmaError)]
    assert {"EmaError", "DamagedFile"} < set(kinds)
    assert [kind for kind in kinds if f"| `{kind}` |" not in text] == []


@each_call
def test_every_parameter_is_described(name: str) -> None:
    """Each parameter in Args, and no other."""
    told = API.documented(CALLS[name])
    assert parameters(CALLS[name]) - told == set()
    own = {one for one, _ in API.parsed(CALLS[name]).sections.get("Args", ())}
    assert own - parameters(CALLS[name]) == set()


@each_call
def test_what_comes_back_and_what_is_raised_is_described(name: str) -> None:
    """A summary, Returns where something comes back, Raises where an error may be met."""
    function = CALLS[name]
    doc = API.parsed(function)
    assert doc.text[0].endswith(".")
    returns = inspect.signature(function).return_annotation
    says = doc.text[0].startswith("Return ") or "Returns" in doc.sections
    assert says or returns in ("None", inspect.Signature.empty)
    quiet = {"average", "average_name", "variables_to_restore"}
    assert "Raises" in doc.sections or name.rpartition(".")[2] in quiet


@each_result
def test_every_field_and_method_of_a_result_is_described(name: str) -> None:
    """Attributes tells of each field and of nothing else; methods have docstrings."""
    cls = RESULTS[name]
    told = {one for one, _ in API.parsed(cls).sections.get("Attributes", ())}
    assert told == set(API.fields(cls))
    assert [member for member, value in API.methods(cls).items() if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_that_functions_return_are_on_the_page(name: str) -> None:
    """Every class of this package in a return annotation is one of the results."""
    returned = str(inspect.signature(FUNCTIONS[name]).return_annotation)
    words = [word.strip() for word in returned.replace("list[", "").replace("]", "").split("|")]
    assert set(words) <= set(RESULTS)


def test_docstrings_are_read_as_they_are_written() -> None:
    """Sections, items over several lines, and text after them."""

    def example() -> None:
        """Do it.

        Args:
            a: one
                more.
            b, c: two.

        Returns:
            Nothing: much.

        After.
        """

    doc = API.parsed(example)
    assert doc.text == ["Do it.", "", "After."]
    assert doc.sections["Args"] == [("a", "one more."), ("b, c", "two.")]
    assert doc.sections["Returns"] == [("", "Nothing: much.")]
