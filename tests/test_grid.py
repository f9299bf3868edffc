"""The algebra of grids: which arms there are, in which order, by which name; and every error says whose it is."""

import itertools
import pickle
import warnings

import numpy as np
import pytest

from slm.config import Experiment, ModelConfig, override
from slm.errors import ConfigError
from slm.study.grids import Arm, Grid, arms, chain, configs, grid, paired, when

TWO = {"model.attention": ["softmax", "gla"], "optim.name": ["adamw", "muon"]}


def changes(one: Grid) -> list[dict]:
    return [dict(arm.changes) for arm in one]


def test_a_product_has_all_combinations_and_the_last_field_varies_fastest():
    widths, layers, seeds = [64, 128], [2, 3, 4], [1, 2]
    made = grid({"model.width": widths, "model.layers": layers, "seed": seeds})
    wanted = [{"model.width": w, "model.layers": n, "seed": s} for w, n, s in itertools.product(widths, layers, seeds)]
    assert changes(made) == wanted
    assert made == grid({"model.width": widths}) * grid({"model.layers": layers}) * {"seed": seeds}
    assert made == {"model.width": widths} * grid({"model.layers": layers, "seed": seeds})


def test_names_say_what_differs_and_nothing_else():
    assert grid(TWO).names == ("softmax adamw", "softmax muon", "gla adamw", "gla muon")
    assert grid(TWO | {"train.steps": [10]}).names == grid(TWO).names  # the same in all arms
    assert grid(TWO | {"train.steps": 10}).names == grid(TWO).names
    made = grid({"optim.learning_rate": [1e-3, 0.00031622], "model.tied": [True, False]})
    assert made.names[:2] == ("learning_rate=0.001 tied=True", "learning_rate=0.001 tied=False")
    assert made.names[2].startswith("learning_rate=0.0003162 ")
    assert grid({"model.kv_heads": [None, 2]}).names == ("kv_heads=None", "kv_heads=2")
    patterns = grid({"model.attention": [("window", "window", "softmax"), "gla"]})
    assert patterns.names == ("window,window,softmax", "gla")
    # One arm: nothing differs, and it still has a name; an arm without changes too.
    assert grid({"model.attention": ["gla"]}).names == ("gla",)
    assert grid({}).names == ("base",)
    # The same last part in two sections: the whole field.
    both = grid({"model.width": [64, 128], "shrink.width": [32, 48]})
    assert both.names[0] == "model.width=64 shrink.width=32"


def test_names_are_unique_where_short_ones_are_not():
    near = grid({"optim.learning_rate": [0.00123456, 0.00123457]})
    assert near.names == ("learning_rate=0.00123456", "learning_rate=0.00123457")
    alike = grid({"model.mlp": ["gelu", "relu"]}) + grid({"model.head_activation": ["gelu", "relu"]})
    assert alike.names == ("mlp=gelu", "mlp=relu", "head_activation=gelu", "head_activation=relu")
    with pytest.raises(ConfigError, match="two arms are called 'a'"):
        arms({"a": {"seed": 1}}) + arms({"a": {"seed": 2}})


def test_pairs_go_in_step():
    made = paired({"model.width": [64, 128], "model.layers": [2, 4], "train.steps": 7})
    assert changes(made) == [
        {"model.width": 64, "model.layers": 2, "train.steps": 7},
        {"model.width": 128, "model.layers": 4, "train.steps": 7},
    ]
    assert paired(grid({"model.width": [64, 128]}), {"model.layers": [2, 4], "train.steps": [7]}) == made
    assert paired(arms({"a": {"seed": 1}, "b": {"seed": 2}}), {"model.width": [8, 8]}).names == ("a", "b")
    with pytest.raises(ConfigError, match=r"model\.width has 2, model\.layers has 3"):
        paired({"model.width": [64, 128], "model.layers": [2, 3, 4]})


def test_chains_keep_order_and_drop_what_came_before():
    made = grid({}) + grid(TWO) + {"model.attention": ["gla"], "optim.name": ["muon", "lion"]}
    assert len(made) == 1 + 4 + 1
    assert made.names[0] == "base"
    assert made.names[-1] == "gla lion"
    assert made == chain({}, TWO, {"model.attention": ["gla"], "optim.name": ["muon", "lion"]})


def test_named_arms_keep_their_names_in_products():
    made = arms({"small": {"model.layers": 2}, "wide": {"model.width": 512}}) * {"optim.name": ["adamw", "muon"]}
    assert made.names == ("small adamw", "small muon", "wide adamw", "wide muon")
    assert dict(made["wide muon"].changes) == {"model.width": 512, "optim.name": "muon"}
    # Two arms that change nothing, for a test of A against A.
    assert arms({"a": {}, "b": {}}).names == ("a", "b")


