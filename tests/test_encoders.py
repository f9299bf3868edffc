"""Encoders and their heads: outputs equal transformers', round trips lose nothing, and misuse ends in one error."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle.weights import ORACLE, weights_of
from safetensors.numpy import load_file, save_file

import slm
from slm.config import MixerConfig, ModelConfig
from slm.errors import ConfigError, SlmError
from slm.interop.families import FAMILIES
from slm.interop.families.heads import SETTINGS
from slm.models.counts import cache_bytes, flops_per_token, parameter_counts, product_flops
from slm.models.language_model import LanguageModel
from slm.models.mixers.softmax import mean_keys_both_sides
from slm.models.transformer import Transformer
from slm.training import rules

ENCODERS = ORACLE / "encoders"
CASES = sorted(path.stem for path in ENCODERS.glob("*.npz"))
POOLED = sorted(name for name in CASES if "pooled" in np.load(ENCODERS / f"{name}.npz"))
HEADLESS = [name for name in CASES if name.endswith("_model")]


def record_of(name):
    return json.loads((ENCODERS / f"{name}.json").read_text())


def folder_of(name, where, dtype=np.float32, **changes):
    """The oracle's model as a Hugging Face folder, and what transformers computed from it."""
    record = record_of(name)
    where.mkdir(exist_ok=True)
    (where / "config.json").write_text(json.dumps(record["config"] | changes))
    tensors = {key: value.astype(dtype) for key, value in weights_of(record["shapes"]).items()}
    save_file(tensors, where / "model.safetensors")
    return where, np.load(ENCODERS / f"{name}.npz")


def answer(model, want):
    return np.asarray(slm.logits(model, want["tokens"], want["mask"], want.get("token_types")))


