"""Loop over the cases of the GPU benchmark, for one side in its own process."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Case = dict[str, Any]


def run_cases(train: Callable[[Case], dict[str, Any]]) -> None:
    """Train each case of the JSON file in ``sys.argv[1]`` and print one JSON line per case.

    A line has the results of ``train``, or its error, and on a GPU the peak memory of the device.
    """
    # Not at the top: luthier sets the behaviour of idle threads if it is imported before torch.
    import torch

    for case in json.loads(Path(sys.argv[1]).read_text()):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            measured = train(case)
        except Exception as error:
            traceback.print_exc()
            measured = {"error": f"{type(error).__name__}: {error}"}
        if torch.cuda.is_available():
            measured["memory_bytes"] = torch.cuda.max_memory_allocated()
        print(json.dumps({"case": case["name"], **measured}), flush=True)
