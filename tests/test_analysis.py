"""Runs of analyzers: what is stored decides what is left, whatever interrupted it, and whoever else is at it."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from dataclasses import asdict

import numpy as np
import pytest
import torch

from funcscope.core.store import Damaged, load, save
from funcscope.families import modular
from funcscope.families.family import Family, Kept, Setup, family, register
from funcscope.families.phases import phases
from funcscope.landscape.path import linear_path
from funcscope.study.analysis import Work, analyse
from funcscope.study.analyzer import Analyzer
from funcscope.study.analyzers import ANALYZERS, EFFECTIVE_DIMENSIONALITY, LANDSCAPE_FLATNESS, analyzer
from funcscope.study.analyzers import register as register_analyzer
from funcscope.study.runs import Runs, Variant, begin
from funcscope.study.training import trained

TINY = modular.Config(p=5, d_model=8, num_heads=2, d_mlp=12, steps=40, train_fraction=0.6)
SETUP = Setup(TINY, (0, 10, 20, 40))


def norm(subject, *, power):
    return {"norm": float(subject.theta.norm()) ** power, "theta": subject.theta.numpy()[:3].astype(float)}


NORM = Analyzer(
    name="norm",
    analyze=norm,
    summary_keys=("norm", "theta"),
    compute_summary=lambda values: {"norm": values["norm"], "theta": values["theta"]},
    settings={"power": 1},
    needs_loss=False,
)
FLAT = LANDSCAPE_FLATNESS.configured(n_directions=3)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return trained(modular.FAMILY, SETUP, out, name="tiny", quiet=True)


@pytest.fixture
def variant(original, tmp_path):
    """A copy of the trained variant, without artifacts."""
    made = begin(tmp_path / original.name, "modular_addition", "tiny", asdict(TINY))
    for path in [original.path / "curves.npz", *(original.path / "checkpoints").iterdir()]:
        target = made.path / path.relative_to(original.path)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    return made


def files(variant, analyzer="norm"):
    """Every visible file of an analyzer but the clock's."""
    folder = variant.folder(analyzer)
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != "times.jsonl"}


def test_a_run_stores_each_step_with_its_settings_and_a_summary(variant):
    analyse(variant, [NORM], quiet=True)
    assert variant.analyzers() == ("norm",)
    assert variant.steps("norm") == (0, 10, 20, 40)
    summary = variant.summary("norm")
    for i, step in enumerate(variant.steps("norm")):
        theta = modular.network(TINY).layout.ravel(modular.checkpoint(TINY, variant.path, step).params)
        found = variant.load("norm", step)
        assert found["norm"] == summary["norm"][i] == float(theta.norm())
        np.testing.assert_array_equal(found["theta"], summary["theta"][i])
        settings = load(variant.artifact("norm", step)).meta["settings"]
        assert settings["settings"] == {"power": 1}
        assert settings["step"] == step
        assert settings["config"]["p"] == 5
    assert summary["step"].tolist() == [0, 10, 20, 40]
    assert variant.settings("norm")["settings"] == {"power": 1}
    assert [entry["step"] for entry in variant.times("norm")] == [0, 10, 20, 40]
    assert not list(variant.path.rglob("*.tmp"))


def test_the_artifacts_are_plain_npz_files(variant):
    """Read by numpy alone, with the documented names."""
    analyse(variant, [FLAT], quiet=True)
    with np.load(variant.path / "artifacts" / "landscape_flatness" / "step_00010.npz", allow_pickle=False) as file:
        assert file["delta_losses"].shape == (3,)
        assert {"baseline_loss", "delta_losses", "epsilon"} <= set(file.files)
        assert float(file["epsilon"]) == pytest.approx(0.1)
    with np.load(variant.path / "artifacts" / "landscape_flatness" / "summary.npz", allow_pickle=False) as file:
        documented = "mean_ median_ max_ std_ p90_".replace("_", "_delta_loss").split()
        assert {*documented, "flatness_ratio", "baseline_loss", "step"} <= set(file.files)


def counted(monkeypatch_or_list, version=1, power=1):
    calls = monkeypatch_or_list

    def analyze(subject, *, power):
        calls.append(subject.step)
        return norm(subject, power=power)

    return dataclasses.replace(NORM, analyze=analyze, version=version, settings={"power": power})


