"""docs/json.md: its tables are what the schemas say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def _script() -> ModuleType:
    path = ROOT / "docs" / "generate" / "documents.py"
    spec = importlib.util.spec_from_file_location("_json_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


def test_the_page_is_what_the_script_makes() -> None:
    """Run `python docs/generate/documents.py` after a change of the schemas."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    assert text == SCRIPT.page(text)


def test_every_definition_has_its_table() -> None:
    """Of both schemas: what they define once, the page tells once."""
    text = SCRIPT.tables()
    names = {
        name for schema in ("ema-avg-1", "provenance-1") for name in SCRIPT.schema(schema)["$defs"]
    }
    headings = [line.removeprefix("### ") for line in text.splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted(names)


def test_what_the_page_asks_jq_for_is_described() -> None:
    """Its filters, which need a program we do not, name fields that the schema has."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    filters = re.findall(r"\| jq (?:-r )?'([^']+)'", text)
    assert len(filters) == 3
    fields = {field for line in filters for field in re.findall(r"\.([a-z_]+)", line)}
    definitions = SCRIPT.schema("ema-avg-1")["$defs"].values()
    assert fields <= {field for one in definitions for field in one.get("properties", {})}
