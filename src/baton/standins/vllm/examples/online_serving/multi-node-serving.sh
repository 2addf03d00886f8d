#!/bin/bash
# Stand-in for vLLM's script of this name: `leader` gathers the nodes of one model, `worker` is one of them.
exec python3 -m baton.engine.vllm.multi_node "$@"
