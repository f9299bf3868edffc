"""Parameters from tensors and tensors from parameters, by a family's links, one stacked parameter at a time."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from slm.config import ModelConfig
from slm.errors import CheckpointError
from slm.interop.families.family import Names
from slm.interop.layout import Link
from slm.models.counts import abstract_parameters
from slm.models.mixers import Layer
from slm.models.paths import flat, nested
from slm.models.quantized import check_float_weights, is_quantized
from slm.models.transformer import GROUPS, Transformer


class Tensors(Protocol):
    """Where tensors come from: slm.interop.tensors.TensorFolder, or a GGUF file."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray: ...


class Place(NamedTuple):
    """A parameter of one layer, or one outside of all layers."""

    path: str
    """In the parameter tree, "/"-joined: `blocks/0/mixer/query/kernel`."""
    at: int | None
    """Index on the stacked axis; None outside of layers."""


class Bound(NamedTuple):
    """A link and where its parameters stand in the tree."""

    link: Link
    theirs: str
    places: tuple[Place, ...]
    shapes: tuple[tuple[int, ...], ...]


def leaves(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Every parameter of the model by its path."""
    return flat(abstract_parameters(cfg))


def bind(cfg: ModelConfig, names: Names) -> list[Bound]:
    """All links of a model, in order of depth. Raises CheckpointError if they do not cover its parameters exactly."""
    tree = leaves(cfg)
    bound = [_bind(link, "", "", None, tree) for link in names.outside]
    for number, (layer, prefix, at) in enumerate(_places(cfg)):
        bound += [_bind(link, f"{names.layers}.{number}.", prefix, at, tree) for link in names.layer(layer)]
    bound = [one for one in bound if one is not None]
    served: dict[str, int] = {}
    for one in bound:
        for place in one.places:
            served[place.path] = served.get(place.path, 0) + 1
    for path, leaf in tree.items():
        wanted = leaf.shape[0] if path.split("/")[0] in GROUPS else 1
        if served.get(path, 0) != wanted:
            raise CheckpointError(f"this family has no place for the parameter '{path}'")
    return bound


def _places(cfg: ModelConfig) -> Iterator[tuple[Layer, str, int]]:
    """(layer, path of its block, index on the stacked axis) in order of depth; of shared layers, each set once."""
    transformer = Transformer(cfg)
    for group, (pattern, repeats) in transformer.groups.items():
        for at in range(transformer.stored(repeats)):
            for i, layer in enumerate(pattern):
                yield layer, f"{group}/{i}/", at


def _bind(link: Link, theirs: str, prefix: str, at: int | None, tree: dict) -> Bound | None:
    paths = [prefix + path for path in link.ours]
    there = [path in tree for path in paths]
    if not any(there):
        return None
    if not all(there):
        raise CheckpointError(f"'{theirs}{link.theirs}' holds {', '.join(link.ours)}, of which this model lacks some")
    shapes = tuple(tree[path].shape[at is not None :] for path in paths)
    return Bound(link, theirs + link.theirs, tuple(Place(path, at) for path in paths), shapes)


def check_tensors(bound: list[Bound], tensors: Tensors, names: Names, tied: bool) -> None:
    """Raises CheckpointError, naming the tensor, if one is missing, of a wrong size, or unknown. Allocates nothing."""
    there = set(tensors.names())
    for one in bound:
        if one.theirs not in there:
            raise CheckpointError(f"the weights lack '{one.theirs}' ({', '.join(p.path for p in one.places)})")
        found, wanted = math.prod(tensors.shape(one.theirs)), sum(math.prod(shape) for shape in one.shapes)
        if found != wanted:
            raise CheckpointError(
                f"'{one.theirs}' has shape {tensors.shape(one.theirs)}: the config asks for {wanted:,} numbers"
            )
    unknown = there - {one.theirs for one in bound}
    unknown = {name for name in unknown if not re.fullmatch(names.ignored, name)}
    if tied:
        unknown -= {"lm_head.weight", "embed_out.weight"}  # some files repeat the embedding
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(f"the weights hold '{min(unknown)}'{more}: this config has no use for that")


def read_parameters(
    cfg: ModelConfig, bound: list[Bound], tensors: Tensors, dtype: Any, place: Callable[[str, np.ndarray], jax.Array]
) -> dict:
    """The parameter tree, made one stacked parameter at a time: no second copy of the model ever exists.

    `place`: (path, array) -> where the array shall live. Raises CheckpointError for a tensor of a wrong shape or with
    numbers that are not finite.
    """
    sources: dict[str, list[tuple[Bound, int]]] = {}
    for one in bound:
        for number, spot in enumerate(one.places):
            sources.setdefault(spot.path, []).append((one, number))
    found = {}
    for path, leaf in leaves(cfg).items():
        buffer = np.empty(leaf.shape, dtype)
        for one, number in sources[path]:
            at = one.places[number].at
            part = _split(one, tensors)[number]
            buffer[... if at is None else at] = part
        if not np.isfinite(buffer.sum(dtype=np.float64)):
            _blame(sources[path], tensors)
        found[path] = place(path, buffer)
    return nested(found)


def _split(one: Bound, tensors: Tensors):
    tensor = tensors.read(one.theirs)
    try:
        parts = one.link.split(tensor, one.shapes)
    except ValueError as error:
        raise CheckpointError(f"'{one.theirs}' of shape {tensor.shape}: {error}") from error
    for part, shape, spot in zip(parts, one.shapes, one.places, strict=True):
        if part.shape != shape:
            raise CheckpointError(
                f"'{one.theirs}' gives {spot.path} the shape {part.shape}: the config asks for {shape}"
            )
    return parts


def _blame(sources, tensors: Tensors) -> None:
    for one, _ in sources:
        if not np.isfinite(tensors.read(one.theirs).astype(np.float32)).all():
            raise CheckpointError(f"'{one.theirs}' holds numbers that are not finite: the file is damaged")
    raise CheckpointError(f"'{sources[0][0].theirs}' overflows in the dtype that it is loaded in: use float32")


def tensors_of(params: Any, bound: list[Bound], dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(their name, tensor) of a model, one at a time. The layers of a stacked parameter are fetched one by one.

    Raises ConfigError for quantized weights.
    """
    check_float_weights(params)
    parts = flat_parameters(params)
    for one in bound:
        yield one.theirs, tensor_of(parts, one, dtype)


def flat_parameters(params: Any) -> dict[str, Any]:
    """Parameters by name; quantized matrices are whole."""
    return flat(params, is_quantized)


def tensor_of(parts: dict[str, Any], one: Bound, dtype: Any, view: Callable[[Any], Any] = lambda part: part):
    """The tensor of a link, of `dtype`; `view` gives the array to take of each of its parameters (of one layer)."""
    found = (
        parts[spot.path] if spot.at is None else jax.tree.map(lambda a, at=spot.at: a[at], parts[spot.path])
        for spot in one.places
    )
    return one.link.join(tuple(np.asarray(jnp.asarray(view(part)).astype(dtype)) for part in found))
