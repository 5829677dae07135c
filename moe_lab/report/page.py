"""One HTML page that needs nothing else: the frame, the style, tables."""

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from pathlib import Path

from moe_lab.errors import RunError
from moe_lab.io.files import write_text
from moe_lab.report.palette import level_rules

# Blue, vermilion, green, purple, ochre, grey, brown, sky after Okabe and Ito, which the colour-blind tell apart;
# lighter on dark ground. Where more than four are seen at once, marks of different shape go with them (scatter.py).
_STYLE = """
:root{color-scheme:light dark;--ground:#fff;--panel:#f6f7f9;--text:#1b1f24;--soft:#5b6470;--edge:#d9dde3;
--c1:#0072b2;--c2:#d55e00;--c3:#00795a;--c4:#9c4a82;
--c5:#a87400;--c6:#5b6470;--c7:#7a3b12;--c8:#3d8fc4;--accent:#0072b2;--hot:#0b559f;--on-hot:#fff}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--panel:#1d2126;--text:#e6e9ed;--soft:#9ba5b1;--edge:#343a42;
--c1:#56b4e9;--c2:#f0a04b;--c3:#3fc79a;--c4:#d89cc6;
--c5:#e8c547;--c6:#b4bcc6;--c7:#c98a5e;--c8:#9fd4f2;--accent:#56b4e9;--hot:#8cc8ff;--on-hot:#000}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.7rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.8rem 0 .5rem;padding-top:1rem;border-top:1px solid var(--edge)}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
p{margin:.4rem 0;max-width:75ch}
.soft,figcaption,caption{color:var(--soft);font-size:.9rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:.75rem;margin:1.25rem 0 0;padding:0}
.cards div{background:var(--panel);border-radius:8px;padding:.7rem .9rem}
.cards dt{color:var(--soft);font-size:.85rem}
.cards dd{margin:0;font-size:.85rem}
.cards dd:nth-of-type(1){font-size:1.45rem;font-weight:600;white-space:nowrap;line-height:1.3;
font-variant-numeric:tabular-nums}
.pair{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:1rem 2rem;align-items:start}
figure{margin:.5rem 0;min-width:0}
.chart{display:block;width:100%;height:auto;font-size:12px}
.chart text{fill:var(--text);font-variant-numeric:tabular-nums}
.chart .label{fill:var(--soft)}.chart .cell{font-size:10px}
.mid{text-anchor:middle}.end{text-anchor:end}
.grid{stroke:var(--edge);stroke-width:1;fill:none}.axis{stroke:var(--soft);fill:none}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.dot{fill:none;stroke:currentColor;stroke-width:6;stroke-linecap:round}
.faint{stroke-width:1;opacity:.4}.dashed{stroke-dasharray:5 4}
.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}
.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}.c8{color:var(--c8)}
.mark{fill:currentColor;stroke:var(--ground);stroke-width:1}.thin{stroke-width:1.2;fill:none;stroke:currentColor;opacity:.75}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;list-style:none;margin:.2rem 0;padding:0;font-size:.85rem}
.legend li{display:flex;align-items:center;gap:.35rem}
.legend i{width:.9rem;height:.9rem;border-radius:3px;display:inline-block}
.key{width:26px;height:8px}.key.tall{height:12px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;margin:.4rem 0}
caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.25rem .8rem .25rem 0;text-align:left;border-bottom:1px solid var(--edge);vertical-align:top}
th{font-weight:600}.sortable thead th{cursor:pointer}.sortable tbody th{white-space:nowrap}
th[aria-sort=ascending]::after{content:" \\2191"}
th[aria-sort=descending]::after{content:" \\2193"}a{color:var(--accent)}
.n{text-align:right}td.wrap{overflow-wrap:anywhere;min-width:10rem}
.bar{display:inline-block;height:.7rem;background:var(--accent);border-radius:2px}
pre{overflow-x:auto}
.passage{white-space:pre-wrap;overflow-wrap:anywhere;font:.9rem/1.75 ui-monospace,monospace;max-width:none;
background:var(--panel);border-radius:8px;padding:.9rem 1rem;margin:.6rem 0}
.passage span{border-radius:3px;padding:.1em 0}
.passage span:hover{outline:2px solid var(--text)}
.passage i::before{content:"\\21b5";opacity:.6;font-style:normal}
.told{display:block;min-height:3em;font-size:.9rem;color:var(--soft);overflow-wrap:anywhere}
.ramp{display:inline-flex;align-items:center;gap:.5rem;font-size:.85rem}
.ramp b{display:inline-flex;border-radius:3px;overflow:hidden}.ramp u{width:.5rem;height:1rem}
details{margin:.5rem 0}summary{cursor:pointer;font-weight:600}
code{font:.88em ui-monospace,monospace;overflow-wrap:anywhere}
@media(max-width:600px){.chart{font-size:15px}.chart .cell{font-size:11px}th,td{padding-right:.6rem}}
@media print{details::details-content{content-visibility:visible}}
"""

