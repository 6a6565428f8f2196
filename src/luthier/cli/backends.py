"""``luthier backends``."""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.console import heavy_imports, new_table, note, print_json, print_table, print_text
from luthier.cli.options import Json


def backends(
    model: Annotated[str, typer.Argument(help="A model that writes.")],
    streams: Annotated[
        list[int] | None,
        typer.Option(help="Answers that are written at once; again for more. Else 1, 8 and 32."),
    ] = None,
    to: Annotated[
        list[str] | None,
        typer.Option(help="Types of llama.cpp's weights; again for more. Else f16 and q8_0."),
    ] = None,
    json_: Json = False,
) -> None:
    """Measure which backend writes a model fastest here, and for how many streams."""
    with heavy_imports():
        from luthier.sdk.export import GGUF_TYPES, STREAMS, backend_speeds

    found = backend_speeds(model, streams or STREAMS, to or GGUF_TYPES, note=note)
    if json_:
        print_json(found.plain())
        return
    counts = [*found.speeds[0].tokens_per_second]
    heads = [f"{count} stream{'s' * (count != 1)}" for count in counts]
    table = new_table("backend", "weights", *heads, "nats", numbers=(*heads, "nats"))
    for each in found.speeds:
        speeds = [f"{each.tokens_per_second[count]:.0f}" for count in counts]
        nats = "" if each.nats is None else f"{each.nats:.1g}"
        table.add_row(each.backend, each.shown_weights, *speeds, nats)
    print_text(f"{found.model} on {found.machine}; tokens a second of all streams together")
    print_table(table)
    for line in found.advice():
        print_text(line)
