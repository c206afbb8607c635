"""The pictures of the documents show what the commands write now, and load nothing."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _script() -> ModuleType:
    path = ROOT / "docs/generate/screenshots.py"
    spec = importlib.util.spec_from_file_location("_screenshots", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCREENSHOTS = _script()

NAMES = [*SCREENSHOTS.COMMANDS, *SCREENSHOTS.PLOTS]


def texts(svg: str) -> list[str]:
    """Return the texts of a picture, from top to bottom."""
    root = ElementTree.fromstring(svg)
    found = (element for element in root.iter() if element.tag.endswith("}text"))
    return ["".join(element.itertext()).replace("\xa0", " ") for element in found]


@pytest.mark.parametrize("name", SCREENSHOTS.COMMANDS)
def test_a_picture_shows_what_its_command_writes(name: str) -> None:
    """`make docs` takes them anew."""
    kept = (SCREENSHOTS.IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert texts(kept) == texts(SCREENSHOTS.picture(name))
    assert SCREENSHOTS.COMMANDS[name].split()[0] in "".join(texts(kept))


@pytest.mark.parametrize("name", SCREENSHOTS.PLOTS)
def test_a_plot_is_what_its_command_draws(name: str) -> None:
    """The texts of it, names and figures; not where each line lies."""
    kept = (SCREENSHOTS.IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert texts(kept) == texts(SCREENSHOTS.drawn(SCREENSHOTS.PLOTS[name]))


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_needs_nothing_from_elsewhere(name: str) -> None:
    """No fonts, styles, images or scripts are loaded."""
    svg = (SCREENSHOTS.IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"]*", svg) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"<script|<image|@import|@font-face|url\((?!#)|href", svg)


def test_every_picture_is_made_and_shown() -> None:
    """None is left over, and each is in a document."""
    files = {path.name for path in SCREENSHOTS.IMAGES.iterdir()}
    assert files == {f"{name}.svg" for name in NAMES}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert [file for file in files if f"images/{file}" not in shown] == []
