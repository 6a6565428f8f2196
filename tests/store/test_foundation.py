"""Foundation models by what clients call them."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.store.foundation import foundation_model

ALIAS = "smollm2-135m-instruct"
ID = f"huggingfacetb.{ALIAS}"
ARN = f"arn:aws:bedrock:us-east-1::foundation-model/{ID}"


@pytest.mark.parametrize("identifier", [ID, ALIAS, ARN])
def test_each_of_its_names(luthier_home: Path, identifier: str) -> None:
    found = foundation_model(identifier)
    assert found is not None and (found.id, found.base) == (ID, ALIAS)


@pytest.mark.parametrize(
    "identifier",
    [
        f"junk:foundation-model/{ID}",
        f":foundation-model/{ALIAS}",
        ARN.replace(ID, ALIAS),
        ARN.replace("::", ":000000000000:"),
        ARN.replace("foundation-model/", "custom-model/"),
        ARN.replace("bedrock", "s3"),
        f"{ARN}x",
        "",
    ],
)
def test_what_only_looks_like_one_is_none(luthier_home: Path, identifier: str) -> None:
    assert foundation_model(identifier) is None
