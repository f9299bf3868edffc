"""Sections of the experiment that make a model smaller: what a run distils from, prunes, shrinks, quantizes. What they
refuse: slm.refusals."""

from dataclasses import dataclass
from typing import Any, Literal

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd", "hinge_ranking", "logistic_ranking", "uld"
]


@dataclass(frozen=True)
class DistillConfig:
    """Learning from a teacher (Hinton et al. 2015). Off unless teacher or cached is set."""

    teacher: str | None = None
    """Model to learn from: a run, a Hugging Face folder or a GGUF file, with the student's vocabulary unless loss is
    uld."""
    cached: str | None = None
    """Folder of a teacher's most likely tokens, written before (slm.compress.cache_teacher), instead of a teacher."""
    self_distill: bool = False
    """Allow a teacher that is the model which training starts from."""
    loss: Divergence = "forward_kl"
    """Divergence between the teacher's and the student's next token. uld compares sorted probabilities, where both
    have read the same text, and lets the teacher have another tokenizer (Boizard et al. 2024)."""
    alpha: float = 0.9
    """Weight of that divergence; the cross-entropy of the text gets 1 - alpha."""
    temperature: float = 1.0
    """Divides both models' logits; the divergence is multiplied by its square."""
    beta: float = 0.5
    """Of jsd: the teacher's share of the mixture (GKD, Agarwal et al. 2024); of skew_kl and skew_reverse_kl: how much
    of the other is mixed in (DistiLLM, Ko et al. 2024)."""
    alpha_end: float | None = None
    """alpha at the last step; None: as at the first."""
    temperature_end: float | None = None
    """temperature at the last step; None: as at the first."""
    beta_end: float | None = None
    """beta at the last step; None: as at the first."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Way from the first to the last of these."""
    missing: Literal["zero", "uniform", "renormalize"] = "uniform"
    """Probability that cached logits leave out: no token's, spread over all others, or given to those that are in."""
    pad_vocabulary: bool = False
    """Allow vocabularies whose tokens agree but which are padded to different sizes."""
    layers: tuple[int, ...] = ()
    """Teacher layer, from 1, that each student layer imitates, 0 for none; empty: spread evenly (TinyBERT)."""
    hidden: float = 0.0
    """Weight of the distance between hidden states, through a learned projection where widths differ."""
    hidden_loss: Literal["mse", "cosine"] = "mse"
    """Mean squared error, or 1 - cosine (DistilBERT)."""
    attention: float = 0.0
    """Weight of the mean squared error between attention matrices (TinyBERT, Jiao et al. 2020); equal head counts."""
    relations: float = 0.0
    """Weight of the KL divergence between the last layers' relations of queries, keys and values (MiniLM v2, Wang et
    al. 2021)."""
    relation_heads: int = 0
    """Heads that relations are cut into; 0: as many as the student's keys have."""
    on_policy: float = 0.0
    """Share of steps whose text the student continues itself from the first tokens of each row (GKD's lambda)."""
    prompt_tokens: int = 16
    """Tokens of each row that are kept as a prompt in such a step."""
    sample_temperature: float = 1.0
    """Of the student's continuations."""

    @property
    def on(self) -> bool:
        return self.teacher is not None or self.cached is not None


@dataclass(frozen=True)
class PruneConfig:
    """Zeros in the matrices of layers while training. Off at sparsity 0. Masks save neither time nor memory by
    themselves: `shrink` does."""

    sparsity: float = 0.0
    """Share of weights that become zero; N:M patterns have their own."""
    criterion: Literal["magnitude", "random", "movement", "taylor", "wanda", "sparsegpt"] = "magnitude"
    """What is kept: large weights; any; those that grow (Sanh et al. 2020, who let pruned ones come back: schedule =
    ste); large gradient times weight (Molchanov et
    al. 2019); large weight times input (Sun et al. 2024); by second order, with an update of the rest (Frantar &
    Alistarh 2023). The last two prune once, before the first step."""
    scope: Literal["layer", "output", "global"] | None = None
    """What weights compete with: those of their matrix, of their output, or of all matrices. None: output for wanda,
    which it was made for, blocks of inputs for sparsegpt, layer for all others."""
    pattern: str = "unstructured"
    """Where zeros may be: `unstructured`, `2:4` (2 of 4 stay along the inputs), or blocks such as `16x16`."""
    schedule: Literal["one_shot", "cubic", "iterative", "ste", "set", "rigl"] = "cubic"
    """one_shot: all at begin_step; cubic: gradually (Zhu & Gupta 2018); iterative: in equal steps; ste: cubic, and
    pruned weights go on learning; set, rigl: sparse from the start, where some weights move at every update, to random
    places (Mocanu et al. 2018) or to those of large gradients (Evci et al. 2020)."""
    begin_step: int = 0
    """Step of the first mask."""
    end_step: int | None = None
    """Step of the last change of masks; None: three quarters of the run."""
    every: int = 10
    """Steps between changes of masks."""
    regrow: float = 0.3
    """Share of the remaining weights that set and rigl move at first; falls to zero by a cosine."""
    skip: tuple[str, ...] = ()
    """Matrices that stay dense: regular expressions of whole names, such as `.*/mixer/value/kernel`."""
    calibration: int = 64
    """Training sequences that wanda and sparsegpt measure."""

    @property
    def on(self) -> bool:
        return self.sparsity > 0 or ":" in self.pattern


