"""Passed probes of networks, stored once for all tests, commands and workers.

Each test has a home of its own, and would compare each network with transformers again. Only tests
of models do.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FOLDER = "LUTHIER_TEST_PROBES"
"""Environment variable with the folder; without the variable, each home has its own probes."""


def remember_probes() -> None:
    """Store passed probes in the folder, from now on."""
    from luthier.models.decoding.torch_backend import FlatBackend
    from luthier.models.networks import probe

    record, equals_modules = probe._record, FlatBackend._equals_modules

    def shared_record(*arguments: Any) -> Path:
        path, folder = record(*arguments), os.environ.get(FOLDER)
        return Path(folder, path.name) if folder else path

    def remembered(self: FlatBackend) -> bool:
        if not (folder := os.environ.get(FOLDER)):
            return equals_modules(self)
        model, fields = self.network.model, self.network.model.config.to_dict()
        kinds = sorted({type(each).__qualname__ for each in model.modules()})
        known = [{**fields, "_name_or_path": None}, str(self.network.dtype), self._first, kinds]
        digest = hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()
        passed = Path(folder, digest)
        if not passed.exists():
            if not equals_modules(self):
                return False
            passed.touch()
        return True

    probe._record = shared_record
    FlatBackend._equals_modules = remembered  # type: ignore[method-assign]
