"""`baton ...`: parses, calls a room, prints. Holds no logic.

`engine`, `router` and `bench` own their flags (they are SGLang's programs under our name), so their arguments pass through as they
stand; everything else is a typer command.
"""

import sys

import typer

import baton
from baton.cli import ask as ask_command
from baton.cli import bench as bench_command
from baton.cli import model as model_command
from baton.cli import serve as serve_command

app = typer.Typer(name="baton", no_args_is_help=True, add_completion=False, help=baton.__doc__)
app.command("model")(model_command.model)
app.command("ask")(ask_command.ask)
app.command("serve")(serve_command.serve)
app.add_typer(bench_command.app, name="bench")


@app.command("engine", context_settings=bench_command.PASS_THROUGH, add_help_option=False)
def engine(context: typer.Context) -> None:
    """One worker: SGLang's launch_server flags (`baton engine --help`)."""
    from baton.engine.launch import main as engine_main

    sys.exit(engine_main(context.args))


@app.command("router", context_settings=bench_command.PASS_THROUGH, add_help_option=False)
def router(context: typer.Context) -> None:
    """The front door: mini_lb's and sglang_router's flags (`baton router --help`)."""
    from baton.router.launch import main as router_main

    sys.exit(router_main(context.args))


@app.command("version")
def version() -> None:
    """Print the version."""
    typer.echo(baton.__version__)


def register_cluster_commands() -> None:
    """The commands of clusters, whose imports would cost a worker's start a quarter of a second."""
    from baton.cli import operator as operator_command
    from baton.cli import up as up_command

    app.command("up")(up_command.up)
    app.command("down")(up_command.down)
    app.command("env")(up_command.env)
    app.command("operator")(operator_command.operator)


def main() -> None:
    """Entry point of the `baton` script."""
    if sys.argv[1:2] not in (["engine"], ["router"]):
        register_cluster_commands()
    app()
