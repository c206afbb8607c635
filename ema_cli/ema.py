"""`ExponentialMovingAverage`: TensorFlow's class, over checkpoints instead of variables."""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np

from ema_cli import kernel
from ema_cli.errors import Disagreement, UsageError
from ema_cli.formats import safetensors
from ema_cli.hints import did_you_mean
from ema_cli.naming import SHADOW_NAME, lowered, shadow_of, unique_name
from ema_cli.reading import ArrayReader, Source, TensorReader, Values
from ema_cli.schedules import debias_factor, local_step, one_minus_decay
from ema_cli.specs import meant_decay
from ema_cli.states import shadows
from ema_cli.states.binding import CLASS, Binding
from ema_cli.states.own import Own, own_of
from ema_cli.states.records import AVERAGE, BIASED, COPY, LOCAL_STEP, Held, Manifest
from ema_cli.states.settings import CLASS_LABEL
from ema_cli.states.shadows import ShadowStore, SlotWriter
from ema_cli.tensors import Checkpoint, DType, Extent, describe, numpy_dtype
from ema_cli.text import shorten

NumUpdates = int | str | Callable[[], int] | None

_BLOCK_ELEMENTS = 1 << 18
# What TensorFlow allows in the name of a scope.
_NAME = re.compile(r"[A-Za-z0-9_.\\/>-]*")


