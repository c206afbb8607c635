"""``--plot FILE.svg``: what is in the picture, and where it may be written."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import cmd, write_checkpoint, write_run

from ema_cli.cli import plotfile
from ema_cli.errors import OutputExists, StorageError
from ema_cli.text import printable
from ema_cli.views.heat import Map
from ema_cli.views.pictures import Panel, picture

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = 'a<script>alert("1")</script>&amp;]]>\x1b[31m\x00\udcff\u202e'


def panels(count: int, steps: Sequence[int], title: str = "ema") -> list[Panel]:
    """Return panels with rising weights."""
    weights = [k + 1.0 for k in range(len(steps))]
    coefficients = [1 / (k + 1) for k in range(len(steps))]
    names = [f"c-{step}" for step in steps]
    note = ["mean age 7 steps"]
    return [Panel(f"{title}-{k}", note, steps, weights, coefficients, names) for k in range(count)]


def texts(root: ET.Element) -> str:
    """Return all that is written in a picture, folded lines joined."""
    return "".join(element.text or "" for element in root.iter(f"{SVG}text"))


def elements(root: ET.Element, name: str) -> list[ET.Element]:
    """Return the elements of a name."""
    return list(root.iter(f"{SVG}{name}"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four checkpoints with two groups of tensors."""
    values = [
        {"layers.0.w": np.full(3, k, np.float32), "layers.1.w": np.full(4, k * k, np.float32)}
        for k in (1, 2, 3, 4)
    ]
    return write_run(tmp_path / "run", values)


# ---------------------------------------------------------------------------- the picture


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("checkpoints", [1, 2, 20, 500])
def test_everything_lies_inside_the_picture(count: int, checkpoints: int) -> None:
    """However many averages and checkpoints; it has a background of its own."""
    steps = [100 * (k + 1) for k in range(checkpoints)]
    maps = [Map("m", "n", steps, ["g"], [[0.5] * checkpoints])]
    root = ET.fromstring(picture("run", panels(count, steps), maps))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    background, *rest = elements(root, "rect")
    assert (background.get("fill"), background.get("width")) == ("#ffffff", f"{width:.2f}")
    assert background.get("height") == root.attrib["height"]
    for one in rest:
        x, y, wide, high = (float(one.attrib[k]) for k in ("x", "y", "width", "height"))
        assert 0 <= x <= x + wide <= width
        assert 0 <= y <= y + high <= height
    for line in elements(root, "polyline"):
        pairs = [pair.split(",") for pair in line.attrib["points"].split()]
        assert len(pairs) == checkpoints
        assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in pairs)
    assert len(elements(root, "polyline")) == count


def test_a_bar_is_as_high_as_its_weight_and_lies_over_its_step() -> None:
    """Heights in proportion, and twice the distance where twice the steps lie between."""
    [panel] = panels(1, [100, 200, 400])
    root = ET.fromstring(picture("run", [panel]))
    bars = [one for one in elements(root, "rect") if len(one)]
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 2, 3], abs=0.01)
    middles = [float(bar.attrib["x"]) + float(bar.attrib["width"]) / 2 for bar in bars]
    assert middles[2] - middles[1] == pytest.approx(2 * (middles[1] - middles[0]), abs=0.05)
    told = [bar[0].text for bar in bars]
    assert told[1] == "c-200, step 200: weight 200.0 %, coefficient 0.5"


def test_a_map_has_a_color_for_each_distance() -> None:
    """The larger the darker, none where there was no update; the largest is told in words."""
    steps = [10, 20, 30]
    one = Map("title", "note", steps, ["first", "second"], [[None, 0.1, 10.0], [None, 0.1, 0.1]])
    root = ET.fromstring(picture("run", panels(1, steps), [one]))
    paths = elements(root, "path")
    colors = [path.attrib["fill"] for path in paths]
    assert len(set(colors)) == 3 and len(paths) == 5
    light = {c: sum(int(c[k : k + 2], 16) for k in (1, 3, 5)) for c in colors}
    assert light[colors[1]] > light[colors[2]]
    assert "most 10 at 30" in texts(root) and "most 0.1 at 20" in texts(root)


