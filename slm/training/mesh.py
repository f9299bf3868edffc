"""Devices as a named mesh, and where every array lives on it.

Axes: `data` copies the model, `fsdp` shares out parameters and optimizer state (ZeRO-3, Rajbhandari et al. 2020),
`tensor` shares out heads and feed-forward columns (Megatron-LM, Shoeybi et al. 2019). The batch is split over data and
fsdp. XLA inserts the communication; nothing here changes what is computed.
"""

import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slm.config import MeshConfig, ModelConfig, TrainConfig
from slm.errors import ConfigError
from slm.models.layers import mlp_width
from slm.training import rules
from slm.training.transforms import belonging

AXES = ("data", "fsdp", "tensor")


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes `data`, `fsdp`, `tensor` over all devices of all processes; a size of -1 takes what is left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or processes would have to share rows of a batch.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    count, wanted = len(devices), [cfg.data, cfg.fsdp, cfg.tensor]
    rest = count // math.prod(size for size in wanted if size != -1)
    sizes = [rest if size == -1 else size for size in wanted]
    if math.prod(sizes) != count:
        tensor = math.gcd(count, max(cfg.tensor, 1))
        fsdp = math.gcd(count // tensor, max(cfg.fsdp, 1))
        raise ConfigError(
            f"mesh.data = {cfg.data}, mesh.fsdp = {cfg.fsdp}, mesh.tensor = {cfg.tensor} do not make use of exactly "
            f"the {count} devices there are; possible: mesh.data = {count // tensor // fsdp}, mesh.fsdp = {fsdp}, "
            f"mesh.tensor = {tensor}"
        )
    local = sum(device.process_index == jax.process_index() for device in devices)
    if local % sizes[2]:
        raise ConfigError(
            f"mesh.tensor = {sizes[2]} must divide the {local} devices of a process, which reads rows of its own"
        )
    # jax.make_mesh orders TPUs by their wiring; without axis types it would make the axes explicit.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_mesh(mesh: Mesh, model: ModelConfig, train: TrainConfig) -> None:
    """Raises ConfigError unless micro-batches, heads and feed-forward width divide by the mesh."""
    shares, tensor = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["tensor"]
    rows = train.batch_size // train.accumulation
    if rows % shares:
        least = train.accumulation * shares
        raise ConfigError(
            f"train.batch_size / train.accumulation = {train.batch_size} / {train.accumulation} = {rows} is not "
            f"divisible by mesh.data x mesh.fsdp = {mesh.shape['data']} x {mesh.shape['fsdp']} = {shares}: make "
            f"train.batch_size a multiple of {least}, such as {math.ceil(train.batch_size / least) * least}"
        )
    if mesh.size > 1 and model.mixer.implementation in ("pallas", "tokamax"):
        raise ConfigError(
            f"model.mixer.implementation = {model.mixer.implementation}: XLA cannot divide this kernel among the "
            f"{mesh.size} devices of the mesh; use auto"
        )
    sizes = {
        "model.heads": model.heads,
        "model.kv_heads": model.kv_heads or model.heads,
        "model.mlp_width": mlp_width(model),
    }
    for name, size in sizes.items():
        if size % tensor:
            fits = math.gcd(*sizes.values())
            raise ConfigError(f"{name} = {size} is not divisible by mesh.tensor = {tensor}; a divisor of {fits} works")


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """Tree of NamedShardings for parameters (arrays or ShapeDtypeStructs), by slm.training.rules.SHARDING.

    The rule names axes of the last dimensions. A dimension that an axis does not divide (a vocabulary, mostly) stays
    whole on that axis, with one warning that lists all of them.
    """
    specs = jax.tree.leaves(rules.assign(rules.SHARDING, params))
    shardings, whole = [], []
    for name, leaf, spec in zip(rules.paths(params), jax.tree.leaves(params), specs, strict=True):
        axes = [None] * (leaf.ndim - len(spec)) + [axis if mesh.shape[axis] > 1 else None for axis in spec]
        for i, axis in enumerate(axes):
            if axis and leaf.shape[i] % mesh.shape[axis]:
                whole.append(f"{name} {leaf.shape} on {axis} = {mesh.shape[axis]}")
                axes[i] = None
        shardings.append(NamedSharding(mesh, P(*axes) if any(axes) else P()))
    if whole:
        warnings.warn(f"not sharded, because the axis does not divide a dimension: {'; '.join(whole)}", stacklevel=1)
    return jax.tree.unflatten(jax.tree.structure(params), shardings)


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Tree like `state` (a TrainState of arrays or ShapeDtypeStructs) of NamedShardings.

    A leaf whose path ends with the path of a parameter and that has its shape (moments, momentum, averages) lives where
    the parameter lives; everything else (counters, Adafactor's factored vectors, the loss scale) is on every device.
    """
    homes = dict(zip(rules.paths(state.params), jax.tree.leaves(param_shardings(state.params, mesh)), strict=True))
    everywhere = NamedSharding(mesh, P())
    leaves = [everywhere if owner is None else homes[owner] for owner in belonging(state, state.params)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over data and fsdp; other axes whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Device arrays (B, ...) from this process's rows, which are all B of them or, with P processes, B / P."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def initialise_distributed(cfg: MeshConfig) -> str | None:
    """Join the other processes of the run, if there are any; call before any device is used, again does nothing.

    By hand with mesh.coordinator, processes and process_id; from the surroundings with coordinator = auto; with nothing
    set, from the surroundings only where they say that there are several processes (inside srun, or on a TPU pod).

    Returns:
      One line that says what was joined; None: one process, or already joined.

    Raises:
      ConfigError: the three fields do not fit together, devices are in use already, or the others cannot be reached.
    """
    arguments = _distributed_arguments(cfg, os.environ)
    if arguments is None or jax.distributed.is_initialized():
        return None
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"mesh.coordinator = {cfg.coordinator}: cannot join the other processes: {error}") from error
    how = f"at {cfg.coordinator}" if "coordinator_address" in arguments else "found in the environment"
    return f"process {jax.process_index()} of {jax.process_count()}, {how}"


def _distributed_arguments(cfg: MeshConfig, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize, {} to let JAX find them, None for a single process."""
    by_hand = (cfg.processes, cfg.process_id)
    if cfg.coordinator in (None, "auto"):
        if by_hand != (None, None):
            raise ConfigError(
                "mesh.processes and mesh.process_id need mesh.coordinator = HOST:PORT, the address of process 0"
            )
        return {} if cfg.coordinator or _several_processes(environ) else None
    if not re.fullmatch(r".+:\d+", cfg.coordinator):
        raise ConfigError(f"mesh.coordinator = {cfg.coordinator!r}: must be HOST:PORT of process 0, or auto")
    if None in by_hand:
        raise ConfigError("mesh.coordinator = HOST:PORT also needs mesh.processes and mesh.process_id")
    if not 0 <= cfg.process_id < cfg.processes:
        raise ConfigError(
            f"mesh.process_id = {cfg.process_id}: must be from 0 to mesh.processes - 1 = {cfg.processes - 1}"
        )
    return {
        "coordinator_address": cfg.coordinator,
        "num_processes": cfg.processes,
        "process_id": cfg.process_id,
        "cluster_detection_method": "deactivate",  # else SLURM's numbers would choose this process's devices
    }


def _several_processes(environ: Mapping[str, str]) -> bool:
    # Of SLURM's counts, the one of the job *step*: a batch script that starts Python without srun also sees
    # SLURM_NTASKS, but is alone, and would wait for the others for ever.
    return (
        int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
        or int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1
    )


# Pattern of jax.Device.device_kind -> peak TFLOP/s of dense matrix products in (16 bit, float32), as JAX computes them
# by default: float32 as TF32 on NVIDIA, as one bfloat16 pass on TPU. NVIDIA: the data sheets of H100 and H200 (SXM,
# PCIe, NVL), A100 and L4, halved where they count sparsity, and the Ada architecture white paper (RTX 4090, with
# float32 accumulation). TPU: the "System architecture" pages of Google Cloud TPU, which count chips; JAX shows the two
# cores of a TPU7x chip as two devices.
_PEAK_TFLOPS = (
    (r"\bH[12]00 NVL\b", 835.5, 417.5),
    (r"\bH100 PCIe\b", 756.5, 378.0),
    (r"\bH[12]00\b", 989.4, 494.7),
    (r"\bA100\b", 312.0, 156.0),
    (r"\bL4\b", 121.0, 60.0),
    (r"\bRTX 4090$", 165.2, 82.6),
    (r"^TPU v4$", 275.0, 275.0),
    (r"^TPU v5( lite|e)$", 197.0, 197.0),
    (r"^TPU v5p?$", 459.0, 459.0),
    (r"^TPU v6( lite|e)$", 918.0, 918.0),
    (r"^TPU ?v?7x?$", 2307.0 / 2, 2307.0 / 2),
)


def peak_flops(device_kind: str, dtype: Any) -> float | None:
    """Peak FLOP/s of one device in dense matrix products of `dtype`, for MFU; None where it is not known.

    A MIG slice has no known peak: it is a part of what its name says.
    """
    if "MIG" in device_kind:
        return None
    for pattern, half, single in _PEAK_TFLOPS:
        if re.search(pattern, device_kind):
            return 1e12 * (half if np.dtype(dtype).itemsize == 2 else single)
    return None
