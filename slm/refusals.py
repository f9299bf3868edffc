"""What the sections of slm.compression refuse: each names the field, its value, and what to do."""

import re
from pathlib import Path
from typing import Any

from slm.compression import PruneConfig, gate_steps, prune_end
from slm.errors import ConfigError


def check_compression(cfg: Any) -> None:
    """Raises ConfigError where these sections of an Experiment contradict each other or the rest of it."""
    _check_distill(cfg)
    _check_prune(cfg)
    _check_shrink(cfg)
    _check_convert(cfg)
    _check_quantize(cfg)


def _demand(ok: bool, message: str) -> None:
    if not ok:
        raise ConfigError(message)


def _check_distill(cfg: Any) -> None:
    d = cfg.distill
    if not d.on:
        changed = [name for name in ("hidden", "attention", "relations", "on_policy") if getattr(d, name)]
        _demand(not changed, f"distill.{(changed or [''])[0]} needs a teacher: set distill.teacher, or leave it at 0")
        return
    _demand(
        d.teacher is None or d.cached is None,
        "distill.teacher and distill.cached exclude each other: cached logits stand for the teacher; leave one out",
    )
    for name in ("alpha", "beta"):
        for field in (name, f"{name}_end"):
            value = getattr(d, field)
            _demand(value is None or 0 <= value <= 1, f"distill.{field} = {value}: must be between 0 and 1")
    for field in ("temperature", "temperature_end", "sample_temperature"):
        value = getattr(d, field)
        _demand(value is None or value > 0, f"distill.{field} = {value}: must be above 0")
    for field in ("hidden", "attention", "relations"):
        _demand(getattr(d, field) >= 0, f"distill.{field} = {getattr(d, field)}: a weight must be at least 0")
        _demand(
            not (getattr(d, field) and d.cached),
            f"distill.{field} = {getattr(d, field)}: cached logits know nothing of a teacher's inside; set "
            "distill.teacher instead of distill.cached",
        )
    for field, on in (
        ("distill.cached", d.cached is not None), ("distill.hidden", d.hidden), ("distill.attention", d.attention),
        ("distill.relations", d.relations), ("distill.on_policy", d.on_policy),
        ("convert.transfer_steps", cfg.convert.transfer_steps),
    ):  # fmt: skip
        _demand(
            not (d.loss == "uld" and on),
            f"distill.loss = uld with {field}: the teacher reads other tokens than the student, at other places; leave "
            f"{field} out, or take a teacher with the student's tokenizer and another loss",
        )
    _demand(0 <= d.on_policy <= 1, f"distill.on_policy = {d.on_policy}: a share of steps, between 0 and 1")
    _demand(
        not (d.on_policy and d.cached),
        f"distill.on_policy = {d.on_policy}: cached logits are those of the training text, not of the student's; set "
        "distill.teacher instead of distill.cached",
    )
    _demand(
        1 <= d.prompt_tokens < cfg.data.sequence_length or not d.on_policy,
        f"distill.prompt_tokens = {d.prompt_tokens}: must be from 1 to data.sequence_length - 1 = "
        f"{cfg.data.sequence_length - 1}",
    )
    _demand(
        d.self_distill or not _same(d.teacher, cfg.model.init_from) or cfg.shrink.on or cfg.prune.on
        or cfg.quantize.on or cfg.convert.on,
        f"distill.teacher = {d.teacher!r} is model.init_from itself, and nothing makes the student smaller: set "
        "distill.self_distill if that is meant",
    )  # fmt: skip
    for field, path in (("teacher", d.teacher), ("cached", d.cached)):
        _demand(
            not _same(path, cfg.run_dir), f"distill.{field} = {path!r} is this run's own folder: use another --name"
        )


def _same(one: Any, other: Any) -> bool:
    """Whether both name one folder or file."""
    return None not in (one, other) and Path(one).expanduser().absolute() == Path(other).expanduser().absolute()


