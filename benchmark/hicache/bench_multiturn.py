"""SGLang's bench_multiturn at the path where people run it; the same as `baton bench multiturn`."""

import sys

from baton.bench.multiturn import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
