"""What `--json` writes, held to docs/schema: every line of every command, in many situations.

The situations run in order in one directory, as a user's day would. What a schema describes and
no situation shows is a mistake too: the schema must not promise what is never written.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import Outcome, cmd, write_run
from jsonschema import Draft202012Validator
from schemas import DOCUMENTS, PROVENANCE, described, objects, problems, shown, text_of
from situations import HALF, HOSTILE, SITUATIONS, Done, spend, values

from ema_cli import running
from ema_cli.cli import cli, plotfile
from ema_cli.errors import StorageError
from ema_cli.provenance import SUFFIX
from ema_cli.views import Out


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Done]]:
    """Every situation, carried out once; the directory they left."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("day"))
    try:
        yield spend()
    finally:
        os.chdir(before)


each_situation = pytest.mark.parametrize("name", SITUATIONS)


@each_situation
def test_every_line_is_a_document_of_the_schema(name: str, day: dict[str, Done]) -> None:
    """One object per line, with a type and the number of the schema; nothing else on stdout."""
    assert day[name].documents
    for document in day[name].documents:
        assert problems(document) == [], document
        assert document["schema"] == 1


@each_situation
def test_the_last_document_is_the_result_or_the_error(name: str, day: dict[str, Done]) -> None:
    """And only the last; an error holds the exit code, a result the command."""
    done = day[name]
    *before, last = done.documents
    assert {document["type"] for document in before}.isdisjoint({"result", "error"})
    if last["type"] == "error":
        assert last["code"] == done.code
    else:
        ran = "plan" if "-n" in done.words and "run" in done.words else done.words[0]
        assert last["command"] == ran.strip("-").replace("json", "version")
        assert done.code in (0, 3, 13)


def test_every_command_is_among_the_situations(day: dict[str, Done]) -> None:
    """Each has a result, and each has an error."""
    last = [(done.words[0], done.documents[-1]["type"]) for done in day.values()]
    for command in cli.commands:
        assert {kind for ran, kind in last if ran == command} == {"result", "error"}, command


# ---------------------------------------------------------------------------- the schemas


@pytest.mark.parametrize("schema", [DOCUMENTS, PROVENANCE], ids=["documents", "provenance"])
def test_the_schema_is_strict_and_described(schema: dict[str, Any]) -> None:
    """Every object lists its fields, with their meaning, and allows no others; all are required.

    But for the distances, which only a run with --stats keeps.
    """
    Draft202012Validator.check_schema(schema)
    found = list(objects(schema))
    assert len(found) > 10
    for one in found:
        optional = [field for field in one["properties"] if field not in one["required"]]
        assert [*one["required"], *optional] == list(one["properties"])
        assert optional in ([], ["distances"])
        assert one["additionalProperties"] is False
        assert one["description"].endswith(".")
        for field, inside in one["properties"].items():
            assert text_of(inside, schema).endswith("."), field


def test_what_both_schemas_describe_they_describe_alike() -> None:
    """A plan shows what will be the provenance: the parts are the same word for word."""
    one, two = DOCUMENTS["$defs"], PROVENANCE["$defs"]
    shared = one.keys() & two.keys()
    assert shared >= {"average", "request", "input"}
    for name in shared:
        assert one[name] == two[name], name


def test_every_field_that_is_described_was_seen(day: dict[str, Done]) -> None:
    """In at least one document of the day: nothing is promised that is never written."""
    seen = [shown(document) for done in day.values() for document in done.documents]
    assert sorted(described(DOCUMENTS) - set().union(*seen)) == []


def test_every_provenance_is_of_its_schema(day: dict[str, Done]) -> None:
    """Those of all formats; and every field that is described is in one of them."""
    assert day
    seen, formats = set(), set()
    for path in Path().rglob(f"*{SUFFIX}"):
        document = json.loads(path.read_bytes())
        name = "renamed" if "renamed" in document else "averaged"
        assert problems(document, name, PROVENANCE) == [], path
        seen |= shown(document, name, PROVENANCE)
        formats.add(document["output"]["format"])
    assert formats >= {"safetensors", "safetensors-folder", "tensorflow", "torch", "npz", "keras"}
    assert sorted(described(PROVENANCE) - seen) == []