def _check_prune(cfg: Any) -> None:
    p, steps = cfg.prune, cfg.train.steps
    _demand(0 <= p.sparsity < 1, f"prune.sparsity = {p.sparsity}: must be at least 0 and below 1")
    _demand(
        p.pattern == "unstructured" or bool(re.fullmatch(r"\d+[:x]\d+", p.pattern)),
        f"prune.pattern = {p.pattern!r}: unstructured, N:M such as 2:4, or blocks such as 16x16",
    )
    if not p.on:
        return
    check_scope(p)
    end = prune_end(cfg)
    one_shot = p.schedule == "one_shot"
    _demand(
        0 <= p.begin_step < steps,
        f"prune.begin_step = {p.begin_step}: must be a step of the run, which has train.steps = {steps}",
    )
    _demand(
        one_shot or p.begin_step < end <= steps,
        f"prune.end_step = {end} must lie behind prune.begin_step = {p.begin_step}, and not behind train.steps = "
        f"{steps}",
    )
    _demand(p.every >= 1, f"prune.every = {p.every}: must be at least 1")
    _demand(0 < p.regrow < 1, f"prune.regrow = {p.regrow}: a share between 0 and 1")
    _demand(
        not (p.criterion in ("wanda", "sparsegpt") and (not one_shot or p.begin_step)),
        f"prune.criterion = {p.criterion} prunes once, before training: set prune.schedule = one_shot and "
        "prune.begin_step = 0",
    )
    _demand(
        not (p.criterion in ("movement", "taylor") and one_shot and p.begin_step == 0),
        f"prune.criterion = {p.criterion} needs gradients: set prune.begin_step to a step when there are some",
    )
    _demand(
        not (p.schedule in ("set", "rigl") and (p.criterion != "magnitude" or ":" in p.pattern or p.begin_step)),
        f"prune.schedule = {p.schedule} goes by magnitude, from step 0, without N:M: set prune.criterion = magnitude, "
        "prune.pattern = unstructured and prune.begin_step = 0",
    )
    _demand(
        not (":" in p.pattern and p.sparsity),
        f"prune.sparsity = {p.sparsity}: prune.pattern = {p.pattern} has a share of zeros of its own; leave it at 0",
    )
    _demand(
        not (cfg.optim.name == "schedule_free_adamw" and p.schedule != "ste"),
        "prune: schedule_free_adamw averages weights, which would bring pruned ones back; use optim.name = adamw, or "
        "prune.schedule = ste",
    )


def check_scope(p: PruneConfig) -> None:
    """Raises ConfigError for a scope or a pattern that the criterion cannot have."""
    _demand(
        not (":" in p.pattern and p.scope is not None),
        f"prune.scope = {p.scope}: with prune.pattern = {p.pattern} weights compete with those of their group; leave "
        "scope out",
    )
    _demand(
        not (p.criterion == "sparsegpt" and p.scope is not None),
        f"prune.scope = {p.scope}: sparsegpt compares within blocks of inputs; leave scope out",
    )
    _demand(
        not (p.criterion == "sparsegpt" and "x" in p.pattern),
        f"prune.pattern = {p.pattern!r}: sparsegpt makes unstructured zeros, or N:M such as 2:4",
    )
    _demand(
        not (p.criterion == "wanda" and p.scope == "global"),
        "prune.scope = global: wanda prunes a layer before it measures the next; use output or layer",
    )


def _check_shrink(cfg: Any) -> None:
    s = cfg.shrink
    if not s.on:
        return
    _demand(
        cfg.model.init_from is not None or s.learned,
        "shrink needs a model to cut from: set model.init_from, or shrink.criterion = l0",
    )
    for field in ("layers", "width", "mlp_width", "kv_heads"):
        value = getattr(s, field)
        least = min(value, default=0) if isinstance(value, tuple) else value
        _demand(least is None or least >= 1, f"shrink.{field} = {value}: must be at least 1")
    _demand(
        not (s.keep_layers and s.layers),
        "shrink.layers and shrink.keep_layers exclude each other: give the number, or the list",
    )
    _demand(
        list(s.keep_layers) == sorted(set(s.keep_layers)),
        f"shrink.keep_layers = {s.keep_layers}: numbers of layers from 0, each once, in rising order",
    )
    if s.learned:
        _check_gates(cfg)
        return
    for field in ("warmup_steps", "end_step"):
        _demand(
            getattr(s, field) is None,
            f"shrink.{field} = {getattr(s, field)} belongs to shrink.criterion = l0; {s.criterion} cuts before step 0",
        )


