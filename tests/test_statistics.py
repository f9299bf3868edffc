"""Intervals, p values and power against published tables, scipy's numbers, and simulated studies."""

import math

import numpy as np
import pytest

from slm.errors import ConfigError
from slm.study.statistics import (
    detectable_effect,
    holm,
    mean_of,
    minimum_detectable,
    paired_difference,
    seeds_needed,
    verdict,
    welch,
)
from slm.study.student import critical, incomplete_beta, t_power, two_sided

BASE = np.array([1.692, 1.701, 1.688, 1.695, 1.699])
ARM = np.array([1.683, 1.690, 1.684, 1.685, 1.686])
OTHER = np.array([1.683, 1.690, 1.684, 1.70, 1.672, 1.699, 1.66])
STUDIES = 2000


def noise(share: float) -> float:
    """Four standard errors of a share counted in STUDIES simulated studies."""
    return 4 * math.sqrt(share * (1 - share) / STUDIES)


@pytest.mark.parametrize(
    ("level", "df", "t"),
    [  # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2 (upper critical values of Student's t)
        (0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 4, 2.776), (0.05, 9, 2.262), (0.05, 30, 2.042), (0.05, 100, 1.984),
        (0.01, 1, 63.657), (0.01, 4, 4.604), (0.01, 9, 3.250), (0.1, 4, 2.132), (0.002, 4, 7.173),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_the_table(level, df, t):
    assert critical(level, df) == pytest.approx(t, abs=6e-4)
    assert two_sided(critical(level, df), df) == pytest.approx(level, rel=1e-9)


def test_distributions_equal_scipys():
    # scipy 1.17.1: stats.t.isf(level / 2, df), and with the noncentral t stats.nct.sf + stats.nct.cdf
    assert critical(0.05, 4) == pytest.approx(2.7764451051977943, rel=1e-9)
    assert critical(0.05, 2.7) == pytest.approx(3.3921483831737524, rel=1e-9)
    assert t_power(2, 1, 0.05) == pytest.approx(0.12575631775705268, abs=5e-5)
    assert t_power(3, 4, 0.05) == pytest.approx(0.6192614594023302, abs=1e-5)
    assert t_power(3, 9, 0.01) == pytest.approx(0.4525061450813149, abs=1e-5)
    assert t_power(0, 4, 0.05) == pytest.approx(0.05, abs=1e-5)
    # One degree of freedom is the Cauchy distribution; I_x(1, b) = 1 - (1 - x)^b.
    for t in (0.0, 0.3, 1.0, 7.0):
        assert two_sided(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-14)
    for x in (0.01, 0.4, 0.97):
        assert incomplete_beta(x, 1, 3.5) == pytest.approx(1 - (1 - x) ** 3.5, rel=1e-12)


def test_paired_and_welch_equal_scipys():
    d = paired_difference(BASE, ARM)  # scipy 1.17.1: stats.ttest_rel(ARM, BASE)
    assert d.p == pytest.approx(0.0033358584921846274, rel=1e-9)
    assert (d.low, d.high) == pytest.approx((-0.013573912214472208, -0.005226087785527851), rel=1e-9)
    assert d.mean == pytest.approx(-0.0094, rel=1e-12)
    assert (d.df, d.n) == (4, 5)
    assert verdict(d) == "better"
    assert verdict(d, lower_is_better=False) == "worse"
    w = welch(BASE, OTHER)  # stats.ttest_ind(OTHER, BASE, equal_var=False)
    assert w.p == pytest.approx(0.09980255736878237, rel=1e-9)
    assert w.df == pytest.approx(8.02869871403944, rel=1e-9)
    assert (w.low, w.high) == pytest.approx((-0.024629382628226313, 0.0026293826282265155), rel=1e-8)
    assert verdict(w) == "tie"
    # Pairing finds what the same numbers without it do not show as surely.
    assert welch(BASE, ARM).p > d.p


def test_the_bootstrap_agrees_with_theory_and_repeats():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=400), rng.normal(0.1, size=300)
    d = mean_of(a)
    # Percentiles of a mean of many values: the normal approximation.
    wanted = a.mean() + np.array([-1.96, 1.96]) * a.std() / 20
    assert d.bootstrap == pytest.approx(wanted, abs=0.03 * 1.96 * a.std() / 20 * 2)
    w = welch(a, b)
    wanted = b.mean() - a.mean() + np.array([-1.96, 1.96]) * math.sqrt(a.var() / 400 + b.var() / 300)
    assert w.bootstrap == pytest.approx(wanted, abs=0.01)
    assert mean_of(a) == d
    assert mean_of(a, seed=1).bootstrap != d.bootstrap
    narrow = mean_of(a, level=0.5)
    assert d.bootstrap[0] < narrow.bootstrap[0] < narrow.bootstrap[1] < d.bootstrap[1]


def test_weights_make_a_mean_a_ratio_of_sums():
    rng = np.random.default_rng(1)
    bytes_ = rng.integers(20, 900, 60).astype(float)
    bits = bytes_ * 1.7 + rng.normal(size=(3, 60)) * np.sqrt(bytes_)
    d = mean_of(bits / bytes_, bytes_)
    assert d.mean == pytest.approx((bits.sum(1) / bytes_.sum()).mean(), rel=1e-12)
    one = mean_of(bits[:1] / bytes_, bytes_)
    # The delta method's standard error of a ratio (Cochran 1977, 6.4).
    residual = bits[0] - one.mean * bytes_
    assert one.standard_error == pytest.approx(math.sqrt((residual**2).sum() / 59 / 60) / bytes_.mean(), rel=1e-9)
    assert one.df == 59
    low, high = one.bootstrap
    assert (high - low) / 2 == pytest.approx(1.96 * one.standard_error, rel=0.05)


def test_studies_of_a_against_a_raise_false_alarms_at_the_stated_rate():
    rng = np.random.default_rng(2)
    found = [paired_difference(a, b, resamplings=0).p <= 0.05 for a, b in rng.normal(size=(STUDIES, 2, 10))]
    assert abs(np.mean(found) - 0.05) < noise(0.05)
    covered = [mean_of(a, resamplings=0, level=0.1) for a in rng.normal(3, 2, size=(STUDIES, 4))]
    assert abs(np.mean([d.low < 3 < d.high for d in covered]) - 0.9) < noise(0.1)


def test_four_arms_raise_false_alarms_at_the_stated_rate_after_holm():
    rng = np.random.default_rng(3)
    alarms, uncorrected = 0, 0
    for base, *others in rng.normal(size=(STUDIES, 5, 10)):
        p = [paired_difference(base, arm, resamplings=0).p for arm in others]
        alarms += min(holm(p)) <= 0.05
        uncorrected += min(p) <= 0.05
    # At most: the four share a base, so their tests depend on each other.
    assert alarms / STUDIES < 0.05 + noise(0.05)
    assert alarms / STUDIES > 0.02
    assert uncorrected / STUDIES > 0.05 + noise(0.05)


@pytest.mark.parametrize(("n", "comparisons", "power"), [(3, 1, 0.8), (5, 1, 0.8), (10, 4, 0.9)])
def test_the_minimum_detectable_difference_is_found_at_the_stated_power(n, comparisons, power):
    rng = np.random.default_rng(4)
    effect = minimum_detectable(2.0, n, power=power, comparisons=comparisons)
    found = [mean_of(d, resamplings=0).p <= 0.05 / comparisons for d in rng.normal(effect, 2.0, size=(STUDIES, n))]
    assert abs(np.mean(found) - power) < noise(power)


def test_detectable_effects_equal_scipys():
    # scipy 1.17.1: the root of stats.nct.sf(stats.t.isf(level / 2, df), df, effect) - power
    assert detectable_effect(4) == pytest.approx(3.761060261004304, rel=1e-5)
    assert detectable_effect(2) == pytest.approx(5.653489266405572, rel=1e-5)
    assert detectable_effect(9, 0.05 / 4, 0.9) == pytest.approx(4.613789895063745, rel=1e-5)
    d = paired_difference(BASE, ARM)
    assert d.detectable() == pytest.approx(3.76106 * d.standard_error, rel=1e-4)
    assert d.detectable() == pytest.approx(minimum_detectable((ARM - BASE).std(ddof=1), 5), rel=1e-9)
    # G*Power 3.1's manual, t test of matched pairs: dz = 0.5, two-sided 5 %, power 80 %: 34 pairs.
    assert seeds_needed(1.0, 0.5) == 34
    for difference in (0.2, 0.35, 0.5, 1.0, 1.5, 3.0, 10.0):
        n = seeds_needed(1.0, difference)
        assert minimum_detectable(1.0, n) <= difference
        assert n == 2 or minimum_detectable(1.0, n - 1) > difference


def test_both_seeds_and_texts_may_have_been_others():
    """Ignoring either finds differences that are not there: the fallacy of Clark 1973."""
    rng = np.random.default_rng(5)
    alarms = dict.fromkeys(("all", "seeds", "texts"), 0)
    for _ in range(STUDIES // 2):
        d = rng.normal(size=(5, 1)) + 2 * rng.normal(size=(1, 20)) + rng.normal(size=(5, 20))
        for over in alarms:
            alarms[over] += mean_of(d, over=over, resamplings=0).p <= 0.05
    rate = {over: n / (STUDIES // 2) for over, n in alarms.items()}
    assert rate["all"] < 0.05 + noise(0.05) * math.sqrt(2)
    assert rate["all"] > 0.02
    assert rate["seeds"] > 0.08
    assert rate["texts"] > 0.08
    # With one text, or one seed, there is only the other.
    assert (
        mean_of(d[:, :1], resamplings=0)
        == mean_of(d[:, 0], resamplings=0)
        == mean_of(d[:, :1], over="seeds", resamplings=0)
    )
    assert mean_of(d[:1]).df == 19
    assert mean_of(d, over="seeds").df == 4
    assert mean_of(d, over="seeds").bootstrap == mean_of(d.mean(1)).bootstrap
    wide, seeds = (b[1] - b[0] for b in (mean_of(d, over=over).bootstrap for over in ("all", "seeds")))
    assert wide > seeds


def test_holm_equals_rs():
    # R 4: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    corrected = holm([0.01, math.nan, 0.9])
    assert corrected[0] == pytest.approx(0.02)
    assert math.isnan(corrected[1])
    assert holm([]) == []


def test_values_that_say_nothing_of_chance():
    one = paired_difference([1.5], [1.4])
    assert one.mean == pytest.approx(-0.1)
    assert math.isnan(one.p)
    assert math.isnan(one.low)
    assert math.isnan(one.detectable())
    assert verdict(one) == "unknown"
    same = paired_difference(BASE, BASE)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert verdict(same) == "tie"
    sure = paired_difference(np.zeros(3), np.ones(3))
    assert (sure.low, sure.high, sure.p) == (1, 1, 0)
    assert verdict(sure) == "worse"
    assert verdict(paired_difference(BASE, ARM), p=0.06) == "tie"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_difference(BASE, ARM[:4]), r"\(5,\) and \(4,\) values: give the same seeds"),
        (lambda: paired_difference(BASE, [1, math.nan, math.inf, 1, 1]), r"second: 2 of 5 values are not finite"),
        (lambda: paired_difference([], []), r"first: give numbers"),
        (lambda: mean_of(np.ones((2, 3)), np.ones(2)), r"weights: give 3 positive"),
        (lambda: mean_of(BASE, over="days"), r"over = 'days': must be all, seeds or texts"),
        (lambda: mean_of(BASE, level=5), r"level = 5: must be in \(0, 1\)"),
        (lambda: minimum_detectable(1.0, 1), r"n = 1: at least 2"),
        (lambda: detectable_effect(4, power=0.01), r"power = 0\.01: must be between"),
        (lambda: seeds_needed(1.0, 0.0), r"difference = 0\.0: not found"),
    ],
)
def test_errors_say_what_to_give(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
