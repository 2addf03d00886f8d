"""`baton bench ...`: measure a running service. The benchmarks own their flags, so arguments pass through as they stand."""

import sys

import typer

app = typer.Typer(no_args_is_help=True, help="Measure a running service.")
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("multiturn", context_settings=PASS_THROUGH, add_help_option=False)
def multiturn(context: typer.Context) -> None:
    """Multi-turn conversations: SGLang's bench_multiturn flags (`baton bench multiturn --help`)."""
    from baton.bench.multiturn import main

    sys.exit(main(context.args))
