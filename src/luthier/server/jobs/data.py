"""Training and validation rows of a job, fetched once for all workers of the job."""

from __future__ import annotations

import posixpath
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from shlex import quote
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from luthier.data.files.containers import PACKED, Container, container_of
from luthier.data.files.parsing import Record
from luthier.data.files.read import find_container, read_records
from luthier.data.inputs import (
    MOST_MEDIA_BYTES,
    REFERENCES,
    is_media,
    media_references,
    object_name,
)
from luthier.data.prompts import PromptChecker
from luthier.data.rows import Checker, RowReader
from luthier.data.unread import UNREAD
from luthier.errors import DataError, Location, LocationRefused, Problem, RowRefused
from luthier.files import luthier_home, new_folder, read_json, sweep, write_json
from luthier.library.models import find
from luthier.models.catalog import CATALOG
from luthier.server.jobs.folders import JobFolders
from luthier.server.jobs.submit import DISTILLATION, Submission, recipe_of
from luthier.server.stores.locations import Locations
from luthier.server.tables.foundation import kind_of, root_of
from luthier.server.tables.jobs import Job
from luthier.types import Row

if TYPE_CHECKING:
    from luthier.gate.policy import GatePolicy

MAX_REFERENCES = 100_000
"""Maximum number of images and audio files in the rows of a file."""
MAX_MISSING = 20
"""Maximum number of reported missing files."""
_SOURCES = "sources.json"
PEEKED = 200
"""Number of rows that a new job's data is checked on."""
PEEKED_BYTES = 4 << 20
"""Maximum size of these rows, in bytes."""
FIRST_BYTES = 2 << 20
"""Size of the first lines of a file that are checked before all lines, in bytes."""
_COMPLETE = ("parquet", "zip", "npz")
"""Formats that a reader needs complete."""
_LINES = ("jsonl", "csv", "tsv", "text")
"""Formats whose first lines can be read alone."""


@dataclass(frozen=True)
class JobData:
    """Paths of a job's rows, and their addresses."""

    folder: Path
    train: Sequence[str]
    """Names of files in ``folder``."""
    validators: Sequence[Sequence[str]]
    addresses: dict[str, str]
    """Address of each file."""

    @property
    def source(self) -> str:
        """Path of the training rows for a recipe."""
        return self._source("train", self.train)

    @property
    def validation(self) -> str | None:
        """Path of all validation rows for a recipe."""
        files = [name for each in self.validators for name in each]
        return self._source("held", files) if files else None

    def validator(self, number: int) -> str:
        """Return the path of the rows of a validator, counted from 0."""
        return self._source(f"held/{number + 1:02d}", self.validators[number])

    def show_addresses(self, text: str) -> str:
        """Return ``text`` with addresses in place of paths."""
        for name, address in self.addresses.items():
            # The address of a folder is a prefix of the addresses of its files.
            text = text.replace(str(self.folder / name), address.rstrip("/"))
            # Findings name a file without folders, before a line number.
            own = re.escape(Path(name).name)
            # re.sub reads backslashes of a replacement as escapes.
            text = re.sub(rf"\b{own}(?=:\d)", address.replace("\\", r"\\"), text)
        for part, name in (("train", "training"), ("held", "validation")):
            text = text.replace(f"{self.folder / part}", f"the {name} data")
        return text.replace(f"{luthier_home()}/", "")

    def _source(self, part: str, names: Sequence[str]) -> str:
        return str(self.folder / (names[0] if len(names) == 1 else part))


def fetch_data(job: Job, folders: JobFolders, locations: Locations) -> JobData:
    """Return the data of ``job``, fetched at the first start only.

    Raises:
        RefusedInput: for data that the account cannot read.
        LuthierError: for failures that may be temporary.
    """
    media = base_reads_media(job.recipe["base"])
    # new_folder renames a complete folder, so this file exists only after all rows.
    if not (folders.data / _SOURCES).is_file():
        sweep(folders.data.parent, job.id)
        with new_folder(folders.data) as fresh:
            _fetch(job, fresh, locations, media)
    recorded = read_json(folders.data / _SOURCES)
    data = JobData(folders.data, recorded["train"], recorded["validators"], recorded["addresses"])
    if job.api != "native" and not media:
        problems = [
            problem
            for name, address in data.addresses.items()
            for problem in format_problems(data.folder / name, address)
        ]
        if problems:
            raise DataError(problems)
    return data