def test_odd_numbers_do_no_harm() -> None:
    """Infinite and missing distances, weights that are all zero, one step only."""
    odd = [[None, float("inf"), float("nan")], [None, None, None], [0.0, 0.0, 0.0]]
    one = Map("t", "n", [None, None, None], ["a", "b", "c"], odd)
    panel = Panel("p", [], [5, 5, 5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], ["a", "b", "c"])
    data = picture("run", [panel], [one]).decode()
    assert "nan" not in data
    assert not re.search(r'="-?inf', data)
    assert "no update" in texts(ET.fromstring(data))


def test_names_are_escaped_folded_and_whole() -> None:
    """Markup stays text; control characters, which XML cannot hold, are shown as escapes."""
    long = HOSTILE + "x" * 300
    maps = [Map(long, long, [1, 2], [long], [[1.0, 2.0]])]
    one = panels(1, [1, 2], long)[0]._replace(names=[long, long], notes=[long])
    data = picture(long, [one], maps)
    root = ET.fromstring(data)
    assert b"<script" not in data and b"\x1b" not in data and b"\x00" not in data
    assert texts(root).replace(" ", "").count(printable(long)) >= 5
    width = float(root.attrib["width"])
    assert all(len(t.text or "") * 5 < width for t in elements(root, "text"))


def test_the_picture_needs_nothing_else() -> None:
    """No scripts, links, styles or fonts: plain elements, no address but that of the name space."""
    root = ET.fromstring(picture("run", panels(2, [1, 2]), [Map("m", "n", [1], ["g"], [[1.0]])]))
    known = {"svg", "title", "rect", "text", "line", "polyline", "circle", "path"}
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == known
    attributes = {f"{k}={v}" for element in root.iter() for k, v in element.attrib.items()}
    assert not [a for a in attributes if re.search(r"href|http|url\(|^on|style=", a)]


# ---------------------------------------------------------------------------- commands


def test_plan_writes_weights_and_run_the_drift_too(run: Path, tmp_path: Path) -> None:
    """Data on stdout is what it is without a picture, in every case."""
    words = [run, "--average", "mean", "--average", "ema:0.5"]
    plotted, measured = tmp_path / "plan.svg", tmp_path / "run.svg"
    with_plot = cmd("plan", *words, "--plot", plotted)
    without = cmd("plan", *words)
    assert with_plot.out.splitlines()[:-1] == without.out.splitlines()[:-1]
    assert f"drawn: {plotted}" in with_plot.err
    shown = texts(ET.parse(plotted).getroot())
    assert "effective number of checkpoints 4.0" in shown and "mean age 150 steps" in shown
    assert "ema-0.5: ema:0.5" in shown and "layers" not in shown
    told = cmd("run", *words, "-o", tmp_path / "{average}.safetensors", "--plot", measured)
    assert [line.split()[0] for line in told.out.splitlines()] == ["written", "written"]
    shown = texts(ET.parse(measured).getroot())
    assert "layers.0" in shown and "layers.1" in shown
    assert shown.count("distance of each checkpoint") == 2


def test_a_dry_run_draws_what_plan_draws(run: Path, tmp_path: Path) -> None:
    """Bit for bit, and two pictures of one plan are equal."""
    pictures = [tmp_path / f"{k}.svg" for k in range(3)]
    cmd("plan", run, "--plot", pictures[0])
    cmd("run", run, "-n", "--plot", pictures[1])
    cmd("plan", run, "--plot", pictures[2])
    assert len({path.read_bytes() for path in pictures}) == 1


