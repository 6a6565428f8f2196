"""Model invocation logging: the capture settings of the account, in Bedrock's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.errors import ObjectRefused
from luthier.server.bedrock.control import ControlRequest, Operate, invalid
from luthier.server.live import settings
from luthier.server.tables.captures import CaptureSettings


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
    """Return the logging configuration; nothing without one."""
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


OPERATIONS: Mapping[str, Operate] = {
    "PutModelInvocationLoggingConfiguration": put_logging,
    "GetModelInvocationLoggingConfiguration": get_logging,
    "DeleteModelInvocationLoggingConfiguration": delete_logging,
}
