"""`vllm serve ...`, as the `vllm` executable calls it."""

import sys

from baton.engine.vllm.launch import cli_main

if __name__ == "__main__":
    sys.exit(cli_main(sys.argv[1:]))
