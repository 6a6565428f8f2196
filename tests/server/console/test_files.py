"""The files of the console: access, headers and contents."""

from __future__ import annotations

import hashlib
import http.client
import re
import tomllib
from collections.abc import Iterable
from contextlib import closing
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import get_args

import pytest
from luthier_server import KEYS, ONE, Served

import luthier
from luthier.adaptations import ADAPTATIONS
from luthier.exports.export import Format
from luthier.models.base_kinds import KINDS
from luthier.models.formats.gguf import Quantization
from luthier.server.console.routes import HEADERS, ROOT, Console, read_files
from luthier.server.http.messages import RequestHead
from luthier.server.native.jobs import CustomizationType, State
from luthier.server.native.model_operations import Ability
from luthier.server.openai.files import Purpose
from luthier.server.roles import Permission

PACKAGE = Path(luthier.__file__).parent
STATIC = PACKAGE / "server" / "console" / "static"
FILES = sorted(
    path.relative_to(STATIC).as_posix()
    for path in STATIC.rglob("*")
    if path.is_file() and path.suffix != ".txt"
)
OWN = [name for name in FILES if not name.startswith("vendor/")]
MODULES = [name for name in OWN if name.endswith(".js")]
IMPORTED = re.compile(r"\bfrom[ ]?\"(\./[^\"]+)\"")
PACKAGES = {
    "preact.js": "preact",
    "preact-hooks.js": "preact/hooks",
    "signals-core.js": "@preact/signals-core",
}
"""Packages imported by name in vendored files; browsers need paths."""
PAGE = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}


def send(
    server: Served, method: str, path: str, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)) as to:
        to.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            to.putheader(name, value)
        to.endheaders()
        answer = to.getresponse()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, found, answer.read()


def test_console_files_are_public_with_strict_headers(server: Served) -> None:
    assert {"index.html", "style.css", "main.js"} <= {*FILES}
    for name in ("", *FILES):
        status, headers, body = send(server, "GET", ROOT + name)
        assert (status, body) == (200, (STATIC / (name or "index.html")).read_bytes())
        for header, value in HEADERS.items():
            assert headers[header.lower()] == value, (name, header)
        assert headers["content-length"] == str(len(body))
        assert "set-cookie" not in headers
    media = {path: each.media for path, each in read_files().items()}
    assert media[ROOT] == media[f"{ROOT}index.html"] == "text/html; charset=utf-8"
    assert media[f"{ROOT}main.js"] == "text/javascript; charset=utf-8"


def test_security_policy_allows_only_same_origin() -> None:
    policy = {
        name: {*sources}
        for name, *sources in map(str.split, HEADERS["Content-Security-Policy"].split(";"))
    }
    nothing = {"'none'"}
    assert policy["default-src"] == nothing
    for name, sources in policy.items():
        own = {"'self'", "blob:", "data:"} if name in ("img-src", "media-src") else {"'self'"}
        assert sources == nothing or sources <= own, name
    # A missing directive of these allows everything; the default does not apply.
    assert all(policy[name] == nothing for name in ("base-uri", "form-action", "frame-ancestors"))


def test_browser_is_redirected_from_eval_report_to_console(server: Served) -> None:
    path = "/v1/evals/eval_1a/runs/evalrun_2b/report"
    status, headers, _ = send(server, "GET", path, PAGE)
    assert (status, headers["location"]) == (302, "/console/#/evals/eval_1a/runs/evalrun_2b")
    # API clients are not redirected.
    assert send(server, "GET", path)[0] == 401
    assert send(server, "POST", path, PAGE)[0] in (401, 405)
    wrong = {**PAGE, "Authorization": "Bearer sk-wrong"}
    assert send(server, "GET", path, wrong)[0] == 401
    own = {**PAGE, "Authorization": f"Bearer {KEYS[ONE]['api_key']}"}
    assert send(server, "GET", path, own)[0] == 404
    for other in (f"{path}s", "/v1/evals/a%2Fb/runs/c/report", "/v1/evals/eval_1a/runs/evalrun_2b"):
        assert send(server, "GET", other, PAGE)[0] == 401


def test_console_permissions_exist_on_server() -> None:
    code = "".join((STATIC / name).read_text() for name in MODULES)
    named = {*re.findall(r'\bmay\("(\w+)"', code)}
    assert named == {*Permission} - {Permission.IDENTIFY}


