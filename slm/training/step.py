"""The one jitted train step, built in one place, with donated state and explicit shardings.

    parameters -> transforms -> what the model sees -> objective -> gradients -> clip -> optimizer -> transforms' update
    -> EMA

Transforms (pruning masks, fake quantization, adapters) and the objective (cross-entropy, distillation) are values: the
step does not know which are on. A teacher's parameters are an argument of the compiled step.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm.config import Experiment
from slm.models.transformer import Transformer
from slm.training import precision, transforms
from slm.training.loss import token_losses
from slm.training.mesh import batch_sharding, param_shardings, state_shardings
from slm.training.objective import Objective, plain_objective
from slm.training.optimizers import (
    clip_by_global_norm,
    evaluation_params,
    make_optimizer,
    merge,
    optimizer_of_learned,
    select,
    trained_names,
)
from slm.training.schedules import make_schedule
from slm.training.state import Extra, LossScale, TrainState
from slm.training.transforms import Moving, Transforms, where_finite


@dataclass(frozen=True)
class Techniques:
    """What a step does besides plain training."""

    transforms: Transforms = field(default_factory=dict)
    objective: Objective | None = None
    """None: cross-entropy."""
    teacher: Any = None
    """Abstract parameters of a teacher, which the compiled step then takes as its third argument."""
    extra_batch: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    """Further entries of a batch: name to (shape behind (B, T), dtype)."""


@dataclass(frozen=True)
class Program:
    """A run's jitted functions and the abstract values they take, for one mesh."""

    transformer: Transformer
    mesh: Mesh
    init: Callable[[jax.Array], TrainState]
    """key -> sharded initial state."""
    start: Callable[[Any], TrainState]
    """float32 parameters -> sharded initial state; they are donated."""
    train: Callable[..., tuple[TrainState, dict]]
    """(state, batch, *teacher) -> (state, metrics); the old state is donated. `.lower(...).compile()` works on the
    abstract values below."""
    evaluate: Callable[[Any, dict], dict]
    """(params, batch) -> {"nats", "correct"}, each (B, T) float32, unweighted."""
    evaluation_params: Callable[[TrainState], Any]
    """state -> the weights to evaluate: the EMA, or schedule-free's average, or the parameters themselves; as the model
    sees them."""
    state: TrainState
    """Abstract state with shardings."""
    batch: dict
    """Abstract global training batch with shardings."""
    teacher: tuple
    """() or (the teacher's abstract parameters with shardings,)."""