def test_what_is_stored_is_kept_and_what_changed_is_made_again(variant):
    calls = []
    analyse(variant, [counted(calls)], quiet=True)
    before = files(variant)
    analyse(variant, [counted(calls)], quiet=True)
    assert calls == [0, 10, 20, 40]
    assert files(variant) == before
    analyse(variant, [counted(calls, power=2)], quiet=True)  # another setting
    assert calls[4:] == [0, 10, 20, 40]
    assert variant.summary("norm")["norm"][0] == pytest.approx(variant.load("norm", 0)["norm"])
    analyse(variant, [counted(calls, power=2, version=2)], quiet=True)  # another version of the function
    assert calls[8:] == [0, 10, 20, 40]
    path = modular.path(variant.path, 20)
    arrays, meta, _ = load(path)
    save(path, {name: value * 1.5 for name, value in arrays.items()}, meta)
    analyse(variant, [counted(calls, power=2, version=2)], quiet=True)  # another checkpoint
    assert calls[12:] == [20]


def test_steps_with_other_settings_are_gaps_and_not_mixed_in(variant):
    analyse(variant, [NORM], quiet=True)
    analyse(variant, [NORM.configured(power=2)], steps=[10], quiet=True)
    summary = variant.summary("norm")
    assert np.isnan(summary["norm"]).tolist() == [True, False, True, True]
    assert np.isnan(summary["theta"]).all(1).tolist() == [True, False, True, True]
    assert not (summary["norm"] == 0).any()
    analyse(variant, [NORM.configured(power=2)], quiet=True)
    assert np.isfinite(variant.summary("norm")["norm"]).all()


@pytest.mark.parametrize("stop", [1, 3])
def test_interrupted_and_resumed_is_uninterrupted_byte_for_byte(variant, original, tmp_path, stop):
    analyse(variant, [NORM, FLAT], quiet=True)
    whole = files(variant), files(variant, "landscape_flatness")
    for name in ("norm", "landscape_flatness"):
        for path in variant.folder(name).glob("*"):
            if path.is_file():
                path.unlink()
    calls = []

    def interrupted(subject, **settings):
        calls.append(1)
        if len(calls) == stop + 1:
            raise KeyboardInterrupt
        return LANDSCAPE_FLATNESS.analyze(subject, **settings)

    with pytest.raises(KeyboardInterrupt):
        analyse(variant, [NORM, dataclasses.replace(FLAT, analyze=interrupted)], quiet=True)
    assert len(variant.steps("landscape_flatness")) == stop
    analyse(variant, [NORM, FLAT], quiet=True)
    assert (files(variant), files(variant, "landscape_flatness")) == whole


def run(code, variant, **options):
    head = f"""
        import os, signal, sys, time
        sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
        from pathlib import Path
        from funcscope.core import store
        from funcscope.study.analysis import analyse
        from funcscope.study.runs import Variant
        from test_analysis import NORM, FLAT, norm
        import dataclasses
        variant = Variant(Path({str(variant.path)!r}))
    """
    source = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", source], text=True, **options)


@pytest.mark.slow
def test_killed_while_an_artifact_is_written_and_resumed_is_uninterrupted_byte_for_byte(variant):
    analyse(variant, [NORM], quiet=True)
    whole = files(variant)
    for path in variant.folder("norm").glob("[a-z]*"):
        path.unlink()
    killed = run(
        """
        def half(file, data):
            file.write(data[: len(data) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        real = os.fdopen
        class Half:
            def __init__(self, file): self.file = file
            def __enter__(self): return self
            def __exit__(self, *_): self.file.close()
            def write(self, data):
                if Half.left == 0:
                    half(self.file, data)
                Half.left -= 1
                self.file.write(data)
            def flush(self): self.file.flush()
            def fileno(self): return self.file.fileno()
        Half.left = 2
        os.fdopen = lambda *args, **kwargs: Half(real(*args, **kwargs))
        analyse(variant, [NORM], quiet=True)
        """,
        variant,
    )
    assert killed.wait(timeout=600) == -9
    assert variant.steps("norm") == (0, 10)
    assert len(list(variant.folder("norm").glob(".*.tmp"))) == 1  # what a kill leaves
    analyse(variant, [NORM], quiet=True)
    assert files(variant) == whole  # and it is gone


