"""What an average can be, as frozen data: its family with parameters, its window, its options."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ema:
    """Exponential moving average: `decay` once per checkpoint, or once per training step."""

    decay: float
    per_step: bool = False


@dataclass(frozen=True, slots=True)
class HalfLife:
    """The weight of a checkpoint halves every `steps` training steps: decay 2^(-1/steps)/step."""

    steps: float


@dataclass(frozen=True, slots=True)
class Mean:
    """Every checkpoint weighs the same."""


@dataclass(frozen=True, slots=True)
class LearningRate:
    """Weights that emulate a learning rate decaying to zero over the checkpoints.

    w_k = f((k-1)/N) - f(k/N) by checkpoint index, with f(x) = 1-x (``linear``, hence the mean),
    (1 + cos πx)/2 (``cosine``) or 1-√x (``1-sqrt``): WSM, arXiv 2507.17634.
    """

    shape: str


@dataclass(frozen=True, slots=True)
class Power:
    """Power-function average of relative width `sigma_rel`, arXiv 2312.02696 (Karras et al.).

    w_k = t_k^(γ+1) - t_{k-1}^(γ+1) with t the training step and t_0 = 0; γ > 0 solves
    sigma_rel = √(γ+1) / ((γ+2) √(γ+3)), so 0 < sigma_rel < 12^-½.
    """

    sigma_rel: float


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights given by the user, each for a step or for the name of a checkpoint."""

    table: tuple[tuple[str, float], ...]


Family = Ema | HalfLife | Mean | LearningRate | Power | Weights


@dataclass(frozen=True, slots=True)
class Window:
    """The checkpoints an average takes: the last `last`, or steps `start`..`stop` inclusive."""

    last: int | None = None
    start: int | None = None
    stop: int | None = None

    def selects(self, steps: Sequence[int]) -> list[bool]:
        """Return for each of `steps` whether it is inside."""
        if self.last is not None:
            return [k >= len(steps) - self.last for k in range(len(steps))]
        low = -math.inf if self.start is None else self.start
        high = math.inf if self.stop is None else self.stop
        return [low <= step <= high for step in steps]


@dataclass(frozen=True, slots=True)
class Average:
    """What the user asked for.

    Attributes:
        label: names the average in output paths and tables.
        spec: the text it was parsed from, window included.
        family: the kind of average with its parameters.
        window: the checkpoints it takes, or None for all.
        num_updates: ``none``, ``count`` (update k uses n = k) or ``step`` (n = the step); only
            for `Ema` and `HalfLife`.
        init: ``first`` copies the first checkpoint, ``zeros`` starts from zero as TensorFlow
            does for a plain Tensor.
        zero_debias: divide by TensorFlow's bias factor at the end; implies ``zeros``.
    """

    label: str
    spec: str
    family: Family
    window: Window | None = None
    num_updates: str = "none"
    init: str = "first"
    zero_debias: bool = False

    @property
    def exponential(self) -> bool:
        """Whether num_updates, init and zero_debias have a meaning here."""
        return isinstance(self.family, Ema | HalfLife)
