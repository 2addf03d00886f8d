"""`python3 -m sglang.srt.disaggregation.mini_lb ...`: the Baton router, with mini_lb's flags and defaults."""

import sys

from baton.router.launch import mini_lb_main

if __name__ == "__main__":
    sys.exit(mini_lb_main(sys.argv[1:]))
