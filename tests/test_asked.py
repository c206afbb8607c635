"""What the public functions pass on: the same keywords, with the same defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import ema_cli
from ema_cli import asked

OTHERS = {"overwrite", "restart", "state", "strict", "executor", "on_event"}
OTHERS |= {"provenance", "stats", "outliers"}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The keywords of a function that say what is asked for, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    keywords = (p for p in parameters if p.kind is not p.VAR_KEYWORD)
    return {p.name: p.default for p in keywords if p.name not in (*OTHERS, "runs")}


@pytest.mark.parametrize("function", [ema_cli.average_run, ema_cli.plan_run])
def test_requests_have_the_defaults_of_the_functions(function: Callable[..., Any]) -> None:
    """Each keyword reaches the request, and what is not given means the same everywhere."""
    assert defaults(asked.request) == defaults(function)


def test_an_export_asks_for_what_a_run_would() -> None:
    """The options that an export shares with a run have the same defaults."""
    run, export = defaults(asked.request), defaults(ema_cli.export)
    shared = export.keys() - {"output", "non_finite"}  # the state is bound to one
    assert {name: export[name] for name in shared} == {name: run[name] for name in shared}
