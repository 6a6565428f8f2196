"""Tests of this folder run with SQLite and with PostgreSQL."""

from both_databases import database, objects

__all__ = ["database", "objects"]
