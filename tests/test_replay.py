"""A request survives its way through provenance: the same plan, whatever was asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_run

import ema_cli
from ema_cli import plan as planning
from ema_cli import record, replay
from ema_cli.averages import Weights
from ema_cli.errors import DamagedFile
from ema_cli.plan import Request
from ema_cli.search import Choice

ASKED: list[dict[str, Any]] = [
    {},
    {"decay": 0.9},
    {"decay": "0.1/step", "num_updates": "step"},
    {"decay": 0.30000000000000004, "num_updates": "count", "init": "zeros"},
    {"decay": 0.5, "zero_debias": True, "names": "shadow"},
    {"average": ["half-life:123.456"]},
    {"average": ["x=mean@last=2"]},
    {"average": ["a.b_c-1=power:0.1@100:200"]},
    {"average": ["lr:1-sqrt@:200"]},
    {"average": ["weights:WEIGHTS"]},
    {"average": ["w=weights:WEIGHTS@last=3"]},
    {"decay": 0.9, "like": "torch"},
    {"decay": 0.9, "like": "keras", "statistics": "average"},
    {"decay": 0.9, "shadow_dtype": "same", "non_finite": "allow"},
    {"decay": 0.9, "select": [("exclude", "*"), ("include", "b"), ("exclude", "nosuch*")]},
    {"decay": 0.9, "names": "shadow", "name": "avg", "keep_variables": True},
    {"decay": 0.9, "rule": [("^", "m/"), (r"(\w)$", r"\1x")], "dtype": "float64"},
    {"decay": 0.9, "format": "safetensors-folder", "max_shard_size": "1KB"},
    {"decay": 0.9, "format": "torch", "optimizer": "keep", "unknown": "drop"},
    {"decay": 0.9, "step_from": r"step-(\d+)", "statistics": "copy"},
    {"decay": 0.9, "last": 2},
    {"decay": 0.9, "steps": "100:200"},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints, and weights for them."""
    values = [{"a": np.float32([k]), "b": np.float32([2 * k]), "nosuch1": k} for k in (1, 2, 3)]
    (tmp_path / "WEIGHTS").write_text(
        "# by hand\n100 0.1\nmodel-step-200.safetensors, 3\n  300\t1e-300\n"
    )
    return write_run(tmp_path / "run", values)


def plan_of(run: Path, asked: dict[str, Any]) -> planning.Plan:
    """The plan of a run, with the paths in its averages filled in."""
    weights = str(run.parent / "WEIGHTS")
    specs = [spec.replace("WEIGHTS", weights) for spec in asked.get("average", [])]
    return ema_cli.plan_run(run, run.parent / "out-{average}", **{**asked, "average": specs})


def again(document: Any, paths: list[str]) -> Request:
    """The request of a document that was written and read."""
    found = replay.request_of(json.loads(json.dumps(document)), paths, "o.ema.json")
    assert found is not None
    return found


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_request_comes_back(run: Path, asked: dict[str, Any]) -> None:
    """Equal in all that counts, and it leads to the same plan without the weights file."""
    plan = plan_of(run, asked)
    [outcome] = plan.outcomes
    document = record.describe(plan, outcome)
    digest = record.plan_digest(document, outcome)
    (run.parent / "WEIGHTS").unlink()
    paths = [row["path"] for row in document["inputs"]]
    found = again(document, paths)
    asked_for = plan.request
    choice = Choice(
        step_from=asked_for.choice.step_from,
        order=asked_for.choice.order,
        key=asked_for.choice.key,
    )
    assert found == dataclasses.replace(
        asked_for, paths=tuple(paths), output=None, implicit=False, choice=choice, workers=1
    )
    made = planning.make(dataclasses.replace(found, output=asked_for.output))
    [other] = made.outcomes
    assert record.plan_digest(record.describe(made, other), other) == digest
    assert other.weights == outcome.weights


def test_each_average_has_its_own(run: Path) -> None:
    """Of several averages a document records one."""
    plan = plan_of(run, {"average": ["mean", "b=ema:0.5", "weights:WEIGHTS"], "init": "zeros"})
    for outcome in plan.outcomes:
        found = again(record.describe(plan, outcome), ["x"])
        assert found.averages == (outcome.average,)
    assert isinstance(plan.outcomes[2].average.family, Weights)


