"""Models of slm.save: bit for bit what was saved, and nothing that is damaged."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_gguf import made

import slm
from slm.data.tokenizers import build_tokenizer
from slm.errors import CheckpointError
from slm.evaluation.opening import open_model
from slm.interop.families import FAMILIES
from slm.models.language_model import Origin
from slm.models.quantized import stored_bytes

TOKENS = np.arange(40).reshape(2, 20) * 7 % 250
FORMS = {
    "float": None,
    "int8": {"scheme": "int8"},
    "int4": {"scheme": "int4", "group_size": 16, "symmetric": False, "embedding": True},
    "int2": {"scheme": "int2", "embedding": False},
    "nf4": {"scheme": "nf4", "group_size": 32, "embedding": True},
    "ternary": {"scheme": "ternary", "embedding": False, "activations": "int8"},
    "fp8": {"scheme": "fp8", "embedding": False, "skip": (".*/mlp/.*",)},
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("bytes", lambda: iter(()))


def formed(name, tokenizer, model="llama"):
    model = made(model, tokenizer)
    return model if FORMS[name] is None else slm.quantize(model, **FORMS[name])


@pytest.mark.parametrize("name", FORMS)
def test_what_is_loaded_is_what_was_saved(name, tokenizer, tmp_path):
    model = formed(name, tokenizer)
    folder = slm.save(model, tmp_path / "there")
    assert slm.save(model, folder) == folder  # again, over the first
    for again in (slm.load(folder), open_model(folder)):
        assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
        for found, want in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params)):
            assert found.dtype == want.dtype
            np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(want, np.float32))
        assert again.config == model.config
        np.testing.assert_array_equal(slm.logits(again, TOKENS), slm.logits(model, TOKENS))
    how = {"max_new_tokens": 5, "temperature": 0.0}
    assert slm.generate(again, "the cat", **how) == slm.generate(model, "the cat", **how)
    size = (folder / "model.safetensors").stat().st_size
    assert stored_bytes(model.params) < size < stored_bytes(model.params) + 8000


def test_models_of_other_houses_keep_what_they_brought(tokenizer, tmp_path):
    hf = FAMILIES["llama"].write(made("llama", tokenizer).config.model)
    origin = Origin("llama", hf, "float32", {}, {"chat_template.jinja": "{{ messages[0].content }}"})
    model = dataclasses.replace(formed("int8", tokenizer), origin=origin, dtype=jnp.bfloat16)
    again = slm.load(slm.save(model, tmp_path / "there"))
    assert again.origin.text("chat_template.jinja") == "{{ messages[0].content }}"
    assert again.origin.config == hf
    assert jnp.dtype(again.dtype) == jnp.bfloat16
    assert slm.load(slm.save(again, tmp_path / "again")).origin.config == hf


def test_no_folder_of_something_else_is_written_to(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something else"):
        slm.save(formed("float", tokenizer), tmp_path)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def edited(change):
    def damage(folder):
        layout = json.loads((folder / "layout.json").read_text())
        change(layout)
        (folder / "layout.json").write_text(json.dumps(layout))

    return damage


def tensors(change):
    def damage(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return damage


QUERY = "blocks/0/mixer/query/kernel"
DAMAGES = {
    "cut": (cut, "model.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be used"),
    "version": (edited(lambda layout: layout.update(version=9)), "version 9"),
    "grid": (edited(lambda layout: layout["quantized"][QUERY].update(scheme="int5")), "scheme 'int5'"),
    "fields": (edited(lambda layout: layout["quantized"][QUERY].pop("inputs")), "layout.json cannot be used"),
    "groups": (edited(lambda layout: layout["quantized"][QUERY].update(group_size=24)), "groups of 24 among 64"),
    "other groups": (edited(lambda layout: layout["quantized"][QUERY].update(group_size=32)), "the layout asks for"),
    "stranger": (edited(lambda layout: layout["quantized"].update({"x": layout["quantized"][QUERY]})), "names 'x'"),
    "half": (edited(lambda layout: layout["quantized"].pop(QUERY)), "tensor 'blocks/0/mixer/query/kernel"),
    "missing": (tensors(lambda found: found.pop("final_norm/scale")), "lacks the tensor 'final_norm/scale'"),
    "more": (tensors(lambda found: found.update(x=np.zeros(3))), "holds, without a place in .*'x'"),
    "type": (tensors(lambda found: found.update({f"{QUERY}/values": np.zeros((2, 32, 64), np.int32)})), "asks"),
    "not finite": (tensors(lambda found: found[f"{QUERY}/scale"].fill(np.nan)), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused(name, tokenizer, tmp_path):
    damage, message = DAMAGES[name]
    folder = slm.save(formed("int4", tokenizer), tmp_path / "there")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        slm.load(folder)


def test_checkpoints_are_of_runs(tokenizer, tmp_path):
    folder = slm.save(formed("float", tokenizer), tmp_path / "there")
    with pytest.raises(CheckpointError, match="is a saved model and has no checkpoint best"):
        slm.load(folder, "best")
