"""The table says what the numbers say: means, paired differences, corrected p values, what is missing."""

import json
import math
import re

import numpy as np
import pytest

from slm.errors import ConfigError
from slm.study.statistics import holm, mean_of, paired_difference, welch
from slm.study.table import make_table
from slm.study.table_text import number, p_value

rng = np.random.default_rng(1)
LUCK = rng.normal(0, 0.01, 5)
LONG = "gla muon learning_rate=0.003 momentum=0.95 weight_decay=0.1 warmup_steps=200"


def runs(mean, spread=0.002):
    return {seed: float(mean + luck + rng.normal(0, spread)) for seed, luck in enumerate(LUCK)}


RESULTS = {
    "softmax": {"bits_per_byte": runs(1.70), "tokens_per_s": runs(12_345, 50), "params": 2_212_288, "state_bytes": 3e9},
    "window": {"bits_per_byte": runs(1.70), "tokens_per_s": runs(12_345, 50), "params": 2_212_288, "state_bytes": 2e8},
    LONG: {"bits_per_byte": runs(1.68), "tokens_per_s": runs(14_000, 50), "params": 2_300_000, "state_bytes": 1e6},
    "lion": {"bits_per_byte": runs(1.75), "tokens_per_s": runs(12_000, 50), "params": 2_212_288, "state_bytes": 3e9},
}
ARMS = list(RESULTS)


def values(arm, metric="bits_per_byte"):
    return np.array(list(RESULTS[arm][metric].values()))


def test_cells_hold_the_paired_statistics():
    table = make_table(RESULTS)
    assert table.arms == tuple(ARMS)
    assert table.metrics == ("bits_per_byte", "tokens_per_s", "params", "state_bytes")
    assert table.base == "softmax"
    differences = [paired_difference(values("softmax"), values(arm)) for arm in ARMS[1:]]
    for arm, difference, p in zip(ARMS[1:], differences, holm([d.p for d in differences])):
        cell = table.cells[arm, "bits_per_byte"]
        assert cell.difference == difference
        assert cell.p == p > difference.p or p == difference.p == max(d.p for d in differences)
        own = mean_of(values(arm))
        assert (cell.mean, cell.low, cell.high, cell.n) == (own.mean, own.low, own.high, 5)
    assert table.cells["softmax", "bits_per_byte"].difference is None
    verdicts = {m: [table.cells[arm, m].verdict for arm in ARMS] for m in table.metrics}
    assert verdicts["bits_per_byte"] == [None, "tie", "better", "worse"]
    assert verdicts["tokens_per_s"] == [None, "tie", "better", "worse"]  # more is better
    assert verdicts["params"] == verdicts["state_bytes"] == [None] * 4  # known, so not tested
    assert table.cells[LONG, "params"].difference.mean == 2_300_000 - 2_212_288
    other = make_table(RESULTS, ["tokens_per_s"], base="lion", higher_is_better=())
    assert other.metrics == ("tokens_per_s",)
    assert other.cells["softmax", "tokens_per_s"].verdict == "worse"


def test_a_tie_says_what_would_have_been_missed():
    table = make_table({arm: {"bits_per_byte": RESULTS[arm]["bits_per_byte"]} for arm in ("softmax", "window")})
    detectable = paired_difference(values("softmax"), values("window")).detectable()
    assert any(f"true differences up to {detectable:.2g} would be missed" in note for note in table.notes)


def test_runs_that_failed_are_left_out_and_said_so():
    results = {
        "a": {"loss": {0: 1.0, 1: 1.1, 2: 1.2, 3: 1.3}},
        "b": {"loss": {0: 1.5, 1: None, 2: 1.9, 3: math.nan}},
        "c": {"loss": {7: 1.0, 8: 1.4}},
        "d": {"loss": {0: math.inf}},
        "e": {},
        "f": {"loss": {2: 1.0}},
    }
    table = make_table(results)
    assert table.cells["b", "loss"].difference == paired_difference([1.0, 1.2], [1.5, 1.9])  # by seed, not by place
    assert table.cells["b", "loss"].n == 2
    assert table.cells["c", "loss"].difference == welch([1.0, 1.1, 1.2, 1.3], [1.0, 1.4])
    for arm in "de":
        assert math.isnan(table.cells[arm, "loss"].mean)
        assert table.cells[arm, "loss"].verdict is None
    assert table.cells["f", "loss"].verdict == "unknown"
    # Two comparisons could be tested; those that could not do not count.
    p = [table.cells[arm, "loss"].difference.p for arm in "bc"]
    assert [table.cells[arm, "loss"].p for arm in "bc"] == holm(p)
    notes = "\n".join(table.notes)
    assert "b: loss of 2 of 4 seeds is missing or not finite" in notes
    assert "d: loss of 1 of 1 seeds" in notes
    assert "c: loss shares no seed with a; compared without pairs" in notes
    assert "one seed cannot tell" in notes
    assert "1 to 4 seeds" in notes


def test_scores_by_text_count_texts_as_drawn():
    scores = rng.normal(1.7, 0.1, size=(2, 3, 30))
    bytes_ = rng.integers(50, 90, 30)
    results = {name: {"bits": dict(enumerate(one))} for name, one in zip("ab", scores)}
    table = make_table(results, weights=bytes_)
    assert table.cells["b", "bits"].difference == paired_difference(*scores, bytes_)
    results["b"]["bits"][0] = scores[1, 0, :29]
    with pytest.raises(ConfigError, match=r"arm 'b', bits: seeds have scores of different texts"):
        make_table(results)


