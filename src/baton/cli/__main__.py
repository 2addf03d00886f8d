"""`python -m baton.cli`, the same as the `baton` script."""

from baton.cli.main import main

main()