def test_conditional_fields_apply_where_the_condition_holds():
    made = grid(TWO) * when({"optim.name": "muon"}, {"optim.momentum": [0.9, 0.95]})
    assert changes(made) == [
        {"model.attention": ("softmax",), "optim.name": "adamw"},
        {"model.attention": ("softmax",), "optim.name": "muon", "optim.momentum": 0.9},
        {"model.attention": ("softmax",), "optim.name": "muon", "optim.momentum": 0.95},
        {"model.attention": ("gla",), "optim.name": "adamw"},
        {"model.attention": ("gla",), "optim.name": "muon", "optim.momentum": 0.9},
        {"model.attention": ("gla",), "optim.name": "muon", "optim.momentum": 0.95},
    ]
    both = grid(TWO) * when({"optim.name": "muon", "model.attention": "gla"}, {"seed": [1, 2]})
    assert len(both) == 5
    some = grid({"optim.name": ["adamw", "muon", "lion"]}) * when({"optim.name": {"muon", "lion"}}, {"seed": [1, 2]})
    assert [arm.changes["optim.name"] for arm in some] == ["adamw", "muon", "muon", "lion", "lion"]
    with pytest.raises(ConfigError, match=r"no arm sets seed"):
        grid(TWO) * when({"seed": 1}, {"model.width": [8]})
    with pytest.raises(ConfigError, match=r"no arm has optim\.name = lion; the arms are softmax adamw"):
        grid(TWO) * when({"optim.name": "lion"}, {"model.width": [8]})


def test_a_grid_is_an_immutable_sequence():
    made = grid(TWO)
    assert len(made) == 4
    assert (
        made[1] == made["softmax muon"] == Arm("softmax muon", {"model.attention": ("softmax",), "optim.name": "muon"})
    )
    assert isinstance(made[1:3], Grid)
    assert made[1:3].names == ("softmax muon", "gla adamw")
    assert made[0] in made
    with pytest.raises(TypeError):
        made[0].changes["seed"] = 1
    with pytest.raises(ConfigError, match="no arm 'nope'"):
        made["nope"]
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert hash(again) == hash(made)
    assert "gla muon: model.attention = gla, optim.name = muon" in repr(made)


def test_values_are_what_the_field_holds():
    made = grid(
        {"optim.learning_rate": np.geomspace(1e-4, 1e-2, 3), "seed": np.arange(2), "optim.b2": [np.float32(0.5)]}
    )
    assert len(made) == 6
    assert all(type(arm.changes["seed"]) is int for arm in made)
    assert all(type(arm.changes["optim.b2"]) is float for arm in made)
    (arm,) = grid({"model": [ModelConfig(width=64)]})
    assert arm.changes["model.width"] == 64
    assert override(Experiment(), dict(arm.changes)).model == ModelConfig(width=64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: grid({"optim.learning_rat": [1]}),
            r"unknown field 'optim.learning_rat': did you mean optim.learning_rate",
        ),
        (lambda: grid({"model.layers": ["x"]}), r"model\.layers = 'x': must be of type int"),
        (lambda: grid({"optim.name": ["adamw", "moun"]}), r"optim\.name = 'moun': .* did you mean muon"),
        (lambda: grid({"model.layers": [2, 2]}), r"model\.layers has 2 twice"),
        (lambda: grid({"model.attention": ["gla", ("gla",)]}), r"model\.attention has gla twice"),
        (lambda: grid({"model.layers": []}), r"model\.layers has no values"),
        (
            lambda: arms({"deep": {"model.layer": 9}}),
            r"arm 'deep': unknown field 'model.layer': did you mean model.layers",
        ),
        (lambda: grid(TWO) * grid({"optim.name": ["lion"]}), r"optim\.name is set twice in one arm, to adamw and lion"),
        (
            lambda: configs(Experiment(), grid({"model.heads": [4, 3]})),
            r"arm 'heads=3' \(model\.heads = 3\): model\.width = 256",
        ),
        (
            lambda: configs(Experiment(), grid({"model.attention": ["gla", "sofmax"]})),
            r"arm 'sofmax' .*did you mean softmax",
        ),
    ],
)
def test_errors_name_the_arm_and_the_field(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_configs_are_the_base_with_the_changes():
    base = override(Experiment(), {"model.width": 32, "model.layers": 2})
    made = configs(base, TWO)
    assert list(made) == list(grid(TWO).names)
    for arm in grid(TWO):
        assert made[arm.name] == override(base, dict(arm.changes))


def test_a_window_that_nothing_fills_is_pointed_out():
    base = override(Experiment(), {"data.sequence_length": 64})
    with pytest.warns(UserWarning, match="arm 'window': window has a window of .* and sequences have 64"):
        configs(base, {"model.attention": ["softmax", "window"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configs(base, {"model.attention": ["window"], "model.mixer.window": [16]})


def test_the_room_offers_its_names():
    """In any order of imports: no module is called like a function."""
    from slm import study

    for name in study.__all__:
        assert getattr(study, name).__name__ == name
        assert callable(getattr(study, name))
    assert set(study.__all__) <= set(dir(study))
    with pytest.raises(AttributeError, match="no attribute 'gird'"):
        study.gird  # noqa: B018
