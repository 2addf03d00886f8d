"""vLLM's entry points over our worker: its flags, its multi-node script. Its HTTP dialect is `baton.engine.server.vllm`."""
