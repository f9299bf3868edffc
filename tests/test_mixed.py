"""Bits by sensitivity: the budget is kept, what matters gets more, and layers apart are the same model."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_gguf import made

import slm
from slm.compress.mixed import leaf, sensitivity, spend, unrolled
from slm.compress.quantize import quantizable
from slm.compress.schemes import Scheme
from slm.data.tokenizers import build_tokenizer
from slm.models.quantized import is_quantized

TOKENS = np.random.default_rng(0).integers(0, 250, (4, 32)).astype(np.int32)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("bytes", lambda: iter(()))


def matrices(model):
    return [m for m in jax.tree.leaves(model.params, is_leaf=is_quantized) if is_quantized(m)]


@pytest.mark.parametrize("budget", [10, 14, 20, 33, 100])
def test_greedy_spending_keeps_the_budget_and_comes_near_the_best(budget):
    rng = np.random.default_rng(budget)
    sizes = {unit: [2.0 * n, 4.0 * n, 8.0 * n] for unit, n in {"a": 1, "b": 1, "c": 2, "d": 1}.items()}
    losses = {unit: sorted(rng.uniform(0, 1, 3), reverse=True) for unit in sizes}
    chosen = spend(losses, sizes, budget)

    def total(table, choice):
        return sum(table[unit][n] for unit, n in choice.items())

    fitting = [
        choice
        for numbers in itertools.product(range(3), repeat=4)
        if total(sizes, choice := dict(zip(sizes, numbers))) <= budget
    ]
    assert chosen in fitting
    least, most = min(total(losses, c) for c in fitting), total(losses, dict.fromkeys(sizes, 0))
    assert total(losses, chosen) <= least + 0.35 * (most - least)
    if budget == 100:
        assert set(chosen.values()) == {2}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_layers_apart_are_the_same_model(name, tokenizer):
    model = made(name, tokenizer)
    apart = unrolled(model)
    assert set(apart.params["blocks"]) == {str(i) for i in range(model.config.model.layers)}
    np.testing.assert_allclose(slm.logits(apart, TOKENS), slm.logits(model, TOKENS), atol=1e-5)


@pytest.mark.parametrize("by", ["matrix", "layer"])
def test_what_matters_gets_more_bits(by, tokenizer):
    """One layer, or one matrix of all layers, is made to say nothing: its bits go elsewhere."""
    model = made("llama", tokenizer)
    kernel = model.params["blocks"]["0"]["mlp"]["down"]["kernel"]
    quiet = {"down": {"kernel": kernel.at[0].set(0) if by == "layer" else kernel * 1e-4}}
    block = model.params["blocks"]["0"]
    mixer = block["mixer"]
    if by == "layer":
        mixer = mixer | {"out": {"kernel": mixer["out"]["kernel"].at[0].set(0)}}
    params = model.params | {"blocks": {"0": block | {"mixer": mixer, "mlp": block["mlp"] | quiet}}}
    model = type(model)(params, model.config, model.tokenizer)
    budget = 5.0 if by == "matrix" else 5.6
    small = slm.quantize(model, budget_bits=budget, budget_by=by, group_size=32, embedding=False, calibration=TOKENS)
    found = matrices(small)
    bits = 8 * sum(m.nbytes for m in found) / sum(np.prod(m.shape) for m in found)
    assert 4.0 < bits <= budget
    blocks = small.params["blocks"]
    if by == "layer":
        assert blocks["0"]["mlp"]["up"]["kernel"].scheme == "int2"
        assert blocks["1"]["mlp"]["up"]["kernel"].scheme in ("int4", "int8")
    else:
        assert blocks["0"]["mlp"]["down"]["kernel"].scheme == "int2"
        assert len({m.scheme for m in found}) > 1
    even = slm.quantize(model, "int4", group_size=32, embedding=False)

    def kl(other):
        p, q = (jax.nn.log_softmax(slm.logits(m, TOKENS)) for m in (model, other))
        return float((jnp.exp(p) * (p - q)).sum(-1).mean())

    assert kl(small) < kl(even)
    assert slm.generate(small, "the cat", max_new_tokens=3, temperature=0.0)


def test_sensitivity_is_the_divergence_of_one_matrix(tokenizer):
    model = made("llama", tokenizer)
    name, scheme = "blocks/0/mlp/down/kernel", Scheme("int2", 32)
    others = tuple(n for n in quantizable(model.params) if n != name)
    one = slm.quantize(model, "int2", group_size=32, embedding=False, skip=others)
    p, q = (np.asarray(jax.nn.log_softmax(slm.logits(m, TOKENS)), np.float64) for m in (model, one))
    want = (np.exp(p) * (p - q)).sum(-1).mean()
    assert sensitivity(model, [name], scheme, TOKENS) == pytest.approx(want, rel=1e-3)
    assert leaf(model.params, name).shape == (2, 96, 64)
