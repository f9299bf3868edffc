"""Families of decoders: logits, hidden states and gradients equal transformers', and round trips lose nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.weights import ORACLE, weights_of
from safetensors.numpy import load_file, save_file

import slm
from slm.config import MixerConfig, ModelConfig, RopeConfig
from slm.errors import ConfigError, SlmError
from slm.interop.families import FAMILIES
from slm.interop.parameters import bind, tensors_of
from slm.interop.pretrained import describe
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer
from slm.training.loss import cross_entropy

CASES = sorted(path.stem for path in ORACLE.glob("*.npz"))


def folder_of(name, where, dtype=np.float32):
    """The oracle's model as a Hugging Face folder, and what transformers computed from it."""
    record = json.loads((ORACLE / f"{name}.json").read_text())
    where.mkdir(exist_ok=True)
    (where / "config.json").write_text(json.dumps(record["config"]))
    tensors = {key: value.astype(dtype) for key, value in weights_of(record["shapes"]).items()}
    save_file(tensors, where / "model.safetensors")
    return where, np.load(ORACLE / f"{name}.npz")


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    folder, want = folder_of(name, tmp_path / name)
    model = slm.from_pretrained(folder)
    real = want["mask"] > 0
    found = np.asarray(slm.logits(model, want["tokens"], attention_mask=want["mask"]))
    scale = np.abs(want["logits"]).max() / 2
    np.testing.assert_allclose(found[real], want["logits"][real], atol=1e-4 * max(scale, 1), rtol=0)
    tokens = jnp.asarray(want["tokens"])[:1]
    states = model.transformer.hidden_states(model.params, tokens)
    assert len(states) == model.config.model.layers + 1
    # Of OpenELM, only the last are known.
    for mine, theirs in zip(states[-len(want["hidden"]) :], want["hidden"][:, :1]):
        np.testing.assert_allclose(mine, theirs, atol=1e-4 * max(np.abs(theirs).max() / 2, 1), rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_saved_again_every_tensor_is_bit_equal(name, tmp_path):
    folder, _ = folder_of(name, tmp_path / name, np.float16)
    model = slm.from_pretrained(folder)
    saved = slm.save_pretrained(model, tmp_path / "saved")
    old, new = (load_file(path / "model.safetensors") for path in (folder, saved))
    assert old.keys() == new.keys()
    for key in old:
        assert old[key].dtype == new[key].dtype
        np.testing.assert_array_equal(old[key], new[key])
    hf = json.loads((saved / "config.json").read_text())
    assert hf["model_type"] == json.loads((folder / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_gradients_of_the_loss_are_those_of_transformers(name, tmp_path):
    folder, want = folder_of(name, tmp_path / name)
    model = slm.from_pretrained(folder)
    transformer, cfg = model.transformer, model.config.model
    x, y = want["tokens"][:, :-1], want["tokens"][:, 1:]

    def loss(params):
        hidden, _ = transformer.hidden(params, jnp.asarray(x))
        weights = jnp.full(y.shape, 1 / y.size, jnp.float32)
        readout = transformer.readout(params, hidden)
        return cross_entropy(*readout, jnp.asarray(y), weights, logit_softcap=cfg.logit_softcap)[0]

    value, gradients = jax.value_and_grad(loss)(model.params)
    np.testing.assert_allclose(value, want["loss"], rtol=1e-5)
    family, _ = describe(model)
    seen = set()
    for key, found in tensors_of(gradients, bind(cfg, family.names), np.float32):
        expected = want[f"d {key}"]
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max() + 1e-7, rtol=0, err_msg=key)
        seen.add(f"d {key}")
    assert seen == {key for key in want.files if key.startswith("d ")}


FRESH = {
    "qwen3": {},
    "llama": {"mixer": MixerConfig(qk_norm="none"), "tied": False},
    "gpt2": {"mixer": MixerConfig(qk_norm="none"), "position": "learned", "max_length": 32, "norm": "layernorm",
             "mlp": "gelu", "bias": ("qkv", "out", "mlp", "norm")},
    "gemma3_text": {"attention": ("window", "softmax"), "norm": "zero_centered_rmsnorm", "residual": "sandwich",
                    "mlp": "geglu", "mixer": MixerConfig(window=4, scale=0.25), "embedding_scale": 32**0.5,
                    "rope": RopeConfig(theta=1000.0, local_theta=100.0)},
}  # fmt: skip


@pytest.mark.parametrize("family", FRESH)
def test_a_model_made_here_is_saved_as_the_family_that_can_express_it(family, tmp_path):
    cfg = ModelConfig(vocab_size=40, layers=4, width=32, heads=4, kv_heads=None if family == "gpt2" else 2)
    cfg = dataclasses.replace(cfg, **FRESH[family])
    params = Transformer(cfg).init(jax.random.key(0))
    made = LanguageModel(params, slm.Experiment(model=cfg), None)
    folder = slm.save_pretrained(made, tmp_path / "saved", shard_bytes=20_000)
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    again = slm.from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, params, again.params)
    tokens = np.arange(12)[None] % 40
    np.testing.assert_allclose(slm.logits(made, tokens), slm.logits(again, tokens), atol=1e-5)


def test_what_no_family_has_is_refused(tmp_path):
    cfg = ModelConfig(vocab_size=40, layers=2, width=32, heads=4, attention=("gla",))
    made = LanguageModel(Transformer(cfg).init(jax.random.key(0)), slm.Experiment(model=cfg), None)
    with pytest.raises(ConfigError, match="no Hugging Face family has this model's architecture"):
        slm.save_pretrained(made, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(("name", "family"), [("ministral3", "ministral3"), ("phi3_long", "phi3"), ("phi", "phi")])
def test_no_family_is_chosen_that_would_leave_a_setting_out(name, family, tmp_path):
    model = slm.from_pretrained(folder_of(name, tmp_path / name)[0])
    found, _ = describe(dataclasses.replace(model, origin=None))
    assert found.model_type == family


def test_every_family_has_a_case():
    cases = {json.loads((ORACLE / f"{name}.json").read_text())["config"]["model_type"] for name in CASES}
    assert cases == {name for name, family in FAMILIES.items() if not family.architecture.endswith("MaskedLM")}


def test_the_old_layout_of_rotary_settings_reads_like_the_new_one(tmp_path):
    record = json.loads((ORACLE / "llama.json").read_text())["config"]
    new = FAMILIES["llama"].read(record)
    settings = record.pop("rope_parameters")
    record["rope_theta"] = settings.pop("rope_theta")
    record["rope_scaling"] = {"type": settings.pop("rope_type")} | settings
    assert FAMILIES["llama"].read(record) == new
    assert new.rope.scaling == "llama3"


def break_config(folder, **changes):
    hf = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(hf | changes))


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def change_tensor(folder, change):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def rewrite(folder, change):
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def with_header(header):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "cannot read .*config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds a list"),
    "unknown family": (lambda f: break_config(f, model_type="llma"), "did you mean llama"),
    "no width": (lambda f: break_config(f, hidden_size=None), "no hidden_size"),
    "a word for a number": (lambda f: break_config(f, hidden_size="wide"), "model.width = 'wide': must be of type int"),
    "absurd depth": (lambda f: break_config(f, num_hidden_layers=10**9), "1000000000 layers"),
    "absurd width": (lambda f: break_config(f, hidden_size=10**12), "config asks for|model.width"),
    "another activation": (lambda f: break_config(f, hidden_act="mish"), "no activation 'mish'"),
    "another rope": (lambda f: break_config(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1.0}), "dynamic"),
    "a tensor less": (drop_tensor, "lack 'model.layers.1.mlp.up_proj.weight'"),
    "a layer less in the config": (
        lambda f: break_config(f, num_hidden_layers=2),
        "hold 'model.layers.2.* no use for that",
    ),
    "a wrong shape": (lambda f: change_tensor(f, lambda x: x[:-1]), "up_proj.weight' has shape"),
    "a transposed tensor": (lambda f: change_tensor(f, lambda x: np.ascontiguousarray(x.T)), "up_proj.weight' gives"),
    "NaN": (lambda f: change_tensor(f, lambda x: x * np.nan), "up_proj.weight' holds numbers that are not finite"),
    "an infinity": (lambda f: change_tensor(f, lambda x: x + np.inf), "not finite"),
    "truncated": (lambda f: rewrite(f, lambda b: b[: len(b) // 2]), "damaged or no safetensors file"),
    "empty": (lambda f: rewrite(f, lambda b: b""), "damaged or no safetensors file"),
    "a huge header": (
        lambda f: rewrite(f, lambda b: (2**60).to_bytes(8, "little") + b[8:]),
        "damaged or no safetensors",
    ),
    "wrong offsets": (
        lambda f: rewrite(f, lambda b: with_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 640]}})),
        "damaged or no safetensors",
    ),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights can run code"),
    "an index to elsewhere": (
        lambda f: write_index(f, {"a": "../secret.safetensors"}),
        "only .safetensors files of the",
    ),
    "an index to an absolute path": (lambda f: write_index(f, {"a": "/etc/passwd"}), "only .safetensors files of the"),
    "an index to a file that is not there": (lambda f: write_index(f, {"a": "b.safetensors"}), "lacks b.safetensors"),
    "an index of a tensor that is not there": (lambda f: write_index(f, {"a": "model.safetensors"}), "promises 'a'"),
    "an index without a map": (lambda f: write_index(f, {}), "no weight_map"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_hostile_folder_ends_in_one_clear_error(damage, tmp_path):
    folder, _ = folder_of("llama", tmp_path / "llama")
    harm, message = DAMAGE[damage]
    harm(folder)
    with pytest.raises(SlmError, match=message):
        slm.from_pretrained(folder)


def test_a_folder_that_is_not_there():
    with pytest.raises(SlmError, match="no folder"):
        slm.from_pretrained("./nowhere")
