"""Writing what a teacher says of training text (slm.compress.teacher_cache). Records are appended, so that a killed
writer goes on where it stopped."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from slm.compress.distill import CACHED
from slm.compress.teacher_cache import HEADER, header_of, read_header, record_of
from slm.config import Experiment
from slm.errors import ConfigError, DataError
from slm.models.heads import check_next_token
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer, any_backend
from slm.training.loss import chunk_logits, join_time, split_time

ROWS = 16
"""Windows that the teacher reads at once. A writer goes on at a multiple of it, so that its bytes are the same."""


def cache_teacher(
    teacher: LanguageModel | str | Path,
    cfg: Experiment,
    folder: str | Path,
    top_k: int = 32,
    whole: bool = False,
    dtype: str = "float16",
    progress: Callable[[int, int], None] = lambda done, rows: None,
) -> dict[str, float]:
    """Writes what `teacher` says of the training windows of `cfg` into `folder`, or goes on where a writer stopped.

    Args:
      teacher: a model, or the path of one.
      cfg: the experiment of a student; its data, and unless `whole` its seed, batch size and steps, are read.
      folder: a new one, or that of an interrupted writer with the same settings.
      top_k: tokens kept of each distribution.
      whole: every window of the data, and not only those that the run of `cfg` will draw.
      dtype: of log-probabilities: float16, or float32 for tests.
      progress: called with (windows done, windows).

    Returns:
      {"windows", "tokens", "bytes", "bytes_per_token", "left_out": mean probability of the tokens that are not kept}.

    Raises:
      ConfigError: another tokenizer, top_k above the vocabulary, or a head that does not predict the next token.
      DataError: the folder holds a cache of something else, or cannot be written.
    """
    from slm.compress.start import starting_config
    from slm.compress.teacher import check_reach, check_tokens
    from slm.data.cache import disk_errors
    from slm.data.pipeline import open_data
    from slm.evaluation.opening import open_model

    model = teacher if isinstance(teacher, LanguageModel) else open_model(teacher)
    check_next_token(model.config.model)
    cfg, folder = starting_config(cfg), Path(folder)
    data = open_data(cfg.data, cfg.seed)
    name = "the teacher" if isinstance(teacher, LanguageModel) else f"the teacher {str(teacher)!r}"
    check_tokens(model, data.tokenizer, name)
    check_reach(model, cfg.data.sequence_length, name)
    vocab_size = data.tokenizer.vocab_size
    if not 1 <= top_k <= vocab_size:
        raise ConfigError(f"top_k = {top_k}: must be from 1 to the {vocab_size} ids of the tokenizer")
    if any(spec.startswith("synthetic:") for spec in cfg.data.source):
        raise ConfigError(
            "data.source: synthetic tasks draw other sequences for each seed, which no cache can hold; set "
            "distill.teacher"
        )
    rows = _rows(data, cfg, whole)
    record = record_of(cfg.data.sequence_length, top_k, vocab_size, dtype)
    header = header_of(data, cfg.data.sequence_length) | {
        "top_k": top_k,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "windows": [len(part) for part in rows],
        "teacher": [model.config.name, _weights(model)],
    }
    done, left_out = 0, 0.0
    with disk_errors(folder):
        _begin(folder, header, rows)
        for number, part in enumerate(rows):
            path = folder / f"source_{number}.bin"
            size = path.stat().st_size if path.exists() else 0
            first = (
                size // record.itemsize
                if size == len(part) * record.itemsize
                else size // record.itemsize // ROWS * ROWS
            )
            with open(path, "r+b" if path.exists() else "wb") as file:
                file.truncate(first * record.itemsize)
                file.seek(0, os.SEEK_END)
                for start in range(first, len(part), ROWS):
                    said = _say(model, data.train[number], part[start : start + ROWS], cfg, top_k, vocab_size)
                    out = np.zeros(len(said[CACHED[0]]), record)
                    for entry, value in said.items():
                        out[entry] = value
                    file.write(out.tobytes())
                    progress(done + start + len(out), sum(map(len, rows)))
            done += len(part)
            records = np.memmap(path, record, "r", shape=(len(part),))
            left_out += sum(float(np.exp(one["teacher_log_tail"].astype(np.float32)).sum()) for one in records)
    tokens, size = done * cfg.data.sequence_length, done * record.itemsize
    counts = {"windows": done, "tokens": tokens, "bytes": size}
    return counts | {"bytes_per_token": size / tokens, "left_out": left_out / tokens}


def _rows(data, cfg: Experiment, whole: bool) -> list[np.ndarray]:
    if whole:
        return [np.arange(len(part)) for part in data.train]
    drawn = [data.drawn(step, cfg.train.batch_size) for step in range(cfg.train.steps)]
    source, index = (np.concatenate(parts) for parts in zip(*drawn))
    return [np.unique(index[source == number]) for number in range(len(data.train))]


def _begin(folder: Path, header: dict, rows: list[np.ndarray]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / HEADER).exists():
        old = read_header(folder)
        differing = [name for name in header if old.get(name) != header[name]]
        same = not differing and all(
            np.array_equal(np.load(folder / f"rows_{number}.npy"), part) for number, part in enumerate(rows)
        )
        if not same:
            raise DataError(
                f"{folder} holds a cache of something else ({', '.join(differing) or 'other windows'} differ): name a "
                "new folder, or delete this one"
            )
        return
    if any(folder.iterdir()):
        raise DataError(f"{folder} is not empty and holds no cache: name a new folder")
    for number, part in enumerate(rows):
        np.save(folder / f"rows_{number}.npy", part)
    # Last, and in one piece: a folder with a header has all that the header speaks of.
    partial = folder / f"{HEADER}.tmp"
    partial.write_text(json.dumps(header, indent=2) + "\n")
    os.replace(partial, folder / HEADER)


def _say(model: LanguageModel, source, index: np.ndarray, cfg: Experiment, top_k: int, vocab_size: int) -> dict:
    """What the teacher says of some windows, as NumPy arrays by name in CACHED."""
    batch = source.read(np.resize(index, ROWS))  # always as many, so that all are one compilation
    shape = dataclasses.replace(any_backend(model.config.model), remat="none")
    said = _likeliest(
        Transformer(shape, model.dtype), cfg.data.packing == "documents", top_k, vocab_size, cfg.train.loss_chunk,
        model.params, {name: batch[name] for name in ("tokens", "segment_ids", "positions")},
    )  # fmt: skip
    return {name: np.asarray(value)[: len(index)] for name, value in zip(CACHED, said, strict=True)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _likeliest(transformer, documents, top_k, vocab_size, chunk, params, batch):
    """(ids (B, T, k), log-probabilities (B, T, k), log of the rest (B, T)), logits of `chunk` steps at a time."""
    segment_ids = batch["segment_ids"] if documents else None
    hidden, _ = transformer.hidden(params, batch["tokens"], segment_ids=segment_ids, positions=batch["positions"])
    hidden, unembedding = transformer.readout(params, hidden)

    def one(hidden):
        log_p = jax.nn.log_softmax(chunk_logits(hidden, unembedding, transformer.cfg.logit_softcap)[..., :vocab_size])
        top, ids = jax.lax.top_k(log_p, top_k)
        rest = jnp.put_along_axis(log_p, ids, -jnp.inf, -1, inplace=False)
        return ids, top, jax.nn.logsumexp(rest, -1)

    said = jax.lax.map(one, split_time(hidden, chunk))
    return tuple(join_time(x)[:, : hidden.shape[1]] for x in said)


def _weights(model: LanguageModel) -> str:
    """A hash of a few numbers of each parameter: enough to tell one model from another of the same name."""
    from slm.data.cache import digest

    leaves = jax.tree.leaves(model.params)
    return digest([np.asarray(jnp.ravel(leaf)[:8]).tobytes() for leaf in leaves])
