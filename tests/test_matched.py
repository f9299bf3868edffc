"""Arms of equal size: the value that is chosen is the best of all, and the models made of it have that size."""

import dataclasses

import jax
import pytest

from slm.config import Experiment, check, override
from slm.errors import ConfigError
from slm.models.counts import flops_per_token, parameter_counts
from slm.models.transformer import Transformer
from slm.study.grids import arms, configs, grid
from slm.study.matching import match, matched

BASE = override(
    Experiment(name="base"),
    {"model.layers": 4, "model.width": 96, "model.heads": 4, "model.vocab_size": 300, "data.sequence_length": 64},
)
MECHANISMS = grid({"model.attention": ["softmax", "gla", "gated_delta"]})


def best(cfg, field, values, target, size):
    """The value of all whose size is nearest, by trying each."""
    sizes = {}
    for value in values:
        try:
            sizes[value] = size(check(override(cfg, {field: value})))
        except ConfigError:
            continue
    return min(sizes, key=lambda value: abs(sizes[value] - target))


def parameters(cfg) -> int:
    return parameter_counts(cfg.model)["total"]


def flops(cfg) -> float:
    return flops_per_token(cfg.model, cfg.data.sequence_length)["forward"]


@pytest.mark.parametrize(("by", "size"), [("parameters", parameters), ("flops", flops)])
@pytest.mark.parametrize(
    ("solve", "values"),
    [("model.width", range(72, 120, 8)), ("model.layers", range(1, 10)), ("model.mlp_width", range(160, 360, 8))],
)
def test_the_nearest_of_all_values_is_chosen(by, size, solve, values):
    gla = configs(BASE, MECHANISMS)["gla"]
    found = match(gla, BASE, by, solve, tolerance=1.0)
    assert found.value == best(gla, solve, values, size(BASE), size)
    assert found.config == override(gla, {solve: found.value})
    assert found.count == size(found.config)
    assert found.target == size(BASE)
    assert found.ratio == found.count / found.target


def test_the_models_made_have_the_size_that_is_reported():
    found = matched(BASE, MECHANISMS)
    assert list(found) == list(MECHANISMS.names)
    assert found["softmax"].config == configs(BASE, MECHANISMS)["softmax"]
    assert found["softmax"].ratio == 1
    for name, one in found.items():
        assert abs(one.ratio - 1) < 0.1
        assert one.config.model.width % one.config.model.heads == 0
        assert str(one).startswith(f"{name}: model.width = {one.value} ")
    other = found["gated_delta"]
    assert other.config.model.width < 96  # it has more parameters a layer
    params = jax.jit(Transformer(other.config.model).init)(jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(params)) == other.count


def test_widths_keep_heads_valid():
    base = override(BASE, {"model.heads": 3, "model.width": 90})
    arm = override(base, {"model.attention": "gla", "model.layers": 3})
    assert match(arm, base).value % 6 == 0
    wide = override(arm, {"model.head_dim": 32})
    assert match(wide, base).value % 8 == 0
    # A width that is no multiple stays if it is right.
    assert match(base, base).value == 90
    assert match(override(base, {"optim.name": "muon"}), base).config.model.width == 90
    assert match(arm, base, multiple=48, tolerance=0.2).value % 48 == 0


def test_values_without_a_model_are_stepped_over():
    cfg = override(
        BASE, {"model.shared_layers": True, "model.attention": ["window", "softmax", "window"], "model.layers": 3}
    )
    # Of shared layers only their number of computations grows; it must be a multiple of the pattern's three.
    found = match(cfg, override(BASE, {"model.layers": 8}), "flops", "model.layers", tolerance=0.3)
    assert found.value == 9


def test_learned_positions_and_the_tokenizer_count():
    base = override(BASE, {"model.position": "learned", "model.vocab_size": 0})
    found = match(override(base, {"model.attention": "gla"}), base)
    filled = dataclasses.replace(base.model, vocab_size=257, max_length=64)
    assert found.target == parameter_counts(filled)["total"]
    assert found.config.model.vocab_size == 0  # the run fills it in
    assert match(base, base, vocab_size=1000).target - found.target == (1000 - 257) * 96
    bpe = override(base, {"data.tokenizer": "bpe:1000"})
    assert match(bpe, bpe).target == match(base, base, vocab_size=1000).target
    with pytest.raises(ConfigError, match=r"data\.tokenizer = chars .* set model\.vocab_size, or give vocab_size"):
        match(override(base, {"data.tokenizer": "chars"}), base)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"model.vocab_size": 9000}, {}, r"arm 'it': no model\.width gives .* parameters within 10%: the nearest is "),
        ({"model.width": 512}, {"solve": "model.layers"}, r"the nearest is 1 with .* times as many"),
        ({"model.mlp": "none"}, {"solve": "model.mlp_width"}, r"model\.mlp_width is not what"),
        ({}, {"solve": "model.heads"}, r"solve = 'model\.heads': must be one of model\.width"),
        ({}, {"by": "seconds"}, r"match by 'seconds': must be parameters or flops"),
        ({"model.layer_heads": [4] * 4, "model.width": 64}, {"solve": "model.layers"}, r"the nearest is 4"),
        ({}, {"tolerance": 0.0}, r"tolerance = 0\.0: must be above 0"),
    ],
)
def test_errors_name_the_arm_and_the_nearest(changes, options, message):
    base = override(BASE, {"model.width": 48})
    with pytest.raises(ConfigError, match=message):
        matched(base, arms({"it": changes}), **options)
