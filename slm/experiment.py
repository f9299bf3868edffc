"""The experiment: frozen, typed dataclasses; one value describes a whole run.

A field is declared once, here, with its meaning as the docstring below it: `train.py --help`, the error messages and
the saved `config.json` all come from that declaration. Functions take the section they use (`cfg.model`), not `cfg`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slm.compression import ConvertConfig, DistillConfig, PruneConfig, QuantizeConfig, ShrinkConfig


@dataclass(frozen=True)
class MixerConfig:
    """Switches of the token mixers, for all layers that have them. None: what the mechanism's paper has, as its row in
    slm.models.mixers says; a switch that no layer of the model has is an error."""

    qk_norm: Literal["none", "rms", "l2"] | None = None
    """Norm of queries and keys per head: RMS with a learned scale (Henry et al. 2020), or unit length."""
    rope_fraction: float | None = None
    """Share of each head (in MLA of its rope_dim) that rotates where model.position = rope; 0: this mechanism knows no
    positions (NoPE)."""
    window: int | None = None
    """Tokens that a windowed layer sees, the query's own included."""
    sinks: int | None = None
    """First tokens that stay visible beyond the window (StreamingLLM)."""
    sink_logits: bool | None = None
    """A learned logit per head that joins the softmax's denominator (gpt-oss)."""
    scale: float | None = None
    """Multiplier of q k^T; 0: one over the root of the head's size."""
    softcap: float | None = None
    """Squash attention logits to (-c, c) by c*tanh(x/c) (Gemma 2); 0: off."""
    gate: Literal["none", "sigmoid", "silu", "gelu"] | None = None
    """Output gate: the heads' outputs times an activation of a projection of the layer's input."""
    gate_rank: int | None = None
    """Rank of the output gate's projection; 0: full; -1: the size of a value head (Kimi Delta Attention)."""
    gate_first: bool | None = None
    """Gate before the output norm (Mamba-2) instead of after it."""
    output_norm: Literal["none", "head", "full"] | None = None
    """RMS norm of the heads' outputs: each head by itself, or all together (of a group, where there are groups)."""
    conv: int | None = None
    """Width of the short causal convolution on queries, keys and values; 0: none."""
    learned_state: bool | None = None
    """Documents begin with a learned recurrent state instead of zeros."""
    expand_k: float | None = None
    """Size of a query/key head (K) over model.head_dim."""
    expand_v: float | None = None
    """Size of a value head (V) over model.head_dim."""
    groups: int | None = None
    """Heads of queries and keys that all value heads share out (Mamba-2's B and C, grouped value attention); 0: one
    for each value head."""
    feature_map: str | None = None
    """Map of queries and keys of linear attention: a name in slm.attention.features."""
    feature_dim: int | None = None
    """Features of a random, projected or learned map (M)."""
    feature_seed: int | None = None
    """Seed of a random map: another one redraws it."""
    normalize: bool | None = None
    """Divide linear attention by the sum of its weights."""
    horizon: int | None = None
    """Longest sequence that the model will see, in tokens: there cosFormer's weights reach zero, and log-linear
    attention has no coarser level."""
    negative_eigenvalues: bool | None = None
    """Let beta reach 2, so that the delta rule can flip signs (Grazzi et al. 2025)."""
    householders: int | None = None
    """Delta-rule steps per token (DeltaProduct)."""
    rank: int | None = None
    """Inner size of low-rank projections of decays and similar gates; 0: what the paper derives from the model's
    sizes."""
    pattern: str | None = None
    """Mask of a `sparse` layer, joined with causality: an expression such as `window(128) | global_tokens(4)`."""
    block_size: int | None = None
    """Keys in one block that content selects (NSA, MoBA)."""
    top_k: int | None = None
    """Blocks (NSA, MoBA) or tokens (DSA) that content selects for a query."""
    compression: Literal["mean", "mlp"] | None = None
    """How a block becomes one key and one value (NSA): means, or learned maps that know places in the block."""
    branch_keys: bool | None = None
    """Keys and values for each branch (NSA's paper) instead of one set for all three."""
    index_heads: int | None = None
    """Heads of the indexer that selects tokens (DSA)."""
    index_dim: int | None = None
    """Size of a head of that indexer."""
    latent_dim: int | None = None
    """Size of the compressed keys and values that MLA caches; 0: four heads."""
    query_latent_dim: int | None = None
    """Size of MLA's compressed queries; 0: not compressed."""
    rope_dim: int | None = None
    """Size of the rotated part that MLA adds to each head, its keys shared by all; 0: half a head."""
    chunk: int | None = None
    """Tokens that a chunked recurrence takes at once; changes speed, not the mathematics."""
    implementation: Literal["auto", "xla", "blocked", "cudnn", "tokamax", "pallas"] | None = None
    """Backend of the mechanism; a named one that cannot serve the request raises."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021) and how they are stretched beyond the trained length."""

    theta: float = 10_000.0
    """Base wavelength."""
    local_theta: float | None = None
    """Base wavelength of layers with a window, which are not stretched (Gemma 3, ModernBERT); None: like the others."""
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    """Stretching of positions: a name in slm.models.rope.SCALINGS."""
    factor: float = 1.0
    """Stretching factor."""
    original_length: int = 0
    """Tokens that the model was trained on before stretching (llama3, yarn, longrope, query_growth)."""
    slow: float = 1.0
    """Turns within original_length below which a dimension is stretched in full (llama3's low_freq_factor, yarn's
    beta_slow)."""
    fast: float = 4.0
    """Turns within original_length above which a dimension is not stretched (llama3's high_freq_factor, yarn's
    beta_fast)."""
    whole: bool = True
    """Whether yarn rounds the first and last dimension of its ramp outwards."""
    magnitude: float = 1.0
    """Multiplier of cosines and sines (yarn, longrope: attention_factor)."""
    short_factors: tuple[float, ...] = ()
    """Divisors of the frequencies up to original_length (longrope), one for each pair that rotates."""
    long_factors: tuple[float, ...] = ()
    """Divisors of the frequencies of sequences beyond it."""
    query_growth: float = 0.0
    """Queries grow by 1 + query_growth ln(1 + floor(position / original_length)) (Llama 4, Ministral 3)."""


