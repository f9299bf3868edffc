"""The general delta engine (diagonal plus low rank) against a float64 token loop with hand-written gradients."""

import delta_reference as reference
import numpy as np
import pytest
from delta_reference import relative
from test_delta import engine, request

from slm.attention import dplr_attention


def general(gate, **options):
    """Like `test_delta.request`, with a and b in the place of beta."""
    arrays, segment_ids, weights = request(gate, **options)
    beta = arrays.pop("beta")[..., None]
    arrays["a"] = 0.5 * np.random.default_rng(1).standard_normal(arrays["k"].shape).astype(np.float32)
    arrays["b"] = -beta * arrays["k"]
    return arrays, segment_ids, weights


def assert_exact(arrays, segment_ids, weights, form, chunk, gradients=5e-5):
    results, found = engine(dplr_attention, form, chunk)(arrays, segment_ids, weights)
    exact = {name: x.astype(np.float64) for name, x in arrays.items()}
    out, state, true = reference.dplr(
        **exact, segment_ids=segment_ids, scale=None, d_out=weights[0], d_final=weights[1]
    )
    for name, ours, other in zip(("out", "state"), results, (out, state)):
        assert relative(ours, other) < 2e-5, name
    assert set(found) == set(true)
    for name in found:
        assert relative(found[name], true[name]) < gradients, name


@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_output_state_and_gradients(form, gate):
    assert_exact(*general(gate), form=form, chunk=16)


def test_strong_decay_is_exact_over_hundreds_of_tokens():
    soft, segment_ids, weights = general("channel", T=200, hard=0.3, documents=False)
    assert_exact(soft, segment_ids, weights, form="chunked", chunk=64, gradients=2e-4)
    all_hard = soft | {"log_decay": np.full_like(soft["log_decay"], -15.0)}
    assert_exact(all_hard, segment_ids, weights, form="chunked", chunk=64, gradients=2e-4)


def test_the_future_changes_no_bit_also_inside_a_chunk():
    arrays, segment_ids, weights = general("channel", documents=False)
    run = engine(dplr_attention, "chunked", 16)
    before = run(arrays, segment_ids, weights)[0][0]
    for t in (9, 20):
        changed = {name: x.copy() for name, x in arrays.items()}
        for name in changed.keys() - {"initial_state", "reset_state"}:
            changed[name][:, t:] *= 0.5
        after = run(changed, segment_ids, weights)[0][0]
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any()


def test_requests_that_cannot_be_served():
    arrays, *_ = general("scalar")
    with pytest.raises(ValueError, match="a has shape"):
        dplr_attention(**arrays | {"a": arrays["a"][..., :2]})
    with pytest.raises(ValueError, match="must be auto, xla or pallas"):
        dplr_attention(**arrays, implementation="cudnn")
