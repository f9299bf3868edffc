import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError
from slm.models.transformer import Transformer
from slm.training import rules

BUILT_IN = {"decay": rules.DECAY, "muon": rules.MUON, "sharding": rules.SHARDING}

BIASES = ("qkv", "out", "mlp", "norm", "head")


def abstract(**fields):
    cfg = ModelConfig(**{"vocab_size": 11, "layers": 3, "width": 8, "heads": 2, "mlp_width": 16, **fields})
    return jax.eval_shape(Transformer(cfg).init, jax.random.key(0))


def by_path(rule_set, params):
    return dict(zip(rules.paths(params), jax.tree.leaves(rules.assign(rule_set, params))))


def test_every_parameter_of_every_kind_of_model_has_exactly_one_rule_in_each_set():
    for bias, tied, qk_norm, position in itertools.product([0, 1], [0, 1], [0, 1], ["rope", "learned"]):
        params = abstract(
            bias=BIASES if bias else (), tied=bool(tied), position=position, max_length=4,
            mixer=MixerConfig(qk_norm="rms" if qk_norm else "none"),
            norm="layernorm" if bias else "rmsnorm", mlp="gelu" if bias else "swiglu", attention=("softmax", "window"),
        )  # fmt: skip
        for rule_set in BUILT_IN.values():
            assert len(by_path(rule_set, params)) == len(jax.tree.leaves(params))


def test_names_decide_who_is_decayed_who_gets_muon_and_how_it_is_split():
    params = abstract(bias=BIASES, tied=False, position="learned", max_length=4, norm="layernorm")
    decay, muon, sharding = (by_path(rule_set, params) for rule_set in BUILT_IN.values())
    assert {p for p, yes in decay.items() if yes} == {p for p in decay if p.endswith("/kernel")}
    assert {p for p, name in muon.items() if name == "muon"} == {
        p for p in muon if p.startswith("blocks/") and p.endswith("/kernel")
    }
    assert sharding["blocks/0/mixer/query/kernel"] == sharding["blocks/0/mlp/up/kernel"] == P("fsdp", "tensor")
    assert sharding["blocks/0/mixer/out/kernel"] == sharding["blocks/0/mlp/down/kernel"] == P("tensor", "fsdp")
    assert sharding["embed/embedding"] == P("tensor", "fsdp")
    assert sharding["head/kernel"] == P("fsdp", "tensor")
    assert {p for p, spec in sharding.items() if spec == P()} == {p for p, yes in decay.items() if not yes} - {
        "embed/embedding"
    }


def test_parameters_of_future_mechanisms_have_a_place():
    a = jax.ShapeDtypeStruct((2, 4, 4), jnp.float32)
    mixer = {
        "decay": a,
        "short_conv": {"kernel": a},
        "conv": {"kernel": a},
        "gate": {"kernel": a},
        "out": {"kernel": a},
    }
    params = {"embed": {"embedding": a}, "tail": {"0": {"mixer": mixer}}}
    decay, muon, sharding = (by_path(rule_set, params) for rule_set in BUILT_IN.values())
    prefix = "tail/0/mixer/"
    assert not decay[prefix + "decay"]
    assert decay[prefix + "conv/kernel"]
    assert muon[prefix + "gate/kernel"] == "muon"
    assert muon[prefix + "decay"] == muon[prefix + "conv/kernel"] == muon[prefix + "short_conv/kernel"] == "adamw"
    assert sharding[prefix + "gate/kernel"] == P("fsdp", "tensor")
    assert sharding[prefix + "out/kernel"] == P("tensor", "fsdp")
    assert sharding[prefix + "conv/kernel"] == sharding[prefix + "decay"] == P()


def test_bad_rule_sets_are_refused_by_name():
    params = {"a": {"kernel": jnp.zeros(2)}, "b": {"scale": jnp.zeros(2)}}
    with pytest.raises(ConfigError, match=r"'b/scale' matches none of the rules.*'a/kernel'"):
        rules.assign((("a/kernel", 1),), params)
    with pytest.raises(ConfigError, match=re.escape("'a/kernel' matches 2 rules")) as error:
        rules.assign((("a/.*", 1), (".*kernel", 2), ("b/.*", 3)), params)
    assert "'a/.*', '.*kernel'" in str(error.value)
    with pytest.raises(ConfigError, match=r"rule 'c/\.\*' matches no parameter"):
        rules.assign(((".*", 1), ("c/.*", 2)), params)
    with pytest.raises(ConfigError, match="'a/kernel' matches none"):
        rules.assign((("kernel", 1), (".*scale", 2)), params)  # the whole path must match
    unknown = {"blocks": {"0": {"mixer": {"kernel": jnp.zeros(2), "mystery": jnp.zeros(2)}}}}
    for rule_set in BUILT_IN.values():
        with pytest.raises(ConfigError, match="'blocks/0/mixer/mystery' matches none"):
            rules.assign(rule_set, unknown)


def test_table_has_a_row_for_each_parameter():
    params = abstract()
    rows = rules.table(
        params, {"decay": rules.assign(rules.DECAY, params), "split": rules.assign(rules.SHARDING, params)}
    )
    assert [row.path for row in rows] == rules.paths(params)
    (row,) = [row for row in rows if row.path == "blocks/0/mlp/down/kernel"]
    assert row == (row.path, (3, 16, 8), "float32", 384, {"decay": True, "split": P("tensor", "fsdp")})
    assert sum(row.parameters for row in rows) == sum(leaf.size for leaf in jax.tree.leaves(params))