class ExponentialMovingAverage:
    """Moving averages of the tensors of successive checkpoints, bit for bit TensorFlow's.

    ``shadow = shadow - (shadow - value) * (1 - decay)``, each operation rounded to the variable's
    dtype, 1 - decay formed in float32. The first `apply` copies the values (they initialise the
    shadows and are no update); each later one updates. Source:
    tensorflow/python/training/moving_averages.py, `ExponentialMovingAverage`.

    Args:
        decay: in [0, 1], or a function that is called at every apply.
        num_updates: None; an int (a constant, as TensorFlow bakes it in); a function called at
            every apply; ``"count"`` (update k uses k) or ``"step"`` (the checkpoint's step). With
            it the decay is min(decay, (1 + num_updates) / (10 + num_updates)).
        zero_debias: start from zeros and divide by the bias factor, as TensorFlow does for plain
            Tensors; here for every averaged tensor.
        name: shadows are called ``<variable>/<name>``, made unique with ``_1`` where that is taken.
        store: directory for the shadows, a state as ``ema-avg run --state`` keeps them: it
            survives the process and is continued by an object with the same arguments. A temporary
            one when None, removed with the object.

    Shadows live in files, in the dtype of their variables: memory does not grow with the model.

    Raises:
        UsageError: a decay outside [0, 1], an unknown `num_updates`.
        TypeError: a decay or name of the wrong type.
        OtherSettings: `store` holds shadows that were made with other arguments.
        Locked, DamagedState: it cannot be opened.
    """

    def __init__(
        self,
        decay: float | Callable[[], float],
        num_updates: NumUpdates = None,
        zero_debias: bool = False,
        name: str = SHADOW_NAME,
        *,
        store: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name: expected a str, found {type(name).__name__}")
        if not _NAME.fullmatch(name):
            raise ValueError(f"'{shorten(name)}' is not a valid scope name")
        if isinstance(num_updates, str) and num_updates not in ("count", "step"):
            raise UsageError(
                f"num_updates: expected 'count' or 'step', found '{num_updates}'",
                "give a number, 'count' for the updates made, or 'step' for global_step",
            )
        if not callable(decay):
            _check_decay(decay)
        self._decay = decay
        self._num_updates = num_updates
        self._zero_debias = zero_debias
        self._name = name
        directory = os.fspath(store) if store is not None else _temporary(self)
        self._store = ShadowStore(directory, self._binding(), lasting=store is not None)
        self._updates = 0
        self._local_steps: dict[str, int] = {}
        self._specs: dict[str, tuple[DType, tuple[int, ...]]] = {}
        self._shadow_names: dict[str, str] = {}
        self._known: dict[str, DType] = {}
        self._trainable: tuple[str, ...] = ()
        self._taken: set[str] | None = None
        # Chunks of the slot whose checksum was found right by the apply at hand.
        self._verified: set[Extent] = set()
        if self._store.manifest is not None:
            self._continue(self._store.manifest)

    def _binding(self) -> Binding:
        """Return what the store is bound to; functions are bound to being functions."""
        given = self._num_updates
        settings = {
            "decay": "a function" if callable(self._decay) else float(self._decay),
            "num_updates": "a function" if callable(given) else given,
            "zero_debias": self._zero_debias,
            "name": self._name,
        }
        return Binding(CLASS, settings, (CLASS_LABEL,), {})

    def _continue(self, manifest: Manifest) -> None:
        """Take up what an earlier object left in the store."""
        own = own_of(manifest, self._store.state.path)
        self._updates, self._local_steps = own.updates, own.local_steps
        self._shadow_names, self._known = own.shadow_names, own.known
        self._trainable, self._taken = own.trainable, None
        self._specs = {
            one.variables[0]: (one.dtype, one.shape) for one in manifest.held if one.part == AVERAGE
        }

    @property
    def name(self) -> str:
        """The name of the shadows."""
        return self._name

    # ------------------------------------------------------------------ applying

    def apply(self, checkpoint: Source, var_list: Sequence[str] | None = None) -> None:
        """Mix one checkpoint into the shadows.

        Args:
            checkpoint: path of a checkpoint, or a mapping of names to arrays.
            var_list: names to average; by default the trainable variables: floating tensors that
                are no batch-norm statistics, optimizer state or shadows. The other tensors are
                kept as they are, for an export.

        Raises:
            TypeError: a variable that is not half, bfloat16, float or double is asked for.
            Disagreement: a name is missing, or its shape or dtype is not that of its shadow.
            InputError: the checkpoint cannot be read.
        """
        values = Values(checkpoint)
        names = self._averaged(values, var_list)
        first = self._store.manifest is None
        updates = self._updates + (0 if first and not self._zero_debias else 1)
        coefficient = self._coefficient(values, updates)
        known = {name: spec[0] for name, spec in values.specs.items()}
        shadow_names = self._named(names, known)
        specs = {**self._specs, **{name: values.specs[name] for name in names}}
        local_steps = dict(self._local_steps)
        self._verified = set()
        with ExitStack() as stack:
            old = self._store.current
            writer = stack.enter_context(self._store.write(self._held(specs, values)))
            for name in specs:
                if name in names:
                    local_steps[name] = local_steps.get(name, 0) + 1
                    self._mix(writer, old, values, name, coefficient, local_steps[name])
                else:
                    self._keep(writer, old, name)
            ours = {name for variable in specs for name in self._stored(variable)}
            for name in values.storable:
                if name not in ours:
                    _transfer(writer, name, values.open(name))
            own = Own(updates, local_steps, shadow_names, known, values.trainable(self._name))
            before = self._store.manifest
            generation = (before.generation if before else 0) + 1
            row = values.row(generation, 1.0 if first and not self._zero_debias else coefficient)
            try:
                self._store.commit(writer, own.to_json(), row)
            finally:  # what the store says is what is, also when something went wrong after it
                if self._store.manifest is not None and self._store.manifest is not before:
                    self._continue(self._store.manifest)

    def _averaged(self, values: Values, var_list: Sequence[str] | None) -> dict[str, None]:
        """Return the names to average, in order and once each, after TensorFlow's checks."""
        for name, (dtype, shape) in self._specs.items():
            if name in values.specs and values.specs[name] != (dtype, shape):
                raise Disagreement(
                    f"{values.where}: tensor '{shorten(name)}': expected "
                    f"{describe(dtype, shape)} as its shadow, found "
                    f"{describe(*values.specs[name])}",
                    "average each model with an object of its own",
                )
        if var_list is None:
            var_list = values.trainable(self._name)
        for name in var_list if not isinstance(var_list, str) else ():
            if not safetensors.can_name(name):
                raise Disagreement(
                    f"{values.where}: a store cannot hold '{shorten(name)}'",
                    "name the tensors to average in var_list, without this one",
                )
        if isinstance(var_list, str):
            raise TypeError("var_list: expected a list of names, found a str")
        for name in var_list:
            if name not in values.specs:
                raise Disagreement(
                    f"{values.where}: tensor '{shorten(name)}' is missing",
                    did_you_mean(name, values.specs),
                )
            if not values.specs[name][0].averaged:
                raise TypeError(f"The variables must be half, float, or double: {shorten(name)}")
        return dict.fromkeys(var_list)

    def _current_decay(self) -> float:
        decay = self._decay() if callable(self._decay) else self._decay
        _check_decay(decay)
        return float(decay)

    def _coefficient(self, values: Values, updates: int) -> float:
        """Return 1 - decay for this apply; see `ema_cli.schedules.one_minus_decay`."""
        decay = self._current_decay()
        n: float | None
        if self._num_updates == "count":
            n = updates
        elif self._num_updates == "step":
            n = values.step()
        elif callable(self._num_updates):
            n = float(self._num_updates())
        else:
            n = None if self._num_updates is None else float(self._num_updates)
        return float(one_minus_decay(decay, n))

    def _named(self, names: Mapping[str, None], known: Mapping[str, DType]) -> dict[str, str]:
        """Return the shadows' names with those of new variables, made unique."""
        named = dict(self._shadow_names)
        if all(name in named for name in names):
            return named
        taken = lowered([*known, *named.values()])
        for name in names:
            if name not in named:
                named[name] = unique_name(shadow_of(name, self._name), taken)
                taken.add(named[name].lower())
        return named

    def _held(
        self, specs: Mapping[str, tuple[DType, tuple[int, ...]]], values: Values
    ) -> list[Held]:
        """Return the tensors of the next slot: shadows, and what else the checkpoint holds."""
        slot: list[Held] = []
        parts = (AVERAGE, BIASED, LOCAL_STEP)
        for variable, (dtype, shape) in specs.items():
            shapes = (shape, shape, ())  # the shadow, the biased one, the counter
            for name, its_shape, part in zip(self._stored(variable), shapes, parts, strict=False):
                slot.append(shadows.held(name, part, (dtype, its_shape), variable))
        taken = {one.name for one in slot}
        slot += [
            shadows.held(name, COPY, values.specs[name])
            for name in values.storable
            if name not in taken
        ]
        return slot

    def _stored(self, variable: str) -> list[str]:
        """Return the tensors of a slot that belong to one shadow, itself first."""
        if not self._zero_debias:
            return [variable]
        shadow = shadow_of(variable, self._name)
        return [variable, f"{shadow}/biased", f"{shadow}/local_step"]

    def _mix(
        self,
        writer: SlotWriter,
        old: Checkpoint | None,
        values: Values,
        name: str,
        coefficient: float,
        updates: int,
    ) -> None:
        """Write the next generation of one shadow."""
        dtype = numpy_dtype(values.specs[name][0].name)
        stored = self._stored(name)[1] if self._zero_debias else name
        c = dtype.type(coefficient)
        factor = debias_factor(coefficient, updates, dtype) if self._zero_debias else 1.0
        with ExitStack() as stack:
            stack.enter_context(kernel.quiet())
            value = values.open(name)
            stack.enter_context(value)
            before: TensorReader | None = None
            if old is not None and name in self._specs:
                before = stack.enter_context(
                    TensorReader(old, old.index.by_name[stored], self._verified)
                )
            for start in range(0, value.elements, _BLOCK_ELEMENTS):
                block = value.block(start, min(_BLOCK_ELEMENTS, value.elements - start))
                if before is not None or self._zero_debias:
                    shadow = before.block(start, len(block)) if before else np.zeros_like(block)
                    kernel.update(shadow, block, c, block)
                else:
                    shadow = block
                writer.put(stored, start, shadow)
                if self._zero_debias:
                    kernel.divide(shadow, factor, shadow)
                    writer.put(name, start, shadow)
        if self._zero_debias:
            counter = np.array([local_step(updates, dtype)]).astype(dtype)
            writer.put(self._stored(name)[2], 0, counter)

    def _keep(self, writer: SlotWriter, old: Checkpoint | None, name: str) -> None:
        """Carry a shadow that this apply does not touch into the next generation."""
        assert old is not None  # noqa: S101  # a shadow that exists lies in a slot
        for stored in self._stored(name):
            tensor = old.index.by_name[stored]
            _transfer(writer, stored, TensorReader(old, tensor, self._verified))

    # ------------------------------------------------------------------ asking

    def average(self, name: str) -> kernel.Array | None:
        """Return the shadow of variable `name`, or None when it is not averaged.

        Args:
            name: of the variable, as it is called in the checkpoints.

        The array has the variable's shape and dtype, is mapped read-only from the shadow's file,
        and stays valid until the second next `apply`.
        """
        return self._store.read(name) if name in self._specs else None

    def average_name(self, name: str) -> str:
        """Return what the shadow of variable `name` is, or would be, called.

        Args:
            name: of the variable.

        After `apply` the name it has; before, ``<name>/<self.name>`` made unique among the
        tensors known so far.
        """
        if name in self._shadow_names:
            return self._shadow_names[name]
        if self._taken is None:
            self._taken = lowered([*self._known, *self._shadow_names.values()])
        return unique_name(shadow_of(name, self._name), self._taken)

    def variables_to_restore(
        self, moving_avg_variables: Sequence[str] | None = None
    ) -> dict[str, str]:
        """Return {restore name: variable name} as an evaluation program asks for it.

        Args:
            moving_avg_variables: asked for under their shadows' names; by default the trainable
                variables and those that were averaged.

        All other tensors of the last applied checkpoint stand under their own names, unless such
        a name is a key already.
        """
        if moving_avg_variables is None:
            moving_avg_variables = [*self._trainable, *self._specs]
        averaged = dict.fromkeys(moving_avg_variables)
        named = {**self._named(averaged, self._known), **self._shadow_names}
        asked = {named[name]: name for name in averaged}
        for name in self._known:
            if name not in averaged:
                asked.setdefault(name, name)
        return asked


def _temporary(owner: object) -> str:
    directory = tempfile.mkdtemp(prefix="ema-avg-")
    remove = functools.partial(shutil.rmtree, directory, ignore_errors=True)
    weakref.finalize(owner, shadows.in_process(os.getpid(), remove))
    return directory


def _check_decay(decay: object) -> None:
    if not isinstance(decay, float | int | np.floating | np.integer):
        raise TypeError(f"decay: expected a number, found {type(decay).__name__}")
    if not 0 <= decay <= 1:
        raise UsageError(
            f"decay: expected a number in [0, 1], found {decay}", meant_decay(str(decay))
        )


def _transfer(writer: SlotWriter, name: str, reader: TensorReader | ArrayReader) -> None:
    with reader:
        for start in range(0, reader.elements, _BLOCK_ELEMENTS):
            count = min(_BLOCK_ELEMENTS, reader.elements - start)
            writer.put(name, start, reader.block(start, count))
