"""Advisories on a real cache, page store and host level, step by step."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cache_world import PAGE, CacheWorld, prompt
from symphony_sglang.core.gate import GateSnapshot, Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.prefix import pack_tokens
from symphony_sglang.engine.calibration import calibrate_rank, warm_up
from symphony_sglang.engine.messages import CalibrationRequest
from symphony_sglang.testing.faulty_backend import FAULTS_VARIABLE, Faults

FAULTY = ("symphony_sglang.testing.faulty_backend", "FaultyNvmeBackend")
SLOW_NVME = GateSnapshot(Rate(10.0), Rate(1e9), Rate(1e4))
SLOW_HOST = GateSnapshot(Rate(1e9), Rate(10.0), Rate(1e4))

Make = Callable[..., CacheWorld]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    worlds: list[CacheWorld] = []

    def build(**settings: Any) -> CacheWorld:
        world = CacheWorld(tmp_path / "pages", **settings)
        worlds.append(world)
        return world

    yield build
    for world in worlds:
        world.close()


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "faults.json"
    monkeypatch.setenv(FAULTS_VARIABLE, str(path))
    return path


def test_a_session_comes_up_from_disk_with_the_bytes_that_were_stored(make: Make) -> None:
    world = make(device_tokens=4096)
    ids = prompt(1, 400)
    world.store(ids, "s")
    world.leave_host()
    assert world.found(ids) == (0, 0)
    receipt = world.advise(session_id="s")
    ready = world.until(receipt["advisory_id"], "ready")
    assert ready["tokens"]["device"] == 400
    assert world.found(ids) == (400, 0)
    assert world.values(ids)


def test_what_is_stored_nowhere_is_missing_and_not_an_error(make: Make) -> None:
    world = make(device_tokens=4096)
    receipt = world.advise(token_bytes=pack_tokens(prompt(41, 400)))
    ended = world.until(receipt["advisory_id"], "failed")
    assert (ended["status"], ended["reason"]) == ("missing", "not_stored")
    world.store(half := prompt(42, 160))
    world.leave_host()
    receipt = world.advise(token_bytes=pack_tokens([*half, *prompt(43, 160)]))
    ready = world.until(receipt["advisory_id"], "ready")
    assert (ready["status"], ready["reason"]) == ("clipped", "not_stored")
    assert ready["tokens"]["goal"] == 160


def test_a_disk_that_fails_is_tried_again_and_then_called_by_name(make: Make, faults: Path) -> None:
    world = make(device_tokens=4096, backend=FAULTY)
    world.store(prompt(44, 400), "s")
    world.leave_host()
    Faults(fail_reads=True).save(faults)
    receipt = world.advise(session_id="s")
    ended = world.until(receipt["advisory_id"], "failed")
    assert (ended["status"], ended["reason"]) == ("accepted", "move_failed")
    Faults().save(faults)
    again = world.advise(session_id="s")
    assert world.until(again["advisory_id"], "ready")["tokens"]["device"] == 400


# Joining ------------------------------------------------------------------------------------------


def held_stage(world: CacheWorld, faults: Path, ids: list[int]) -> dict[str, Any]:
    """A session on disk whose advisory's first chunk is being read, and stays so."""
    world.store(ids, "s")
    world.leave_host()
    Faults(hold_reads=True).save(faults)
    receipt = world.advise(session_id="s")
    return world.until(receipt["advisory_id"], "staging")


def read_pages(world: CacheWorld) -> int:
    return int(world.cache.cache_controller.storage_backend.pages_read)


@pytest.mark.parametrize("pages", [20, 200])
def test_a_request_joins_the_read_of_its_advisory(make: Make, faults: Path, pages: int) -> None:
    """Both fewer pages than a chunk, and more: each page is read from disk once."""
    world = make(device_tokens=8192, host_tokens=16384, backend=FAULTY)
    ids = prompt(2, pages * PAGE)
    staging = held_stage(world, faults, ids)
    turn = [*ids, 5, 6, 7]
    request = world.arrive(turn, "s")
    assert world.receipt(staging["advisory_id"])["state"] == "late"
    for _ in range(5):
        world.step()
        assert not world.cache.check_prefetch_progress(request.cache_request_handle)
    assert world.driver.mover.joins.joined == 1
    Faults().save(faults)
    for _ in range(2000):
        world.step(seconds=0.0)
        if world.cache.check_prefetch_progress(request.cache_request_handle):
            break
        time.sleep(0.002)
    assert world.found(ids) == (0, pages * PAGE)
    assert read_pages(world) == pages
    world.settle()


