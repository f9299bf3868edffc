"""What must hold of the whole, whatever mechanism, layout or mesh is chosen. A new mixer is tested by being in MIXERS.

Proven elsewhere:
  prefill + decode = forward                           test_models.py, test_generate.py
  blocked attention = dense, forwards and gradients    test_softmax.py
  chunked cross-entropy = full                         test_loss.py
  accumulation = big batch with ragged masks           test_step.py
  exactly one trace over five steps                    test_step.py
  old state is donated                                 test_step.py
  k steps + restore + k steps = 2k steps               test_resume.py, test_multiprocess.py
  a wrong-shaped checkpoint raises, naming the leaf    test_checkpoint.py
  every parameter has one rule in each rule set        test_rules.py (all variants), test_optimizers.py
  a batch is a function of (seed, step), and is shared out over processes unchanged    test_pipeline.py
  packing restarts positions and segments at documents    test_packing.py
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slm.attention.spans import BLOCK
from slm.config import DataConfig, Experiment, MeshConfig, MixerConfig, ModelConfig, OptimConfig, TrainConfig
from slm.models.mixers import MIXERS
from slm.models.mixers.softmax import SoftmaxMixer
from slm.models.transformer import REMAT, Transformer
from slm.training import step
from slm.training.mesh import make_mesh, place_batch
from slm.training.precision import cast
from slm.training.rules import paths

T, V = 150, 40  # two blocks of attention, the second not full
CUT = 83  # where the second document begins: inside a block
WINDOW = 20
MODEL = ModelConfig(vocab_size=V, layers=2, width=16, heads=2, init_std=0.2, tied=False)
# For the switches that a mechanism has: sizes that make the small model cross windows, blocks and chunks.
SWITCHES = MixerConfig(
    window=WINDOW, block_size=16, top_k=3, chunk=32, feature_dim=8, latent_dim=8, query_latent_dim=8, rope_dim=4,
    rank=4, index_heads=2, index_dim=4,
)  # fmt: skip
KINDS = [
    (mixer, implementation)
    for mixer, row in MIXERS.items()
    for implementation in (("xla", "blocked") if row.mixer is SoftmaxMixer else ("auto",))
]


def model_of(mixer, implementation):
    has = MIXERS[mixer].defaults
    values = {name: value for name, value in vars(SWITCHES).items() if getattr(has, name) is not None}
    if has.index_heads is not None:
        values["top_k"] = 48  # tokens, not blocks
    if has.implementation is not None:
        values["implementation"] = implementation
    return Transformer(dataclasses.replace(MODEL, attention=(mixer,), mixer=MixerConfig(**values)))


@functools.cache
def parameters(mixer):
    return jax.jit(model_of(mixer, "auto").init)(jax.random.key(0))


@functools.cache
def forward(mixer, implementation, documents):
    """Jitted tokens (1, T) -> hidden (T, D), with one document or two, on parameters far from tiny."""
    model, params = model_of(mixer, implementation), parameters(mixer)
    rows = two_documents() if documents else {}
    return jax.jit(lambda tokens: model.hidden(params, tokens, **rows)[0][0])


def two_documents():
    at = np.arange(T)[None]
    return {"segment_ids": np.where(at < CUT, 1, 2), "positions": np.where(at < CUT, at, at - CUT)}


def tokens():
    return np.array(jax.random.randint(jax.random.key(1), (1, T), 0, V))


def perturbed(t):
    x = tokens()
    x[0, t] = (x[0, t] + 1) % V
    return x


def changed(one, other):
    """Which time steps differ in any bit."""
    one, other = np.asarray(one), np.asarray(other)
    assert np.isfinite(one).all()
    return (one.view(np.uint32) != other.view(np.uint32)).any(-1)


def limited(mixer):
    """Whether it sees WINDOW tokens and nothing else."""
    row = MIXERS[mixer]
    return row.mixer is SoftmaxMixer and row.defaults.window is not None and row.defaults.sinks == 0


def exact(mixer):
    """Whether a token is seen by everything in its reach, to the bit."""
    row = MIXERS[mixer]
    return row.mixer is SoftmaxMixer and not row.defaults.sinks


def reach(mixer, t, end):
    """The first time step that token t cannot have reached through all layers."""
    return min(end, t + MODEL.layers * (WINDOW - 1) + 1) if limited(mixer) else end


def assert_spread(mixer, changes, t, end):
    """A change of token t was seen at t, not before, and (exactly) in its reach; `end` ends its document."""
    last = reach(mixer, t, end)
    assert not changes[:t].any()
    assert not changes[last:].any()
    assert changes[t]
    if exact(mixer):
        assert changes[t:last].all()
    else:  # What decays or is not selected may leave later time steps bit-equal, but never all of them.
        assert t + 1 == last or changes[t + 1 : last].any()


@pytest.mark.parametrize(("mixer", "implementation"), KINDS)
def test_a_token_changes_nothing_before_it_and_something_after(mixer, implementation):
    f = forward(mixer, implementation, documents=False)
    for t in [0, 1, 70, BLOCK - 1, BLOCK, 140, T - 1]:
        assert_spread(mixer, changed(f(tokens()), f(perturbed(t))), t, T)


@pytest.mark.parametrize(("mixer", "implementation"), KINDS)
def test_a_document_changes_nothing_of_another(mixer, implementation):
    f = forward(mixer, implementation, documents=True)
    for t in [0, CUT - 1, CUT, 140]:
        assert_spread(mixer, changed(f(tokens()), f(perturbed(t))), t, CUT if t < CUT else T)


@pytest.mark.parametrize(("mixer", "implementation"), KINDS)
def test_packed_documents_are_what_each_is_alone(mixer, implementation):
    packed, one = (forward(mixer, implementation, documents) for documents in (True, False))
    packed, one_text = packed(tokens()), one(tokens())
    alone = one(np.roll(tokens(), -CUT, axis=1))  # what follows it changes nothing
    np.testing.assert_allclose(packed[CUT:], alone[: T - CUT], atol=5e-5)
    assert np.abs(packed[CUT] - one_text[CUT]).max() > 1e-2


@pytest.mark.parametrize(("mixer", "implementation"), KINDS)
def test_gradients_stay_in_their_past_and_in_their_document(mixer, implementation):
    """What the outputs of time steps [a, b) owe to each input: nothing outside their document, nothing after b."""
    model, params, a, b = model_of(mixer, implementation), parameters(mixer), CUT + 5, 120

    @jax.jit
    def owed(embedding):
        """Each time step has its own row of the embedding."""
        rows = params | {"embed": {"embedding": embedding}}
        hidden, _ = model.hidden(rows, jnp.arange(T)[None], **two_documents())
        return (hidden[0, a:b] * jnp.arange(1, MODEL.width + 1)).sum()

    grads = np.asarray(jax.grad(owed)(jax.random.normal(jax.random.key(2), (T, MODEL.width))))
    assert np.isfinite(grads).all()
    first = max(CUT, a - MODEL.layers * (WINDOW - 1)) if limited(mixer) else CUT
    owing = (grads != 0).any(-1)
    assert not owing[:first].any()
    assert not owing[b:].any()
    assert owing[a:b].all()
    assert owing[first:a].all() if exact(mixer) else owing[first:a].any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_decoding_equals_the_forward_pass_wherever_it_is_split(mixer):
    """Prefill in pieces of any length, one of them padded, then token by token; also in a cache of just this length."""
    model, params, x = model_of(mixer, "auto"), parameters(mixer), tokens()
    expected = np.asarray(forward(mixer, "auto", documents=False)(x))

    @jax.jit
    def extend(piece, positions, cache):
        return model.hidden(params, piece, positions=positions, cache=cache)

    cache, at, outs = model.init_cache(1, T), 0, []
    for length, padding in [(53, 7), (1, 0), (60, 0), (1, 0), (1, 0), (34, 26)]:  # two shapes, to compile two programs
        piece = np.pad(x[:, at : at + length], ((0, 0), (0, padding)))
        positions = np.pad(np.arange(at, at + length), (0, padding), constant_values=-1)[None]
        out, cache = extend(piece, positions, cache)
        outs.append(out[0, :length])
        at += length
    assert at == T
    np.testing.assert_allclose(np.concatenate(outs), expected, atol=5e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_half_precision_stays_half_and_states_stay_float32(mixer):
    """Abstractly: a parameter kept in float32 must not lift the activations, nor a cache change its types."""
    model = Transformer(model_of(mixer, "auto").cfg, jnp.bfloat16)
    params = jax.eval_shape(lambda key: cast(model.init(key), jnp.bfloat16), jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    hidden, _ = jax.eval_shape(model.hidden, params, x)
    cache = jax.eval_shape(lambda: model.init_cache(2, 16))
    decoded, after = jax.eval_shape(lambda p, x, cache: model.hidden(p, x, cache=cache), params, x, cache)
    assert hidden.dtype == decoded.dtype == jnp.bfloat16
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), cache)
    states = [leaf for path, leaf in zip(paths(cache), jax.tree.leaves(cache)) if path.endswith("state")]
    assert all(leaf.dtype == jnp.float32 for leaf in states)


# Layouts of one computation.

LAYERED = ModelConfig(
    vocab_size=V,
    layers=5,
    width=16,
    heads=2,
    attention=("window", "softmax"),
    mixer=MixerConfig(window=5, implementation="blocked"),
)
LAYOUTS = list(itertools.product([True, False], ["none", *REMAT]))


def layout(scan, remat):
    return Transformer(dataclasses.replace(LAYERED, scan=scan, remat=remat))


@functools.cache
def traced(scan, remat):
    """((loss, hidden), gradients) of parameters: traced, not yet compiled."""
    model = layout(scan, remat)
    x = tokens()[:, :12]

    def loss(params):
        hidden, _ = model.hidden(params, x)
        return (model.logits(params, hidden) ** 2).mean(), hidden

    return jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(jax.eval_shape(model.init, jax.random.key(0)))


def count(jaxpr, *primitives):
    """Equations of these primitives, in all levels of a jaxpr."""
    total = 0
    for equation in jaxpr.eqns:
        total += equation.primitive.name in primitives
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            total += count(inner, *primitives) if hasattr(inner, "eqns") else 0
    return total


def test_scan_and_remat_change_neither_outputs_nor_gradients():
    rng = np.random.default_rng(0)
    params = jax.eval_shape(layout(True, "none").init, jax.random.key(0))
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.2, p.shape), jnp.float32), params)
    (loss, hidden), grads = traced(True, "none").lower().compile()(params)
    largest = [float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)]
    assert min(largest) > 1e-6
    for scan, remat in LAYOUTS[1:]:
        (same_loss, same_hidden), same_grads = traced(scan, remat).lower().compile()(params)
        np.testing.assert_allclose(same_loss, loss, rtol=1e-5)
        np.testing.assert_allclose(same_hidden, hidden, rtol=1e-4, atol=1e-5, err_msg=f"{scan}, {remat}")
        leaves = zip(paths(grads), jax.tree.leaves(same_grads), jax.tree.leaves(grads), largest, strict=True)
        for path, a, b, size in leaves:
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * size, err_msg=f"{path} with {scan}, {remat}")


def test_scan_and_remat_are_different_programs():
    """Else the test above compares a thing with itself."""
    jaxprs = {kind: traced(*kind).jaxpr.jaxpr for kind in LAYOUTS}
    assert len({str(jaxpr) for jaxpr in jaxprs.values()}) == len(LAYOUTS)
    products = {kind: count(jaxpr, "dot_general") for kind, jaxpr in jaxprs.items()}
    for scan in (True, False):
        assert products[scan, "full"] > products[scan, "dots"] >= products[scan, "none"]
        remats = {remat: count(jaxprs[scan, remat], "remat2", "checkpoint") for remat in ("none", *REMAT)}
        assert remats["none"] == 0 < min(remats[remat] for remat in REMAT)
    assert all(products[False, remat] > products[True, remat] for remat in REMAT)
    scans = {kind: count(jaxpr, "scan") for kind, jaxpr in jaxprs.items()}
    assert all((n > 0) == scan for (scan, _), n in scans.items())


def test_scan_and_remat_leave_the_parameters_alone():
    """The same program makes them, hence the same tree with the same bits."""
    programs = {str(jax.make_jaxpr(layout(*kind).init)(jax.random.key(0))) for kind in LAYOUTS}
    assert len(programs) == 1
    assert len({jax.tree.structure(traced(*kind).out_info[1]) for kind in LAYOUTS}) == 1
    deeper = Transformer(dataclasses.replace(LAYERED, layers=6))
    assert str(jax.make_jaxpr(deeper.init)(jax.random.key(0))) not in programs


def test_layers_are_stacked_by_the_pattern_and_start_differently():
    params = jax.jit(layout(*LAYOUTS[0]).init)(jax.random.key(0))
    blocks = (params["blocks"]["0"], params["blocks"]["1"], params["tail"]["0"])
    kernels = [block["mixer"]["query"]["kernel"] for block in blocks]
    assert [kernel.shape for kernel in kernels] == [(2, 16, 16), (2, 16, 16), (1, 16, 16)]
    # One key for all layers of a stack would make them equal.
    assert len(np.unique(np.concatenate(kernels).reshape(5, -1), axis=0)) == 5


# Meshes.


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Options that make a step faster make its compilation slower, which is the cost here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "compiler_options", lambda platform: {})
        yield


EXPERIMENT = Experiment(
    model=ModelConfig(vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, mlp_width=32, tied=False),
    data=DataConfig(sequence_length=12),
    optim=OptimConfig(learning_rate=1e-2, warmup_steps=1),
    train=TrainConfig(steps=20, batch_size=16, accumulation=2),
)
# (data, fsdp, tensor) to the shape of one device's share of `up` kernels (2, 16, 32) and of a batch (16, 12)
MESHES = {
    (8, 1, 1): ((2, 16, 32), (2, 12)),
    (1, 8, 1): ((2, 2, 32), (2, 12)),
    (2, 2, 2): ((2, 8, 16), (4, 12)),
}


def batch_of(number):
    rng = np.random.default_rng(number)
    at = np.broadcast_to(np.arange(12), (16, 12))
    begins = rng.integers(1, 12, (16, 1))
    return {
        "tokens": rng.integers(0, 32, (16, 12), dtype=np.int32),
        "targets": rng.integers(0, 32, (16, 12), dtype=np.int32),
        "weights": (rng.random((16, 12)) < rng.random((16, 1))).astype(np.float32),  # ragged
        "segment_ids": np.where(at < begins, 1, 2).astype(np.int32),
        "positions": np.where(at < begins, at, at - begins).astype(np.int32),
    }


def train_on(shape):
    """(program, state after three steps, the metrics of each)."""
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    program = step.build(EXPERIMENT, mesh)
    state, rows = program.init(jax.random.key(0)), []
    for i in range(3):
        state, metrics = program.train(state, place_batch(batch_of(i), mesh))
        rows.append(jax.tree.map(float, metrics))
    return program, state, rows


@pytest.fixture(scope="module")
def one_device():
    return train_on((1, 1, 1))


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_train_as_one(one_device, shape):
    _, alone, expected = one_device
    program, state, rows = train_on(shape)
    for row, other in zip(rows, expected, strict=True):
        for name in row:
            np.testing.assert_allclose(row[name], other[name], rtol=2e-4, err_msg=name)
    assert len({row["loss"] for row in rows}) == 3
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params)):
        # Adam's first steps are the signs of gradients, and those near 0 may turn.
        assert np.mean(np.abs(np.asarray(a) - np.asarray(b)) > 1e-4) < 0.01

    up, rows_each = MESHES[shape]
    moments = [leaf for path, leaf in zip(paths(state), jax.tree.leaves(state)) if path.endswith("mlp/up/kernel")]
    assert len(moments) == 3  # the parameter and Adam's two
    for leaf in moments:
        assert len(leaf.sharding.device_set) == 8
        assert {shard.data.shape for shard in leaf.addressable_shards} == {up}
    placed = place_batch(batch_of(0), program.mesh)["tokens"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {rows_each}
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(alone)} == {1}


def test_the_order_of_rows_does_not_matter_nor_do_the_rows_beside_one(one_device):
    """Scores of a row are its own: not of the batch, nor of the place in it."""
    program, state, _ = one_device
    batch = batch_of(0)
    order = np.random.default_rng(0).permutation(16)
    scores = program.evaluate(state.params, batch)["nats"]
    shuffled = program.evaluate(state.params, jax.tree.map(lambda x: x[order], batch))["nats"]
    np.testing.assert_allclose(shuffled, np.asarray(scores)[order], rtol=1e-5)
    others = batch | {"tokens": np.concatenate([batch["tokens"][:1], (batch["tokens"][1:] + 1) % 32])}
    beside = program.evaluate(state.params, others)["nats"]
    np.testing.assert_array_equal(beside[0], scores[0])
    assert (beside[1:] != scores[1:]).any()
