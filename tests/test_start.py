"""Runs that begin with another run's model, made smaller or other: planned from sizes, done once, resumed bit-equal."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_run import curve, stop_at, tiny, use_devices

import slm
from slm.config import ShrinkConfig, override
from slm.errors import ConfigError
from slm.models.paths import flat
from slm.models.quantized import is_quantized
from slm.training.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished run in it, `runs/whole`."""
    path = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        train(tiny(path, {"name": "whole", "model.layers": 3, "model.kv_heads": 1, "train.steps": 12}))
    return path


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    use_devices(monkeypatch, 1)


def begun(folder, name, **changes):
    """An experiment that begins with `whole`."""
    whole = folder / "runs" / "whole"
    fields = {"name": name, "train.steps": 6, "model.layers": 4, "model.width": 256, "model.heads": 4}
    fields |= {"model.init_from": str(whole), "optim.learning_rate": 1e-3}
    return override(tiny(folder), fields | {key.replace("__", "."): value for key, value in changes.items()})


def test_it_begins_where_the_other_ended(folder):
    whole = slm.load(folder / "runs" / "whole")
    run = train(begun(folder, "again", optim__learning_rate=0.0))
    assert jax.tree.all(jax.tree.map(np.array_equal, run.model.params, whole.params))
    assert run.model.config.model.layers == 3
    slm.save(slm.quantize(whole, "int8"), folder / "small")
    train(begun(folder, "floats", model__init_from=str(folder / "small")))
    assert not any(
        map(is_quantized, jax.tree.leaves(slm.load(folder / "runs" / "floats").params, is_leaf=is_quantized))
    )


@pytest.mark.parametrize("sizes", [40, (40, 24)], ids=["alike", "each its own"])
def test_a_shrunken_model_is_an_ordinary_one_and_resumes(folder, monkeypatch, sizes):
    how = {"shrink__mlp_width": sizes, "shrink__layers": 2, "train__log_every": 1, "checkpoint__every": 2}
    cfg = begun(folder, f"shrunk_{np.ndim(sizes)}", **how)
    uninterrupted = train(override(cfg, {"name": f"{cfg.name}_whole"}))
    stop_at(monkeypatch, 3)
    assert not train(cfg).finished
    stop_at(monkeypatch, None)
    # Once begun, the other model is not needed any more, but for its sizes.
    monkeypatch.setattr("slm.compress.start.starting_params", lambda *_: pytest.fail("shrunken twice"))
    run = train(cfg)
    assert curve(run.history) == curve(uninterrupted.history)
    stored = json.loads((run.dir / "config.json").read_text())["model"]
    m, leaves = run.model.config.model, flat(run.model.params)
    if sizes == 40:
        assert (stored["layers"], stored["mlp_width"], stored["width"]) == (2, 40, 32)
        assert leaves["blocks/0/mlp/up/kernel"].shape == (2, 32, 40)
        assert (m.layers, m.mlp_width) == (2, 40)
    else:
        assert (stored["layers"], tuple(stored["layer_mlp_widths"])) == (2, sizes) == (m.layers, m.layer_mlp_widths)
        assert [leaves[f"blocks/{i}/mlp/up/kernel"].shape for i in (0, 1)] == [(1, 32, 40), (1, 32, 24)]
        # Nothing of how it became small is needed to read it.
        plain = dataclasses.replace(run.model, config=dataclasses.replace(run.model.config, shrink=ShrinkConfig()))
        slm.save(plain, folder / f"saved_{cfg.name}")
        again = slm.load(folder / f"saved_{cfg.name}")
        tokens, text = np.arange(24)[None] % 257, str(folder / "text.txt")
        np.testing.assert_array_equal(slm.logits(again, tokens), slm.logits(run.model, tokens))
        assert slm.evaluate(again, text) == slm.evaluate(run.model, text)
        assert slm.generate(again, "1 times", max_new_tokens=4) == slm.generate(run.model, "1 times", max_new_tokens=4)
    whole = slm.load(folder / "runs" / "whole")
    assert run.history[0]["loss"] < 0.85 * np.log(257)  # it has not begun from nothing
    assert len(slm.generate(run.model, "1 times", max_new_tokens=4)) > 0
    assert sum(a.size for a in jax.tree.leaves(run.model.params)) < sum(a.size for a in jax.tree.leaves(whole.params))


