"""Compares every attention mechanism, in every form that this machine can run, with its float64 definition.

    python -m slm.attention.check [--json FILE] [--dtype float32|bfloat16] [--only NAME]

Prints a table and returns 1 if anything fails. Inputs are small (150 tokens, chunks of 16, ragged, three documents, a
state to begin with, decays of up to -15 a step). Errors: of the output and the final state the largest, relative to the
largest entry; of gradients the Euclidean norm, relative to the gradient's own, of the worst argument, estimated from
random directions in which the definition is differentiated by finite differences. float32 is compared at
jax.default_matmul_precision("highest"), which GPUs and TPUs do not have by default.
"""

import argparse
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from slm import attention
from slm.attention import definitions as define
from slm.attention import patterns

B, T, H, G, K, V = 2, 150, 4, 2, 8, 8
STARTS = ((0, 23, 24), (0, 41, 130))
"""Where the documents of each row begin."""
SEGMENTS = np.array([[sum(t >= start for start in starts) for t in range(T)] for starts in STARTS])
DIRECTIONS, STEP = 16, 1e-5
LIMITS = {"float32": (2e-5, 2e-5, 5e-5), "bfloat16": (3e-2, 3e-2, 3e-2)}
"""Largest errors of output, state and gradients."""
WITHOUT_TIME = ("initial_state", "reset_state", "sink_logits", "bonus")
WITHOUT_BATCH = ("reset_state", "sink_logits", "bonus")
FLOAT32 = ("log_decay", "log_forget", "level_scale", *WITHOUT_TIME)
"""Arguments of this type whatever the others are."""


class Case(NamedTuple):
    operation: str
    definition: Callable
    """A function of slm.attention.definitions."""
    arrays: dict
    """Its float arguments, to be differentiated."""
    forms: dict[str, Callable | str]
    """By name, a function of `arrays` -> (out, final state or None), or why this machine cannot run it."""
    documents: bool = True


class Row(NamedTuple):
    operation: str
    implementation: str
    output: float | None
    state: float | None
    gradients: float | None
    verdict: str


