"""The engine under fire: killed, crowded, without a disk, with metrics that misbehave. Nothing lost, doubled or wrong."""

import ctypes
import errno
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import results as made
import torch
from problems import seeded
from test_engine import SIZE, Hungry, Size, one, size, source

import funcscope as fs
from funcscope.core import store
from funcscope.core.result import Result, quantity
from funcscope.study import calling, rows
from funcscope.study.cache import Cache
from funcscope.study.catalogue import metric
from funcscope.study.engine import run
from funcscope.study.meter import Options, alarm, is_full
from funcscope.study.metric import Metric
from funcscope.study.results import Results
from funcscope.study.sources import InMemory

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
FORK = get_context("fork")


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


# ---------------------------------------------------------------------------------------------- killed, and crowded


def slow(theta, *, log=""):
    """A size that takes a while, each call noted."""
    if log:
        with Path(log).open("a") as file:
            file.write("called\n")
    time.sleep(0.01)
    return Size(float(theta.norm()), theta.square())


SLOW = Metric("slow", slow, ("theta",), plan={"log": ""})
STUDY = (SIZE, SLOW, metric("mean_loss"), metric("directional_losses").configured(n_samples=6, chunk=2))


def study(root):
    return run(STUDY, [source(f"m{i}", scale=1.0 + i, at=i) for i in range(3)], cache=Cache(root))


def cells(root):
    """Every file of a cache: its bytes, and where rows may have been resumed everything but the count of passes."""
    files = {path.relative_to(root): path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts}
    held = {}
    for name, path in files.items():
        stored = store.load(path)
        if "directional" in name.name:
            stored.meta["outcome"].pop("cost")
        held[name] = store._digest({k: store._tensor(v) for k, v in stored.arrays.items()}, stored.meta)
        held[name, "bytes"] = b"" if "directional" in name.name else path.read_bytes()
    return held


