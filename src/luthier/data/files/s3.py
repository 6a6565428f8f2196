"""Local copies of ``s3://bucket/key`` objects, cached in the store by ETag.

A key names one object. An empty key or a key that ends with ``/`` names all data files below the
prefix. If there are images or audio files, the copies keep the folder structure. Credentials,
region and endpoint come from the environment variables of boto3 (``AWS_ACCESS_KEY_ID``,
``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` or
``AWS_ENDPOINT_URL_S3``), or from the machine's role.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

from luthier.data.files.containers import needs
from luthier.data.files.sources import choose_data_files, files_of, source_error
from luthier.data.inputs import is_media
from luthier.errors import DataError
from luthier.files import luthier_home, new_file, new_folder

BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
"""Names of buckets."""
_PIECE = 1 << 23
LONGEST_NAME = 255
"""Bytes of a name in a file system."""


def split_address(address: str) -> tuple[str, str] | None:
    """Return bucket and key of an ``s3://`` address; ``None`` for any other source."""
    match = re.fullmatch(rf"s3://({BUCKET})(?:/(.*))?", address, re.DOTALL)
    return (match[1], match[2] or "") if match else None


def fetch(address: str) -> list[Path]:
    """Return local copies of the objects at ``address``, in the order of the keys.

    Raises:
        DataError: if no object exists, or an object cannot be read.
    """
    try:
        import obstore
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError:
        missing = needs("obstore", "s3", "Reading s3://")
        raise DataError([missing.at(address, 0)]) from None
    parts = split_address(address)
    if parts is None:
        message = "An S3 address has a bucket and a key."
        raise source_error(address, "file.remote", message, "Write s3://bucket/folder/rows.jsonl.")
    bucket, key = parts
    try:
        store = S3Store(bucket, **connection_settings())
        objects = _list_objects(obstore, store, key, address)
        copies = [_copy(obstore, store, bucket, each) for each in objects]
        if key != objects[0]["path"] and any(is_media(copy.name) for copy in copies):
            tree = _make_tree(bucket, key.strip("/"), objects, copies, address)
            try:
                return files_of(tree)
            except DataError as bad:  # with paths of the copies, so replace the location
                problems = [each.at(address, each.line) for each in bad.problems]
                raise DataError(problems) from None
        return copies
    except (BaseError, OSError, PermissionError) as error:
        reason = str(error).strip().split("\n", 1)[0][:300]
        fix = "Check bucket, key, endpoint (AWS_ENDPOINT_URL) and credentials (AWS_ACCESS_KEY_ID, ...)."
        raise source_error(address, "file.remote", f"S3 could not be read: {reason}", fix) from None


def connection_settings(endpoint: str | None = None) -> dict[str, Any]:
    """Return the settings that obstore does not read from the environment; ``endpoint`` overrides."""
    endpoint = (
        endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    settings: dict[str, Any] = {"region": region or "us-east-1"}
    if endpoint:
        # Like boto3, accept a custom endpoint unchanged, also with http.
        allowed = {"allow_http": endpoint.startswith("http://")}
        settings |= {"endpoint": endpoint, "client_options": allowed}
    return settings


def is_file_name(part: str) -> bool:
    """Return whether a part of a key is a valid file name."""
    return part not in ("", ".", "..") and len(part.encode()) <= LONGEST_NAME and "\0" not in part


def local_name(key: str) -> str:
    """Return a safe file name for an object: the last part of the key, for the file ending."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", key.rsplit("/", 1)[-1])[-100:].lstrip(".") or "object"


def _list_objects(obstore: Any, store: Any, key: str, address: str) -> list[dict[str, Any]]:
    if key and not key.endswith("/"):
        try:
            return [obstore.head(store, key)]
        except FileNotFoundError:
            pass  # not an object, so a prefix
    prefix = key.rstrip("/")
    below = [each for batch in obstore.list(store, prefix=prefix or None) for each in batch]
    # Some tools create an empty object for a folder.
    below = [each for each in below if not str(each["path"]).endswith(("/", "_$folder$"))]
    if not below:
        message = "No object exists at or below this address."
        raise source_error(address, "file.no_match", message, "Check the bucket and the key.")
    below.sort(key=lambda each: str(each["path"]))
    start = len(prefix) + 1 if prefix else 0
    if any(is_media(each["path"]) for each in below):
        return below
    candidates = [(str(each["path"])[start:], each) for each in below]
    return [each for _, each in choose_data_files(candidates, address)]


def _make_tree(
    bucket: str, prefix: str, objects: list[dict[str, Any]], copies: list[Path], address: str
) -> Path:
    """Return a folder with the copies of all objects below a prefix, named like the keys."""
    versions = [f"{each['path']}\n{copy}" for each, copy in zip(objects, copies, strict=True)]
    digest = hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]
    target = luthier_home() / "cache" / "s3" / bucket / digest / (local_name(prefix) or bucket)
    if target.is_dir():
        return target
    with new_folder(target) as fresh:
        for each, copy in zip(objects, copies, strict=True):
            parts = str(each["path"])[len(prefix) + 1 if prefix else 0 :].split("/")
            path = fresh.joinpath(*parts)
            # A key may contain "..", or be both a file and a folder.
            try:
                if not all(is_file_name(part) for part in parts):
                    raise OSError
                path.parent.mkdir(parents=True, exist_ok=True)
                os.link(copy, path)
            except OSError:
                message = f"The key {each['path']!r} is not a valid file path."
                raise source_error(address, "file.remote", message, "Rename the object.") from None
    return target


def _copy(obstore: Any, store: Any, bucket: str, metadata: dict[str, Any]) -> Path:
    """Return the cached copy of an object; download if this version is not cached."""
    key, size = str(metadata["path"]), int(metadata["size"])
    endpoint = connection_settings().get("endpoint", "")
    version = f"{endpoint}\n{bucket}\n{key}\n{metadata['e_tag']}\n{size}"
    digest = hashlib.sha256(version.encode()).hexdigest()[:16]
    target = luthier_home() / "cache" / "s3" / bucket / digest / local_name(key)
    if target.is_file() and target.stat().st_size == size:
        return target
    response = obstore.get(
        store, key, options={"if_match": metadata["e_tag"]} if metadata["e_tag"] else None
    )
    with new_file(target) as file:
        done = 0
        for piece in response.stream(min_chunk_size=_PIECE):
            done += file.write(piece)
            _print_progress(key, done, size)
        if done != size:
            raise OSError(f"{key} has {size} bytes, but {done} arrived")
    return target


def _print_progress(key: str, done: int, size: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if done >= size else ""
        sys.stderr.write(f"\rdownload {key}: {done / 1e6:,.0f} of {size / 1e6:,.0f} MB{end}")
        sys.stderr.flush()
