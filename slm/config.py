"""The experiment: frozen, typed, strict; one value describes a whole run and survives a JSON round trip.

A field is declared once, here, with its meaning as the docstring below it: `train.py --help`, the error messages and
the saved `config.json` all come from that declaration. Functions take the section they use (`cfg.model`), not `cfg`.
"""

import dataclasses
import difflib
import json
import runpy
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from slm.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer."""

    vocab_size: int = 0
    """Rows of the embedding; 0 takes the tokenizer's size."""
    layers: int = 4
    """Number of blocks."""
    width: int = 256
    """Size of the residual stream (D)."""
    heads: int = 4
    """Query heads (H)."""
    kv_heads: int | None = None
    """Key/value heads (G) of grouped-query attention; divides heads; None: as many as heads."""
    head_dim: int | None = None
    """Size of one head (K); None: width / heads."""
    attention: tuple[str, ...] = ("softmax",)
    """Layer pattern, repeated over the depth, of names in slm.models.mixers.MIXERS, such as `window window softmax`."""
    window: int = 256
    """Tokens that a `window` layer sees, the query's own included."""
    qk_norm: bool = True
    """RMS-normalise queries and keys per head (Henry et al. 2020), which keeps attention logits bounded."""
    attention_softcap: float | None = None
    """Squash attention logits to (-c, c) by c*tanh(x/c) (Gemma 2); None: off."""
    attention_implementation: Literal["auto", "xla", "blocked", "cudnn"] = "auto"
    """Backend of softmax attention; a named one that cannot serve the request raises."""
    position: Literal["rope", "learned", "none"] = "rope"
    """How positions enter: rotary (Su et al. 2021), a learned table (GPT-2), or not at all."""
    rope_theta: float = 10_000.0
    """Base wavelength of the rotary embedding."""
    rope_scaling: Literal["none", "linear"] = "none"
    """Stretching of rotary positions beyond the trained length: a name in slm.models.rope.SCALINGS."""
    rope_factor: float = 1.0
    """Stretching factor for rope_scaling."""
    max_length: int | None = None
    """Longest position of a learned table; None: data.sequence_length."""
    mlp: Literal["swiglu", "geglu", "gelu", "relu2"] = "swiglu"
    """Feed-forward kind: gated (SwiGLU, GeGLU; Shazeer 2020) or plain (GELU, squared ReLU)."""
    mlp_width: int | None = None
    """Hidden size of the feed-forward (F); None: 8/3 width if gated, else 4 width, rounded up to a multiple of 32."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward and after the last block."""
    norm_eps: float = 1e-6
    """Added to the variance inside a norm."""
    bias: bool = False
    """Biases in projections and LayerNorm, as in GPT-2."""
    tied: bool = True
    """Share the embedding matrix with the output projection."""
    logit_softcap: float | None = None
    """Squash the output logits to (-c, c); None: off."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream get it divided by sqrt(2 layers)."""
    scan: bool = True
    """Compile one block and scan over the depth; False unrolls (slower to compile, sometimes faster to run)."""
    remat: Literal["none", "dots", "full"] = "dots"
    """Recompute in the backward pass: nothing, all but matrix products and attention, or everything in a block."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    source: tuple[str, ...] = ("cpython",)
    """`cpython`, a text file or folder, FILE.jsonl, FILE.parquet, tfds:NAME/SPLIT, synthetic:TASK; several mix."""
    weights: tuple[float, ...] = ()
    """Share of each source in a mixture, in sequences; empty: equal shares."""
    validation: tuple[str, ...] = ()
    """Held-out sources; empty: split them off `source`."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out when `validation` is empty."""
    validation_split: Literal["document", "tail"] = "document"
    """Hold out whole documents chosen by a hash of their text, or the last part of the one stream (single files)."""
    text_field: str = "text"
    """Field that holds the text in JSONL, Parquet and TFDS records."""
    tokenizer: str = "bytes"
    """`bytes`, `chars`, `bpe:SIZE` (trained on the training documents), or a path to a tokenizer.json."""
    sequence_length: int = 256
    """Tokens in one training sequence (T)."""
    packing: Literal["documents", "stream"] = "documents"
    """`documents`: attention and positions stop at document boundaries; `stream`: one endless text."""
    cache: str | None = None
    """Folder of tokenised arrays; None: $SLM_CACHE, else ~/.cache/slm."""
    tfds_dir: str | None = None
    """Folder of prepared TFDS data sets; None: TFDS's own default."""
    download: bool = False
    """Allow TFDS to download and prepare a data set that is not on disk."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and its schedule. Which parameter gets what is decided by name rules, printed at start."""

    name: Literal["adamw", "lion", "adafactor", "muon", "schedule_free_adamw"] = "adamw"
    """muon: Muon on hidden matrices, AdamW on the rest, scaled so that one learning rate serves both."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up; wsd: constant, then linear decay over decay_fraction (Hu et al. 2024)."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    final_ratio: float = 0.1
    """Last learning rate over peak learning rate."""
    decay_fraction: float = 0.2
    """Share of all steps in the decay phase of wsd."""
    b1: float = 0.9
    """First-moment decay."""
    b2: float = 0.95
    """Second-moment decay."""
    eps: float = 1e-8
    """Added to the denominator of Adam."""
    momentum: float = 0.95
    """Momentum of Muon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate, on the parameters that the decay rule names."""
    clip_norm: float | None = 1.0
    """Clip the global gradient norm; None: off."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights and evaluate it; None: off."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences in one optimizer step, over all devices and processes."""
    accumulation: int = 1
    """Micro-batches that one step is split into; changes memory, not the mathematics."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute precision; master weights stay float32; float16 scales the loss and skips overflowing steps."""
    z_loss: float = 0.0
    """Weight of the squared log-normaliser of the logits (Chowdhery et al. 2022, PaLM)."""
    loss_chunk: int = 128
    """Time steps whose logits exist at once in the chunked cross-entropy."""
    max_loss: float | None = None
    """Stop as diverged above this loss; None: three times ln(vocabulary)."""
    evaluate_every: int = 250
    """Steps between evaluations; the last step always evaluates; 0: only the last."""
    evaluate_sequences: int = 64
    """Validation sequences of each evaluation during training; 0: all of them."""
    log_every: int = 10
    """Steps between lines of the log."""
    overwrite: bool = False
    """Delete an existing run of the same name instead of resuming it."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, and when."""

    every: int = 250
    """Steps between checkpoints; the last step always saves; 0: only the last."""
    keep: int = 2
    """Most recent checkpoints to keep."""
    keep_best: bool = True
    """Also keep the checkpoint with the lowest validation loss."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a named mesh. Sizes multiply to the device count; one of them may be -1 (what is left)."""

    data: int = -1
    """Copies of the model, each with its share of the batch."""
    fsdp: int = 1
    """Shares of the parameters and the optimizer state, gathered when used (ZeRO-3)."""
    tensor: int = 1
    """Shares of heads and feed-forward columns (Megatron)."""
    coordinator: str | None = None
    """HOST:PORT of process 0 to join several processes by hand, or `auto` (SLURM, TPU pods, GKE)."""
    processes: int | None = None
    """Number of processes, with coordinator=HOST:PORT."""
    process_id: int | None = None
    """This process's number, from 0, with coordinator=HOST:PORT."""


