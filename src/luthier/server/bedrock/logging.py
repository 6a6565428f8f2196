"""Model invocation logging: the capture settings of the account, in Bedrock's form."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from luthier.data.files.s3 import split_address
from luthier.errors import ObjectRefused, RefusedInput
from luthier.files import json_lines
from luthier.server.bedrock.control import ControlRequest, Operate, invalid
from luthier.server.jobs.submit import FINE_TUNING
from luthier.server.live import settings
from luthier.server.live.rows import logged_answers, training_rows
from luthier.server.stores.uploaded_files import file_address
from luthier.server.tables.live.captures import CaptureSettings


def put_logging(request: ControlRequest) -> dict[str, Any]:
    """Enable capture into a bucket of the built-in store."""
    request.record("*")
    config = request["loggingConfig"]
    if "s3Config" not in config:
        text = (
            "loggingConfig needs s3Config: this server has no CloudWatch, and writes the logs to a "
            "bucket of its built-in store."
        )
        raise invalid("loggingConfig", text)
    bucket, prefix = config["s3Config"]["bucketName"], config["s3Config"].get("keyPrefix", "")
    capture, account = request.control.capture, request.account
    try:
        settings.check_writable(capture.objects, account, bucket, prefix)
    except ObjectRefused as refused:
        text = f"The bucket {bucket} does not exist in the built-in store of this server."
        raise invalid("loggingConfig.s3Config.bucketName", text) from refused
    with request.control.database.write() as session:
        settings.enable(session, account, bucket=bucket, prefix=prefix, logging=config)
        if not config.get("textDataDeliveryEnabled", True):
            settings.disable(session, account)
    capture.reload()
    return {}


def get_logging(request: ControlRequest) -> Mapping[str, Any]:
    """Return the logging configuration; nothing without a configuration."""
    request.record("*")
    with request.control.database.read() as session:
        found = session.get(CaptureSettings, request.account)
    if found is None or not found.enabled:
        return {}
    location = {"s3Config": {"bucketName": found.bucket, "keyPrefix": found.prefix}}
    return {"loggingConfig": found.logging or {**location, "textDataDeliveryEnabled": True}}


def delete_logging(request: ControlRequest) -> dict[str, Any]:
    """Disable capture."""
    request.record("*")
    with request.control.database.write() as session:
        settings.disable(session, request.account)
    request.control.capture.reload()
    return {}


def logged_rows(request: ControlRequest, config: Mapping[str, Any], kind: str) -> str:
    """Store the training rows of invocation logs as a file, and return the file's address.

    Raises:
        Fault: Validation if the logs give no rows.
    """
    where = "trainingDataConfig.invocationLogsConfig"
    if kind != FINE_TUNING or not config.get("usePromptResponse"):
        text = (
            "This server trains on prompts with the logged responses: set usePromptResponse to true "
            "and customizationType to FINE_TUNING."
        )
        raise invalid(where, text)
    ((_, address),) = config["invocationLogSource"].items()
    bucket, prefix = split_address(address) or ("", "")
    keeps = partial(_passes, config.get("requestMetadataFilters"))
    objects = request.control.capture.objects
    try:
        answers = [*logged_answers(objects, request.account, bucket, prefix or "", keeps)]
    except ObjectRefused as refused:
        raise invalid(where, f"The bucket {bucket} does not exist.") from refused
    except RefusedInput as refused:
        raise invalid(where, refused.text) from refused
    rows = training_rows(answers, "sft")
    if not rows:
        raise invalid(
            where, f"{address} has no invocation logs with responses that the filters keep."
        )
    files, content = request.control.locations.uploads, json_lines(rows).encode()
    file = files.add(request.account, [content], f"{request['jobName']}.jsonl", "fine-tune")
    return file_address(file.id)


def _passes(filters: Mapping[str, Any] | None, record: Mapping[str, Any]) -> bool:
    """Return True if the request metadata of a record satisfies ``requestMetadataFilters``."""
    if not filters:
        return True
    ((name, value),) = filters.items()
    if name in ("andAll", "orAll"):
        return (all if name == "andAll" else any)(_passes(each, record) for each in value)
    ((key, wanted),) = value.items()
    equal: bool = record.get("requestMetadata", {}).get(key) == wanted
    return equal == (name == "equals")


OPERATIONS: Mapping[str, Operate] = {
    "PutModelInvocationLoggingConfiguration": put_logging,
    "GetModelInvocationLoggingConfiguration": get_logging,
    "DeleteModelInvocationLoggingConfiguration": delete_logging,
}
