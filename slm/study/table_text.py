"""A study's table as text, Markdown and LaTeX: numbers to the digits that their intervals leave.

`table` is a slm.study.table.Table, `cell` one of its cells; that module imports this one.
"""

import math
import re
import textwrap
from typing import Any

LONGEST_NAME, SHORTEST_NAME = 32, 16
"""Columns of an arm's name in a terminal, by the room that there is; longer ones are broken into lines."""
_SIGN = {"better": "better", "worse": "worse", "tie": "tie", "unknown": "?", None: ""}


def number(value: float, half: float = math.nan, sign: bool = False) -> str:
    """`1.6823 ± 0.0042`: two digits of the half width; without one, four digits, or a whole number in full."""
    plus = "+" if sign else ""
    if not math.isfinite(value):
        return "-"
    known = math.isfinite(half) and half > 0
    size = max(abs(value), half if known else 0)
    if size >= 1e7 or 0 < size < 1e-4:
        return f"{value:{plus}.4g}" + (f" ± {half:.2g}" if known else "")
    if not known:
        return f"{value:{plus},.0f}" if value == int(value) else f"{value:{plus},.{_decimals(value, 4)}f}"
    decimals = min(_decimals(half, 2), 6)
    return f"{value:{plus},.{decimals}f} ± {half:,.{decimals}f}"


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


def p_value(p: float) -> str:
    return "" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def words(cell: Any) -> tuple[str, str, str, str]:
    """Mean, difference, p, verdict."""
    mean = number(cell.mean, (cell.high - cell.low) / 2)
    if cell.difference is None:
        return mean, "", "", ""
    half = cell.difference.half_width if cell.verdict else math.nan
    return mean, number(cell.difference.mean, half, sign=True), p_value(cell.p), _SIGN[cell.verdict]


def columns_of(table: Any, metric: str) -> tuple[list[str], list[list[str]]]:
    """(heads, rows) of one metric, without the columns that would be empty."""
    heads = [metric, "difference", "p", "verdict"]
    rows = [list(words(table.cells[arm, metric])) for arm in table.arms]
    kept = [0] + [i for i in (1, 2, 3) if any(row[i] for row in rows)]
    return [heads[i] for i in kept], [[row[i] for i in kept] for row in rows]


def text(table: Any, columns: int = 100) -> str:
    """Blocks of metrics, one below the other, no line longer than `columns` as long as one metric fits."""
    made = []
    for metric in table.metrics:
        heads, rows = columns_of(table, metric)
        widths = [max(len(head), *(len(row[i]) for row in rows)) for i, head in enumerate(heads)]
        made.append((heads, rows, widths, sum(widths) + 2 * len(widths) + 1))
    room = columns - max((needs for *_, needs in made), default=0)
    names = [textwrap.wrap(arm, max(SHORTEST_NAME, min(LONGEST_NAME, room))) or [""] for arm in table.arms]
    first = max(len(line) for name in names for line in name)
    blocks: list[list[tuple[list[str], list[list[str]], list[int]]]] = [[]]
    used = first
    for heads, rows, widths, needs in made:
        if blocks[-1] and used + needs > columns:
            blocks.append([])
            used = first
        blocks[-1].append((heads, rows, widths))
        used += needs
    parts = []
    for block in blocks:
        lines = [" " * first + "".join(_line(heads, widths) for heads, _, widths in block)]
        for i, name in enumerate(names):
            lines.append(name[0].ljust(first) + "".join(_line(rows[i], widths) for _, rows, widths in block))
            lines += name[1:]
        parts.append("\n".join(line.rstrip() for line in lines))
    notes = [textwrap.fill(f"- {note}", columns, subsequent_indent="  ") for note in table.notes]
    return "\n\n".join([*parts, "\n".join(notes)])


def _line(cells: list[str], widths: list[int]) -> str:
    # What says better or worse stands behind the numbers, as text does.
    return " " + "".join(
        "  " + (cell.rjust(width) if i < 3 else cell.ljust(width)) for i, (cell, width) in enumerate(zip(cells, widths))
    )


def markdown(table: Any) -> str:
    heads, rows = ["arm"], [[arm] for arm in table.arms]
    for metric in table.metrics:
        more, cells = columns_of(table, metric)
        heads += more
        rows = [row + cell for row, cell in zip(rows, cells)]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    made = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*made, "", *(f"- {note}" for note in table.notes)]) + "\n"


def latex(table: Any) -> str:
    heads, rows = ["arm"], [[_escaped(arm)] for arm in table.arms]
    for metric in table.metrics:
        more, cells = columns_of(table, metric)
        heads += more
        for row, cell, arm in zip(rows, cells, table.arms):
            bold = table.cells[arm, metric].verdict == "better"
            # Without a difference there is neither p nor verdict: all cells are numbers then.
            row += [one if one in _SIGN.values() else _math(one, bold and i == 1) for i, one in enumerate(cell)]
    lines = [
        *(f"% {note}" for note in table.notes),
        f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
        "\\toprule",
        " & ".join(_escaped(head) for head in heads) + " \\\\",
        "\\midrule",
        *(" & ".join(row) + " \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _math(cell: str, bold: bool) -> str:
    if cell == "-":
        return "--"
    made = re.sub(r"e([+-])0*(\d+)", lambda m: f" \\times 10^{{{m[1].strip('+')}{m[2]}}}", cell)
    made = made.replace("±", "\\pm").replace(",", "{,}")
    return f"$\\mathbf{{{made}}}$" if bold else f"${made}$"


def _escaped(words: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in words)