def base_reads_media(base: str) -> bool:
    """Return whether the rows of a base model are images or audio, without fetching the base."""
    if base in CATALOG:
        return CATALOG[base].media is not None
    return find(base).network.processor is not None


def check_first_rows(locations: Locations, submission: Submission) -> None:
    """Check the addresses of a job, and the first rows at each address.

    Raises:
        LocationRefused: for an address that the account cannot read.
        DataError: for rows that the job cannot read.
    """
    # These modules import all objectives, which would delay the start of the server.
    from luthier.engine.dataset import checker_for
    from luthier.gate.policy import GatePolicy, load_policy
    from luthier.objectives.by_shape import needs_writing

    sources = {"data.train": submission.training, "data.validation": submission.validators}
    for addresses in sources.values():
        for address in addresses:
            locations.check(submission.account, address)
    recipe: Any = recipe_of(submission, "check")
    root = root_of(submission.base)
    if base_reads_media(root.base if root else recipe.base):
        return  # rows name files, which only the job fetches
    prompts = submission.customization_type == DISTILLATION and recipe.method == "responses"
    checker = PromptChecker if prompts else checker_for(recipe.objective)
    policy = load_policy(None, recipe.data.severity or {})
    if prompts:
        policy = GatePolicy({**policy.severity, UNREAD: "off"})
    is_encoder = recipe.objective is None and kind_of(submission.base) in ("encoder", "masked_lm")
    problems: list[Problem] = []
    for setting, addresses in sources.items():
        for address in addresses:
            account, held = submission.account, setting != "data.train"
            columns = recipe.data.columns
            peeked = peek_rows(locations, account, address, columns, checker, held, policy)
            found = peeked.problems
            # Columns of a table that the API cannot read need no advice.
            if submission.api != "native" and peeked.container not in (None, Container("jsonl")):
                found = [_format_problem(peeked.container, peeked.address, peeked.name)]
            # A large file of some formats has no first rows.
            for row in () if found or not is_encoder else peeked.rows[:1]:
                if needs_writing(row):
                    found = [_encoder_problem(peeked.address, row.line)]
            problems += [replace(each, setting=setting) for each in found]
    if problems:
        raise DataError(problems)


@dataclass(frozen=True)
class PeekedRows:
    """The first rows at an address."""

    address: str
    """Address of the file, or name and id of an uploaded file."""
    container: Container | None
    """Format of the file; ``None`` if unknown."""
    name: str
    """Name of the file that was uploaded or of the object."""
    records: Sequence[Record] = ()
    rows: Sequence[Row] = ()
    form: str | None = None
    """Name of the rows' form; ``None`` if unknown."""
    problems: Sequence[Problem] = ()


def peek_rows(
    locations: Locations,
    account: str,
    address: str,
    columns: Mapping[str, str] | None = None,
    checker: type[Checker] = Checker,
    accepts_own_keys: bool = False,
    policy: GatePolicy | None = None,
) -> PeekedRows:
    """Read the first rows of the first object at an address, within :data:`PEEKED_BYTES`.

    ``accepts_own_keys`` has the meaning of :class:`luthier.data.rows.RowReader`. Unread columns are
    problems as in the report of all rows, under ``policy``.
    """
    from luthier.gate.policy import GatePolicy

    policy = policy or GatePolicy()
    with TemporaryDirectory(prefix="luthier-peek-") as folder:
        address, file = locations.peek(account, address, Path(folder), PEEKED_BYTES)
        address = locations.uploads.with_names(account, address)
        if is_media(file.name):
            return PeekedRows(address, None, file.name, problems=[_media_problem(address)])
        problems: list[Problem] = []
        container = find_container(file, problems)
        whole = file.stat().st_size < PEEKED_BYTES
        records, rows, form = list[Record](), list[Row](), None
        needs_whole = container is None or container.packing or container.kind in _COMPLETE
        if container is not None and (whole or not needs_whole):
            records = [record for _, record in islice(read_records(file, [], whole=False), PEEKED)]
            reader = RowReader(
                file, columns, checker, whole=False, problems=problems,
                accepts_own_keys=accepts_own_keys,
            )  # fmt: skip
            rows = reader.first(PEEKED)
            form = reader.checker.form_name
            if not whole:
                # The cut damages the last row.
                last = max([row.line for row in rows] + [each.line for each in problems], default=0)
                cut = "json.invalid" if container.kind == "json" else None
                problems = [p for p in problems if 0 < p.line < last and p.rule != cut]
            problems += policy.refused_columns(reader)
    named = [
        replace(each.at(address, each.line), message=each.message.replace(str(file), address))
        for each in problems
    ]
    return PeekedRows(address, container, file.name, records, rows, form, named)


