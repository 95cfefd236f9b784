"""The HTML page: no script, nothing from elsewhere, all text escaped. And the files of a report."""

import base64
from collections.abc import Iterable
from html import escape
from pathlib import Path

from hmoe_megatron.files import atomic_write
from hmoe_megatron.tools.report.drawing import Drawn

MAX_ROWS = 20_000  # of the experts' tables
OPEN_LAYERS = 4  # tables that are shown unfolded
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 1rem 0; }
dt { color: #595959; font-size: .85rem; } dd { margin: 0; font-size: 1.15rem; font-weight: 600; }
figure { margin: 1.5rem 0; } img { width: 100%; height: auto; } figcaption { color: #595959; font-size: .9rem; }
.note { background: #fff4e5; border-left: 4px solid #d55e00; padding: .4rem .8rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .9rem; border-bottom: 1px solid #e5e5e5; white-space: nowrap; }
summary { cursor: pointer; margin: .8rem 0 .3rem; } .idle { color: #b34700; font-weight: 600; }
.tokens { text-align: left; white-space: normal; }
.tokens span { display: inline-block; white-space: nowrap; margin-right: .7em; }
pre { overflow-x: auto; font-size: .85rem; background: #f6f6f6; padding: .8rem; }
pre.text { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { figure { overflow-x: auto; } img { width: 44rem; max-width: none; }
  th, td { padding: .15rem .3rem; font-size: .85rem; } th { white-space: normal; vertical-align: bottom; } }
"""


def html_page(title: str, facts: dict[str, str], notes: list[str], sections: list[tuple[str, str]]) -> bytes:
    """The page in UTF-8. sections: (heading or "", HTML); all else is escaped here."""
    title = escape(title)
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    noted = "".join(f'<p class="note">{escape(note)}</p>\n' for note in notes)
    parts = "".join((f"<h2>{escape(heading)}</h2>\n" if heading else "") + f"{html}\n" for heading, html in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<dl>{pairs}</dl>
{noted}{parts}</body>
</html>
""".encode(errors="replace")


def figures(drawn: Drawn) -> str:
    """The pictures in the page itself."""
    parts = []
    for png, caption in drawn.values():
        caption, data = escape(caption), base64.b64encode(png).decode()
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n")
    return "".join(parts)


def layer_table(place: int, summary: str, heads: Iterable[str], rows: Iterable[Iterable[str]], of_last="") -> str:
    """A table that folds. place: of the layer, from 0; heads and cells are HTML already; of_last: class of the last
    column."""
    last = f' class="{of_last}"' if of_last else ""

    def line(kind: str, cells: Iterable[str]) -> str:
        *before, end = cells
        return "<tr>" + "".join(f"<{kind}>{cell}</{kind}>" for cell in before) + f"<{kind}{last}>{end}</{kind}></tr>"

    body = "\n".join(line("td", cells) for cells in rows)
    return (
        f"<details{' open' if place < OPEN_LAYERS else ''}><summary>{escape(summary)}</summary>\n"
        f'<div class="wide"><table><thead>{line("th", heads)}</thead>\n<tbody>{body}</tbody></table></div></details>'
    )


def write_files(page: Path, html: bytes, png_dir: Path, drawn: Drawn, names: Iterable[str]) -> list[Path]:
    """Write the pictures, then the page, each atomically; returns their paths, the page first.

    names: of all pictures that such a report may have: those of an earlier one that this one lacks are removed.
    Missing directories are made.
    """
    files = {png_dir / name: png for name, (png, _) in drawn.items()}
    for old in {png_dir / name for name in names} - files.keys():
        old.unlink(missing_ok=True)
    for path, content in (files | {page: html}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    return [page, *files]
