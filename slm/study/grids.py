"""Which variants a study compares: an algebra of changes to config fields.

    grid({"model.attention": ["softmax", "gla"], "optim.name": ["adamw", "muon"]})      # product: 4 arms
    paired({"model.width": [128, 256], "optim.learning_rate": [3e-3, 1e-3]})            # in step: 2 arms
    arms({"small": {"model.layers": 2}, "wide": {"model.width": 512}})                  # named
    a * b                                      # product of two grids
    a + b                                      # the arms of both: chain(a, b)
    a * when({"optim.name": "muon"}, {"optim.momentum": [0.9, 0.95]})   # fields for some of the arms

Field names and types are checked when a grid is written, what only a whole config can tell by `configs`.
"""

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from slm.config import Experiment, check, flatten, longest_sequence, override
from slm.errors import ConfigError
from slm.study.names import names_of, text_of


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant: a name, unique in its grid, and the config fields that it sets."""

    name: str
    changes: Mapping[str, Any]
    """Dotted field to value, as slm.override takes them; read-only."""

    def __post_init__(self):
        object.__setattr__(self, "changes", MappingProxyType(dict(self.changes)))

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.changes.items())))

    def __reduce__(self):  # a read-only view cannot be pickled, and arms go to other processes
        return Arm, (self.name, dict(self.changes))


@dataclasses.dataclass(frozen=True)
class _Part:
    """Changes that came from one place; with a label they are named by it, else by their values."""

    label: str | None
    changes: tuple[tuple[str, Any], ...]


class Grid(Sequence[Arm]):
    """An immutable sequence of arms. Indexed by number, by name, or by a slice, which is a Grid again.

    Names are made of what differs: values of text alone (`gla muon`), others with the last part of their field
    (`gla width=128`), labels of `arms` in their place. So an arm's name depends on the grid that it stands in.
    """

    def __init__(self, cells: Sequence[tuple[_Part, ...]]):
        """Not for users: `grid`, `paired`, `arms` and `chain` make grids."""
        self._cells = tuple(cells)
        changes = [_merged(cell) for cell in self._cells]
        self._arms = tuple(Arm(name, c) for name, c in zip(names_of(self._cells, changes), changes))

    def __len__(self) -> int:
        return len(self._arms)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Grid(self._cells[index])
        if isinstance(index, str):
            for arm in self._arms:
                if arm.name == index:
                    return arm
            raise ConfigError(f"no arm '{index}': there are {', '.join(self.names)}")
        return self._arms[index]

    def __iter__(self) -> Iterator[Arm]:
        return iter(self._arms)

    def __eq__(self, other) -> bool:
        return isinstance(other, Grid) and self._arms == other._arms

    def __hash__(self) -> int:
        return hash(self._arms)

    def __mul__(self, other: "Grid | When | Mapping[str, Any]") -> "Grid":
        """Each arm of this grid with each of the other, which varies fastest; with a `When`, only where it applies."""
        if isinstance(other, When):
            return other.apply(self)
        if not isinstance(other, (Grid, Mapping)):
            return NotImplemented
        right = as_grid(other)._cells
        return Grid([a + b for a in self._cells for b in right])

    def __rmul__(self, other: Mapping[str, Any]) -> "Grid":
        return grid(other) * self if isinstance(other, Mapping) else NotImplemented

    def __add__(self, other: "Grid | Mapping[str, Any]") -> "Grid":
        return chain(self, other) if isinstance(other, (Grid, Mapping)) else NotImplemented

    def __repr__(self) -> str:
        lines = [f"Grid of {len(self)} arms"]
        for arm in self:
            lines.append(f"  {arm.name}: " + ", ".join(f"{path} = {text_of(v)}" for path, v in arm.changes.items()))
        return "\n".join(lines)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(arm.name for arm in self._arms)


class When:
    """What `when` returns; a factor at the right of `*`."""

    def __init__(self, condition: Mapping[str, Any], fields: Grid):
        self.condition = {}
        for path, wanted in condition.items():
            options = wanted if isinstance(wanted, (set, frozenset)) else [wanted]
            self.condition[path] = [dict(_leaves(path, value)) for value in options]
        self.fields = fields

    def apply(self, to: Grid) -> Grid:
        """`to` with each arm that meets the condition replaced by its product with the fields."""
        for path in self.condition:
            if not any(path in arm.changes for arm in to):
                raise ConfigError(
                    f"when: no arm sets {path}; a condition looks at what the grid changes, not at the base"
                )
        met = [
            all(any(o.items() <= arm.changes.items() for o in options) for options in self.condition.values())
            for arm in to
        ]
        if not any(met):
            wanted = ", ".join(
                f"{path} = {' or '.join(text_of(o[path]) for o in options)}" for path, options in self.condition.items()
            )
            raise ConfigError(f"when: no arm has {wanted}; the arms are {', '.join(to.names)}")
        cells = []
        for cell, meets in zip(to._cells, met):
            cells += [cell + more for more in self.fields._cells] if meets else [cell]
        return Grid(cells)


def grid(fields: Mapping[str, Any]) -> Grid:
    """The product of the values of all fields, the last of which varies fastest.

    Args:
      fields: dotted field to its values: a list, tuple, range or array. Anything else, text too, is one value that all
        arms share. A field that holds several things needs a list of tuples: `[("window", "softmax"), "gla"]`.

    Raises:
      ConfigError: unknown field (naming the nearest), ill-typed value, no value, or one that stands twice.
    """
    columns = [[_changes({path: value}) for value in _values(path, values)] for path, values in fields.items()]
    return Grid([tuple(_Part(None, c) for c in combination) for combination in itertools.product(*columns)])


def paired(*parts: Grid | Mapping[str, Any]) -> Grid:
    """Fields, or whole grids, in step: the first with the first, the second with the second (Python's zip).

    `paired({"model.width": [64, 128], "model.layers": [2, 4]})`, or `paired(grid_a, grid_b)`.

    Raises:
      ConfigError: as `grid`, or the lengths differ. A single value is shared by all.
    """
    columns: list[tuple[str, list[tuple[_Part, ...]]]] = []
    for i, part in enumerate(parts):
        if isinstance(part, Grid):
            columns.append((f"grid {i + 1}", list(part._cells)))
        else:
            columns += [
                (path, [(_Part(None, _changes({path: value})),) for value in _values(path, values, repeated=True)])
                for path, values in part.items()
            ]
    length = max((len(cells) for _, cells in columns), default=1)
    if any(len(cells) not in (1, length) for _, cells in columns):
        sizes = ", ".join(f"{name} has {len(cells)}" for name, cells in columns)
        raise ConfigError(f"paired: lengths differ: {sizes}; give each as many values, or one for all")
    columns = [(name, cells * length if len(cells) == 1 else cells) for name, cells in columns]
    return Grid([tuple(itertools.chain(*row)) for row in zip(*(cells for _, cells in columns))] if columns else [()])


def arms(named: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Arms that you name: name to the fields that it sets, one value each. `{"base": {}}` changes nothing.

    Raises:
      ConfigError: as slm.override, naming the arm.
    """
    cells = []
    for name, changes in named.items():
        try:
            cells.append((_Part(str(name), _changes(changes)),))
        except ConfigError as error:
            raise ConfigError(f"arm '{name}': {error}") from error
    return Grid(cells)


def chain(*grids: Grid | Mapping[str, Any]) -> Grid:
    """The arms of all grids, one grid after the other; an arm that came before is left out."""
    return Grid(list(dict.fromkeys(cell for one in grids for cell in as_grid(one)._cells)))


def when(condition: Mapping[str, Any], fields: Grid | Mapping[str, Any]) -> When:
    """Fields that apply only where an arm has the values of `condition`; other arms stay as they are.

    `grid({"optim.name": ["adamw", "muon"]}) * when({"optim.name": "muon"}, {"optim.momentum": [0.9, 0.95]})` has three
    arms. Values of the condition may be sets: any of them.

    Raises:
      ConfigError: as `grid`; when it is applied, if no arm sets a field of the condition, or none meets it.
    """
    return When(condition, as_grid(fields))


def configs(base: Experiment, grid: Grid | Mapping[str, Any]) -> dict[str, Experiment]:
    """Name of each arm, in order, to `base` with its changes, checked.

    Models are built as shapes, so that a misspelt mechanism in the last arm is not found after the first has trained.

    Raises:
      ConfigError: naming the arm, its fields, and what is wrong.
    """
    from slm.models.counts import abstract_parameters

    made: dict[str, Experiment] = {}
    built = set()
    for arm in as_grid(grid):
        try:
            cfg = check(override(base, dict(arm.changes)))
            if cfg.model not in built and not cfg.model.init_from:
                # The sizes that a run fills in are of no account here.
                sizes = {"vocab_size": cfg.model.vocab_size or 512, "max_length": longest_sequence(cfg.data)}
                abstract_parameters(dataclasses.replace(cfg.model, **sizes))
                built.add(cfg.model)
        except ConfigError as error:
            fields = ", ".join(f"{path} = {text_of(value)}" for path, value in arm.changes.items())
            raise ConfigError(f"arm '{arm.name}' ({fields or 'no change'}): {error}") from error
        _warn_of_wide_windows(arm.name, cfg)
        made[arm.name] = cfg
    return made


def _warn_of_wide_windows(arm: str, cfg: Experiment) -> None:
    """A window that no sequence fills makes an arm the same as full attention, which its table would call a tie."""
    from slm.models.mixers import layers

    longest = longest_sequence(cfg.data)
    windows = {layer.mechanism: layer.configured.mixer.window for layer in layers(cfg.model)}
    for name, window in windows.items():
        if window and window >= longest:
            warnings.warn(
                f"arm '{arm}': {name} has a window of {window} tokens and sequences have {longest}, so that it sees "
                "all of them: set a smaller model.mixer.window",
                stacklevel=3,
            )


def as_grid(part: Grid | Mapping[str, Any]) -> Grid:
    """A grid as it is; of fields to values, their product."""
    return part if isinstance(part, Grid) else grid(part)


def _values(path: str, values: Any, repeated: bool = False) -> list[Any]:
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, (list, tuple, range)):
        return [values]
    if not values:
        raise ConfigError(f"{path} has no values: give at least one")
    values = list(values)
    checked = [_changes({path: value}) for value in values]
    if not repeated and (twice := [value for value, n in Counter(checked).items() if n > 1]):
        raise ConfigError(f"{path} has {text_of(twice[0][0][1])} twice: name each value once")
    return values


def _changes(changes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(leaf for path, value in changes.items() for leaf in _leaves(path, value))


def _leaves(path: str, value: Any) -> list[tuple[str, Any]]:
    """[(field, value as the field's type)]; a whole section as all of its fields."""
    if hasattr(value, "item") and not getattr(value, "shape", ()):
        value = value.item()  # a number of numpy or jax
    flat = flatten(override(Experiment(), {path: value}))
    return [(leaf, v) for leaf, v in flat.items() if leaf == path or leaf.startswith(f"{path}.")]


def _merged(cell: tuple[_Part, ...]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for part in cell:
        for path, value in part.changes:
            if path in changes:
                raise ConfigError(
                    f"{path} is set twice in one arm, to {text_of(changes[path])} and {text_of(value)}: a product "
                    "needs different fields; to have both as arms, use +"
                )
            changes[path] = value
    return changes
