"""Roles told by object graphs, held against what TensorFlow and Keras say of the same variables."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from ema_cli.formats.tensorflow import trackable
from ema_cli.formats.tensorflow.objectgraph import Tracked, read_roles
from ema_cli.formats.tensorflow.wire import Malformed, put_bytes, put_number
from ema_cli.tensors import Role

DATA = Path(__file__).resolve().parent.parent / "data" / "tensorflow" / "graphs"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "graphs.json").read_text())
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"

# What the framework does not train, but does not save that: without an optimizer of Keras 3 or
# the lists of a SavedModel nothing in the graph tells it from what is trained.
UNTOLD = {
    "k3_frozen_uncompiled": {
        "model/_functional/_operations/1/_kernel",
        "model/_functional/_operations/1/bias",
    },
    "k3_subclass_uncompiled": {
        "model/first/_kernel",
        "model/first/bias",
        "model/fixed",
        "model/norm/count",
    },
    "k2_legacy_adam_frozen": {
        "model/layer_with_weights-0/kernel",
        "model/layer_with_weights-0/bias",
    },
    "k2_subclass": {
        "model/first/kernel",
        "model/first/bias",
        "model/fixed",
        "model/norm/mean",
        "model/norm/variance",
        "model/norm/count",
    },
    "modules": {"net/b"},
    "modules_with_own_optimizer": {"encoder/b", "decoder/b"},
    "module_saved_model": {"b"},
}


def graph_of(name: str) -> bytes:
    """Return an object graph that TensorFlow wrote."""
    return gzip.decompress((DATA / f"{name}.graph.gz").read_bytes())


def expected_of(name: str) -> dict[str, Role]:
    roles = EXPECTED[name]["roles"]
    return {key: Role(role) for role, keys in roles.items() for key in keys}


def found_in(graph: bytes, untrainable: tuple[int, ...] = ()) -> dict[str, Role]:
    found = read_roles(graph, untrainable)
    assert all(key == tracked.key for key, tracked in found.items())
    return {key.removesuffix(SUFFIX): tracked.role for key, tracked in found.items()}


# ---------------------------------------------------------------------------- real graphs


@pytest.mark.parametrize("name", EXPECTED)
def test_roles_are_those_the_framework_knows(name: str) -> None:
    expected = expected_of(name)
    for key in UNTOLD.get(name, ()):
        assert expected[key] is Role.FIXED
        expected[key] = Role.VARIABLE
    found = found_in(graph_of(name))
    assert found.keys() >= expected.keys()
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", [name for name in EXPECTED if EXPECTED[name]["untrainable"]])
def test_a_saved_model_tells_the_rest(name: str) -> None:
    expected = expected_of(name)
    assert found_in(graph_of(name), tuple(EXPECTED[name]["untrainable"])) == expected


def test_every_kind_of_role_is_among_the_real_graphs() -> None:
    roles = {role for name in EXPECTED for role in expected_of(name).values()}
    assert roles == set(Role) - {Role.SHADOW, Role.BESIDE}


def test_weights_saved_under_the_optimizer_are_told_with_their_names() -> None:
    found = read_roles(graph_of("k3_adam_model_and_optimizer"))
    key = f"optimizer/_trainable_variables/0{SUFFIX}"
    assert found[key] == Tracked(key, "seq/d1/kernel", Role.VARIABLE)


def test_the_tensors_of_a_table_are_no_variables() -> None:
    found = read_roles(graph_of("modules"))
    for part in ("-keys", "-values"):
        assert found[f"net/table/.ATTRIBUTES/table{part}"].role is Role.FIXED


# ---------------------------------------------------------------------------- building


def node(
    *edges: tuple[str, int], key: str = "", full_name: str = "", slots: tuple[bytes, ...] = ()
) -> bytes:
    """Return the field of a graph for a node, saved as a variable when it has a key."""
    content = b"".join(
        put_bytes(1, put_number(1, target) + put_bytes(2, name.encode())) for name, target in edges
    )
    if key:
        texts = (b"VARIABLE_VALUE", full_name.encode(), key.encode())
        content += put_bytes(2, b"".join(put_bytes(n, text) for n, text in enumerate(texts, 1)))
    return put_bytes(1, content + b"".join(put_bytes(3, slot) for slot in slots))


def slot(of: int, name: str, number: int) -> bytes:
    return put_number(1, of) + put_bytes(2, name.encode()) + put_number(3, number)


def leaves(*keys: str) -> bytes:
    return b"".join(node(key=key) for key in keys)


V, S, STATE, C, F = Role.VARIABLE, Role.STATISTICS, Role.OPTIMIZER, Role.COUNTER, Role.FIXED


# ---------------------------------------------------------------------------- rules


def test_of_several_nodes_with_one_key_the_most_variable_counts() -> None:
    edges = (("m", 1), ("optimizer", 2), ("metrics", 3), ("w", 4))
    for last, role in (("w", V), ("moving_mean", S)):
        graph = node(*edges[:3], (last, 4)) + node() + node(("a", 5)) + node(("a", 6))
        assert found_in(graph + leaves("k", "k", "k")) == {"k": role}
    graph = node(*edges[:3]) + node() + node(("a", 4)) + node(("a", 5))
    assert found_in(graph + leaves("k", "k")) == {"k": F}


def test_what_the_model_and_the_optimizer_share_is_the_models() -> None:
    graph = node(("net", 1), ("optimizer", 2)) + node(("w", 3)) + node(("held", 3), ("own", 4))
    assert found_in(graph + leaves("w", "own")) == {"w": V, "own": STATE}


def test_slots_are_optimizer_state_by_whatever_path() -> None:
    slots = (slot(2, "m", 3), slot(2, "average", 4))
    graph = node(("opt", 1), ("w", 2), ("m", 3)) + node(("beta", 5), slots=slots)
    found = found_in(graph + leaves("w", "m", "a", "beta"))
    assert found == {"w": V, "m": STATE, "a": Role.OTHER_SHADOW, "beta": STATE}


def test_names_of_hyperparameters_at_the_root_do_not_make_it_an_optimizer() -> None:
    edges = (("iter", 1), ("learning_rate", 2), ("total", 3), ("count", 4), ("net", 5))
    graph = node(*edges) + leaves("iter", "rate", "total", "count") + node(("w", 6)) + leaves("w")
    expected = {"iter": STATE, "rate": STATE, "total": F, "count": F, "w": V}
    assert found_in(graph) == expected
    # One of a pair alone tells nothing.
    graph = node(("learning_rate", 1), ("total", 2)) + leaves("rate", "total")
    assert found_in(graph) == {"rate": V, "total": V}


def test_counters_count_at_the_root_only() -> None:
    graph = node(("step", 1), ("net", 2), ("save_counter", 3)) + leaves("step")
    graph += node(("step", 4)) + leaves("saves", "gate")
    assert found_in(graph) == {"step": C, "saves": C, "gate": V}


def test_statistics_are_told_by_edge_or_full_name() -> None:
    graph = node(("_moving_mean", 1), ("a", 2), ("b", 3), ("trainable_variables", 4))
    graph += leaves("edge") + node(key="name", full_name="bn/moving_variance")
    graph += node(key="other", full_name="bn/moving_variance_of") + node(("0", 5))
    graph += node(key="trained", full_name="moving_mean")
    assert found_in(graph) == {"edge": S, "name": S, "other": V, "trained": V}


def test_lists_tell_what_is_trained() -> None:
    edges = (("trainable_variables", 1), ("non_trainable_variables", 2), ("variables", 3))
    graph = node(*edges) + node(("0", 4), ("1", 5)) + node(("0", 5), ("1", 6)) + node(("0", 7))
    graph += leaves("trained", "both", "fixed", "unlisted")
    assert found_in(graph) == {"trained": V, "both": V, "fixed": F, "unlisted": V}


def keras_optimizer(*trained: int, at: int) -> bytes:
    """Return an optimizer of Keras 3, its list in node `at`, and that list."""
    optimizer = node(("_iterations", at), ("_variables", at), ("_trainable_variables", at))
    return optimizer + node(*((str(place), number) for place, number in enumerate(trained)))


def test_what_a_keras_optimizer_does_not_list_is_fixed_in_its_model_only() -> None:
    graph = node(("net", 3), ("other", 4), ("opt", 1), ("alone", 8)) + keras_optimizer(5, at=2)
    graph += node(("a", 5), ("b", 6), ("up", 0)) + node(("c", 7)) + leaves("a", "b", "c", "alone")
    assert found_in(graph) == {"a": V, "b": F, "c": V, "alone": V}


def test_an_object_that_holds_models_and_their_optimizer_is_no_model() -> None:
    graph = node(("trainer", 3)) + keras_optimizer(6, at=2)
    graph += node(("opt", 1), ("net", 4), ("teacher", 5)) + node(("a", 6), ("b", 7))
    assert found_in(graph + node(("c", 8)) + leaves("a", "b", "c")) == {"a": V, "b": F, "c": V}


def test_a_model_beside_a_compiled_one_is_not_fixed() -> None:
    graph = node(("model", 3), ("teacher", 4)) + keras_optimizer(5, at=2)
    graph += node(("_compiled_trainable_state", 2), ("optimizer", 1), ("a", 5), ("b", 6))
    assert found_in(graph + node(("c", 7)) + leaves("a", "b", "c")) == {"a": V, "b": F, "c": V}


@pytest.mark.parametrize("state", ["_variables", "_learning_rate"])
def test_an_optimizer_is_known_by_its_state(state: str) -> None:
    graph = node(("opt", 1), ("w", 2)) + node(("_iterations", 3), (state, 4), ("m", 5))
    found = found_in(graph + leaves("w", "n", "s", "m"))
    assert found == {"w": V, "n": STATE, "s": STATE, "m": STATE}


def test_an_optimizer_that_lists_nothing_leaves_all_untold() -> None:
    graph = node(("net", 3), ("optimizer", 1), ("b_optimizer", 4)) + keras_optimizer(5, at=2)
    graph += node(("a", 5), ("b", 6)) + node(("m", 7)) + leaves("a", "b", "m")
    assert found_in(graph) == {"a": V, "b": V, "m": STATE}


def test_the_root_may_be_the_optimizer() -> None:
    graph = node(("_iterations", 1), ("_variables", 2), ("_trainable_variables", 3))
    graph += leaves("iterations") + node(("0", 1), ("1", 4)) + node(("0", 5))
    assert found_in(graph + leaves("m", "w")) == {"iterations": STATE, "m": STATE, "w": V}


def test_a_node_no_path_leads_to_is_a_variable() -> None:
    assert found_in(node() + leaves("w")) == {"w": V}


# ---------------------------------------------------------------------------- hostile graphs


HOSTILE = {
    "no node": (b"", "0 nodes refers to 0"),
    "an edge to nowhere": (node(("a", 1)), "1 nodes refers to 1"),
    "a slot nowhere": (node(slots=(slot(0, "m", 9),)), "1 nodes refers to 9"),
    "a negative node": (put_bytes(1, put_bytes(1, put_number(1, -1))), "node -1"),
    "an enormous node": (put_bytes(1, put_bytes(1, put_number(1, 1 << 40))), "1,099,511,627,776"),
    "a node that is a number": (put_number(1, 7), "wire type 0"),
    "a key that is a number": (put_bytes(1, put_bytes(2, put_number(3, 7))), "wire type 0"),
    "a number that is text": (put_bytes(1, put_bytes(1, put_bytes(1, b"7"))), "wire type 2"),
    "half a node": (node(("a", 0))[:-1], "needs 5 bytes"),
}


@pytest.mark.parametrize("defect", HOSTILE)
def test_hostile_graphs_are_refused(defect: str) -> None:
    graph, words = HOSTILE[defect]
    with pytest.raises(Malformed, match=words):
        read_roles(graph)


def test_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of("variable")
    monkeypatch.setattr(trackable, "GRAPH_LIMIT", len(graph) - 1)
    with pytest.raises(Malformed, match="an object graph of at most 173 bytes, found 174"):
        read_roles(graph)
    monkeypatch.undo()
    # Three nodes, two edges, two keys; eight nodes, five edges, six keys, two slots.
    for name, parts in (("variable", 7), ("v1_adam_in_a_checkpoint", 21)):
        monkeypatch.setattr(trackable, "PART_LIMIT", parts)
        assert read_roles(graph_of(name))
        monkeypatch.setattr(trackable, "PART_LIMIT", parts - 1)
        with pytest.raises(Malformed, match=f"at most {parts - 1} parts"):
            read_roles(graph_of(name))


def test_deep_chains_and_cycles_do_not_recurse() -> None:
    depth = 100_000
    chain = b"".join(node(("next", number + 1), ("root", 0)) for number in range(depth))
    assert found_in(chain + node(("root", 0), key="last")) == {"last": V}
    # The same as one model of an optimizer that lists its last node.
    graph = node(("net", 3), ("opt", 1)) + keras_optimizer(depth + 4, at=2)
    graph += b"".join(node(("next", number + 4), key=f"k{number}") for number in range(depth))
    found = found_in(graph + node(("again", 3), ("last", depth + 4)) + leaves("last"))
    assert found.pop("last") is V
    assert len(found) == depth
    assert set(found.values()) == {F}


def test_mutations_raise_nothing_else() -> None:
    rng = random.Random(7)
    names = list(EXPECTED)
    refused = 0
    for turn in range(2000):
        graph = bytearray(graph_of(names[turn % len(names)]))
        for _ in range(rng.choice((1, 1, 2, 5))):
            at = rng.randrange(len(graph))
            if rng.random() < 0.7:
                graph[at] = rng.choice((0, 0xFF, 0x7F, 0x80, graph[at] ^ 1 << rng.randrange(8)))
            else:
                del graph[at : at + rng.randrange(1, 9)]
        try:
            read_roles(bytes(graph))
        except Malformed:
            refused += 1
    assert 200 < refused < 2000
