"""What a smaller model saves, and what it costs: two models measured side by side."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slm.errors import ConfigError
from slm.evaluation.bits_per_byte import evaluate
from slm.evaluation.bootstrap import bootstrap_interval
from slm.evaluation.decoding import Decoding
from slm.evaluation.sampling import make_sampling
from slm.models.counts import flops_per_token, parameter_counts
from slm.models.language_model import LanguageModel
from slm.models.quantized import as_array, is_quantized

SPARSE = 0.9
"""Share of numbers that are not zero below which a model is called sparse."""


@dataclass(frozen=True)
class Measured:
    """One model. None: not measured."""

    name: str
    parameters: int
    non_embedding: int
    """Without embedding table and output projection."""
    non_zero: int
    bytes_in_memory: int
    """Of the parameters as they are held: 4 a number in float32."""
    bytes_on_disk: int
    """Of the folder that slm.save writes."""
    flops_per_token: float
    """Of a forward pass over `prompt_tokens`; zeros are multiplied like other numbers."""
    prefill: float | None
    """Tokens a second, one prompt, reading it."""
    decode: float | None
    """Tokens a second, one text, writing it."""
    bits_per_byte: float | None
    bits_per_byte_stderr: float | None


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns; prints as a table."""

    first: Measured
    second: Measured
    difference: float | None
    """Bits a byte of the second less those of the first."""
    interval: tuple[float, float] | None
    """95 % of the paired bootstrap of that difference, over documents or windows."""
    speed_ratios: dict[str, tuple[float, float, float]]
    """`prefill`, `decode`: how many times the second's speed is the first's: median, lowest, highest of the rounds."""
    notes: tuple[str, ...]
    """What the numbers mean, and what they do not."""
    device: str

    def __str__(self) -> str:
        rows = [("", self.first.name, self.second.name, "")]
        for field in dataclasses.fields(Measured)[1:]:
            a, b = getattr(self.first, field.name), getattr(self.second, field.name)
            if a is not None and b is not None and field.name != "bits_per_byte_stderr":
                ratio = f"{b / a:.2f} x" if field.name != "bits_per_byte" else f"{b - a:+.4f}"
                rows.append((field.name.replace("_", " "), _shown(a), _shown(b), ratio))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]) for row in rows
        ]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    __repr__ = __str__  # what a notebook shows

    def save(self, path: str | Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def compare(
    first: LanguageModel,
    second: LanguageModel,
    text_or_source: str | Sequence[str] | None = None,
    *,
    sequence_length: int | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    rounds: int = 5,
    seed: int = 0,
    names: tuple[str, str] | None = None,
) -> Comparison:
    """Sizes, speeds and scores of two models.

    Speeds are of this machine, one text at a time, in alternating turns in one process after a warm-up. Bits a byte are
    of the same text; the interval of their difference resamples its documents (or windows, see slm.evaluate) for both
    models together (paired bootstrap: Koehn 2004; Efron & Tibshirani 1993).

    Args:
      first, second: the one that it is compared with, such as a teacher; the other, such as its student.
      text_or_source: what slm.evaluate takes; None: no score.
      sequence_length: of the windows that are scored; None: the shorter of the two models' own.
      prompt_tokens, new_tokens: read and written in each round.
      rounds: turns of each model; 0: no speeds.
      seed: of the resampling.
      names: what to call the two; None: as their configs do, which changed models share with what they were.

    Raises what slm.evaluate raises, and ConfigError if the clusters of the two differ, as with different tokenizers and
    a single document.
    """
    models, notes = (first, second), []
    speeds = _speeds(models, prompt_tokens, new_tokens, rounds)
    scores: list[dict[str, Any]] = [{}, {}]
    difference = interval = None
    if text_or_source is not None:
        own = [m.config.data.validation_length or m.config.data.sequence_length for m in models]
        length = sequence_length or min(own)
        scores = [evaluate(m, text_or_source, sequence_length=length, by_cluster=True) for m in models]
        difference, interval = paired_bootstrap(*(s["clusters"] for s in scores), seed=seed)
        low, high = interval
        if low <= 0 <= high:
            notes.append(
                f"bits per byte: a tie, the difference is {difference:+.4f} with 95 % from {low:+.4f} to {high:+.4f}"
            )
        else:
            notes.append(f"bits per byte: {difference:+.4f}, with 95 % from {low:+.4f} to {high:+.4f}")
    measured = [
        _measure(
            model,
            model.config.name if names is None else names[i],
            prompt_tokens,
            score,
            {name: statistics.median(v[i] for v in turns) for name, turns in speeds.items()},
        )
        for i, (model, score) in enumerate(zip(models, scores))
    ]
    ratios = {}
    for name, turns in speeds.items():
        each = [b / a for a, b in turns]
        ratios[name] = statistics.median(each), min(each), max(each)
        if ratios[name][1] <= 1 <= ratios[name][2]:
            notes.append(f"{name}: no speed-up, the rounds go from {min(each):.2f} to {max(each):.2f} times")
    notes += [_sparse(one, model) for one, model in zip(measured, models) if one.non_zero < SPARSE * one.parameters]
    device = jax.devices()[0].device_kind
    return Comparison(*measured, difference, interval, ratios, tuple(notes), f"{jax.default_backend()} {device}")


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, seed: int = 0, confidence: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """(difference of bits per byte, second less first; its interval) from (n, 2) nats and bytes of the same n clusters.

    Percentiles over resamplings of clusters, the same ones for both. Raises ConfigError unless the clusters agree.
    """
    if len(first) != len(second) or not np.array_equal(first[:, 1], second[:, 1]):
        raise ConfigError(
            "the two models cut this text into different pieces, so scores cannot be paired: give a list of texts, or "
            "a source with at least 20 documents"
        )
    bytes_ = first[:, 1] * math.log(2)
    interval = bootstrap_interval((second[:, 0] - first[:, 0])[None], bytes_, seed=seed, confidence=confidence)
    whole = (second[:, 0].sum() - first[:, 0].sum()) / first[:, 1].sum() / math.log(2)
    return float(whole), interval


def non_zero(params: Any) -> int:
    """Numbers that are not zero, of rounded matrices too."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    return sum(int(np.count_nonzero(np.asarray(as_array(leaf)))) for leaf in leaves)


def plot_sizes(models: Sequence[Measured], path: str | Path | None = None) -> Any:
    """Quality against size: bits per byte over bytes on disk, a point a model; matplotlib's axes, saved if asked to."""
    from slm.evaluation import style

    ax = style.axes()
    for number, one in enumerate(models):
        x = one.bytes_on_disk / 1e6
        look = style.look(number) | {"linestyle": "none", "markersize": 6}
        ax.errorbar(x, one.bits_per_byte, one.bits_per_byte_stderr, capsize=3, **look)
    ax.set(xlabel="size on disk (MB)", ylabel="bits per byte (lower is better)", xscale="log")
    ticks = np.unique([float(f"{one.bytes_on_disk / 1e6:.3g}") for one in models])
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    ax.set_xticks([], minor=True)
    ax.margins(0.15)
    ax.autoscale_view()
    spots = ax.transData.transform([(one.bytes_on_disk / 1e6, one.bits_per_byte) for one in models])
    for one, spot in zip(models, spots):
        # A name stands to the right of its point, unless another point is in its way.
        right, up = (spots - spot).T * 72 / ax.figure.dpi
        taken = ((right > 0) & (right < 12 + 6 * len(one.name)) & (abs(up - 5) < 16)).any()
        ax.annotate(
            one.name, (one.bytes_on_disk / 1e6, one.bits_per_byte), xytext=(-6 if taken else 6, 5),
            ha="right" if taken else "left", textcoords="offset points", fontsize=9,
        )  # fmt: skip
    if path is not None:
        ax.figure.savefig(path, dpi=150)
    return ax


def _measure(model: LanguageModel, name: str, length: int, score: dict[str, Any], speed: dict[str, float]) -> Measured:
    cfg = model.config.model
    counts = parameter_counts(cfg)
    return Measured(
        name=name,
        parameters=counts["total"],
        non_embedding=counts["blocks"] + counts["final_norm"],
        non_zero=non_zero(model.params),
        bytes_in_memory=sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)),
        bytes_on_disk=_bytes_on_disk(model),
        flops_per_token=flops_per_token(cfg, length)["forward"],
        prefill=speed.get("prefill"),
        decode=speed.get("decode"),
        bits_per_byte=score.get("bits_per_byte"),
        bits_per_byte_stderr=score.get("bits_per_byte_stderr"),
    )


