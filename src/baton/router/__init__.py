"""The front door: pairs a prefill with a decode worker, forwards over HTTP, retries, migrates broken streams.

Imports `protocol` only. Front door of the room: `baton.router.launch.router_main`. Reading order: `launch` (flags in
`args`, values in `config`) -> `app` -> `exchange` (one client request) -> `attempt` (one try on one pair) -> `relay`
(one stream). `policies`, `radix`, `breaker`, `retry`, `body` and `relay` are pure: no socket, no clock.
"""
