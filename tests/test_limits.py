"""Tests of limits on the command line."""

from __future__ import annotations

import pytest

from luthier.errors import RefusedInput
from luthier.limits import ServerLimits, parse_limits


def test_only_named_limits_change() -> None:
    limits = parse_limits(["connections=7", "idle_seconds=1.5"])
    assert (limits.connections, limits.idle_seconds) == (7, 1.5)
    assert limits.streams == ServerLimits().streams


@pytest.mark.parametrize("setting", ["connections", "nothing=1", "connections=0", "connections=x"])
def test_unknown_limit_is_rejected(setting: str) -> None:
    with pytest.raises(RefusedInput) as refused:
        parse_limits([setting])
    assert refused.value.setting == setting.partition("=")[0]


def test_misspelt_limit_gets_suggestion() -> None:
    with pytest.raises(RefusedInput) as refused:
        parse_limits(["conections=3"])
    assert "connections" in str(refused.value)


def test_inconsistent_limits_are_rejected() -> None:
    with pytest.raises(RefusedInput) as refused:
        parse_limits(["weights_share=0.9"])
    assert refused.value.setting is None