@dataclass(frozen=True)
class ShrinkConfig:
    """A smaller dense model: cut out of model.init_from before the first step, an ordinary model from then on; or, with
    criterion = l0, out of the model that trains, by gates that train beside it."""

    layers: int | None = None
    """Layers to keep; those go whose output is most like their input (block influence, Men et al. 2024)."""
    keep_layers: tuple[int, ...] = ()
    """Layers to keep by number, from 0, instead (DistilBERT: every second)."""
    width: int | None = None
    """Channels of the residual stream to keep."""
    mlp_width: int | tuple[int, ...] | None = None
    """Channels of each feed-forward to keep: one number for all layers, or one for each that stays."""
    kv_heads: int | tuple[int, ...] | None = None
    """Groups of heads with common keys and values to keep, each with its query heads: one number for all layers, or one
    for each that stays."""
    criterion: Literal["activation", "taylor", "weight_norm", "random", "l0"] = "activation"
    """What is kept of a width: channels and heads of large activations (Minitron, Muralidharan et al. 2024), of large
    gradient times activation, of large weights, or any. l0: what random gates leave open that are trained under the
    constraint of these sizes (Louizos et al. 2018; Sheared LLaMA, Xia et al. 2024), layers too."""
    calibration: int = 64
    """Training sequences that are measured."""
    gate_learning_rate: float = 0.1
    """Of l0: learning rate of gates and of the constraint's multipliers where the model has optim.learning_rate."""
    warmup_steps: int | None = None
    """Of l0: steps in which the constraint goes from all parts to the sizes asked for; None: half of end_step."""
    end_step: int | None = None
    """Of l0: step from which the gates stand still, with exactly as many open as asked for, and what is left trains
    alone; None: three quarters of the run."""

    @property
    def on(self) -> bool:
        return bool(self.keep_layers) or any(
            size is not None for size in (self.layers, self.width, self.mlp_width, self.kv_heads)
        )

    @property
    def learned(self) -> bool:
        """Whether what goes is found in training, and not before the first step."""
        return self.on and self.criterion == "l0"


@dataclass(frozen=True)
class QuantizeConfig:
    """Training with rounded weights (QAT), so that the quantized model loses little. Off at scheme = none."""

    scheme: Literal["none", "int8", "int4", "int3", "int2", "nf4", "ternary", "fp8"] = "none"
    """Grid of the weights inside layers."""
    group_size: int | None = None
    """Inputs that share a scale; None: all of an output (ternary: all of a matrix)."""
    symmetric: bool = True
    """Integers around zero; False: with a zero point that is a float, as in GGUF's Q4_1."""
    method: Literal["ste", "lsq"] = "ste"
    """Scales from the weights at each step, or learned (LSQ, Esser et al. 2020)."""
    activations: Literal["none", "int8"] = "none"
    """Round the inputs of these matrices too, each token by itself."""
    embedding: bool = False
    """Round the embedding too (8 bits at least)."""
    begin_step: int = 0
    """First step with rounded weights."""
    skip: tuple[str, ...] = ()
    """Matrices that are not rounded: regular expressions of whole names."""

    @property
    def on(self) -> bool:
        return self.scheme != "none"


@dataclass(frozen=True)
class ConvertConfig:
    """Other token mixers in model.init_from before the first step, such as linear attention instead of softmax."""

    attention: tuple[str, ...] = ()
    """What model.attention is to become, such as `gla gla gla softmax`; model.mixer has the switches of the new layers;
    empty: nothing is converted."""
    transfer_steps: int = 0
    """Steps at the beginning in which each new mixer by itself imitates the one that it replaces in distill.teacher
    (attention transfer; Zhang et al. 2025, LoLCATs)."""

    @property
    def on(self) -> bool:
        return bool(self.attention)


def prune_end(cfg: Any) -> int:
    """Step of the last change of masks."""
    return cfg.train.steps * 3 // 4 if cfg.prune.end_step is None else cfg.prune.end_step


def gate_steps(cfg: Any) -> tuple[int, int]:
    """(steps until shrink's constraint is as tight as asked for, step from which its gates stand still)."""
    s = cfg.shrink
    end = cfg.train.steps * 3 // 4 if s.end_step is None else s.end_step
    return (end // 2 if s.warmup_steps is None else s.warmup_steps), end
