"""ONNX: what is exported runs in ONNX Runtime and gives transformers' numbers, and those of every mechanism."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
import test_encoders
import test_pretrained

import slm
from slm.config import MixerConfig, ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.onnx.export import save_onnx
from slm.interop.onnx.runner import Exported
from slm.models.language_model import LanguageModel
from slm.models.mixers import MIXERS
from slm.models.transformer import Transformer

T = 20
TOKENS = (np.arange(2 * T).reshape(2, T) * 5 % 61).astype(np.int32)
MODEL = ModelConfig(vocab_size=61, layers=2, width=32, heads=2)
SWITCHES = MixerConfig(
    window=5, block_size=8, top_k=3, chunk=8, feature_dim=8, latent_dim=8, query_latent_dim=8, rope_dim=4, rank=4,
    index_heads=2, index_dim=4,
)  # fmt: skip
GROWN = ("phi3_long",)
"""LongRoPE: the frequencies depend on the length of the call, so a step at a time is not one forward pass."""
ENCODERS = ("bert", "bert_sequence", "distilbert_token", "albert", "modernbert", "mobilebert_sequence")


def made(**changes):
    """A model whose parameters cost no compilation."""
    cfg, draw = dataclasses.replace(MODEL, **changes), np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: Transformer(cfg).init(jax.random.key(0)))

    def drawn(path, a):
        return jnp.asarray(0.2 * draw.standard_normal(a.shape) + (path[-1].key == "scale"), a.dtype)

    params = jax.tree.map_with_path(drawn, shapes)
    return LanguageModel(params, slm.Experiment(model=cfg), None)


def stepwise(exported, tokens):
    """Logits (B, T, V) of one decode step a token."""
    cache, found = exported.start(), []
    for at in range(tokens.shape[1]):
        logits, cache = exported.decode(cache, tokens[:, at], np.full(len(tokens), at))
        found.append(logits)
    return np.stack(found, 1)


def check_files(folder):
    for path in folder.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model = made(attention=("window", "softmax"), mixer=MixerConfig(window=5), layers=4)
    return model, save_onnx(model, tmp_path_factory.mktemp("small"), batch=2, length=T)


@pytest.mark.parametrize("name", test_pretrained.CASES)
def test_decoders_give_the_logits_of_transformers(name, tmp_path):
    folder, want = test_pretrained.folder_of(name, tmp_path / name)
    rows = want["mask"].all(1)
    tokens, logits = want["tokens"][rows], want["logits"][rows]
    assert len(tokens)
    saved = save_onnx(slm.from_pretrained(folder), tmp_path / "onnx", *tokens.shape)
    check_files(saved)
    exported, scale = Exported(saved), max(np.abs(logits).max() / 2, 1)
    np.testing.assert_allclose(exported.forward(tokens), logits, atol=1e-4 * scale, rtol=0)
    if name not in GROWN:
        np.testing.assert_allclose(stepwise(exported, tokens), logits, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_give_the_answers_of_transformers(name, tmp_path):
    folder, want = test_encoders.folder_of(name, tmp_path / name)
    saved = save_onnx(slm.from_pretrained(folder), tmp_path / "onnx", *want["tokens"].shape)
    check_files(saved)
    found = Exported(saved).forward(want["tokens"], want["mask"], want.get("token_types"))
    real = want["mask"] > 0
    assert not real.all()
    found, logits = (x[real] if x.ndim == 3 else x for x in (found, want["logits"]))
    np.testing.assert_allclose(found, logits, atol=1e-5, rtol=0)
    assert {path.name for path in saved.iterdir()} == {"forward.onnx", "settings.json", "weights.safetensors"}


@pytest.mark.parametrize("name", MIXERS)
def test_every_mechanism_forward_and_step_by_step(name, tmp_path):
    has = MIXERS[name].defaults
    values = {key: value for key, value in vars(SWITCHES).items() if getattr(has, key) is not None}
    model = made(attention=(name,), layers=1, mixer=MixerConfig(**values))
    want = jax.jit(lambda tokens: slm.logits(model, tokens))(TOKENS)
    assert np.abs(want).max() > 1
    exported = Exported(save_onnx(model, tmp_path, batch=2, length=T))
    np.testing.assert_allclose(exported.forward(TOKENS), want, atol=1e-4, rtol=0)
    np.testing.assert_allclose(stepwise(exported, TOKENS), want, atol=1e-4, rtol=0)


def test_it_writes_what_the_model_finds_likeliest(small):
    model, folder = small
    text, logits = TOKENS.copy(), jax.jit(lambda tokens: slm.logits(model, tokens))
    for at in range(6, T):
        text[:, at] = np.argmax(logits(text)[:, at - 1], -1)
    assert (text[:, 6:] != TOKENS[:, 6:]).any()
    exported = Exported(folder)
    np.testing.assert_array_equal(exported.generate(TOKENS[:, :6], T - 6), text[:, 6:])
    assert exported.generate(TOKENS, 1).shape == (2, 1)


def test_graphs_name_the_parameters_and_share_one_copy(small):
    model, folder = small
    paths = {path for path, _ in paths_of(model.params)}
    for name in ("forward", "decode"):
        proto = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        about = {one.key: one.value for one in proto.metadata_props}
        assert about["slm.function"] == name
        assert ModelConfig(**json.loads(about["slm.model"])).layers == 4
        kept = [one for one in proto.graph.initializer if one.external_data]
        assert {one.external_data[0].value for one in kept} == {"weights.safetensors"}
        read = set()
        for one in kept:
            stem = one.name.split(":")[0]
            read.add(stem if stem in paths else stem.rpartition("/")[0])
        assert read == paths
    assert "blocks/1/mixer/query/kernel/1" in {one.name for one in kept}
    assert sum(path.stat().st_size for path in folder.glob("*.onnx")) < 300_000


def paths_of(params):
    leaves = jax.tree.leaves_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def test_it_runs_where_neither_slm_nor_jax_is(small, tmp_path):
    model, folder = small
    np.save(tmp_path / "in.npy", TOKENS)
    program = (
        "import sys, numpy, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(folder / 'forward.onnx')!r})\n"
        "(out,) = session.run(None, {'tokens': numpy.load('in.npy')})\n"
        "numpy.save('out.npy', out)\n"
        "assert not {'slm', 'jax'} & set(sys.modules)\n"
    )
    (tmp_path / "run.py").write_text(program)
    subprocess.run([sys.executable, "-P", "run.py"], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), slm.logits(model, TOKENS), atol=1e-5)


def test_weights_and_caches_of_half_precision(tmp_path):
    model = made(attention=("softmax",))
    half = dataclasses.replace(
        model, params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params), dtype=jnp.bfloat16
    )
    exact = dataclasses.replace(model, params=jax.tree.map(lambda a: a.astype(jnp.float32), half.params))
    exported = Exported(save_onnx(half, tmp_path, 2, T, cache_dtype=jnp.float16))
    want = slm.logits(exact, TOKENS)
    np.testing.assert_allclose(exported.forward(TOKENS), want, atol=2e-5)
    found = stepwise(exported, TOKENS)
    assert {array.dtype for name, array in exported.start().items() if "key" in name} == {np.dtype(np.float16)}
    error = np.abs(found - want).max() / np.abs(want).max()
    assert 1e-5 < error < 5e-3


def test_misuse_and_damage_end_in_one_clear_error(small, tmp_path):
    model, folder = small
    for sizes, message in (((0, 4), "at least 1"), ((1, 0), "at least 1")):
        with pytest.raises(ConfigError, match=message):
            save_onnx(model, tmp_path / "none", *sizes)
    with pytest.raises(ConfigError, match="float32 or float16"):
        save_onnx(model, tmp_path / "none", cache_dtype=jnp.int8)
    with pytest.raises(ConfigError, match="has 8 learned positions"):
        save_onnx(made(position="learned", max_length=8), tmp_path / "none", 1, 9)
    assert not (tmp_path / "none").exists()
    exported = Exported(folder)
    with pytest.raises(ConfigError, match=r"tokens has shape \(2, 3\): .* exported for \(2, 20\)"):
        exported.forward(TOKENS[:, :3])
    with pytest.raises(ConfigError, match="the exported cache holds 20"):
        exported.generate(TOKENS, 2)
    with pytest.raises(ConfigError, match=r"decode takes .*, not tokens"):
        exported.run("decode", {"tokens": TOKENS})
    with pytest.raises(ConfigError, match="no backward was exported"):
        exported.run("backward", {})


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("settings.json", lambda data: b"{"),
        ("settings.json", lambda data: data.replace(b'"positions"', b'"places"')),
        ("settings.json", lambda data: b"[]"),
        ("decode.onnx", lambda data: data[: len(data) // 2]),
        ("decode.onnx", lambda data: b""),
        ("forward.onnx", lambda data: data.replace(b"MatMul", b"MutMal")),
        ("forward.onnx", lambda data: data.replace(b"weights.safetensors", b"../ights.safetensors")),
        ("weights.safetensors", lambda data: data[: len(data) // 2]),
        ("weights.safetensors", None),
    ],
)
def test_a_damaged_folder_is_told_in_one_error(name, damage, small, tmp_path):
    for path in small[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Exported(tmp_path)
    if damage is None:
        (tmp_path / name).unlink()
    else:
        before = (tmp_path / name).read_bytes()
        assert damage(before) != before
        (tmp_path / name).write_bytes(damage(before))
    with pytest.raises(CheckpointError, match="is no exported model"):
        Exported(tmp_path)
