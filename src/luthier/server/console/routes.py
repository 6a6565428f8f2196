"""Routes of the console's static files, which contain no account data and need no key.

The server reads the files at the start; request paths never reach the disk. The pages call
``/api/v1`` and ``/v1`` with the user's key. The console's path is reserved and cannot name a
bucket. Signed or otherwise authorized requests belong to the other APIs.
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
"""Media types by suffix; other files are not served."""
_REPORT = re.compile(r"(?:/\w+)+/evals/(?P<eval>\w+)/runs/(?P<run>\w+)/report", re.ASCII)
"""Path of the ``report_url`` of an eval run."""
HEADERS = {
    # Only scripts of this server: no other origins, no inline code, no frames.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Browsers revalidate each time, so that a page loaded after an update gets the new modules.
    "Cache-Control": "no-cache",
}
"""Headers of every response."""


@dataclass(frozen=True)
class StaticFile:
    """The content and headers of a file."""

    content: bytes
    media: str
    etag: str


def read_files() -> dict[str, StaticFile]:
    """Return the files of the package by request path."""
    folder = resources.files(__package__).joinpath("static")
    found = {}
    for prefix, each in (
        *(("", each) for each in folder.iterdir()),
        *(("vendor/", each) for each in folder.joinpath("vendor").iterdir()),
    ):
        media = _TYPES.get(f".{each.name.rpartition('.')[2]}")
        if media is None:
            continue
        content = each.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        found[f"{ROOT}{prefix}{each.name}"] = StaticFile(content, media, etag)
    found[ROOT] = found[f"{ROOT}index.html"]
    return found


class Console:
    """API for browsers, without authentication."""

    name = "console"

    def __init__(self) -> None:
        self._files = read_files()

    def serves(self, head: RequestHead, service: str) -> bool:
        """Return True if the request is for the console and has no authorization.

        Browsers that open the root of the server or the report of an eval are redirected.
        """
        if service or any(name == "authorization" for name, _ in head.headers):
            return False
        if head.path == "/" or _REPORT.fullmatch(head.path):
            return head.method in ("GET", "HEAD") and not head.query and _wants_page(head)
        return f"{head.path}/" == ROOT or head.path.startswith(ROOT)

    def respond(self, head: RequestHead) -> Response:
        """Return the file at the path, without access to disk or database."""
        if head.method not in ("GET", "HEAD"):
            return _text(405, "The console's files are read with GET.", Allow="GET, HEAD")
        if head.path in ("/", ROOT.rstrip("/")):
            return _text(302, "The console is at /console/.", Location=ROOT)
        if report := _REPORT.fullmatch(head.path):
            place = f"{ROOT}#/evals/{report['eval']}/runs/{report['run']}"
            return _text(302, "The report is shown in the console.", Location=place)
        file = self._files.get(head.path)
        if file is None and _wants_page(head):
            # The console shows the page of this name, or that there is none.
            page = f"{ROOT}#/{head.path.removeprefix(ROOT)}"
            return _text(302, "The pages of the console are in the fragment.", Location=page)
        if file is None:
            return _text(404, "There is no such file. The console is at /console/.")
        headers = {**HEADERS, "Content-Type": file.media, "ETag": file.etag}
        if _is_known(head, file.etag):
            return Response(304, b"", headers)
        if head.method == "HEAD":
            return Response(200, b"", {**headers, "Content-Length": str(len(file.content))})
        return Response(200, file.content, headers)


def _wants_page(head: RequestHead) -> bool:
    """Return True if a browser requests a page; API clients accept JSON, XML or any type."""
    return any(name == "accept" and "text/html" in value for name, value in head.headers)


def _is_known(head: RequestHead, etag: str) -> bool:
    """Return True if the browser has the current version (RFC 9110, section 13.1.2)."""
    given = ",".join(value for name, value in head.headers if name == "if-none-match")
    tags = {each.strip().removeprefix("W/") for each in given.split(",")}
    return etag in tags or "*" in tags


def _text(status: int, text: str, **headers: str) -> Response:
    plain = {"Content-Type": "text/plain; charset=utf-8"}
    return Response(status, f"{text}\n".encode(), {**HEADERS, **plain, **headers})
