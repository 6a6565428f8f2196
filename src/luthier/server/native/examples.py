"""Use cases with sample rows, for a first job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luthier.errors import RecipeError
from luthier.examples import contents, files_of, use_case, use_cases
from luthier.server.http.messages import Fault
from luthier.server.native.operations import NativeCall, View, native_router
from luthier.server.stores.uploaded_files import file_address

router = native_router()
TRAINING = "train.jsonl"
"""Name of the training rows of a use case."""


class ExampleView(View):
    """A use case."""

    name: str
    title: str
    result: str
    """Scores of the tuned model and its best rival."""
    measure: str
    credit: str
    """Source and licence of the rows."""


class ExamplesView(View):
    """All use cases."""

    examples: list[ExampleView]


class StoredExampleView(View):
    """Sample rows as files of the account."""

    files: dict[str, str]
    """Address by name of the file, such as ``train.jsonl``."""


@router.get("/examples")
def list_examples(call: NativeCall) -> ExamplesView:
    """List use cases with measured results."""
    uses = filter(_has_training_file, use_cases())
    return ExamplesView(examples=[ExampleView.model_validate(use) for use in uses])


@router.post("/examples/{name}")
def store_example(call: NativeCall, name: str) -> StoredExampleView:
    """Store the sample rows of a use case as files of the account."""
    call.record("file")
    try:
        use = use_case(name)
    except RecipeError as error:
        raise Fault("ResourceNotFound", str(error), parameter="name") from None
    if not _has_training_file(use):
        message = f"the rows of {name} are a folder, and a job reads files"
        raise Fault("ResourceNotFound", message, parameter="name")
    files = files_of(use)
    stored = {
        path: call.context.locations.uploads.add(
            call.account, [contents(source)], f"{name}-{path}", "fine-tune"
        )
        for path, source in files.items()
        if path.endswith(".jsonl")
    }
    for path, each in stored.items():
        note = call.record_created if path == TRAINING else call.record
        note(f"file/{each.id}")
    return StoredExampleView(files={path: file_address(each.id) for path, each in stored.items()})


def _has_training_file(use: Mapping[str, Any]) -> bool:
    # A job reads files; rows of images are folders.
    return TRAINING in use["files"].values()
