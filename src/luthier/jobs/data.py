"""The rows of a job: fetched once, and the same for every worker that goes on with it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from luthier.data.containers import Container, container_of
from luthier.data.parsing import Unreadable
from luthier.encryption.files import open_folder, seal_folder
from luthier.encryption.memory import working
from luthier.errors import DataError, Problem
from luthier.files import luthier_home, new_folder, read_json, sweep, write_json
from luthier.jobs.folders import JobFolders
from luthier.store.jobs import Job

_SOURCES = "sources.json"


class JobLocations(Protocol):
    """Reads and writes what addresses name, with the rights of an account."""

    def fetch(self, account: str, uri: str, folder: Path, /) -> list[Path]:
        """Local copies, made in ``folder``, of what ``uri`` names."""

    def write(self, account: str, uri: str, name: str, content: bytes, /) -> str:
        """Put ``content`` at ``name`` below ``uri``; the address of what was written."""

    def remove(self, account: str, addresses: Sequence[str], /) -> None:
        """Take back what was written there, where this service keeps it."""


@dataclass(frozen=True)
class JobData:
    """Where the rows of a job lie, and what their owner calls them."""

    folder: Path
    train: Sequence[str]
    """Names of files in ``folder``."""
    validators: Sequence[Sequence[str]]
    addresses: dict[str, str]
    """What each file was fetched from."""

    @property
    def source(self) -> str:
        """The training rows as a recipe names them."""
        return self._source("train", self.train)

    @property
    def validation(self) -> str | None:
        """All validation rows as a recipe names them."""
        files = [name for each in self.validators for name in each]
        return self._source("held", files) if files else None

    def validator(self, number: int) -> str:
        """The rows of one validator, counted from 0."""
        return self._source(f"held/{number + 1:02d}", self.validators[number])

    def show_addresses(self, text: str) -> str:
        """``text`` with what the owner of the job calls files for where they lie here."""
        for name, address in self.addresses.items():
            text = text.replace(str(self.folder / name), address)
        for part in ("train", "held"):
            text = text.replace(f"{self.folder / part}", f"the {part} data")
        for home in (working(luthier_home()), luthier_home()):
            text = text.replace(f"{home}/", "")
        return text

    def _source(self, part: str, names: Sequence[str]) -> str:
        return str(self.folder / (names[0] if len(names) == 1 else part))


def fetch_data(job: Job, folders: JobFolders, locations: JobLocations) -> JobData:
    """The data of ``job``, fetched unless they are here: a job never sees other rows when it goes on.

    Raises:
        RefusedInput: from ``locations``, for what may not or cannot be read.
        LuthierError: the same, where trying again may help.
    """
    plain = working(folders.data)
    if not (folders.data / _SOURCES).is_file():
        for folder in (folders.data, plain):
            sweep(folder.parent, job.id)
        with new_folder(plain) as fresh:
            _fetch(job, fresh, locations)
        if plain != folders.data:
            seal_folder(plain, folders.data)
    elif not (plain / _SOURCES).is_file():
        open_folder(folders.data, plain)
    recorded = read_json(plain / _SOURCES)
    data = JobData(plain, recorded["train"], recorded["validators"], recorded["addresses"])
    if job.face != "native":
        _check_lines(data)
    return data


def _check_lines(data: JobData) -> None:
    """Refuse files that are not JSON Lines, which is all that Bedrock and OpenAI take."""
    problems = []
    for name, address in data.addresses.items():
        try:
            found = container_of(data.folder / name)
        except Unreadable as bad:
            problems.append(bad.at(address, 0))
            continue
        if found != Container("jsonl"):
            message = f"The file is {found}, and JSON Lines are wanted: one object a line."
            fix = "Write it anew with `luthier convert`, without packing it."
            problems.append(Problem(address, 0, "file.form", message, fix))
    if problems:
        raise DataError(problems)


def _fetch(job: Job, folder: Path, locations: JobLocations) -> None:
    addresses: dict[str, str] = {}

    def take(uri: str, part: str, count: int) -> list[str]:
        names = []
        incoming = folder / "incoming"
        for number, path in enumerate(locations.fetch(job.account, uri, incoming), 1):
            # Names are ours: a folder of data passes over files with some names.
            name = f"{part}/{count:02d}/{number:05d}{path.suffix or '.jsonl'}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, folder / name)
            addresses[name] = f"{uri}{path.name}" if uri.endswith("/") else uri
            names.append(name)
        shutil.rmtree(incoming, ignore_errors=True)
        return names

    train = [
        name
        for number, uri in enumerate(job.details["sources"], 1)
        for name in take(uri, "train", number)
    ]
    validators = [take(uri, "held", number) for number, uri in enumerate(job.validators, 1)]
    found: dict[str, Any] = {"train": train, "validators": validators, "addresses": addresses}
    write_json(folder / _SOURCES, found)