# A tooltip needs a mouse; this shows the same words under the passage, for a finger too. And tables that can be sorted:
# by number where both cells are one (12.3k, 3.21 ± 0.01), else as text.
_SCRIPT = """
for (const passage of document.querySelectorAll(".passage")) {
  const tell = (event) => {
    const token = event.target.closest("span[title]");
    if (token) passage.nextElementSibling.textContent = JSON.stringify(token.textContent) + ": " + token.title;
  };
  passage.addEventListener("pointerover", tell);
  passage.addEventListener("click", tell);
}
const value = (row, column) => row.cells[column].textContent.trim();
const size = (text) => {
  const found = text.replaceAll(",", "").match(/^(-?[\\d.]+)([kMGTPE]?)(?: ±.*)?$/);
  return found ? found[1] * 1e3 ** " kMGTPE".indexOf(found[2] || " ") : NaN;
};
for (const title of document.querySelectorAll("table.sortable th[scope=col]")) {
  title.tabIndex = 0;
  const sort = () => {
    const down = title.getAttribute("aria-sort") === "ascending";
    for (const other of title.parentNode.cells) other.removeAttribute("aria-sort");
    title.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = title.closest("table").tBodies[0];
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a, title.cellIndex), value(b, title.cellIndex)];
      const apart = size(x) - size(y);
      return (Number.isNaN(apart) ? x.localeCompare(y, "en", {numeric: true}) : apart) * (down ? -1 : 1);
    });
    body.append(...rows);
  };
  title.addEventListener("click", sort);
  title.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}
"""


def page(title: str, head: str, sections: Sequence[tuple[str, str]]) -> str:
  """Returns the document.

  Args:
    title: plain text.
    head: HTML under the title.
    sections: (plain heading, HTML body), in order.
  """
  digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
  # The browser itself refuses anything from outside, even if some text slipped through unescaped.
  policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
  style = re.sub(r"\n", "", _STYLE) + level_rules()
  bodies = "".join(
    f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{body}</section>\n' for name, body in sections
  )
  return (
    f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{style}</style></head>\n'
    f"<body><main><header><h1>{escape(title)}</h1>{head}</header>\n{bodies}</main><script>{_SCRIPT}</script></body></html>\n"
  )


def escape(text: object) -> str:
  """Returns text for HTML; characters that HTML does not allow as their visible pictures."""
  shown = "".join(
    chr(0x2400 + ord(c))
    if c < " " and c not in "\n\t"
    else "\N{REPLACEMENT CHARACTER}"
    if "\ud800" <= c <= "\udfff" or "\x7f" <= c <= "\x9f"
    else c
    for c in str(text)
  )
  return html.escape(shown)


def table(
  head: Sequence[str],
  rows: Sequence[Sequence[str]],
  *,
  caption: str = "",
  text_columns: int = 1,
  sortable: bool = False,
) -> str:
  """Returns a table; cells are HTML.

  Args:
    head: plain column titles.
    rows: cells; the first of a row is its heading.
    caption: plain text above.
    text_columns: how many columns, from the left, are text; the others are numbers, set to the right.
    sortable: whether a click on a title sorts the rows.
  """

  def kind(column: int) -> str:
    return "" if column < text_columns else ' class="n"'

  top = "".join(f'<th scope="col"{kind(i)}>{escape(name)}</th>' for i, name in enumerate(head))
  body = ""
  for row in rows:
    cells = "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row[1:], 1))
    body += f'<tr><th scope="row">{row[0]}</th>{cells}</tr>'
  above = f"<caption>{escape(caption)}</caption>" if caption else ""
  opening = '<table class="sortable">' if sortable else "<table>"
  return f'<div class="scroll">{opening}{above}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(drawing: str, caption: str) -> str:
  """Returns a drawing with its caption (plain text); "" when there is no drawing."""
  return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>" if drawing else ""


def note(text: str) -> str:
  return f'<p class="soft">{escape(text)}</p>'


def _anchor(name: str) -> str:
  return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_page(path: Path, document: str) -> Path:
  """Writes a document and returns its place; RunError where it cannot be written."""
  try:
    write_text(path, document)
  except OSError as error:
    raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
  return path
