"""slm: small language models in JAX. Train, compare attention mechanisms, compress, ship.

    import slm
    cfg = slm.override(slm.load_config("configs/quickstart.py"), {"optim.learning_rate": 3e-3})
    run = slm.train(cfg)
    slm.evaluate(run)["bits_per_byte"]  # on what it held out; or slm.evaluate(run.model, "any text, or a source")
    slm.generate(run.model, "def main(")

Names are imported when first used, so `import slm` costs nothing.
"""

import importlib

_HOME = {
    "Experiment": "slm.config",
    "ModelConfig": "slm.config",
    "MixerConfig": "slm.config",
    "RopeConfig": "slm.config",
    "DataConfig": "slm.config",
    "OptimConfig": "slm.config",
    "TrainConfig": "slm.config",
    "CheckpointConfig": "slm.config",
    "MeshConfig": "slm.config",
    "LogConfig": "slm.config",
    "ShrinkConfig": "slm.config",
    "ConvertConfig": "slm.config",
    "DistillConfig": "slm.config",
    "PruneConfig": "slm.config",
    "QuantizeConfig": "slm.config",
    "load_config": "slm.config",
    "override": "slm.config",
    "SlmError": "slm.errors",
    "LanguageModel": "slm.models.language_model",
    "logits": "slm.models.language_model",
    "train": "slm.training.loop",
    "Run": "slm.training.run",
    "load": "slm.training.run",
    "evaluate": "slm.evaluation.bits_per_byte",
    "generate": "slm.evaluation.generate",
    "stream": "slm.evaluation.generate",
    "reply": "slm.evaluation.chat",
    "from_pretrained": "slm.interop.pretrained",
    "save_pretrained": "slm.interop.pretrained",
    "save_gguf": "slm.interop.gguf_save",
    "quantize": "slm.compress.quantize",
    "dequantize": "slm.compress.quantize",
    "convert": "slm.compress.convert",
    "compare": "slm.evaluation.report",
    "save": "slm.interop.saved",
    "prune": "slm.compress.prune",
    "shrink": "slm.compress.shrink",
    "cache_teacher": "slm.compress.cache_teacher",
    "sample_teacher": "slm.compress.sampled",
    "save_stablehlo": "slm.interop.stablehlo",
    "save_onnx": "slm.interop.onnx.export",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name == "study":
        return importlib.import_module("slm.study")
    if name not in _HOME:
        raise AttributeError(f"module 'slm' has no attribute {name!r}; it has {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
