"""Which server a worker runs, as its own answers say, and whether its hand-over protocol is the one of this router.

Asked by `health` before a worker counts as healthy, so a worker of the wrong kind gets no request and `/readiness` says why. What
the protocols are is `dispatch`'s.
"""

import logging
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from baton.router.retry import Answer

if TYPE_CHECKING:
    from baton.router.core import Core
    from baton.router.workers import Worker

log = logging.getLogger("baton.router")
BATON_MARK = "+baton."
"""In the version that Baton's workers give in vLLM's dialect."""
_BATON_PATHS = {b"/health_generate": b"/health"}
_VLLM_PATHS = {**_BATON_PATHS, b"/flush_cache": b"/reset_prefix_cache", b"/get_server_info": b"/version"}


class Software(NamedTuple):
    """What a worker was found to be; unknown: it said nothing that only one of them says."""

    dialect: Literal["sglang", "vllm", "unknown"] = "unknown"
    version: str = ""
    """Of vLLM's dialect."""

    @property
    def is_baton(self) -> bool:
        """In vLLM's dialect; in SGLang's it makes no difference."""
        return BATON_MARK in self.version

    @property
    def takes_aborts(self) -> bool:
        """vLLM has no route for them: its requests end with their connection."""
        return self.dialect != "vllm" or self.is_baton

    def path(self, path: bytes) -> bytes:
        """Where this software has what SGLang has at `path`."""
        if self.dialect != "vllm":
            return path
        return (_BATON_PATHS if self.is_baton else _VLLM_PATHS).get(path, path)


async def identify(core: "Core", worker: "Worker") -> Software:
    """vLLM answers /version, and both name themselves as `owned_by` of their models; that needs the key where they have one.

    Raises OSError or TimeoutError.
    """
    timeout_s = core.config.health.timeout_s
    version_answer = await core.call(worker, b"GET", b"/version", timeout_s)
    models_answer = await core.call(worker, b"GET", b"/v1/models", timeout_s)
    given = _object(version_answer).get("version")
    version = given if isinstance(given, str) else ""
    models = _object(models_answer).get("data")
    owner = models[0].get("owned_by") if isinstance(models, list) and models and isinstance(models[0], dict) else None
    if owner == "sglang":
        return Software("sglang")
    if owner == "vllm" or BATON_MARK in version:
        return Software("vllm", version)
    if version and models_answer.status in (401, 403):
        info = await core.call(worker, b"GET", b"/get_server_info", timeout_s)
        if info.status == 404:  # others that have /version, but no SGLang routes, let their models be listed
            return Software("vllm", version)
    return Software("unknown", version)


def settle_protocol(core: "Core", worker: "Worker") -> str:
    """Why `worker` cannot be in this router's group; empty: it can. Without a given protocol, the first healthy worker decides."""
    software = worker.software
    asked = core.config.pd_protocol
    if asked is None and not any(one.healthy for one in core.registry.all()):
        core.protocol = "vllm" if software.dialect == "vllm" else "sglang"
        say = log.warning if software.dialect == "unknown" else log.info
        say(
            "hand-over protocol is %s worker=%s found=%s version=%r",
            core.protocol, worker.url, software.dialect, software.version,
        )  # fmt: skip
    # Baton's workers take SGLang's protocol in vLLM's dialect too; that is for who asks for it to know.
    takes_both = software.is_baton and asked == "sglang"
    if software.dialect not in ("unknown", core.protocol) and not takes_both:
        return f"it speaks {software.dialect}'s protocol and this router {core.protocol}'s: a group has one"
    if core.protocol == "sglang" and worker.is_both:
        return "it was given as prefill and as decode, which only vLLM's protocol has (kv_both)"
    return ""


def _object(answer: Answer) -> dict[str, Any]:
    if answer.status != 200:
        return {}
    try:
        found = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