def test_matching_etag_returns_304(server: Served) -> None:
    status, headers, _ = send(server, "GET", f"{ROOT}main.js")
    etag = headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        status, headers, body = send(server, "GET", f"{ROOT}main.js", {"If-None-Match": known})
        assert (status, body, headers["etag"]) == (304, b"", etag)
    status, _, body = send(server, "GET", f"{ROOT}main.js", {"If-None-Match": '"other"'})
    assert status == 200 and body


def test_head_returns_headers_of_get(server: Served) -> None:
    _, expected, body = send(server, "GET", ROOT)
    status, headers, none = send(server, "HEAD", ROOT)
    assert (status, none) == (200, b"")
    assert headers["content-length"] == str(len(body))
    assert {**headers, "date": ""} == {**expected, "date": ""}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_console_files_reject_write_methods(server: Served, method: str) -> None:
    for path in (ROOT, f"{ROOT}main.js"):
        status, headers, _ = send(server, method, path)
        assert (status, headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        "x.js", "static/main.js", "../main.js", "..%2f..%2fface.py", "%2e%2e/face.py", "main.js%00",
        "main.js/", "/main.js", "../../../../etc/passwd", "..\\face.py", "face.py", "__init__.py",
        "main%2ejs", "MAIN.JS", "%FF", "main.js;x",
    ],
)  # fmt: skip
def test_unknown_console_path_returns_404(server: Served, path: str) -> None:
    status, headers, body = send(server, "GET", ROOT + path)
    assert status == 404 and headers["content-type"].startswith("text/plain")
    assert b"root:" not in body and path.encode() not in body


def test_query_string_is_ignored(server: Served) -> None:
    assert send(server, "GET", f"{ROOT}?x=1")[2] == send(server, "GET", ROOT)[2]


def test_browser_is_redirected_from_root_to_console(server: Served) -> None:
    for path in ("/", "/console"):
        status, headers, _ = send(server, "GET", path, PAGE)
        assert (status, headers["location"]) == (302, "/console/")


def test_api_clients_are_not_redirected_to_console(server: Served) -> None:
    key = f"Bearer {KEYS[ONE]['api_key']}"
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/xml"}):
        assert send(server, "GET", "/", headers)[0] == 403
    for method, path in (
        ("POST", "/"),
        ("GET", "/?Action=GetCallerIdentity"),
        ("GET", "/consoles"),
    ):
        assert send(server, method, path, PAGE)[0] != 302
    assert send(server, "GET", "/", {**PAGE, "Authorization": key})[0] == 404
    s3 = server.client("s3")
    with pytest.raises(s3.exceptions.ClientError, match="InvalidBucketName"):
        s3.create_bucket(Bucket="console")
    s3.create_bucket(Bucket="data")
    s3.put_object(Bucket="data", Key="page.html", Body=b"mine", ContentType="text/html")
    found = s3.get_object(Bucket="data", Key="page.html")
    headers = found["ResponseMetadata"]["HTTPHeaders"]
    # Stored HTML has the same origin, so the sandbox must disable scripts.
    assert headers["content-type"] == "text/html"
    assert headers["content-security-policy"] == "sandbox"
    assert headers["x-content-type-options"] == "nosniff"


def test_console_opens_no_api_path(server: Served) -> None:
    for path in ("/api/v1/jobs", "/api/v1/whoami", "/v1/models", "/v1/files", "/foundation-models"):
        assert send(server, "GET", path, PAGE)[0] in (401, 403)


def test_console_ignores_requests_with_authorization() -> None:
    console = Console()

    def serves(path: str, service: str = "", *headers: tuple[str, str]) -> bool:
        return console.serves(RequestHead("GET", path, "", headers, tls=False), service)

    assert serves("/console/main.js") and not serves("/console/main.js", "s3")
    assert not serves("/console/main.js", "", ("authorization", "AWS4-HMAC-SHA256 nonsense"))
    assert not serves("/", "", *PAGE.items()) and serves("/", "", ("accept", "text/html"))


