"""Baton: prefill and decode on separate workers, KV caches in tiers, one group of roles."""

__version__ = "0.1.0"
