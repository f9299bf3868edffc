"""The teacher of a run: opened, and refused by name where student and teacher would not speak of the same tokens."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from slm.compress.convert import transfer_objective
from slm.compress.distill import CACHED, distill_objective
from slm.compress.quantize import dequantize
from slm.compress.teacher_cache import CachedTeacher, open_cached
from slm.compress.translate import TRANSLATED, Translator, spread_of
from slm.config import Experiment, ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.models.counts import abstract_parameters
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer, any_backend
from slm.training import precision
from slm.training.objective import Objective

SEQUENCES = "let the teacher write text instead (slm.sample_teacher), and train on that, which needs no common tokens"
SOME = 64
"""Training sequences from which it is told how many tokens of the teacher's a row has."""


class Teaching(NamedTuple):
    """What a run that distils has besides one that does not."""

    objective: Callable[[Experiment], Objective]
    """Of the run's config, or of one with other numbers in it."""
    params: Any
    """The teacher's parameters, in the student's compute dtype; None where it is cached."""
    extra_batch: dict[str, tuple[tuple[int, ...], str]]
    """Further entries of a batch: name to (shape behind (B, T), dtype)."""
    cached: CachedTeacher | None
    """Where those entries come from."""
    translator: Translator | None = None
    """Or what makes them of the batch, for a teacher with another tokenizer."""


def teaching(cfg: Experiment, transformer: Transformer, data: Any) -> Teaching:
    """What cfg.distill asks for.

    Args:
      cfg: with model.vocab_size filled in.
      transformer: the student's.
      data: slm.data.pipeline.Data of the run.

    Raises ConfigError where teacher and student do not fit together; what opening a model or a cache raises.
    """
    ids = data.tokenizer.vocab_size
    if cfg.distill.cached is not None:
        if cfg.model.head != "lm":
            raise ConfigError(
                f"distill.cached with model.head = {cfg.model.head}: what it hides changes at each step, so nothing "
                "said of it before holds; set distill.teacher instead"
            )
        cached = open_cached(cfg.distill.cached, data, cfg.data.sequence_length)
        k, floats = cached.top_k, cached.dtype
        shapes = dict(zip(CACHED, [((k,), "int32"), ((k,), floats), ((), floats)], strict=True))
        return Teaching(lambda cfg: distill_objective(cfg, transformer, None, ids), None, shapes, cached)
    from slm.evaluation.opening import open_model

    try:
        model = dequantize(open_model(cfg.distill.teacher))
    except (CheckpointError, ConfigError) as error:
        raise type(error)(f"distill.teacher = {cfg.distill.teacher!r}: {error}") from error
    check_teacher(model, cfg, data.tokenizer)
    params = precision.cast(model.params, transformer.dtype)
    theirs = model.config.model

    def objective(cfg: Experiment) -> Objective:
        return _objective(cfg, transformer, theirs, ids)

    if cfg.distill.loss == "uld":
        translator = _translator(model, cfg, data)
        shapes = dict(zip(TRANSLATED, [((translator.spread,), "int32")] * 2 + [((), "int32")], strict=True))
        return Teaching(objective, params, shapes, None, translator)
    return Teaching(objective, params, {}, None)


def planned_teaching(cfg: Experiment, transformer: Transformer) -> Teaching:
    """`teaching` from shapes alone, for a plan: of parameters it has jax.ShapeDtypeStruct. Raises ConfigError."""
    from slm.compress.start import starting_config

    if cfg.distill.cached is not None:
        raise ConfigError("--dry-run reads no data, and distill.cached belongs to some: leave it out")
    if cfg.distill.loss == "uld":
        raise ConfigError("--dry-run reads no data, of which distill.loss = uld wants to know how the teacher cuts it")
    alone = Experiment(model=ModelConfig(init_from=cfg.distill.teacher))
    model = dataclasses.replace(starting_config(alone).model, init_from=None)
    model = dataclasses.replace(model, vocab_size=model.vocab_size or cfg.model.vocab_size)
    params = jax.eval_shape(lambda params: precision.cast(params, transformer.dtype), abstract_parameters(model))
    return Teaching(lambda cfg: _objective(cfg, transformer, model, cfg.model.vocab_size), params, {}, None)