def _encoder_problem(address: str, line: int) -> Problem:
    message = "The rows train a model to generate text, and the base model is an encoder."
    fix = "Choose a base model that generates text, or write rows with labels."
    return Problem("objective.network", message, fix, Location(address, line))


def _media_problem(address: str) -> Problem:
    message = "The data is images or audio, and the base model needs text."
    fix = "Choose a base model for images or audio, or name an object with rows of text."
    return Problem("media.base", message, fix, Location(address))


def format_problems(file: Path, address: str) -> list[Problem]:
    """Return the problem of a file that is not JSON Lines, the only format of the Bedrock and
    OpenAI APIs."""
    if file.is_dir():
        return [_media_problem(address)]
    try:
        found = container_of(file)
    except RowRefused as bad:
        return [bad.at(address, 0)]
    if found == Container("jsonl"):
        return []
    return [_format_problem(found, address, PurePosixPath(address).name)]


def _format_problem(found: Container | None, address: str, name: str) -> Problem:
    message = f"The file is {found}, not JSON Lines (one object per line)."
    target = f"{name.split('.')[0]}.jsonl"
    if target == name:
        target = f"lines-{name}"
    fix = f"Convert the file with `luthier convert {quote(name)} {quote(target)}`."
    return Problem("file.form", message, fix, Location(address))


def _fetch(job: Job, folder: Path, locations: Locations, media: bool) -> None:
    addresses: dict[str, str] = {}
    incoming = folder / "incoming"

    def fetch_part(uri: str, part: str, count: int) -> list[str]:
        names = []
        fetched = locations.fetch(job.account, uri, incoming)
        for number, (address, path) in enumerate(fetched, 1):
            # New names: readers of folders skip some file names, and findings name files without
            # folders, so every name is unique (``show_addresses``).
            name = f"{part}/{count:02d}/{part[0]}{count:02d}-{number:05d}"
            if not path.is_dir():
                # One folder per file: rows name media relative to their own folder.
                ending = _suffix(path)
                name += f"/{Path(name).name}{ending}" if media else ending
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, folder / name)
            addresses[name] = address
            if media and not (folder / name).is_dir():
                columns = job.recipe["data"].get("columns", {})
                fetch_references(locations, job.account, folder / name, address, columns)
            names.append(name)
        shutil.rmtree(incoming, ignore_errors=True)
        return names

    train = [
        name
        for number, uri in enumerate(job.details["sources"], 1)
        for name in fetch_part(uri, "train", number)
    ]
    validators = [fetch_part(uri, "held", number) for number, uri in enumerate(job.validators, 1)]
    found: dict[str, Any] = {"train": train, "validators": validators, "addresses": addresses}
    write_json(folder / _SOURCES, found)


def _suffix(path: Path) -> str:
    """Return the suffix of a file, or the suffix for the content of a file without a suffix."""
    name = Path(path.name.lower())
    if name.suffix in PACKED:
        return Path(name.stem).suffix + name.suffix
    if name.suffix:
        return name.suffix
    try:
        kind = container_of(path).kind
    except RowRefused:
        return ".jsonl"  # reading the rows reports the problem
    return ".jsonl" if kind == "json" else f".{kind}"


