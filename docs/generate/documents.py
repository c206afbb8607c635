"""Write the tables of docs/json.md from the schemas in docs/schema.

    python docs/generate/documents.py

`make docs` runs it, and tests/test_json_page.py holds the page to what it makes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent
PAGE = DOCS / "json.md"
BEGIN = "<!-- Made by docs/generate/documents.py from the schemas; do not edit below. -->\n"
_REFERENCE = "#/$defs/"

Schema = Mapping[str, Any]


def schema(name: str) -> dict[str, Any]:
    """Return a schema of docs/schema."""
    text = (DOCS / "schema" / f"{name}.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def page(text: str) -> str:
    """Return the page `text` with its tables made anew."""
    return text.partition(BEGIN)[0] + BEGIN + tables()


def tables() -> str:
    """Return a heading and a table for each document and each object inside one."""
    documents, provenance = schema("ema-avg-1"), schema("provenance-1")
    parts = [part for name in _named(documents) for part in _definition(documents, name, 3)]
    inside = _inside(documents, _named(documents))
    kept = _named(provenance) + _inside(provenance, _named(provenance))
    alone = [name for name in kept if name not in inside]
    return "\n".join(
        [
            "\n## Fields of the documents\n",
            "All of them have `type` and `schema`.\n",
            *parts,
            "## Fields inside them\n",
            *(part for name in inside for part in _definition(documents, name, 3)),
            "## Fields of OUT.ema.json\n",
            *(part for name in alone for part in _definition(provenance, name, 3)),
        ]
    )


def _named(root: Schema) -> list[str]:
    return [_target(one) for one in root["oneOf"]]


def _target(reference: Schema) -> str:
    return str(reference["$ref"]).removeprefix(_REFERENCE)


def _inside(root: Schema, names: list[str]) -> list[str]:
    """Return what the definitions `names` refer to, and what that refers to, in that order."""
    found: list[str] = []
    ahead = list(names)
    while ahead:
        for name in _references(root["$defs"][ahead.pop(0)]):
            if name not in found:
                found.append(name)
                ahead.append(name)
    return found


def _references(node: object) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "$ref" in node:
            yield _target(node)
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _definition(root: Schema, name: str, level: int) -> list[str]:
    """Return the heading, description and table of one definition."""
    definition = root["$defs"][name]
    lines = [f"{'#' * level} {name}\n", f"{_cell(definition['description'])}\n"]
    properties = definition.get("properties")
    if properties:
        lines += ["| field | type | meaning |", "|---|---|---|"]
        lines += [
            f"| `{field}` | {_type(inside)} | {_cell(_meaning(root, inside))} |"
            for field, inside in properties.items()
            if (field, level) not in (("type", 3), ("schema", 3)) or inside.get("const") is None
        ]
    else:
        lines.append(f"An object: a name, and {_type(definition['additionalProperties'])}.")
    return [*lines, ""]


def _meaning(root: Schema, inside: Schema) -> str:
    own = inside.get("description")
    return str(own or root["$defs"][_target(inside)]["description"])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _type(inside: Schema) -> str:
    """Return what a value may be, in words."""
    if "$ref" in inside:
        return f"[{_target(inside)}](#{_target(inside).lower()})"
    if "const" in inside:
        return f"`{json.dumps(inside['const'])}`"
    if "enum" in inside:
        return " or ".join(f"`{json.dumps(word)}`" for word in inside["enum"])
    types = [inside["type"]] if isinstance(inside["type"], str) else list(inside["type"])
    if types[0] == "array":
        types[0] = f"array of {_items(inside)}"
    return " or ".join(types)


def _items(inside: Schema) -> str:
    items = inside.get("items") or {}
    if "prefixItems" in items:
        return "pairs"
    return _type(items)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
