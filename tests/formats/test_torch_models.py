"""The model inside a PyTorch checkpoint: where it is, and what all tensors are called."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from torch_files import read, ref, saved, state_of

from ema_cli.errors import DamagedFile, Disagreement, UnsupportedInput, UsageError
from ema_cli.formats import torch
from ema_cli.formats.torch import models
from ema_cli.formats.torch.nodes import Global, Opaque, Ordered
from ema_cli.formats.torch.survey import Survey, everything, storages, where
from ema_cli.tensors import Role

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "torch"

W = ref()
STATE = state_of(w=W, b=ref("1"))
OPTIMIZER = {"state": {0: {"exp_avg": ref("2")}}, "param_groups": [{"lr": 0.1}]}


def module(
    parameters: dict[str, Any], modules: dict[str, Any] | None = None, **state: Any
) -> Opaque:
    """Return a pickled module."""
    made = Opaque(Global("networks", "Network"), (), "newobj")
    made.state = {
        "_parameters": parameters,
        "_buffers": state.pop("buffers", {}),
        "_modules": modules or {},
        "_non_persistent_buffers_set": state.pop("passing", set()),
        **state,
    }
    return made


def thing(state: Any = None, **pairs: Any) -> Opaque:
    """Return a pickled object of some class."""
    made = Opaque(Global("argparse", "Namespace"), (), "newobj")
    made.state, made.pairs = state, list(pairs.items())
    return made


def survey_of(root: object) -> Survey:
    return Survey("model.pt", root)


def find(root: object, key: str = "") -> tuple[str, ...]:
    return models.find(survey_of(root), key)


def roles(root: object, key: str = "") -> dict[str, str]:
    survey = survey_of(root)
    found = models.named(survey, models.find(survey, key))
    return {one.name: "model" if one.of_model else one.role.name for one in found}


# ---------------------------------------------------------------------------- finding


@pytest.mark.parametrize(
    ("root", "path"),
    [
        (STATE, ()),
        ({"w": W, "step": 3}, ()),
        ({"w": W, "nested": {"v": ref("1")}}, ()),
        ({"w": W, "optimizer": OPTIMIZER}, ()),
        ([ref("0"), ref("1")], ()),
        ({"rng_state": W}, ()),
        (module({"w": W}), ()),
        ({"model": STATE}, ("model",)),
        ({"model": STATE, "optimizer": OPTIMIZER, "rng": ref("3")}, ("model",)),
        ({"model": module({"w": W}), "optimizer": OPTIMIZER}, ("model",)),
        ({"model": STATE, "state_dict": state_of(v=ref("3"))}, ("state_dict",)),
        ({"model": STATE, "ema": state_of(v=ref("3"))}, ("model",)),
        ({"model": None, "net": STATE}, ("net",)),
        ({"params": STATE, "params_ema": state_of(v=ref("3"))}, ("params",)),
        ({"module": STATE, "buffer_names": ["b"]}, ("module",)),
        ({"model": {"state_dict": STATE, "config": {"a": 1}}}, ("model", "state_dict")),
        ({"checkpoint": {"model": STATE, "optimizer": OPTIMIZER}}, ("checkpoint", "model")),
        ({"model": {"model": {"w": W}, "head": {"w": ref("1")}}}, ("model",)),
        ({"model": {"language_model": {"w": W}}}, ("model",)),
        ({"generator": STATE, "epoch": 3, "sgd": OPTIMIZER}, ("generator",)),
        ({"generator": STATE, "optG": {"x": W}, "best_acc": ref("3")}, ("generator",)),
        ({"generator": STATE, "callbacks": {"x": W}, "lr_schedulers": [W]}, ("generator",)),
        ([STATE, OPTIMIZER], ("0",)),
        (thing({"model": STATE}), ("model",)),
        (thing(None, model=STATE), ("model",)),
    ],
)
def test_the_model_is_found(root: object, path: tuple[str, ...]) -> None:
    assert find(root) == path


def test_several_models_are_listed() -> None:
    root = {"netG": STATE, "netD": state_of(v=ref("3")), "optG": OPTIMIZER}
    with pytest.raises(Disagreement) as caught:
        find(root)
    assert caught.value.message == (
        "model.pt: expected one model, found 2 that may be: netG (2 tensors, 48 bytes), "
        "netD (1 tensor, 24 bytes)"
    )
    assert caught.value.hint == "choose one, such as --key netG, or all of them with --key /"


def test_a_long_list_of_models_is_cut() -> None:
    with pytest.raises(Disagreement, match=r"found 20 that may be: m0 .*, m7 .*, 12 more$"):
        find({f"m{k}": state_of(w=ref(str(k))) for k in range(20)})


@pytest.mark.parametrize(
    ("root", "said"),
    [
        ({"epoch": 3}, "found no tensors"),
        ({}, "found no tensors"),
        (3, "found no tensors"),
        (W, "found a single tensor"),
        (OPTIMIZER, "found only the state of an optimizer"),
        (thing(dict(OPTIMIZER, defaults={})), "found only the state of an optimizer"),
        ({"ema": STATE, "epoch": 3}, r"found only ema \(2 tensors, 48 bytes\)"),
        ({"optimizer": OPTIMIZER}, r"found only optimizer \(1 tensor, 24 bytes\)"),
    ],
)
def test_no_model_is_told(root: object, said: str) -> None:
    with pytest.raises(UnsupportedInput, match=said):
        find(root)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("model", ("model",)),
        ("model.ema", ("model", "ema")),
        ("model/ema", ("model", "ema")),
        ("/model/ema/", ("model", "ema")),
        ("a.b", ("a.b",)),
        ("a.b.c", ("a.b", "c")),
        ("a/x", ("a", "x")),
        ("models.1", ("models", "1")),
        ("nets.7", ("nets", "7")),
        ("/", ()),
        (".", ()),
    ],
)
def test_a_key_is_followed_greedily(key: str, path: tuple[str, ...]) -> None:
    root = {
        "model": {"ema": STATE},
        "a.b": {"c": STATE},
        "a": {"b": 3, "x": STATE},
        "models": [3, STATE],
        "nets": {7: STATE},
    }
    assert find(root, key) == path


@pytest.mark.parametrize("key", ["mdoel", "model.w", "model.x", "epoch", "model.."])
def test_a_key_that_leads_nowhere_lists_what_there_is(key: str) -> None:
    root = {"model": STATE, "epoch": 3, "other": state_of(v=ref("3"))}
    with pytest.raises(UsageError, match="holds no tensors there") as caught:
        find(root, key)
    listed = "it holds model (2 tensors, 48 bytes), other (1 tensor, 24 bytes)"
    assert caught.value.hint.split("; ")[-1] == listed


# ---------------------------------------------------------------------------- names and roles


def test_a_bare_state_dict_is_all_model() -> None:
    assert roles(STATE) == {"w": "model", "b": "model"}


def test_all_else_is_called_by_its_path() -> None:
    root = {
        "model": {"conv.weight": W, "nested": {"v": ref("1")}},
        "optimizer_states": [OPTIMIZER],
        "swa": {"conv.weight": ref("3")},
        "sgd": OPTIMIZER,
        "rng": {"cpu": ref("4"), 0: (ref("5"), {"x": ref("6")})},
    }
    assert roles(root) == {
        "conv.weight": "model",
        "nested.v": "model",
        "optimizer_states/0/state/0/exp_avg": "OPTIMIZER",
        "swa/conv.weight": "BESIDE",
        "sgd/state/0/exp_avg": "OPTIMIZER",
        "rng/cpu": "BESIDE",
        "rng/0/0": "BESIDE",
        "rng/0/1/x": "BESIDE",
    }


def test_names_that_meet_are_told_apart() -> None:
    model = {"a": {"b": ref("0")}, "a.b": ref("1"), "": ref("2"), 3: ref("4"), "3": ref("5")}
    root = {"model": model, "a.b": ref("6"), "/model/a.b": ref("7")}
    assert list(roles(root)) == [
        "a.b",
        "/model/a.b",
        "/model/",
        "3",
        "/model/3",
        "/a.b",
        "//model/a.b",
    ]


def test_many_names_that_meet_take_linear_time() -> None:
    """Keys with slashes in them: 2^13 paths that read alike."""
    node: Any = ref()
    for _ in range(13):
        node = {"a": {"a": node}, "a/a": node}
    start = time.perf_counter()
    found = models.named(survey_of({"model": {"w": W}, "x": node}), ("model",))
    assert len({one.name for one in found}) == 1 + (1 << 13)
    assert time.perf_counter() - start < 2


def test_what_is_beside_a_model_at_the_root() -> None:
    root = {"w": W, "layer": {"v": ref("1")}, "optimizer": {"m": ref("2")}, "ema": {"w": ref("3")}}
    assert roles(root) == {
        "w": "model",
        "layer.v": "model",
        "optimizer/m": "OPTIMIZER",
        "ema/w": "BESIDE",
    }


def test_roles_of_the_model_are_told_by_name() -> None:
    survey = survey_of({"model": {"norm.running_mean": W, "w": ref("1")}})
    found = {one.name: one.role for one in models.named(survey, ("model",))}
    assert found == {"norm.running_mean": Role.STATISTICS, "w": Role.VARIABLE}


def test_a_module_is_named_as_by_its_state_dict() -> None:
    inner = module({"weight": W, "bias": None})
    root = module(
        {"scale": ref("1")},
        {"conv": inner, "again": inner, "none": None},
        buffers=Ordered({"mean": ref("2"), "gone": ref("3")}),
        passing={"gone"},
        attribute=ref("4"),
        hidden={"w": ref("5")},
    )
    root.state["itself"] = [root]
    expected = {
        "scale": "model",
        "mean": "model",
        "gone": "BESIDE",
        "conv.weight": "model",
        "again.weight": "model",
        "attribute": "BESIDE",
        "hidden/w": "BESIDE",
    }
    assert roles(root) == expected
    nested = roles({"model": root})
    assert {name for name, role in nested.items() if role == "model"} == {
        name for name, role in expected.items() if role == "model"
    }
    assert "model/gone" in nested


def test_objects_are_followed_where_they_hold_data() -> None:
    slotted = thing(({"a": ref("1")}, {"b": ref("2")}))
    listing = Opaque(Global("collections", "deque"), (), "reduce")
    listing.items = [ref("3")]
    root = {"model": STATE, "x": slotted, "y": listing, "z": thing(None, k=ref("4"))}
    assert [name for name, role in roles(root).items() if role == "BESIDE"] == [
        "x/a",
        "x/b",
        "y/0",
        "z/k",
    ]


def test_the_same_dict_in_two_places_has_two_names_each() -> None:
    assert roles({"ema": STATE, "model": STATE}) == {
        "ema/w": "BESIDE",
        "ema/b": "BESIDE",
        "w": "model",
        "b": "model",
    }


# ---------------------------------------------------------------------------- growth


def test_many_paths_are_refused_at_once() -> None:
    """Forty lists, each of which holds the one before twice: 2^40 paths."""
    node: Any = [W]
    for _ in range(40):
        node = [node, node]
    start = time.perf_counter()
    with pytest.raises(DamagedFile, match="at most 100,000 tensors"):
        survey_of({"model": node})
    assert time.perf_counter() - start < 1


def test_many_paths_without_tensors_do_not_matter() -> None:
    node: Any = [3]
    for _ in range(40):
        node = [node, node]
    assert find({"model": STATE, "other": node}) == ("model",)


@pytest.mark.parametrize(
    ("levels", "wide"), [(60, {"x" * (1 << 20): [W] * 100}), (150, [W] * 60_000)]
)
def test_long_paths_of_many_tensors_are_refused(levels: int, wide: Any) -> None:
    """A key of a mebibyte is a part of each name below it, as is each level."""
    node = wide
    for _ in range(levels):
        node = [node]
    with pytest.raises(DamagedFile, match="too long"):
        survey_of(node)


def test_nesting_has_an_end() -> None:
    def nested(levels: int) -> Any:
        node: Any = W
        for _ in range(levels):
            node = [node]
        return node

    survey = survey_of(nested(199))
    assert len(next(survey.tensors(survey.root)).path) == 199
    with pytest.raises(DamagedFile, match="200 levels"):
        survey_of(nested(300))


def test_nesting_by_way_of_what_was_seen_before_has_an_end_too() -> None:
    """Each chain is short, and hangs on the end of another."""
    chains: list[Any] = [[W]]
    for _ in range(3):
        node: Any = chains[-1]
        for _ in range(100):
            node = [node]
        chains.append(node)
    with pytest.raises(DamagedFile):
        survey_of(chains)


def test_cycles_are_followed_once() -> None:
    root: dict[str, Any] = {"model": STATE}
    root["self"] = root
    root["list"] = [root, ref("9")]
    assert roles(root) == {"w": "model", "b": "model", "list/1": "BESIDE"}
    assert len(list(storages(root))) == 3


def test_everything_is_met_in_the_order_of_the_pickle() -> None:
    inside = Opaque(Global("a", "b"), (ref("2"),), "reduce")
    root = Ordered({"x": ref("0"), W: 1, "y": [ref("1"), inside, {ref("3")}]})
    root.attributes["_metadata"] = ref("4")
    assert list(storages(root)) == ["0", "1", "2", "3", "4"]
    assert Global("a", "b") in list(everything(root))
    assert where(root, {Global("a", "b")}) == {Global("a", "b"): "y/1"}


# ---------------------------------------------------------------------------- what else is told


@pytest.mark.parametrize(
    ("root", "told"),
    [
        ({"global_step": 7, "step": 3}, (7, "entry global_step")),
        ({"step": 3, "epoch": 9}, (3, "entry step")),
        ({"iteration": 3}, (3, "entry iteration")),
        ({"epoch": 9}, None),
        ({"step": True}, None),
        ({"step": -1}, None),
        ({"step": 1 << 63}, None),
        ({"step": 3.0}, None),
        ({"step": W}, None),
        ({"trainer_state": {"global_step": 4}}, (4, "entry trainer_state/global_step")),
        ({"extra_state": {"num_updates": 4}}, (4, "entry extra_state/num_updates")),
        (
            {"optimizer_history": [{"num_updates": 1}, {"num_updates": 2}]},
            (2, "entry optimizer_history/-1/num_updates"),
        ),
        ({"optimizer_history": []}, None),
        ([1], None),
    ],
)
def test_the_step_is_told(root: object, told: object) -> None:
    assert models.told_step(root) == told


def test_a_state_that_was_averaged_already_is_warned_of() -> None:
    root = {"state_dict": STATE, "averaging_state": {}, "current_model_state": STATE}
    (caution,) = models.cautions(root, ("state_dict",), [])
    assert caution == (
        "already-averaged",
        "state_dict holds weights that training averaged already; the raw ones are in "
        "current_model_state",
        "average those with --key current_model_state",
    )
    assert models.cautions(root, ("current_model_state",), []) == []
    del root["current_model_state"]
    assert models.cautions(root, ("state_dict",), [])[0].hint == ""


# ---------------------------------------------------------------------------- whole files


@pytest.mark.parametrize(
    ("name", "key", "model", "others", "step"),
    [
        ("run/ckpt-40.pt", "", 14, 30, 40),
        ("legacy/model-40.pt", "", 14, 0, None),
        ("lightning/epoch=1-step=40.ckpt", "", 8, 15, 40),
        ("lightning-ema/epoch=1-step=40.ckpt", "", 8, 24, 40),
        ("lightning-ema/epoch=1-step=40.ckpt", "current_model_state", 8, 24, 40),
        ("hf/checkpoint-10/pytorch_model-00002-of-00002.bin", "", 7, 0, None),
        ("whole/model-10.pt", "", 8, 0, None),
        ("gan/gan-10.pt", "netG", 4, 28, 10),
    ],
)
def test_real_checkpoints(name: str, key: str, model: int, others: int, step: int | None) -> None:
    checkpoint = torch.read(str(FIXTURES / name), {}, key)
    index = checkpoint.index
    aside = (Role.OPTIMIZER, Role.BESIDE)
    beside = sum(role in aside for role in index.roles.values())
    assert (len(index.tensors) - beside, beside) == (model, others)
    assert (checkpoint.told_step or (None,))[0] == step


def test_ties_have_equal_extents() -> None:
    by_name = torch.read(str(FIXTURES / "run" / "ckpt-10.pt"), {}).index.by_name
    assert by_name["embedding.weight"].extent == by_name["head.weight"].extent


def test_prefixes_of_wrappers_are_kept(tmp_path: Path) -> None:
    root = {"model": {"_orig_mod.module.w": ref()}}
    assert list(read(tmp_path / "a.pt", saved(root)).index.by_name) == ["_orig_mod.module.w"]
