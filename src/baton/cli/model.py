"""`baton model NAME`: have a model on this machine and print where it is."""

from typing import Annotated

import typer

from baton.engine.errors import ModelError
from baton.engine.weights.resolve import resolve_model


def model(
    name: Annotated[str, typer.Argument(help="smollm2 (the demo model), a directory, a .gguf file or a hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the path.")] = False,
) -> None:
    """Prepare a model in the user's cache and print its directory."""
    try:
        path = resolve_model(name, revision)
    except ModelError as error:
        typer.echo(f"baton model: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(str(path) if quiet else f"{name} is ready: {path}")
