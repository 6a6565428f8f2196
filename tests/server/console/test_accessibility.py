"""All pages of the console under axe-core, in both themes."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
from browser import browser
from luthier_server import BASE, KEYS, ONE, Served, home_with_tiny

PLACES = (
    "home", "data", "data/s3%3A%2F%2Frows%2Frows.jsonl", "jobs", "jobs/first", "jobs/second",
    "jobs/first/with/second", "new?rows=s3%3A%2F%2Frows%2Frows.jsonl", "models", f"models/{BASE}",
    "playground", f"playground/{BASE}", "review", "evaluations", "studies", "deployments", "usage",
    "administration", "nothing",
)  # fmt: skip
CHECK = """
const done = arguments[arguments.length - 1];
const text = (rule) => `${rule.id}: ${rule.nodes.map((each) => each.html).join(", ")}`;
axe.run().then((found) => done(found.violations.map(text)));
"""
OPEN = "document.querySelectorAll('details').forEach((each) => (each.open = true))"
OLD = "document.querySelector('h1').dataset.old = 'yes'"
NEW = "document.querySelector('h1:not([data-old])')"
SHOWN = f"{NEW} && !document.body.innerText.includes('Loading …')"


@pytest.mark.slow
def test_pages_have_no_accessibility_findings(tmp_path: Path, tiny_model_folder: Path) -> None:
    server = Served(home_with_tiny(tmp_path / "home", tiny_model_folder))
    server.start("--no-workers")
    axe = resources.files("axe_core_python").joinpath("axe.min.js").read_text("utf-8")
    rows = [{"text": f"number {n}", "label": f"team {n % 2}"} for n in range(12)]
    s3 = server.client("s3")
    s3.create_bucket(Bucket="rows")
    content = "".join(json.dumps(row) + "\n" for row in rows)
    s3.put_object(Bucket="rows", Key="rows.jsonl", Body=content.encode())
    for name in ("first", "second"):
        job = {"name": name, "model_name": name, "base": BASE, "training": ["s3://rows/rows.jsonl"]}
        assert server.ask("POST", "/api/v1/jobs", job)[0] == 201
    found = {}
    try:
        with browser(tmp_path / "browser") as page:
            page.get(f"{server.url}/console/")
            page.sign_in(KEYS[ONE]["api_key"])
            page.script(axe)
            for place in PLACES:
                if place != PLACES[0]:
                    page.script(OLD)
                page.script("location.hash = arguments[0]", f"#/{place}")
                page.until(SHOWN)
                page.script(OPEN)
                for theme in ("light", "dark"):
                    values = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
                    page.execute_cdp_cmd("Emulation.setEmulatedMedia", values)
                    found[place, theme] = page.execute_async_script(CHECK)
    finally:
        server.kill()
    assert {place: rules for place, rules in found.items() if rules} == {}