# ---------------------------------------------------------------------------- names, numbers


def test_names_are_raw(day: dict[str, Done]) -> None:
    """Nothing is escaped but as JSON has it; what is no UTF-8 can be had back byte for byte."""
    (found,) = day["inspect of hostile names"].documents
    assert [row["tensor"] for row in found["tensors"]] == [HOSTILE, "b"]
    text = day["run of names that are no UTF-8"].out
    assert text.isascii()
    assert "r\\udcffn.safetensors" in text
    (output,) = json.loads(text.splitlines()[-1])["outputs"]
    assert os.fsencode(output["path"]) == b"r\xffn.safetensors"
    assert os.path.exists(output["path"])


def test_what_is_no_number_is_null(day: dict[str, Done]) -> None:
    """JSON knows neither NaN nor infinity."""
    rows = {d["tensor"]: d for d in day["diff of infinities"].documents[-1]["differences"]}
    assert (rows["w"]["max_abs"], rows["w"]["max_rel"]) == (None, None)


def test_the_last_document_of_an_interrupted_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the plan comes an error with code 130."""
    run = write_run(tmp_path / "run", [values(1), values(2)])

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run_plan", interrupted)
    words = ("run", run, *HALF, "-o", tmp_path / "o.npz", "--json")
    plan, error = map(json.loads, cmd(*words, code=130).out.splitlines())
    assert (plan["type"], error["type"], error["code"]) == ("plan", "error", 130)
    assert problems(plan) == problems(error) == []


def test_each_document_is_written_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who follows a run reads its plan before the work begins, however little that is."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, "utf-8"))
    out = Out(as_json=True)
    out.line("nothing")
    out.document("plan", kind="x")
    assert raw.getvalue() == b'{"type": "plan", "schema": 1, "kind": "x"}\n'


@pytest.mark.parametrize("state", [False, True])
def test_what_fails_after_the_outputs_is_an_error_and_no_result(
    state: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture that cannot be written: the outputs stand, and the last document is an error."""
    run, out = write_run(tmp_path / "run", [values(1), values(2)]), tmp_path / "o.npz"

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("p.svg: cannot write: No space left on device")

    monkeypatch.setattr(plotfile, "save", full)
    words = ["run", run, *HALF, "-o", out, "--plot", tmp_path / "p.svg", "--json"]
    words += ["--state", tmp_path / "state"] if state else []
    *before, last = map(json.loads, cmd(*words, code=15).out.splitlines())
    assert (last["type"], last["code"]) == ("error", 15)
    assert [document["type"] for document in before] == ["applied" if state else "plan"]
    assert out.exists()


def test_a_usage_error_is_a_document_where_the_environment_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EMA_AVG_PLAN_JSON=1 and a file's json = true count before the other options make sense."""
    config = tmp_path / "c.toml"
    config.write_text("[plan]\njson = true\n")
    outcomes: list[Outcome] = [cmd("plan", "--config", config, "--workers", "none", "x", code=2)]
    monkeypatch.setenv("EMA_AVG_PLAN_JSON", "1")
    outcomes.append(cmd("plan", "--bogus", code=2))
    for outcome in outcomes:
        (error,) = map(json.loads, outcome.out.splitlines())
        assert (error["type"], error["code"]) == ("error", 2)


@pytest.mark.parametrize(
    "more",
    [
        {"x": json.loads("[" * 600 + "]" * 600)},
        {"average": 5},
        {"average": {"spec": 1e999}, "inputs": 7},
        {"inputs": None, "average": []},
    ],
    ids=["deep", "a number", "infinity", "nothing"],
)
def test_a_strange_provenance_does_no_harm(more: dict[str, Any], tmp_path: Path) -> None:
    """Anybody may have written it; what it says is shown, or it is taken for none."""
    run, out = write_run(tmp_path / "run", [values(1), values(2)]), tmp_path / "o.npz"
    cmd("run", run, *HALF, "-o", out)
    path = Path(f"{out}{SUFFIX}")
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    (document,) = map(json.loads, cmd("inspect", out, "--json").out.splitlines())
    assert problems(document) == []
    assert (document["provenance"] is None) is ("x" in more)
