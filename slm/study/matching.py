"""Arms of equal size: a width, depth or feed-forward solved for, so that a comparison is not one of budgets."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from slm.config import Experiment, check, longest_sequence, override
from slm.errors import ConfigError
from slm.study.grids import Grid, configs

SOLVABLE = ("model.width", "model.layers", "model.mlp_width")
_LARGEST = 2**20
"""Of a field that is solved for; no small language model is beyond it."""
_TRIES = 64
"""Steps to either side in search of a value that gives a model."""


@dataclasses.dataclass(frozen=True)
class Match:
    """One arm, brought to the size of the base."""

    name: str
    config: Experiment
    """With the value that was chosen."""
    by: str
    field: str
    was: int
    """The field's value before; of an unset model.mlp_width the one that the model derives."""
    value: int
    count: float
    """Parameters, or FLOPs of the forward pass a token, of `config`."""
    target: float
    """The same of the base."""

    @property
    def ratio(self) -> float:
        """count / target."""
        return self.count / self.target

    def __str__(self) -> str:
        change = f"{self.field} = {self.value}" + (f" (was {self.was})" if self.was != self.value else " (as it was)")
        return f"{self.name}: {change}, {self.count:,.0f} {self.by}, {self.ratio:.3f} times the base's"


def matched(
    base: Experiment,
    grid: Grid | Mapping[str, Any],
    by: Literal["parameters", "flops"] = "parameters",
    solve: str = "model.width",
    *,
    tolerance: float = 0.1,
    multiple: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, Match]:
    """Name of each arm to the arm with as many parameters, or FLOPs a token, as `base`; by `match`.

    `{name: m.config for name, m in matched(base, grid).items()}` is what `configs(base, grid)` would be, at equal size.
    The arms must not set `solve` themselves.

    Raises:
      ConfigError: as `configs` and `match`, naming the arm.
    """
    found = {}
    for name, cfg in configs(base, grid).items():
        try:
            one = match(cfg, base, by, solve, tolerance=tolerance, multiple=multiple, vocab_size=vocab_size)
        except ConfigError as error:
            raise ConfigError(f"arm '{name}': {error}") from error
        found[name] = dataclasses.replace(one, name=name)
    return found


def match(
    cfg: Experiment,
    base: Experiment,
    by: Literal["parameters", "flops"] = "parameters",
    solve: str = "model.width",
    *,
    tolerance: float = 0.1,
    multiple: int | None = None,
    vocab_size: int | None = None,
) -> Match:
    """`cfg` with the one value of `solve` that brings its count nearest to that of `base`; nothing else changes.

    Heads stay as they are, so a wider model has larger heads unless model.head_dim is set. A model.mlp_width that is
    set stays, too: unset it to let the feed-forward follow the width.

    Args:
      by: `parameters` (all of them, slm.models.counts.parameter_counts) or `flops` (forward pass, a token, in a
        sequence of each config's own data.sequence_length; slm.models.counts.flops_per_token).
      solve: one of model.width, model.layers, model.mlp_width.
      tolerance: largest distance of the ratio from 1.
      multiple: the value is a multiple of it, or stays what it is. None: for a width twice the heads, whose size
        stays even, or 8 where model.head_dim is set; for a feed-forward 8; for layers 1.
      vocab_size: where model.vocab_size is 0 and the tokenizer's size is not known without its documents.

    Raises:
      ConfigError: another `by` or `solve`; no vocabulary; no value within the tolerance (naming the nearest).
    """
    if by not in ("parameters", "flops"):
        raise ConfigError(f"match by {by!r}: must be parameters or flops")
    if solve not in SOLVABLE:
        raise ConfigError(f"solve = {solve!r}: must be one of {', '.join(SOLVABLE)}")
    if not tolerance > 0:
        raise ConfigError(f"tolerance = {tolerance}: must be above 0")
    if solve == "model.mlp_width" and (cfg.model.mlp == "none" or cfg.model.layer_mlp_widths):
        raise ConfigError("model.mlp_width is not what the feed-forward's size depends on here; solve model.width")
    target = _count(base, by, vocab_size)
    seen: dict[int, float | None] = {}
    why: list[Exception] = []

    def count(value: int) -> float | None:
        """None where no such model exists."""
        if value not in seen:
            try:
                seen[value] = _count(check(override(cfg, {solve: value})), by, vocab_size)
            except (ConfigError, ValueError) as error:
                why.append(error)
                seen[value] = None
        return seen[value]

    was = _value(cfg, solve)
    # The value that is there comes first, so that an arm of the right size stays as it is.
    if count(was) != target:
        _search(count, target, multiple or _multiple(cfg, solve), _LARGEST)
    valid = {value: n for value, n in seen.items() if n is not None}
    if not valid:
        raise ConfigError(f"no {solve} gives a model: {why[-1]}")
    value = min(valid, key=lambda v: abs(valid[v] - target))
    if abs(valid[value] / target - 1) > tolerance:
        raise ConfigError(
            f"no {solve} gives {target:,.0f} {by} within {tolerance:.0%}: the nearest is {value} with "
            f"{valid[value]:,.0f}, {valid[value] / target:.2f} times as many; solve another of {', '.join(SOLVABLE)}, "
            "or change the base"
        )
    made = cfg if value == was else override(cfg, {solve: value})  # a size that follows from others still does
    return Match(cfg.name, made, by, solve, was, value, valid[value], target)


