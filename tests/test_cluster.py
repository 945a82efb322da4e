"""Studies on Dask: the cells are those of a study without workers, whatever happens to the workers."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import folder, texts
from test_engine import SIZE, Size, files

import funcscope as fs
from funcscope import cli
from funcscope.core.progress import tick
from funcscope.core.store import load
from funcscope.study import cluster as room
from funcscope.study.cache import Cache
from funcscope.study.catalogue import metric
from funcscope.study.cluster import Cluster, cluster
from funcscope.study.engine import run
from funcscope.study.meter import Options
from funcscope.study.metric import Metric
from funcscope.study.record import versions
from funcscope.study.worker import Terms, objection

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")


HERE = {"processes": False, "dashboard_address": "127.0.0.1:0", "silence_logs": "CRITICAL"}
"""A cluster in this process."""


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="module")
def local():
    """A scheduler with two workers, each a process that is started again when it is killed."""
    with (
        dask.config.set({"distributed.worker.daemon": False}),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit=None,
            dashboard_address="127.0.0.1:0",
            silence_logs="CRITICAL",
        ) as made,
    ):
        made.spare = []
        yield made
        for nanny in made.spare:
            made.sync(nanny.close)


@pytest.fixture
def workers(local):
    with Cluster(local.scheduler_address) as made:
        _filled(local, made)
        yield made


def _filled(local, workers):
    """Two workers: a nanny whose worker dies while it starts may give up."""
    for _ in range(3):
        try:
            return workers._client.wait_for_workers(2, timeout=40)
        except TimeoutError:
            local.spare.append(local.sync(_nanny, local.scheduler_address))
    raise AssertionError("no worker takes the place of those that were killed")


async def _nanny(address):
    return await distributed.Nanny(address, nthreads=1, memory_limit=None)


def late(theta):
    """A size that takes a while."""
    time.sleep(0.2)
    return Size(float(theta.norm()), theta.square())


def deadly(theta, *, above):
    """Ends its process on models whose weights are larger than `above`."""
    if float(theta.norm()) > above:
        os.kill(os.getpid(), signal.SIGKILL)
    return Size(float(theta.norm()), theta.square())


def full(theta):
    raise MemoryError


def wrong(theta):
    raise ZeroDivisionError("by theta")


LATE = Metric("late", late, ("theta",))
STUDY = (SIZE, LATE, metric("mean_loss"), metric("directional_losses").configured(n_samples=6, chunk=2))


def cells(cache):
    """The bytes of every stored array, and what is said beside it, without the time that it took."""
    made = {}
    for path in cache.entries():
        stored = load(path)
        stored.meta["outcome"]["cost"].pop("seconds", None)
        arrays = {name: (each.dtype.str, each.shape, each.tobytes()) for name, each in stored.arrays.items()}
        made[str(path.relative_to(cache.root))] = (arrays, stored.meta)
    return made


def serial(tmp_path, sources, metrics=STUDY, options=None):
    alone = Cache(tmp_path / "alone")
    return alone, run(metrics, sources, tasks=("train",), cache=alone, options=options)


# ------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.slow
def test_the_cells_are_those_of_a_study_without_workers(workers, cache, tmp_path):
    sources = files(cache)
    alone, before = serial(tmp_path, sources)
    outcomes = run(STUDY, sources, tasks=("train",), cache=cache, executor=workers)
    assert all(outcome.ok for outcome in outcomes)
    assert cells(cache) == cells(alone)
    assert len(cells(cache)) == 12
    assert [o.result for o in outcomes] == [o.result for o in before]
    assert not any(o.reused for o in outcomes)
    assert all(o.reused for o in run(STUDY, sources, tasks=("train",), cache=cache, executor=workers))


def test_a_changed_bit_is_another_cell(cache):
    from test_engine import source

    run([SIZE], [source()], cache=cache)
    (name, (arrays, meta)) = cells(cache).popitem()
    flipped = {key: (kind, shape, bytes([data[0] ^ 1, *data[1:]])) for key, (kind, shape, data) in arrays.items()}
    assert cells(cache) == {name: (arrays, meta)} != {name: (flipped, meta)}


@pytest.mark.slow
def test_without_a_folder_results_come_back_all_the_same(workers, cache):
    (outcome,) = run([SIZE], files(cache)[:1], tasks=("train",), executor=workers)
    assert outcome.ok


@pytest.mark.slow
def test_threads_are_as_many_there_as_here(local):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with Cluster(local.scheduler_address) as two:
            assert two.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)
    with Cluster(local.scheduler_address) as again:
        assert again.submit(torch.get_num_threads).result() == before
        assert again.submit(os.getcwd).result() == os.getcwd()


# ---------------------------------------------------------------------------------------------------------- killed


@pytest.mark.slow
def test_a_worker_that_is_killed_at_any_moment_costs_its_task_alone(local, workers, cache, tmp_path):
    sources = files(cache)
    alone, _ = serial(tmp_path, sources)
    run([SIZE], sources, tasks=("train",), executor=workers)  # workers import torch with their first task
    suspicious, started = interrupted(local), time.monotonic()
    run(STUDY, sources, tasks=("train",), cache=Cache(tmp_path / "timed"), executor=workers)
    took, struck = time.monotonic() - started, 0
    for seed in range(10):
        draw = random.Random(seed)
        pids = workers._client.run(os.getpid)
        victim = pids[draw.choice(sorted(pids))]
        blow = threading.Timer(draw.uniform(0, took), os.kill, (victim, signal.SIGKILL))
        blow.start()
        store = Cache(tmp_path / f"killed-{seed}")
        outcomes = run(STUDY, sources, tasks=("train",), cache=store, executor=workers)
        struck += not blow.is_alive()
        blow.join()
        assert all(outcome.ok for outcome in outcomes), [o.error for o in outcomes]
        assert cells(store) == cells(alone)
        _settled(local, workers, victim)
    assert struck > 5
    assert interrupted(local) > suspicious  # some had a task


def interrupted(local):
    """How often a task lost its worker."""
    return sum(each.suspicious for each in local.scheduler.task_prefixes.values())


def _settled(local, workers, victim):
    """Waits until the scheduler knows that a worker is gone, and another one is there."""
    for _ in range(600):
        if victim not in workers._client.run(os.getpid, on_error="return").values():
            return _filled(local, workers)
        time.sleep(0.1)
    raise AssertionError("the worker that was killed is still there")


@pytest.mark.slow
def test_a_subject_that_kills_its_workers_is_an_outcome_and_the_others_go_on(local, workers, cache, monkeypatch):
    monkeypatch.setattr(local.scheduler, "allowed_failures", 0)
    sources = files(cache)
    sizes = [o.result.size for o in run([SIZE], sources, tasks=("train",))]
    chosen = Metric("deadly", deadly, ("theta",), {"above": sorted(sizes)[-2]})
    outcomes = run([chosen, SIZE], [*sources], tasks=("train",), cache=cache, executor=workers)
    lost = {sources[int(np.argmax(sizes))].id}
    assert {o.subject for o in outcomes if not o.ok} == lost
    bad = next(o for o in outcomes if not o.ok)
    assert bad.status == "failed"
    assert "the workers that had this subject died, one after another, the last at tcp://" in bad.error
    assert "KilledWorker" in bad.traceback
    assert not any(o.subject in lost for o in outcomes if o.ok)


@pytest.mark.slow
def test_who_died_beside_others_is_tried_again_alone(local, workers, monkeypatch):
    """With no failure allowed, Dask blames every task that the worker had; only the one that kills it alone is lost."""
    monkeypatch.setattr(local.scheduler, "allowed_failures", 0)
    innocent = [workers.submit(time.sleep, 0.5) for _ in range(4)]
    guilty = workers.submit(_dies)
    innocent += [workers.submit(time.sleep, 0.5) for _ in range(4)]
    assert [future.result(120) for future in innocent] == [None] * 8
    with pytest.raises(RuntimeError, match="died, one after another"):
        guilty.result(120)


def _dies():
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_study_without_workers_or_scheduler_says_so(monkeypatch):
    monkeypatch.setattr(room, "LOOK_EVERY", 0.1)
    monkeypatch.setattr(room, "ALONE", 0.3)
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, protocol="tcp", **HERE) as one,
        Cluster(one.scheduler_address) as workers,
    ):
        one.scale(0)
        future = workers.submit(len, "abc")
        with pytest.warns(UserWarning, match="has no workers left, and the study waits"):
            time.sleep(2)
        assert not future.done()
        one.close()
        with pytest.raises(RuntimeError, match="is gone: start it again, and the same call goes on"):
            future.result(30)


def test_what_cannot_be_sent_is_the_error_of_its_call():
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=1, protocol="tcp", **HERE) as one,
        Cluster(one.scheduler_address) as workers,
        pytest.raises(TypeError, match=r"serialize|pickle"),
    ):
        workers.submit(str, threading.Lock()).result(30)


# ------------------------------------------------------------------------------------------------------- outcomes


@pytest.mark.slow
@pytest.mark.parametrize(("call", "status"), [(full, "out of memory"), (wrong, "failed")])
def test_what_a_metric_raises_is_the_outcome_that_it_is_without_workers(call, status, workers, cache, tmp_path):
    sources, metrics = files(cache), (Metric("bad", call, ("theta",)), SIZE)
    alone, before = serial(tmp_path, sources, metrics)
    outcomes = run(metrics, sources, tasks=("train",), cache=cache, executor=workers)
    assert [o.status for o in outcomes] == [status, "ok"] * 3
    assert [(o.error, o.error_type) for o in outcomes] == [(o.error, o.error_type) for o in before]
    assert cells(cache).keys() == cells(alone).keys()


@pytest.mark.slow
def test_memory_above_its_limit_and_time_above_its_limit_are_outcomes(workers, cache):
    sources = files(cache)[:1]
    (outcome,) = run(
        [metric("mean_loss")], sources, tasks=("train",), options=Options(max_memory_gb=1e-3), executor=workers
    )
    assert outcome.status == "out of memory"
    (outcome,) = run(
        [LATE],
        sources,
        tasks=("train",),
        options=Options(timeout_seconds=0.05, hard_timeout=True),
        executor=workers,
    )
    assert (outcome.status, outcome.plan["timeout"]) in [("timeout", "process"), ("ok", "process")]  # a grace of 1 s


def test_a_process_that_may_have_none_below_it_says_so(cache, monkeypatch):
    from test_engine import source

    from funcscope.study import apart

    monkeypatch.setattr(apart, "current_process", lambda: SimpleNamespace(daemon=True))
    with pytest.raises(ValueError, match="DASK_DISTRIBUTED__WORKER__DAEMON=false"):
        run([SIZE], [source()], cache=cache, options=Options(hard_timeout=True))


def ticking():
    """Passes for a minute."""
    for _ in range(6000):
        time.sleep(0.01)
        tick("forward")


@pytest.mark.slow
def test_what_is_cancelled_ends_before_its_next_pass(workers):
    futures = [workers.submit(ticking) for _ in range(6)]
    time.sleep(1)
    for future in futures:
        assert future.cancel()
    started = time.monotonic()
    assert workers.submit(len, "abc").result() == 3
    assert time.monotonic() - started < 10
    with pytest.raises(CancelledError):
        futures[0].result()


# --------------------------------------------------------------------------------------------------------- the door


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_an_address_that_does_not_answer_is_said_in_time():
    address, started = f"tcp://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(ValueError, match=rf"no Dask scheduler answers at '{address}' within 0.3 s.*`dask scheduler`"):
        Cluster(address, patience=0.3)
    assert time.monotonic() - started < 5


@contextmanager
def other_server():
    """Something that listens, and speaks of other things."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            with server.accept()[0] as line:
                line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 9)

        speaker = threading.Thread(target=answer, daemon=True)
        speaker.start()
        yield server.getsockname()[1]
        speaker.join()


