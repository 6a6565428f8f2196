"""What measuring processes import, once for all of them: they are forked from a process that has it.

That process does nothing but import, so that no thread of a tokenizer is cut off by the fork, and the
pages of libraries and of the language model are in memory once.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib import import_module

import luthier.gate.checks  # noqa: F401 - all that measures
from luthier.gate.language_identification import load_identifier

MODULES = ("transformers.tokenization_utils_tokenizers", "phonenumbers", "stdnum.iban")
"""Heavy modules that checks or tokenizers import when they are first used."""

for _name in MODULES:
    with suppress(ImportError):
        import_module(_name)
with suppress(ImportError):
    load_identifier()
gc.collect()
gc.freeze()  # or the collector would write to every page
