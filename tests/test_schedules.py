import warnings

import jax
import numpy as np
import pytest

from slm.config import OptimConfig
from slm.errors import ConfigError
from slm.training.schedules import make_schedule


def rates(steps, **fields):
    cfg = OptimConfig(**{"learning_rate": 2.0, "warmup_steps": 4, "final_ratio": 0.1, **fields})
    return np.asarray(jax.jit(jax.vmap(make_schedule(cfg, steps)))(np.arange(steps + 3)))


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_starts_to_learn_at_once(shape):
    np.testing.assert_allclose(rates(20, schedule=shape)[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)


def test_cosine_and_linear_follow_the_closed_form_to_the_last_step_and_stay_there():
    steps = 20
    progress = np.clip((np.arange(3, steps + 3) - 3) / (steps - 1 - 3), 0, 1)
    cosine = 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * progress)))
    np.testing.assert_allclose(rates(steps, schedule="cosine")[3:], cosine, rtol=1e-5)
    np.testing.assert_allclose(rates(steps, schedule="linear")[3:], 2.0 * (1 - 0.9 * progress), rtol=1e-5)
    assert rates(steps, schedule="cosine")[steps - 1] == pytest.approx(0.2)
    assert rates(steps, schedule="cosine")[steps + 2] == pytest.approx(0.2)


def test_wsd_is_flat_and_then_decays_over_its_fraction():
    wsd = rates(20, schedule="wsd", decay_fraction=0.25)
    np.testing.assert_allclose(wsd[3:15], 2.0, rtol=1e-6)
    np.testing.assert_allclose(wsd[14:20], 2.0 * (1 - 0.9 * np.arange(6) / 5), rtol=1e-5)
    # A decay as long as the run starts where the warm-up ends.
    np.testing.assert_allclose(rates(20, schedule="wsd", decay_fraction=1.0), rates(20, schedule="linear"), rtol=1e-6)


def test_constant_stays_and_no_warm_up_starts_at_the_peak():
    np.testing.assert_allclose(rates(9, schedule="constant")[3:], 2.0)
    assert rates(9, schedule="cosine", warmup_steps=0)[0] == pytest.approx(2.0)
    assert rates(1, schedule="cosine", warmup_steps=0)[0] == pytest.approx(2.0)


def test_a_warm_up_longer_than_the_run_is_shortened_aloud():
    with pytest.warns(UserWarning, match=r"warmup_steps = 100 does not fit into train.steps = 5: using 4"):
        short = rates(5, warmup_steps=100)
    np.testing.assert_allclose(short[:5], [0.5, 1.0, 1.5, 2.0, 0.2], rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates(5, warmup_steps=4)


def test_contradictions_are_refused():
    with pytest.raises(ConfigError, match="schedule_free_adamw averages"):
        rates(5, name="schedule_free_adamw", schedule="cosine")
    with pytest.raises(ConfigError, match="final_ratio"):
        rates(5, final_ratio=1.5)
    with pytest.raises(ConfigError, match="decay_fraction"):
        rates(5, decay_fraction=-0.1)
