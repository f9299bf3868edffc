"""The one jitted train step, built in one place, with donated state and explicit shardings.

    parameters -> view (cast to the compute dtype) -> model -> loss terms -> gradients -> clip -> optimizer -> EMA

`view` is where parameter transforms (pruning masks, fake quantization, adapters) will stand, and `objective` is where
further loss terms will: the step itself does not know which are on.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from slm.config import Experiment
from slm.models.transformer import Transformer
from slm.training import precision
from slm.training.loss import cross_entropy, token_losses
from slm.training.mesh import batch_sharding, state_shardings
from slm.training.optimizers import clip_by_global_norm, evaluation_params, make_optimizer
from slm.training.schedules import make_schedule
from slm.training.state import LossScale, TrainState


@dataclass(frozen=True)
class Program:
    """A run's jitted functions and the abstract values they take, for one mesh."""

    transformer: Transformer
    mesh: Mesh
    init: Callable[[jax.Array], TrainState]
    """key -> sharded initial state."""
    start: Callable[[Any], TrainState]
    """float32 parameters -> sharded initial state; they are donated."""
    train: Callable[[TrainState, dict], tuple[TrainState, dict]]
    """(state, batch) -> (state, metrics); the old state is donated. `.lower(state, batch).compile()` works on the
    abstract values below."""
    evaluate: Callable[[Any, dict], dict]
    """(params, batch) -> {"nats", "correct"}, each (B, T) float32, unweighted."""
    evaluation_params: Callable[[TrainState], Any]
    """state -> the weights to evaluate: the EMA, or schedule-free's average, or the parameters themselves."""
    state: TrainState
    """Abstract state with shardings."""
    batch: dict
    """Abstract global training batch with shardings."""


def build(cfg: Experiment, mesh: Mesh) -> Program:
    """The program of `cfg` on `mesh`. Allocates nothing. cfg.model.vocab_size must be set."""
    rows = batch_sharding(mesh)
    documents = cfg.data.packing == "documents"

    def constrain(x):
        return jax.lax.with_sharding_constraint(x, rows) if mesh.size > 1 else x

    transformer = Transformer(cfg.model, precision.compute_dtype(cfg.train.precision), constrain)
    abstract_params = jax.eval_shape(transformer.init, jax.random.key(0))
    optimizer = make_optimizer(cfg.optim, cfg.train.steps, abstract_params)

    def start(params) -> TrainState:
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=optimizer.init(params),
            ema=None if cfg.optim.ema_decay is None else jax.tree.map(jnp.copy, params),
            loss_scale=LossScale.create() if cfg.train.precision == "float16" else None,
        )

    def init(key) -> TrainState:
        return start(transformer.init(key))

    def averaged(state: TrainState):
        return evaluation_params(cfg.optim, state.opt_state, state.params) if state.ema is None else state.ema

    abstract = jax.eval_shape(init, jax.random.key(0))
    shardings = state_shardings(abstract, mesh)
    replicated = NamedSharding(mesh, PartitionSpec())
    options = compiler_options(mesh.devices.flat[0].platform)
    B, T = cfg.train.batch_size, cfg.data.sequence_length
    dtypes = {"tokens": "int32", "targets": "int32", "weights": "float32", "segment_ids": "int32", "positions": "int32"}
    step = make_train_step(transformer, optimizer, cfg)
    return Program(
        transformer=transformer,
        mesh=mesh,
        init=jax.jit(init, out_shardings=shardings, compiler_options=options),
        start=jax.jit(start, donate_argnums=0, in_shardings=(shardings.params,), out_shardings=shardings,
                      compiler_options=options),
        train=jax.jit(
            step, donate_argnums=0, in_shardings=(shardings, rows), out_shardings=(shardings, replicated),
            compiler_options=options,
        ),
        evaluate=jax.jit(
            make_eval_step(transformer, documents, cfg.train.loss_chunk),
            in_shardings=(shardings.params, rows), out_shardings=replicated,
            compiler_options=options,
        ),
        evaluation_params=jax.jit(averaged, in_shardings=(shardings,), out_shardings=shardings.params),
        state=jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings),
        batch={name: jax.ShapeDtypeStruct((B, T), dtype, sharding=rows) for name, dtype in dtypes.items()},
    )  # fmt: skip


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


def make_train_step(transformer: Transformer, optimizer: optax.GradientTransformation, cfg: Experiment):
    """A pure (state, batch) -> (state, metrics).

    Metrics are float32 scalars: `loss` (nats a token, without the z-loss), `accuracy`, `tokens` (weights summed),
    `grad_norm` (before clipping), `learning_rate`; with float16 also `loss_scale`, `skipped`, `skipped_in_a_row`.
    """
    optim, train, documents = cfg.optim, cfg.train, cfg.data.packing == "documents"
    schedule = make_schedule(optim, train.steps)

    def objective(params, batch):
        view = precision.cast(params, transformer.dtype)
        hidden, _ = transformer.hidden(
            view, batch["tokens"], segment_ids=batch["segment_ids"] if documents else None, positions=batch["positions"]
        )
        return cross_entropy(
            *transformer.readout(view, hidden),
            batch["targets"],
            batch["weights"],
            z_loss=train.z_loss,
            logit_softcap=cfg.model.logit_softcap,
            chunk=train.loss_chunk,
        )

    def gradients(params, batch, scale):
        """Gradients of scale * (sum of losses), accumulated in float32 over micro-batches, and the summed metrics."""

        def one(micro):
            def scaled(params):
                value, sums = objective(params, micro)
                return value * scale, sums

            return jax.grad(scaled, has_aux=True)(params)

        if train.accumulation == 1:
            return one(batch)
        micros = _micro_batches(batch, train.accumulation)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        return jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, one(micro)), None), zeros, micros)[0]

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        # The weight of the whole batch is known before any loss is, so micro-batches add up to exactly its mean.
        weight = jnp.maximum(batch["weights"].sum(), 1)
        loss_scale = state.loss_scale
        scale = (1.0 if loss_scale is None else loss_scale.scale) / weight
        grads, sums = gradients(state.params, batch, scale)
        if loss_scale is not None:
            grads = precision.unscale(grads, loss_scale)
        grads, grad_norm = clip_by_global_norm(grads, optim.clip_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            ema=None,
            loss_scale=None,
        )
        metrics = {
            "loss": sums["nats"] / weight,
            "accuracy": sums["correct"] / weight,
            "tokens": batch["weights"].sum(),
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - (0 if loss_scale is None else loss_scale.skipped)),
        }
        if loss_scale is not None:
            finite = jnp.isfinite(grad_norm)
            kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (new.params, new.opt_state),
                                (state.params, state.opt_state))  # fmt: skip
            loss_scale = precision.update(loss_scale, finite)
            new = new.replace(params=kept[0], opt_state=kept[1], loss_scale=loss_scale)
            metrics |= {
                "loss_scale": loss_scale.scale,
                "skipped": loss_scale.skipped.astype(jnp.float32),
                "skipped_in_a_row": loss_scale.skipped_in_a_row.astype(jnp.float32),
            }
        if state.ema is not None:
            # A short memory at first, so that the average does not drag the random start along.
            decay = jnp.minimum(optim.ema_decay, (1 + state.step) / (10 + state.step))
            new = new.replace(ema=jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema, new.params))
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
