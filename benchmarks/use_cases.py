"""Run the commands of a use-case page, and write its numbers and figures.

    python benchmarks/use_cases.py NAME [--write | --seed 1]

The shell blocks of ``docs/use-cases/NAME.md`` run in an empty folder and a new LUTHIER_HOME with the
base models of the current one. ``NAME.json`` next to the page keeps scores, intervals, processor
seconds and sizes. Figures, tables and sentences between markers, the index page and ``index.json``
are written from that file; ``--write`` writes them without a run.
``--seed`` runs the commands with another seed, and adds the scores to ``NAME.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from children import table
from pages import (
    brand_copy,
    copied_questions,
    device,
    diseases,
    domain_text,
    drawing_style,
    mail,
    old_scripts,
    pictures,
    recommendation,
    route_messages,
    sensors,
    sounds,
    summaries,
    support_chatbot,
    translation,
)
from pages.bench import (
    PACKAGE,
    PAGES,
    ROOT,
    Found,
    comparison,
    ends,
    fill,
    percent,
    picture,
    run,
    scores_of_seeds,
    scores_with,
    sentence,
    write,
)

PARTS = (
    route_messages,
    support_chatbot,
    copied_questions,
    pictures,
    diseases,
    summaries,
    domain_text,
    mail,
    sounds,
    sensors,
    device,
    recommendation,
    brand_copy,
    translation,
    old_scripts,
    drawing_style,
)
"""The use cases in the order of the index page."""
USES = {part.USE.name: part.USE for part in PARTS}


def inside(path: str) -> str:
    """Return the path of a sample file in the folder that `luthier examples` writes."""
    parts = Path(path).parts
    return "/".join(parts[2 if parts[0] == "examples" else 1 :]).removesuffix(".xz")


def write_index() -> None:
    """Write ``index.json`` and the cards of the index page, from the stored results."""
    entries, cards, lines = [], [], []
    for use in USES.values():
        if not use.page.is_file():
            continue
        entry: Found = {
            "name": use.name, "title": use.title, "result": "", "measure": use.measure,
            "page": f"use-cases/{use.name}.md", "figure": f"use-cases/{use.name}.svg",
            "data": f"use-cases/{use.name}.json", "credit": use.credit, "commands": use.commands,
            "files": {path: inside(path) for path in use.files},
        }  # fmt: skip
        stored = PAGES / f"{use.name}.json"
        if stored.is_file():
            found = json.loads(stored.read_text())
            compared = comparison(found)
            tuned, rival = ends(compared["contenders"])
            entry |= {
                "result": use.result(found) if use.result else (
                    f"{percent(tuned['score'])} tuned, {percent(rival['score'])} best rival"
                ),
                "tuned": tuned["score"], "rival": rival["score"], "worth_it": compared["worth_it"],
                "date": found["date"], "versions": found["versions"],
            }  # fmt: skip
            link = picture(use.name, use.alt, 360)
            cards.append(
                f"## [{use.title}]({use.name}.md)\n\n[{link}]({use.name}.md)\n\n{sentence(use, found)}"
            )
            ends_of = [
                f"{percent(each['score'])} ({100 * each['interval'][0]:.1f} to "
                f"{100 * each['interval'][1]:.1f})"
                for each in (tuned, rival)
            ]
            lines.append([
                f"[{use.name}](use-cases/{use.name}.md)", use.measure,
                f"{compared['rows']:,} {use.unit}", ends_of[0],
                ", ".join(f"{100 * score:.1f}" for score in scores_of_seeds(found)[1:]),
                ends_of[1], rival["name"],
                f"{sum(step['processor_seconds'] for step in found['steps']):,.0f}",
            ])  # fmt: skip
        entries.append(entry)
    for folder in (PACKAGE / "examples", PAGES):  # the package needs the file without a checkout
        (folder / "index.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n")
    index = PAGES / "index.md"
    index.write_text(fill(index.read_text(), "cards", "\n\n".join(cards)))
    results = ROOT / "docs" / "results.md"
    heads = [
        "use case",
        "score",
        "test rows",
        "tuned",
        "seeds 1, 2",
        "best rival",
        "rival",
        "processor s",
    ]
    results.write_text(fill(results.read_text(), "use cases", table(heads, lines)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=[*USES])
    parser.add_argument("--write", action="store_true", help="write from the stored results")
    parser.add_argument("--seed", type=int, help="run with this seed, and add the scores")
    options = parser.parse_args()
    use = USES[options.name]
    stored = PAGES / f"{use.name}.json"
    if options.seed is not None and not (
        stored.is_file() and any("tune" in c for c in use.commands)
    ):
        parser.error("--seed needs a page with `luthier tune` and a run without --seed")
    if not options.write:
        write_index()  # `luthier examples` needs the name
        if options.seed is None:
            found = run(use)
        else:
            scores = scores_with(use, options.seed)
            found = json.loads(stored.read_text())  # after the run: two seeds may run at once
            found.setdefault("other_seeds", {})[str(options.seed)] = scores
        stored.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write(use, json.loads(stored.read_text()))
    write_index()


if __name__ == "__main__":
    main()
