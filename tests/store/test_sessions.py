"""Session tokens, and the IAM roles that stand behind them, on both databases."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from principals_of import ALLOW_ALL, FIRST, KEY, OTHER

from luthier.errors import RefusedInput
from luthier.store import accounts, principals
from luthier.store.database import Database, now
from luthier.store.sealing import Sealing
from luthier.store.sessions import (
    TemporarySession,
    issue,
    open_token,
    secret_of,
    session_principal,
)

SEALING = Sealing(KEY)
TRUST: dict[str, Any] = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": {"AWS": FIRST}}],
}


@pytest.fixture
def database(database: Database) -> Database:
    with database.write() as session:
        for account in (FIRST, OTHER):
            accounts.create_account(session, account)
        ann = principals.create_user(session, FIRST, "ann", [ALLOW_ALL])
        principals.create_access_key(session, ann, SEALING, "AKIAANN", "secret")
        principals.create_role(session, OTHER, "tuner", TRUST, [ALLOW_ALL])
    return database


def begun(database: Database, *roles: str, **more: Any) -> TemporarySession:
    with database.read() as session:
        key = session.get(principals.AccessKey, "AKIAANN")
        assert key is not None
        ids = tuple(principals.role_of(session, OTHER, role).id for role in roles)
        return TemporarySession(
            account=FIRST, user="ann", access_key=key.id, key_created=key.created, roles=ids,
            expires=now() + timedelta(hours=1), **more,
        )  # fmt: skip


def signer(database: Database, temporary: TemporarySession) -> principals.Principal | None:
    with database.read() as session:
        return session_principal(session, temporary)


def test_a_token_gives_back_what_was_sealed(database: Database) -> None:
    session = begun(database, "tuner", name="work", policy='{"é": 1}')
    made = issue(KEY, session)
    assert open_token(KEY, made.access_key, made.token) == session
    assert made.secret == secret_of(KEY, made.access_key) and len(made.secret) == 40
    assert made.secret not in repr(made) and made.token not in repr(made)
    other = issue(KEY, session)
    assert {made.access_key, made.secret, made.token}.isdisjoint(vars(other).values())


def test_no_other_token_opens(database: Database) -> None:
    made = issue(KEY, begun(database))
    text = made.token
    wrong = [
        text[:n] + ("A" if text[n] != "A" else "B") + text[n + 1 :] for n in range(len(text) - 4)
    ]
    wrong += ["", "A", text[:-8], f"{text}AAAA", text + "!", text.replace("=", ""), "é", "\0"]
    assert not any(open_token(KEY, made.access_key, each) for each in wrong if each != text)
    assert open_token(KEY, "ASIAOTHER", text) is None
    assert open_token(bytes(32), made.access_key, text) is None


def test_who_acts_in_a_session(database: Database) -> None:
    own = signer(database, begun(database))
    assert own is not None and (own.account, own.user, own.secret) == (FIRST, "ann", "")
    assert own.id.startswith("AIDA") and own.policies == (ALLOW_ALL,)
    temporary = begun(database, "tuner", name="work")
    acting = signer(database, temporary)
    assert acting is not None
    assert (acting.account, acting.user) == (OTHER, "assumed-role/tuner/work")
    assert acting.id == f"{temporary.roles[0]}:work" and acting.policies == (ALLOW_ALL,)
    with database.write() as session:
        principals.update_role(session, principals.role_of(session, OTHER, "tuner"), policies=[])
    assert (found := signer(database, temporary)) is not None and found.policies == ()


def test_what_is_made_anew_under_an_old_name_opens_no_old_session(database: Database) -> None:
    own, role = begun(database), begun(database, "tuner", name="work")
    with database.write() as session:
        principals.remove_role(session, principals.role_of(session, OTHER, "tuner"))
        session.flush()
        principals.create_role(session, OTHER, "tuner", TRUST, [ALLOW_ALL])
    assert signer(database, own) is not None and signer(database, role) is None
    with database.write() as session:
        principals.remove_user(session, principals.user_of(session, FIRST, "ann"))
        session.flush()
        ann = principals.create_user(session, FIRST, "ann", [ALLOW_ALL])
        principals.create_access_key(session, ann, SEALING, "AKIAANN", "secret")
    assert signer(database, own) is None
    assert signer(database, begun(database)) is not None


def test_a_key_that_another_user_has_now(database: Database) -> None:
    own = begun(database)
    with database.write() as session:
        key = session.get(principals.AccessKey, "AKIAANN")
        assert key is not None
        key.user = principals.create_user(session, FIRST, "bob", [ALLOW_ALL]).seq
    assert signer(database, own) is None


@pytest.mark.parametrize("change", ["key disabled", "key removed", "user disabled"])
def test_a_session_ends_with_its_key_and_not_at_its_time(database: Database, change: str) -> None:
    temporary = begun(database, "tuner", name="work")
    late = temporary.model_copy(update={"expires": now() - timedelta(hours=1)})
    assert signer(database, late) is not None
    with database.write() as session:
        if change == "key disabled":
            principals.disable_key(session, principals.key_of(session, "AKIAANN"))
        elif change == "key removed":
            principals.remove_key(session, principals.key_of(session, "AKIAANN"))
        else:
            principals.disable_user(session, principals.user_of(session, FIRST, "ann"))
    assert signer(database, temporary) is None


@pytest.mark.parametrize(
    ("principal", "word"),
    [
        ({"AWS": "*"}, "whom you trust"),
        ("*", "whom you trust"),
        ({"AWS": "arn:aws:iam::*:root"}, "whom you trust"),
        ({"AWS": ["arn:aws:s3:::bucket"]}, "whom you trust"),
        ({"Other": "x"}, "whom you trust"),
        (None, "whom you trust"),
    ],
)
def test_trust_policies_name_whom_they_trust(principal: Any, word: str) -> None:
    statement = {"Effect": "Allow", "Action": "sts:AssumeRole", "Principal": principal}
    with pytest.raises(RefusedInput, match=word):
        principals.check_trust({"Statement": statement})


@pytest.mark.parametrize(
    "change",
    [{"Resource": "*"}, {"NotPrincipal": {"AWS": FIRST}}, {"NotAction": "sts:*"}, {"Effect": "Maybe"},
     {"Action": []}, {"Action": "AssumeRole"}],
)  # fmt: skip
def test_trust_policies_that_cannot_be_evaluated(change: dict[str, Any]) -> None:
    with pytest.raises(RefusedInput):
        principals.check_trust({"Statement": [{**TRUST["Statement"][0], **change}]})


def test_roles_are_checked_and_named_once(database: Database) -> None:
    with database.write() as session:
        create = principals.create_role
        for name, more in (
            ("tuner", {}), ("a/b", {}), ("", {}), ("x", {"max_session_seconds": 3599}),
            ("x", {"max_session_seconds": 43201}), ("x", {"policies": [TRUST]}),
        ):  # fmt: skip
            with pytest.raises(RefusedInput):
                create(session, OTHER, name, TRUST, **more)
        with pytest.raises(RefusedInput):
            create(session, "999999999999", "x", TRUST)
        session.rollback()
    with database.write() as session, pytest.raises(RefusedInput, match="1 in iam_roles"):
        accounts.remove_account(session, OTHER)
