"""``luthier push``."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from luthier.cli.console import heavy_imports, note, print_json, print_text
from luthier.cli.options import Json


def push(
    model: Annotated[str, typer.Argument(help="A model with a certificate.")],
    to: Annotated[str, typer.Option(help="hub:owner/name, a repository of the Hugging Face hub.")],
    format_: Annotated[
        Literal["safetensors", "onnx", "gguf"],
        typer.Option("--format", help="As of `luthier models export`."),
    ] = "safetensors",
    merged: Annotated[
        bool | None,
        typer.Option(
            "--merged/--adapter",
            help="Fold the adapter in, or upload it alone, as safetensors if not given.",
        ),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of a GGUF file, as of `luthier models export`.")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see it; else it is private.")
    ] = False,
    json_: Json = False,
) -> None:
    """Upload a model to the Hugging Face hub."""
    with heavy_imports():
        from luthier.sdk.hub import push as run

    done = run(
        model,
        to,
        format=format_,
        merged=merged,
        quantization=quantization,
        public=public,
        note=note,
    )
    if json_:
        print_json(done.plain())
        return
    who = "only its owner sees it" if done.private else "everybody sees it"
    print_text(f"{done.model} is at {done.url} ({who}), commit {done.commit}")
