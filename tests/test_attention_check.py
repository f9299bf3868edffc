"""The self-check passes what is right and fails what is broken, whichever of its three comparisons notices."""

import json

import jax
import numpy as np
import pytest

from slm import attention
from slm.attention import check


def test_two_operations_are_right(tmp_path, capsys):
    assert check.main(["--only", "decay scalar", "--json", str(tmp_path / "table.json")]) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["implementation"] for row in table["rows"]] == ["recurrent", "chunked", "pallas (interpreted)"]
    for row in table["rows"]:
        assert row["verdict"] == "ok"
        # Float32 against float64: equal results would mean that something is compared with itself.
        assert 0 < row["output"] < 2e-5
        assert 0 < row["state"] < 2e-5
        assert 0 < row["gradients"] < 5e-5
    assert check.main(["--only", "softmax sinks"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not available: does not serve these") == 2
    assert "none of 4 failed" in printed


def test_operations_and_names():
    assert [case.operation for case in check.cases("float32")] == [
        "softmax",
        "softmax window",
        "softmax sinks, soft cap, documents",
        "softmax forget gates, documents",
        "block-sparse",
        "moba",
        "nsa",
        "token indexer",
        "linear",
        "decay scalar",
        "decay channel",
        "rwkv6",
        "delta",
        "gated delta",
        "kimi delta",
        "dplr",
        "log-linear",
        "log-linear, documents",
    ]
    with pytest.raises(SystemExit):
        check.main(["--only", "perceiver"])


def off_by(out, state, gradient):
    """`decay_attention` with its results times these factors; `gradient` only touches the backward pass, that of k."""

    @jax.custom_vjp
    def alter(k):
        return k

    alter.defvjp(lambda k: (k, None), lambda _, d_k: (d_k * gradient,))
    right = attention.decay_attention

    def altered(k, **arguments):
        results = right(k=alter(k), **arguments)
        return results[0] * out, results[1] * state

    return altered


@pytest.mark.parametrize(
    ("factors", "wrong"), [((1 + 1e-4, 1, 1), "output"), ((1, 1 - 1e-4, 1), "state"), ((1, 1, 1 + 1e-3), "gradients")]
)
def test_what_is_broken_fails(factors, wrong, monkeypatch):
    monkeypatch.setattr(attention, "decay_attention", off_by(*factors))
    (case,) = (case for case in check.cases("float32") if case.operation == "decay scalar")
    case = case._replace(forms={"recurrent": case.forms["recurrent"]})
    monkeypatch.setattr(check, "cases", lambda dtype: [case])
    (row,) = check.check()
    assert row.verdict == "FAIL"
    limits = dict(zip(("output", "state", "gradients"), check.LIMITS["float32"]))
    assert next(name for name, limit in limits.items() if getattr(row, name) > limit) == wrong


def test_nan_and_errors_fail(monkeypatch, capsys):
    case = check.cases("float32")[0]._replace(
        forms={
            "nan": lambda q, **_: (q * np.nan, None),
            "error": lambda **_: 1 / 0,
            "none": "needs a unicorn",
        }
    )
    monkeypatch.setattr(check, "cases", lambda dtype: [case])
    assert check.main([]) == 1
    assert "2 of 3 failed" in capsys.readouterr().out
    nan, error, none = check.check()
    assert nan.verdict == "FAIL"
    assert error.verdict == "FAIL: ZeroDivisionError: division by zero"
    assert none.verdict == "not available: needs a unicorn"