def build(cfg: Experiment, mesh: Mesh, techniques: Techniques | None = None) -> Program:
    """The program of `cfg` on `mesh`. Allocates nothing. cfg.model.vocab_size must be set."""
    rows = batch_sharding(mesh)
    documents = cfg.data.packing == "documents"
    techniques = techniques or Techniques()
    transformer = make_transformer(cfg, mesh)
    abstract_params = jax.eval_shape(transformer.init, jax.random.key(0))
    trained = trained_names(cfg.optim, abstract_params, frozen=frozen(techniques.transforms))
    optimizer = make_optimizer(cfg.optim, cfg.train.steps, abstract_params, trained)
    objective = techniques.objective or plain_objective(transformer, cfg)

    def start(params) -> TrainState:
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(select(params, trained)),
            ema=None if cfg.optim.ema_decay is None else jax.tree.map(jnp.copy, params),
            loss_scale=LossScale.create() if cfg.train.precision == "float16" else None,
            extra=start_extra(cfg, techniques.transforms, objective, params),
        )

    def init(key) -> TrainState:
        return start(transformer.init(key))

    def averaged(state: TrainState):
        params = evaluation_params(cfg.optim, state.opt_state, state.params) if state.ema is None else state.ema
        return seen_by_model(techniques.transforms, params, state.extra, state.step)

    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = state_shardings(abstract, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    options = compiler_options(mesh.devices.flat[0].platform)
    B, T = cfg.train.batch_size, cfg.data.sequence_length
    dtypes = {"tokens": "int32", "targets": "int32", "weights": "float32", "segment_ids": "int32", "positions": "int32"}
    batch = {name: jax.ShapeDtypeStruct((B, T), dtype, sharding=rows) for name, dtype in dtypes.items()}
    for name, (shape, dtype) in techniques.extra_batch.items():
        batch[name] = jax.ShapeDtypeStruct((B, T, *shape), dtype, sharding=rows)
    teacher, teacher_shardings = (), ()
    if techniques.teacher is not None:
        teacher_shardings = (param_shardings(techniques.teacher, mesh),)
        teacher = (_placed(techniques.teacher, *teacher_shardings),)
    step = make_train_step(transformer, optimizer, cfg, techniques.transforms, objective, trained)
    return Program(
        transformer=transformer,
        mesh=mesh,
        init=jax.jit(init, out_shardings=shardings, compiler_options=options),
        start=jax.jit(start, donate_argnums=0, in_shardings=(shardings.params,), out_shardings=shardings,
                      compiler_options=options),
        train=jax.jit(
            step, donate_argnums=0, in_shardings=(shardings, rows, *teacher_shardings),
            out_shardings=(shardings, replicated), compiler_options=options,
        ),
        evaluate=jax.jit(
            make_eval_step(transformer, documents, cfg.train.loss_chunk),
            in_shardings=(shardings.params, rows), out_shardings=replicated,
            compiler_options=options,
        ),
        evaluation_params=jax.jit(averaged, in_shardings=(shardings,), out_shardings=shardings.params),
        state=_placed(abstract, shardings),
        batch=batch,
        teacher=teacher,
    )  # fmt: skip


def make_transformer(cfg: Experiment, mesh: Mesh) -> Transformer:
    """The model of `cfg`, as it trains on `mesh`."""
    rows = batch_sharding(mesh)

    def constrain(x):
        return jax.lax.with_sharding_constraint(x, rows) if mesh.size > 1 else x

    return Transformer(cfg.model, precision.compute_dtype(cfg.train.precision), constrain)


def _placed(tree, shardings):
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def frozen(transforms_: Transforms) -> bool:
    """Whether a transform keeps the model's own parameters as they are."""
    return any(transform.freezes for transform in transforms_.values())


def start_extra(cfg: Experiment, transforms_: Transforms, objective: Objective, params: Any) -> Extra | None:
    """What techniques carry, at step 0."""
    learned = {name: transform.learn(params) for name, transform in transforms_.items()}
    learned["objective"] = objective.init(jax.random.key(cfg.seed))
    states = {name: transform.init(params) for name, transform in transforms_.items()}
    if not jax.tree.leaves((learned, states)) and not transforms_:
        return None
    return Extra(learned, optimizer_of_learned(cfg.optim, cfg.train.steps).init(learned), states)


def seen_by_model(transforms_: Transforms, params: Any, extra: Extra | None, step: jax.Array) -> Any:
    """`params` after all transforms."""
    return params if extra is None else transforms.apply(transforms_, params, extra.learned, extra.transforms, step)


@functools.cache
def compiler_options(platform: str) -> dict[str, str | int]:
    """XLA options that pay on `platform`; none changes results beyond rounding.

    On CPU, jax 0.10 hands matrix products to YNNPACK, which made a training step about 6 % slower than Eigen's here;
    and LLVM's optimisation beyond level 1 takes a third of the compilation and gains nothing, since the time goes into
    products and memory (benchmarks/README.md). An XLA that does not know the options is left alone.
    """
    if platform != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_backend_optimization_level": 1}
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def make_train_step(
    transformer: Transformer,
    optimizer: optax.GradientTransformation,
    cfg: Experiment,
    transforms_: Transforms | None = None,
    objective: Objective | None = None,
    trained: set[str] | None = None,
):
    """A pure (state, batch, teacher=None) -> (state, metrics).

    Args:
      transformer, optimizer, cfg: as `build` makes them.
      transforms_: between parameters and model.
      objective: what is minimised; None: cross-entropy.
      trained: names of the parameters that train; None: all.

    Metrics are float32 scalars: `loss` (nats a token, without the z-loss), `accuracy`, `tokens` (weights summed),
    `grad_norm` (before clipping), `learning_rate`, and what else the objective sums, per token; with float16 also
    `loss_scale`, `skipped`, `skipped_in_a_row`.
    """
    optim, train = cfg.optim, cfg.train
    schedule = make_schedule(optim, train.steps)
    transforms_, objective = transforms_ or {}, objective or plain_objective(transformer, cfg)
    learned_optimizer = optimizer_of_learned(optim, train.steps)

    def gradients(params, learned, batch, teacher, step, scale):
        """Gradients of scale * (sum of losses), accumulated in float32 over micro-batches, and the summed metrics."""

        def one(micro):
            def scaled(params, learned):
                # Only here: evaluation and whoever loads the run have an ordinary model.
                marked = precision.float8_kernels(params) if train.precision == "fp8" else params
                value, sums = objective.apply(marked, learned, micro, teacher, step)
                return value * scale, sums

            return jax.grad(scaled, argnums=(0, 1), has_aux=True)(params, learned)

        if train.accumulation == 1:
            return one(batch)
        micros = _micro_batches(batch, train.accumulation)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, one(micro)), None), zeros, micros)[0]

    def train_step(state: TrainState, batch: dict, teacher: Any = None) -> tuple[TrainState, dict]:
        # The weight of the whole batch is known before any loss is, so micro-batches add up to exactly its mean.
        weight = jnp.maximum(batch["weights"].sum(), 1)
        loss_scale, extra = state.loss_scale, state.extra
        scale = (1.0 if loss_scale is None else loss_scale.scale) / weight
        learned = {} if extra is None else extra.learned
        here = extra and extra.replace(transforms=transforms.drawn(transforms_, extra.transforms, state.step))

        def seen(params, learned):
            return seen_by_model(transforms_, params, here and here.replace(learned=learned), state.step)

        # Transforms run once a step, not once a micro-batch, and masks want gradients of what the model saw as well.
        view, pull_back = jax.vjp(seen, state.params, learned)
        own = learned.get("objective", {})
        (view_grads, own_grads), sums = gradients(view, own, batch, teacher, state.step, scale)
        grads, learned_grads = pull_back(view_grads)
        if extra is not None:
            learned_grads["objective"] = own_grads
        grads = select(grads, trained)
        if loss_scale is not None:
            grads, learned_grads, view_grads = (
                precision.unscale(tree, loss_scale) for tree in (grads, learned_grads, view_grads)
            )
        (grads, learned_grads), grad_norm = clip_by_global_norm((grads, learned_grads), optim.clip_norm)
        learned_grads, penalties = transforms.penalised(transforms_, learned, learned_grads, state.step)
        moving = select(state.params, trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, moving)
        params = merge(state.params, optax.apply_updates(moving, updates))
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=None, loss_scale=None)
        if extra is not None:
            updates, learned_state = learned_optimizer.update(learned_grads, extra.opt_state)
            updates = transforms.rated(transforms_, updates, state.step)
            moved = Moving(new.step, params, opt_state, view_grads, cfg.seed)
            states, moved = transforms.update(transforms_, extra.transforms, moved)
            learned = optax.apply_updates(extra.learned, updates)
            new = new.replace(
                params=moved.params, opt_state=moved.opt_state, extra=Extra(learned, learned_state, states)
            )
        metrics = {
            "loss": sums["nats"] / weight,
            "accuracy": sums["correct"] / weight,
            "tokens": batch["weights"].sum(),
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - (0 if loss_scale is None else loss_scale.skipped)),
        }
        metrics |= {name: value / weight for name, value in sums.items() if name not in ("nats", "correct")} | penalties
        if loss_scale is not None:
            finite = jnp.isfinite(grad_norm)
            new = where_finite(finite, new, state.replace(step=new.step, ema=None, loss_scale=None))
            loss_scale = precision.update(loss_scale, finite)
            new = new.replace(loss_scale=loss_scale)
            metrics |= {
                "loss_scale": loss_scale.scale,
                "skipped": loss_scale.skipped.astype(jnp.float32),
                "skipped_in_a_row": loss_scale.skipped_in_a_row.astype(jnp.float32),
            }
        if state.ema is not None:
            # A short memory at first, so that the average does not drag the random start along.
            decay = jnp.minimum(optim.ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, new.params)
            # A step that is skipped has not happened to the average either.
            new = new.replace(ema=ema if loss_scale is None else where_finite(finite, ema, state.ema))
        return new, metrics

    return train_step


def make_eval_step(transformer: Transformer, documents: bool, chunk: int):
    """A pure (params, batch) -> {"nats": (B, T), "correct": (B, T)} float32, in the transformer's compute dtype.

    `documents`: attention stops at segment boundaries, as it did in training; False: each row is one text, so that
    the fastest attention can serve. `chunk`: as in `token_losses`.
    """

    def eval_step(params, batch):
        view = precision.cast(params, transformer.dtype)
        hidden, _ = transformer.hidden(
            view, batch["tokens"], segment_ids=batch["segment_ids"] if documents else None, positions=batch["positions"]
        )
        nats, correct, _ = token_losses(
            *transformer.readout(view, hidden),
            batch["targets"],
            logit_softcap=transformer.cfg.logit_softcap,
            chunk=chunk,
        )
        return {"nats": nats, "correct": correct}

    return eval_step


def _micro_batches(batch, n):
    """(B, ...) -> (n, B/n, ...). Rows are dealt out in turn, so that each device splits its own rows and none moves."""
    return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1), batch)
