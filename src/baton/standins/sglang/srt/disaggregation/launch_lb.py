"""`python3 -m sglang.srt.disaggregation.launch_lb ...`: the older name of mini_lb."""

import sys

from baton.router.launch import mini_lb_main

if __name__ == "__main__":
    sys.exit(mini_lb_main(sys.argv[1:]))
