"""What measuring processes import, once for all of them: they are forked from a process that has it.

That process does nothing but import, so that no thread of a tokenizer is cut off by the fork, and the
pages of libraries and of the language model are in memory once.
"""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from importlib import import_module

# Each process has a core. Read by numpy's import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import luthier.gate.checks  # noqa: F401 - all that measures
from luthier.gate.language_identification import load_identifier

MODULES = ("phonenumbers", "stdnum.iban")
"""Heavy modules that checks import when they are first used."""

for _name in MODULES:
    with suppress(ImportError):
        import_module(_name)
with suppress(ImportError):
    load_identifier()
gc.collect()
gc.freeze()  # or the collector would write to every page
