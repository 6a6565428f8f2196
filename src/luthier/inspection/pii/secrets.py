"""Keys, tokens and passwords, by the forms that their vendors document.

Values that are plainly made up (``AKIAIOSFODNN7EXAMPLE``, ``sk-xxxx``, ``your-api-key``) are left out.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from luthier.inspection.pii.spans import Span, near

_BOT = ":AA"
"""What stands inside Telegram's tokens, up to ten digits after their start."""
_TOKENS: tuple[tuple[str, str, str], ...] = (
    # Name, text that must be there, pattern.
    ("AWS access key id", "AKIA", r"(?<![A-Z0-9])AKIA[A-Z2-7]{16}(?![A-Z0-9])"),
    ("AWS access key id", "ASIA", r"(?<![A-Z0-9])ASIA[A-Z2-7]{16}(?![A-Z0-9])"),
    *(("GitHub token", f"gh{kind}_", rf"\bgh{kind}_[A-Za-z0-9]{{36,255}}\b") for kind in "pousr"),
    ("GitHub token", "github_pat_", r"\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b"),
    ("GitLab token", "glpat-", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    ("Anthropic key", "sk-ant-", r"\bsk-ant-[A-Za-z0-9]+-[A-Za-z0-9_-]{60,}"),
    (
        "OpenAI key",
        "sk-",
        r"\bsk-(?:(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,}|(?!ant-)[A-Za-z0-9]{20,})(?![\w-])",
    ),
    ("Google API key", "AIza", r"\bAIza[A-Za-z0-9_-]{35}(?![\w-])"),
    ("Google OAuth secret", "GOCSPX-", r"\bGOCSPX-[A-Za-z0-9_-]{28}(?![\w-])"),
    ("Slack token", "xox", r"\bxox[abeoprs]-(?:\d+-)?[A-Za-z0-9-]{10,}"),
    (
        "Slack webhook",
        "hooks.slack.com/",
        r"hooks\.slack\.com/services/T[A-Z0-9]{6,}/B[A-Z0-9]{6,}/[A-Za-z0-9]{20,}",
    ),
    ("Stripe key", "sk_live_", r"\bsk_live_[A-Za-z0-9]{16,}\b"),
    ("Stripe key", "rk_live_", r"\brk_live_[A-Za-z0-9]{16,}\b"),
    ("Hugging Face token", "hf_", r"\bhf_[A-Za-z]{34}\b"),
    ("npm token", "npm_", r"\bnpm_[A-Za-z0-9]{36}\b"),
    ("PyPI token", "pypi-AgE", r"\bpypi-AgE[A-Za-z0-9_-]{50,}"),
    ("SendGrid key", "SG.", r"\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}(?![\w-])"),
    ("Telegram bot token", _BOT, r"\b\d{8,10}:AA[A-Za-z0-9_-]{33}(?![\w-])"),
    ("Azure storage key", "AccountKey=", r"AccountKey=(?P<value>[A-Za-z0-9+/]{86}==)"),
    ("DigitalOcean token", "dop_v1_", r"\bdop_v1_[a-f0-9]{64}\b"),
)
_API_KEYS = tuple((name, mark, re.compile(pattern)) for name, mark, pattern in _TOKENS)
_PEM = re.compile(
    r"-----BEGIN (?P<type>[A-Z0-9 ]{0,20}PRIVATE KEY)(?: BLOCK)?-----"
    r"(?P<body>(?:[\w+/=\s\\:,.()]|-(?!----)){40,20000})"
    r"(?:-----END [A-Z0-9 ]{0,40}-----)?"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/]{40}")
_JWT = re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{16,}")
_URL = re.compile(r"://[^\s/:@]{1,64}:(?P<value>[^\s/@]{3,128})@[\w.-]+")
_NAMES = ("secret", "token", "passw", "pwd", "key", "mật khẩu")
_ASSIGNED = re.compile(
    r"(?:secret|token|passw(?:or)?d|passwd|pwd|(?:api|access|auth|account)[ _-]?key|mật khẩu)"
    r"[\w.-]{0,24}[\"'`]?\s{0,4}(?:=>|:=|=|:|\bis\b|\blà\b)\s{0,4}[\"'`]?"
    r"(?P<value>[a-z0-9_+/=.!@$%^&*~-]{8,256})"
)
"""What is assigned to a name for secrets, in lower case."""
_MADE_UP = re.compile(
    r"example|sample|dummy|your|change|replace|insert|placeholder|redacted|xxxx|\*\*\*|\.\.\.|<|"
    r"0000000|1234567890(?!\d)|abcdefgh|(.)\1{7}",
    re.IGNORECASE,
)
LEAST_BITS = 3.0
"""Entropy, in bits a character, below which an assigned value of letters and digits is no key."""


def secrets(text: str) -> Iterator[Span]:
    """Every secret of ``text``; ``value`` is the secret itself."""
    if "PRIVATE KEY" in text:
        for found in _PEM.finditer(text):
            if _BASE64.search(found["body"]):
                yield Span(*found.span(), "private_key", _named(found["type"]), found[0])
    for name, mark, pattern in _API_KEYS:
        for found in near(mark, pattern, text, 10 if mark == _BOT else 0, 512):
            group = "value" if "value" in pattern.groupindex else 0
            if not _MADE_UP.search(found[group]):
                yield Span(*found.span(group), "api_key", name, found[group])
    for found in near("eyJ", _JWT, text, 0, 8192):
        yield Span(*found.span(), "jwt", "JSON web token", found[0])
    for found in near("://", _URL, text, 0, 512):
        if not _MADE_UP.search(found["value"]) and not _is_variable(found["value"]):
            yield Span(*found.span("value"), "password", "password in a URL", found["value"])
    yield from _assigned(text)


def _named(written: str) -> str:
    """``RSA PRIVATE KEY`` as people write it."""
    return written.replace("PRIVATE KEY", "private key").replace("OPENSSH", "OpenSSH")


def _assigned(text: str) -> Iterator[Span]:
    lower = text.replace("İ", "I").lower()  # The one letter that would become two.
    if not any(name in lower for name in _NAMES):
        return
    for found in _ASSIGNED.finditer(lower):
        start, end = found.span("value")
        value = text[start:end]
        value = value if value.endswith("==") else value.rstrip(".!=")
        if _is_random(value) and not _MADE_UP.search(value):
            yield Span(start, start + len(value), "password", "assigned secret", value)


def _is_random(value: str) -> bool:
    """Whether ``value`` looks drawn or chosen as a password, not written as a word or as code."""
    kinds = sum(
        1
        for pattern in ("[a-z]", "[A-Z]", "[0-9]", r"[^A-Za-z0-9_.\-/=]")
        if re.search(pattern, value)
    )
    if len(value) < 8 or kinds < 2 or _is_variable(value):
        return False
    if not re.search("[0-9]", value) and kinds < 3:
        return False
    return len(value) < 12 or entropy(value) >= LEAST_BITS


def _is_variable(value: str) -> bool:
    """Names of code: ``os.environ.get``, ``${TOKEN}``, ``self.token1``, ``snake_case``."""
    return (
        value.startswith(("$", "%", "{"))
        or re.fullmatch(r"[A-Za-z]+(?:[._-][A-Za-z]+\d{0,2})+|[a-z]+(?:[A-Z][a-z]+)+\d{0,2}", value)
        is not None
    )


def entropy(value: str) -> float:
    """Shannon entropy of the characters, in bits a character."""
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