def test_what_is_no_scheduler_is_said():
    with other_server() as port, pytest.raises(ValueError, match="no Dask scheduler answers at"):
        Cluster(f"tcp://127.0.0.1:{port}", patience=2)


@pytest.mark.parametrize("address", ["nonsense", "http://127.0.0.1:1", "tcp://127.0.0.1"])
def test_what_is_no_address_is_said(address):
    with pytest.raises(ValueError, match=r"no Dask scheduler answers at .*`tcp://HOST:8786`"):
        Cluster(address, patience=0.5)


def test_a_scheduler_without_workers_and_workers_of_several_threads_are_refused(tmp_path):
    with (
        distributed.LocalCluster(n_workers=0, protocol="tcp", **HERE) as empty,
        pytest.raises(ValueError, match="has no workers: start some by `dask worker ADDRESS"),
    ):
        Cluster(empty.scheduler_address, patience=0.5)
    with (
        distributed.LocalCluster(n_workers=1, threads_per_worker=2, protocol="tcp", **HERE) as wide,
        Cluster(wide.scheduler_address) as workers,
    ):
        with pytest.raises(ValueError, match=r"takes 2 tasks at a time.*--nthreads 1"):
            run([SIZE], [], cache=Cache(tmp_path), executor=workers)
        with pytest.raises(ValueError, match="takes 2 tasks at a time"):  # of a worker that came later
            workers.submit(len, "abc").result()
    assert list(tmp_path.iterdir()) == []  # no mark is left


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"packages": {**versions(), "torch": "1.0"}}, f"has torch {versions()['torch']}, and the study 1.0"),
        ({"folder": "/nowhere"}, "does not see the folder '/nowhere'"),
        ({"mark": "/nowhere/x"}, "does not see the study's folder '/nowhere': choose one (`output_dir`)"),
    ],
)
def test_a_worker_says_why_it_cannot_take_part(change, said):
    worker = SimpleNamespace(state=SimpleNamespace(nthreads=1))
    terms = {"folder": os.getcwd(), "packages": versions(), "threads": 1, "pools": {}} | change
    assert objection(Terms(**terms), worker)[: len(said) or None] == said


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_folder_is_refused(tmp_path):
    """A worker for which another disk lies over the study's folder."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("no right to hide a folder from a process")
    shared = tmp_path / "study"
    shared.mkdir()
    with distributed.LocalCluster(n_workers=0, protocol="tcp", **HERE) as empty:
        start = f"{sys.executable} -m distributed.cli.dask_worker {empty.scheduler_address} --nthreads 1 --no-dashboard"
        hidden = f"mount -t tmpfs tmpfs {shared} && exec {start} --memory-limit 0"
        worker = subprocess.Popen(["unshare", "-m", "sh", "-c", hidden], stderr=subprocess.DEVNULL)
        try:
            with (
                Cluster(empty.scheduler_address, patience=60) as workers,
                pytest.raises(ValueError, match=rf"the Dask worker tcp://.* does not see the study's folder '{shared}"),
            ):
                run([SIZE], [], cache=Cache(shared / "cache"), executor=workers)
        finally:
            worker.terminate()
            worker.wait(30)


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs distributed: pip install 'funcscope\[cluster\]'"):
        Cluster("tcp://127.0.0.1:1")


@pytest.mark.parametrize("name", ["ray", "dask:", "dasks", "", "tcp://127.0.0.1:8786"])
def test_other_executors_are_refused(name):
    with pytest.raises(ValueError, match="`executor` must be 'dask' or 'dask:ADDRESS'"):
        cluster(name)


def test_workers_beside_an_address_are_refused():
    with pytest.raises(ValueError, match="`workers` is of this machine"):
        cluster("dask:tcp://127.0.0.1:1", num=2)
    with pytest.raises(ValueError, match="`num` must be an integer of at least 1"):
        Cluster(num=0)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_the_command_line_measures_on_workers(local, cache, tmp_path, capsys):
    run_folder = cache.root.parent / "run"
    files(cache)
    call = ["analyze", str(run_folder), "--metrics", "mean_loss", "directional_losses", "--quiet", "--out"]
    assert cli.main([*call, str(tmp_path / "serial")]) == 0
    assert cli.main([*call, str(tmp_path / "there"), "--executor", f"dask:{local.scheduler_address}"]) == 0
    assert cli.main([*call, str(tmp_path / "here"), "--executor", "dask", "--workers", "2"]) == 0
    (tmp_path / "study.toml").write_text(f'executor = "dask:{local.scheduler_address}"')
    assert cli.main([*call, str(tmp_path / "filed"), "--config", str(tmp_path / "study.toml")]) == 0
    alone, there, here, filed = (
        cells(Cache(tmp_path / name / "cache")) for name in ("serial", "there", "here", "filed")
    )
    assert alone == there == here == filed
    assert len(alone) == 6
    capsys.readouterr()


@pytest.mark.slow
def test_an_address_that_does_not_answer_is_one_line_of_the_command(cache, tmp_path, capsys):
    files(cache)
    started = time.monotonic()
    address = f"tcp://127.0.0.1:{free_port()}"
    call = [
        "analyze",
        str(cache.root.parent / "run"),
        "--metrics",
        "mean_loss",
        "--quiet",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main([*call, "--executor", f"dask:{address}"]) == 2
    assert time.monotonic() - started < 20
    assert f"no Dask scheduler answers at '{address}' within 10 s" in capsys.readouterr().err


@pytest.mark.slow
def test_the_lines_of_the_readme_run(local, tmp_path, monkeypatch, capsys):
    """With two small models under its names, and the folder of the study here."""
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text().replace("tcp://HOST:8786", local.scheduler_address)
    for step in (10, 20):
        folder(tmp_path / "runs" / f"checkpoint-{step}", scale=1 + step / 100)
    texts(tmp_path / "texts.jsonl")
    paths = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("runs/*"))
    (command,) = re.findall(r"^funcscope (analyze .*--executor dask:.*)$", readme, re.MULTILINE)
    command = command.replace("runs/checkpoint-*", " ".join(paths)).replace("/shared/study", "study")
    assert cli.main([*command.split(), "--metrics", "mean_loss", "--set", "num_samples=4", "--quiet"]) == 0
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "fs.Cluster" in block)
    config = fs.UnifiedConfig(dataset_name="texts.jsonl", metrics=("mean_loss",), num_samples=4, verbose=False)
    scope = {"fs": fs, "paths": paths, "config": config}
    exec(block, scope)
    assert not scope["results"].failed
    assert len(scope["results"].outcomes) == 2
    capsys.readouterr()
