"""`python3 -m vllm_router.launch_router ...`: the Baton router."""

import sys

from baton.router.launch import launch_router_main

if __name__ == "__main__":
    sys.exit(launch_router_main(sys.argv[1:]))
