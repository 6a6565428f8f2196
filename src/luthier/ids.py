"""Random ids. Nothing heavy is imported here."""

from __future__ import annotations

import secrets
import string

SMALL = string.ascii_lowercase + string.digits
ANY = string.ascii_letters + string.digits


def random_id(length: int, letters: str = ANY) -> str:
    """``length`` of ``letters``, drawn by the operating system's generator."""
    return "".join(secrets.choice(letters) for _ in range(length))
