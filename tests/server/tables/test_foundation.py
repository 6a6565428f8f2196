"""Foundation models by the names that clients use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from luthier.errors import UnknownModel
from luthier.files import write_json
from luthier.library.folders import base_folder
from luthier.library.models import find
from luthier.models.base_kinds import KINDS, sole_objective
from luthier.models.catalog import CATALOG, HubSource
from luthier.models.manifest import MANIFEST, Manifest
from luthier.server.tables.foundation import foundation_model, foundation_models

ALIAS = "smollm2-135m-instruct"
ID = f"huggingfacetb.{ALIAS}"
ARN = f"arn:aws:bedrock:us-east-1::foundation-model/{ID}"


@pytest.mark.parametrize("identifier", [ID, ALIAS, ARN])
def test_foundation_model_by_id_alias_and_arn(luthier_home: Path, identifier: str) -> None:
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
def test_malformed_identifier_is_no_foundation_model(luthier_home: Path, identifier: str) -> None:
    assert foundation_model(identifier) is None


def test_hub_models_are_listed_after_download(luthier_home: Path) -> None:
    # A package, or random weights, sets no request to fetching from the hub.
    without_hub = [name for name in CATALOG if not isinstance(CATALOG[name].source, HubSource)]
    assert sorted(model.base for model in foundation_models()) == sorted(without_hub)
    for name in CATALOG:
        write_json(base_folder(name) / MANIFEST, {"id": name, "kind": CATALOG[name].kind})
    assert {model.base: model.kind for model in foundation_models()} == {
        name: CATALOG[name].kind for name in CATALOG
    }
    assert [model.base for model in foundation_models() if model.writes] == [
        name for name, entry in CATALOG.items() if entry.kind == "causal_lm"
    ]
    # Models that do not generate return embeddings, also encoders with a masked-LM head.
    assert find("bert-base-uncased").objective.method == "contrastive"


def test_pretrained_masked_language_model_cannot_generate(luthier_home: Path) -> None:
    for name, kind in (("words", "masked_lm"), ("texts", "causal_lm")):
        write_json(base_folder(name) / MANIFEST, {"id": name, "kind": kind})
    made = {model.base: model.writes for model in foundation_models()}
    assert {name: made[name] for name in ("words", "texts")} == {"words": False, "texts": True}


def test_kinds_with_a_sole_objective() -> None:
    assert {kind: sole_objective(kind) for kind in KINDS} == {
        **dict.fromkeys(("causal_lm", "encoder", "masked_lm", "image_encoder", "audio_encoder")),
        "image_text_encoder": "contrastive", "autoencoding": "vae", "adversarial": "gan",
        "denoising": "diffusion", "image_to_text": "image_to_text", "reranker": None,
    }  # fmt: skip
    assert sole_objective("sequence_classification") is None and sole_objective(None) is None


def test_unknown_kind_is_rejected_and_not_listed(luthier_home: Path) -> None:
    write_json(base_folder("odd") / MANIFEST, {"id": "odd", "kind": "oracle"})
    assert foundation_model("odd") is None
    with pytest.raises(UnknownModel, match="oracle"):
        _ = find("odd").objective
    with pytest.raises(UnknownModel, match="oracle"):
        replace(CATALOG[ALIAS], kind="oracle")


def test_pretrained_models_are_cached_until_a_change(
    luthier_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = base_folder("words") / MANIFEST
    write_json(made, {"id": "words", "kind": "masked_lm"})
    read: list[Path] = []
    plain = Manifest.read
    monkeypatch.setattr(Manifest, "read", lambda folder: read.append(folder) or plain(folder))
    for _ in range(3):
        found = foundation_model("words")
        assert found is not None and found.kind == "masked_lm"
        assert foundation_model("luthier.words") == found
    assert read == [made.parent]
    write_json(made, {"id": "words", "kind": "causal_lm"})
    found = foundation_model("words")
    assert found is not None and found.kind == "causal_lm"
    write_json(base_folder("texts") / MANIFEST, {"id": "texts", "kind": "causal_lm"})
    assert foundation_model("texts") is not None
    made.unlink()
    assert foundation_model("words") is None and foundation_model("texts") is not None


def test_deleted_catalog_model_is_not_found(luthier_home: Path) -> None:
    (name, *_) = [name for name in CATALOG if isinstance(CATALOG[name].source, HubSource)]
    record = base_folder(name) / MANIFEST
    write_json(record, {"id": name, "kind": CATALOG[name].kind})
    assert foundation_model(name) is not None
    record.unlink()
    assert foundation_model(name) is None
