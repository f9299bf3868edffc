"""An ONNX graph that grows: tensors, constants folded away, and parameters that stay in their file."""

import bisect
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slm.errors import ConfigError

OPSET = 18
"""Of operators: old enough for most runtimes, the first whose reductions take axes as an input."""
IR_VERSION = 10
INLINE = 2**20
"""Most elements of a constant that is no parameter: what is larger belongs into the computation."""
SMALL = 4096
"""Elements of a constant that is cheaper to store than to broadcast when it runs."""


@dataclass(frozen=True)
class Tensor:
    """A value of the computation, broadcast only when somebody needs it whole.

    ONNX broadcasts where jaxprs say `broadcast_in_dim`: what a node or `array` holds has size 1 along the axes where
    `shape` is only repetition, and the same rank (or none at all).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    held: tuple[int, ...]
    name: str | None = None
    """Of the graph's value; None for a constant."""
    array: np.ndarray | None = None
    parameter: bool = False
    """The constant is a parameter of the model or a view of one: it gets its name, and is computed with at run time."""

    @property
    def whole(self) -> np.ndarray:
        """The constant in its full shape."""
        return np.broadcast_to(self.array, self.shape)


def constant(array: Any, shape: tuple[int, ...] | None = None, parameter: bool = False) -> Tensor:
    """A constant; `shape`: what it is to be broadcast to."""
    array = np.asarray(array)
    return Tensor(array.shape if shape is None else tuple(shape), array.dtype, array.shape, None, array, parameter)


class Parameters:
    """Arrays of a safetensors file, known by where they lie in memory, so that slices of them need no copy."""

    def __init__(self, arrays: dict[str, np.ndarray], file: Path):
        self.file, self.arrays = file.name, arrays
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(size))
        self._offsets = {name: 8 + size + header[name]["data_offsets"][0] for name in arrays}
        self._starts = sorted((a.ctypes.data, name) for name, a in arrays.items() if a.size)

    def place(self, view: np.ndarray) -> tuple[str, int] | None:
        """(name, offset in the file) of a contiguous view of one of the arrays; None if it is none."""
        at = bisect.bisect_right(self._starts, (view.ctypes.data, chr(0x10FFFF))) - 1
        if at < 0 or not view.size or not view.flags.c_contiguous:
            return None
        start, name = self._starts[at]
        inside = view.ctypes.data - start
        whole = self.arrays[name].nbytes
        if inside + view.nbytes > whole:
            return None
        part = name if view.nbytes == whole else f"{name}/{inside // view.nbytes}"
        return part, self._offsets[name] + inside


@dataclass
class Graph:
    """Nodes in order. A subgraph (the body of a loop) has its own nodes; names and constants are shared with `root`."""

    parameters: Parameters | None = None
    root: "Graph | None" = None
    nodes: list = field(default_factory=list)
    initializers: dict = field(default_factory=dict)
    """Name to TensorProto."""
    count: int = 0
    known: dict = field(default_factory=dict)

    def body(self) -> "Graph":
        """An empty subgraph."""
        return Graph(root=self.root or self)

    def fresh(self) -> str:
        """A name that nothing has yet."""
        top = self.root or self
        top.count += 1
        return f"v{top.count}"

    def node(self, op: str, inputs: list, shape, dtype, held=None, **attributes) -> Tensor:
        """The only output of a new node, whose inputs are Tensors (as they are held) or names; "" leaves one out."""
        (out,) = self.nodes_of(op, inputs, [(shape, dtype)], **attributes)
        return out if held is None else Tensor(out.shape, out.dtype, tuple(held), out.name)

    def nodes_of(self, op: str, inputs: list, outputs: list, **attributes) -> list[Tensor]:
        """The outputs, (shape, dtype) each, of a new node."""
        from onnx import helper

        names = [self.fresh() for _ in outputs]
        given = [one if isinstance(one, str) else self.name(one) for one in inputs]
        self.nodes.append(helper.make_node(op, given, names, **attributes))
        return [Tensor(tuple(s), np.dtype(d), tuple(s), name) for name, (s, d) in zip(names, outputs)]

    def name(self, x: Tensor) -> str:
        """What nodes call a tensor; constants become initializers."""
        return x.name if x.array is None else (self.root or self)._initializer(x)

    def full(self, x: Tensor) -> Tensor:
        """`x` with nothing left to broadcast."""
        if x.held == x.shape:
            return x
        if x.array is not None and not x.parameter and math.prod(x.shape) <= SMALL:
            return constant(np.asarray(x.whole, order="C"))
        return self.node("Expand", [x, constant(np.array(x.shape, np.int64))], x.shape, x.dtype)

    def reshape(self, x: Tensor, shape) -> Tensor:
        """`x`, whole, in another shape of equal size."""
        shape = tuple(int(n) for n in shape)
        if x.held == shape == x.shape:
            return x
        if x.array is not None and x.held == x.shape:
            return constant(x.array.reshape(shape), parameter=x.parameter)
        return self.node("Reshape", [self.full(x), constant(np.array(shape, np.int64))], shape, x.dtype)

    def transpose(self, x: Tensor, axes) -> Tensor:
        """`x` with its axes in another order."""
        axes = [int(axis) for axis in axes]
        if axes == sorted(axes):
            return x
        shape, held = (tuple(s[i] for i in axes) for s in (x.shape, x.held))
        if x.array is not None and not x.parameter:
            return constant(np.asarray(x.array.transpose(axes), order="C"), shape)
        return self.node("Transpose", [x], shape, x.dtype, held, perm=axes)

    def cast(self, x: Tensor, dtype) -> Tensor:
        """`x` as another type."""
        from onnx import helper

        if x.dtype == np.dtype(dtype):
            return x
        if x.array is not None and not x.parameter:
            return constant(x.array.astype(dtype), x.shape)
        to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.node("Cast", [x], x.shape, dtype, x.held, to=to)

    def _initializer(self, x: Tensor) -> str:
        from onnx import TensorProto, helper, numpy_helper

        array, place = x.array, None
        if x.parameter and self.parameters is not None:
            array = np.asarray(array, order="C")
            place = self.parameters.place(array)
        key = (place or array.tobytes(), array.shape, array.dtype.str)
        if key in self.known:
            return self.known[key]
        if place is None:
            if array.size > INLINE:
                raise ConfigError(
                    f"ONNX: a constant of shape {array.shape} would have to be written into the graph: export a "
                    "smaller length"
                )
            name = f"c{len(self.known)}"
            self.initializers[name] = numpy_helper.from_array(array, name)
        else:
            stem, offset = place
            name, again = stem, 1
            while name in self.initializers:
                again += 1
                name = f"{stem}:{again}"
            proto = TensorProto(name=name, dims=array.shape, data_location=TensorProto.EXTERNAL)
            proto.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
            for k, v in (("location", self.parameters.file), ("offset", offset), ("length", array.nbytes)):
                proto.external_data.add(key=k, value=str(v))
            self.initializers[name] = proto
        self.known[key] = name
        return name

    def proto(self, name: str, inputs: list[Tensor], outputs: list[tuple[str, Tensor]]) -> Any:
        """The GraphProto, each output renamed by an Identity."""
        from onnx import helper

        def info(name, x):
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape))

        for out, x in outputs:
            self.nodes.append(helper.make_node("Identity", [self.name(self.full(x))], [out]))
        results = [info(out, x) for out, x in outputs]
        return helper.make_graph(
            self.nodes, name, [info(x.name, x) for x in inputs], results, list(self.initializers.values())
        )
