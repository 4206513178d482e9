"""A hook of mkdocs: links to files of the repository lead there from build/docs too."""

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../", "](../../")
