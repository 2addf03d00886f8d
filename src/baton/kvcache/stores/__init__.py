"""The store tier (L3): KV pages outside the process that computed them.

`base` is the interface of a store, `worker` runs one on threads with time-outs and a breaker, `seal` makes sure that what comes
back is what was put there, `objects` names and cuts pages into objects; the back ends are modules of their own. Which page goes
where and when is `kvcache.tiered_cache`'s business.
"""