@pytest.mark.parametrize("moments", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_and_resumed_is_as_never_killed(moments, tmp_path, monkeypatch):
    monkeypatch.setattr(calling, "time", SimpleNamespace(perf_counter=lambda: 0.0))  # seconds are part of a cell
    monkeypatch.setattr(rows, "KEEP_EVERY", 0.0)
    started = time.monotonic()
    whole = study(tmp_path / "whole")
    long, draw, cut = time.monotonic() - started, random.Random(0), 0
    for moment in range(moments):
        process = FORK.Process(target=study, args=(tmp_path / str(moment),))
        process.start()
        time.sleep(draw.uniform(0, 1.2 * long))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        cut += process.exitcode == -signal.SIGKILL
        again = study(tmp_path / str(moment))
        assert [o.result for o in again] == [o.result for o in whole]
        assert cells(tmp_path / str(moment)) == cells(tmp_path / "whole")
    assert cut


def crowded(root, log):
    run([replace(SLOW, plan={"log": log})], [source(f"m{i}", scale=1.0 + i) for i in range(6)], cache=Cache(root))


def test_eight_processes_make_every_cell_once(tmp_path):
    log = str(tmp_path / "log")
    processes = [FORK.Process(target=crowded, args=(tmp_path / "cache", log)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert len(Path(log).read_text().splitlines()) == 6
    assert len(Cache(tmp_path / "cache").entries()) == 6


def test_a_cache_with_a_limit_that_loses_files_to_others_goes_on(cache, monkeypatch):
    limited = Cache(cache.root, max_mb=0.004)
    entries = Cache.entries
    monkeypatch.setattr(Cache, "entries", lambda self: [*entries(self), self.root / "gone" / "x.npz"])
    outcomes = run([SIZE], [source(f"m{i}", scale=1.0 + i) for i in range(4)], cache=limited)
    assert all(o.ok for o in outcomes)
    assert limited.get_stats()["num_entries"] < 4


# ---------------------------------------------------------------------------------------------- without a disk


def check_goes_on(cache, full, freed):
    """A study whose cache cannot be written has its results, says so, leaves no half, and stores them when there is room."""
    full()
    with pytest.warns(UserWarning, match=r"size of model could not be stored .* the next one makes it again"):
        outcome = one(SIZE, cache)
    assert outcome.result == one(SIZE).result
    assert not [path for path in cache.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    freed()
    assert not one(SIZE, cache).reused
    assert one(SIZE, cache).reused


def test_a_full_disk_leaves_no_half_entry(cache, monkeypatch):
    def no_room(handle, *_):
        os.write(handle, b"half an entry")
        os.close(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    fdopen = os.fdopen
    check_goes_on(
        cache, lambda: monkeypatch.setattr(os, "fdopen", no_room), lambda: monkeypatch.setattr(os, "fdopen", fdopen)
    )


@pytest.mark.slow
def test_a_full_tmpfs_leaves_no_half_entry(tmp_path):
    root = tmp_path / "disk"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", root], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        ballast = root.parent / "disk" / "ballast.lock"
        check_goes_on(Cache(root / "cache"), lambda: fill(ballast), ballast.unlink)
    finally:
        subprocess.run(["umount", root], check=True)


def fill(path):
    with pytest.raises(OSError, match="No space"), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_cache_that_cannot_even_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be stored"):
        assert one(SIZE, Cache(tmp_path / "file" / "cache")).ok


def test_rows_that_find_no_room_cost_no_metric(cache, monkeypatch):
    def no_room(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rows, "KEEP_EVERY", -1.0)
    monkeypatch.setattr(rows, "save", no_room)
    with pytest.warns(UserWarning, match="rows that are done could not be stored"):
        assert one(STUDY[-1], cache).ok


# ---------------------------------------------------------------------------------------------- metrics that misbehave


def stubborn(theta):
    while True:
        try:
            theta.norm()
        except Exception:  # noqa: BLE001
            continue


def asleep(theta):
    ctypes.PyDLL(None).sleep(30)  # with the lock of the interpreter: nothing else runs in this process


def dead(theta):
    assert parent_process() is not None  # in a process of its own
    os._exit(3)


def test_an_endless_loop_ends_and_the_others_go_on(cache):
    started = time.monotonic()
    first, second = run(
        [Metric("stubborn", stubborn, ("theta",)), SIZE], [source()], cache=cache, options=Options(timeout_seconds=0.3)
    )
    assert time.monotonic() - started < 5
    assert (first.status, first.result, first.plan) == ("timeout", None, {"timeout": "signal"})
    assert second.ok
    assert not one(Metric("stubborn", stubborn, ("theta",)), cache, timeout_seconds=0.1).reused


def test_an_alarm_that_was_set_goes_on_and_none_stays():
    with alarm(100.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 99
        with alarm(50.0):
            assert signal.getitimer(signal.ITIMER_REAL)[0] < 51
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 99
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_threads_say_that_their_limit_is_cooperative():
    with ThreadPoolExecutor(1) as workers:
        (outcome,) = run([SIZE], [source()], options=Options(timeout_seconds=60.0), executor=workers)
    assert outcome.plan == {"timeout": "cooperative"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "status"), [(size, "ok"), (asleep, "timeout"), (stubborn, "timeout"), (dead, "failed")]
)
def test_a_process_of_its_own_ends_whatever_a_metric_does(call, status, cache, tmp_path):
    from test_engine import files

    chosen = Metric("own", call, ("theta",))
    outcome, again = (
        run([chosen], files(cache)[:1], tasks=("train",), cache=cache, options=options)[0]
        for options in [Options(timeout_seconds=1.0, hard_timeout=True)] * 2
    )
    assert (outcome.status, outcome.plan) == (status, {"timeout": "process"}), outcome.traceback
    assert again.reused == (status in ("ok", "failed"))
    if call is size:
        assert outcome.result == run([chosen], files(cache)[:1], tasks=("train",))[0].result


def test_what_cannot_travel_stays_and_says_what_holds_it():
    outcome = one(Metric("mine", lambda theta: size(theta), ("theta",)), timeout_seconds=60.0, hard_timeout=True)
    assert outcome.ok
    assert outcome.plan == {"timeout": "signal"}


@pytest.mark.parametrize("kind", ["theta", "params", "data"])
def test_a_metric_that_writes_into_what_it_is_given_is_found_out(kind, cache):
    def edits(loss, theta, params):
        target = {"theta": theta, "params": next(iter(params.values())), "data": loss.batches[0][0]}[kind]
        target.mul_(2)
        return size(theta)

    def fresh():
        loss = made.loss()
        batches = [(loss.batches[0][0].clone(), torch.tensor([0, 1, 0, 1, 1, 0]))]
        return InMemory({"data": fs.objective(loss.net, batches, fs.classification)}, theta=made.theta().clone())

    bad = Metric("edits", edits, ("loss", "theta", "params"))
    first, second = run([bad, metric("mean_loss")], [fresh()], cache=cache)
    assert first.status == "failed"
    assert "has changed what it was given" in first.error
    assert second.status == "failed"  # no number of other weights
    assert "edits has changed the model or the data in memory" in second.error

    class Reopened(InMemory):
        def open(self):
            return fresh().open()

    first, second = run([bad, metric("mean_loss")], [Reopened(fresh().losses)], cache=cache)
    assert (first.status, second.status) == ("failed", "ok")
    assert second.result == one(metric("mean_loss")).result


class Any(Result):
    any: object = quantity("anything")


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (float("nan"), "ok"),
        (torch.zeros(0), "ok"),
        (torch.full((3,), float("inf")), "ok"),
        (torch.zeros(1, dtype=torch.complex128), "ok"),
        (np.zeros((0, 3)), "ok"),
        (1j, "failed"),
        (object(), "failed"),
        (torch.zeros(2, dtype=torch.bfloat16), "failed"),
        (torch.eye(2).to_sparse(), "failed"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_whatever_a_metric_gives_is_a_result_that_comes_back_or_a_failure(value, status, cache):
    odd = Metric("odd", lambda theta: Any(value), ("theta",))
    first, second = run([odd, SIZE], [source()], cache=cache)
    assert (first.status, second.status) == (status, "ok"), first.traceback
    again = one(odd, cache)
    assert again.reused
    assert again.status == status
    if status == "ok":
        assert again.result == first.result


VALUES = [
    None, float("nan"), float("inf"), -float("inf"), 0, 0.0, False, "0", "nan", [0], (0, 0), {"0": 0}, torch.float32,
    torch.zeros(1), torch.zeros(1, dtype=torch.float64), np.zeros(1, dtype=np.float16), torch.zeros(1, 1), 1j, len,
]  # fmt: skip


def test_settings_that_differ_never_share_a_cell_and_those_that_are_equal_do(cache):
    def echo(theta, *, value):
        return Any(str(value))

    for turn in range(2):
        for value in VALUES:
            outcome = one(Metric("echo", echo, ("theta",), {"value": value}), cache)
            assert outcome.result.any == str(value)
            assert outcome.reused == (turn == 1 and value is not len and not isinstance(value, complex)), value


def test_names_rings_and_costs(cache):
    with pytest.raises(ValueError, match="two metrics are called 'size'"):
        run([SIZE, SIZE.configured(power=1.0)], [source()])
    assert len(run([SIZE, SIZE], [source()])) == 1
    first, second = Metric("first", size, ("theta", "second")), Metric("second", size, ("theta", "first"))
    with pytest.raises(ValueError, match=r"needs .* must come first"):
        run([first, second], [source()])
    with pytest.raises(ValueError, match=r"needs .* must come first"):
        run([Metric("self_made", size, ("self_made",))], [source()])
    with pytest.warns(UserWarning, match="the cost of odd is not known"):
        assert one(Metric("odd", size, ("theta",), cost=lambda s: s["none"])).ok


@pytest.mark.slow
def test_out_of_memory_at_chunk_eight_gives_the_numbers_of_chunk_four(cache):
    needs, plan = ("loss", "params", "key"), {"chunk": 8}
    tight = one(Metric("tight", Hungry(4, 99), needs, plan=plan), cache)
    four = one(Metric("four", Hungry(99, 99), needs, plan={"chunk": 4}))
    assert tight.plan["chunk"] == 4
    assert tight.plan["memory"] == "Memory ran out with 8 at a time."
    assert tight.result == four.result  # bit for bit


def test_weights_that_are_not_finite_are_named(cache):
    model = seeded(0, lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)))
    torch.nn.init.constant_(model[2].bias, float("nan"))
    torch.nn.init.constant_(model[2].weight, float("inf"))
    loss = fs.objective(fs.functional(model), [(torch.ones(2, 3), torch.zeros(2).long())], fs.classification)
    said = r"`2.weight` has entries that are not finite, and 1 more of the weights have"
    for name in ("sam_sharpness", "hessian_eigenvalues"):
        outcome = one(metric(name), cache, InMemory({"data": loss}, "broken"))
        assert outcome.status == "failed"
        assert len(re.findall(said, outcome.error)) == 1
    with pytest.raises(ValueError, match=said):
        fs.directional_losses(loss, loss.net.theta, key=fs.key(0), n_samples=2)


def test_memory_that_the_processor_does_not_have_is_memory():
    with pytest.raises(RuntimeError) as err:
        torch.empty(2**52)
    assert is_full(err.value)
    assert one(Metric("huge", lambda theta: torch.empty(2**52), ("theta",))).status == "out of memory"


# ---------------------------------------------------------------------------------------------- not the metric's fault


class Broken(InMemory):
    opened = 0

    def open(self):
        type(self).opened += 1
        raise OSError("the weights are cut short")


class WithoutData(InMemory):
    def data_digest(self, task, sums):
        raise FileNotFoundError("no file of texts")


@pytest.mark.parametrize(("kind", "said"), [(Broken, "weights are cut short"), (WithoutData, "no file of texts")])
def test_what_fails_before_a_metric_is_said_so_and_never_stored(kind, said, cache, tmp_path):
    Broken.opened = 0
    subjects = [kind({"data": made.loss()}, "bad", content="1"), source()]
    outcomes = run([SIZE, metric("mean_loss")], subjects, cache=cache)
    assert [o.status for o in outcomes] == ["failed", "failed", "ok", "ok"]
    assert outcomes[0].error.startswith("size did not begin: ")
    assert said in outcomes[0].error
    assert outcomes[0].error_type in ("OSError", "FileNotFoundError")
    assert Broken.opened <= 1  # once for all metrics
    assert len(cache.entries()) == 2
    Results(tuple(outcomes)).save(tmp_path, {})
    assert [o.error for o in Results.open(tmp_path).outcomes] == [o.error for o in outcomes]
    healed = run([SIZE], [source("bad")], cache=cache)
    assert healed[0].ok
    with pytest.raises(OSError, match=said):
        run([SIZE], subjects, options=Options(skip_on_error=False))


def test_data_that_are_not_there_are_no_end_of_the_others():
    outcomes = run([SIZE, replace(SIZE, name="elsewhere", task="nowhere")], [source()])
    assert [o.status for o in outcomes] == ["ok", "failed"]
    assert "no data 'nowhere'" in outcomes[1].error


class Lost(ThreadPoolExecutor):
    def submit(self, *_, **__):
        future = Future()
        future.set_exception(RuntimeError("the worker is gone"))
        return future


def test_a_worker_that_is_gone_is_an_outcome():
    with Lost(1) as workers:
        outcomes = run([SIZE], [source("a"), source("b")], executor=workers)
    assert [(o.subject, o.status, o.error) for o in outcomes] == [(n, "failed", "the worker is gone") for n in "ab"]


@pytest.mark.slow
def test_a_metric_that_cannot_be_sent_to_a_worker_is_an_outcome():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as workers:
        (outcome,) = run([Metric("mine", lambda theta: size(theta), ("theta",))], [source()], executor=workers)
    assert outcome.status == "failed"
    assert "pickle" in outcome.error


def test_ctrl_c_keeps_what_is_done_and_the_same_call_goes_on(cache):
    def pressed(theta):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([SIZE, Metric("pressed", pressed, ("theta",))], [source()], cache=cache)
    assert one(SIZE, cache).reused
    assert threading.active_count() < 20


# ---------------------------------------------------------------------------------------------- memory, progress


def test_the_bar_counts_forward_passes_and_what_is_stored_takes_none(cache, capsys, monkeypatch):
    from funcscope.study import engine

    bars = []

    class Bar(engine.tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr(engine, "tqdm", Bar)
    dear = replace(SIZE, name="dear", cost=lambda _: 99.0)
    run([SIZE], [source()], cache=cache)
    run([SIZE, dear], [source()], cache=cache, quiet=False)
    assert bars[-1] == (100, 100)  # size is stored
    assert "dear of model" in capsys.readouterr().err


PEAK = """
import sys, resource, torch, funcscope as fs
from funcscope.study.engine import run
from funcscope.study.catalogue import metric
from funcscope.study.sources import InMemory
class Made(InMemory):
    def open(self):
        model = torch.nn.Linear(2000, 2000)
        batch = (torch.ones(4, 2000), torch.zeros(4, dtype=torch.long))
        loss = fs.objective(fs.functional(model), [batch], fs.classification)
        return InMemory({"data": loss}).open()
tiny = fs.objective(fs.functional(torch.nn.Linear(2, 2)), [(torch.ones(1, 2), torch.tensor([0]))], fs.classification)
run([metric("mean_loss"), metric("sam_sharpness")], [Made({"data": tiny}, str(i)) for i in range(int(sys.argv[1]))])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_checkpoints():
    assert resource.getpagesize()
    few, many = (
        int(subprocess.run([sys.executable, "-c", PEAK, num], capture_output=True, text=True, check=True).stdout)
        for num in ("3", "12")
    )
    assert many - few < 2 * 16_000  # one model is 16,000 kB
