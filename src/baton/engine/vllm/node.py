"""`python -m baton.engine.vllm.node PARENT_PID [flags of baton engine]`: a node that its cluster's `member` started and ends with."""

import sys

from baton.engine.distributed.processes import die_with_parent
from baton.engine.launch import main

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