@pytest.mark.parametrize("name", [name for name in CASES if name not in HEADLESS])
def test_logits_are_those_of_transformers(name, tmp_path):
    folder, want = folder_of(name, tmp_path / name)
    found, logits = answer(slm.from_pretrained(folder), want), want["logits"]
    assert found.shape == logits.shape
    if found.ndim == 3:
        found, logits = found[want["mask"] > 0], logits[want["mask"] > 0]
    assert np.abs(logits).max() > 0.5
    np.testing.assert_allclose(found, logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", HEADLESS)
def test_a_model_without_a_head_gives_means_of_its_hidden_states(name, tmp_path):
    folder, want = folder_of(name, tmp_path / name)
    weights = want["mask"][..., None] / want["mask"].sum(1)[:, None, None]
    means = (want["hidden"] * weights).sum(1)
    unit = means / np.linalg.norm(means, axis=-1, keepdims=True)
    np.testing.assert_allclose(answer(slm.from_pretrained(folder), want), unit, atol=1e-6)
    first, _ = folder_of(name, tmp_path / "first", **{SETTINGS: {"pooling": "first", "unit_length": False}})
    np.testing.assert_allclose(answer(slm.from_pretrained(first), want), want["hidden"][:, 0], atol=1e-5)


@pytest.mark.parametrize("name", POOLED)
def test_the_pooler_answers_where_the_config_says_so(name, tmp_path):
    folder, want = folder_of(name, tmp_path / name, **{SETTINGS: {"pooling": "pooler", "unit_length": False}})
    model = slm.from_pretrained(folder)
    np.testing.assert_allclose(answer(model, want), want["pooled"], atol=1e-5)
    saved = load_file(slm.save_pretrained(model, tmp_path / "saved") / "model.safetensors")
    assert saved.keys() == record_of(name)["shapes"].keys()
    again = slm.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(answer(again, want), answer(model, want))


@pytest.mark.parametrize("name", CASES)
def test_saved_again_every_tensor_is_bit_equal(name, tmp_path):
    folder, _ = folder_of(name, tmp_path / name, np.float16)
    saved = slm.save_pretrained(slm.from_pretrained(folder), tmp_path / "saved")
    old, new = (load_file(path / "model.safetensors") for path in (folder, saved))
    # A pooler that nothing reads is dropped.
    assert {key for key in old if name not in POOLED or not key.startswith("pooler.")} == new.keys()
    for key in new:
        assert old[key].dtype == new[key].dtype
        np.testing.assert_array_equal(old[key], new[key])
    hf, before = (json.loads((path / "config.json").read_text()) for path in (saved, folder))
    assert (hf["model_type"], hf["architectures"]) == (before["model_type"], before["architectures"])


@pytest.mark.parametrize("name", CASES)
def test_a_model_made_here_is_written_as_the_class_of_its_head(name, tmp_path):
    """And says by its config.json alone all that a model of another house says."""
    folder, want = folder_of(name, tmp_path / name)
    model = slm.from_pretrained(folder)
    made = dataclasses.replace(model, origin=None)
    again = slm.from_pretrained(slm.save_pretrained(made, tmp_path / "saved"))
    assert again.origin.config["architectures"] == record_of(name)["config"]["architectures"]
    np.testing.assert_array_equal(answer(again, want), answer(model, want))
    # What transformers refuses to load: ids beyond the vocabulary (ModernBERT's defaults are).
    ids = [again.origin.config.get(f"{token}_token_id", 50283) for token in ("pad", "bos", "eos", "cls", "sep")]
    assert again.origin.config["model_type"] != "modernbert" or ids == [None] * 5
    assert set(load_file(tmp_path / "saved/model.safetensors")) <= set(record_of(name)["shapes"])


def test_every_family_has_every_head_among_the_cases():
    configs = [record_of(name)["config"] for name in CASES]
    heads = {(hf["model_type"], FAMILIES[hf["model_type"]].read(hf).head) for hf in configs}
    encoders = [name for name, family in FAMILIES.items() if family.architecture.endswith("MaskedLM")]
    assert heads == {(name, head) for name in encoders for head in ("masked_lm", "sequence", "token", "embedding")}


@pytest.mark.parametrize("name", ["albert", "bert", "mobilebert", "modernbert"])
def test_scan_and_remat_change_nothing(name, tmp_path):
    folder, want = folder_of(name, tmp_path / name)
    model = slm.from_pretrained(folder)
    cfg = dataclasses.replace(model.config.model, scan=False, remat="none")
    unrolled = dataclasses.replace(model, config=dataclasses.replace(model.config, model=cfg))
    np.testing.assert_allclose(answer(unrolled, want), answer(model, want), atol=1e-5)


@pytest.mark.parametrize("name", ["albert_token", "bert_model", "modernbert", "modernbert_mean"])
def test_a_row_says_the_same_alone_and_without_its_padding(name, tmp_path):
    """Not so MobileBERT, whose last trigram reads the padding, as it does in transformers."""
    folder, want = folder_of(name, tmp_path / name)
    model = slm.from_pretrained(folder)
    types = want["token_types"][1:, :9] if "token_types" in want else None
    alone = slm.logits(model, want["tokens"][1:, :9], token_type_ids=types)
    padded = answer(model, want)[1:]
    np.testing.assert_allclose(alone, padded[:, :9] if padded.ndim == 3 else padded, atol=1e-5)


def test_padding_may_stand_before_the_tokens(tmp_path):
    model = slm.from_pretrained(folder_of("bert_sequence", tmp_path / "bert")[0])
    tokens = np.arange(3, 12)[None]
    left = np.concatenate([np.zeros((1, 4), int), tokens], 1)
    mask = np.concatenate([np.zeros((1, 4), int), np.ones((1, 9), int)], 1)
    np.testing.assert_allclose(slm.logits(model, left, mask), slm.logits(model, tokens), atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_counts_and_rules_hold_for_encoders(name):
    hf = record_of(name)["config"]
    cfg = FAMILIES[hf["model_type"]].read(hf)
    params = jax.eval_shape(Transformer(cfg).init, jax.random.key(0))
    assert parameter_counts(cfg)["total"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    unread = sum(np.prod(shape) for key, shape in record_of(name)["shapes"].items() if key.startswith("pooler."))
    assert parameter_counts(cfg)["total"] == sum(map(np.prod, record_of(name)["shapes"].values())) - unread
    for rule_set in (rules.DECAY, rules.MUON, rules.SHARDING):
        assert len(jax.tree.leaves(rules.assign(rule_set, params))) >= len(jax.tree.leaves(params))
    assert cache_bytes(cfg, 2, 16) == 0


@pytest.mark.parametrize("name", ["albert", "albert_token", "bert", "mobilebert", "modernbert"])
def test_flops_are_those_of_the_products(name):
    hf = record_of(name)["config"]
    cfg = dataclasses.replace(FAMILIES[hf["model_type"]].read(hf), mixer=MixerConfig(qk_norm="none"), remat="none")
    cfg = dataclasses.replace(cfg, attention=("softmax",))
    transformer = Transformer(cfg)
    params = jax.eval_shape(transformer.init, jax.random.key(0))
    T = 12
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    counted = product_flops(lambda p, t: transformer.answer(p, transformer.hidden(p, t)[0]), params, tokens)
    assert flops_per_token(cfg, T)["forward"] * T == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize(("length", "window"), [(9, None), (9, 9), (9, 20), (9, 3), (9, 1), (1, 4)])
def test_keys_of_a_query_that_sees_both_sides(length, window):
    i, j = np.mgrid[:length, :length]
    seen = np.abs(i - j) < (window or length)
    assert mean_keys_both_sides(length, window) == pytest.approx(seen.sum() / length)


def test_tensors_with_names_of_old_and_a_second_task_are_read(tmp_path):
    folder, want = folder_of("bert", tmp_path / "bert")
    base = answer(slm.from_pretrained(folder), want)
    tensors = load_file(folder / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    old |= {"cls.seq_relationship.weight": np.zeros((2, 32), np.float32), "bert.embeddings.position_ids": np.arange(24)}
    old |= {"bert.pooler.dense.weight": np.zeros((32, 32), np.float32)}
    save_file(old, folder / "model.safetensors")
    np.testing.assert_array_equal(answer(slm.from_pretrained(folder), want), base)


def write_sentence_files(folder, *kinds, mode="pooling_mode_mean_tokens"):
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": ""} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False, mode: True}
    (folder / "1_Pooling/config.json").write_text(json.dumps(modes | {"word_embedding_dimension": 32}))


def test_a_folder_of_sentence_transformers_says_how_it_pools(tmp_path):
    folder, want = folder_of("bert_model", tmp_path / "bert")
    write_sentence_files(folder, "Transformer", "Pooling", mode="pooling_mode_cls_token")
    model = slm.from_pretrained(folder)
    np.testing.assert_allclose(answer(model, want), want["hidden"][:, 0], atol=1e-5)
    saved = slm.save_pretrained(model, tmp_path / "saved")
    assert (saved / "1_Pooling/config.json").read_text() == (folder / "1_Pooling/config.json").read_text()
    np.testing.assert_array_equal(answer(slm.from_pretrained(saved), want), answer(model, want))
    write_sentence_files(folder, "Transformer", "Pooling", "Normalize")
    unit = answer(slm.from_pretrained(folder), want)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, rtol=1e-6)
    write_sentence_files(folder, "Transformer", "Pooling", mode="pooling_mode_max_tokens")
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens is not supported"):
        slm.from_pretrained(folder)
    write_sentence_files(folder, "Transformer", "Pooling", "Dense")
    with pytest.raises(ConfigError, match="Transformer, Pooling, Dense is not supported"):
        slm.from_pretrained(folder)
    (folder / "modules.json").write_text("{")
    with pytest.raises(SlmError, match=r"modules.json is damaged"):
        slm.from_pretrained(folder)


def test_an_encoder_refuses_what_only_a_decoder_can_do(tmp_path):
    model = slm.from_pretrained(folder_of("bert", tmp_path / "bert")[0])
    with pytest.raises(ConfigError, match=r"model.head = masked_lm: .*generation.* need the next token"):
        slm.generate(model, "a")
    with pytest.raises(ConfigError, match=r"model.head = masked_lm: .*bits per byte need the next token"):
        slm.evaluate(model, "some text")
    with pytest.raises(ConfigError, match="an encoder has no decode cache"):
        model.transformer.init_cache(1, 8)
    bare = slm.from_pretrained(folder_of("distilbert", tmp_path / "distilbert")[0])
    with pytest.raises(ValueError, match="token_type_ids: this model has no token types"):
        slm.logits(bare, np.zeros((1, 4), int), token_type_ids=np.zeros((1, 4), int))
    with pytest.raises(ValueError, match="30 tokens exceed the 24 learned positions"):
        slm.logits(model, np.zeros((1, 30), int))


MISUSE = {
    "lm that sees the future": ({"head": "lm"}, "model.head = lm predicts the next token"),
    "masked lm that does not": ({"causal": True}, "model.head = masked_lm: set model.causal = false"),
    "first token of a decoder": ({"head": "sequence", "labels": 2, "causal": True}, "set model.pooling = mean"),
    "no labels": ({"head": "token"}, "model.head = token needs model.labels"),
    "labels of no use": ({"labels": 3}, "model.labels = 3: model.head = masked_lm has no labels"),
    "a mechanism of one side": ({"attention": ("softmax", "gla")}, "layers of gla see only the past; use softmax"),
    "a norm without its layer": ({"head_norm": True}, "model.head_norm needs"),
    "narrow embeddings without a layer": ({"embedding_width": 8}, "model.embedding_width = 8: a tied output"),
    "no norm to leave out": ({"residual": "post", "first_norm": False}, "model.first_norm = false"),
    "trigrams of a decoder": ({"head": "lm", "causal": True, "trigrams": True}, "model.trigrams = true reads the next"),
    "a bottleneck of another block": ({"bottleneck": 8}, "model.bottleneck = 8 needs model.residual = post"),
    "two feed-forwards of another block": ({"feedforwards": 2}, "only blocks with model.bottleneck have several"),
    "rows of their own for nothing": ({"wide_readout": True}, "model.embedding_width must be less than model.width"),
    "layers that cannot share": ({"shared_layers": True, "layers": 3, "attention": ("softmax", "window")},
                                 "model.shared_layers: model.layers = 3"),
}  # fmt: skip


@pytest.mark.parametrize("misuse", MISUSE)
def test_settings_that_contradict_each_other_are_refused(misuse):
    changes, message = MISUSE[misuse]
    good = ModelConfig(vocab_size=11, layers=2, width=16, heads=2, causal=False, head="masked_lm")
    Transformer(good)
    with pytest.raises(ConfigError, match=message):
        Transformer(dataclasses.replace(good, **changes))


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("bert", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering'] is not supported, only Bert"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ("bert", {"is_decoder": True}, "is_decoder"),
    ("bert", {"type_vocab_size": 0}, "type_vocab_size = 0"),
    ("albert", {"num_hidden_groups": 2}, "num_hidden_groups"),
    ("mobilebert", {"trigram_input": False}, "trigram_input"),
    ("distilbert_model", {SETTINGS: {"pooling": "pooler"}}, "pooling = 'pooler' is not supported"),
])  # fmt: skip
def test_configs_that_are_not_served_are_refused(name, changes, message, tmp_path):
    folder, _ = folder_of(name, tmp_path / name, **changes)
    with pytest.raises(ConfigError, match=message.replace("[", r"\[").replace("]", r"\]")):
        slm.from_pretrained(folder)


def test_shared_layers_learn_from_every_repeat():
    """The gradient of one shared set is the sum of those of separate layers with the same weights."""
    cfg = ModelConfig(vocab_size=13, layers=3, width=16, heads=2, causal=False, head="masked_lm", shared_layers=True)
    apart = dataclasses.replace(cfg, shared_layers=False)
    params = Transformer(cfg).init(jax.random.key(0))
    repeated = params | {"blocks": jax.tree.map(lambda a: jnp.repeat(a, 3, 0), params["blocks"])}
    tokens = jnp.arange(10)[None]

    def loss(cfg):
        transformer = Transformer(cfg)
        return lambda p: (transformer.logits(p, transformer.hidden(p, tokens)[0]) ** 2).sum()

    one, many = jax.grad(loss(cfg))(params), jax.grad(loss(apart))(repeated)
    summed = many | {"blocks": jax.tree.map(lambda a: a.sum(0, keepdims=True), many["blocks"])}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3), one, summed)
    cache = Transformer(dataclasses.replace(cfg, causal=True, head="lm")).init_cache(2, 8)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize("changes", [
    {"shared_layers": True}, {"first_norm": False, "attention": ("softmax", "window"), "mixer": MixerConfig(window=3)},
])  # fmt: skip
def test_a_decoder_with_shared_layers_or_an_unlike_first_layer_decodes_as_it_computes(changes):
    cfg = dataclasses.replace(ModelConfig(vocab_size=13, layers=4, width=16, heads=2, remat="none"), **changes)
    transformer = Transformer(cfg)
    params, tokens = transformer.init(jax.random.key(0)), jnp.arange(8)[None]
    whole, _ = transformer.hidden(params, tokens)
    first, cache = transformer.hidden(params, tokens[:, :5], cache=transformer.init_cache(1, 8))
    rest, _ = transformer.hidden(params, tokens[:, 5:], positions=jnp.arange(5, 8)[None], cache=cache)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, atol=1e-5)


def test_what_no_family_has_is_refused(tmp_path):
    cfg = ModelConfig(vocab_size=40, layers=2, width=32, heads=4, causal=False, head="masked_lm")
    made = LanguageModel(Transformer(cfg).init(jax.random.key(0)), slm.Experiment(model=cfg), None)
    with pytest.raises(ConfigError, match=r"no Hugging Face family .*head = masked_lm"):
        slm.save_pretrained(made, tmp_path / "saved")
