"""model.init_from: training goes on from published weights, and what the model brought along goes on with it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import tiny, use_devices

import slm
from slm.config import MixerConfig
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer
from slm.training.dry_run import dry_run


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a tiny Llama with a chat template."""
    cfg = dataclasses.replace(
        tiny(tmp_path).model, vocab_size=288, kv_heads=1, heads=2, tied=False, mixer=MixerConfig(qk_norm="none")
    )
    tokenizer = build_tokenizer("bytes", lambda: iter(()))
    made = LanguageModel(Transformer(cfg).init(jax.random.key(7)), slm.Experiment(model=cfg), tokenizer)
    where = slm.save_pretrained(made, tmp_path / "published")
    (where / "chat_template.jinja").write_text("{{ messages }}")
    return where


# A model from elsewhere: nothing of its architecture is said in the config.
FROM = {"model.layers": 4, "model.width": 256, "model.heads": 4}


def test_the_first_weights_are_those_of_the_folder_and_nothing_is_lost_on_the_way_back(folder, tmp_path, monkeypatch):
    use_devices(monkeypatch, 2)
    changes = FROM | {"model.init_from": str(folder), "optim.learning_rate": 0.0, "train.steps": 2, "mesh.fsdp": 2}
    cfg = tiny(tmp_path, changes)
    run = slm.train(cfg)
    published = slm.from_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, run.model.params, published.params)
    assert run.model.origin.text("chat_template.jinja") == "{{ messages }}"
    saved = slm.save_pretrained(run.model, tmp_path / "back")
    assert json.loads((saved / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    old, new = (load_file(where / "model.safetensors") for where in (folder, saved))
    jax.tree.map(np.testing.assert_array_equal, old, new)
    assert slm.train(cfg).finished  # nothing to do, and no contradiction with the stored config


def test_it_trains(folder, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    run = slm.train(tiny(tmp_path, FROM | {"model.init_from": str(folder), "model.remat": "full"}))
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert run.model.config.model.remat == "full"
    assert run.model.config.data.tokenizer == str(folder / "tokenizer.json")


def test_it_starts_from_a_gguf_file(folder, tmp_path, monkeypatch):
    use_devices(monkeypatch, 1)
    published = slm.from_pretrained(folder)
    file = slm.save_gguf(published, tmp_path / "model.gguf", "F32")
    changes = FROM | {"model.init_from": str(file), "optim.learning_rate": 0.0, "train.steps": 2}
    run = slm.train(tiny(tmp_path, changes))
    jax.tree.map(np.testing.assert_array_equal, run.model.params, published.params)
    for text in ("3 times 3 is 9.", "a"):
        assert list(run.model.tokenizer.encode(text)) == list(published.tokenizer.encode(text))
    assert slm.save_gguf(run.model, tmp_path / "again.gguf", "F32").stat().st_size == file.stat().st_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 64}, "model.width = 64 contradicts model.init_from: .* has 32; leave it out"),
        ({"model.mixer.window": 8}, "model.mixer.window = 8 contradicts"),
        ({"model.init_from": "nowhere/"}, "no folder"),
        ({"model.init_from": "model.gguf"}, "no file model.gguf"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(changes, message, folder, tmp_path):
    cfg = tiny(tmp_path, FROM | {"model.init_from": str(folder)} | changes)
    with pytest.raises(slm.SlmError, match=message):
        slm.train(cfg)
    assert not (tmp_path / "runs").exists()


def test_a_folder_without_tokenizer_asks_for_one(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"name one in data\.tokenizer"):
        slm.train(tiny(tmp_path, FROM | {"model.init_from": str(folder)}))


def test_a_dry_run_plans_the_model_of_the_folder(folder, tmp_path):
    cfg = tiny(tmp_path, FROM | {"model.init_from": str(folder), "train.batch_size": 8})
    published = slm.from_pretrained(folder)
    assert dry_run(cfg, 1).parameter_count == sum(a.size for a in jax.tree.leaves(published.params))
