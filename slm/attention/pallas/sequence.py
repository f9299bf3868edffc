"""Kernels that go over a sequence of blocks with a carry, written once for TPU and GPU.

On a TPU the last axis of a grid is sequential: Pallas fetches the blocks of the next step while one computes, and the
carry stays in VMEM. The programs of a GPU all run at once: the sequence is a loop inside of each, and the carry stays
in registers. Only this file knows the difference.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class Operand(NamedTuple):
    """An array, or the shape and dtype of a result, of which a step sees one block."""

    array: jax.Array | jax.ShapeDtypeStruct
    block: tuple[int | None, ...]
    """Sizes of the block; None: 1, and the axis is dropped."""
    index: Callable
    """(y, p, j, *tables) -> the block's number along each axis, for step j of program (y, p)."""


class Kernel(NamedTuple):
    """carry = start(*fixed); carry, results_j = step(carry, fixed, moving_j) for each j; final = finish(*carry).

    `fixed`, `moving_j` and `results_j` are tuples of blocks. Blocks and carries have two axes with sizes that are
    powers of two, 16 at least where they enter a product.
    """

    start: Callable
    step: Callable
    finish: Callable
    grid: tuple[int, int]
    steps: int
    fixed: Sequence[Operand]
    """Their index does not depend on j."""
    moving: Sequence[Operand]
    results: Sequence[Operand]
    """Written in every step."""
    final: Sequence[Operand]
    """Written after the last step."""
    tables: Sequence[jax.Array] = ()
    """Integers that `index` and `count` look things up in: the list of blocks, if it is not simply 0, 1, 2 ..."""
    count: Callable | None = None
    """(y, p, *tables) -> steps of this program, at most `steps`; None: `steps`."""

    def run(self):
        """(results, final), lists of arrays.

        Raises ValueError on a GPU for which this JAX has no Triton lowering.
        """
        outputs = [*self.results, *self.final]
        launch = _as_loop if jax.default_backend() == "gpu" else _as_grid
        shapes = [jax.ShapeDtypeStruct(x.array.shape, x.array.dtype) for x in outputs]
        operands = (x.array for x in (*self.fixed, *self.moving))
        arrays = launch(self, shapes)(*self.tables, *operands)
        return arrays[: len(self.results)], arrays[len(self.results) :]

    def split(self, refs):
        """References in a kernel's order: (tables, fixed, moving, results, final, scratch)."""
        parts, at = [], 0
        for part in (self.tables, self.fixed, self.moving, self.results, self.final):
            parts.append(refs[at : at + len(part)])
            at += len(part)
        return *parts, refs[at:]


def _as_grid(kernel: Kernel, shapes):
    blocks = [_block(x) for x in kernel.fixed]
    carry = jax.eval_shape(kernel.start, *blocks)

    def body(*refs):
        tables, fixed, moving, results, final, scratch = kernel.split(refs)
        y, p, j = (pl.program_id(axis) for axis in range(3))
        here = [ref[...] for ref in fixed]

        @pl.when(j == 0)
        def _():
            _write(scratch, kernel.start(*here))

        def step():
            carry, out = kernel.step([ref[...] for ref in scratch], here, [ref[...] for ref in moving])
            _write(scratch, carry)
            _write(results, out)

        if kernel.count is None:
            step()
        else:
            pl.when(j < kernel.count(y, p, *tables))(step)

        @pl.when(j == kernel.steps - 1)
        def _():
            _write(final, kernel.finish(*(ref[...] for ref in scratch)))

    def specs(operands):
        return [pl.BlockSpec(x.block, x.index) for x in operands]

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(kernel.tables),
        grid=(*kernel.grid, kernel.steps),
        in_specs=specs([*kernel.fixed, *kernel.moving]),
        out_specs=specs([*kernel.results, *kernel.final]),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype) for x in carry],
    )
    sequential = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
    return pl.pallas_call(body, shapes, grid_spec=grid, interpret=_interpreted(), compiler_params=sequential)


def _as_loop(kernel: Kernel, shapes):
    try:
        from jax.experimental.pallas import triton
    except ImportError:  # deprecated in JAX 0.11
        raise ValueError(
            f'implementation = "pallas": on a GPU its kernels need Triton, which jax {jax.__version__} has not: use xla'
        ) from None

    def body(*refs):
        tables, fixed, moving, results, final, _ = kernel.split(refs)
        y, p = (pl.program_id(axis) for axis in range(2))

        def at(operand, j):
            numbers = operand.index(y, p, j, *tables)
            return tuple(
                i if size is None else pl.ds(i * size, size) for i, size in zip(numbers, operand.block, strict=True)
            )

        def read(operands, refs, j):
            return [ref[at(operand, j)] for operand, ref in zip(operands, refs, strict=True)]

        def write(operands, refs, j, values):
            for operand, ref, value in zip(operands, refs, values, strict=True):
                ref[at(operand, j)] = value.astype(ref.dtype)

        here = read(kernel.fixed, fixed, 0)

        def step(j, carry):
            carry, out = kernel.step(carry, here, read(kernel.moving, moving, j))
            write(kernel.results, results, j, out)
            return tuple(carry)

        steps = kernel.steps if kernel.count is None else kernel.count(y, p, *tables)
        carry = jax.lax.fori_loop(0, steps, step, tuple(kernel.start(*here)))
        write(kernel.final, final, 0, kernel.finish(*carry))

    # One stage: operands of float32 products fill shared memory already.
    params = triton.CompilerParams(num_warps=4, num_stages=1)
    return pl.pallas_call(body, shapes, grid=kernel.grid, interpret=_interpreted(), compiler_params=params)


def _interpreted() -> bool:
    return jax.default_backend() == "cpu"


def _block(operand: Operand):
    return jax.ShapeDtypeStruct([size for size in operand.block if size is not None], operand.array.dtype)


def _write(refs, values):
    for ref, value in zip(refs, values, strict=True):
        ref[...] = value.astype(ref.dtype)


def dot(x, y, axes=(1, 0)):
    """Product of blocks over these axes of x and y, in full float32 if they are float32, summed in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def column(row_1xC, width: int):
    """(C, width): the row as a column, repeated. Neither compiler turns rows into columns otherwise."""
    return jnp.broadcast_to(row_1xC, (width, row_1xC.shape[1])).T


def iota(shape, axis: int):
    """Kernels cannot capture constants."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def padded(size: int) -> int:
    """The power of two that holds `size`, 16 at least: what products of blocks need."""
    return max(16, 1 << (size - 1).bit_length())


def pad(array, sizes: dict[int, int]):
    """`array` with zeros up to these sizes of these axes."""
    widths = [(0, 0)] * array.ndim
    for axis, size in sizes.items():
        widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths)


def value_block(V: int) -> int:
    """Values that one program takes, of V, a power of two: few on a GPU, where a (K, V) state has to fit registers."""
    return min(V, 64 if jax.default_backend() == "gpu" else 128)
