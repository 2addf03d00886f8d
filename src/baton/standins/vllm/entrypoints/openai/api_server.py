"""`python3 -m vllm.entrypoints.openai.api_server ...`: one Baton worker with vLLM's flags and answers."""

import sys

from baton.engine.vllm.launch import api_server_main

if __name__ == "__main__":
    sys.exit(api_server_main(sys.argv[1:]))
