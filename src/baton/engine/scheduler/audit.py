"""The scheduler's self-check: pages, handles and places of all requests agree. Reads, changes nothing."""

from baton.engine.scheduler.places import Places
from baton.engine.scheduler.request import Request, Status
from baton.kvcache.integrity import IntegrityError
from baton.kvcache.prefix_cache import PrefixCache

PLACE_OF_STATUS: dict[Status, frozenset[str]] = {
    Status.BOOTSTRAPPING: frozenset({"room"}),
    Status.PREALLOC: frozenset({"prealloc"}),
    Status.RECEIVING: frozenset({"room"}),
    Status.WITHDRAWING: frozenset({"room"}),
    Status.READY: frozenset({"ready"}),
    Status.WAITING: frozenset({"waiting"}),
    Status.PREFILLING: frozenset({"chunked", "step"}),
    Status.RUNNING: frozenset({"decode"}),
    Status.SENDING: frozenset({"room"}),
    Status.CANCELLING: frozenset({"room"}),
}


def audit(cache: PrefixCache, at: Places) -> None:
    """Raises `IntegrityError` (pages, places) or AssertionError (decode rows)."""
    live = at.life.live.values()
    found: dict[int, list[str]] = {}
    holders: dict[int, Request] = {id(req): req for req in (*live, *at.rooms)}
    for place, req in at:
        found.setdefault(id(req), []).append(place)
        holders[id(req)] = req
    is_live = {id(req) for req in live}
    for req in holders.values():
        _check_request(req, found.get(id(req), []), id(req) in is_live, cache.page_size)
    at.decode.check()
    with_handle = [req for req in holders.values() if req.handle is not None]
    if len({id(req.handle) for req in with_handle}) != cache.num_handles:
        raise IntegrityError(f"{len(with_handle)} requests hold handles, the cache has {cache.num_handles} live ones")
    in_use = {f"{req.rid} ({req.status.value})": req.private_pages for req in with_handle}
    cache.check_integrity({**in_use, "steps in flight": at.steps.leftover_pages})


def _check_request(req: Request, places: list[str], is_live: bool, page_size: int) -> None:
    name = f"{req.rid} ({req.status.value})"
    allowed = PLACE_OF_STATUS.get(req.status, frozenset())
    if len(places) != 1 or places[0] not in allowed:
        raise IntegrityError(f"{name} is in {places or 'no place'}, must be in one of {sorted(allowed)}")
    if is_live == (req.status is Status.CANCELLING):
        raise IntegrityError(f"{name}: the client {'still waits' if is_live else 'was told the end'}")
    if req.handle is None and (req.pages or req.num_computed):
        raise IntegrityError(f"{name} has {len(req.pages)} pages and {req.num_computed} tokens without a handle")
    if not req.num_computed <= min(len(req.pages) * page_size, req.num_tokens):
        raise IntegrityError(
            f"{name} has computed {req.num_computed} of {req.num_tokens} tokens, with {len(req.pages)} pages"
        )
    if req.status in (Status.RUNNING, Status.READY) and req.num_computed != req.num_tokens - 1:
        raise IntegrityError(f"{name} has {req.num_tokens} tokens, {req.num_computed} of them computed")
