"""The schemas of docs/schema, and what of them a document shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parent.parent
Schema = Mapping[str, Any]


def _read(name: str) -> dict[str, Any]:
    path = ROOT / "docs" / "schema" / f"{name}.schema.json"
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


DOCUMENTS, PROVENANCE = _read("ema-avg-1"), _read("provenance-1")
_CHECKERS = [(schema, Draft202012Validator(schema)) for schema in (DOCUMENTS, PROVENANCE)]


def means(document: Schema) -> str:
    """Return the name of the definition a document has to be: its constants tell which."""
    found = [
        name for name in _alternatives(DOCUMENTS) if _may_be(DOCUMENTS["$defs"][name], document)
    ]
    assert len(found) == 1, (found, document)
    return found[0]


def _alternatives(schema: Schema) -> list[str]:
    return [_target(reference) for reference in schema["oneOf"]]


def _target(reference: Schema) -> str:
    return str(reference["$ref"]).removeprefix("#/$defs/")


def _may_be(definition: Schema, document: Schema) -> bool:
    """Whether the constants are those of the definition; a state is a name, or null."""
    for name, schema in definition["properties"].items():
        if "const" in schema and document.get(name, ...) != schema["const"]:
            return False
    return definition["properties"].get("state", {}).get("type") != "string" or isinstance(
        document.get("state"), str
    )


def problems(document: Schema, name: str = "", schema: Schema = DOCUMENTS) -> list[str]:
    """Return what is wrong with a document, held to the definition it has to be."""
    [checker] = [checker for known, checker in _CHECKERS if known is schema]
    alone = {**schema, "$ref": f"#/$defs/{name or means(document)}"}
    del alone["oneOf"]
    found = [
        f"{e.json_path}: {e.message}" for e in checker.evolve(schema=alone).iter_errors(document)
    ]
    if not found and not checker.is_valid(document):
        return ["it is more than one of the alternatives"]
    return found


def shown(document: Schema, name: str = "", schema: Schema = DOCUMENTS) -> set[str]:
    """Return the described fields that a document shows, each as ``definition.field``."""
    return set(_shown({"$ref": f"#/$defs/{name or means(document)}"}, document, schema, ""))


def _shown(schema: Schema, value: object, root: Schema, where: str) -> Iterator[str]:
    if "$ref" in schema:
        where = _target(schema)
        schema = root["$defs"][where]
    if isinstance(value, dict):
        for field, inside in schema.get("properties", {}).items():
            if field in value:
                yield f"{where}.{field}"
                yield from _shown(inside, value[field], root, where)
    if isinstance(value, list) and "items" in schema:
        for item in value:
            yield from _shown(schema["items"], item, root, where)


def described(schema: Schema) -> set[str]:
    """Return every field that a schema describes, as ``definition.field``."""
    return {
        f"{name}.{field}"
        for name, definition in schema["$defs"].items()
        for field in definition.get("properties", {})
    }


def objects(schema: object) -> Iterator[dict[str, Any]]:
    """Yield every schema of an object inside a schema."""
    if isinstance(schema, dict):
        if "properties" in schema and isinstance(schema.get("type"), str):
            yield schema
        for inside in schema.values():
            yield from objects(inside)
    elif isinstance(schema, list):
        for inside in schema:
            yield from objects(inside)


def text_of(field: Schema, schema: Schema) -> str:
    """Return the description of a field: its own, or that of what it refers to."""
    return str(field.get("description") or schema["$defs"][_target(field)]["description"])
