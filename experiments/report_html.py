"""Blocks as one HTML page that stands alone: style, figures and images inside, no script, nothing fetched.

It does not know where the blocks came from; every text passes `_text`, the only way into the page.
"""

from base64 import b64encode
from collections.abc import Iterable
from html import escape

from experiments.display import without_paths
from experiments.report_blocks import (
    Block,
    Cell,
    Command,
    Gallery,
    Heading,
    Notes,
    Paragraph,
    Photo,
    Picture,
    Table,
)
from experiments.report_page import PAGE, STYLE


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