def _search(count: Callable[[int], float | None], target: float, step: int, largest: int) -> None:
    """Asks `count`, which grows with its argument, for multiples of `step` until both neighbours of `target` are known.

    Values without a model (None) are stepped over.
    """

    def nearest(k: int, low: int, high: int) -> tuple[int, float] | None:
        """(k', count) of the valid k' in [low, high] that is nearest to k."""
        for distance in range(min(high - low + 1, _TRIES)):
            for other in (k + distance, k - distance):
                if low <= other <= high and (n := count(other * step)) is not None:
                    return other, n
        return None

    low, high = 0, 1
    while True:
        found = nearest(high, low + 1, high)
        if found and found[1] >= target:
            high = found[0]
            break
        if found:
            low = found[0]
        if 2 * high * step > largest:
            return
        high *= 2
    while high - low > 1:
        found = nearest((low + high) // 2, low + 1, high - 1)
        if found is None:
            return
        low, high = (low, found[0]) if found[1] >= target else (found[0], high)


def _count(cfg: Experiment, by: str, vocab_size: int | None) -> float:
    from slm.models.counts import flops_per_token, parameter_counts

    vocabulary = cfg.model.vocab_size or vocab_size or _vocabulary(cfg)
    longest = cfg.model.max_length or longest_sequence(cfg.data)
    model = dataclasses.replace(cfg.model, vocab_size=vocabulary, max_length=longest)
    if by == "parameters":
        return parameter_counts(model)["total"]
    return flops_per_token(model, cfg.data.sequence_length)["forward"]


def _vocabulary(cfg: Experiment) -> int:
    from slm.data.tokenizers import planned_vocabulary

    size = planned_vocabulary(cfg.data.tokenizer, cfg.model.head == "masked_lm")
    if size is None:
        raise ConfigError(
            f"data.tokenizer = {cfg.data.tokenizer} has a size that depends on the documents: set model.vocab_size, or "
            "give vocab_size"
        )
    return size


def _value(cfg: Experiment, solve: str) -> int:
    from slm.models.layers import mlp_width

    return mlp_width(cfg.model) if solve == "model.mlp_width" else getattr(cfg.model, solve.removeprefix("model."))


def _multiple(cfg: Experiment, solve: str) -> int:
    if solve == "model.layers":
        return 1
    if solve == "model.width" and cfg.model.head_dim is None:
        return 2 * cfg.model.heads
    return 8
