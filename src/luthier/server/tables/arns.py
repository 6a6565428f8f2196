"""ARNs of what the service keeps, as Amazon Bedrock writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Arn:
    """The parts of an ARN of Bedrock."""

    region: str
    account: str
    """Empty for a foundation model, which belongs to nobody."""
    kind: str
    """``foundation-model``, ``model-customization-job``, ``custom-model``, ..."""
    path: str
    """What follows: an id, or a foundation model's id and an id."""

    def __str__(self) -> str:
        return f"arn:aws:bedrock:{self.region}:{self.account}:{self.kind}/{self.path}"

    @property
    def id(self) -> str:
        """The last part of the path."""
        return self.path.rpartition("/")[2]

    @staticmethod
    def parse(text: str) -> Arn | None:
        """The parts of ``text``; ``None`` where it is no ARN of Bedrock.

        The only partition is ``aws``.
        """
        found = re.fullmatch(
            r"arn:aws:bedrock:([a-z0-9-]{1,20}):([0-9]{12})?:([a-z-]+)/([^\s:]+)", text
        )
        return Arn(found[1], found[2] or "", found[3], found[4]) if found else None


def object_arn(bucket: str, key: str) -> str:
    """Of an object in a bucket."""
    return f"arn:aws:s3:::{bucket}/{key}"


@dataclass(frozen=True)
class Arns:
    """Makes the ARNs of one server."""

    region: str = "us-east-1"

    def foundation_model(self, model: str) -> str:
        """Of a base model by its ``provider.name``."""
        return str(Arn(self.region, "", "foundation-model", model))

    def of(self, account: str, kind: str, path: str) -> str:
        """Of something that ``account`` owns."""
        return str(Arn(self.region, account, kind, path))

    def job(self, account: str, foundation: str, job_id: str) -> str:
        """Of a customization job."""
        return self.of(account, "model-customization-job", f"{foundation}/{job_id}")

    def openai(self, account: str, kind: str, identifier: str) -> str:
        """Of what only the OpenAI API knows by this name: a ``file``, a ``batch``, ..."""
        return f"arn:aws:luthier:{self.region}:{account}:{kind}/{identifier}"

    def custom_model(self, account: str, foundation: str, model_id: str) -> str:
        """Of a custom model; ``foundation`` is ``imported`` for one made elsewhere."""
        return self.of(account, "custom-model", f"{foundation}/{model_id}")
