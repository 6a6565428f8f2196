"""The list of models, by the unmodified client."""

from __future__ import annotations

import openai
import pytest

from luthier.store.foundation import foundation_models


def test_the_list_is_one_whole_page(client: openai.OpenAI) -> None:
    raw = client.models.with_raw_response.list()
    body = raw.http_response.json()
    names = [each["id"] for each in body["data"]]
    assert names == [each.base for each in foundation_models()]
    assert (body["object"], body["has_more"]) == ("list", False)
    assert (body["first_id"], body["last_id"]) == (names[0], names[-1])
    assert [each.id for each in client.models.list()] == names
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing-like-it")
