"""The face of the object store: unlike the others it takes and gives bytes as they come."""

from __future__ import annotations

import logging
from functools import partial

from luthier.api.app import TROUBLES
from luthier.api.s3 import errors
from luthier.api.s3.body import OBJECT_LIMIT, Body
from luthier.api.s3.documents import DOCUMENT_LIMIT
from luthier.api.s3.operations import Operation, operation_of
from luthier.api.s3.request import Request, Stores, read_request
from luthier.api.sending import ClientGone, Receive, Run, Send, send_answer
from luthier.api.wire import Answer, Authorize, Fault, Head, Signed
from luthier.errors import DoesNotFit, ObjectRefused, QuotaExceeded
from luthier.limits import ServerLimits
from luthier.store.multipart import MultipartUploads
from luthier.store.objects import UPLOADS, Objects

_log = logging.getLogger("luthier.api")


class S3Face:
    """Path-style S3 on the built-in object store."""

    def __init__(
        self,
        objects: Objects,
        authorize: Authorize,
        region: str = "us-east-1",
        limits: ServerLimits | None = None,
    ) -> None:
        """``authorize`` is given caller, action and ARN, and raises :class:`Fault`."""
        self._limits = limits or ServerLimits()
        self.stores = Stores(objects, MultipartUploads(objects), authorize, region)

    async def handle(
        self, head: Head, signed: Signed, receive: Receive, send: Send, request_id: str, run: Run
    ) -> int:
        """Answer a request that was let in, all work by ``run``; the status that was sent.

        Raises:
            Fault: what the caller is to be told with :meth:`refusal`; nothing was changed.
            ClientGone: where the client hung up.
        """
        try:
            request = read_request(head, signed.caller, request_id)
            operation = operation_of(request)
            if operation.action:
                await run(self.stores.authorize, request.caller, operation.action, request.resource)
            if request.bucket == UPLOADS and request.method not in ("GET", "HEAD"):
                # Their other half is a row that this face does not know.
                text = f"{UPLOADS} holds OpenAI files: write and delete them through that API."
                raise Fault("AccessDenied", text)
            answer = await self._answer(operation, request, signed, receive, run)
        except (ObjectRefused, DoesNotFit, QuotaExceeded) as refused:
            raise errors.as_fault(refused) from refused
        except (Fault, ClientGone, *TROUBLES):
            raise
        except Exception:
            _log.exception("request failed", extra={"request_id": request_id})
            text = "We encountered an internal error. Please try again."
            raise Fault("InternalServer", text) from None
        headers = {**answer.headers, "x-amz-request-id": request_id}
        return await send_answer(send, receive, Answer(answer.status, answer.body, headers), run)

    def refusal(self, fault: Fault, request_id: str) -> Answer:
        """``fault`` as clients of S3 expect it."""
        return errors.refusal(fault, request_id)

    async def _answer(
        self,
        operation: Operation,
        request: Request,
        signed: Signed,
        receive: Receive,
        run: Run,
    ) -> Answer:
        limit = OBJECT_LIMIT if operation.keeps else DOCUMENT_LIMIT
        body = Body(request.headers, signed, limit, not operation.whole)
        if operation.works is not None:
            text = bytearray()
            await body.receive(receive, self._limits, text.extend, run)
            made: Answer = await run(operation.works, self.stores, request, bytes(text))
            return made
        assert operation.keeps is not None
        incoming = await run(operation.before, self.stores, request)
        if not body.has_length:
            text_of_it = "You must provide the Content-Length HTTP header."
            raise Fault("MissingContentLength", text_of_it)
        begin = partial(self.stores.objects.begin, freed=incoming.freed, objects=incoming.objects)
        with await run(begin, request.account, body.length) as writing:
            checksums = await body.receive(receive, self._limits, writing.write, run)
            written = await run(writing.finish)
            kept: Answer = await run(operation.keeps, self.stores, request, written, checksums)
            return kept