def test_a_cancelled_advisory_does_not_take_the_read_from_who_joined(
    make: Make, faults: Path
) -> None:
    world = make(device_tokens=8192, backend=FAULTY)
    ids = prompt(3, 320)
    staging = held_stage(world, faults, ids)
    request = world.arrive([*ids, 5], "s")
    world.advise(verb="cancel", session_id="s")
    world.ask_cancel(staging["advisory_id"])
    Faults().save(faults)
    world.settle()
    assert world.cache.check_prefetch_progress(request.cache_request_handle)
    assert world.found(ids) == (0, 320)
    assert read_pages(world) == 20


def test_a_request_with_another_prefix_reads_for_itself(make: Make, faults: Path) -> None:
    world = make(device_tokens=8192, backend=FAULTY)
    ids, other = prompt(4, 320), prompt(5, 320)
    world.store(other)
    held_stage(world, faults, ids)
    world.arrive([*other, 5])
    assert world.driver.mover.joins.joined == 0
    assert len(world.cache.ongoing_prefetch) == 2
    Faults().save(faults)
    world.settle()
    assert world.found(other) == (0, 320)


def test_who_joined_waits_no_longer_than_for_a_read_of_its_own(make: Make, faults: Path) -> None:
    world = make(device_tokens=8192, backend=FAULTY)
    held_stage(world, faults, ids := prompt(6, 320))
    request = world.arrive([*ids, 5], "s")
    handle = request.cache_request_handle
    assert not world.cache.check_prefetch_progress(handle)
    world.step(seconds=30.0)
    assert world.cache.check_prefetch_progress(handle), "past SGLang's timeout for such a read"
    Faults().save(faults)
    world.settle()


def test_an_aborted_request_leaves_the_read_to_others(make: Make, faults: Path) -> None:
    world = make(device_tokens=8192, backend=FAULTY)
    held_stage(world, faults, ids := prompt(7, 320))
    first, second = world.arrive([*ids, 5], "s"), world.arrive([*ids, 6], "s")
    world.scheduler.waiting_queue.remove(first)
    world.cache.release_aborted_request(first.cache_request_handle)
    assert len(world.driver.mover.joins) == 1
    Faults().save(faults)
    world.settle()
    assert world.cache.check_prefetch_progress(second.cache_request_handle)
    assert world.found(ids) == (0, 320)


# The break-even gate ------------------------------------------------------------------------------


def test_a_slow_disk_is_not_read_for_a_request(make: Make) -> None:
    world = make(device_tokens=4096, backend=FAULTY)
    ids = prompt(8, 400)
    world.store(ids)
    world.leave_host()
    world.driver.rates.calibrate(SLOW_NVME)
    request = world.arrive([*ids, 5])
    assert world.cache.check_prefetch_progress(request.cache_request_handle)
    assert not world.cache.ongoing_prefetch
    assert read_pages(world) == 0
    assert world.driver.counters()["gate"]["nvme"] == {"use": 0, "recompute": 1}


def test_a_slow_disk_is_not_read_for_an_advisory_and_the_receipt_says_so(make: Make) -> None:
    world = make(device_tokens=4096)
    world.store(ids := prompt(9, 400), "s")
    world.leave_host()
    world.driver.rates.calibrate(SLOW_NVME)
    receipt = world.advise(session_id="s")
    ended = world.until(receipt["advisory_id"], "failed")
    assert (ended["status"], ended["reason"]) == ("rejected", "nvme_slower_than_recompute")
    assert world.driver.counters()["gate"]["nvme"]["recompute"] == 1
    assert world.found(ids) == (0, 0)


def test_a_slow_host_level_is_not_loaded_for_a_request(make: Make) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams

    world = make(device_tokens=4096)
    world.store(ids := prompt(10, 400))
    world.leave_device()
    request = world.request([*ids, 5])
    match = world.cache.match_prefix(MatchPrefixParams(key=world.key(ids)))
    request.last_node = match.last_device_node
    request.swa_host_hit_length = request.mamba_host_hit_length = 0
    params = InitLoadBackParams(
        best_match_node=match.best_match_node, host_hit_length=match.host_hit_length, req=request
    )
    world.driver.rates.calibrate(SLOW_HOST)
    assert world.cache.init_load_back(params) == (0, match.last_device_node)
    assert not world.cache.cache_controller.load_queue
    assert world.driver.counters()["gate"]["host"]["recompute"] == 1
    world.driver.rates.calibrate(GateSnapshot(Rate(1e9), Rate(1e9), Rate(1e4)))
    assert world.cache.init_load_back(params)[0] == 400
    world.cache.ready_to_load_host_cache()
    world.settle()
    assert world.values(ids)


