"""How large a host tier may be: engines of one host share its memory."""

import pytest

from baton.engine import tiers
from baton.engine.args import engine_args
from baton.engine.errors import ModelError

TIERS = ["--model", "m", "--enable-hierarchical-cache", "--hicache-size", "2"]


def test_the_host_tiers_of_all_engines_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "free_memory_bytes", lambda: 5 * 10**9)
    for dp_size in (1, 2):
        assert tiers.choose_host_pages(engine_args([*TIERS, "--dp-size", str(dp_size)]), 100, 10**6) == 2000
    with pytest.raises(
        ModelError, match=r"--hicache-size: a host tier of 2.0 GB for each of 3 engines does not fit; 5.0 GB"
    ):
        tiers.choose_host_pages(engine_args([*TIERS, "--dp-size", "3"]), 100, 10**6)


def test_a_host_tier_that_holds_nothing_more_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"--hicache-size: a host tier of 2000 pages is no larger than the device's 2000"
    ):
        tiers.choose_host_pages(engine_args(TIERS), 2000, 10**6)