def fetch_rows(
    locations: Locations,
    account: str,
    address: str,
    folder: Path,
    media: bool,
    columns: Mapping[str, str] | None = None,
) -> tuple[Path, dict[str, str]]:
    """Fetch the rows at an address: return a file, or a folder with several files.

    With ``media``, also fetch the files that the rows refer to; ``columns`` has the meaning of
    :func:`fetch_references`. Files of a failed try are removed.

    The second value has the address of each path, files before their folder, so that replacements
    in this order are exact.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    locations.check(account, address)
    fetched = locations.fetch(account, address, folder)
    files, folders = dict[str, str](), dict[str, str]()
    for number, (table, file) in enumerate(fetched, 1):
        if media and file.is_file():
            if len(fetched) > 1:
                # One folder per file: rows name media relative to their own folder.
                own = folder / f"{number:05d}"
                own.mkdir()
                file = Path(shutil.move(file, own))
            fetch_references(locations, account, file, table, columns)
        files[str(file)] = table.rstrip("/")
        folders[str(file.parent)] = table.rstrip("/").rpartition("/")[0]
    if len(fetched) == 1:
        return file, {**files, **folders}
    return folder, {**files, **folders, str(folder): address}


def fetch_first_lines(
    locations: Locations, account: str, address: str, folder: Path
) -> Path | None:
    """Fetch the first lines of a file; ``None`` if the file is smaller or has no lines."""
    folder.mkdir(parents=True)
    file = locations.peek(account, address, folder, FIRST_BYTES)[1]
    container = find_container(file, [])
    if container is None or container.packing or container.kind not in _LINES:
        return None
    content = file.read_bytes()
    if len(content) < FIRST_BYTES:
        return None
    end = content.rfind(b"\n") + 1
    if container.kind == "csv" and content.count(b'"', 0, end) % 2:
        opening = content.rfind(b'"', 0, end)  # of a value with several lines
        end = content.rfind(b"\n", 0, opening) + 1
    file.write_bytes(content[:end])
    return file


def fetch_references(
    locations: Locations,
    account: str,
    table: Path,
    address: str,
    columns: Mapping[str, str] | None = None,
) -> None:
    """Fetch images and audio files in the rows of ``table``, with the account's rights.

    Args:
        locations: data by address.
        account: account that owns the job.
        table: rows on this machine. Files are stored below the same folder.
        address: address of the rows, to which paths in the rows are relative.
        columns: column names in the file by luthier's names.

    Raises:
        DataError: if files are missing or too large.
    """
    if table.suffix in (".zip", ".npz"):
        return  # archives contain their files
    own = {name for key, name in (columns or {}).items() if key in REFERENCES and name}
    wanted: dict[str, int] = {}
    # Training reports problems of the rows.
    for line, record in read_records(table, []):
        for reference in media_references(record, (*REFERENCES, *own)):
            wanted.setdefault(reference, line)
        if len(wanted) > MAX_REFERENCES:
            message = f"The rows name more than {MAX_REFERENCES:,} images or audio files."
            raise DataError(
                [Problem("media.count", message, "Split the file.", Location(address, line))]
            )
    problems: list[Problem] = []
    incoming = table.parent / ".incoming"
    for reference, line in wanted.items():
        place = _resolve(reference, address)
        if place is None or (table.parent / place[1]).exists():
            continue  # reading the row reports the problem
        try:
            ((_, copy),) = locations.fetch(account, place[0], incoming)
            if copy.stat().st_size > MOST_MEDIA_BYTES:
                raise LocationRefused(f"{place[0]} has more than {MOST_MEDIA_BYTES:,} bytes.")
            target = table.parent / place[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(copy, target)
        except (LocationRefused, OSError) as error:
            text = (
                str(error)
                if isinstance(error, LocationRefused)
                else f"{reference} cannot be stored."
            )
            fix = "Fix the path, upload the file, or remove the row."
            problems.append(Problem("media.missing", text, fix, Location(address, line)))
        if len(problems) >= MAX_MISSING:
            break
    shutil.rmtree(incoming, ignore_errors=True)
    if problems:
        raise DataError(problems)


def _resolve(reference: str, address: str) -> tuple[str, str] | None:
    """Return the address and the relative path of a reference; ``None`` for an invalid reference."""
    if reference.startswith("s3://"):
        return None if reference.endswith("/") else (reference, object_name(reference))
    path = posixpath.normpath(reference)
    # A row must not read or write files outside of the table's folder.
    if path.startswith(("/", "..")) or "\0" in path or not is_media(path):
        return None
    if any(part.startswith(".") for part in PurePosixPath(path).parts):
        return None
    return f"{address.rpartition('/')[0]}/{path}", path