@pytest.mark.slow
def test_two_processes_on_one_folder_share_the_work_and_lose_nothing(variant):
    alone = Variant(variant.path.parent / "alone")
    begin(alone.path, "modular_addition", "tiny", asdict(TINY))
    for path in (variant.path / "checkpoints").iterdir():
        (alone.path / "checkpoints").mkdir(exist_ok=True)
        (alone.path / "checkpoints" / path.name).write_bytes(path.read_bytes())
    analyse(alone, [NORM], quiet=True)
    code = """
        def slow(subject, *, power):
            time.sleep(0.4)
            return norm(subject, power=power)
        ready = variant.path.parent / "ready"
        ready.mkdir(exist_ok=True)
        (ready / str(os.getpid())).touch()
        while len(list(ready.iterdir())) < 2:  # both begin at once
            time.sleep(0.01)
        analyse(variant, [dataclasses.replace(NORM, analyze=slow)], quiet=True)
    """
    both = [run(code, variant) for _ in range(2)]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    assert files(variant) == files(alone)
    assert sorted(entry["step"] for entry in variant.times("norm")) == [0, 10, 20, 40]  # each was done once


@pytest.mark.parametrize("harm", ["cut", "foreign", "empty", "text"])
def test_an_artifact_that_cannot_be_read_is_set_aside_and_made_again(variant, harm):
    analyse(variant, [NORM], quiet=True)
    whole, path = files(variant), variant.artifact("norm", 20)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif harm == "foreign":
        np.savez(path, norm=np.ones(3))
    else:
        path.write_bytes(b"" if harm == "empty" else b"not an archive")
    left = path.read_bytes()
    with pytest.raises(Damaged, match="damaged or was not written by funcscope"):
        variant.load("norm", 20)
    with pytest.warns(UserWarning, match=r"step_00020.npz could not be read and is now step_00020.npz.unreadable"):
        analyse(variant, [NORM], quiet=True)
    assert files(variant) == whole | {"step_00020.npz.unreadable": left}


def test_a_checkpoint_of_another_architecture_is_refused_and_the_others_are_analysed(variant):
    other = dataclasses.replace(TINY, d_model=16)
    path = modular.path(variant.path, 20)
    arrays, meta, _ = load(
        modular.path(trained(modular.FAMILY, Setup(other, (0,)), variant.path.parent, quiet=True).path, 0)
    )
    save(path, arrays, meta)
    with pytest.raises(ValueError, match=r"norm: 1 of 4 checkpoints could not be analysed \(step 20: .*another run"):
        analyse(variant, [NORM], quiet=True)
    save(
        path, arrays, meta | {"config": json.loads(json.dumps(asdict(TINY)))}
    )  # it says it is ours: its shapes are not
    with pytest.raises(
        ValueError, match=r"step 20: `checkpoint 20\['position'\]` must have shape \(3, 8\), got \(3, 16\)\)"
    ):
        analyse(variant, [NORM], quiet=True)
    assert np.isnan(variant.summary("norm")["norm"]).tolist() == [False, False, True, False]


def test_a_checkpoint_that_was_harmed_later_is_a_gap_even_where_its_artifact_is_stored(variant):
    analyse(variant, [NORM], quiet=True)
    path = modular.path(variant.path, 10)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"1 of 4 checkpoints could not be analysed \(step 10: .*is damaged"):
        analyse(variant, [NORM], quiet=True)
    analyse(variant, [NORM], steps=[20, 40], quiet=True)
    assert np.isnan(variant.summary("norm")["norm"]).tolist() == [False, True, False, False]


def test_a_run_of_another_version_is_refused(variant):
    head = json.loads((variant.path / "variant.json").read_text())
    (variant.path / "variant.json").write_text(json.dumps(head | {"version": head["version"] - 1}))
    with pytest.raises(ValueError, match=r"variant\.json was written by another version .*choose a new folder"):
        analyse(Runs(variant.path).variant(variant.name), [NORM], quiet=True)


