"""Speed of reading and checking rows against json and orjson, and memory for a large file.

    python benchmarks/reading_speed.py [FOLDER] [--large GB]

FOLDER has JSON Lines files at any depth. Parsers that are not installed are skipped. Rates use
processor time. ``--large`` writes a file of the given size in gigabytes and reads the file in a
separate process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from luthier.data.files import parsing
from luthier.data.rows import RowReader

BYTES = 20_000_000


def parsers() -> Iterator[tuple[str, Callable[[bytes], object]]]:
    yield "json.loads", json.loads
    try:
        import orjson

        yield "orjson.loads (keeps the last of repeated keys)", orjson.loads
    except ImportError:
        pass
    yield "luthier, strict parser", lambda line: parsing._strict(line, 2)
    yield "luthier, parse_line", lambda line: parsing.parse_line(line, 2)


def rate(run: Callable[[], object], size: int, times: int = 3) -> float:
    """The best of several runs, in MB a second of the process."""
    best = 0.0
    for _ in range(times):
        started = time.process_time()
        run()
        best = max(best, size / 1e6 / (time.process_time() - started))
    return best


def measure(source: Path, name: str, folder: Path) -> None:
    lines = [line for line in source.read_bytes().split(b"\n") if line]
    lines *= max(1, BYTES // sum(map(len, lines)))
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    size = path.stat().st_size
    print(f"{name}: {len(lines):,} lines of {size / len(lines):,.0f} bytes")
    for parser, parse in parsers():

        def run(parse: Callable[[bytes], object] = parse) -> None:
            for line in lines:
                parse(line)

        print(f"  {rate(run, size):7,.0f} MB/s  {parser}")
    # As loading is called by everyone, but without holding the rows.
    found = rate(lambda: sum(1 for _ in RowReader(path)), size)
    print(f"  {found:7,.0f} MB/s  read and checked")


def large(gigabytes: float, folder: Path) -> None:
    path = folder / "large.jsonl"
    row = json.dumps({"prompt": "words " * 60, "completion": "more \u2028 words " * 60}) + "\n"
    block = row.encode() * 1000
    with path.open("wb") as file:
        while file.tell() < gigabytes * 1e9:
            file.write(block)
    process = multiprocessing.get_context("spawn").Process(target=read_large, args=(path,))
    process.start()
    process.join()
    path.unlink()


def read_large(path: Path) -> None:
    places: list[int] = []
    started = time.perf_counter()
    reader = RowReader(path, on_progress=lambda done, size: places.append(done))
    rows = sum(1 for _ in reader)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"{reader.size / 1e9:.2f} GB, {rows:,} rows in {seconds:.0f} s "
        f"({reader.size / 1e6 / seconds:,.0f} MB/s), peak memory of the process {peak:,.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--large", type=float, default=0.0, metavar="GB")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for path in sorted(given.folder.rglob("train*.jsonl")) if given.folder else []:
            measure(path, path.relative_to(given.folder).as_posix(), Path(name))
        if given.large:
            large(given.large, Path(name))


if __name__ == "__main__":
    main()
