"""Foundation model operations: list and get."""

from __future__ import annotations

from typing import Any

from luthier.server.bedrock.control import ControlRequest, Operate, not_found
from luthier.server.http.messages import Fault
from luthier.server.identifiers import find_foundation, invoked_arn
from luthier.server.jobs.submit import CONTINUED_PRE_TRAINING, DISTILLATION, FINE_TUNING
from luthier.server.tables.foundation import FoundationModel, foundation_models

WRITER_TYPES = (FINE_TUNING, CONTINUED_PRE_TRAINING, DISTILLATION)
ENCODER_TYPES = (FINE_TUNING, CONTINUED_PRE_TRAINING)
MEDIA_TYPES = (FINE_TUNING,)
_INFERENCE = ["ON_DEMAND", "PROVISIONED"]


def list_foundation_models(request: ControlRequest) -> dict[str, Any]:
    """List the foundation models that match the filters, without pagination."""
    request.record("*")
    models = [_model_details(request, model) for model in foundation_models()]
    if provider := request.get("byProvider"):
        models = [each for each in models if each["providerName"].lower() == provider.lower()]
    for parameter, member in (
        ("byCustomizationType", "customizationsSupported"),
        ("byOutputModality", "outputModalities"),
        ("byInferenceType", "inferenceTypesSupported"),
    ):
        value = request.get(parameter)
        models = [each for each in models if value is None or value in each[member]]
    return {"modelSummaries": models}


def get_foundation_model(request: ControlRequest) -> dict[str, Any]:
    """Return a foundation model by id, alias or ARN."""
    identifier = request["modelIdentifier"]
    return {"modelDetails": _model_details(request, _find(request, identifier))}


def customizations(model: FoundationModel) -> tuple[str, ...]:
    """Return the customization types that ``model`` supports, among the types that AWS's clients
    know."""
    if model.modalities not in (("TEXT", "TEXT"), ("TEXT", "EMBEDDING")):
        return MEDIA_TYPES
    return WRITER_TYPES if model.writes else ENCODER_TYPES


def _find(request: ControlRequest, identifier: str) -> FoundationModel:
    request.record(invoked_arn(request.arns, identifier))
    model = find_foundation(request.arns, identifier)
    if model is None and "." not in identifier:
        # Bedrock's ids have a dot; any other name is an alias.
        raise Fault("Validation", "The provided model identifier is invalid.")
    if model is None:
        raise not_found("foundation model", identifier)
    return model


def _model_details(request: ControlRequest, model: FoundationModel) -> dict[str, Any]:
    return {
        "modelArn": request.arns.foundation_model(model.id),
        "modelId": model.id,
        "modelName": model.name,
        "providerName": model.provider,
        "inputModalities": [each for each in model.modalities[:1] if each],
        "outputModalities": [each for each in model.modalities[1:] if each],
        "responseStreamingSupported": model.writes,
        "customizationsSupported": list(customizations(model)),
        "inferenceTypesSupported": _INFERENCE,
        "modelLifecycle": {"status": "ACTIVE"},
    }


OPERATIONS: dict[str, Operate] = {
    "ListFoundationModels": list_foundation_models,
    "GetFoundationModel": get_foundation_model,
}
