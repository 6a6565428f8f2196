"""Write docs/reference.md, tables of three other pages, and JSON schemas from the code.

With --check, fail when they are not what would be written.

python docs/generate.py [--check]
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from gguf.constants import MODEL_ARCH_NAMES
from pydantic import BaseModel

import luthier
from luthier.adaptations import ADAPTATIONS
from luthier.chat_models.base import SamplingSpec
from luthier.cli.app import app
from luthier.data.augmentation import Augmentation
from luthier.data.rules import CONVERT_RULES, SEARCH_RULES
from luthier.gate.checks import CHECKS, all_rules
from luthier.gate.clean_plan import CleaningPlan
from luthier.gate.rules import Rule
from luthier.graders import GRADERS
from luthier.limits import ServerLimits
from luthier.models.catalog import CATALOG
from luthier.models.formats.gguf import PRE_TOKENIZERS
from luthier.models.formats.gguf_networks import NETWORKS
from luthier.models.network_shapes import SHAPES
from luthier.objectives import OBJECTIVES
from luthier.recipe import DataSpec, MixSpec, Recipe, Training
from luthier.validation import field_docstrings
from luthier.workflows.capabilities import Capability, family_table
from luthier.workflows.certificate.certificate import certificate_schema
from luthier.workflows.distil.insights import RULES as INSIGHT_RULES
from luthier.workflows.distil.recipe import DistilRecipe, InsightSpec, TeacherSpec
from luthier.workflows.pretrain_recipe import (
    Corpus,
    NewNetwork,
    NewTokenizer,
    PretrainRecipe,
    PretrainTraining,
)
from luthier.workflows.study.presets import PRESETS

TARGET = Path(__file__).parent / "reference.md"
LIMITS = Path(__file__).parent / "guide" / "limits.md"
ARCHITECTURE = Path(__file__).parent / "architecture.md"
SCHEMA = Path(__file__).parent / "certificate.schema.json"
PAGES = Path(__file__).parent / "llms.txt"
NAVIGATION = Path(__file__).parent.parent / "mkdocs.yml"
STUB = Path(luthier.__file__).with_name("__init__.pyi")
BASES = Path(__file__).parent / "guide" / "base-models.md"
PLUGIN_TABLES = (
    ("objectives", "OBJECTIVES"),
    ("adaptations", "ADAPTATIONS"),
    ("graders", "GRADERS"),
    ("gate.checks", "CHECKS"),
    ("engine.steps", "STEPS"),
    ("models.catalog", "CATALOG"),
    ("models.decoding.backends", "BACKENDS"),
    ("data.inputs", "PROCESSORS"),
    ("trackers", "TRACKERS"),
    ("cli.app", "COMMANDS"),
    ("server.jobs.runners", "RUNNERS"),
)
"""Module and name of each table that plugins extend."""
TESTS = Path(__file__).parent.parent / "tests"
"""Folder of the families that the tests compare with transformers."""
STUDY = Path(__file__).parent / "guide" / "study.md"
STUDY_BEGIN, STUDY_END = "<!-- presets: written by make docs -->\n", "<!-- end of presets -->"
BASES_BEGIN, BASES_END = "<!-- families: written by make docs -->\n", "<!-- end of families -->"
LAYERS_BEGIN, LAYERS_END = "<!-- layers: written by make docs -->\n", "<!-- end of layers -->"
TABLES_BEGIN, TABLES_END = "<!-- tables: written by make docs -->\n", "<!-- end of tables -->"
LIMITS_BEGIN, LIMITS_END = "<!-- limits: written by make docs -->\n", "<!-- end of limits -->"


def main() -> int:
    """Write or check the file; the exit code."""
    text = (
        "\n".join(
            [
                *_head(),
                *_commands(),
                *_functions(),
                *_recipe(),
                *_distillation(),
                *_pretraining(),
                *_cleaning(),
                *_methods(),
                *_support(),
                *_models(),
                *_gguf(),
                *_rules(),
            ]
        )
        + "\n"
    )
    layers = _with_table(ARCHITECTURE, LAYERS_BEGIN, LAYERS_END, _layers())
    pages = {
        TARGET: text,
        ARCHITECTURE: _with_table(layers, TABLES_BEGIN, TABLES_END, _plugin_tables()),
        LIMITS: _with_table(LIMITS, LIMITS_BEGIN, LIMITS_END, _limits()),
        BASES: _with_table(BASES, BASES_BEGIN, BASES_END, _families()),
        STUDY: _with_table(STUDY, STUDY_BEGIN, STUDY_END, _presets()),
    }
    pages[STUB] = _stub()
    pages[PAGES] = _list_pages()
    pages[SCHEMA] = json.dumps(certificate_schema(), indent=2, ensure_ascii=False) + "\n"
    if "--check" in sys.argv:
        for path, page in pages.items():
            if not path.is_file() or path.read_text(encoding="utf-8") != page:
                print(f"{path.name} is out of date; run `make docs`", file=sys.stderr)
                return 1
        return 0
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
    return 0


def _with_table(page: Path | str, begin: str, end: str, table: str) -> str:
    """Return the page, a file or its text, with ``table`` between the marks ``begin`` and ``end``."""
    text = page if isinstance(page, str) else page.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    return before + begin + table + end + rest.partition(end)[2]


def _list_pages() -> str:
    """Return the pages with their first sentences, for language models (llmstxt.org)."""
    lines = ["# luthier", "", f"> {(luthier.__doc__ or '').partition(': ')[2]}", "", "## Pages", ""]
    for name in re.findall(r"(\S+\.md)$", NAVIGATION.read_text(encoding="utf-8"), re.MULTILINE):
        if name.startswith("log/") and name != "log/index.md":
            continue
        title, _, text = (TARGET.parent / name).read_text(encoding="utf-8").partition("\n")
        paragraphs = (each.strip() for each in text.split("\n\n"))
        first = next(each for each in paragraphs if each[:1].isalpha())
        sentence = " ".join(first.split()).partition(". ")[0].removesuffix(".")
        lines.append(f"- [{title.removeprefix('# ')}]({name}): {sentence}.")
    return "\n".join(lines) + "\n"


def _layers() -> str:
    """Return the layers of the import contract, from top to bottom."""
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    contract = project["tool"]["importlinter"]["contracts"][0]
    rows = [[name.strip() for name in row.split(":")] for row in contract["layers"]]
    cells = [" · ".join(name.removeprefix("luthier.") for name in row) for row in rows]
    width = max(map(len, cells))
    edge = "+" + "-" * (width + 2) + "+"
    return "\n".join(
        ["```text", edge, *(f"| {cell:^{width}} |" for cell in cells), edge, "```", ""]
    )


def _plugin_tables() -> str:
    """Return the tables of parts by entry point group."""
    rows = ["| group | module | parts |", "| --- | --- | --- |"]
    for module, name in PLUGIN_TABLES:
        table = getattr(import_module(f"luthier.{module}"), name)
        shown = ", ".join(f"`{part}`" for part in table)
        rows.append(f"| `{table.group}` | `luthier.{module}` | {shown} |")
    return "\n".join([*rows, ""])


def _presets() -> str:
    """Return the table of the presets of studies."""
    lines = ["| `--preset` | question | tested claim |", "| --- | --- | --- |"]
    for name, preset in PRESETS.items():
        given = f"{name}=FILE" if preset.needs_file else name
        lines.append(f"| `{given}` | {preset.question} | {preset.claim} |")
    return "\n".join(lines) + "\n"


def _families() -> str:
    """Return the table of families that the tests compare with transformers."""
    sys.path.insert(0, str(TESTS))
    from model_families import DECODERS, ENCODER_DECODERS, ENCODERS

    groups = {
        "text generation": DECODERS,
        "text from text": ENCODER_DECODERS,
        "labels, tags, answers, embeddings": ENCODERS,
    }
    rows = []
    for use, families in groups.items():
        for family in families:
            gguf = "yes" if family.model_type in NETWORKS else ""
            state = f"not supported: {family.refused}" if family.refused else use
            rows.append(f"| {family.name} | `{family.model_type}` | {state} | {gguf} |")
    head = ["", "| models | `model_type` | use | GGUF |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *rows, "", ""])


def _limits() -> str:
    """Every limit of the service as a table."""
    rows = []
    for name, info in ServerLimits.model_fields.items():
        default = info.get_default()
        shown = f"{default:,}" if isinstance(default, int) else f"{default:g}"
        rows.append(f"| `{name}` | {shown} | {_meaning(ServerLimits, name)} |")
    return "\n".join(["", "| limit | default | meaning |", "| --- | --- | --- |", *rows, "", ""])


def _head() -> list[str]:
    return [
        "# Reference",
        "",
        "Written by `make docs` from the code, and checked against it by `make check`.",
        "",
    ]


def _commands() -> list[str]:
    lines = [
        "## Commands",
        "",
        "Exit codes: 0 done, 1 failed, 2 input refused, 130 stopped by the user; of `inspect` 0",
        "passed, 1 warnings, 2 refused. Each command takes",
        "`--help`; those with `--json` print exactly one JSON object on standard output. Progress and",
        "messages go to standard error, in plain lines where that is no terminal.",
        "`LUTHIER_HOME` names the store (default `~/.luthier`).",
        "",
    ]
    root = typer.main.get_command(app)
    for path, command in _walk(root, "luthier"):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join([path, *(f"{p.name.upper()}" for p in arguments)])
        lines += [f"### `{usage}`", "", (command.help or "").strip(), ""]
        if options:
            lines += ["| option | meaning |", "| --- | --- |"]
            for option in options:
                default = option.default
                shown = (
                    "" if default in (None, False, ()) or callable(default) else f" (`{default}`)"
                )
                lines.append(f"| `{option.opts[0]}` | {getattr(option, 'help', '') or ''}{shown} |")
            lines.append("")
    return lines


def _functions() -> list[str]:
    lines = [
        "## Functions",
        "",
        "What `import luthier` has, over the same code as the commands; arguments are explained by",
        "`help(luthier.NAME)`. Fields of a recipe are keywords, with `__` for the dot.",
        "Import `luthier` before `torch`: waiting threads then sleep, and a busy machine is up to",
        "three times as fast.",
        "",
        "| function | arguments | what it does |",
        "| --- | --- | --- |",
    ]
    for name in luthier.__all__:
        function = getattr(luthier, name)
        if inspect.isfunction(function):
            about = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
            names = [
                f"**{each.name}" if each.kind is each.VAR_KEYWORD else each.name
                for each in inspect.signature(function).parameters.values()
            ]
            lines.append(f"| `luthier.{name}` | `{', '.join(names)}` | {about} |")
    return [*lines, ""]


class _Type(str):
    """An annotation as text, without modules and quotes."""

    def __new__(cls, kind: Any) -> _Type:
        text = kind if isinstance(kind, str) else inspect.formatannotation(kind)
        return super().__new__(cls, re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", text))

    def __repr__(self) -> str:
        return str(self)


def _stub() -> str:
    """Return the types of ``import luthier``, with a keyword for each field of a recipe."""
    imports = {
        "from collections.abc import Mapping, Sequence",
        "from pathlib import Path",
        "from typing import Any, Literal, Optional",
        "from luthier.data.in_memory import Rows",
    }
    functions = []
    for name in luthier.__all__:
        found = getattr(luthier, name)
        if not inspect.isfunction(found) or name == "load":
            module = "luthier.cli.model" if name == "load" else getattr(found, "__module__", "")
            imports |= {f"from {module} import {name} as {name}"} if module else set()
            continue
        source = inspect.getmodule(inspect.unwrap(found))
        assert source is not None and source.__file__ is not None
        known = {
            alias.name: node.module
            for node in ast.walk(ast.parse(Path(source.__file__).read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        signature = inspect.signature(found)
        kinds = [each.annotation for each in signature.parameters.values()]
        for kind in [*kinds, signature.return_annotation]:
            for module, part in re.findall(
                r"(luthier[.\w]*\.)?\b([A-Z]\w+)", inspect.formatannotation(kind)
            ):
                home = module.rstrip(".") or known.get(part, "")
                if home.startswith("luthier") and part not in luthier.__all__:
                    imports.add(f"from {home} import {part}")
        signature = signature.replace(
            parameters=[
                each.replace(annotation=_Type(each.annotation))
                for each in signature.parameters.values()
            ],
            return_annotation=_Type(signature.return_annotation),
        )
        functions.append(f"def {name}{signature}: ...")
    head = "# Written by `make docs` from the functions of the commands.\n"
    text = "\n".join([head, *sorted(imports), "__version__: str", "", *functions, ""])
    ruff = Path(sys.executable).with_name("ruff")
    for command in (["check", "--fix-only", "--select", "I,F401,RUF036,UP045"], ["format"]):
        done = subprocess.run(
            [ruff, *command, "--stdin-filename", STUB, "-"],
            input=text, capture_output=True, text=True, check=True,
        )  # fmt: skip
        text = done.stdout
    return text


def _walk(command: Any, path: str) -> list[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if not children:
        return [(path, command)]
    found = []
    for name, child in children.items():
        found += _walk(child, f"{path} {name}")
    return found


def _recipe() -> list[str]:
    lines = [
        "## Recipe",
        "",
        "Fields of a TOML recipe, of `--set NAME=VALUE` and of `luthier.tune(…)` (with `__` for the",
        "dot). Where no default is given, the value is chosen from the data and the model and printed",
        "with its reason.",
        "",
    ]
    plain = {"base": Recipe, "name": Recipe}
    rows = [_field("", name, cls) for name, cls in plain.items()]
    groups: tuple[tuple[str, type[BaseModel]], ...] = (
        ("data.", DataSpec),
        ("data.mix.", MixSpec),
        ("data.augmentation.", Augmentation),
        ("training.", Training),
    )
    for prefix, cls in groups:
        rows += [_field(prefix, name, cls) for name in cls.model_fields]
    return [*lines, *_fields(rows)]


def _distillation() -> list[str]:
    lines = [
        "## Recipe of a distillation",
        "",
        "Fields of a TOML recipe for `luthier distil`, of its `--set NAME=VALUE` and of",
        "`luthier.distil(…)`, beside those above: `base` is the student, `data.train` the prompts.",
        "",
    ]
    rows = [_field("", "method", DistilRecipe)]
    groups: tuple[tuple[str, type[BaseModel]], ...] = (
        ("teacher.", TeacherSpec),
        ("sampling.", SamplingSpec),
        ("insights.", InsightSpec),
    )
    for prefix, cls in groups:
        rows += [_field(prefix, name, cls) for name in cls.model_fields]
    rules = ["Prompts and answers are rejected by these rules:", "", "| rule | meaning |"]
    rules += ["| --- | --- |", *(f"| `{rule}` | {text} |" for rule, text in INSIGHT_RULES.items())]
    return [*lines, *_fields(rows), *rules, ""]


def _cleaning() -> list[str]:
    lines = [
        "## Plan of a cleaning",
        "",
        "Options of `luthier clean` (with `-` for `_`), keys of its `--plan FILE.toml`, and keywords",
        "of `luthier.clean(…)`. Every row is edited first, in the order of this table; what is dropped",
        "is judged by what would be written. The gate then runs on what is left until it finds none of",
        "the rules that were to be dropped.",
        "",
    ]
    lines += _fields([_field("", name, CleaningPlan) for name in CleaningPlan.model_fields])
    return [
        *lines,
        "`TARGET.changes.jsonl` has a line for each thing that happened to a row: `file` and `line` of",
        "the source, `action` (`changed` or `dropped`), `rule` (of the gate, or the name of the fix)",
        "and `detail`, which never quotes a text; `TARGET.summary.json` has the counts.",
        "",
    ]


def _pretraining() -> list[str]:
    lines = [
        "## Recipe of a pre-training",
        "",
        "Fields of a TOML recipe for `luthier pretrain`, of its `--set NAME=VALUE` and of",
        "`luthier.pretrain(…)`. Fields of `training.` that are not here are those above. With",
        "`network.base`, `adaptation.` is an [adaptation](#adaptations) of that base.",
        "",
    ]
    rows = [_field("", "name", PretrainRecipe)]
    for prefix, cls in (("data.", Corpus), ("network.", NewNetwork), ("tokenizer.", NewTokenizer)):
        rows += [_field(prefix, name, cls) for name in cls.model_fields]
    own = PretrainTraining.__annotations__
    rows += [_field("training.", name, PretrainTraining) for name in own]
    sizes = [
        "Width, layers, heads and context of the sizes:",
        "",
        f"| family | {' | '.join(SHAPES['llama'])} |",
        "| --- |" + " --- |" * len(SHAPES["llama"]),
    ]
    for family, shapes in SHAPES.items():
        cells = [f"{s.hidden}, {s.layers}, {s.heads}, {s.context}" for s in shapes.values()]
        sizes.append(f"| `{family}` | {' | '.join(cells)} |")
    return [*lines, *_fields(rows), *sizes, ""]


def _methods() -> list[str]:
    lines = []
    for title, prefix, table in (
        ("Objectives", "objective.", OBJECTIVES),
        ("Adaptations", "adaptation.", ADAPTATIONS),
        ("Graders", "", GRADERS),
    ):
        lines += [f"## {title}", "", *ABOUT.get(title, [])]
        for name, cls in table.items():
            about, *more = inspect.cleandoc(cls.__doc__ or "").split("\n\n")
            advice = [paragraph for paragraph in more if paragraph.startswith("Use ")]
            lines += [f"### `{name}`", "", " ".join([about, *advice]).replace("\n", " "), ""]
            plain = [
                f for f, info in cls.model_fields.items() if f != "method" and not info.exclude
            ]
            rows = [_field(prefix or f"{name}.", field, cls) for field in plain]
            lines += _fields(rows) if rows else []
    return lines


ABOUT = {
    "Graders": [
        "Each gives a reply a score, from 0 to 1 unless it says otherwise. On the command line:",
        "`luthier evaluate MODEL DATA --grader number --set number.tolerance=0.01`, or",
        "`--grader FILE.toml` with a table for each grader, under a name of your own, with its",
        '`method` and fields. In Python: `graders=[{"method": "number", "tolerance": 0.01}]`, or',
        "objects.",
        "",
    ]
}


FAMILIES = {
    "Llama": "llama",
    "GPT-2": "gpt2",
    "PaLM": "palm",
    "Transformer-XL": "transfo_xl",
    "BERT": "bert",
    "RoBERTa": "roberta",
    "ALBERT": "albert",
    "T5": "t5",
    "XLNet": "xlnet",
    "ELMo": "elmo",
}


def _support() -> list[str]:
    """Which objective goes with which family of networks, and with which adaptations not."""
    lines = [
        "## What goes with what",
        "",
        "Objectives by families of networks: every adaptation, or every one but those named. A dash",
        "means that the objective is refused. `tests/test_pairs.py` trains each pair that is not.",
        "",
        f"| objective | {' | '.join(FAMILIES)} |",
        "| --- |" + " --- |" * len(FAMILIES),
    ]
    tables = {family: family_table(family) for family in FAMILIES.values()}
    reasons: dict[str, None] = {}
    for name in OBJECTIVES:
        rows = [[v for v in table if v.objective == name] for table in tables.values()]
        lines.append(f"| `{name}` | {' | '.join(_cell(row, reasons) for row in rows)} |")
    lines += ["", "Reasons given:", "", *(f"- {reason}" for reason in reasons), ""]
    return lines


def _cell(verdicts: list[Capability], reasons: dict[str, None]) -> str:
    """All adaptations of one objective on one family."""
    refused = {v.adaptation: v.reason for v in verdicts if v.reason}
    reasons |= dict.fromkeys(refused.values())
    if len(refused) == len(verdicts):
        return "-"
    names = ", ".join(f"`{name}`" for name in refused)
    return f"all but {names}" if refused else "all"


def _field(prefix: str, name: str, cls: type[BaseModel]) -> tuple[str, str, str, str]:
    info = cls.model_fields[name]
    schema = cls.model_json_schema()["properties"].get(name, {})
    choices = schema.get("enum") or next(
        (part["enum"] for part in schema.get("anyOf", []) if "enum" in part), None
    )
    kinds = [schema.get("type"), *(part.get("type") for part in schema.get("anyOf", []))]
    kind = ", ".join(map(str, choices)) if choices else next((k for k in kinds if k), "text")
    chosen = None if info.is_required() else info.get_default(call_default_factory=True)
    default = "" if chosen is None else f"`{chosen}`"
    return f"{prefix}{name}", kind, default, _meaning(cls, name)


def _meaning(cls: type[BaseModel], name: str) -> str:
    """What a field of ``cls`` is for, in one line."""
    return field_docstrings(cls).get(name, "").replace("\n", " ")


def _fields(rows: list[tuple[str, str, str, str]]) -> list[str]:
    lines = ["| field | values | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{name}` | {kind} | {default} | {text} |" for name, kind, default, text in rows]
    return [*lines, ""]


def _models() -> list[str]:
    lines = ["## Base models", "", "| id | parameters | context | licence | about |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for entry in CATALOG.values():
        size = f"{entry.parameters / 1e6:.0f} M"
        lines.append(
            f"| `{entry.id}` | {size} | {entry.context} | {entry.licence} | {entry.about} |"
        )
    return [*lines, ""]


def _gguf() -> list[str]:
    """Networks and tokenizers of GGUF files."""
    lines = ["## GGUF", "", "| `model_type` | architecture in llama.cpp | scaled RoPE |"]
    lines.append("| --- | --- | --- |")
    for name, network in NETWORKS.items():
        architecture = MODEL_ARCH_NAMES[network.arch]
        lines.append(f"| {name} | {architecture} | {', '.join(network.scaling) or 'no'} |")
    names = ", ".join(PRE_TOKENIZERS.values())
    return [*lines, "", f"Byte-level BPE pre-tokenizers: {names}.", ""]


def _rules() -> list[str]:
    """Every rule of the data gate, those of checks behind those of reading."""
    known = all_rules()
    others = {**CONVERT_RULES, **SEARCH_RULES}
    further = {name: text for name, text in others.items() if name not in known}
    known |= {name: Rule(name, "error", about) for name, about in further.items()}
    lines = [
        "## Rules of the data gate",
        "",
        "Of `luthier inspect` and of each job. An error refuses the data, a warning does not.",
        f"Checks, to leave out with `--skip`: {', '.join(f'`{name}`' for name in CHECKS)}. Where no",
        "fix stands here, each finding says its own.",
        "",
        "| rule | severity | meaning | why | fix |",
        "| --- | --- | --- | --- | --- |",
    ]
    for rule in known.values():
        cells = (f"`{rule.id}`", rule.severity, rule.about, rule.why, rule.fix)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
