"""The experiment: strict fields, round trip, errors that name the field and the fix."""

import dataclasses

import pytest

import slm
from slm.config import check, field_paths, flatten, from_json, load_config, override, to_json
from slm.errors import ConfigError


def test_json_round_trip_keeps_every_field():
    changes = {"model.attention": ("window", "softmax"), "optim.clip_norm": None, "data.weights": (0.5, 1.5),
               "train.z_loss": 1e-4, "log.profile": (3, 5), "seed": 7,
               "shrink.mlp_width": (8, 16), "shrink.kv_heads": 2}  # fmt: skip
    cfg = override(slm.Experiment(), changes)
    assert from_json(to_json(cfg)) == cfg
    assert flatten(cfg) | changes == flatten(cfg)
    assert set(flatten(cfg)) == set(field_paths())


def test_values_are_converted_only_where_nothing_is_lost():
    cfg = override(slm.Experiment(), {"optim.learning_rate": 1, "model.attention": "window", "data.weights": [1, 2]})
    assert cfg.optim.learning_rate == 1.0
    assert isinstance(cfg.optim.learning_rate, float)
    assert cfg.model.attention == ("window",)
    assert cfg.data.weights == (1.0, 2.0)
    cfg = override(cfg, {"shrink.mlp_width": [8, 16], "shrink.kv_heads": 2})
    assert (cfg.shrink.mlp_width, cfg.shrink.kv_heads) == ((8, 16), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.learning_rat": 1.0}, "optim.learning_rate"),
        ({"learning_rate": 1.0}, "optim.learning_rate"),
        ({"optim.learning-rat": 1.0}, "optim.learning_rate"),
        ({"optim.learning_rate": "fast"}, "must be of type float"),
        ({"train.steps": 1.5}, "must be of type int"),
        ({"train.steps": True}, "must be of type int"),
        ({"shrink.mlp_width": "wide"}, r"shrink.mlp_width = 'wide': must be of type int"),
        ({"shrink.mlp_width": (8, 1.5)}, r"shrink.mlp_width\[1\] = 1.5: must be of type int"),
        ({"model.mlp": "swiglo"}, "did you mean swiglu"),
        ({"model": 3}, "is a section"),
        ({"model.width.x": 3}, "unknown field"),
    ],
)
def test_override_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        override(slm.Experiment(), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 30}, "model.heads"),
        ({"model.kv_heads": 3}, "model.kv_heads"),
        ({"model.heads": 4, "model.width": 20}, "even head size"),
        ({"train.accumulation": 3}, "train.accumulation"),
        ({"train.steps": 0}, "train.steps"),
        ({"data.weights": (1.0, 2.0)}, "data.weights"),
        ({"data.weights": (-1.0,)}, "data.weights"),
        ({"data.validation_fraction": 1.0}, "data.validation_fraction"),
        ({"model.logit_softcap": 0.0}, "model.logit_softcap"),
        ({"optim.b1": 1.5}, "optim.b1"),
        ({"optim.ema_decay": 2.0}, "optim.ema_decay"),
        ({"optim.ema_decay": 0.9, "optim.name": "schedule_free_adamw"}, "averages weights itself"),
        ({"model.position": "learned", "model.max_length": 8}, "model.max_length"),
        ({"model.mixer.implementation": "cudnn"}, "cudnn"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, "at most one"),
        ({"log.profile": (9, 3)}, "log.profile"),
        ({"seed": 2**40}, "seed"),
        ({"name": "a/b"}, "plain folder name"),
    ],
)
def test_check_refuses_what_does_not_fit_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        check(override(slm.Experiment(), changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import slm\nconfig = slm.Experiment(model=slm.ModelConfig(widht=3))", "model.width"),
        ("import slm\nconfig = slm.Experiment(model=dict(layers=3))", "must be an slm.ModelConfig"),
        ("import slm\nconfig = slm.Experiment(seed='x')", "seed"),
        ("import slm\nconfig = slm.ModelConfg()", "ModelConfg"),
        ("1 // 0", "ZeroDivisionError"),
        ("def", "SyntaxError"),
        ("config = 3", "must assign"),
    ],
)
def test_a_bad_config_file_is_one_error(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_missing_or_broken_file_is_one_error(tmp_path):
    (tmp_path / "quickstart.py").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean .*quickstart\.py"):
        load_config(tmp_path / "quikstart.py")
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match="not"):
            load_config(tmp_path / "config.json")


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        slm.Experiment().seed = 3