@dataclass(frozen=True)
class LogConfig:
    """Where progress is written, besides metrics.jsonl."""

    console: bool = True
    """Tables and a live progress line on the terminal."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder (needs tensorboardX, in the `track` extra)."""
    wandb: str | None = None
    """Weights & Biases project to log to (needs wandb, in the `track` extra)."""
    profile: tuple[int, ...] = ()
    """FIRST LAST step of a jax.profiler trace, written into the run folder."""


@dataclass(frozen=True)
class Experiment:
    """Everything that defines a run."""

    name: str = "experiment"
    """Name of the run folder inside `dir`."""
    dir: str = "runs"
    """Folder of run folders."""
    seed: int = 0
    """Seeds initialisation and the order of the data."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.dir) / self.name


def field_paths(cls: type = Experiment, prefix: str = "") -> list[str]:
    """All dotted leaf names, e.g. `optim.learning_rate`."""
    paths = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            paths += field_paths(hint, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def unknown_field(path: str) -> ConfigError:
    """The error for a field that does not exist, with the nearest names that do."""
    known = field_paths()
    wanted = path.replace("-", "_")
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    leaf = wanted.rsplit(".", 1)[-1]
    by_leaf = {known_path.rsplit(".", 1)[-1]: known_path for known_path in known}
    near += [by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, n=2, cutoff=0.7) if by_leaf[m] not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else "see `python train.py --help` for all fields"
    return ConfigError(f"unknown field '{path}': {hint}")


def coerce(value: Any, hint: Any, path: str) -> Any:
    """`value` as the type `hint`, converting only where nothing is lost (int to float, list to tuple, one to tuple).

    Raises ConfigError, naming the field, for anything else.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return coerce(value, inner, path)
    if origin is Literal:
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), map(str, args), n=1)
        choices = f"one of {', '.join(map(str, args))}"
        raise ConfigError(f"{path} = {value!r}: must be {choices}" + (f"; did you mean {near[0]}?" if near else ""))
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(coerce(item, args[0], f"{path}[{i}]") for i, item in enumerate(items))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, Path):
        return str(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{path} = {value!r}: must be of type {hint.__name__}, not {type(value).__name__}")


def override(cfg: Experiment, changes: dict[str, Any]) -> Experiment:
    """`cfg` with dotted fields replaced, strictly typed: `override(cfg, {"optim.learning_rate": 1e-3})`.

    Raises ConfigError for an unknown field (naming the nearest) or an ill-typed value.
    """
    for path, value in changes.items():
        cfg = _replace(cfg, path.split("."), value, path)
    return cfg


def _replace(node: Any, parts: list[str], value: Any, path: str) -> Any:
    hints = typing.get_type_hints(type(node))
    if parts[0] not in hints:
        raise unknown_field(path)
    hint = hints[parts[0]]
    if dataclasses.is_dataclass(hint):
        if len(parts) == 1 and isinstance(value, hint):
            return dataclasses.replace(node, **{parts[0]: value})
        if len(parts) == 1:
            raise ConfigError(f"{path} is a section: set one of its fields, such as {path}.{field_paths(hint)[0]}")
        return dataclasses.replace(node, **{parts[0]: _replace(getattr(node, parts[0]), parts[1:], value, path)})
    if len(parts) > 1:
        raise unknown_field(path)
    return dataclasses.replace(node, **{parts[0]: coerce(value, hint, path)})


def flatten(cfg: Experiment) -> dict[str, Any]:
    """Dotted leaf name to value, in order of declaration."""
    flat = {}
    for path in field_paths():
        value = cfg
        for part in path.split("."):
            value = getattr(value, part)
        flat[path] = value
    return flat


def to_json(cfg: Experiment) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_json(text: str) -> Experiment:
    """Inverse of to_json. Raises ConfigError for unknown or ill-typed fields."""
    return override(Experiment(), dict(_leaves(json.loads(text), "")))


def _leaves(tree: dict, prefix: str):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def load_config(path: str | Path) -> Experiment:
    """The Experiment named `config` in a Python file, or the one in a run's config.json.

    Raises ConfigError if the file is missing, does not run, or holds no Experiment.
    """
    path = Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.stem, [p.stem for p in path.parent.glob("*.py")], n=1)
        hint = f"; did you mean {path.parent / near[0]}.py?" if near else ""
        raise ConfigError(f"no config file {path}{hint}")
    if path.suffix == ".json":
        return from_json(path.read_text())
    try:
        cfg = runpy.run_path(str(path)).get("config")
    except (SyntaxError, NameError, TypeError, ImportError) as error:
        raise ConfigError(f"{path} does not run: {type(error).__name__}: {error}") from error
    if not isinstance(cfg, Experiment):
        raise ConfigError(f"{path} must assign an slm.Experiment to the name `config`")
    # Files are plain Python, so their values have not been checked yet.
    return check(override(cfg, flatten(cfg)))