def test_reads_and_loads_are_measured_and_agreed_with_the_clock(make: Make) -> None:
    world = make(device_tokens=4096)
    world.store(prompt(11, 1024), "s")
    world.leave_host()
    rates = world.driver.rates
    rates.watch_storage()
    assert set(rates.as_json().values()) == {None}
    receipt = world.advise(session_id="s")
    world.until(receipt["advisory_id"], "ready")
    speeds = rates.to_send()
    assert speeds is not None
    assert speeds.nvme_to_host is not None
    assert speeds.host_to_device is not None
    assert rates.to_send() is None, "nothing new to say"
    assert rates.agreed.nvme_to_host is None, "not before it came with the clock"
    world.driver.tick(world.now, speeds)
    assert rates.as_json()["nvme_to_host_tokens_per_second"] > 1000


def test_without_the_gate_every_level_is_used(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SYMPHONY_BREAK_EVEN", "0")
    world = make(device_tokens=4096)
    world.driver.rates.calibrate(SLOW_NVME)
    world.driver.tick(1.0, SLOW_NVME)
    assert world.driver.rates.worth_loading(Level.NVME, 1000)


# Demotion -----------------------------------------------------------------------------------------


def test_demoted_session_leaves_the_device_and_keeps_its_host_copy(make: Make) -> None:
    world = make()
    world.store(ids := prompt(12, 320), "s")
    receipt = world.advise(verb="demote", session_id="s")
    assert (receipt["status"], receipt["state"]) == ("accepted", "ready")
    assert receipt["tokens"] == {"total": 320, "device": 0, "host": 320, "demoted": 320}
    assert world.found(ids) == (0, 320)
    assert world.advise(verb="demote", session_id="s")["tokens"]["demoted"] == 0
    world.settle()


def test_demotion_leaves_what_is_in_use_or_shared(make: Make) -> None:
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams

    world = make(device_tokens=4096)
    head = prompt(13, 160)
    mine, other = [*head, *prompt(14, 160)], [*head, *prompt(15, 160)]
    world.store(mine, "s")
    world.store(other, "o")
    receipt = world.advise(verb="demote", session_id="s")
    assert (receipt["status"], receipt["tokens"]["demoted"]) == ("clipped", 160)
    assert world.found(mine) == (160, 160)
    assert world.found(other) == (320, 0)
    match = world.cache.match_prefix(MatchPrefixParams(key=world.key(other)))
    lock = world.cache.lock(match.last_device_node)
    receipt = world.advise(verb="demote", session_id="o")
    assert (receipt["status"], receipt["reason"]) == ("rejected", "in_use")
    assert world.found(other) == (320, 0)
    world.cache.unlock(lock)
    world.settle()


def test_demotion_withdraws_hints_and_unknown_sessions_are_missing(make: Make) -> None:
    world = make()
    world.store(prompt(16, 160), "s")
    held = world.advise(session_id="s")
    world.step()
    assert world.advise(verb="demote", session_id="s")["tokens"]["demoted"] == 160
    assert world.receipt(held["advisory_id"])["state"] == "cancelled"
    assert world.advise(verb="demote", session_id="x")["status"] == "missing"
    world.settle()


# Harm ---------------------------------------------------------------------------------------------


def test_an_advisory_that_evicts_what_is_asked_for_is_harmful(make: Make) -> None:
    world = make(device_tokens=1024)
    world.store(mine := prompt(17, 288), "s")
    world.leave_device()
    others = [prompt(20 + number, 480) for number in range(2)]
    for ids in others:
        world.store(ids)
    receipt = world.advise(session_id="s")
    world.until(receipt["advisory_id"], "ready")
    (lost,) = [ids for ids in others if world.found(ids)[0] < 480]
    outcomes = world.driver.promoter.outcomes
    world.step()
    world.arrive([*lost, 5])
    assert (outcomes.harmful, outcomes.harmful_pages) == (1, 30)
    world.arrive([*lost, 6])
    assert outcomes.harmful_pages == 30, "each eviction costs once"
    world.arrive([*mine, 5], "s")
    assert world.receipt(receipt["advisory_id"])["state"] == "used"
    counters = world.driver.counters()
    assert sum(counters["used_lead_seconds"]["counts"]) == 1
    assert counters["held_byte_seconds"]["device"] > 0


def test_an_eviction_that_nobody_misses_is_no_harm(make: Make) -> None:
    world = make(device_tokens=1024)
    world.store(mine := prompt(18, 288), "s")
    world.leave_device()
    others = [prompt(30 + number, 480) for number in range(2)]
    for ids in others:
        world.store(ids)
    receipt = world.advise(session_id="s")
    world.until(receipt["advisory_id"], "ready")
    world.arrive([*mine, 5], "s")
    for ids in others:
        world.arrive([*ids, 5])
    assert world.driver.promoter.outcomes.harmful == 0, "its own use came first"


def test_flush_in_the_middle_of_a_read_leaves_nothing_behind(make: Make, faults: Path) -> None:
    world = make(device_tokens=8192, backend=FAULTY)
    held_stage(world, faults, ids := prompt(19, 320))
    world.arrive([*ids, 5], "s")
    Faults().save(faults)
    world.scheduler.waiting_queue.clear()
    world.cache.reset()
    assert not world.driver.active
    world.settle()
    assert len(world.driver.mover.joins) == 0
    assert world.found(ids) == (0, 0)


def test_calibration_measures_both_hops_and_leaves_nothing(make: Make) -> None:
    world = make(device_tokens=2048)
    world.driver.rates.batches.extend([(256, 9.0), (256, 0.1), (1024, 0.4)])
    free = world.allocator.available_size()
    speeds = calibrate_rank(world.cache, CalibrationRequest()).body["speeds"]
    assert speeds["host_to_device_tokens_per_second"] > 1000
    assert speeds["nvme_to_host_tokens_per_second"] > 1000
    assert speeds["prefill_tokens_per_second"] == pytest.approx(2560)
    assert world.allocator.available_size() == free
    assert len(world.cache.cache_controller.storage_backend.store) == 0
    assert world.driver.rates.agreed == GateSnapshot(), "not before all ranks are told"
    calibrate_rank(world.cache, CalibrationRequest(speeds=speeds))
    assert world.driver.rates.agreed.prefill is not None
    world.settle()


def test_flush_waits_for_reads_of_advisories_and_not_for_a_hung_disk(
    make: Make, faults: Path
) -> None:
    world = make(device_tokens=8192, backend=FAULTY)
    held_stage(world, faults, prompt(40, 320))
    while any(info.host_indices is None for info in world.cache.ongoing_prefetch.values()):
        world.step()
        time.sleep(0.001)
    time.sleep(0.05)  # the storage thread is in the read now
    world.driver.make_way_for_flush()
    assert world.cache.ongoing_prefetch, "the disk hangs: SGLang refuses the flush"
    Faults().save(faults)
    world.driver.make_way_for_flush()
    assert not world.cache.ongoing_prefetch
    world.cache.reset()
    world.settle()


def test_storm_of_hints_and_cancels_is_bounded(make: Make) -> None:
    world = make(device_tokens=4096)
    for number in range(4):
        world.store(prompt(50 + number, 320), f"s{number}")
    for number in range(5000):
        receipt = world.advise(session_id=f"s{number % 4}", expires_in_seconds=60.0)
        world.ask_cancel(receipt["advisory_id"])
        if number % 100 == 0:
            world.step()
    book = world.driver.promoter.book
    assert len(book) == 0
    assert len(book._finished) <= book.limits.finished_max
    assert not world.driver.active
    world.settle()


class HttpProcess:
    """The parts of SGLang's tokenizer manager that calibration uses, in front of one rank."""

    def __init__(self, world: CacheWorld) -> None:
        self.world = world
        self.model_config = SimpleNamespace(
            vocab_size=1000, context_len=600, model_path="m", dtype="float32", is_generation=True
        )
        self.server_args = SimpleNamespace(
            page_size=PAGE, hicache_storage_backend_extra_config=None, tp_size=1
        )
        self.prompts: list[int] = []
        self.flushes = 0

    def auto_create_handle_loop(self) -> None:
        pass

    async def symphony_communicator(self, question: Any) -> list[Any]:
        return [calibrate_rank(self.world.cache, question)]

    async def generate_request(self, request: Any, _http: Any) -> AsyncIterator[dict[str, Any]]:
        assert max(request.input_ids) < self.model_config.vocab_size
        self.prompts.append(len(request.input_ids))
        self.world.driver.rates.batches.append((len(request.input_ids), 0.01))
        yield {}

    async def flush_cache(self) -> Any:
        self.flushes += 1
        return SimpleNamespace(success=self.flushes > 2)


def test_warm_up_measures_once_and_remembers(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    world = make(device_tokens=2048)
    first = HttpProcess(world)
    asyncio.run(warm_up("null", first))
    assert first.prompts == [256, 256, 592], "the long one is cut to the model's context"
    assert first.flushes == 3
    speeds = world.driver.rates.agreed
    assert speeds.prefill is not None
    assert speeds.host_to_device is not None
    assert speeds.nvme_to_host is not None
    world.driver.rates.calibrate(GateSnapshot(prefill=Rate(1.0)))
    second = HttpProcess(world)
    asyncio.run(warm_up("null", second))
    assert not second.prompts
    assert world.driver.rates.agreed == speeds
    other = HttpProcess(world)
    other.model_config.model_path = "another"
    asyncio.run(warm_up("null", other))
    assert other.prompts


def test_warm_up_that_fails_leaves_the_gate_open(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    world = make(device_tokens=2048)
    broken = HttpProcess(world)
    broken.model_config.vocab_size = 0
    asyncio.run(warm_up("null", broken))
    assert world.driver.rates.agreed == GateSnapshot()
