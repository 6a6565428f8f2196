"""ARNs of the service's resources, in Amazon Bedrock's format."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Arn:
    """The parts of an ARN of Bedrock."""

    region: str
    account: str
    """Empty for a foundation model."""
    kind: str
    """``foundation-model``, ``model-customization-job``, ``custom-model``, ..."""
    path: str
    """Path after the resource type: an id, or a foundation model's id and an id."""

    def __str__(self) -> str:
        return f"arn:aws:bedrock:{self.region}:{self.account}:{self.kind}/{self.path}"

    @property
    def id(self) -> str:
        """Last part of the path."""
        return self.path.rpartition("/")[2]

    @staticmethod
    def parse(text: str) -> Arn | None:
        """Return the parts of an ARN of Bedrock in the partition ``aws``; ``None`` for other texts."""
        found = re.fullmatch(
            r"arn:aws:bedrock:([a-z0-9-]{1,20}):([0-9]{12})?:([a-z-]+)/([^\s:]+)", text
        )
        return Arn(found[1], found[2] or "", found[3], found[4]) if found else None


def object_arn(bucket: str, key: str) -> str:
    """Return the ARN of an object in a bucket."""
    return f"arn:aws:s3:::{bucket}/{key}"


@dataclass(frozen=True)
class Arns:
    """Factory of a server's ARNs."""

    region: str = "us-east-1"

    def foundation_model(self, model: str) -> str:
        """Return the ARN of a base model by ``provider.name``."""
        return str(Arn(self.region, "", "foundation-model", model))

    def of(self, account: str, kind: str, path: str) -> str:
        """Return the ARN of a resource of ``account``."""
        return str(Arn(self.region, account, kind, path))

    def job(self, account: str, foundation: str, job_id: str) -> str:
        """Return the ARN of a customization job."""
        return self.of(account, "model-customization-job", f"{foundation}/{job_id}")

    def openai(self, account: str, kind: str, identifier: str) -> str:
        """Return the ARN of a resource of the OpenAI API: a ``file``, a ``batch``, ..."""
        return f"arn:aws:luthier:{self.region}:{account}:{kind}/{identifier}"

    def custom_model(self, account: str, foundation: str, model_id: str) -> str:
        """Return the ARN of a custom model; ``foundation`` is ``imported`` for an imported model."""
        return self.of(account, "custom-model", f"{foundation}/{model_id}")
