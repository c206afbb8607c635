"""Groups of tensors: whole parts of names, as deep as there are few enough."""

from __future__ import annotations

import pytest

from ema_cli.grouping import ALL, MOST, grouped


def groups(*names: str) -> list[str]:
    """Return the groups of some tensors, each once, in order."""
    return list(dict.fromkeys(grouped(names).values()))


def test_a_module_is_what_stands_before_the_last_part() -> None:
    """Both separators count, and a name without any is a group of its own."""
    assert groups("conv1.weight", "conv1.bias", "norm/gamma", "scale") == ["conv1", "norm", "scale"]
    assert groups("model.layers.0.attn.weight", "model.layers.1.attn.weight") == [
        "model.layers.0.attn",
        "model.layers.1.attn",
    ]


def test_levels_become_shallower_until_there_are_few() -> None:
    """The blocks of a language model are told apart, their insides are not."""
    names = [f"model.layers.{k}.{part}.weight" for k in range(32) for part in ("q", "k", "up")]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    found = groups(*names)
    assert len(found) == 35
    assert found[:2] == ["model.layers.0", "model.layers.1"]
    assert found[-3:] == ["model.embed_tokens", "model.norm", "lm_head"]
    deep = [f"model.layers.{k}.weight" for k in range(80)]
    assert groups(*deep, "lm_head.weight") == ["model.layers", "lm_head"]


def test_too_many_first_parts_are_one_group() -> None:
    """Nothing is told apart where every name stands alone."""
    assert groups(*(f"t{k}" for k in range(MOST))) == [f"t{k}" for k in range(MOST)]
    assert groups(*(f"t{k}" for k in range(MOST + 1))) == [ALL]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("layer_with_weights-0/kernel/.ATTRIBUTES/VARIABLE_VALUE", "layer_with_weights-0"),
        ("v/.ATTRIBUTES/VARIABLE_VALUE", "v"),
        (".hidden", ".hidden"),
        ("/", "/"),
        ("", ""),
        ("a..b", "a."),
        ("a.", "a"),
    ],
)
def test_odd_names_have_a_group(name: str, group: str) -> None:
    """TensorFlow's suffix tells of no module, and empty parts are parts."""
    assert grouped([name]) == {name: group}


def test_no_names_have_no_groups() -> None:
    """Nothing in, nothing out."""
    assert grouped([]) == {}
