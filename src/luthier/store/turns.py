"""Turns of accounts: what one of them asked for many times makes no other wait for all of it."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session


def next_turn(
    session: Session, turn: Any, account: Any, mine: str, *going_on: ColumnElement[bool]
) -> int:
    """The turn after the last one of account ``mine``; where it has none, the one the others are at.

    So an account that asks for one thing waits for one of each other account at most, however many
    those asked for before (start-time fair queueing, Goyal, Vin and Cheng 1996, with equal shares).

    Args:
        turn: column of the turns.
        account: column of the accounts.
        mine: who asks.
        going_on: what has not ended, and does not rest.
    """
    lowest = select(func.min(turn)).where(*going_on)
    last = select(func.max(turn)).where(account == mine, *going_on)
    own, now_at = session.scalar(last), session.scalar(lowest)
    return int(now_at or 0) if own is None else int(own) + 1
