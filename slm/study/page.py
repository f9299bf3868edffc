"""A study as one HTML file: nothing is fetched, pictures are inside, light and dark."""

import base64
import html
import io
import json
import platform
from collections.abc import Sequence
from datetime import date
from typing import Any

import jax

from slm.config import flatten
from slm.study.cells import SHORT
from slm.study.table_text import columns_of, number

LOOK = """
:root { color-scheme: light dark; --line: #8884; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --quiet: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { vertical-align: bottom; } td { vertical-align: top; }
.words { text-align: left; white-space: normal; overflow-wrap: break-word; min-width: 5.5rem; max-width: 30rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; padding-left: 0; }
img { display: block; max-width: max(100%, 38rem); background: white; border-radius: 4px; }
pre { overflow-x: auto; font-size: .8rem; }
@media (max-width: 40rem) { body { margin: 1rem auto; } th, td { padding: .3rem .5rem; } ul { padding-left: 1.2rem; } }
.quiet, figcaption { color: var(--quiet); font-size: .85rem; } .better { font-weight: 700; }
figure { margin: 1rem 0; } figcaption { margin-top: .4rem; }
"""
WORDS = ("arm", "status", "verdict", "why", "solved for", "differs from the base in", "")
"""Heads of columns that hold words; all others hold numbers."""


def page(study: Any, title: str, metrics: Sequence[str] = ()) -> str:
    """The whole file. metrics: of the table and the curves; none: bits_per_byte, or else loss, and params."""
    done = any(row["status"] == "done" for row in study.rows())
    table = study.table(*metrics) if done else None
    shown = table.metrics if done else ()
    drawn = [metric for metric in shown if any(len(c) for by in study.curve(metric).values() for c in by.values())]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class=quiet>{len(study.arms)} arms, seeds {', '.join(map(str, study.seeds))}; {date.today()}</p>",
        "<h2>Result</h2>", _result(table) if done else "<p>No run is done.</p>",
        *(_figure(study.plot(metric), f"{metric}: mean over seeds; the band goes from the lowest to the highest.")
          for metric in drawn),
        _failures(study), _matches(study),
        "<h2>Arms</h2>", _arms(study),
        "<h2>Runs</h2>", _runs(study, shown),
        "<h2>Environment</h2>", _pairs(environment()),
        "<h2>Config of the base</h2>",
        f"<details><summary>{html.escape(study.base)}</summary><pre>"
        f"{html.escape(json.dumps(flatten(study.cell(study.base).config), indent=1, default=str))}</pre></details>",
    ]  # fmt: skip
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{LOOK}</style><body>{''.join(parts)}</body></html>\n"
    )


def environment() -> dict[str, str]:
    """What the study ran on."""
    import numpy

    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} × {device.device_kind} ({device.platform})",
        "python": platform.python_version(), "jax": jax.__version__, "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip


def _result(table: Any) -> str:
    heads, rows = ["arm"], [[html.escape(arm)] for arm in table.arms]
    for metric in table.metrics:
        more, cells = columns_of(table, metric)
        heads += more
        for row, cell, arm in zip(rows, cells, table.arms):
            better = table.cells[arm, metric].verdict == "better"
            row += [f"<span class=better>{html.escape(c)}</span>" if better else html.escape(c) for c in cell]
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return f"{_table(heads, rows)}<ul class=quiet>{notes}</ul>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    kinds = [" class=words" if head in WORDS else "" for head in heads]
    head = "".join(f"<th{kind}>{html.escape(one)}</th>" for kind, one in zip(kinds, heads))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row)) + "</tr>" for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if any(heads) else ""
    return f"<div class=wide><table>{head}<tbody>{body}</tbody></table></div>"


def _figure(figure: Any, words: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    picture = base64.b64encode(file.getvalue()).decode()
    words = html.escape(words)
    image = f"<div class=wide><img alt='{words}' src='data:image/png;base64,{picture}'></div>"
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def _failures(study: Any) -> str:
    rows = [
        [html.escape(row["arm"]), str(row["seed"]), row["status"], html.escape(row.get("error", ""))]
        for row in study.rows()
        if row["status"] != "done"
    ]
    return f"<h2>Not done</h2>{_table(('arm', 'seed', 'status', 'why'), rows)}" if rows else ""


def _matches(study: Any) -> str:
    if not study.matches:
        return ""
    rows = [[html.escape(name), html.escape(one.field), str(one.value), f"{one.ratio:.3f}"]
            for name, one in study.matches.items()]  # fmt: skip
    return f"<h2>Matched</h2>{_table(('arm', 'solved for', 'value', 'of the base'), rows)}"


def _arms(study: Any) -> str:
    base = flatten(study.cell(study.base).config)
    rows = []
    for arm in study.arms:
        own = flatten(study.cell(arm).config)
        differs = [
            f"{path} = {_shown(own[path])}" for path in own if own[path] != base[path] and path not in ("name", "seed")
        ]
        rows.append([html.escape(arm), html.escape(", ".join(differs) or "the base")])
    return _table(("arm", "differs from the base in"), rows)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _runs(study: Any, metrics: Sequence[str]) -> str:
    rows = []
    for row in study.rows():
        cells = [row.get(SHORT.get(metric, metric)) for metric in (*metrics, "seconds")]
        shown = ["-" if cell is None else number(cell) for cell in cells]
        rows.append([html.escape(row["arm"]), str(row["seed"]), row["status"], *shown])
    return _table(("arm", "seed", "status", *metrics, "seconds"), rows)


def _pairs(facts: dict[str, str]) -> str:
    return _table(("", ""), [[html.escape(name), html.escape(value)] for name, value in facts.items()])
