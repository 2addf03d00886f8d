"""Benchmarks of running services over HTTP: multi-turn conversations, and what an ideal cache would make of them."""