@dataclass(frozen=True)
class ModelConfig:
    """A transformer: a decoder, or, without `causal`, an encoder."""

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
    """Layer pattern, repeated over the depth, of names in slm.models.mixers: mechanisms (MIXERS), such as
    `window window softmax`, or patterns that production uses (HYBRIDS), such as `qwen3_next`."""
    mixer: MixerConfig = field(default_factory=MixerConfig)
    causal: bool = True
    """Tokens see only those before them; False: both sides (softmax mixers only): an encoder, which cannot generate."""
    position: Literal["rope", "learned", "none"] = "rope"
    """How positions enter: rotary (Su et al. 2021), a learned table (GPT-2), or not at all."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_length: int | None = None
    """Longest position of a learned table; None: the longest sequence of training or validation."""
    mlp: Literal["swiglu", "geglu", "geglu_erf", "gelu", "gelu_erf", "relu", "relu2", "none"] = "swiglu"
    """Feed-forward kind: gated (SwiGLU, GeGLU; Shazeer 2020), plain (GELU, ReLU, squared ReLU), or no feed-forward.
    GELU by tanh, as GPT-2 and Gemma have it, or exact (erf)."""
    mlp_width: int | None = None
    """Hidden size of the feed-forward (F); None: 8/3 width if gated, else 4 width, rounded up to a multiple of 32."""
    layer_heads: tuple[int, ...] = ()
    """Query heads of each layer, where they differ; empty: `heads` in all."""
    layer_kv_heads: tuple[int, ...] = ()
    """Key/value heads of each layer, where they differ; empty: `kv_heads` in all."""
    layer_mlp_widths: tuple[int, ...] = ()
    """Hidden size of each layer's feed-forward, where they differ; empty: `mlp_width` in all."""
    feedforwards: int = 1
    """Feed-forward networks in one block, one after the other, where there is a bottleneck."""
    bottleneck: int | None = None
    """Size of the stream inside a block, narrower than `width` (MobileBERT); None: width."""
    norm: Literal["rmsnorm", "zero_centered_rmsnorm", "layernorm", "affine"] = "rmsnorm"
    """Normalisation of layers and after the last block; zero-centred: times 1 + scale (Gemma); affine: none, only a
    learned scale and bias (MobileBERT)."""
    residual: Literal["pre", "sandwich", "parallel", "parallel_shared", "post"] = "pre"
    """pre: x + f(norm x), attention, then feed-forward; sandwich: x + norm(f(norm x)) (Gemma 2); parallel: both read
    the same x through norms of their own (GPT-NeoX), or through one (Phi-2); post: norm(x + f(x)), and no norm after
    the last block (BERT)."""
    first_norm: bool = True
    """Norm in front of the first layer's mixer; False where embeddings are normed already (ModernBERT)."""
    shared_layers: bool = False
    """One set of parameters for all repeats of the layer pattern (ALBERT)."""
    residual_scale: float = 1.0
    """Multiplier of what each layer adds to the residual stream (Granite)."""
    embedding_scale: float = 1.0
    """Multiplier of embeddings (Gemma: root of width; Granite)."""
    embedding_norm: bool = False
    """Norm the embeddings before the first layer (BERT)."""
    embedding_width: int | None = None
    """Size of embeddings, which a projection brings to `width` (ALBERT); None: width."""
    trigrams: bool = False
    """The projection to `width` reads embeddings of a token and of both its neighbours, whatever document they are of,
    and positions and token types are added behind it (MobileBERT)."""
    wide_readout: bool = False
    """Where embeddings are narrower than `width`, the tied output projection gets rows of its own (MobileBERT); False:
    the head narrows hidden states (ALBERT)."""
    token_types: int = 0
    """Rows of a table of token types, such as first and second sentence (BERT); 0: none."""
    head: Literal["lm", "masked_lm", "sequence", "token", "embedding"] = "lm"
    """What the model answers: logits of the next token, or of hidden tokens (BERT); labels of a sequence or of each
    token; one vector for a sequence."""
    labels: int = 0
    """Labels that a sequence or token head tells apart."""
    pooling: Literal["first", "mean"] = "first"
    """What stands for a sequence before its head: the first token, or the mean of all."""
    head_activation: Literal["none", "tanh", "relu", "gelu", "gelu_erf"] = "none"
    """Activation of a dense layer in front of the head (BERT's pooler: tanh); none: no such layer."""
    head_norm: bool = False
    """Norm behind that layer."""
    unit_length: bool = False
    """Vectors of an embedding head have length one (sentence-transformers)."""
    logit_divisor: float = 1.0
    """Divides the output logits (Granite)."""
    norm_eps: float = 1e-6
    """Added to the variance inside a norm."""
    bias: tuple[Literal["qkv", "out", "mlp", "norm", "head", "head_dense", "recurrent"], ...] = ()
    """What has biases: projections into a mixer, out of it, the feed-forward's, LayerNorm, the output projection, the
    dense layer in front of the head; for rglru, recurrent instead of qkv, and its convolution too (RecurrentGemma).
    GPT-2: `qkv out mlp norm`; Qwen 2: `qkv`."""
    tied: bool = True
    """Share the embedding matrix with the output projection."""
    logit_softcap: float | None = None
    """Squash the output logits to (-c, c); None: off."""
    init_std: float = 0.02
    """Standard deviation of initial weights; projections into the residual stream get it divided by sqrt(2 layers)."""
    init_from: str | None = None
    """Start training from the weights of another model: a run, a folder of slm.save, a Hugging Face folder or Hub name,
    a .gguf file. The model's fields come from there, and data.tokenizer too unless it is set; given on the command
    line, it takes the place of all of a config's own model."""
    scan: bool = True
    """Compile one block and scan over the depth; False unrolls (slower to compile, sometimes faster to run)."""
    remat: Literal["none", "dots", "full"] = "dots"
    """Recompute in the backward pass: nothing, all but matrix products and attention, or everything in a block."""


