"""Bits per byte with its standard error: the score that survives a change of tokenizer."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm.errors import ConfigError, DataError
from slm.models.heads import check_next_token
from slm.models.language_model import LanguageModel
from slm.training.step import make_eval_step

MODEL_INPUTS = ("tokens", "targets", "weights", "segment_ids", "positions")
ENOUGH_DOCUMENTS = 20
"""Documents from which on they, and no longer windows, are the clusters of the standard error."""


def evaluate_batches(
    eval_step: Callable[[Any, dict], dict],
    params: Any,
    batches: Iterable[dict],
    place: Callable[[dict], dict] | None = None,
    by_position: bool = False,
    sources: Sequence[tuple[str, int, bool]] = (),
    by_cluster: bool = False,
) -> dict[str, Any]:
    """Scores of a model over batches.

    Args:
      eval_step: (params, batch) -> {"nats", "correct"}, each (B, T) float32, unweighted.
      params: its first argument.
      batches: dicts of arrays (B, T), B all rows or those of this process: tokens, targets, weights, segment_ids,
        positions; and of each target its `bytes` (UTF-8) and its `document` (number).
      place: host batch -> global device arrays; needed with several processes. None: as they are.
      by_position: also return `loss_by_position` and `tokens_by_position`.
      sources: where documents come from, in the order of their numbers (slm.data.evaluation.Evaluation.sources).
      by_cluster: also return `clusters`, (n, 2) float64: nats and bytes of each cluster of the standard error.

    Returns:
      `bits_per_byte`  total nats / total bytes / ln 2, left out if the targets stand for no bytes
      `loss`           nats a token
      `accuracy`       share of targets that have the largest logit
      each with its `_stderr`; `perplexity`, exp(loss); sums `tokens` (scored), `bytes`, `documents` (scored);
      `stderr_clusters`, their number, and `stderr_clustered_by`: `document` if there are at least 20, else `window`
      (a row), else, in a single window, `token`, which understates the error because neighbours are not independent;
      `loss_by_position`, a list: the mean loss of targets with 1, 2, ... tokens of context in their window, None where
      there are none; `tokens_by_position`, how many there are;
      `exact_match`, if all sources ask questions: the share of documents of which every scored target was right;
      `by_source`, if there are several: the scores of each by its name, with errors over its documents.

    The score is a ratio of sums, so its standard error is that of a ratio estimator (linearised: Cochran 1977, Sampling
    Techniques, section 6.4), over clusters of dependent tokens (Miller 2024, arXiv:2411.00640, section 2.2).

    Raises DataError if nothing is scored.
    """
    documents, windows, positions, tokens = _Sums(), _Sums(), _Sums(), None
    rows = 0
    for batch in batches:
        placed = batch if place is None else place(batch)
        outputs = eval_step(params, {name: placed[name] for name in MODEL_INPUTS})
        nats, correct = np.asarray(outputs["nats"]), np.asarray(outputs["correct"])
        weights, bytes_, document, position = (
            _whole(placed[name]) for name in ("weights", "bytes", "document", "positions")
        )
        scored = weights > 0
        values = np.stack([x[scored] * weights[scored] for x in (nats, correct, np.ones_like(nats), bytes_)], 1)
        documents.add(document[scored], values)
        windows.add(rows + np.nonzero(scored)[0], values)
        positions.add(position[scored], values)
        rows += len(nats)
        tokens = values if len(values) else tokens
    if tokens is None:
        raise DataError("nothing to evaluate: no target has a weight above 0")
    numbers, table = documents.keyed()
    clusters = {"document": table, "window": windows.table(), "token": tokens}
    by = "document" if len(clusters["document"]) >= ENOUGH_DOCUMENTS else "window"
    by = "token" if len(clusters[by]) < 2 else by
    result = _scores(clusters[by]) | {
        "documents": len(clusters["document"]),
        "stderr_clusters": len(clusters[by]),
        "stderr_clustered_by": by,
    }
    if by_cluster:
        result["clusters"] = clusters[by][:, [0, 3]]
    if sources and all(questions for _, _, questions in sources):
        result |= _exact_match(table)
    if len(sources) > 1:
        result["by_source"] = _by_source(sources, numbers, table)
    return result | (_by_position(positions) if by_position else {})


def evaluate(
    model: Any,
    text_or_source: str | Sequence[str] | None = None,
    batch_size: int = 16,
    sequence_length: int | None = None,
    by_position: bool = False,
    by_cluster: bool = False,
) -> dict[str, Any]:
    """Scores of a model, in float32, on a text, on several, or on a source: see `evaluate_batches` for what they are.

    slm.evaluate(run)                       # what the run held out from training
    slm.evaluate(model, "any text")
    slm.evaluate(model, "tfds:lm1b/test")

    A string is a source if it names one that exists or looks as if it should (slm.data.sources.names_a_source:
    `cpython`, `tfds:...`, `synthetic:...`, an existing file or folder, one word with a slash or a known suffix);
    anything else is text, one document. A list is texts, one document each.

    A text is read as end-of-text and then its tokens. Each of its tokens is scored once and end-of-text never, so bytes
    are the UTF-8 bytes of the text (exactly so for byte-level tokenizers). Without an end-of-text token the first
    token is not scored. Texts longer than `sequence_length` are cut into windows that do not overlap and see nothing
    of each other, so the score is a little worse than with endless context.

    Args:
      model: a LanguageModel; or the Run that slm.train returned, or the folder of a run.
      text_or_source: see above; None: what the run held out, for which `model` has to be a run.
      batch_size: windows at a time; does not change the scores.
      sequence_length: tokens in a window; None: as in the run's own evaluations.
      by_position: also return `loss_by_position` and `tokens_by_position`.
      by_cluster: also return `clusters`.

    Raises:
      DataError: the source does not exist, is empty or cannot be read, there is nothing to score, or what the run was
        trained on has changed since.
      ConfigError: a model without a text, a synthetic task for a model that was not trained on such, or a size is out
        of range.
      CheckpointError: there is no such run.
    """
    from slm.data.evaluation import open_evaluation
    from slm.evaluation.held_out import text_of
    from slm.training.run import Run, load

    run = None
    if isinstance(model, (str, Path)):
        run, model = model, load(model)
    elif isinstance(model, Run):
        run, model = model.dir, model.model
    check_sizes(model, batch_size, sequence_length)
    if text_or_source is not None:
        length = sequence_length or model.config.data.validation_length or model.config.data.sequence_length
        evaluation = open_evaluation(text_or_source, model.config.data, model.tokenizer, length, model.config.seed)
    elif run is not None:
        _, evaluation = text_of(model, run, sequence_length=sequence_length)
    else:
        raise ConfigError(
            "evaluate: a model does not say what to score it on: name a text or a source, or give the run (slm.train "
            "returns it) or its folder, which held something out"
        )
    batches = evaluation.batches(batch_size)
    return evaluate_batches(
        eval_step_of(model),
        model.params,
        batches,
        by_position=by_position,
        sources=evaluation.sources,
        by_cluster=by_cluster,
    )


def check_sizes(model: LanguageModel, batch_size: int, sequence_length: int | None) -> None:
    """Raises ConfigError if a size is below 1, the windows are longer than the model's learned positions, or it does
    not predict the next token."""
    if batch_size < 1:
        raise ConfigError(f"batch_size = {batch_size}: must be at least 1")
    if sequence_length is not None and sequence_length < 1:
        raise ConfigError(f"sequence_length = {sequence_length}: must be at least 1")
    cfg = model.config.model
    check_next_token(cfg)
    if sequence_length is not None and cfg.position == "learned" and sequence_length > cfg.max_length:
        raise ConfigError(
            f"sequence_length = {sequence_length}: this model has {cfg.max_length} learned positions, and no more fit"
        )


def eval_step_of(model: LanguageModel) -> Callable[[Any, dict], dict]:
    """The jitted (params, batch) -> {"nats", "correct"} of a model, in float32; the same one for the same settings."""
    cfg = model.config
    return _jitted(model.transformer, cfg.data.packing == "documents", cfg.train.loss_chunk)


@functools.cache
def _jitted(transformer, documents, chunk):
    return jax.jit(make_eval_step(transformer, documents, chunk))


class _Sums:
    """Running sums of rows (nats, correct, weight, bytes) by an integer key."""

    def __init__(self):
        self._keys, self._values = [], []

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """keys (n,), values (n, 4), which are summed at once where keys are equal."""
        keys, values = _grouped(keys, values)
        self._keys.append(keys)
        self._values.append(values)

    def keyed(self) -> tuple[np.ndarray, np.ndarray]:
        """(distinct keys, ascending; their sums (keys, 4) float64)."""
        return _grouped(np.concatenate(self._keys), np.concatenate(self._values))

    def table(self) -> np.ndarray:
        return self.keyed()[1]


def _grouped(keys, values):
    keys, inverse = np.unique(keys, return_inverse=True)
    return keys, np.stack([np.bincount(inverse, column, len(keys)) for column in values.T], 1)


def _scores(table: np.ndarray) -> dict[str, Any]:
    """Scores and standard errors from sums (clusters, 4)."""
    nats, correct, weight, bytes_ = table.T
    loss, loss_stderr = ratio(nats, weight)
    scores = {}
    if bytes_.sum() > 0:
        scores["bits_per_byte"], scores["bits_per_byte_stderr"] = ratio(nats / math.log(2), bytes_)
    scores |= {"loss": loss, "loss_stderr": loss_stderr, "perplexity": float(np.exp(loss))}
    scores["accuracy"], scores["accuracy_stderr"] = ratio(correct, weight)
    return scores | {"tokens": round(weight.sum()), "bytes": round(bytes_.sum())}


def _exact_match(table: np.ndarray) -> dict[str, float]:
    """Share of the rows (nats, correct, weight, bytes) that are right as a whole."""
    _, correct, weight, _ = table.T
    return {"exact_match": float(np.isclose(correct, weight).mean())}  # weights are float32


def _by_source(sources: Sequence[tuple[str, int, bool]], numbers: np.ndarray, table: np.ndarray) -> dict[str, dict]:
    """Scores of the documents `numbers`, (documents, 4), source by source."""
    scores, first = {}, 0
    for name, documents, questions in sources:
        mine = table[(numbers >= first) & (numbers < first + documents)]
        first += documents
        if len(mine):
            scores[name] = _scores(mine) | (_exact_match(mine) if questions else {})
    return scores


def ratio(x: np.ndarray, y: np.ndarray) -> tuple[float, float | None]:
    """(sum x / sum y, its standard error), from independent pairs (x_c, y_c), c = 1 ... n.

    x/y - R is linearised to the mean of residuals e_c = x_c - R y_c; the error is sqrt(n / (n-1) sum e_c^2) / sum y.
    None from a single pair.
    """
    value, n = x.sum() / y.sum(), len(x)
    if n < 2:
        return float(value), None
    return float(value), float(math.sqrt(n / (n - 1) * ((x - value * y) ** 2).sum()) / y.sum())


def _by_position(positions: _Sums) -> dict[str, list]:
    keys, table = positions.keyed()
    losses: list[float | None] = [None] * (int(keys.max()) + 1)
    tokens = [0] * len(losses)
    for key, (nats, _, weight, _) in zip(keys, table):
        losses[key], tokens[key] = float(nats / weight), round(weight)
    return {"loss_by_position": losses, "tokens_by_position": tokens}


def _whole(array) -> np.ndarray:
    """All rows of an array that may live on several processes, in the order of the model's outputs."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
