"""vLLM servers with NixlConnector for router tests: `FakeWorker`s that speak the sequential prefill/decode protocol, strictly.

A prefill's answer names blocks; the decode must bring exactly that answer, once, under the same X-Request-Id. `is_baton`: a Baton
worker in vLLM's dialect, which answers before it has computed, takes aborts, tells token ids and can resume.
"""

import asyncio
import json
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tests.fakes.fake_worker import Fabric, FakeWorker, prompts_of

ASKED = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip
NOT_VLLMS = ("rid", "bootstrap_host", "bootstrap_port", "bootstrap_room", "baton_resume")
_block_numbers = count(1)


@dataclass
class Offer:
    """What one prefill holds for one decode."""

    params: dict[str, Any]
    prompts: list[str]
    request_id: str
    is_taken: bool = False
    computed: asyncio.Event = field(default_factory=asyncio.Event)


class VllmFabric:
    """Offers of all prefill servers of a bed, oldest first."""

    def __init__(self) -> None:
        self.offers: list[Offer] = []


class FakeVllm(FakeWorker):
    """`role`: prefill (kv_producer), decode (kv_consumer), both (kv_both) or regular (no connector)."""

    def __init__(self, role: str, fabric: Fabric | None = None, *, is_baton: bool = False) -> None:
        super().__init__(role, fabric, sends_token_ids=is_baton)
        self.is_baton = self.takes_aborts = is_baton
        self.version: str | None = "0.10.0+baton.1" if is_baton else "0.10.0"
        self.owned_by = "vllm"
        self.has_connector = True
        self.eos_first = False
        """The first token ends the request: older vLLM hands nothing over."""
        self.request_ids: set[str] = set()
        if not hasattr(self.fabric, "vllm"):
            self.fabric.vllm = VllmFabric()  # type: ignore[attr-defined]

    @property
    def offers(self) -> list[Offer]:
        return self.fabric.vllm.offers  # type: ignore[attr-defined,no-any-return]

    def is_open(self, path: str) -> bool:
        return path in ("/health", "/version") if self.is_baton else not path.startswith("/v1/")

    def small_answer(self, path: str) -> tuple[int, bytes]:
        if path == "/version" and self.version is not None:
            return 200, json.dumps({"version": self.version}).encode()
        if path == "/v1/models":
            card = {"id": "fake", "object": "model", "created": 1, "owned_by": self.owned_by}
            return 200, json.dumps({"object": "list", "data": [card]}).encode()
        if path == "/reset_prefix_cache":
            return 200, b""
        if path == "/abort_request":
            self.violations.append("vLLM has no /abort_request")
        return 404, b'{"detail":"Not Found"}'

    def makes_one_token(self, body: dict[str, Any]) -> bool:
        return bool((body.get("kv_transfer_params") or {}).get("do_remote_decode"))

    def answer_id(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> str:
        return ("chatcmpl-" if path == "/v1/chat/completions" else "cmpl-") + headers["x-request-id"]

    async def meet(self, body: dict[str, Any], headers: dict[str, str], raw: bytes) -> dict[str, Any] | None:
        if self.role == "regular":
            return None
        self._check(body, headers, raw)
        params = body.get("kv_transfer_params")
        if params is None:
            assert self.role != "prefill", "a prefill server was asked for a whole answer"
            return None
        if params.get("do_remote_decode"):
            return await self._prefill(body, headers)
        await self._take(body, headers)
        return None

    def _check(self, body: dict[str, Any], headers: dict[str, str], raw: bytes) -> None:
        pairs: list[tuple[str, Any]] = json.loads(raw, object_pairs_hook=lambda found: found)
        names = [name for name, _ in pairs]
        assert len(names) == len(set(names)), f"a member twice: {names}"
        for name in NOT_VLLMS:
            assert name not in body or (self.is_baton and name == "baton_resume"), f"{name} is not vLLM's"
        request_id = headers["x-request-id"]
        assert body["request_id"] == request_id
        key = f"{request_id}/{'prefill' if self.makes_one_token(body) else 'decode'}"
        assert key not in self.request_ids, f"request id {request_id} twice on {self.role}"
        self.request_ids.add(key)

    async def _prefill(self, body: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
        assert self.role != "decode", "a decode server was asked to prefill"
        assert body["kv_transfer_params"] == ASKED
        assert body["stream"] is False
        before = max((len(ids or ()) for ids in (body.get("baton_resume") or {}).get("output_ids", ())), default=0)
        assert body["max_tokens"] == body.get("max_completion_tokens", before + 1) == before + 1
        assert "stream_options" not in body
        assert body.get("min_tokens", 0) <= body["max_tokens"]
        prompts = prompts_of("/v1/chat/completions" if "messages" in body else "/v1/completions", body)
        assert self.is_baton or len(prompts) * body.get("n", 1) == 1, "blocks are given away once"
        if self.faults.no_answer:
            await asyncio.Event().wait()
        if not self.has_connector or self.eos_first:
            return {"kv_transfer_params": None, "choices": [{"finish_reason": "stop" if self.eos_first else "length"}]}
        engine = f"baton:{self.port}" if self.is_baton else f"engine-{self.port}"
        params = {
            "do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": engine,
            "remote_block_ids": [next(_block_numbers), next(_block_numbers)], "remote_host": "127.0.0.1",
            "remote_port": self.port, "tp_size": 1, "remote_request_id": headers["x-request-id"], "of": 1.50,
        }  # fmt: skip
        offer = Offer(params, prompts, headers["x-request-id"])
        self.offers.append(offer)
        if not self.faults.no_transfer:
            offer.computed.set()
        return {"kv_transfer_params": params}

    async def _take(self, body: dict[str, Any], headers: dict[str, str]) -> None:
        params = body["kv_transfer_params"]
        offer = next((one for one in reversed(self.offers) if one.params == params), None)
        assert offer is not None, f"no prefill answered {params}"
        assert not offer.is_taken, "blocks were taken twice"
        assert offer.request_id == headers["x-request-id"], "both sides are to see one request id"
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        assert offer.prompts == prompts_of(path, body)
        await offer.computed.wait()
        offer.is_taken = True
