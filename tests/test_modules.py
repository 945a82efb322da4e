"""Modules of the user's own on workers: metrics and families of theirs are known there before any work."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from test_engine import SIZE, files

from funcscope import cli
from funcscope.families import modular
from funcscope.families.family import _REGISTERED
from funcscope.study.cache import Cache
from funcscope.study.catalogue import CATALOGUE, metric
from funcscope.study.engine import run
from funcscope.study.meter import Options
from funcscope.study.metric import Absent, _remade
from funcscope.study.modules import IMPORTED, OwnModule, import_modules, own_modules
from funcscope.study.results import Results
from funcscope.study.runs import HEAD
from funcscope.study.worker import Terms, objection

WRITTEN = """
import dataclasses
import funcscope as fs
from funcscope import families

class Size(fs.Result):
    size: float = fs.quantity("size")

def size(theta, *, power=2.0):
    return Size(float(theta.norm(p=power)))

fs.register(fs.Metric("size_of_mine", size, ("theta",), {"power": 2.0}))
families.register(dataclasses.replace(families.modular.FAMILY, name="family_of_mine"))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of a metric and a family in a folder that is on no path, known here as `--import` makes it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "module_of_mine.py").write_text(WRITTEN)
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])
    import_modules(["module_of_mine"])
    sys.path.remove(str(home))
    yield home / "module_of_mine.py"
    sys.modules.pop("module_of_mine", None)
    IMPORTED.pop("module_of_mine", None)
    CATALOGUE.pop("size_of_mine", None)
    _REGISTERED.pop("family_of_mine", None)


@pytest.fixture
def sources(tmp_path):
    """Checkpoints of the module's own family."""
    made = files(Cache(tmp_path / "cache"))
    (head,) = (tmp_path / "run").glob(f"*/{HEAD}")
    head.write_text(head.read_text().replace(f'"{modular.FAMILY.name}"', '"family_of_mine"'))
    return made


def of_mine(outcomes):
    return [outcome.result.size for outcome in outcomes]


def test_what_is_the_users_own_and_where_it_lies(mine, tmp_path):
    package = tmp_path / "package_of_mine"
    package.mkdir()
    for name in ("__init__", "part"):
        (package / f"{name}.py").touch()
    OwnModule("package_of_mine.part", str(tmp_path)).imported()
    try:
        names = [
            "funcscope.study.measures",
            "module_of_mine",
            "package_of_mine.part",
            "module_of_mine",
            "__main__",
            "no",
        ]
        assert own_modules(names) == (
            OwnModule("module_of_mine", str(mine.parent)),
            OwnModule("package_of_mine.part", str(tmp_path)),
        )
    finally:
        for name in ("package_of_mine", "package_of_mine.part"):
            sys.modules.pop(name, None)
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("written", [None, "raise RuntimeError('half')", "1 +"])
def test_a_module_that_cannot_be_imported_is_said_by_name_with_the_remedy(tmp_path, monkeypatch, written):
    monkeypatch.setattr(sys, "path", [*sys.path])
    if written is not None:
        (tmp_path / "bad_one.py").write_text(written)
    with pytest.raises(ValueError, match=r"cannot import the module 'bad_one'.*install it where workers run"):
        OwnModule("bad_one", str(tmp_path)).imported()


def test_a_metric_is_known_by_its_module_where_it_is_not_known_yet(mine, monkeypatch):
    """As in a process that has imported funcscope alone."""
    sent = metric("size_of_mine").configured(power=1.0).__reduce__()[1]
    del CATALOGUE["size_of_mine"], sys.modules["module_of_mine"]
    monkeypatch.setattr(sys, "path", [*sys.path])
    made = _remade(*sent)
    assert made.settings == {"power": 1.0}
    assert made.call(torch.ones(3), power=1.0).size == 3


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ((), "is registered by the script that calls the study"),
        ((OwnModule("json", ""),), "the module 'json' registers no metric 'not_there'"),
        ((OwnModule("no_such_module", ""),), "cannot import the module 'no_such_module'"),
    ],
)
def test_a_metric_that_is_not_there_costs_its_subject_and_is_not_stored(own, said, tmp_path):
    absent = _remade("not_there", {}, own)
    assert isinstance(absent.call, Absent)
    source = files(Cache(tmp_path / "cache"))[0]
    store = Cache(tmp_path / "cells")
    outcomes = run([SIZE, absent], [source], cache=store)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed"]
    assert all(said in outcome.error for outcome in outcomes)
    assert store.entries() == []
    with pytest.raises(ValueError, match=said):
        run([absent], [source], options=Options(skip_on_error=False))


def test_a_worker_says_which_module_it_lacks():
    terms = Terms("/", {}, 1, {}, modules=(OwnModule("no_such_module", "/nowhere"),))
    said = objection(terms, SimpleNamespace(state=SimpleNamespace(nthreads=1)))
    assert said.startswith("cannot import the module 'no_such_module'")
    assert "'/nowhere'" in said


@pytest.mark.slow
def test_processes_know_the_users_metrics_and_families(mine, sources, tmp_path, capsys):
    alone = run([metric("size_of_mine")], sources, tasks=("train",))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as workers:
        there = run([metric("size_of_mine")], sources, tasks=("train",), executor=workers)
    assert all(outcome.ok for outcome in there), there[0].error
    assert of_mine(there) == of_mine(alone)
    call = ["analyze", str(tmp_path / "run"), "--import", "module_of_mine", "--metrics", "size_of_mine", "--quiet"]
    assert cli.main([*call, "--out", str(tmp_path / "out"), "--workers", "2"]) == 0
    assert of_mine(Results.open(tmp_path / "out").outcomes) == of_mine(alone)


@pytest.mark.slow
def test_a_process_that_cannot_import_the_module_says_so_and_keeps_nothing(mine, sources, tmp_path):
    mine.unlink()
    store = Cache(tmp_path / "cells")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as workers:
        outcomes = run([metric("size_of_mine")], sources, tasks=("train",), executor=workers, cache=store)
    assert [outcome.status for outcome in outcomes] == ["failed"] * 3
    assert "cannot import the module 'module_of_mine'" in outcomes[0].error
    assert store.entries() == []


@pytest.mark.slow
def test_workers_of_a_scheduler_know_them_and_one_that_does_not_is_refused(mine, sources, tmp_path):
    pytest.importorskip("distributed")
    from funcscope.study.cluster import Cluster

    alone = run([metric("size_of_mine")], sources, tasks=("train",))
    with Cluster(num=1) as workers:
        there = run([metric("size_of_mine")], sources, tasks=("train",), executor=workers)
        assert all(outcome.ok for outcome in there), there[0].error
        assert of_mine(there) == of_mine(alone)
    mine.unlink()
    with (
        Cluster(num=1) as workers,
        pytest.raises(ValueError, match=r"the Dask worker tcp://.* cannot import the module 'module_of_mine'"),
    ):
        run([metric("size_of_mine")], sources, tasks=("train",), executor=workers)