HOW_IT_RUNS = ("scan", "remat", "init_std", "init_from")
"""Fields of model that hold beside a model that is loaded: how it runs, not what it is."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes batches."""

    source: tuple[str, ...] = ("cpython",)
    """`cpython`, a text file or folder, FILE.jsonl, FILE.parquet, tfds:NAME/SPLIT, synthetic:TASK[:SETTING=VALUE,...]
    (slm.data.synthetic); several mix."""
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
    validation_length: int | None = None
    """Tokens in one validation sequence; longer than in training, it tests extrapolation; None: sequence_length."""
    mask_fraction: float = 0.15
    """Share of tokens that model.head = masked_lm is asked for: 80 % of them hidden, 10 % replaced, 10 % left."""
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
    """Shape after warm-up; wsd: constant, then linear decay over decay_fraction (Hu et al. 2024).
    schedule_free_adamw needs constant."""
    warmup_steps: int = 100
    """Steps of linear warm-up; shortened, with a warning, where it does not fit into train.steps."""
    final_ratio: float = 0.1
    """Last learning rate over peak learning rate."""
    decay_fraction: float = 0.2
    """Share of all steps in the decay phase of wsd."""
    b1: float = 0.9
    """First-moment decay."""
    b2: float = 0.95
    """Second-moment decay; for adafactor, its cap."""
    eps: float = 1e-8
    """Added to the denominator of Adam."""
    momentum: float = 0.95
    """Momentum of Muon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate, on the parameters that the decay rule names."""
    clip_norm: float | None = 1.0
    """Clip the global gradient norm; None: off."""
    only: tuple[str, ...] = ()
    """Train only the parameters whose whole names match one of these regular expressions, such as `blocks/.*/mixer/.*`;
    empty: all."""
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
    precision: Literal["float32", "bfloat16", "float16", "fp8"] = "float32"
    """Compute precision; master weights stay float32; float16 scales the loss and skips overflowing steps; fp8 is
    bfloat16 with the products of layers in E4M3 forward and E5M2 backward, in training only. A CPU emulates fp8, slower
    than bfloat16; its speed on hardware that has it was not measured."""
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
    shrink: ShrinkConfig = field(default_factory=ShrinkConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.dir) / self.name