def _bytes_on_disk(model: LanguageModel) -> int:
    import tempfile

    from slm.interop.saved import save

    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def _speeds(models, prompt_tokens: int, new_tokens: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """For `prefill` and `decode`, (first's, second's) tokens a second of each round."""
    if not rounds:
        return {}
    for model in models:
        _turn(model, prompt_tokens, new_tokens)
    turns = [[_turn(model, prompt_tokens, new_tokens) for model in models] for _ in range(rounds)]
    return {name: [tuple(one[i] for one in pair) for pair in turns] for i, name in enumerate(("prefill", "decode"))}


def _turn(model: LanguageModel, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
    prompt = np.arange(prompt_tokens, dtype=np.int32) % min(model.config.model.vocab_size, 200)
    start = time.perf_counter()
    decoding = Decoding(
        model.transformer, model.params, [prompt], max_new_tokens=new_tokens, sampling=make_sampling(temperature=0.0)
    )
    decoding.advance(1)
    read = time.perf_counter()
    decoding.advance(new_tokens - 1)
    return prompt_tokens / (read - start), (new_tokens - 1) / (time.perf_counter() - read)


def _sparse(one: Measured, model: LanguageModel) -> str:
    share = 1 - one.non_zero / one.parameters
    return (
        f"{one.name}: {share:.0%} of its numbers are zeros, which are stored and multiplied like others: no speed-up "
        "and no less memory; slm.shrink makes a model smaller"
    )


def _shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4f}" if value < 10 else f"{value:,.1f}" if value < 1e4 else f"{value:.3g}"
