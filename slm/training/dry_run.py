"""`train.py --dry-run`: what a config would cost on some mesh, without data, without devices, without parameters."""

import contextlib

import jax

from slm.config import Experiment
from slm.errors import ConfigError
from slm.training import mesh as meshes
from slm.training.plan import Plan, make_plan
from slm.training.progress import make_console, show_plan
from slm.training.run import filled_in
from slm.training.step import build


def dry_run(cfg: Experiment, devices: int) -> Plan:
    """Compiles the train step for `devices` CPU devices that stand in for real ones, prints the plan, and returns it.

    All from shapes: a model that would not fit this machine is fine. The memory is what XLA lays out for CPUs;
    accelerators fuse more, so take it as an upper estimate.

    A teacher is among the arguments.

    Raises ConfigError if the mesh does not divide, or the vocabulary can only be known from the data.
    """
    from slm.compress.start import starting_config
    from slm.compress.techniques import planned_teaching_of, techniques_of

    cfg = starting_config(cfg)
    cfg = filled_in(cfg, cfg.model.vocab_size or _vocabulary(cfg))
    if devices < 1:
        raise ConfigError(f"--devices {devices}: must be at least 1")
    _pretend(devices)
    mesh = meshes.make_mesh(cfg.mesh, jax.devices()[:devices])
    meshes.check_mesh(mesh, cfg.model, cfg.train)
    plan = make_plan(cfg, build(cfg, mesh, techniques_of(cfg, planned_teaching_of(cfg, mesh))))
    show_plan(cfg, plan, [], make_console(True))
    return plan


def _pretend(devices: int) -> None:
    """Makes `devices` CPU devices, unless JAX has started already (in a notebook) with enough of them."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    if len(jax.devices()) < devices:
        raise ConfigError(
            f"--devices {devices}: JAX is in use already with {len(jax.devices())}; do a dry run in a fresh process"
        )


def _vocabulary(cfg: Experiment) -> int:
    """Size of the tokenizer that data.tokenizer names, and of a mask token if it needs one of its own."""
    from slm.data.tokenizers import planned_vocabulary

    spec = cfg.data.tokenizer
    size = planned_vocabulary(spec, cfg.model.head == "masked_lm")
    if size is None:
        raise ConfigError(f"--dry-run reads no data, and data.tokenizer = {spec} depends on it: set model.vocab_size")
    return size
