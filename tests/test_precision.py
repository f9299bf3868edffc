import jax
import jax.numpy as jnp
import numpy as np

from slm.training import precision
from slm.training.state import LossScale


def scale_of(scale, good=0, skipped=0, row=0):
    return LossScale(jnp.float32(scale), jnp.int32(good), jnp.int32(skipped), jnp.int32(row))


def values(loss_scale):
    return tuple(float(x) for x in jax.tree.leaves(loss_scale))


def test_cast_touches_matrices_only():
    params = {"embed": {"embedding": jnp.ones(2)}, "mixer": {"query": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}},
              "decay": jnp.ones(2), "norm": {"scale": jnp.ones(2)}}  # fmt: skip
    out = precision.cast(params, precision.compute_dtype("bfloat16"))
    assert out["embed"]["embedding"].dtype == out["mixer"]["query"]["kernel"].dtype == jnp.bfloat16
    assert {out["mixer"]["query"]["bias"].dtype, out["decay"].dtype, out["norm"]["scale"].dtype} == {
        np.dtype("float32")
    }
    assert precision.compute_dtype("float32") == jnp.float32
    assert precision.compute_dtype("float16") == jnp.float16


def test_scaling_saves_a_gradient_that_underflows_in_float16():
    def loss(w, loss_scale):
        y = (w.astype(jnp.float16) * jnp.float16(1e-4)).astype(jnp.float32)
        return y * 1e-5 * loss_scale.scale

    # The cotangent 1e-5 is a subnormal float16, and 1e-9 is none at all.
    plain = jax.grad(loss)(jnp.float32(1), scale_of(1))
    scaled = precision.unscale(jax.grad(loss)(jnp.float32(1), scale_of(2.0**15)), scale_of(2.0**15))
    assert plain == 0
    np.testing.assert_allclose(scaled, 1e-9, rtol=2e-3)


def test_all_finite_sees_one_bad_element():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.zeros(4)}
    assert precision.all_finite(tree)
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        assert not precision.all_finite({**tree, "a": tree["a"].at[1, 2].set(bad)})


def test_update_grows_halves_and_counts_within_its_bounds():
    update = jax.jit(precision.update)
    n = precision.GROW_AFTER
    assert values(update(scale_of(8, good=5, skipped=2, row=2), True)) == (8, 6, 2, 0)
    assert values(update(scale_of(8, good=n - 2), True)) == (8, n - 1, 0, 0)
    assert values(update(scale_of(8, good=n - 1), True)) == (16, 0, 0, 0)
    assert values(update(scale_of(2.0**24, good=n - 1), True)) == (2.0**24, 0, 0, 0)
    assert values(update(scale_of(8, good=n - 1, skipped=2, row=1), False)) == (4, 0, 3, 2)
    assert values(update(scale_of(1), False)) == (1, 0, 1, 1)
    before, after = LossScale.create(), update(LossScale.create(), True)
    assert [x.dtype for x in jax.tree.leaves(before)] == [x.dtype for x in jax.tree.leaves(after)]


def test_stuck_only_after_the_smallest_scale_has_failed_ten_times():
    update = jax.jit(precision.update)
    loss_scale, failures_at_smallest = scale_of(2.0**24), 0
    while loss_scale.skipped_in_a_row < precision.STUCK_AFTER:
        failures_at_smallest += float(loss_scale.scale) == precision.SMALLEST
        loss_scale = update(loss_scale, False)
    assert failures_at_smallest == 10
    assert update(loss_scale, True).skipped_in_a_row == 0