def test_bad_settings_steps_and_names(variant):
    with pytest.raises(ValueError, match=r"norm has no setting 'epsilon': it has power"):
        NORM.configured(epsilon=1)
    with pytest.raises(ValueError, match=r"no checkpoint at step 15: there are 0, 10, 20, 40"):
        analyse(variant, [NORM], steps=[15], quiet=True)
    with pytest.raises(ValueError, match=r"no analyzer 'flatness': there are landscape_flatness, "):
        analyzer("flatness")
    with pytest.raises(ValueError, match=r"epsilon"):
        analyse(variant, [LANDSCAPE_FLATNESS.configured(epsilon=0.0)], quiet=True)
    assert variant.steps("landscape_flatness") == ()
    odd = dataclasses.replace(NORM, summary_keys=("norm",))
    with pytest.raises(
        ValueError, match=r"^norm: TypeError: `compute_summary` of norm gives \['norm', 'theta'\].*Nothing"
    ):
        analyse(variant, [odd], quiet=True)


def test_an_analyzer_of_ones_own_may_be_registered_again_but_not_under_a_name_of_ours(monkeypatch):
    monkeypatch.setattr("funcscope.study.analyzers.ANALYZERS", dict(ANALYZERS))
    for one in (NORM, NORM.configured(power=2)):  # as when a cell of a notebook runs twice
        assert register_analyzer(one) is analyzer("norm") is one
    with pytest.raises(ValueError, match=r"'loss_plane' is that of an analyzer of funcscope"):
        register_analyzer(dataclasses.replace(NORM, name="loss_plane"))
    with pytest.raises(ValueError, match=r"named by small letters, digits and underscores, got '../norm'"):
        register_analyzer(dataclasses.replace(NORM, name="../norm"))


def test_a_family_without_a_loss_and_one_that_nobody_registered(variant, tmp_path):
    silent = register(
        dataclasses.replace(modular.FAMILY, name="silent", criterion=None, checkpoint=modular.FAMILY.checkpoint)
    )
    head = json.loads((variant.path / "variant.json").read_text())
    (variant.path / "variant.json").write_text(json.dumps(head | {"family": "silent"}))
    without = Variant(variant.path)
    with pytest.raises(ValueError, match=r"the family 'silent' gives no loss, .*set `criterion=`"):
        analyse(without, [LANDSCAPE_FLATNESS], quiet=True)
    analyse(without, [EFFECTIVE_DIMENSIONALITY], quiet=True)  # takes none
    assert silent is family("silent")
    (variant.path / "variant.json").write_text(json.dumps(head | {"family": "unknown"}))
    with pytest.raises(
        ValueError, match=r"no family 'unknown' is registered: there are modular_addition.*`--import MODULE`"
    ):
        analyse(Variant(variant.path), [NORM], quiet=True)