def test_a_run_whose_gates_shut_ships_the_smaller_model_and_resumes(folder, monkeypatch):
    how = {"shrink__criterion": "l0", "shrink__mlp_width": 40, "shrink__layers": 2, "shrink__end_step": 4}
    cfg = begun(folder, "gates", **how, train__log_every=1, checkpoint__every=2)
    uninterrupted = train(override(cfg, {"name": "gates_whole"}))
    stop_at(monkeypatch, 2)
    assert not train(cfg).finished
    assert flat(slm.load(cfg.run_dir).params)["blocks/0/mlp/up/kernel"].shape == (2, 32, 40)  # whenever it is cut
    stop_at(monkeypatch, None)
    run = train(cfg)
    assert curve(run.history) == curve(uninterrupted.history)
    assert {"open_mlp", "open_layers"} <= run.history[0].keys()
    model, stored = run.model, json.loads((run.dir / "config.json").read_text())
    assert (stored["model"]["layers"], stored["shrink"]["criterion"]) == (3, "l0")  # what trained
    m = model.config.model
    assert (m.layers, m.mlp_width, model.config.shrink) == (2, 40, ShrinkConfig())  # what it made
    slm.save(model, folder / "gates_saved")
    np.testing.assert_array_equal(
        slm.logits(slm.load(folder / "gates_saved"), np.arange(9)[None]), slm.logits(model, np.arange(9)[None])
    )
    # And it is a model to begin with.
    again = train(begun(folder, "gates_again", model__init_from=str(run.dir), optim__learning_rate=0.0))
    assert jax.tree.all(jax.tree.map(np.array_equal, again.model.params, model.params))
    # What was scored in training is what is shipped.
    assert again.history[-1]["validation_loss"] == pytest.approx(run.history[-1]["validation_loss"], rel=1e-5)


def test_other_mixers(folder):
    cfg = begun(
        folder, "converted", convert__attention=("hedgehog", "softmax"), convert__transfer_steps=3,
        distill__teacher=str(folder / "runs" / "whole"), distill__alpha=0.5,
    )  # fmt: skip
    run = train(cfg)
    assert run.model.config.model.attention == ("hedgehog", "softmax")
    rows = [row for row in run.history if "transfer" in row]
    assert rows[0]["transfer"] > 0 == rows[-1]["transfer"]
    assert {"mixer/query_map/map", "mixer/key_map/map"} <= {
        n.split("/", 2)[2] for n in flat(run.model.params) if "_map" in n
    }
    window = begun(folder, "window", convert__attention=("window",), model__mixer__window=5)
    assert train(window).model.config.model.mixer.window == 5


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_pruned_once_and_kept(folder, criterion):
    how = {"prune__sparsity": 0.5, "prune__schedule": "one_shot", "prune__criterion": criterion}
    run = train(begun(folder, criterion, **how))
    for name, leaf in flat(run.model.params).items():
        if name.startswith("blocks") and name.endswith("kernel"):
            assert (np.asarray(leaf) == 0).mean() == pytest.approx(0.5, abs=0.01), name


@pytest.mark.parametrize(("changes", "message"), [
    ({"model__width": 64}, r"model\.width = 64 contradicts model\.init_from"),
    ({"shrink__mlp_width": 999}, r"shrink\.mlp_width = 999: layer 0 has 96"),
    ({"shrink__mlp_width": (40, 40)}, r"shrink\.mlp_width = \(40, 40\): give one number, or one for each of 3 layers"),
    ({"shrink__kv_heads": (1, 0, 1)}, r"shrink\.kv_heads = \(1, 0, 1\): must be at least 1"),
    ({"shrink__layers": 4}, r"shrink\.layers = 4: the model has 3"),
    ({"convert__attention": ("gal",)}, "no mechanism 'gal': did you mean gla"),
    ({"model__init_from": None, "prune__sparsity": 0.5, "prune__schedule": "one_shot", "prune__criterion": "wanda"},
     r"measures a trained model: set model\.init_from"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(folder, changes, message):
    cfg = begun(folder, "refused", **changes)
    with pytest.raises(ConfigError, match=message):
        train(cfg)
    assert not cfg.run_dir.exists()


def test_the_chain_to_a_phone(folder):
    """Shrink, distil, train in 4 bits, write GGUF: each link begins where the one before ended, and what comes out is a
    sixth of what went in."""
    whole = folder / "runs" / "whole"
    taught = {"distill__teacher": str(whole), "distill__alpha": 0.9}
    train(begun(folder, "link1", shrink__mlp_width=64, shrink__layers=2, **taught))
    first = str(folder / "runs" / "link1")
    how = {"quantize__scheme": "int4", "quantize__group_size": 32, "quantize__embedding": True}
    run = train(begun(folder, "link2", model__init_from=first, **how, **taught))
    assert all("divergence" in row for row in run.history)
    model = slm.load(run.dir)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    before = sum(leaf.nbytes for leaf in jax.tree.leaves(slm.load(whole).params))
    assert held < before / 5
    # What was scored in training is what is shipped.
    scores = slm.evaluate(model, str(folder / "text.txt"))
    assert scores["loss"] < 0.9 * np.log(257)
    slm.save_gguf(model, folder / "phone.gguf")
    again = slm.from_pretrained(folder / "phone.gguf")
    tokens = np.arange(24)[None] * 5 % 257
    want, found = (np.asarray(slm.logits(m, tokens)) for m in (model, again))
    np.testing.assert_allclose(found[..., :257], want[..., :257], atol=2e-4 * np.abs(want).max())
    assert (folder / "phone.gguf").stat().st_size < before / 3  # the tokenizer is the larger part
