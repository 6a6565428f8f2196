"""Serves the files of the console to everybody: they hold nobody's data, and take no key.

They are read once, at the start, into a table by name; no path of a request ever reaches the disk. What
the pages show they ask of ``/api/v1`` and ``/v1`` with the key of their user.

Its path is no bucket of S3, where the name is reserved; and a request that is signed, or shows any
other authorization, is left to the other faces.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources

from luthier.server.http.messages import RequestHead, Response

ROOT = "/console/"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
"""Media types by the ending of a name; what ends otherwise is not served."""
_REPORT = re.compile(r"(?:/\w+)+/evals/(?P<eval>\w+)/runs/(?P<run>\w+)/report", re.ASCII)
"""``report_url`` of a run of an eval."""
HEADERS = {
    # No script but ours, nothing from elsewhere, no inline code, no frame around it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for again each time, and answered with 304: a page loaded after an update has its modules.
    "Cache-Control": "no-cache",
}
"""Of every answer."""


@dataclass(frozen=True)
class StaticFile:
    """A file as it is sent."""

    content: bytes
    media: str
    etag: str


def read_files() -> dict[str, StaticFile]:
    """The files of the package, by the paths that name them."""
    found = {}
    for each in resources.files(__package__).joinpath("static").iterdir():
        media = _TYPES.get(f".{each.name.rpartition('.')[2]}")
        if media is None:
            continue
        content = each.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        found[ROOT + each.name] = StaticFile(content, media, etag)
    found[ROOT] = found[f"{ROOT}index.html"]
    return found


class Console:
    """Answers to browsers, before anything is asked about who they are."""

    name = "console"

    def __init__(self) -> None:
        self._files = read_files()

    def serves(self, head: RequestHead, service: str) -> bool:
        """Return whether the request is for the console and shows no authorization.

        A browser that opens the root of the server or the report of an eval is redirected.
        """
        if service or any(name == "authorization" for name, _ in head.headers):
            return False
        if head.path == "/" or _REPORT.fullmatch(head.path):
            return head.method in ("GET", "HEAD") and not head.query and _wants_page(head)
        return f"{head.path}/" == ROOT or head.path.startswith(ROOT)

    def respond(self, head: RequestHead) -> Response:
        """The file that the path names; nothing here waits for a disk or a database."""
        if head.method not in ("GET", "HEAD"):
            return _text(405, "The console's files are read with GET.", Allow="GET, HEAD")
        if head.path in ("/", ROOT.rstrip("/")):
            return _text(302, "The console is at /console/.", Location=ROOT)
        if report := _REPORT.fullmatch(head.path):
            place = f"{ROOT}#/evals/{report['eval']}/runs/{report['run']}"
            return _text(302, "The report is shown in the console.", Location=place)
        file = self._files.get(head.path)
        if file is None:
            return _text(404, "There is no such file. The console is at /console/.")
        headers = {**HEADERS, "Content-Type": file.media, "ETag": file.etag}
        if _is_known(head, file.etag):
            return Response(304, b"", headers)
        if head.method == "HEAD":
            return Response(200, b"", {**headers, "Content-Length": str(len(file.content))})
        return Response(200, file.content, headers)


def _wants_page(head: RequestHead) -> bool:
    """Whether a browser asks for a page: clients of APIs take JSON, XML or anything."""
    return any(name == "accept" and "text/html" in value for name, value in head.headers)


def _is_known(head: RequestHead, etag: str) -> bool:
    """Whether the browser has this very version (RFC 9110, section 13.1.2)."""
    given = ",".join(value for name, value in head.headers if name == "if-none-match")
    tags = {each.strip().removeprefix("W/") for each in given.split(",")}
    return etag in tags or "*" in tags


def _text(status: int, text: str, **headers: str) -> Response:
    plain = {"Content-Type": "text/plain; charset=utf-8"}
    return Response(status, f"{text}\n".encode(), {**HEADERS, **plain, **headers})
