"""Buckets of another S3-compatible endpoint, with the credentials of the service's environment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.data.s3 import settings
from luthier.errors import DownloadError, LocationRefused
from luthier.files import new_file

_PIECE = 1 << 23


class ExternalBuckets:
    """What ``s3://`` means where the service was given an endpoint. Accounts share what it holds."""

    def __init__(self, endpoint: str) -> None:
        try:
            import obstore.store  # noqa: F401
        except ImportError:
            text = "An S3 endpoint needs the package obstore: pip install 'luthier[s3]'."
            raise LocationRefused(text) from None
        self._endpoint = endpoint

    def check_bucket(self, account: str, bucket: str) -> None:
        """Refuse a bucket that cannot be listed."""
        import obstore

        with _reached(f"s3://{bucket}"):
            next(iter(obstore.list(self._store(bucket), chunk_size=1)), None)

    def holds(self, account: str, bucket: str, key: str) -> bool:
        """Whether the key names an object."""
        import obstore

        with _reached(f"s3://{bucket}/{key}"):
            try:
                obstore.head(self._store(bucket), key)
            except FileNotFoundError:
                return False
        return True

    def below(
        self, account: str, bucket: str, prefix: str, most: int | None = None
    ) -> list[tuple[str, int]]:
        """The keys that begin with ``prefix``, which is empty or ends with ``/``, and their sizes.

        With ``most``, no further ones are asked for as soon as there are so many.
        """
        import obstore

        with _reached(f"s3://{bucket}/{prefix}"):
            batches = obstore.list(self._store(bucket), prefix=prefix.rstrip("/") or None)
            every = (each for batch in batches for each in batch)
            found = [(str(each["path"]), int(each["size"])) for each in islice(every, most)]
            return sorted(found, key=lambda each: each[0].encode())

    def fetch(self, account: str, bucket: str, key: str, target: Path) -> None:
        """Copy one version of an object to a file."""
        import obstore

        with _reached(f"s3://{bucket}/{key}"), new_file(target) as file:
            answer = obstore.get(self._store(bucket), key)
            done = sum(file.write(piece) for piece in answer.stream(min_chunk_size=_PIECE))
            if done != answer.meta["size"]:
                raise OSError(f"{answer.meta['size']} bytes were to come, and {done} came")

    def write(self, account: str, bucket: str, key: str, content: bytes | Path) -> None:
        """Let the key name these bytes."""
        import obstore

        with _reached(f"s3://{bucket}/{key}"):
            obstore.put(self._store(bucket), key, content)

    def remove(self, account: str, bucket: str, key: str) -> None:
        """Nothing: what lies elsewhere is its owner's."""

    def _store(self, bucket: str) -> Any:
        from obstore.store import S3Store

        return S3Store(bucket, **settings(self._endpoint))


@contextmanager
def _reached(what: str) -> Iterator[None]:
    """Turn what the endpoint says into an error of ours, without its address and our keys."""
    from obstore.exceptions import BaseError

    try:
        yield
    except (BaseError, OSError) as error:
        # Some operations have no error of their own for a status, and say it in their text alone.
        status = re.search(r"status code: (4[0-9]{2})\b", str(error))
        if isinstance(error, FileNotFoundError) or (status and status[1] == "404"):
            raise LocationRefused(f"There is nothing at {what}.") from None
        if isinstance(error, PermissionError) or (status and status[1] in ("401", "403")):
            raise LocationRefused(f"The service may not read or write {what}.") from None
        raise DownloadError(f"{what} could not be reached ({type(error).__name__}).") from error