def check(cfg: Experiment) -> Experiment:
    """`cfg` itself, if its fields agree with each other. Raises ConfigError naming the field and the fix."""

    def demand(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    m, d, o, t = cfg.model, cfg.data, cfg.optim, cfg.train
    for path, least in _LEAST.items():
        value = flatten(cfg)[path]
        demand(value is None or value >= least, f"{path} = {value}: must be at least {least}")
    demand(
        m.head_dim is not None or m.width % m.heads == 0,
        f"model.width = {m.width} is not divisible by model.heads = {m.heads}: change one, or set model.head_dim",
    )
    demand(m.heads % (m.kv_heads or m.heads) == 0, f"model.kv_heads = {m.kv_heads} must divide model.heads = {m.heads}")
    demand(
        m.position != "rope" or (m.head_dim or m.width // m.heads) % 2 == 0,
        "model.position = rope needs an even head size: change model.heads, model.width or model.head_dim",
    )
    demand(bool(m.attention), "model.attention is empty: name at least one mechanism, such as softmax")
    demand(bool(d.source), "data.source is empty: name at least one source, such as cpython")
    demand(
        len(d.weights) in (0, len(d.source)),
        f"data.weights has {len(d.weights)} values for {len(d.source)} sources: give one each, or none",
    )
    demand(0 <= d.validation_fraction < 1, f"data.validation_fraction = {d.validation_fraction}: must be in [0, 1)")
    demand(
        t.batch_size % t.accumulation == 0,
        f"train.batch_size = {t.batch_size} is not divisible by train.accumulation = {t.accumulation}",
    )
    demand(len(cfg.log.profile) in (0, 2), "log.profile takes two numbers, the first and last step to trace")
    demand(o.ema_decay is None or 0 < o.ema_decay < 1, f"optim.ema_decay = {o.ema_decay}: must be in (0, 1)")
    demand(
        o.ema_decay is None or o.name != "schedule_free_adamw",
        "optim.ema_decay: schedule_free_adamw averages weights itself; leave it unset",
    )
    sizes = [cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor]
    demand(
        all(s == -1 or s >= 1 for s in sizes) and sizes.count(-1) <= 1,
        "mesh.data, mesh.fsdp, mesh.tensor: each at least 1, and at most one of them -1",
    )
    demand("/" not in cfg.name and cfg.name not in ("", ".", ".."), f"name = {cfg.name!r}: must be a plain folder name")
    return cfg


_LEAST = {
    "model.vocab_size": 0, "model.layers": 1, "model.width": 1, "model.heads": 1, "model.kv_heads": 1,
    "model.head_dim": 1, "model.window": 1, "model.mlp_width": 1, "data.sequence_length": 1,
    "optim.learning_rate": 0, "optim.warmup_steps": 0, "train.steps": 1, "train.batch_size": 1,
    "train.accumulation": 1, "train.loss_chunk": 1, "train.evaluate_every": 0, "train.evaluate_sequences": 0,
    "train.log_every": 1, "checkpoint.every": 0, "checkpoint.keep": 1,
}  # fmt: skip