def test_a_state_has_a_picture(run: Path, tmp_path: Path) -> None:
    """Of all it has averaged so far."""
    path = tmp_path / "s.svg"
    cmd("run", run, "--state", tmp_path / "S", "--decay", "0.5", "--plot", path)
    assert "effective number of checkpoints 2.9" in texts(ET.parse(path).getroot())
    cmd("run", run, "--state", tmp_path / "S", "--decay", "0.5", "--plot", path)
    again = ["run", run, "--state", tmp_path / "S", "--decay", "0.5", "--overwrite"]
    cmd(*again, "--plot", path)
    cmd(*again, "--plot", tmp_path / "S" / "in.svg", code=14)


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("o.png", 2, "expected a name that ends in .svg"),
        (".svg", 2, "expected a name that ends in .svg"),
        ("there.svg", 14, "exists already"),
        ("none/o.svg", 15, "cannot create: No such file or directory"),
        ("there.svg/o.svg", 15, "cannot "),
        ("average.svg", 14, "is the output, or lies inside it"),
    ],
)
def test_a_picture_goes_nowhere_else(
    run: Path, tmp_path: Path, name: str, code: int, text: str
) -> None:
    """Told before the work, which is not done; the hint says what would help."""
    (tmp_path / "there.svg").write_text("mine")
    out = tmp_path / "average.svg"
    words = ["run", run, "-o", out, "--format", "safetensors", "--plot", tmp_path / name]
    told = cmd(*words, code=code).err
    assert text in told
    assert "hint:" in told or code == 15
    assert not out.exists()
    assert (tmp_path / "there.svg").read_text() == "mine"


def test_plan_never_replaces_and_run_does_when_asked(run: Path, tmp_path: Path) -> None:
    """Only a regular file, and never an input."""
    path, out = tmp_path / "p.svg", tmp_path / "o.safetensors"
    path.write_text("mine")
    assert (
        "hint: remove it, or choose another name with --plot"
        in cmd("plan", run, "--plot", path, code=14).err
    )
    assert "--overwrite" in cmd("run", run, "-o", out, "--plot", path, code=14).err
    assert path.read_text() == "mine"
    cmd("run", run, "-o", out, "--plot", path, "--overwrite")
    assert elements(ET.parse(path).getroot(), "polyline")
    link = tmp_path / "l.svg"
    link.symlink_to(path)
    told = cmd("run", run, "-o", out, "--plot", link, "--overwrite", code=14).err
    assert "only a regular file can be replaced" in told
    inputs = [write_checkpoint(tmp_path / f"step-{k}.svg", {"v": np.ones(1)}) for k in (1, 2)]
    before = inputs[0].read_bytes()
    words = ["run", *inputs, "-o", out, "--overwrite", "--plot", inputs[0]]
    assert "is an input" in cmd(*words, code=14).err
    assert inputs[0].read_bytes() == before


def test_the_same_command_again_replaces_its_own_picture(run: Path, tmp_path: Path) -> None:
    """Its output is unchanged, so the job that comes back must not fail on its picture."""
    words = ["run", run, "-o", tmp_path / "o.safetensors", "--plot", tmp_path / "p.svg"]
    cmd(*words)
    first = (tmp_path / "p.svg").read_bytes()
    assert "unchanged" in cmd(*words).out
    assert (tmp_path / "p.svg").read_bytes() == first
    cmd("plan", run, "--plot", tmp_path / "p.svg")  # another picture of ours


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """The name is given only if it is still free; nothing is left beside it."""
    path = tmp_path / "p.svg"
    path.write_text("theirs")
    with pytest.raises(OutputExists, match="exists already"):
        plotfile.save_picture(os.fspath(path), b"<svg/>", overwrite=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.svg"]
    assert path.read_text() == "theirs"


def test_a_directory_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    """Also when it goes during the work."""
    with pytest.raises(StorageError, match="No such file"):
        plotfile.save_picture(os.fspath(tmp_path / "gone" / "p.svg"), b"<svg/>", overwrite=True)
