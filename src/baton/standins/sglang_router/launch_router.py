"""`python3 -m sglang_router.launch_router ...`: the Baton router."""

import sys

from baton.router.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
