"""Measure the language of the project and fail if a figure is over its limit (``make check``).

``python docs/prose.py --worst 20`` prints the texts to rewrite first. The rules are in docs/style.md.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PRONOUNS = re.compile(
    r"\b(it|its|them|those|these|ones?|that|which|what|who|whom|whose|others|another|such)\b", re.I
)
FIRST_WORDS = re.compile(
    r"(What|Whether|Of|Those|How|Its|Who|Where|Which|That|So|Because|As|In|From|The same)\b"
)
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/guide/*.md")
TABLES_ONLY = ("reference.md", "results.md")
LIMITS = {
    "pronouns per 100 words, docstrings": 2.0,
    "% of docstrings that start without noun or verb": 0.5,
    "pronouns per 100 words, help texts": 2.5,
    "% of help texts over 72 characters": 0.5,
    "pronouns per 100 words, error messages": 2.0,
    "% of error messages over 30 words": 0.2,
    "pronouns per 100 words, pages": 3.5,
    "mean words per sentence, pages": 16.0,
    "pronouns per 100 words, test names": 1.0,
}
"""The largest accepted figures. Lower a limit when the texts have become better."""


class Text(NamedTuple):
    """A text for readers with the place where it is written."""

    place: str
    text: str


def docstrings(tree: ast.AST, file: str) -> Iterator[Text]:
    """Yield the first paragraphs of docstrings and of attribute documentation."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for item in node.body:
            value = item.value if isinstance(item, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield Text(f"{file}:{item.lineno}", value.value.strip().split("\n\n")[0])


def written(node: ast.AST) -> str:
    """Return the text of a string literal; a placeholder stands for each formatted value."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) or "X" for part in node.values)
    return ""


def helps_and_messages(tree: ast.AST, file: str) -> tuple[list[Text], list[Text]]:
    """Return the help texts of options and the messages of raised errors."""
    helps, messages = [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "help" and written(node.value):
            helps.append(Text(f"{file}:{node.value.lineno}", written(node.value)))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            texts = [written(argument) for argument in node.exc.args]
            messages += [Text(f"{file}:{node.lineno}", t) for t in texts if len(t.split()) > 2]
    return helps, messages


def test_names(file: Path) -> Iterator[Text]:
    """Yield the names of test functions, split into words."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            name = node.name.removeprefix("test_").replace("_", " ")
            yield Text(f"{file.relative_to(ROOT)}:{node.lineno}", name)


def prose(markdown: str) -> str:
    """Return the running text of a page, without code, tables and headings."""
    text = re.sub(r"```.*?```|<!--.*?-->", "", markdown, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "X", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    skipped = ("|", "#", ">", "    ")
    return "\n".join(line for line in text.split("\n") if not line.startswith(skipped))


def density(texts: list[Text]) -> float:
    """Return the number of pronouns per 100 words."""
    words = sum(len(each.text.split()) for each in texts)
    return 100 * sum(len(PRONOUNS.findall(each.text)) for each in texts) / max(1, words)


def percent(matches: list[bool]) -> float:
    """Return the share of true values in percent."""
    return 100 * sum(matches) / max(1, len(matches))


def main() -> int:
    """Print all figures with their limits; return 1 if a figure is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--worst", type=int, default=0, help="Print the N worst texts of each kind."
    )
    worst = parser.parse_args().worst
    docs: list[Text] = []
    helps: list[Text] = []
    messages: list[Text] = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree, file = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))
        docs += docstrings(tree, file)
        for known, found in zip((helps, messages), helps_and_messages(tree, file), strict=True):
            known += found
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    sentences = [
        Text(str(page.relative_to(ROOT)), sentence)
        for page in pages
        if page.name not in TABLES_ONLY
        for sentence in re.split(r"(?<=[.!?:])\s+|\n\n", prose(page.read_text(encoding="utf-8")))
        if len(sentence.split()) > 2
    ]
    tests = [text for path in sorted((ROOT / "tests").rglob("*.py")) for text in test_names(path)]
    figures = [
        density(docs),
        percent([bool(FIRST_WORDS.match(each.text)) for each in docs]),
        density(helps),
        percent([len(each.text) > 72 for each in helps]),
        density(messages),
        percent([len(each.text.split()) > 30 for each in messages]),
        density(sentences),
        sum(len(each.text.split()) for each in sentences) / max(1, len(sentences)),
        density(tests),
    ]
    for (name, limit), figure in zip(LIMITS.items(), figures, strict=True):
        print(f"{name:52}{figure:6.1f}  limit {limit:g}")
    kinds = {
        "DOCSTRINGS": docs,
        "HELP": helps,
        "MESSAGES": messages,
        "SENTENCES": sentences,
        "TEST NAMES": tests,
    }
    for kind, texts in kinds.items() if worst else ():
        print(f"\n{kind}")
        texts.sort(
            key=lambda each: (
                -len(PRONOUNS.findall(each.text)) - 2 * bool(FIRST_WORDS.match(each.text))
            )
        )
        for each in texts[:worst]:
            print(f"  {each.place}: {' '.join(each.text.split())[:300]}")
    return int(any(figure > limit for figure, limit in zip(figures, LIMITS.values(), strict=True)))


if __name__ == "__main__":
    sys.exit(main())