def _objective(cfg: Experiment, transformer: Transformer, theirs: ModelConfig, ids: int) -> Objective:
    shape = dataclasses.replace(any_backend(theirs), remat="none")
    teacher = Transformer(shape, transformer.dtype, transformer.constrain)
    objective = distill_objective(cfg, transformer, teacher, ids)
    return transfer_objective(cfg, transformer, teacher, objective) if cfg.convert.transfer_steps else objective


def _translator(model: LanguageModel, cfg: Experiment, data: Any) -> Translator:
    from slm.evaluation.borders import prompt_ids

    # A tokenizer without any token that begins a text gives none.
    prefix = () if model.tokenizer.end_of_text is None and model.origin is None else prompt_ids(model, "").tolist()
    some = data.train_batch(0, min(SOME, data.train_sequences))
    spread = spread_of(data.tokenizer, model.tokenizer, prefix, some)
    check_reach(model, spread * cfg.data.sequence_length, f"distill.teacher = {cfg.distill.teacher!r}")
    return Translator(data.tokenizer, model.tokenizer, prefix, spread)


def check_teacher(model: LanguageModel, cfg: Experiment, tokenizer: Any) -> None:
    """Raises ConfigError unless `model` can teach the student of `cfg`, whose text `tokenizer` cuts."""
    theirs, mine, name = model.config.model, cfg.model, f"distill.teacher = {cfg.distill.teacher!r}"
    foreign = cfg.distill.loss == "uld"
    if foreign and mine.head != "lm":
        raise ConfigError(
            f"distill.loss = uld with model.head = {mine.head}: it compares next tokens; use model.head = lm"
        )
    check_tokens(model, tokenizer, name, foreign)
    if (theirs.head, theirs.causal) != (mine.head, mine.causal):
        raise ConfigError(
            f"{name} has model.head = {theirs.head}, the student {mine.head}: choose a teacher that is asked the same"
        )
    if theirs.vocab_size != mine.vocab_size and not (foreign or cfg.distill.pad_vocabulary):
        raise ConfigError(
            f"{name} has model.vocab_size = {theirs.vocab_size} and the student {mine.vocab_size}: set the same, or, "
            f"since the tokenizer has only {tokenizer.vocab_size} ids and the rest is padding, distill.pad_vocabulary"
        )
    if not foreign:
        check_reach(model, cfg.data.sequence_length, name)


def check_tokens(model: LanguageModel, tokenizer: Any, name: str, foreign: bool = False) -> None:
    """Raises ConfigError unless each id means the same text to `model` as to `tokenizer`, or, if it may be `foreign`,
    unless it has a tokenizer."""
    if model.tokenizer is None:
        raise ConfigError(f"{name} has no tokenizer, so nobody can tell what its ids mean: give it its tokenizer.json")
    if foreign:
        return
    if model.tokenizer.fingerprint != tokenizer.fingerprint and _ids(model.tokenizer) != _ids(tokenizer):
        raise ConfigError(
            f"{name} has another tokenizer, with {model.tokenizer.vocab_size} ids against {tokenizer.vocab_size} of "
            f"data.tokenizer: set data.tokenizer to the teacher's, or distill.loss = uld, which compares sorted "
            f"probabilities, or {SEQUENCES}"
        )
    if model.config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"{name} has logits for {model.config.model.vocab_size} ids, fewer than the {tokenizer.vocab_size} of "
            f"data.tokenizer: {SEQUENCES}"
        )


def check_reach(model: LanguageModel, length: int, name: str) -> None:
    """Raises ConfigError if `model` has learned positions that end before `length`."""
    m = model.config.model
    if m.position == "learned" and m.max_length < length:
        raise ConfigError(
            f"{name} has {m.max_length} learned positions, fewer than data.sequence_length = {length}: lower that"
        )


def _ids(tokenizer: Any) -> dict[str, int]:
    return tokenizer.backend.get_vocab(with_added_tokens=True)
