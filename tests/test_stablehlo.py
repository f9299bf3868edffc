"""StableHLO: what is exported runs without the model's code and gives the same numbers."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import slm
from slm.config import MixerConfig, ModelConfig
from slm.errors import CheckpointError, ConfigError
from slm.interop.stablehlo import Exported, save_stablehlo
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

TOKENS = (np.arange(24).reshape(2, 12) * 5 % 61).astype(np.int32)


@pytest.fixture(scope="module", params=[("window", "softmax"), ("gated_delta",)], ids=["attention", "recurrence"])
def exported(request, tmp_path_factory):
    mixer = MixerConfig(window=4) if "window" in request.param else MixerConfig()
    cfg = ModelConfig(vocab_size=61, layers=2, width=32, heads=2, attention=request.param, mixer=mixer)
    model = LanguageModel(Transformer(cfg).init(jax.random.key(0)), slm.Experiment(model=cfg), None)
    return model, save_stablehlo(model, tmp_path_factory.mktemp("exported"), batch=2, length=12)


def test_forward_and_decode_give_the_logits_of_the_model(exported):
    model, folder = exported
    want = slm.logits(model, TOKENS)
    again = Exported(folder)
    np.testing.assert_allclose(again.forward(TOKENS), want, atol=1e-5)
    cache = again.start()
    for at in range(TOKENS.shape[1]):
        logits, cache = again.decode(cache, TOKENS[:, at], np.full(2, at))
        np.testing.assert_allclose(logits, want[:, at], atol=2e-5)


def test_it_runs_where_slm_is_not(exported, tmp_path):
    model, folder = exported
    program = (
        "import json, sys, jax, numpy as np, safetensors.numpy as st\n"
        "assert 'slm' not in sys.modules\n"
        f"f = jax.export.deserialize(bytearray(open({str(folder / 'forward.stablehlo')!r}, 'rb').read()))\n"
        f"w = {{}}\nfor k, v in st.load_file({str(folder / 'weights.safetensors')!r}).items():\n"
        "    *above, leaf = k.split('/')\n    n = w\n"
        "    for p in above: n = n.setdefault(p, {})\n    n[leaf] = v\n"
        "t = (np.arange(24).reshape(2, 12) * 5 % 61).astype(np.int32)\n"
        f"np.save({str(tmp_path / 'out.npy')!r}, f.call(w, t))\n"
    )
    (tmp_path / "run.py").write_text("import jax.export\n" + program)
    subprocess.run([sys.executable, "-P", tmp_path / "run.py"], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), slm.logits(model, TOKENS), atol=1e-5)


def test_misuse_and_damage_end_in_one_clear_error(exported, tmp_path):
    model, folder = exported
    with pytest.raises(ConfigError, match="'metal' is none of"):
        save_stablehlo(model, tmp_path, platforms=("metal",))
    with pytest.raises(ConfigError, match="at least 1"):
        save_stablehlo(model, tmp_path, batch=0)
    for name in ("settings.json", "decode.stablehlo", "weights.safetensors"):
        broken = tmp_path / name
        broken.mkdir()
        for path in Path(folder).iterdir():
            (broken / path.name).write_bytes(path.read_bytes()[: 40 if path.name == name else None])
        (broken / name).write_bytes(b"{")
        with pytest.raises(CheckpointError, match="is no exported model"):
            Exported(broken)
