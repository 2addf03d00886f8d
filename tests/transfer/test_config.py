"""Settings: every wrong one is named."""

import pytest
from tests.fakes.transfer_pair import PageMemory, page_layout

from baton.transfer.config import BACKEND_NAMES, TransferConfig, TransferConfigError, parse_backend
from baton.transfer.prefill import open_prefill_transfer


def test_sglangs_variables_fill_the_fields() -> None:
    config = TransferConfig.from_env(
        {
            "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "7.5",
            "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "4",
            "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "60",
            "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "90",
            "SGLANG_DISAGGREGATION_THREAD_POOL_SIZE": "3",
        },
        backend="tcp",
    )
    assert (config.heartbeat_interval_s, config.heartbeat_max_failure) == (7.5, 4)
    assert (config.bootstrap_timeout_s, config.waiting_timeout_s, config.copy_threads) == (60.0, 90.0, 3)


def test_defaults_and_minima_are_sglangs() -> None:
    config = TransferConfig.from_env({"SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "0.1"})
    assert (config.heartbeat_interval_s, config.heartbeat_max_failure) == (2.0, 2)
    assert (config.bootstrap_timeout_s, config.waiting_timeout_s) == (300.0, 300.0)


def test_every_bad_variable_and_field_is_named() -> None:
    bad = {"SGLANG_DISAGGREGATION_WAITING_TIMEOUT": "soon", "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "1.5"}
    with pytest.raises(TransferConfigError) as error:
        TransferConfig.from_env(bad)
    assert all(name in str(error.value) for name in bad)
    with pytest.raises(TransferConfigError, match=r"copy_threads.*chunk_bytes"):
        TransferConfig(copy_threads=0, chunk_bytes=-1)
    with pytest.raises(TransferConfigError, match="waiting_timeout_s"):
        TransferConfig(waiting_timeout_s=float("nan"))


def test_back_end_names_say_what_they_do_here() -> None:
    for name in ("mooncake", "nixl", "ascend"):
        backend, note = parse_backend(name)
        assert backend == "auto"
        assert "shared memory on one host" in note
    assert parse_backend("mooncake_tcp")[0] == "tcp"
    assert parse_backend("fake")[0] == "fake"
    with pytest.raises(TransferConfigError, match=r"--disaggregation-transfer-backend must be one of .*'rdma'"):
        parse_backend("rdma")
    assert all(note for name, (_, note) in BACKEND_NAMES.items() if name not in ("auto", "tcp"))


@pytest.mark.parametrize("url", ["", "127.0.0.1:8998", "https://h:1", "http://h", "http://h:x"])
def test_bad_bootstrap_url(url: str) -> None:
    with PageMemory.create(1, 8192) as memory, pytest.raises(TransferConfigError, match="bootstrap_url"):
        open_prefill_transfer(
            memory, page_layout(), TransferConfig(), host="127.0.0.1", bootstrap_url=url, wake=lambda: None
        )


def test_a_layout_of_another_size_is_refused() -> None:
    with PageMemory.create(1, 4096) as memory, pytest.raises(TransferConfigError, match="page_bytes is 8192"):
        open_prefill_transfer(
            memory, page_layout(), TransferConfig(), host="127.0.0.1", bootstrap_url="http://h:1", wake=lambda: None
        )
