"""Requests, batches, policies: which tokens the next step computes. No torch, no I/O, no clock, no threads."""
