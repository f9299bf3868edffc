"""The text that a model is scored on: what its run held out, or any source."""

import dataclasses
from pathlib import Path
from typing import Any

from slm.errors import DataError
from slm.models.language_model import LanguageModel


def text_of(
    model: LanguageModel, run: str | Path, source: str | None = None, sequence_length: int | None = None
) -> tuple[str, Any]:
    """(its name, slm.data.evaluation.Evaluation).

    Args:
      model: opened from `run`.
      source: whatever data.source can name; None: what the run held out from training.
      sequence_length: of the windows; None: as in the run's own evaluations.

    Raises DataError if there is no such text, or if the run's data have changed since.
    """
    from slm.data.evaluation import open_evaluation, whole_corpus
    from slm.data.pipeline import open_data
    from slm.data.sources import open_source
    from slm.interop.saved import is_saved
    from slm.training.run import data_fingerprint

    data, seed = model.config.data, model.config.seed
    if sequence_length is not None:
        data = dataclasses.replace(data, sequence_length=sequence_length, validation_length=None)
    if source is None and (model.origin is not None or is_saved(Path(run))):
        raise DataError(f"{run} is no run of ours, so no text of it is held out: name a --source to score on")
    if source is None:
        trained = open_data(model.config.data, seed, model.tokenizer)
        if trained.validation is None:
            raise DataError(f"{run} held nothing out from training: name a --source to score on")
        if trained.fingerprint != data_fingerprint(run, model.config):
            raise DataError(
                f"the data of {run} has changed since training, so what would be held out now may have been "
                "trained on: restore it, or name a --source to score on"
            )
        # The fingerprint depends on the windows' length, the split does not.
        same = data == model.config.data
        evaluation = (trained if same else open_data(data, seed, model.tokenizer)).validation
        return (f"held out from {evaluation.name}" if not data.validation else evaluation.name), evaluation
    # Unlike slm.evaluate, which also takes text, a misspelt source must not be scored as one.
    what = source if source.startswith("synthetic:") else whole_corpus(open_source(source, data), data, model.tokenizer)
    evaluation = open_evaluation(what, data, model.tokenizer, data.validation_length or data.sequence_length, seed)
    return evaluation.name, evaluation