def test_a_family_of_ones_own_in_one_file(tmp_path):
    """A linear model, its own checkpoints, and an analyzer that it needs nothing else for."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        size: int = 3

        @property
        def name(self):
            return f"linear-{self.size}"

    import funcscope as fs

    def network(config):
        return fs.functional(torch.nn.utils.skip_init(torch.nn.Linear, config.size, 2))

    def train(config, folder, steps):
        for step in steps:
            save(
                folder / "checkpoints" / f"step_{step:05d}.safetensors",
                {"weight": torch.eye(2, 3) * step, "bias": torch.zeros(2)},
                {},
            )
            yield modular.Point(step, 1.0, 1.0, 0.0, 0.0)

    def checkpoint(config, folder, step):
        stored = load(folder / "checkpoints" / f"step_{step:05d}.safetensors")
        return Kept(stored.arrays, stored.sha256)

    own = Family(
        "linear", {"three": Setup(Config(), (0, 5))}, Config, network,
        lambda config, split: [(torch.eye(3), torch.tensor([0, 1, 0]))], fs.classification, train, checkpoint,
    )  # fmt: skip
    register(own)
    made = trained(family("linear"), own.setup("three"), tmp_path, quiet=True)
    analyse(made, [FLAT, EFFECTIVE_DIMENSIONALITY], quiet=True)
    assert made.summary("landscape_flatness")["baseline_loss"][0] == pytest.approx(np.log(2))
    assert made.summary("effective_dimensionality")["participation_ratio"][1] == pytest.approx([2.0])
    assert np.isnan(made.summary("effective_dimensionality")["participation_ratio"][0]).all()  # of zeros: undefined
    with pytest.raises(ValueError, match="is taken by another family"):
        register(dataclasses.replace(own, variants={"four": Setup(Config(4), (0,))}))
    with pytest.raises(ValueError, match=r"'linear' has no variant 'two': it has three"):
        own.setup("two")


def test_every_analyzer_runs_on_a_tiny_run_and_is_the_same_again(variant):
    small = {
        "landscape_flatness": {"n_directions": 3},
        "flatness_profile": {"n_directions": 3, "products": 3, "epsilons": (0.01, 0.1)},
        "directional_losses": {"n_samples": 3},
        "hessian_curvature": {"products": 3},
        "loss_plane": {"num": 4},
        "trajectory_plane": {"num": 4},
        "phase_lines": {"num": 5, "num_directions": 2},
        "phase_path": {"num": 5},
    }
    chosen = [one.configured(**small.get(name, {})) for name, one in ANALYZERS.items()]
    analyse(variant, chosen, quiet=True)
    assert set(variant.analyzers()) == set(ANALYZERS)
    before = {name: files(variant, name) for name in ANALYZERS}
    for name in ANALYZERS:
        for path in variant.folder(name).glob("*.npz"):
            if path.name not in ("step_00000.npz", "step_00010.npz", "step_00020.npz"):  # one of each is made again
                path.unlink()
    analyse(variant, chosen, quiet=True)
    assert {name: files(variant, name) for name in ANALYZERS} == before
    plane = variant.cross("trajectory_plane")
    assert plane["coordinates"].shape == (4, 2)
    np.testing.assert_allclose(plane["coordinates"][-1], 0, atol=1e-9)
    assert plane["axis_values"].min() <= plane["coordinates"][:, 0].min()
    path = variant.cross("phase_path")
    assert {path["start_step"], path["end_step"]} <= {0, 10, 20, 40}


def test_reading_a_run_opens_only_what_is_asked_for(variant, monkeypatch):
    analyse(variant, [NORM], quiet=True)
    opened = []
    monkeypatch.setattr("funcscope.study.runs.load", lambda path: opened.append(path.name) or load(path))
    again = Runs(variant.path.parent).variant(variant.name)
    assert again.steps("norm") == (0, 10, 20, 40)
    assert opened == []
    again.summary("norm")
    again.load("norm", 20)
    assert opened == ["summary.npz", "step_00020.npz"]


@pytest.mark.parametrize("name", ["../run", "/etc", "..", ".", "", "no such", "%2e%2e"])
def test_a_variant_outside_of_the_run_is_refused(variant, name):
    with pytest.raises(ValueError, match=r"no variant .* in this run: it has modular-addition-p5"):
        Runs(variant.path.parent).variant(name)
    with pytest.raises(ValueError, match="an analyzer is named by small letters"):
        variant.folder(f"../{name}")


def test_folders_that_are_no_runs(tmp_path, variant):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        Runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no variant"):
        Runs(tmp_path / "empty")
    (variant.path / "variant.json").write_text("{")
    with pytest.raises(Damaged, match=r"variant.json is damaged"):
        assert Variant(variant.path).head
    with pytest.raises(ValueError, match="belongs to another variant"):
        begin(trained(modular.FAMILY, SETUP, tmp_path / "x", quiet=True).path, "modular_addition", "other", {})


def test_a_run_without_checkpoints_says_what_to_do(tmp_path):
    begin(tmp_path / "new", "modular_addition", "tiny", asdict(TINY))
    with pytest.raises(ValueError, match=r"has no checkpoints: train it first"):
        analyse(Variant(tmp_path / "new"), [NORM], quiet=True)


def test_the_published_size_is_a_variant():
    setup = family("modular_addition").setup("p113")
    net = modular.network(setup.config)
    assert net.layout.num == 226_048
    assert not [name for name in net.layout.names if "bias" in name]
    assert len(setup.checkpoints) == 95
    assert setup.checkpoints[:3] == (0, 100, 200)
    assert setup.checkpoints[-1] == 25_000
    assert len(modular.data(setup.config, "train")[1]) == round(0.3 * 113**2)
    tokens, answers = modular.data(setup.config, "probe")
    assert tokens[114].tolist() == [1, 1, 113]
    assert int(answers[114]) == 2
    assert len(answers) == 113**2


def test_a_diverged_checkpoint_is_a_gap_and_stops_no_other_analyzer(variant):
    path = modular.path(variant.path, 20)
    arrays, meta, _ = load(path)
    save(path, {name: value * float("nan") for name, value in arrays.items()}, meta)
    chosen = [FLAT, analyzer("trajectory_plane").configured(num=3), NORM]
    with pytest.raises(ValueError, match=r"landscape_flatness: 1 of 4 .*step 20.* trajectory_plane could not be made"):
        analyse(variant, chosen, quiet=True)
    assert variant.steps("landscape_flatness") == (0, 10, 40)
    assert np.isnan(variant.summary("landscape_flatness")["mean_delta_loss"]).tolist() == [False, False, True, False]
    assert variant.steps("norm") == (0, 10, 20, 40)
    assert variant.cross("trajectory_plane") is None


def test_a_failure_of_any_kind_stops_nothing_else_and_is_told_once(variant):
    def fails(subject, *, power):
        if subject.step == 20:
            raise RuntimeError("boom")
        return norm(subject, power=power)

    other = dataclasses.replace(NORM, name="other")
    with pytest.raises(ValueError, match=r"norm: 1 of 4 .*step 20: RuntimeError: boom"):
        analyse(variant, [dataclasses.replace(NORM, analyze=fails), other], quiet=True)
    assert np.isnan(variant.summary("norm")["norm"]).tolist() == [False, False, True, False]
    assert variant.steps("other") == (0, 10, 20, 40)
    with pytest.raises(
        ValueError, match=r"^landscape_flatness: `epsilon` must be a finite number above 0, got nan. Nothing"
    ):
        analyse(variant, [LANDSCAPE_FLATNESS.configured(epsilon=float("nan"))], quiet=True)


def test_foreign_folders_files_and_lines_harm_nothing(variant):
    analyse(variant, [NORM], quiet=True)
    for name in ("My-notes", ".ipynb_checkpoints"):
        (variant.path / "artifacts" / name).mkdir()
    assert variant.analyzers() == ("norm",)
    with (variant.folder("norm") / "times.jsonl").open("ab") as file:
        file.write(b'{}\n\xff\n{"seconds": "long"}\n{"step": 1')
    assert [entry["step"] for entry in variant.times("norm")] == [0, 10, 20, 40]
    for word in ("one", "two"):  # files of ours that are no artifacts
        save(variant.artifact("norm", 20), {"x": np.ones(2)}, {"hello": word}, copy=False)
        with pytest.raises(Damaged, match="it has no settings"):
            variant.load("norm", 20)
        with pytest.warns(UserWarning, match="could not be read and is now"):
            analyse(variant, [NORM], quiet=True)
    aside = sorted(path.name for path in variant.folder("norm").glob("*.unreadable*"))
    assert aside == ["step_00020.npz.unreadable", "step_00020.npz.unreadable1"]  # nothing is overwritten


def test_tensors_keep_what_is_not_finite(variant):
    def analyze(subject, *, power):
        return {"norm": subject.theta.norm(), "theta": torch.tensor([1.0, float("inf"), 2.0])}

    analyse(variant, [dataclasses.replace(NORM, analyze=analyze)], quiet=True)
    found = variant.load("norm", 0)
    assert isinstance(found["norm"], float)
    assert found["theta"].tolist() == [1.0, float("inf"), 2.0]


def test_a_variant_answers_to_the_name_that_it_was_trained_under(variant):
    runs = Runs(variant.path.parent)
    assert runs.variant("tiny").path == runs.variant(variant.name).path
    (variant.path.parent / "harmed").mkdir()
    (variant.path.parent / "harmed" / "variant.json").write_text("{")
    assert runs.variant("tiny").name == variant.name  # whatever lies beside it
    same = begin(variant.path, "modular_addition", "another label", asdict(TINY))
    assert same.head["variant"] == "tiny"
    with pytest.raises(ValueError, match=r"belongs to another variant, tiny of modular_addition; what differs: seed\."):
        begin(variant.path, "modular_addition", "tiny", asdict(dataclasses.replace(TINY, seed=9)))


def test_what_concerns_all_checkpoints_has_its_time(variant):
    analyse(variant, [analyzer("phase_path").configured(num=3)], quiet=True)
    (entry,) = variant.times("phase_path")
    assert entry["seconds"] > 0
    assert entry["forwards"] == 3
    assert entry["step"] is None


def test_phases_are_the_middle_of_what_memorised_without_generalising():
    step = np.arange(0, 100, 10)
    curves = {"step": step, "train_accuracy": (step >= 20).astype(float), "test_accuracy": (step >= 70) * 0.9}
    assert phases(tuple(step.tolist()), curves) == (0, 40, 90)  # 20 to 60 have
    assert phases((0, 30, 70, 90), curves) == (0, 30, 90)
    never = curves | {"train_accuracy": np.zeros(10)}
    assert phases((0, 30, 60, 90), never) == phases((0, 30, 60, 90), None) == (0, 60, 90)


def test_data_that_no_family_has_are_refused_before_any_work(variant):
    with pytest.raises(ValueError, match=r"^`split` must be one of 'train', 'test', 'probe', got 'foo'"):
        analyse(variant, [FLAT.configured(split="foo")], quiet=True)


def normalising(keep_buffers):
    """A family whose network tracks running statistics, and keeps them beside the parameters or not."""
    import funcscope as fs

    @dataclasses.dataclass(frozen=True)
    class Config:
        name: str = "normalising"

    x = fs.normal(fs.key(0), torch.empty(8, 3))

    def network(config):
        return fs.functional(torch.nn.BatchNorm1d(3))

    def train(config, folder, steps):
        for step in steps:
            model = torch.nn.BatchNorm1d(3)
            with torch.no_grad():
                model.weight += step
                model(x * (1 + step))
            save(folder / "checkpoints" / f"step_{step:05d}.safetensors", dict(model.state_dict()), {})
            yield modular.Point(step, 1.0, 1.0, 0.0, 0.0)

    def checkpoint(config, folder, step):
        stored = load(folder / "checkpoints" / f"step_{step:05d}.safetensors")
        params = {name: stored.arrays[name] for name in ("weight", "bias")}
        buffers = {name: stored.arrays[name] for name in ("running_mean", "running_var")}
        return Kept(params, stored.sha256, buffers) if keep_buffers else Kept(params, stored.sha256)

    return Family(
        f"normalising {keep_buffers}", {"one": Setup(Config(), (0, 3))}, Config, network,
        lambda config, split: [(x, torch.arange(8) % 3)], fs.classification, train, checkpoint,
    )  # fmt: skip


def test_a_checkpoint_is_looked_at_with_its_own_running_statistics(tmp_path):
    """Oracle: the plain module of each checkpoint."""
    own = register(normalising(True))
    made = trained(own, own.setup("one"), tmp_path, quiet=True)
    work = Work(made)
    x, y = next(iter(own.batches(None, "train")))
    for step in (0, 3):
        subject = work.subject(step)
        model = torch.nn.BatchNorm1d(3).eval()
        model.load_state_dict(load(made.path / "checkpoints" / f"step_{step:05d}.safetensors").arrays)
        expected = float(torch.nn.functional.cross_entropy(model(x), y).detach())
        assert float(subject.loss("train")(subject.theta)) == pytest.approx(expected, rel=1e-6)
        assert torch.equal(subject.trained.theta, subject.theta)
    found = linear_path(work.subject(0).loss("train"), work.subject(0).trained, work.subject(3).trained, num=3)
    assert float(found.losses[-1]) == pytest.approx(expected, rel=1e-6)
    assert abs(float(work.subject(0).loss("train")(subject.theta)) - expected) > 0.1  # negative control
    analyse(made, [FLAT], quiet=True)
    assert made.summary("landscape_flatness")["baseline_loss"][1] == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_without_its_running_statistics_is_refused(tmp_path):
    own = register(normalising(False))
    made = trained(own, own.setup("one"), tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"running_mean.*Kept\(params, sha256, buffers\)"):
        analyse(made, [FLAT], quiet=True)
