"""Records of captured requests, in the format and under the keys of Bedrock's invocation logs."""

from __future__ import annotations

import gzip
import json
import re
import secrets
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from luthier.server.http.exchanges import Exchange
from luthier.server.http.messages import Fault, parse_json
from luthier.server.live.redaction import redact
from luthier.server.live.streams import STREAMS, response_body
from luthier.server.tables.live.captures import CapturedRequest, CaptureSettings
from luthier.server.tables.text import storable

Record = dict[str, Any]
LARGE_BODY = 100_000
"""Maximum size of a body in a record, in bytes; larger bodies are objects of their own."""
LOGS = "/BedrockModelInvocationLogs/"
"""Folder of the records in the keys."""
BODY_KEY = re.compile(r"/data/(?P<request>[^/]+)_(?:input|output)\.json\.gz$")
"""End of the key of a large body."""


def folder_of(account: str, prefix: str = "") -> str:
    """Return the beginning of the keys of an account's records."""
    return f"{prefix.strip('/')}/AWSLogs/{account}{LOGS}".removeprefix("/")


def hour_folder(settings: CaptureSettings, region: str, moment: datetime) -> str:
    """Return the folder of records written at ``moment``."""
    return f"{folder_of(settings.account, settings.prefix)}{region}/{moment:%Y/%m/%d/%H}"


def object_name(moment: datetime) -> str:
    """Return a new name of an object with records."""
    milliseconds = moment.microsecond // 1000
    return f"{moment:%Y%m%dT%H%M%S}{milliseconds:03d}Z_{secrets.token_hex(8)}.json.gz"


def record_of(
    exchange: Exchange, settings: CaptureSettings, region: str
) -> tuple[Record, CapturedRequest]:
    """Return the record of an exchange, redacted, and the row without the record's location."""
    request = exchange.request
    sent = parse_json(request) if isinstance(request, bytes) else request
    returned = None
    if not exchange.error or exchange.content_type.startswith(STREAMS):
        returned = response_body(exchange.content_type, b"".join(exchange.pieces))
    # Before redaction, which may replace digits of an id or ARN.
    named = sent.get("model") if isinstance(sent, dict) else None
    response_id = returned.get("id") if isinstance(returned, dict) else None
    parts = {"metadata": _metadata_of(exchange, sent), "input": sent, "output": returned}
    if settings.redact:
        parts = redact(parts)
    sent, returned, metadata = parts["input"], parts["output"], parts["metadata"]
    row = CapturedRequest(
        account=exchange.account, id=exchange.request_id,
        response_id=str(response_id or ""),
        created=exchange.received, operation=exchange.operation,
        model=storable(exchange.model or str(named or "")), stored_id=exchange.stored_id,
        error=exchange.error, input_tokens=exchange.input_tokens,
        output_tokens=exchange.output_tokens, milliseconds=exchange.milliseconds,
        answers=_count_answers(returned), user_metadata=metadata,
    )  # fmt: skip
    record = {
        "schemaType": "ModelInvocationLog",
        "schemaVersion": "1.0",
        "timestamp": f"{exchange.received:%Y-%m-%dT%H:%M:%SZ}",
        "accountId": exchange.account,
        "identity": {"arn": exchange.user_arn},
        "region": region,
        "requestId": exchange.request_id,
        "operation": exchange.operation,
        "modelId": row.model,
        **({"errorCode": f"{exchange.error}Exception"} if exchange.error else {}),
        **({"requestMetadata": metadata} if metadata else {}),
        "inferenceRegion": region,
        "input": {
            "inputContentType": "application/json",
            "inputBodyJson": sent,
            "inputTokenCount": exchange.input_tokens,
        },
    }
    if returned is not None:
        record["output"] = {
            "outputContentType": "application/json",
            "outputBodyJson": returned,
            "outputTokenCount": exchange.output_tokens,
        }
    return record, row


def _count_answers(returned: Any) -> int:
    """Return the number of predictions or choices in a response."""
    parts = returned if isinstance(returned, dict) else {}
    found = parts.get("answers") or parts.get("choices")
    return len(found) if isinstance(found, list) else 1


def _metadata_of(exchange: Exchange, sent: Any) -> dict[str, str]:
    """Return ``requestMetadata`` of Bedrock's APIs, or ``metadata`` of OpenAI's."""
    given: Any = {}
    if isinstance(sent, dict):
        given = sent.get("requestMetadata") or sent.get("metadata") or {}
    if exchange.metadata:
        try:
            given = parse_json(exchange.metadata.encode())
        except (ValueError, Fault):
            given = {}
    if not isinstance(given, dict):
        return {}
    return {str(name): value for name, value in given.items() if isinstance(value, str)}


def move_large_bodies(record: Record, bucket: str, folder: str) -> Iterator[tuple[str, bytes]]:
    """Replace large bodies of ``record`` by addresses; yield keys and contents of the bodies."""
    for side in ("input", "output"):
        part = record.get(side, {})
        body = json.dumps(part.get(f"{side}BodyJson"), ensure_ascii=False).encode()
        if len(body) > LARGE_BODY:
            key = f"{folder}/data/{record['requestId']}_{side}.json.gz"
            del part[f"{side}BodyJson"]
            part[f"{side}BodyS3Path"] = f"s3://{bucket}/{key}"
            yield key, gzip.compress(body, 1)


def encode_record(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line, in a separate gzip member."""
    line = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    return gzip.compress(line.encode() + b"\n", 1)
