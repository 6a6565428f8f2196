"""Roles: the permission for each operation of each API, and the permissions of each role."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from luthier.server.actions import record_action
from luthier.server.http.messages import Caller, Fault


class Permission(StrEnum):
    """A class of operations, allowed or forbidden by a role."""

    IDENTIFY = "identify"
    """Read the caller's identity and the list of models."""
    INVOKE = "invoke"
    """Query models."""
    RATE = "rate"
    """Add feedback about captured requests."""
    REVIEW = "review"
    """Read captured answers that wait for a rating."""
    READ = "read"
    """Read all resources of the account, including the content of files."""
    DEVELOP = "develop"
    """Create, change and delete files, jobs, models, deployments, batches and evals."""
    ADMINISTER = "administer"
    """Delete jobs, manage users and keys, and read the audit log."""


ROLES: Mapping[str, frozenset[Permission]] = MappingProxyType(
    {
        "administrator": frozenset(Permission),
        "developer": frozenset(Permission) - {Permission.ADMINISTER},
        "invoker": frozenset({Permission.IDENTIFY, Permission.INVOKE, Permission.RATE}),
        "reviewer": frozenset({Permission.IDENTIFY, Permission.RATE, Permission.REVIEW}),
        "read-only": frozenset({Permission.IDENTIFY, Permission.READ}),
    }
)
_OPERATIONS = {
    Permission.IDENTIFY: {
        "sts": "GetCallerIdentity",
        "bedrock": "GetFoundationModel ListFoundationModels Unsupported",
        "luthier": (
            "WhoAmI ListModels GetModel ListLoadedModels ListExamples "
            "openai.models.list openai.models.retrieve"
        ),
    },
    Permission.INVOKE: {
        "bedrock": "InvokeModel InvokeModelWithResponseStream Converse ConverseStream CountTokens",
        "luthier": (
            "Predict SampleImages ReconstructImages openai.chat.completions.create "
            "openai.completions.create openai.embeddings.create openai.images.generate "
            "openai.responses.create openai.rerank.create openai.vector_stores.search"
        ),
    },
    Permission.RATE: {"luthier": "AddFeedback"},
    Permission.REVIEW: {"luthier": "ListAnswersToReview"},
    Permission.READ: {
        "bedrock": (
            "GetCustomModel ListCustomModels GetModelCustomizationJob ListModelCustomizationJobs "
            "GetCustomModelDeployment ListCustomModelDeployments GetProvisionedModelThroughput "
            "ListProvisionedModelThroughputs ListTagsForResource "
            "GetModelInvocationLoggingConfiguration"
        ),
        "luthier": (
            "ListRows ListJobs GetJob JobEvents ListLabelIssues ListExports GetExport ListEvaluations "
            "GetSchedule GetRetraining GetEvaluation GetEvaluationReport ListComparisons GetComparison "
            "GetComparisonReport ListStudies GetStudy GetStudyReport "
            "GetCapture ListDeployments GetFeedback GetAgreement GetModelHealth ListAlerts "
            "GetDeploymentHistory "
            "GetCertificate DownloadCertificate GetUsage GetDailyUsage "
            "openai.files.list openai.files.retrieve openai.files.content "
            "openai.fine_tuning.jobs.list openai.fine_tuning.jobs.retrieve "
            "openai.fine_tuning.jobs.list_events openai.fine_tuning.jobs.list_checkpoints "
            "openai.batches.list openai.batches.retrieve openai.evals.list openai.evals.retrieve "
            "openai.evals.runs.list openai.evals.runs.retrieve openai.evals.runs.output_items.list "
            "openai.evals.runs.output_items.retrieve openai.responses.retrieve "
            "openai.responses.input_items.list openai.chat.completions.list "
            "openai.chat.completions.retrieve openai.chat.completions.messages.list "
            "openai.vector_stores.list "
            "openai.vector_stores.retrieve openai.vector_stores.files.list "
            "openai.vector_stores.files.retrieve openai.vector_stores.files.content "
            "openai.vector_stores.file_batches.retrieve openai.vector_stores.file_batches.list_files"
        ),
        "s3": "ListAllMyBuckets ListBucket GetBucketLocation GetObject",
    },
    Permission.DEVELOP: {
        "bedrock": (
            "CreateModelCustomizationJob StopModelCustomizationJob CreateCustomModel "
            "DeleteCustomModel CreateCustomModelDeployment UpdateCustomModelDeployment "
            "DeleteCustomModelDeployment CreateProvisionedModelThroughput "
            "UpdateProvisionedModelThroughput DeleteProvisionedModelThroughput TagResource "
            "UntagResource PutModelInvocationLoggingConfiguration "
            "DeleteModelInvocationLoggingConfiguration"
        ),
        "luthier": (
            "openai.responses.delete openai.chat.completions.update "
            "openai.chat.completions.delete CreateJob PauseJob ResumeJob StopJob PreviewData "
            "StoreExample InspectData CleanData EstimateJob RetrainModel CreateExport "
            "StopExport SetSchedule DeleteSchedule SetRetraining CreateEvaluation StopEvaluation "
            "DeleteEvaluation CreateComparison "
            "StopComparison DeleteComparison CreateStudy StopStudy DeleteStudy "
            "PromoteDeployment RollBackDeployment DeleteModel "
            "SetCapture CreateRows CreateDeployment LoadModel UnloadModel "
            "openai.files.create "
            "openai.files.delete openai.fine_tuning.jobs.create openai.fine_tuning.jobs.cancel "
            "openai.fine_tuning.jobs.pause openai.fine_tuning.jobs.resume "
            "openai.fine_tuning.alpha.graders.run openai.fine_tuning.alpha.graders.validate "
            "openai.models.delete openai.batches.create openai.batches.cancel openai.evals.create "
            "openai.evals.update openai.evals.delete openai.evals.runs.create "
            "openai.evals.runs.cancel openai.evals.runs.delete openai.vector_stores.create "
            "openai.vector_stores.update openai.vector_stores.delete "
            "openai.vector_stores.files.create openai.vector_stores.files.update "
            "openai.vector_stores.files.delete openai.vector_stores.file_batches.create "
            "openai.vector_stores.file_batches.cancel"
        ),
        "s3": "CreateBucket DeleteBucket PutObject DeleteObject AbortMultipartUpload",
    },
    Permission.ADMINISTER: {
        "luthier": "DeleteJob ListUsers CreateUser CreateKey DeleteKey ListAuditEntries UnpackModel"
    },
}
PERMISSIONS: Mapping[str, Permission] = MappingProxyType(
    {
        f"{service}:{name}": permission
        for permission, services in _OPERATIONS.items()
        for service, names in services.items()
        for name in names.split()
    }
)
"""Permission by action (``bedrock:CreateModelCustomizationJob``)."""
CHANGES = frozenset(
    action
    for action, permission in PERMISSIONS.items()
    if permission in (Permission.DEVELOP, Permission.ADMINISTER)
) - {
    "luthier:PreviewData",
    "luthier:InspectData",
    "luthier:EstimateJob",
    "luthier:openai.fine_tuning.alpha.graders.run",
    "luthier:openai.fine_tuning.alpha.graders.validate",
}
"""Actions that change resources, and so have entries in the audit log."""


def permissions_of(caller: Caller) -> frozenset[Permission]:
    """Return the permissions of all roles of ``caller``."""
    first, *further = caller.roles
    return ROLES[first].intersection(*(ROLES[role] for role in further))


def authorize(caller: Caller, action: str, resource: str) -> None:
    """Check that the caller's roles allow ``action``. A rejection is recorded for the audit log.

    Raises:
        Fault: ``AccessDenied``.
    """
    if PERMISSIONS[action] not in permissions_of(caller):
        record_action(action, resource)
        roles = " and ".join(caller.roles)
        text = f"User: {caller.arn} is not authorized to perform: {action} with the role {roles}."
        raise Fault("AccessDenied", text)
