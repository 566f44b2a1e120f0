"""The report of `kvm2 conform` as one HTML file: nothing from outside, no scripts, light and dark, wide and narrow.

Everything that comes from answers, scenarios or the command line passes through `escape`.
"""

from __future__ import annotations

import json
from html import escape
from typing import TYPE_CHECKING

from kvm2.lab.compare import Difference, register_changes
from kvm2.lab.conform import group_of, state_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kvm2.lab.compare import Verdict
    from kvm2.lab.conform import Conformance

# An answer longer than this (a memory page, a register list) is cut; the JSON report has all of it.
LONGEST = 600
CELL, GAP, LABEL, PER_ROW = 16, 3, 74, 18
STATES = {"equal": "equal", "named": "named differences only", "different": "others"}

STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --soft: #5b6675; --paper: #ffffff; --card: #f4f6f9; --line: #dde3ea;
  --equal: #3f9b6d; --named: #d69a2d; --different: #cf4540; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf2; --soft: #9aa7b7; --paper: #12171e; --card: #1b222c; --line: #2d3743;
    --equal: #4fae7f; --named: #e0ad4a; --different: #ee6a63; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.2rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; line-height: 1.25; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.soft { color: var(--soft); }
.badge { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; color: #fff; font-weight: 600; }
.badge.equal { background: var(--equal); } .badge.named { background: var(--named); }
.badge.different { background: var(--different); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; padding: 0; }
.tiles li { list-style: none; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; max-width: 36rem; } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
svg .equal { fill: var(--equal); } svg .named { fill: var(--named); } svg .different { fill: var(--different); }
svg .mark { stroke: var(--paper); stroke-width: 2; }
.wide { overflow-x: auto; } .wide th { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
td.n { font-variant-numeric: tabular-nums; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
details { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .5rem .8rem;
  margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
"""


def page(done: Conformance) -> str:
    """The whole document."""
    title = f"{done.place.name} against {done.judge.name}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"/>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<title>{escape(title)}: kvm2 conform</title><style>{STYLE}</style></head><body>",
        *_summary(done, title),
        *_matrix(done.report.verdicts),
        *_groups(done),
        *_differences(done),
        *_faults(done.report.faults),
        *_environment(done),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(done: Conformance, title: str) -> Iterator[str]:
    totals = done.report.totals()
    unnamed = totals["different"] - totals["named"]
    state = "different" if not done.report.ok else state_of(totals["different"], totals["named"])
    word = {"equal": "equal", "named": "every difference has a name", "different": f"{unnamed} without a name"}[state]
    if done.report.faults and not unnamed:
        word = "something went wrong inside"
    yield f'<header><h1>{escape(title)}</h1><p><span class="badge {state}">{word}</span></p></header>'
    share = f"{100 * totals['equal'] / totals['steps']:.2f} %" if totals["steps"] else "nothing compared"
    tiles = (
        (str(len(done.report.verdicts)), "scenarios"),
        (str(totals["steps"]), "steps compared"),
        (share, f"equal ({totals['equal']})"),
        (str(totals["different"]), f"different, {totals['named']} of them named"),
        (str(totals["untrusted"]), "not believed"),
    )
    yield '<ul class="tiles">' + "".join(f"<li><b>{n}</b>{escape(what)}</li>" for n, what in tiles) + "</ul>"
    for note in done.why:
        yield f'<p class="soft">{escape(note)}</p>'
    if done.report.without_record:
        yield f"<p>Without answers to compare with: {escape(', '.join(done.report.without_record))}</p>"


def _by_group(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(group_of(verdict.scenario), []).append(verdict)
    return found


def _matrix(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """A square for each scenario, a band for each group; what differs is marked, not only coloured."""
    y, shapes, pitch = 4, [], CELL + GAP
    for group, members in _by_group(verdicts).items():
        shapes.append(f'<text x="0" y="{y + 12}">{escape(group)}</text>')
        for index, verdict in enumerate(members):
            shapes.append(_cell(LABEL + index % PER_ROW * pitch, y + index // PER_ROW * pitch, verdict))
        y += (len(members) + PER_ROW - 1) // PER_ROW * pitch + 5
    legend, x = [], LABEL
    for state, text in STATES.items():
        legend.append(f'<rect class="{state}" x="{x}" y="{y + 6}" width="12" height="12" rx="3"/>')
        legend.append(f'<text x="{x + 17}" y="{y + 16}">{text}</text>')
        x += 52 if state == "equal" else 158
    width = LABEL + PER_ROW * pitch
    yield "<h2>Scenarios, by group</h2>"
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 24}" role="img">'
    yield "<title>One square for each scenario, coloured by its result</title>"
    yield from shapes
    yield from legend
    yield "</svg>"


def _cell(x: int, y: int, verdict: Verdict) -> str:
    state = state_of(len(verdict.differences), verdict.named)
    says = f"{verdict.scenario}: {verdict.equal} of {verdict.steps} steps equal"
    mark = ""
    if state == "different":
        a, b = 4, CELL - 4
        mark = f'<path class="mark" d="M{x + a} {y + a}L{x + b} {y + b}M{x + b} {y + a}L{x + a} {y + b}"/>'
    elif state == "named":
        mark = f'<path class="mark" d="M{x + 4} {y + CELL // 2}h{CELL - 8}"/>'
    square = f'<rect class="{state}" x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="3"/>'
    return f"<g><title>{escape(says)}</title>{square}{mark}</g>"


def _groups(done: Conformance) -> Iterator[str]:
    rows = []
    for group, members in _by_group(done.report.verdicts).items():
        states = done.groups()[group]
        steps, named = sum(v.steps for v in members), sum(v.named for v in members)
        different = sum(len(v.differences) for v in members)
        numbers = (len(members), *states.values(), steps, different, named, sum(v.untrusted for v in members))
        rows.append((group, *numbers))
    heads = ("group", "scenarios", "equal", "named", "different", "steps", "differ", "named", "not believed")
    yield f'<div class="wide">{_table(heads, rows)}</div>'


def _table(heads: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f'<td class="n">{escape(str(c))}</td>' for c in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _differences(done: Conformance) -> Iterator[str]:
    found = [verdict for verdict in done.report.verdicts if verdict.differences]
    yield f"<h2>Differences ({sum(len(verdict.differences) for verdict in found)})</h2>"
    if not found:
        yield "<p>None.</p>"
    for verdict in found:
        opened = " open=''" if len(verdict.differences) > verdict.named else ""
        head = f"{verdict.scenario}: {verdict.equal} of {verdict.steps} steps equal"
        yield f"<details{opened}><summary>{escape(head)}</summary>"
        rows = "".join(row for difference in verdict.differences for row in _difference(difference))
        heads = f"<th>step</th><th>what</th><th>{escape(done.judge.name)}</th><th>{escape(done.place.name)}</th>"
        yield f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>'


def _difference(difference: Difference) -> Iterator[str]:
    name = f'<br/><span class="badge named">{escape(difference.name)}</span>' if difference.name else ""
    changes = register_changes(difference)
    if changes is None:
        pairs = [(_answer(difference.expected), _answer(difference.got))]
    else:
        pairs = [(f"{key}: {want}", f"{key}: {have}") for key, want, have in changes]
    for number, (want, have) in enumerate(pairs):
        head = f"<td>{difference.step}</td><td><code>{escape(difference.brief)}</code>{name}</td>"
        first = head if number == 0 else "<td></td><td></td>"
        yield f"<tr>{first}<td><code>{escape(want)}</code></td><td><code>{escape(have)}</code></td></tr>"


def _answer(answer: object) -> str:
    text = json.dumps(answer)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text)} characters)"


def _faults(faults: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    if faults:
        yield "<h2>Went wrong inside</h2>"
        for name, lines in faults.items():
            yield f"<p><code>{escape(name)}: {escape('; '.join(lines))}</code></p>"


def _environment(done: Conformance) -> Iterator[str]:
    import platform
    from datetime import UTC, datetime

    from kvm2 import __version__

    played = f"{done.place.name} ({done.place.kind}, {done.place.arch}, pages of {done.place.page_size} bytes)"
    rows = [
        ("kvm2", __version__),
        ("made", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("Python", platform.python_version()),
        ("machine", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("played on", played),
        ("compared with", done.judge.name),
    ]
    header = done.judge.record.header if done.judge.record else {}
    rows += [(f"its {key}", str(header[key])) for key in ("cpu", "qemu", "hello") if key in header]
    yield "<h2>Environment</h2>"
    yield f'<div class="wide">{_table(("what", "is"), rows)}</div>'