class _Page(HTMLParser):
    """Collects names of referenced files and inline code of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.named: set[str] = set()
        self.inline: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.inline += [name for name in given if name.startswith("on") or name == "style"]
        if (tag == "script" and "src" not in given) or tag == "style":
            self.inline.append(tag)
        named = given.get("src") or (given.get("href") if tag == "link" else None)
        if named:
            self.named.add(named)


def test_referenced_files_exist_and_page_has_no_inline_code() -> None:
    page = _Page()
    page.feed((STATIC / "index.html").read_text("utf-8"))
    assert not page.inline
    left, reached = [*page.named], set[str]()
    while left:
        name = left.pop()
        if name in reached:
            continue
        assert name in FILES, name
        reached.add(name)
        if name.endswith(".js"):
            found = IMPORTED.findall((STATIC / name).read_text("utf-8"))
            left += [(PurePosixPath(name).parent / each).as_posix() for each in found]
    assert reached | {"index.html"} == {*FILES}, "files that nothing names"


def test_module_imports_are_exported() -> None:
    exported = {}
    for name in MODULES:
        text = (STATIC / name).read_text("utf-8")
        declared = r"^export (?:async )?(?:function\*?|class|const|let) (\w+)"
        again = "".join(re.findall(r"^export \{([^}]*)\};", text, re.MULTILINE))
        exported[name] = {*re.findall(declared, text, re.MULTILINE), *re.findall(r"\w+", again)}
    for name in MODULES:
        text = (STATIC / name).read_text("utf-8")
        for names, module in re.findall(r'import \{([^}]*)\} from "\./([\w.]+)"', text):
            wanted = {each.split(" as ")[0].strip() for each in names.split(",") if each.strip()}
            assert wanted <= exported[module], (name, module, wanted - exported[module])


def names_in(module: str, constant: str) -> list[str]:
    """Return the items of a constant: strings, the first string of each list, or object keys."""
    text = (STATIC / module).read_text("utf-8")
    found = re.search(
        rf"^(?:export )?const {constant} = (?=[\[{{])(.*?)[\]}}]\)?;$", text, re.M | re.S
    )
    assert found, (module, constant)
    if found[1].startswith("{"):
        return re.findall(r"^  (\w+):", found[1], re.M)
    return re.findall(r'^  \["(\w*)"', found[1], re.M) or re.findall(r'"(\w+)"', found[1])


@pytest.mark.parametrize(
    ("module", "constant", "names"),
    [
        ("exports.js", "FORMATS", get_args(Format)),
        ("exports.js", "TYPES", get_args(Quantization)),
        ("new_job.js", "ADAPTATIONS", ("", *ADAPTATIONS)),
        ("jobs.js", "STATES", get_args(State)),
        ("jobs.js", "CUSTOMIZATIONS", get_args(CustomizationType)),
        ("models.js", "MADE_FOR", KINDS),
        ("playground.js", "TABS", get_args(Ability)),
    ],
)
def test_javascript_constants_match_server(
    module: str, constant: str, names: Iterable[str]
) -> None:
    assert sorted(names_in(module, constant)) == sorted(names)


def test_upload_purposes_exist_on_server() -> None:
    texts = [(STATIC / name).read_text("utf-8") for name in MODULES]
    given = re.findall(r'purpose(?: =|:) "([^"]+)"', "".join(texts))
    assert given and {*given} <= {*get_args(Purpose)}


@pytest.mark.parametrize("name", [name for name in OWN if name.endswith((".js", ".html"))])
def test_scripts_use_no_unsafe_functions(name: str) -> None:
    text = (STATIC / name).read_text("utf-8")
    for bad in (
        r"\.(inner|outer)HTML\b", r"insertAdjacentHTML", r"document\.write", r"\beval\(",
        r"new Function", r"javascript:", r"DOMParser", r"createContextualFragment", r"srcdoc",
        r"setAttribute\(\"(style|on)", r"\bstyle[:=]", r"dangerously", r"localStorage",
        r"document\.cookie",
    ):  # fmt: skip
        assert not re.search(bad, text), (name, bad)
    addresses = {*re.findall(r"https?://[\w.]+", text)} - {"http://www.w3.org"}
    assert not addresses, "nothing is fetched from elsewhere"


def test_package_includes_all_console_files() -> None:
    project = PACKAGE.parent.parent / "pyproject.toml"
    patterns = tomllib.loads(project.read_text("utf-8"))["tool"]["setuptools"]["package-data"][
        "luthier"
    ]
    for path in STATIC.rglob("*.*"):
        assert any(path.relative_to(PACKAGE).match(each) for each in patterns), path


def test_vendored_files_match_published_digests() -> None:
    text = (PACKAGE.parent.parent / "docs" / "dependencies.md").read_text("utf-8")
    rows = re.findall(r"^\| `vendor/(\S+)` \|.* `([0-9a-f]{64})` \|$", text, re.MULTILINE)
    assert {f"vendor/{name}" for name, _ in rows} == {*FILES} - {*OWN}
    for name, digest in rows:
        content = (STATIC / "vendor" / name).read_bytes()
        for file, package in PACKAGES.items():
            content = content.replace(f'from"./{file}"'.encode(), f'from"{package}"'.encode())
        assert hashlib.sha256(content).hexdigest() == digest, name
