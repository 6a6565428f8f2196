"""Imports of the fork server for worker processes.

The fork server only imports modules: no tokenizer thread is lost in a fork, and the worker
processes share the memory of the libraries and of the language model.
"""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from importlib import import_module

# Each process has a core. Read by numpy's import.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import luthier.gate.checks  # noqa: F401 - all that measures
from luthier.data.languages import load_identifier

MODULES = ("phonenumbers", "stdnum.iban")
"""Heavy modules that checks import lazily."""

for _name in MODULES:
    with suppress(ImportError):
        import_module(_name)
with suppress(ImportError):
    load_identifier()
gc.collect()
gc.freeze()  # or the collector would write to every page
