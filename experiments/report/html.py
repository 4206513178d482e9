"""Blocks as one HTML page that stands alone: style, figures and images inside, no script, nothing fetched.

It does not know where the blocks came from; every text passes `_text`, the only way into the page.

TODO The frame of a report's page: its parts in order, and how they look in the light, in the dark and on a phone.

Plain HTML and CSS: no script, nothing fetched. It does not know what a report says.
"""

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from string import Template

from experiments.report.blocks import Block, Cell, Command, Gallery, Heading, Notes, Paragraph, Photo, Picture, Table
from experiments.sweep.provenance import without_paths

# ---- The frame of a report's page: its parts in order, and how they look in the light, in the dark and on a phone.

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<a class="skip" href="#content">Skip to the results</a>
<header>
$header
</header>
<nav aria-label="Contents">
<ol>
$contents
</ol>
</nav>
<main id="content" tabindex="-1">
$body
</main>
</body>
</html>
""")

# Wide things (tables, figures, commands) scroll inside their own box, so the page never does; a figure stays so wide
# that its letters can be read on a phone. It keeps a white card in the dark: its black axes are part of the image.
STYLE = """\
:root { --ink: #1b1f24; --paper: #fff; --soft: #5a6470; --line: #d8dee4;
  --note: #fff6db; --edge: #c98a00; --best: #0b5cad; --focus: #b3005e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #14171b; --soft: #a0a9b4; --line: #343b44;
    --note: #2e2610; --edge: #e0a526; --best: #8cc4ff; --focus: #ff8ac2; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, nav, main { max-width: 68rem; margin: 0 auto; padding: 0 1rem; overflow-wrap: anywhere; }
main { padding-bottom: 3rem; }
main:focus { outline: none; }
:focus-visible { outline: 3px solid var(--focus); outline-offset: 2px; }
a { color: var(--best); }
.skip { position: absolute; left: .5rem; top: -4rem; padding: .6rem 1rem; background: var(--paper); }
.skip:focus { top: .5rem; }
nav ol { display: flex; flex-wrap: wrap; gap: 0 1.25rem; margin: 0 0 1rem; padding: 0; list-style: none; }
nav a { display: inline-block; padding: .35rem 0; }
p { max-width: 46rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.notes { margin: 1rem 0; padding: .6rem 1rem; background: var(--note); border-left: 4px solid var(--edge); }
.notes p { margin: .3rem 0; }
figure { margin: 1rem 0; padding: .5rem; background: #fff; border: 1px solid var(--line); border-radius: 6px;
  overflow-x: auto; }
figure img { display: block; width: 100%; min-width: 28rem; max-width: 44rem; height: auto; margin: 0 auto; }
.scroll { margin: 1rem 0; overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; min-width: 100%; font-size: .875rem;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
caption span { display: block; max-width: min(46rem, calc(100vw - 2rem)); position: sticky; left: 0; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { position: sticky; left: 0; background: var(--paper); text-align: left; white-space: normal;
  overflow-wrap: anywhere; min-width: 7rem; max-width: 14rem; }
thead th { white-space: normal; border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 500; }
@media (min-width: 50rem) { th:first-child { min-width: 12rem; } }
td strong { color: var(--best); }
.wide td { white-space: normal; text-align: left; overflow-wrap: anywhere; }
.wide thead th { text-align: left; }
.gallery { background: none; border: 0; padding: 0; overflow-x: visible; }
.gallery figcaption { font-weight: 500; margin-bottom: .4rem; }
.gallery ul { display: flex; flex-wrap: wrap; gap: .75rem; margin: 0; padding: 0; list-style: none; }
.gallery li { width: 96px; font-size: .75rem; line-height: 1.3; color: var(--soft); }
.gallery img { width: auto; min-width: 0; max-width: 96px; margin: 0 0 .2rem; }
pre { padding: .8rem; border: 1px solid var(--line); border-radius: 6px; overflow-x: auto; font-size: .85rem; }
"""


# ---- Blocks as one HTML page that stands alone: style, figures and images inside, no script, nothing fetched.


def page(title: str, blocks: Iterable[Block]) -> str:
    """The whole page: the title, links to the headings of level 2, and the rest."""
    parts = [*enumerate(blocks)]
    head = [(n, block) for n, block in parts if isinstance(block, Heading) and block.level == 1]
    chapters = [(n, block.text) for n, block in parts if isinstance(block, Heading) and block.level == 2]
    return PAGE.substitute(
        title=_text(title),
        style=STYLE,
        header=_joined(head),
        contents="\n".join(f'<li><a href="#{_anchor(n)}">{_text(text)}</a></li>' for n, text in chapters),
        body=_joined([each for each in parts if each not in head]),
    )


def _joined(parts: Iterable[tuple[int, Block]]) -> str:
    return "\n".join(_block(block, n) for n, block in parts)


def _anchor(n: int) -> str:
    """What a link to block n names: its number, so that no text of a data set becomes an id."""
    return f"part-{n}"


def _block(block: Block, n: int) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{_anchor(n)}">{_text(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Notes(sentences):
            said = "".join(f"<p><strong>Note.</strong> {_text(sentence)}</p>" for sentence in sentences)
            return f'<div class="notes" role="note">{said}</div>'
        case Picture(svg, _, alt):
            source = f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
            box = 'role="group" aria-label="Figure" tabindex="0"'
            return f'<figure {box}><img src="{source}" alt="{_text(alt)}"></figure>'
        case Command(text):
            return f'<pre role="group" aria-label="Command" tabindex="0"><code>{_text(text)}</code></pre>'
        case Gallery(caption, photos):
            items = "".join(f"<li>{_photo(photo)}</li>" for photo in photos)
            return f'<figure class="gallery"><figcaption>{_text(caption)}</figcaption><ul>{items}</ul></figure>'
        case Table():
            return _table(block)


def _photo(photo: Photo) -> str:
    source = f"data:image/jpeg;base64,{b64encode(photo.jpeg).decode()}"
    return f'<img src="{source}" alt="{_text(photo.alt)}"><span>{_text(photo.tag)}</span>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_text(text)}</th>' for text in table.header)
    body = "\n".join(f"<tr>{_row(row)}</tr>" for row in table.rows)
    # Prose wraps instead of scrolling.
    shape = "scroll wide" if table.prose or len(table.header) == 2 else "scroll"
    return (
        f'<div class="{shape}" role="region" aria-label="{_text(table.caption)}" tabindex="0"><table>\n'
        f"<caption><span>{_text(table.caption)}</span></caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _row(row: tuple[Cell, ...]) -> str:
    first, *rest = row
    return f'<th scope="row">{_text(first.text)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in rest)


def _cell(cell: Cell) -> str:
    return f"<strong>{_text(cell.text)}</strong>" if cell.best else _text(cell.text)


def _text(text: str) -> str:
    return escape(without_paths(text))
