"""Cost of capture: median time of a chat of an account with capture against one without, in pairs.

One server, two accounts, the same prompt: the requests alternate, so that other load of the machine
meets both. The order within a pair alternates, too.

Run: python benchmarks/capture_cost.py [PAIRS]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai

from children import served
from luthier.files import luthier_home

MODEL, TOKENS = "smollm2-135m-instruct", 16
ON, OFF = "000000000000", "111111111111"
PROMPT = "My chain keeps slipping. Write to ann.meyer@acme-corp.io or call +1 415 555 2671. " * 4


def principal(account: str) -> dict[str, str]:
    return {
        "account": account, "user": "bench", "access_key_id": f"AKIABENCH{account}",
        "secret_access_key": "0123456789abcdef" * 2, "api_key": f"sk-bench-{account}-0123456789ab",
        "role": "administrator",
    }  # fmt: skip


def main(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "models").symlink_to(luthier_home() / "models")
        people = {"principals": [principal(ON), principal(OFF)]}
        (home / "bootstrap.json").write_text(json.dumps(people))
        os.environ |= {
            "LUTHIER_HOME": folder, "LUTHIER_BOOTSTRAP": str(home / "bootstrap.json"),
        }  # fmt: skip
        luthier = [sys.executable, "-m", "luthier"]
        with served() as (url, _):
            subprocess.run([*luthier, "live", "capture", "on"], check=True)
            clients = {
                account: openai.OpenAI(
                    base_url=f"{url}/v1", api_key=principal(account)["api_key"], timeout=600
                )
                for account in (ON, OFF)
            }
            measure(clients, pairs)
            subprocess.run([*luthier, "live", "capture", "show"], check=True)


def measure(clients: dict[str, openai.OpenAI], pairs: int) -> None:
    times: dict[str, list[float]] = {ON: [], OFF: []}
    for number in range(-2, pairs):
        for account in (ON, OFF) if number % 2 else (OFF, ON):
            began = time.perf_counter()
            clients[account].chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": PROMPT}], max_tokens=TOKENS,
                temperature=0,
            )  # fmt: skip
            if number >= 0:
                times[account].append(time.perf_counter() - began)
    on, off = (statistics.median(times[account]) for account in (ON, OFF))
    ratios = sorted(a / b for a, b in zip(times[ON], times[OFF], strict=True))
    middle = statistics.median(ratios)
    low, high = ratios[len(ratios) // 4], ratios[-len(ratios) // 4]
    print(f"{pairs} pairs: median {on * 1000:.0f} ms with capture, {off * 1000:.0f} ms without")
    print(f"ratio of the medians {on / off:.3f}; median of the paired ratios {middle:.3f} "
          f"(quartiles {low:.3f} to {high:.3f})")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