@pytest.mark.parametrize("columns", [100, 80])
def test_text_fits_a_terminal(columns):
    many = {arm: RESULTS[arm] | {"peak_bytes": 123_456_789_012, "loss": runs(1e-6, 1e-7)} for arm in ARMS}
    table = make_table(many)
    lines = table.text(columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert table.text(100) == str(table)
    assert max(map(len, str(table).splitlines())) > 80  # and uses the room it has
    for metric in table.metrics:
        assert sum(metric in line.split() for line in lines) == 1
    row = next(line for line in lines if line.startswith("lion"))
    cell = table.cells["lion", "bits_per_byte"]
    assert f"{cell.mean:.3f} ± " in row
    assert f"{cell.difference.mean:+.4f} ± " in row
    assert row.endswith("<0.001  worse")
    # A long name is broken, never cut.
    start = next(i for i, line in enumerate(lines) if line.startswith("gla muon"))
    assert LONG in " ".join(re.split(r"\s{2,}", line)[0] for line in lines[start : start + 6])
    notes = " ".join(" ".join(lines).split())
    assert "- ± is half the 95% t interval over 5 seeds; differences are to softmax, paired by seed;" in notes


def test_markdown_and_latex_have_all_cells():
    table = make_table({"a|b_c": RESULTS["softmax"], LONG: RESULTS[LONG]})
    md = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert len(md) == 4
    columns = 1 + 4 + 4 + 2 + 2
    for line in md:
        assert line.replace("\\|", "").count("|") == columns + 1
    assert md[2].startswith("| a\\|b_c | 1.")
    assert table._repr_markdown_() == table.markdown()
    tex = table.latex()
    body = [line for line in tex.splitlines() if line.endswith("\\\\")]
    assert [line.count(" & ") for line in body] == [columns - 1] * 3
    assert f"{{l{'r' * (columns - 1)}}}" in tex
    assert "a|b\\_c & $1." in tex
    assert "$3 \\times 10^{9}$" in tex
    assert "$2{,}300{,}000$" in tex
    assert "$\\mathbf{-0.0" in tex
    assert tex.count("{") == tex.count("}")


def test_json_is_strict_and_whole():
    table = make_table(RESULTS | {"broken": {"bits_per_byte": {0: None}}})
    tree = json.loads(table.json(), parse_constant=pytest.fail)
    assert (tree["base"], tree["level"]) == ("softmax", 0.05)
    cells = {(one["arm"], one["metric"]): one for one in tree["cells"]}
    assert set(cells) == set(table.cells)
    one, cell = cells[LONG, "bits_per_byte"], table.cells[LONG, "bits_per_byte"]
    assert (one["mean"], one["p"], one["verdict"], one["n"]) == (cell.mean, cell.p, "better", 5)
    assert (one["difference_low"], one["difference_bootstrap_low"]) == (
        cell.difference.low,
        cell.difference.bootstrap[0],
    )
    assert cells["broken", "bits_per_byte"]["mean"] is None


def test_a_frame_has_the_same_numbers():
    pytest.importorskip("pandas")
    table = make_table(RESULTS)
    frame = table.pandas()
    assert list(frame.index) == ARMS
    assert frame.loc["lion", ("bits_per_byte", "difference")] == table.cells["lion", "bits_per_byte"].difference.mean
    assert frame["tokens_per_s"]["verdict"].tolist()[1:] == ["tie", "better", "worse"]
    assert frame["tokens_per_s"]["verdict"].isna().tolist() == [True, False, False, False]
    assert list(frame["params"]["mean"]) == [2_212_288, 2_212_288, 2_300_000, 2_212_288]


def test_without_pandas_there_is_a_way_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"pip install pandas; or use table\.json"):
        make_table(RESULTS).pandas()


@pytest.mark.parametrize(
    ("value", "half", "shown"),
    [
        (1.68234, 0.0042, "1.6823 ± 0.0042"), (12345.6, 234, "12,346 ± 234"), (2_212_288, math.nan, "2,212,288"),
        (1.5e9, math.nan, "1.5e+09"), (1.5e9, 2e7, "1.5e+09 ± 2e+07"), (0.25, math.nan, "0.2500"), (0, math.nan, "0"),
        (0, 0.013, "0.000 ± 0.013"), (math.nan, math.nan, "-"), (-0.5, 0, "-0.5000"), (3e-7, 1e-8, "3e-07 ± 1e-08"),
    ],
)  # fmt: skip
def test_numbers_have_the_digits_that_are_known(value, half, shown):
    assert number(value, half) == shown


def test_p_values_are_never_zero():
    assert [p_value(p) for p in (0, 0.0042, 0.0501, 0.4567, 1, math.nan)] == [
        "<0.001",
        "0.004",
        "0.050",
        "0.46",
        "1.00",
        "",
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_table({}), "at least one arm"),
        (lambda: make_table(RESULTS, base="gla"), r"base = 'gla': must be one of softmax, window"),
        (lambda: make_table(RESULTS, ["bits"]), r"no arm has the metric 'bits': there are bits_per_byte"),
    ],
)
def test_errors_say_what_there_is(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
