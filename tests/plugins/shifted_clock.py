"""Processes whose clock a test sets while they run.

libfaketime shifts the wall clock of a process by what a file says, and leaves the monotonic one alone,
as a machine does whose clock is set.
"""

from __future__ import annotations

from pathlib import Path

import pytest

PLACES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/local/lib/faketime/libfaketimeMT.so.1")


def shifted(shift: Path) -> dict[str, str]:
    """The environment of a process whose clock is shifted by what stands in ``shift``, such as ``+1h``.

    The test is skipped where libfaketime is not installed.
    """
    found = next((path for place in PLACES for path in Path("/").glob(place.lstrip("/"))), None)
    if found is None:
        pytest.skip("libfaketime is not installed on this machine")
    shift.write_text("+0")
    return {
        "LD_PRELOAD": str(found),
        "FAKETIME_TIMESTAMP_FILE": str(shift),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
