"""What comes from outside is data: names, entries, folders. Nothing in it is run, and nothing is written elsewhere."""

import json
import os
import pickle
import shutil

import pytest
import torch
from folders import folder, texts
from test_engine import SIZE, one, source

from funcscope.core import store
from funcscope.study.cache import Cache
from funcscope.study.catalogue import metric
from funcscope.study.engine import run
from funcscope.study.results import Results
from funcscope.study.sources import Pretrained
from funcscope.study.texts import DataSpec


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


class Trap:
    """A pickle that leaves a mark where it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("asked", ["os.system", "builtins:eval", "dtype", "Size", None, ["x"]])
def test_an_entry_that_asks_for_an_object_gets_none(asked, cache, tmp_path):
    first = one(SIZE, cache)
    (path,) = cache.entries()
    stored = store.load(path)
    trap = str(tmp_path / "trap")
    tree = {"is": asked, "fields": {"command": f"mkdir {trap}", "size": 0.0}, "value": "system"}
    store.save(path, {}, {**stored.meta, "result": tree}, copy=False)  # with a checksum that fits
    again = one(SIZE, cache)
    assert not again.reused
    assert again.result == first.result
    assert not os.path.exists(trap)
    assert one(SIZE, cache).reused


@pytest.mark.parametrize("change", [{"status": "fine", "nonsense": 1}, {"metric": None, "__class__": "os.system"}])
def test_an_entry_with_other_fields_is_set_aside(change, cache):
    one(SIZE, cache)
    (path,) = cache.entries()
    stored = store.load(path)
    outcome = {**stored.meta["outcome"], **change}
    store.save(path, stored.arrays, {**stored.meta, "outcome": outcome}, copy=False)
    with pytest.warns(UserWarning, match="could not be read"):
        assert not one(SIZE, cache).reused


def test_a_pickle_in_the_place_of_an_entry_is_not_opened(cache, tmp_path):
    import numpy as np

    one(SIZE, cache)
    (path,) = cache.entries()
    trap = tmp_path / "trap"
    for harm in (
        lambda: path.write_bytes(pickle.dumps(Trap(trap))),
        lambda: np.savez(path, funcscope=np.array([Trap(trap)], dtype=object)),
        lambda: torch.save(Trap(trap), path),
    ):
        harm()
        with pytest.warns(UserWarning, match="could not be read"):
            assert not one(SIZE, cache).reused
    assert not trap.exists()


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/passwd", "..", "", "a\x00b", "<script>alert(1)</script>", "x" * 400]
)
def test_a_name_is_text_and_stays_in_the_cache(name, cache, tmp_path):
    before = {path for path in tmp_path.rglob("*") if cache.root not in path.parents and path != cache.root}
    first, second = one(SIZE, cache, source(name)), one(SIZE, cache, source(name))
    assert first.ok
    assert second.reused
    assert second.subject == name
    after = {path for path in tmp_path.rglob("*") if cache.root not in path.parents and path != cache.root}
    assert after == before
    assert "<script>" not in Results((first,))._repr_html_()
    cache.clear_model_cache(name)
    assert cache.root.is_dir()
    assert not cache.entries()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    return folder(path / "model"), texts(path / "texts.jsonl")


def subject(path, data, name="", **spec):
    return Pretrained(str(path), {"data": DataSpec(data=data, num_samples=2, **spec)}, name=name)


def loss_of(cache, *subjects):
    return run([metric("mean_loss")], subjects, cache=cache)


def test_folders_of_one_name_and_a_folder_that_changed_are_never_mixed(pretrained, cache, tmp_path):
    path, data = pretrained
    twin = shutil.copytree(path, tmp_path / "other" / path.name)
    weights = twin / "model.safetensors"
    with weights.open("r+b") as file:  # one weight of the same model, in the same place and of the same size
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")
    (first,), (second,) = loss_of(cache, subject(path, data)), loss_of(cache, subject(twin, data))
    assert first.subject == second.subject
    assert not second.reused
    assert (first.result, second.result) == tuple(
        loss_of(None, s)[0].result for s in (subject(path, data), subject(twin, data))
    )
    assert first.result != second.result
    assert [loss_of(cache, subject(each, data))[0].reused for each in (path, twin)] == [True, True]
    stat = weights.stat()
    shutil.copyfile(path / "model.safetensors", weights)  # in place
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # and dated as before
    (third,) = loss_of(cache, subject(twin, data))
    assert third.result == first.result


def test_a_pickle_of_weights_is_refused_and_not_opened(pretrained, cache, tmp_path):
    path, data = pretrained
    twin = shutil.copytree(path, tmp_path / "pickled")
    (twin / "model.safetensors").unlink()
    trap = tmp_path / "trap"
    torch.save({"w": Trap(trap)}, twin / "pytorch_model.bin")
    refused, allowed = loss_of(cache, subject(twin, data), subject(twin, data, "allowed", allow_pickle=True))
    assert (refused.status, allowed.status) == ("failed", "failed")
    assert "pickle" in refused.error
    assert not trap.exists()


def test_the_code_of_a_folder_is_not_run(pretrained, cache, tmp_path):
    path, data = pretrained
    twin, trap = shutil.copytree(path, tmp_path / "remote"), tmp_path / "trap"
    (twin / "modeling_trap.py").write_text(f"import os\nos.mkdir({str(trap)!r})\nclass Trap: pass\n")
    config = json.loads((twin / "config.json").read_text())
    config |= {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "modeling_trap.Trap")}
    (twin / "config.json").write_text(json.dumps(config))
    tokens = json.loads((twin / "tokenizer_config.json").read_text())
    (twin / "tokenizer_config.json").write_text(
        json.dumps(tokens | {"auto_map": {"AutoTokenizer": ["modeling_trap.Trap", None]}})
    )
    loss_of(cache, subject(twin, data))
    assert not trap.exists()
