"""Pruning a model in one shot: zeros in the matrices of its layers, and no training afterwards.

Zeros by themselves save neither time nor memory; the model has as many parameters as before.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slm.compress import importance
from slm.compress.calibrate import LENGTH, SEQUENCES, calibration_tokens, gram, squares, sweep
from slm.compress.second_order import DAMPING, sparsegpt
from slm.compress.sparsity import full_sparsity, keep_masks, parse_pattern, random_scores
from slm.compress.targets import matrices
from slm.config import Experiment, PruneConfig
from slm.errors import ConfigError, DataError
from slm.models import layerwise
from slm.models.language_model import LanguageModel
from slm.models.paths import flat, nested
from slm.models.quantized import check_float_weights
from slm.refusals import check_scope
from slm.training.transforms import replaced

BY_LAYERS = ("wanda", "sparsegpt")
"""Criteria that measure one layer after the other; in a run before its first step, where taylor learns as it goes."""
CALIBRATED = ("taylor", *BY_LAYERS)
ONE_SHOT = ("magnitude", "random", *CALIBRATED)


def prune(
    model: LanguageModel,
    sparsity: float | None = None,
    *,
    criterion: str = "magnitude",
    scope: str | None = None,
    pattern: str = "unstructured",
    skip: tuple[str, ...] = (),
    calibration: Any = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    damping: float = DAMPING,
    seed: int = 0,
) -> LanguageModel:
    """The model with a share of the weights inside its layers set to exactly zero.

    Args:
      model: with float parameters; it stays as it is.
      sparsity: share of zeros, from 0 to below 1, the same in each matrix unless scope is global; leave it out for N:M
        patterns, which have their own.
      criterion: `magnitude`: small weights go; `random`: any; `taylor`: small weight times gradient of the loss, summed
        over sequences (Molchanov et al. 2017); `wanda`: small weight times norm of its input (Sun et al. 2024, equation
        1); `sparsegpt`: those that second order says cost least, and the others are updated (Frantar & Alistarh 2023).
        The last three need calibration.
      scope: what weights compete with: `layer` (their matrix), `output` (their output) or `global` (all; not for
        wanda). None: output for wanda, layer for magnitude, random and taylor. sparsegpt has its own: blocks of 128
        inputs.
      pattern: `unstructured`; N:M such as `2:4`, N of M weights stay along the inputs; blocks such as `16x16` (not for
        sparsegpt).
      skip: matrices that stay dense: regular expressions of whole names, such as `.*/mixer/value/kernel`.
      calibration: text, of which windows are drawn, or (N, T) ids.
      sequences, length: windows to measure, and tokens in each.
      damping: of sparsegpt: share of the mean diagonal of X^T X that is added to it.
      seed: of random, and of the windows.

    Raises:
      ConfigError: something that contradicts itself or the model; the message says what to change.
      DataError: the calibration text is too short, or gives no numbers to go by.
    """
    if criterion not in ONE_SHOT:
        raise ConfigError(f"prune.criterion = {criterion!r}: in one shot there are {', '.join(ONE_SHOT)}")
    kind, (n, m) = parse_pattern(pattern)
    if kind == "n:m":
        if sparsity not in (None, 1 - n / m):
            raise ConfigError(f"prune.sparsity = {sparsity}: prune.pattern = {pattern} has {1 - n / m}; leave it out")
        sparsity = 0.0  # as in a config
    if sparsity is None or not 0 <= sparsity < 1:
        raise ConfigError(f"prune.sparsity = {sparsity}: must be at least 0 and below 1")
    plan = PruneConfig(sparsity, criterion, scope, pattern, "one_shot", skip=tuple(skip))
    check_scope(plan)
    tokens = None
    if criterion in CALIBRATED:
        if calibration is None:
            what = "gradients" if criterion == "taylor" else "inputs"
            raise ConfigError(f"prune.criterion = {criterion} measures {what}: give calibration, a text or (N, T) ids")
        tokens = calibration_tokens(model, calibration, sequences, length, seed)
    return replace(model, params=_pruned(model, plan, tokens, damping, seed))


def starting_prune(cfg: Experiment, model: LanguageModel, tokens: np.ndarray) -> Any:
    """Parameters to start a run of cfg.prune.criterion = wanda or sparsegpt from: pruned, with exact zeros.

    Args:
      cfg: of the run.
      model: before the run.
      tokens: (N, T) ids to measure.

    Raises ConfigError and DataError as `prune` does.
    """
    return _pruned(model, cfg.prune, tokens, DAMPING, cfg.seed)


def _pruned(model, plan: PruneConfig, tokens, damping, seed):
    check_float_weights(model.params)
    names = matrices(model.params, plan.skip, "prune.skip")
    weights = {name: leaf for name, leaf in flat(model.params).items() if name in names}
    scope = plan.scope or ("output" if plan.criterion == "wanda" else "layer")
    keep = functools.partial(_keep, full_sparsity(plan.sparsity, plan.pattern), scope, plan.pattern)
    jax.eval_shape(keep, weights)  # does the pattern divide all of them?
    if plan.criterion not in BY_LAYERS:
        scores = _scores(model, plan.criterion, weights, tokens, seed)
        # One at a time where it makes no difference: sorting takes several times the memory of what is sorted.
        parts = [scores] if scope == "global" else [{name: score} for name, score in scores.items()]
        masks = {name: mask for part in parts for name, mask in keep(part).items()}
        return replaced(model.params, {name: jnp.where(mask, weights[name], 0) for name, mask in masks.items()})
    if model.config.model.shared_layers:
        raise ConfigError(
            f"prune.criterion = {plan.criterion} takes one layer after the other, but this model's share parameters; "
            "use magnitude, random or taylor"
        )

    def new(name, weight, seen):
        if plan.criterion == "wanda":
            return jnp.where(keep({name: _wanda_scores(weight, seen)})[name], weight, 0)
        found = sparsegpt(weight, seen, plan.sparsity, plan.pattern, damping).astype(weight.dtype)
        if not jnp.isfinite(found).all():
            raise DataError(f"sparsegpt found no numbers for {name}: give more calibration text, or raise damping")
        return found

    take = squares if plan.criterion == "wanda" else gram
    with _bar(plan.criterion) as progress:
        return sweep(model, tokens, take, _per_matrix(layerwise.places(model.transformer), names, new), progress)


def _scores(model, criterion, weights, tokens, seed):
    """Of the weights of `weights`: the lowest go."""
    if criterion == "random":
        return random_scores(weights, seed)
    if criterion == "magnitude":
        return weights
    scores = importance.weight_products(model, list(weights), tokens)
    if not all(bool(jnp.isfinite(score).all()) for score in scores.values()):
        raise DataError("prune.criterion = taylor: gradients on the calibration text are not finite")
    return scores


def _per_matrix(where: list[layerwise.Place], names: list[str], new: Callable) -> Callable:
    """A change for `sweep` that replaces the matrices in `names` by new(name, weight, statistics)."""
    names = set(names)

    def change(number, layer, stats):
        leaves, place = flat(layer), where[number]
        for path, leaf in leaves.items():
            name = f"{place.group}/{place.number}/{path}"
            if name not in names:
                continue
            seen = stats.get(path.removesuffix("/kernel"))
            if seen is None:
                raise ConfigError(f"nobody knows the inputs of {name}: give skip = '.*/{path}'")
            leaves[path] = new(name, leaf, seen)
        return nested(leaves)

    return change


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _keep(sparsity, scope, pattern, scores):
    scores = {name: jnp.abs(score.astype(jnp.float32)) for name, score in scores.items()}
    return keep_masks(scores, sparsity, scope, pattern)


@jax.jit
def _wanda_scores(weight_IxO, squares_I):
    """|W_ij| ||X_i||: inputs are the rows here, and the columns in the paper."""
    return jnp.abs(weight_IxO.astype(jnp.float32)) * jnp.sqrt(squares_I)[:, None]


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function for `sweep` that shows its progress, if there is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, layers: bar.update(task, completed=done, total=layers)
