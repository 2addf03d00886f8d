"""Handing KV pages from prefill to decode.

Contract: `base`. Front doors: `prefill.open_prefill_transfer`, `decode.open_decode_transfer`, and for the prefill worker's
HTTP process `bootstrap.bootstrap_app`. Settings: `config`.
"""