def cases(dtype: str) -> list[Case]:
    """Everything there is to compare on this machine."""
    rng = np.random.default_rng(0)
    platform, half = jax.default_backend(), dtype != "float32"

    def normal(*shape):
        return rng.normal(size=shape)

    def gates(*shape):
        """Log decays, a fifth of them hard."""
        return np.where(rng.random(shape) < 0.2, -15.0, -0.3 * rng.random(shape))

    def unit(*shape):
        x = normal(*shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    grouped = {"q": normal(B, T, H, K), "k": normal(B, T, G, K), "v": normal(B, T, G, V)}
    each = {"q": normal(B, T, H, K), "k": unit(B, T, H, K), "v": normal(B, T, H, V)}
    states = {"initial_state": normal(B, H, K, V), "reset_state": normal(H, K, V)}
    beta = {"beta": 2 * rng.random((B, T, H))}
    pallas = "pallas" if platform in ("gpu", "tpu") else "pallas (interpreted)"

    def softmax(*names, cudnn=None, tokamax=None, **options):
        if cudnn is None and not (platform == "gpu" and half):
            cudnn = "needs a GPU and a half type"
        if tokamax is None and not importlib.util.find_spec("tokamax"):
            tokamax = "not installed"
        forms = {}
        for name in (*names, "cudnn", "tokamax"):
            forms[name] = stateless(attention.softmax_attention, implementation=name, **options)
        return forms | ({"cudnn": cudnn} if cudnn else {}) | ({"tokamax": tokamax} if tokamax else {})

    def recurrence(function, kernel=None, **options):
        """`kernel`: why there is none."""
        forms = {form: functools.partial(function, form=form, chunk=16, **options) for form in ("recurrent", "chunked")}
        return forms | {pallas: kernel or functools.partial(forms["chunked"], implementation="pallas")}

    inside, refused = {"segment_ids": SEGMENTS}, "does not serve these"
    pattern = patterns.causal & (patterns.window(8) | patterns.global_tokens(3))
    index = {"index_q": normal(1, T, 2, K), "index_k": normal(1, T, K), "index_w": normal(1, T, 2)}
    index = {name: _rounded(name, x, dtype) for name, x in index.items()}
    per_channel = "its kernel takes one decay a head"
    # Compressed keys rounded to a half type choose other blocks where scores nearly tie: then every block is chosen.
    blocks = T if half else 4
    modified = {"window": 12, "sinks": 2, "softcap": 2.0}
    found = [
        Case("softmax", define.softmax, grouped, softmax("xla", "blocked"), False),
        Case(
            "softmax window",
            functools.partial(define.softmax, window=12),
            grouped,
            softmax("xla", "blocked", window=12),
            False,
        ),
        Case(
            "softmax sinks, soft cap, documents",
            functools.partial(define.softmax, **modified),
            grouped | {"sink_logits": normal(H)},
            softmax("xla", "blocked", cudnn=refused, tokamax=refused, **modified, **inside),
        ),
        Case(
            "softmax forget gates, documents",
            define.softmax,
            grouped | {"log_forget": gates(B, T, H)},
            softmax("xla", "blocked", cudnn=refused, tokamax=refused, **inside),
        ),
        Case(
            "block-sparse",
            functools.partial(define.softmax, seen=lambda t, j: (t - j < 8) | (j < 3)),
            grouped,
            {
                name: stateless(
                    attention.sparse_attention, pattern=pattern, block=16, implementation=name.partition(" ")[0]
                )
                for name in ("xla", pallas)
            },
            False,
        ),
        Case(
            "moba",
            functools.partial(define.moba, block=8, top_k=3),
            grouped,
            {"xla": stateless(attention.moba_attention, block_size=8, top_k=3, **inside)},
        ),
        Case(
            "nsa",
            functools.partial(define.native_sparse, block=8, top_k=blocks, window=12),
            grouped | {"gates": rng.random((B, T, H, 3))},
            {"xla": stateless(attention.nsa_attention, block_size=8, top_k=blocks, window=12, **inside)},
        ),
        Case(
            "token indexer",
            functools.partial(define.indexed, top_k=9, **index),
            {name: x[:1] for name, x in grouped.items()},
            {
                name: functools.partial(_without_loss, index=index, top_k=9, implementation=name)
                for name in ("gather", "xla")
            },
            False,
        ),
        Case(
            "linear",
            define.linear,
            each | {"initial_state": rng.random((B, H, K, V + 1)), "reset_state": rng.random((H, K, V + 1))},
            recurrence(attention.linear_attention_with_state, **inside),
        ),
        Case(
            "decay scalar",
            define.decay,
            states | grouped | {"v": each["v"], "q": normal(B, T, G, K), "log_decay": gates(B, T, H)},
            recurrence(attention.decay_attention, **inside),
        ),
        Case(
            "decay channel",
            define.decay,
            states | each | {"log_decay": gates(B, T, H, K)},
            recurrence(attention.decay_attention, per_channel, **inside),
        ),
        Case(
            "rwkv6",
            define.rwkv6,
            states | each | {"log_decay": gates(B, T, H, K), "bonus": normal(H, K)},
            recurrence(attention.rwkv6_attention, per_channel, **inside),
        ),
        Case("delta", define.delta, states | each | beta, recurrence(attention.delta_attention, **inside)),
        Case(
            "gated delta",
            define.delta,
            states | each | beta | {"log_decay": gates(B, T, H)},
            recurrence(attention.delta_attention, **inside),
        ),
        Case(
            "kimi delta",
            define.delta,
            states | each | beta | {"log_decay": gates(B, T, H, K)},
            recurrence(attention.delta_attention, **inside),
        ),
        Case(
            "dplr",
            define.dplr,
            states | each | {"log_decay": gates(B, T, H, K), "a": -unit(B, T, H, K), "b": 0.5 * unit(B, T, H, K)},
            recurrence(attention.dplr_attention, **inside),
        ),
        *(
            Case(
                f"log-linear{', documents' * documents}",
                define.log_linear,
                each | {"log_decay": gates(B, T, H), "level_scale": rng.random((B, T, H, 9))},
                {
                    form: functools.partial(_log_linear, form=form, segment_ids=SEGMENTS if documents else None)
                    for form in ("recurrent", "chunked")
                },
                documents,
            )
            for documents in (False, True)
        ),
    ]
    # So that all see the same numbers.
    return [case._replace(arrays={name: _rounded(name, x, dtype) for name, x in case.arrays.items()}) for case in found]


def _rounded(name, x, dtype):
    return np.asarray(jnp.asarray(x, "float32" if name in FLOAT32 else dtype), np.float64)


def stateless(function, **options):
    return lambda **arrays: (function(**arrays, **options), None)


def _without_loss(*, index, **arrays):
    index = {name: jnp.asarray(x, arrays["q"].dtype) for name, x in index.items()}
    return attention.indexed_attention(**arrays, **index)[0], None


def _log_linear(**arrays):
    positions = None
    if arrays["segment_ids"] is not None:
        positions = np.array([[t - max(s for s in starts if s <= t) for t in range(T)] for starts in STARTS])
    # The state of the recurrent form, one a level, is not in the paper.
    return attention.log_linear_attention(**arrays, positions=positions, chunk=16)[0], None


def evaluate(case: Case, arrays: dict):
    """(out (N, B, T, H, V), final state (N, B, ...) or None) of the definition for N variants of all arguments, each
    (N, B, ...), or (N, ...) without batch axis: document after document."""
    outs, states = [], []
    for row, starts in enumerate(STARTS if case.documents else ((0,),) * arrays["q"].shape[1]):
        own = {name: x if name in WITHOUT_BATCH else x[:, row] for name, x in arrays.items()}
        reset, out, state = own.pop("reset_state", None), [], None
        for start, end in zip(starts, (*starts[1:], T), strict=True):
            document = {name: x if name in WITHOUT_TIME else x[:, start:end] for name, x in own.items()}
            if start and reset is not None:
                document["initial_state"] = reset
            piece, state = case.definition(**document)
            out.append(piece)
        outs.append(np.concatenate(out, 1))
        states.append(state)
    return np.stack(outs, 1), None if states[0] is None else np.stack(states, 1)


class Expected(NamedTuple):
    out: np.ndarray
    state: np.ndarray | None
    weights: tuple
    """Cotangents of out and state: the gradients are those of sum(out weight) + sum(state weight)."""
    slopes: dict
    """By argument: (directions (N, ...), derivatives in them (N,))."""


def expected(case: Case) -> Expected:
    rng = np.random.default_rng(1)
    out, state = (None if x is None else x[0] for x in evaluate(case, {n: x[None] for n, x in case.arrays.items()}))
    weights = tuple(None if x is None else rng.normal(size=x.shape) for x in (out, state))
    slopes = {}
    for name, x in case.arrays.items():
        directions = rng.normal(size=(DIRECTIONS, *x.shape))
        moved = x + STEP * np.concatenate([directions, -directions])
        every = {n: np.broadcast_to(y, (2 * DIRECTIONS, *y.shape)) for n, y in case.arrays.items()}
        results = evaluate(case, every | {name: moved})
        totals = sum((y * w).sum(tuple(range(1, y.ndim))) for y, w in zip(results, weights) if y is not None)
        slopes[name] = directions, (totals[:DIRECTIONS] - totals[DIRECTIONS:]) / (2 * STEP)
    return Expected(out, state, weights, slopes)


def compare(case: Case, expected: Expected, function: Callable, dtype: str):
    """Errors of (output, state, gradients); None where there is none."""
    arrays = {n: jnp.asarray(x, "float32" if n in FLOAT32 else dtype) for n, x in case.arrays.items()}

    @jax.jit
    def run(arrays):
        (out, state), pull = jax.vjp(lambda arrays: function(**arrays), arrays)
        d = jax.tree.map(lambda x, weight: jnp.asarray(weight, x.dtype), (out, state), expected.weights)
        return out, state, pull(d)[0]

    out, state, gradients = jax.tree.map(lambda x: np.asarray(x, np.float64), run(arrays))
    errors = []
    for name, (directions, slopes) in expected.slopes.items():
        ours = (gradients[name] * directions).reshape(DIRECTIONS, -1).sum(1)
        errors.append(np.sqrt(((ours - slopes) ** 2).sum() / (slopes**2).sum()))
    return _relative(out, expected.out), _relative(state, expected.state), np.max(errors)


def _relative(ours, exact):
    return None if exact is None else np.abs(ours - exact).max() / np.abs(exact).max()


def check(dtype: str = "float32", only: str = "") -> list[Row]:
    """A row for each form of each operation whose name contains `only`."""
    rows = []
    for case in cases(dtype):
        if only not in case.operation:
            continue
        exact = expected(case)
        for name, function in case.forms.items():
            rows.append(_row(case, exact, name, function, dtype))
            print(_line(rows[-1]), flush=True)
    return rows


def _row(case, exact, name, function, dtype) -> Row:
    if isinstance(function, str):
        return Row(case.operation, name, None, None, None, f"not available: {function}")
    try:
        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            errors = compare(case, exact, function, dtype)
    except Exception as error:  # whatever it is, the table shall be whole
        reason = str(error).partition("\n")[0]
        return Row(case.operation, name, None, None, None, f"FAIL: {type(error).__name__}: {reason}")
    # In this way round NaN fails.
    good = all(error is None or error <= limit for error, limit in zip(errors, LIMITS[dtype], strict=True))
    return Row(case.operation, name, *(None if x is None else float(x) for x in errors), "ok" if good else "FAIL")


def _line(row) -> str:
    numbers = [x if isinstance(x, str) else "-" if x is None else f"{x:.1e}" for x in row[2:5]]
    return f"{row[0]:35}{row[1]:22}{numbers[0]:>9}{numbers[1]:>9}{numbers[2]:>11}  {row[5]}"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m slm.attention.check", description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the table to FILE too")
    parser.add_argument("--dtype", choices=list(LIMITS), default="float32", help="of the inputs (default: float32)")
    parser.add_argument("--only", metavar="NAME", default="", help="operations whose name contains NAME")
    options = parser.parse_args(arguments)
    names = [case.operation for case in cases(options.dtype)]
    if not any(options.only in name for name in names):
        parser.error(f"--only {options.only}: no operation's name contains it; there are {', '.join(names)}")
    device = jax.devices()[0]
    limits = ", ".join(f"{limit:.0e}" for limit in LIMITS[options.dtype])
    print(f"jax {jax.__version__}, {device.device_kind} ({device.platform}), {options.dtype}, limits {limits}\n")
    print(_line(Row("operation", "implementation", "output", "state", "gradients", "verdict")))
    rows = check(options.dtype, options.only)
    failed = sum(row.verdict.startswith("FAIL") for row in rows)
    print(f"\n{failed} of {len(rows)} failed" if failed else f"\nnone of {len(rows)} failed")
    if options.json:
        about = {"jax": jax.__version__, "device": device.device_kind, "platform": device.platform}
        with open(options.json, "w") as file:
            json.dump(about | {"dtype": options.dtype, "rows": [row._asdict() for row in rows]}, file, indent=1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
