"""The server's page at `/` and the description of its API at `/docs`: files as they are, without any library, build or
foreign address.

They need no API key and hold no data of the server: that they fetch, with a key.
"""

from functools import partial
from pathlib import Path

from fastapi import APIRouter, Response

from kshot.errors import KshotError

HERE = Path(__file__).parent
FILES = {  # path: file, content type
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/try.js": ("try.js", "text/javascript; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/page/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def routes() -> APIRouter:
    """GET and HEAD of the page and its two files. Raises KshotError where one is not installed."""
    router = APIRouter(include_in_schema=False)
    for path, (name, kind) in FILES.items():
        try:
            response = Response((HERE / name).read_bytes(), media_type=kind, headers=HEADERS)
        except OSError as error:
            raise KshotError(f"the server's {name} cannot be read ({error.strerror}); install kshot again") from error
        router.add_api_route(path, partial(_same, response), methods=["GET", "HEAD"])
    return router


async def _same(response: Response) -> Response:
    return response
