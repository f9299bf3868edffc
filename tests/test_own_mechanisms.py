"""Mechanisms that a program adds to MIXERS, as a notebook does: none is mistaken for an earlier one of its name."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import tiny

from slm.config import ModelConfig, override
from slm.errors import ConfigError
from slm.models.mixers import MIXERS, Row
from slm.models.transformer import Transformer
from slm.study.cells import make_cells
from slm.study.fingerprints import fingerprint
from slm.study.running import run_cells

CELL = """
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
from slm.attention import decay_attention
from slm.config import MixerConfig
from slm.models.mixers import Mixer, Row

RATE = 0.5
SET = SimpleNamespace(scale=1.0, kinds={"one"})
START = nn.initializers.constant(1.0)

def helper(x):
    return jnp.tanh(x) * SET.scale

@jax.jit
def compiled(x):
    return helper(x)

class Base(Mixer):
    def power(self):
        return 1

class Mine(Base):
    size: int = 8

    @nn.compact
    def __call__(self, x, context, cache=None):
        # a comment
        gain = self.param("scale", START, (x.shape[-1],))
        shift = lambda y: y + RATE
        return shift(compiled(x) * gain) * self.power(), cache

    @classmethod
    def flops_per_token(cls, cfg, length):
        return 0.0

row = Row(Mine, MixerConfig(gate="none"))
"""
EDITS = {
    "a constant": ("RATE = 0.5", "RATE = 0.25"),
    "what an object holds": ("scale=1.0", "scale=2.0"),
    "a set": ('{"one"}', '{"two"}'),
    "a helper": ("jnp.tanh(x)", "jnp.sin(x)"),
    "a literal in the body": ("* self.power(), cache", "* self.power() * 2, cache"),
    "what the body calls": ("return shift(compiled(x)", "return shift(helper(x)"),
    "a base": ("return 1", "return 3"),
    "a field": ("size: int = 8", "size: int = 16"),
    "a class method": ("return 0.0", "return 1.0"),
    "a closure": ("constant(1.0)", "constant(2.0)"),
    "a switch": ('gate="none"', 'gate="silu"'),
}


def run_cell(source=CELL) -> Row:
    """Runs the cell as a notebook would: no file, in a module called __main__."""
    names = {"__name__": "__main__"}
    exec(compile(source, "a cell", "exec"), names)
    return names["row"]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_changes_the_fingerprint(edit):
    assert CELL.count(EDITS[edit][0]) == 1
    assert fingerprint(run_cell(CELL.replace(*EDITS[edit]))) != fingerprint(run_cell())


def test_running_a_cell_again_does_not():
    moved = "# words\n\n\n" + CELL.replace("# a comment", "# another")
    here = fingerprint(run_cell())
    assert fingerprint(run_cell(moved)) == here
    # In another process too, with other addresses and another order of sets.
    code = f"CELL = {CELL!r}\nexec(CELL)\nfrom slm.study.fingerprints import fingerprint\nprint(fingerprint(row))"
    root = str(Path(__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == here


def test_a_file_of_the_users_counts_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for text in ("return x", "return -x"):
        (tmp_path / "my_tools.py").write_text(f"def twist(x):\n    {text}\n")
        sys.modules.pop("my_tools", None)
        found.append(fingerprint(run_cell(CELL.replace("RATE = 0.5", "RATE = 0.5\nimport my_tools").replace(
            "shift(compiled", "my_tools.twist(compiled"))))  # fmt: skip
        sys.modules.pop("my_tools")
    assert found[0] != found[1]


def test_an_edited_mechanism_is_trained_again_and_others_are_not(tmp_path, monkeypatch):
    base = tiny(tmp_path)
    arms = {"softmax": base, "mine": override(base, {"model.attention": ("mine", "softmax")})}
    monkeypatch.setitem(MIXERS, "mine", run_cell())
    first = make_cells(arms, (0,), tmp_path)
    monkeypatch.setitem(MIXERS, "mine", run_cell())
    assert make_cells(arms, (0,), tmp_path) == first
    monkeypatch.setitem(MIXERS, "mine", run_cell(CELL.replace(*EDITS["a helper"])))
    edited = make_cells(arms, (0,), tmp_path)
    assert edited[0] == first[0]
    assert edited[1].config.name != first[1].config.name
    with pytest.raises(ConfigError, match="processes = 2: other processes do not know mine"):
        run_cells(edited, processes=2, show=False)


def test_a_compiled_program_is_not_taken_for_that_of_an_edited_mechanism(monkeypatch):
    hidden = jax.jit(lambda model, params, tokens: model.hidden(params, tokens)[0], static_argnums=0)
    tokens, found = np.arange(6)[None], []
    for source in (CELL, CELL, CELL.replace(*EDITS["a literal in the body"])):
        monkeypatch.setitem(MIXERS, "mine", run_cell(source))
        model = Transformer(ModelConfig(vocab_size=8, layers=1, width=8, heads=1, attention=("mine",), mlp="none"))
        params = model.init(jax.random.key(0))
        found.append(np.asarray(hidden(model, params, tokens)))
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-3