def _check_gates(cfg: Any) -> None:
    s, steps = cfg.shrink, cfg.train.steps
    warmup, end = gate_steps(cfg)
    _demand(1 <= end <= steps, f"shrink.end_step = {end}: must be a step of the run, from 1 to train.steps = {steps}")
    _demand(
        0 <= warmup <= end,
        f"shrink.warmup_steps = {warmup}: must be at least 0 and not more than shrink.end_step = {end}",
    )
    _demand(s.gate_learning_rate > 0, f"shrink.gate_learning_rate = {s.gate_learning_rate}: must be above 0")
    _demand(
        cfg.optim.learning_rate > 0,
        "optim.learning_rate = 0 with shrink.criterion = l0: gates follow its schedule; make it small instead",
    )
    _demand(
        not s.keep_layers,
        f"shrink.keep_layers = {s.keep_layers}: with shrink.criterion = l0 gates choose the layers; set shrink.layers, "
        "or cut these with another criterion in a run before",
    )
    each = next((name for name in ("mlp_width", "kv_heads") if isinstance(getattr(s, name), tuple)), None)
    _demand(
        s.layers is None or each is None,
        f"shrink.{each} has a number for each layer, but with shrink.criterion = l0 and shrink.layers = {s.layers} "
        "nobody knows which layers stay: give one number",
    )
    for name, on in (("prune", cfg.prune.on), ("quantize", cfg.quantize.on)):
        _demand(
            not on,
            f"shrink.criterion = l0 with {name}: the matrices that it works on are cut smaller at the end; let a "
            "second run do it, with this one as model.init_from",
        )
    _demand(
        cfg.optim.name != "schedule_free_adamw",
        "shrink.criterion = l0: schedule_free_adamw ships an average of weights under gates that had not closed yet; "
        "use optim.name = adamw",
    )


def _check_convert(cfg: Any) -> None:
    c = cfg.convert
    _demand(not c.on or cfg.model.init_from is not None, "convert needs a model to convert: set model.init_from")
    _demand(c.on or not c.transfer_steps, f"convert.transfer_steps = {c.transfer_steps} needs convert.attention")
    _demand(
        not c.transfer_steps or cfg.distill.teacher is not None,
        f"convert.transfer_steps = {c.transfer_steps} needs distill.teacher: the model that is converted",
    )
    _demand(
        0 <= c.transfer_steps <= cfg.train.steps,
        f"convert.transfer_steps = {c.transfer_steps}: must not be more than train.steps = {cfg.train.steps}",
    )


def _check_quantize(cfg: Any) -> None:
    q = cfg.quantize
    if not q.on:
        return
    _demand(
        q.group_size is None or q.group_size >= 2, f"quantize.group_size = {q.group_size}: must be at least 2, or None"
    )
    _demand(
        cfg.train.precision != "fp8",
        f"train.precision = fp8 with quantize.scheme = {q.scheme}: weights on one grid would be rounded again to "
        "another, and what is shipped would not be what was trained; set train.precision = bfloat16",
    )
    _demand(
        q.symmetric or q.scheme.startswith("int"),
        f"quantize.symmetric = false: {q.scheme} has no zero point; use int8 to int2",
    )
    _demand(
        q.symmetric or not cfg.prune.on,
        "quantize.symmetric = false with prune: a zero point that is a float moves pruned weights away from zero; use "
        "symmetric integers",
    )
    _demand(
        q.method == "ste" or (q.scheme.startswith("int") and q.symmetric),
        f"quantize.method = lsq learns scales of symmetric integers; quantize.scheme = {q.scheme} needs ste",
    )
    _demand(
        q.activations == "none" or (q.scheme == "int8" and q.symmetric and q.group_size is None),
        "quantize.activations = int8 needs quantize.scheme = int8, symmetric and without groups",
    )
    _demand(
        0 <= q.begin_step < cfg.train.steps,
        f"quantize.begin_step = {q.begin_step}: must be a step of the run, which has train.steps = {cfg.train.steps}",
    )
