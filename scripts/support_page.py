"""The support table as one HTML file: searched in the browser, without a network, and readable without scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from survey_table import WORDS, about, broken_by_transformers, cases

_SHORT = {"position_table": "table", "segment_recurrence": "recurrence", "relative_xl": "xl", "no_position": "none"}
_LEGEND = {
    "stock": "applies; stock transformers loads the saved checkpoint",
    "package": "applies; the saved checkpoint needs this package",
    "no": "does not apply; choose the cell to see why",
    "fails": "applies and breaks an invariant: a bug, please report it",
}


def html(survey: Mapping[str, Any]) -> str:
    """The whole page."""
    reasons: dict[str, int] = {}
    body = "\n".join(_row(name, row, cases(survey["rows"]), reasons) for name, row in survey["rows"].items())
    heads = "".join(f'<th scope="col"><span>{escape(_short(case))}</span></th>' for case in cases(survey["rows"]))
    options = "".join(f'<option value="{n}">{escape(case)}</option>' for n, case in enumerate(cases(survey["rows"])))
    results = "".join(f"<option>{word}</option>" for word in WORDS.values())
    legend = "".join(f'<li><span class="{word}">{word}</span> {escape(said)}</li>' for word, said in _LEGEND.items())
    return _PAGE.format(
        about=escape(about(survey)),
        legend=legend,
        options=options,
        results=results,
        heads=heads,
        body=body,
        reasons=json.dumps(list(reasons), ensure_ascii=False).replace("<", "\\u003c"),
        broken="\n".join(_broken(survey["rows"])),
    )


def _short(case: str) -> str:
    case = _SHORT.get(case, case)
    return case.replace("grouped_query ", "heads ").removeprefix("rope_scaling ")


def _row(name: str, row: Mapping[str, Any], asked: list[str], reasons: dict[str, int]) -> str:
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(_cells(row, asked, reasons))}</tr>'


def _cells(row: Mapping[str, Any], asked: list[str], reasons: dict[str, int]) -> Iterator[str]:
    for case in asked:
        if case not in row:
            yield "<td></td>"
            continue
        word = WORDS[row[case]["status"]]
        detail = row[case].get("detail", "")
        number = f' data-r="{reasons.setdefault(detail, len(reasons))}"' if detail else ""
        yield f'<td class="{word}"{number}>{word}</td>'


def _broken(rows: Mapping[str, Any]) -> Iterator[str]:
    for name, said in broken_by_transformers(rows):
        yield f"<tr><th>{escape(name)}</th><td>{escape(said)}</td></tr>"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>hf_attnpatch: which patch works on which architecture</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --stock: #0a7a3c; --package: #0060b0; --no: #777; --fails: #c00; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --stock: #5fd38d; --package: #7db8ff; --no: #999; --fails: #ff7b7b; }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .5rem; }}
p, ul {{ max-width: 75ch; }} ul {{ padding-left: 1.2rem; }}
form {{ display: flex; flex-wrap: wrap; gap: .6rem; align-items: center; margin: 1rem 0; }}
input, select {{ font: inherit; padding: .3rem .5rem; max-width: 100%; }} input {{ flex: 1 1 16rem; max-width: 28rem; }}
.wide {{ overflow: auto; max-height: 80vh; border: 1px solid var(--line); }}
table {{ border-collapse: collapse; font-size: 13px; }}
th, td {{ padding: .2rem .5rem; border-bottom: 1px solid var(--line); text-align: left; }}
thead th {{ position: sticky; top: 0; background: Canvas; z-index: 2; }}
#all tbody th {{ position: sticky; left: 0; background: Canvas; font-weight: 500; white-space: nowrap; }}
.stock {{ color: var(--stock); }} .package {{ color: var(--package); }} .no {{ color: var(--no); }}
.fails {{ color: var(--fails); font-weight: 700; }}
td[data-r] {{ cursor: help; text-decoration: underline dotted; text-underline-offset: 3px; }}
#why {{ position: sticky; bottom: 0; background: Canvas; border-top: 2px solid var(--line); padding: .5rem 0; }}
</style>
<h1>Which patch works on which architecture</h1>
<p>{about} Every cell was run. The same table as data: <a href="support.csv">support.csv</a>.</p>
<ul>{legend}</ul>
<p><b>heads down</b>, <b>heads up</b>: GroupedQuery; <b>linear</b> to <b>llama3</b>: RopeScaling; <b>xl</b>: RelativeXl;
<b>table</b>: PositionTable; <b>none</b>: NoPosition; <b>recurrence</b>: SegmentRecurrence.</p>
<form id="ask" onsubmit="return false">
<input id="words" type="search" placeholder="a model type, or words of a reason" aria-label="Search">
<select id="patch" aria-label="Patch"><option value="">any patch</option>{options}</select>
<select id="result" aria-label="Result"><option value="">any result</option>{results}</select>
<output id="count"></output>
</form>
<div class="wide"><table id="all"><thead><tr><th scope="col">type</th>{heads}</tr></thead>
<tbody>
{body}
</tbody></table></div>
<p id="why" aria-live="polite">Choose an underlined cell to read its reason.</p>
<details><summary>Invariants that transformers' own model breaks</summary>
<p>The unpatched model breaks them; behind the name of a patch, transformers' own model of the patched config does.</p>
<div class="wide"><table><tbody>
{broken}
</tbody></table></div></details>
<script type="application/json" id="reasons">{reasons}</script>
<script>
const reasons = JSON.parse(document.getElementById("reasons").textContent);
const rows = [...document.querySelectorAll("#all tbody tr")];
const at = name => document.getElementById(name);
const heads = [...document.querySelectorAll("#all thead th")].map(cell => cell.textContent);
const said = cell => cell.dataset.r === undefined ? "" : reasons[cell.dataset.r];
function show() {{
  const words = at("words").value.toLowerCase().split(/\\s+/).filter(Boolean);
  const patch = at("patch").value, result = at("result").value;
  let shown = 0;
  for (const row of rows) {{
    const cells = [...row.cells].slice(1), name = row.cells[0].textContent.toLowerCase();
    const asked = patch === "" ? cells : [cells[patch]];
    const fits = asked.some(cell => (result === "" || cell.className === result)
      && words.every(word => name.includes(word) || said(cell).toLowerCase().includes(word)));
    row.hidden = !fits;
    shown += fits;
  }}
  at("count").textContent = shown + " of " + rows.length + " types";
}}
at("ask").addEventListener("input", show);
for (const cell of document.querySelectorAll("#all td[data-r]")) cell.tabIndex = 0;
function explain(event) {{
  const cell = event.target.closest("#all td");
  if (!cell) return;
  at("why").textContent = cell.parentNode.cells[0].textContent + ", " + heads[cell.cellIndex] + ": "
    + (said(cell) || cell.textContent);
}}
at("all").addEventListener("click", explain);
at("all").addEventListener("focusin", explain);
at("words").value = decodeURIComponent(location.hash.slice(1));  // support.html#llama
show();
</script>
</html>
"""
