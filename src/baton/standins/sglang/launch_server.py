"""`python3 -m sglang.launch_server ...`: one Baton worker."""

import sys

from baton.engine.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
