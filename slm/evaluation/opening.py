"""One way to open a model, whichever house it comes from."""

import json
from pathlib import Path

from slm.errors import ConfigError
from slm.models.language_model import LanguageModel


def open_model(path: str | Path, checkpoint: str | int = "latest") -> LanguageModel:
    """The model of a run folder, of a Hugging Face folder, or of a .gguf file.

    Args:
      path: a run is known by the section `model` of its config.json.
      checkpoint: of a run, see slm.load; others have none.

    Raises:
      CheckpointError: there is nothing of the kind, or it is damaged.
      ConfigError: a checkpoint was asked of a model that has none, or its family is not supported.
    """
    if not _is_pretrained(Path(path).expanduser()):
        from slm.training.run import load

        return load(path, checkpoint)
    if checkpoint != "latest":
        raise ConfigError(f"{path} is no run of ours and has no checkpoint {checkpoint}: leave --checkpoint out")
    from slm.interop.pretrained import from_pretrained

    return from_pretrained(path)


def _is_pretrained(path: Path) -> bool:
    if path.suffix == ".gguf":
        return True
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        # What is no run is best told by who reads runs, unless somebody's weights lie there.
        return path.is_dir() and any(path.glob("*.safetensors"))
    return isinstance(settings, dict) and not isinstance(settings.get("model"), dict)
