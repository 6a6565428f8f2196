"""What a judge said of a teacher's answers, kept: a run that goes on sorts them the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from luthier.asking.base import Failure, Reply, Writer
from luthier.asking.spec import AskedModel, Asking
from luthier.distillation.journal import Journal, journal_path, key_of
from luthier.distillation.teachers import digest_of
from luthier.store.models import find
from luthier.types import Message

AT_ONCE = 64
"""Verdicts that are asked for before they are written down; a kill loses as many at most."""


def journaled(write: Writer, judge: AskedModel, sampling: Asking) -> Writer:
    """``write`` with its answers in the journal of the judge, which is asked what is not there."""
    identity, settings = _identity(judge), sampling.model_dump(mode="json")
    path = journal_path(identity, f"judge-{judge.model}")

    def asked(conversations: Sequence[Sequence[Message]]) -> list[str | Failure]:
        keys = [key_of(identity, each, settings) for each in conversations]
        failed: dict[str, Failure] = {}
        with Journal.open(path) as journal:
            new = {
                key: each
                for key, each in zip(keys, conversations, strict=True)
                if key not in journal.replies
            }
            missing = list(new)
            for start in range(0, len(missing), AT_ONCE):
                chosen = missing[start : start + AT_ONCE]
                found = write([new[key] for key in chosen])
                for key, answer in zip(chosen, found, strict=True):
                    if isinstance(answer, Failure):
                        failed[key] = answer
                    else:
                        journal.append(key, Reply(answer, "unknown"))
            return [failed[key] if key in failed else journal.replies[key].text for key in keys]

    return asked


def _identity(judge: AskedModel) -> Mapping[str, Any]:
    """What tells the judge from others; of a local model its files too: it may be trained anew."""
    told = {"role": judge.role, "model": judge.model}
    if judge.url is not None:
        return {**told, "url": judge.url}
    return {**told, "sha256": digest_of(find(judge.model))}
