"""What happens inside the layers of a forward pass, for those who measure it or learn from it; nothing is changed.

A `take` is a function (path, module, inputs, output) -> arrays to keep, or None. It is asked about every linen module
of a block, and about the block itself, whose path is "". Paths are those of the parameters inside a layer:
`mixer/query`, `mlp/down`; softmax mixers show what they attend with at `mixer/attended`. What it keeps is a dict by
path.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

Take = Callable[[str, nn.Module, tuple, Any], Any]


@contextlib.contextmanager
def watch(take: Take | None) -> Iterator[dict[str, Any]]:
    """The dict that fills with what `take` keeps while modules are called inside; empty for None."""
    seen: dict[str, Any] = {}
    if take is None:
        yield seen
        return

    def interceptor(call, args, kwargs, context):
        output = call(*args, **kwargs)
        if context.method_name == "__call__":
            path = "/".join(context.module.path)
            kept = take(path, context.module, args, output)
            if kept is not None:
                seen[path] = kept
        return output

    with nn.intercept_methods(interceptor):
        yield seen


def stream(path: str, module: nn.Module, inputs: tuple, output: Any) -> Any:
    """Takes (the residual stream before a layer, after it)."""
    return None if path else (inputs[0], output[0])
