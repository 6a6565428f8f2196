"""Accounts, users and their keys."""

from __future__ import annotations

import pytest
from principals_of import FIRST, KEY, OTHER
from sqlalchemy import select

from luthier.errors import RefusedInput
from luthier.server.tables import accounts, principals
from luthier.server.tables.custom_models import CustomModel
from luthier.server.tables.database import Database, now
from luthier.server.tables.idempotency import Attempt, remember
from luthier.server.tables.openai import batches
from luthier.server.tables.secrets import Sealing


def test_account_creation_and_lookup(database: Database) -> None:
    with database.write() as session:
        accounts.create_account(session, OTHER, "other")
        accounts.create_account(session, FIRST)
    with database.read() as session:
        assert [each.id for each in accounts.accounts(session)] == [FIRST, OTHER]
        for wrong in ("1", "x" * 12, "１" * 12, FIRST):
            with pytest.raises(RefusedInput):
                accounts.create_account(session, wrong)
        with pytest.raises(RefusedInput):
            accounts.disable_account(session, "222222222222")


def test_account_with_resources_is_not_removed(database: Database) -> None:
    with database.write() as session:
        accounts.create_account(session, FIRST)
        accounts.set_quota(session, FIRST, deployments=1)
        session.add(
            CustomModel(
                id="abcdefabcdef",
                account=FIRST,
                name="m",
                foundation="a.b",
                root="a.b",
                base_model="arn",
                status="Active",
                details={},
                created=now(),
            )
        )
        principals.create_user(session, FIRST, "ann")
    with (
        database.write() as session,
        pytest.raises(RefusedInput, match="custom_models"),
    ):
        accounts.remove_account(session, FIRST)
    with database.write() as session:
        principals.remove_user(session, principals.user_of(session, FIRST, "ann"))
        session.delete(session.scalars(select(CustomModel)).one())
        session.flush()
        accounts.remove_account(session, FIRST)
    with database.read() as session:
        assert accounts.accounts(session) == []


def test_ended_batches_and_answered_requests_are_removed_with_account(database: Database) -> None:
    with database.write() as session:
        accounts.create_account(session, FIRST)
        remember(session, Attempt.of(FIRST, "CreateJob", "token", {}), {"id": "1"})
        batch = batches.create(
            session, FIRST, {"account": FIRST}, "/v1/embeddings", "24h", "file-1", {}
        )
        batch_id = batch.id
    with pytest.raises(RefusedInput, match="1 in batches"), database.write() as session:
        accounts.remove_account(session, FIRST)
    with database.write() as session:
        found = batches.get(session, FIRST, batch_id)
        assert found is not None
        batches.end(session, found, batches.COMPLETED)
    with database.write() as session:
        accounts.remove_account(session, FIRST)
    with database.read() as session:
        assert accounts.accounts(session) == []
        assert batches.get(session, FIRST, batch_id) is None


def test_account_quotas_are_set_and_reset(database: Database) -> None:
    with database.write() as session:
        accounts.create_account(session, FIRST)
        assert accounts.quota_of(session, FIRST) == {}
        accounts.set_quota(session, FIRST, jobs_in_flight=2, requests_per_second=0.5)
        accounts.set_quota(session, FIRST, jobs_in_flight=None, custom_models=0)
        found = accounts.quota_of(session, FIRST)
        assert found == {"requests_per_second": 0.5, "custom_models": 0}
        for wrong in ({"deployments": -1}, {"requests_per_second": float("nan")}, {"cars": 1}):
            with pytest.raises(RefusedInput):
                accounts.set_quota(session, FIRST, **wrong)


def test_users_with_same_name_in_two_accounts_are_separate(database: Database) -> None:
    with database.write() as session:
        for account in (FIRST, OTHER):
            accounts.create_account(session, account)
            principals.create_user(session, account, "ann")
        with pytest.raises(RefusedInput):
            principals.create_user(session, FIRST, "ann")
        with pytest.raises(RefusedInput):
            principals.create_user(session, "222222222222", "ann")
        with pytest.raises(RefusedInput):
            principals.create_user(session, FIRST, "an/n")
        assert [each.account for each in principals.users(session)] == [FIRST, OTHER]
        assert len(principals.users(session, FIRST)) == 1


def test_keys_are_distinct(database: Database) -> None:
    with database.write() as session:
        accounts.create_account(session, FIRST)
        ann = principals.create_user(session, FIRST, "ann")
        made = [principals.create_access_key(session, ann, Sealing(KEY)) for _ in range(5)]
        values = [principals.create_api_key(session, ann) for _ in range(5)]
        assert len({secret for _, secret in made} | {text for _, text in values}) == 10
        assert all(len(secret) >= 40 for _, secret in made)
        assert all(text.startswith("sk-") and len(text) > 40 for _, text in values)
        assert all(text[8:] not in repr(vars(key)) for key, text in values)
        with pytest.raises(RefusedInput):
            principals.create_access_key(session, ann, Sealing(KEY), made[0][0].id)
        assert principals.key_of(session, made[0][0].id) is made[0][0]
        assert principals.key_of(session, values[0][0].id) is values[0][0]
        with pytest.raises(RefusedInput):
            principals.key_of(session, "x")