def test_the_request_is_no_part_of_the_digest(run: Path) -> None:
    """What two plans share is told by what they would do."""
    plan = plan_of(run, {"decay": 0.5})
    [outcome] = plan.outcomes
    document = record.describe(plan, outcome)
    digest = record.plan_digest(document, outcome)
    assert record.plan_digest({**document, "request": None}, outcome) == digest


def test_a_document_without_a_request() -> None:
    """Earlier versions wrote none."""
    assert replay.request_of({}, ["x"], "o.ema.json") is None


WRONG: list[Any] = [
    None,
    True,
    1,
    1.5,
    float("nan"),
    "",
    "nosuch",
    [],
    {},
    [1],
    [[]],
    [["a"]],
    {"a": 1},
]


def test_what_is_no_request_is_damaged(run: Path) -> None:
    """Each member in turn is missing or something else: refused, or a request all the same."""
    plan = plan_of(run, {"average": ["weights:WEIGHTS"], "select": [("exclude", "b")]})
    document = record.describe(plan, plan.outcomes[0])
    text = json.dumps(document["request"])
    inner = [("average", key) for key in document["request"]["average"]]
    refused = 0
    for way in [*((key,) for key in document["request"]), *inner]:
        for value in [*WRONG, "missing"]:
            changed = json.loads(text)
            place = changed["average"] if len(way) == 2 else changed
            place[way[-1]] = value
            if value == "missing":
                del place[way[-1]]
            try:
                found = replay.request_of({"request": changed}, ["x"], "o.ema.json")
            except DamagedFile as error:
                assert str(error).startswith("o.ema.json: request")
                refused += 1
            else:
                assert isinstance(found, Request)
    assert refused > 200


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [["1", 0.0]],
        [["1", -1.0]],
        [["1", float("inf")]],
        [["1", float("nan")]],
        [["1", 1.0], ["1", 2.0]],
        [["1"]],
        [[1, 1.0]],
        [["1", 1]],
        [["1", 10**400]],
        "1 1",
        {"1": 1.0},
    ],
    ids=lambda rows: str(rows)[:40],
)
def test_what_is_no_table_of_weights(run: Path, rows: Any) -> None:
    """The rows of a weights file are what such a file can hold."""
    plan = plan_of(run, {"average": ["weights:WEIGHTS"]})
    document = record.describe(plan, plan.outcomes[0])
    document["request"]["average"]["weights"] = rows
    with pytest.raises(DamagedFile, match=r"request\.average\.weights: expected"):
        replay.request_of(document, ["x"], "o.ema.json")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"spec": "mean", "weights": None, "zero_debias": True}, "no meaning"),
        ({"spec": "mean", "weights": None, "num_updates": "count"}, "no meaning"),
        ({"spec": "ema:0.5", "weights": None, "zero_debias": True}, "zeros"),
        ({"spec": "ema:0.5", "weights": [["1", 1.0]]}, "table"),
        ({"spec": "ema:5", "weights": None}, "decay lies in"),
        ({"spec": "mean@last=0", "weights": None}, "empty"),
        ({"spec": "", "weights": None}, "no average"),
        ({"label": "a=b", "weights": None, "spec": "mean"}, "no average"),
        ({"label": "..", "weights": None, "spec": "mean"}, "label"),
        ({"label": "", "weights": None, "spec": "mean"}, "average|label"),
    ],
)
def test_averages_that_cannot_be(run: Path, given: dict[str, Any], words: str) -> None:
    """What the command line would refuse is refused here."""
    plan = plan_of(run, {"average": ["weights:WEIGHTS"]})
    document = record.describe(plan, plan.outcomes[0])
    document["request"]["average"] |= given
    with pytest.raises(DamagedFile, match=words):
        replay.request_of(document, ["x"], "o.ema.json")


def test_a_framework_computes_only_its_own_averages(run: Path) -> None:
    """PyTorch has no average of given weights."""
    plan = plan_of(run, {"average": ["weights:WEIGHTS"]})
    document = record.describe(plan, plan.outcomes[0])
    document["request"]["like"] = "torch"
    with pytest.raises(DamagedFile, match="--like torch"):
        replay.request_of(document, ["x"], "o.ema.json")
