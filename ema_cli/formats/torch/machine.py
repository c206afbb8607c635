"""Run a pickle without believing it: a machine that can only build inert records.

``pickle.Unpickler`` calls what it is given even when its names are overridden, and allocates what
a few bytes claim. This machine knows no way to import or call: names become `Global`, calls that
torch.save writes for data become that data, all other calls become `Opaque`. Every length is
checked against the bytes that are left, and work and memory are bounded by limits.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from ema_cli.formats.torch.nodes import DEPTH_LIMIT, Global, Opaque, Ordered, TensorRef
from ema_cli.formats.torch.opcodes import STOP, TABLE
from ema_cli.formats.torch.policy import odd_dtypes
from ema_cli.formats.torch.state import State

# Some 36 opcodes make one tensor, so this allows for 460,000 of them.
STEP_LIMIT = 1 << 24

_HOLDERS = frozenset({dict, Ordered, list, tuple, set, frozenset, Opaque})


def load(
    data: bytes | bytearray | memoryview, path: str, what: str, start: int = 0
) -> tuple[Any, int, list[Global]]:
    """Return what the pickle at byte `start` says, where it ends, and every name it mentions.

    `what` is what to call it in errors, e.g. ``"data.pkl"``. What follows its end is up to the
    caller. Raises `DamagedFile` for everything that pickles of PyTorch never do, and
    `UnsupportedInput` for the opcodes of protocols 0 and 1.
    """
    state = State(bytes(data), path, what, start)
    _run(state)
    if len(state.stack) != 1 or state.marks:
        state.fail("expected exactly one object at the end of the pickle")
    root = state.stack[0]
    _check_depth(state, root)
    return root, state.pos, [*state.globals, *odd_dtypes(state.dtypes)]


def _run(state: State) -> None:
    data, table = state.data, TABLE
    try:
        for _ in range(STEP_LIMIT):
            opcode = data[state.pos]
            state.pos += 1
            if opcode == STOP:
                return
            table[opcode](state)
    except struct.error:
        state.fail("the pickle ends in the middle of a number")
    except IndexError:
        # The handlers index only the data and the stack.
        if state.pos >= len(data):
            state.fail("the pickle ends in the middle")
        state.fail("an opcode takes more from the stack than there is")
    state.fail(f"expected at most {STEP_LIMIT:,} opcodes, found more")


def _check_depth(state: State, root: Any) -> None:
    """Check the depth of a walk, in the order of the file, that enters each thing once."""
    seen: set[int] = set()
    waiting = [(root, 1)] if _holds(root) else []
    while waiting:
        node, depth = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if depth > DEPTH_LIMIT:
            state.fail(f"expected at most {DEPTH_LIMIT} levels of nesting, found more")
        inner = [child for child in _children(node) if _holds(child)]
        waiting += [(child, depth + 1) for child in reversed(inner)]


def _holds(node: Any) -> bool:
    if type(node) is TensorRef:
        return node.attributes is not None
    return type(node) in _HOLDERS


def _children(node: Any) -> Sequence[Any]:
    """Return what a node holds, in the order of the file."""
    kind = type(node)
    if kind is dict or kind is Ordered:
        odd = [key for key in node if type(key) is not str]
        attributes = [node.attributes] if kind is Ordered and node.attributes else []
        return [*odd, *node.values(), *attributes]
    if kind is TensorRef:
        return [node.attributes]
    if kind is Opaque:
        return [node.callable, node.args, *node.items, *node.pairs, node.state]
    return tuple(node)
