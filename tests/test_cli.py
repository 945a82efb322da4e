"""The command line as a user meets it."""

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from funcscope import cli
from funcscope.core.store import load, save
from funcscope.curvature import hessian
from funcscope.families import modular
from funcscope.families.family import Setup
from funcscope.linalg import dense
from funcscope.study import demo
from funcscope.study.analyzers import curvature, directional
from funcscope.study.runs import Runs

TINY = demo.Settings(
    modular.Config(p=7, d_model=8, num_heads=2, d_mlp=16, steps=100, train_fraction=0.6),
    num_checkpoints=6, n_samples=4, plane_points=4,
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "QUICK", TINY)


def test_the_demo_prints_a_table_and_writes_page_and_numbers(tiny, tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "new" / "folder")]) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "new" / "folder"
    stored = load(folder / "modular-addition-p7.npz")
    assert stored.arrays["losses"].shape == (len(stored.arrays["step"]), 4)
    assert "<html" in (folder / "modular-addition-p7.html").read_text()
    beside = json.loads((folder / "modular-addition-p7.json").read_text())
    assert [row["step"] for row in beside["meta"]["table"]] == stored.arrays["step"].tolist()
    for row in beside["meta"]["table"]:
        assert re.search(rf"^\s*{row['step']} .*{row['train_loss']:.3g}", out, re.MULTILINE)
    assert "modular-addition-p7.html" in out
    assert "training" in err  # the progress bar
    assert "directional losses" in err


def test_a_second_run_reuses_what_is_there_and_another_setting_is_computed_anew(tiny, tmp_path, capsys):
    for _ in range(2):
        assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    first = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*/*.safetensors")}
    assert cli.main(["demo", "--quick", "--out", str(tmp_path), "--samples", "6"]) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*/*.safetensors")} == first
    assert load(tmp_path / "modular-addition-p7.npz").arrays["losses"].shape[1] == 6
    assert cli.main(["demo", "--quick", "--out", str(tmp_path), "--seed", "5"]) == 0
    assert len(list(tmp_path.glob("modular-addition-p7-seed*"))) == 2


@pytest.mark.slow
def test_interrupted_and_resumed_gives_the_numbers_of_an_uninterrupted_run(tiny, tmp_path, monkeypatch, capsys):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "whole")]) == 0
    real, calls = directional.directional_losses, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(directional, "directional_losses", interrupted)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "cut")]) == 130
    assert "interrupted; " in capsys.readouterr().out
    assert not (tmp_path / "cut" / "modular-addition-p7.html").exists()
    monkeypatch.setattr(directional, "directional_losses", real)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "cut")]) == 0
    for name in ("modular-addition-p7.npz", "modular-addition-p7.html"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


@pytest.mark.slow
def test_interrupted_in_the_curvature_and_resumed_gives_the_same_numbers(tiny, tmp_path, monkeypatch, capsys):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "whole")]) == 0
    real, calls = curvature.sam_sharpness, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(curvature, "sam_sharpness", interrupted)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "cut")]) == 130
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "cut")]) == 0
    steps = len(load(tmp_path / "whole" / "modular-addition-p7.npz").arrays["step"])
    assert len(calls) == steps + 1  # the two that were done are not done again
    for name in ("modular-addition-p7.npz", "modular-addition-p7.html"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "cut"), "--samples", "6"]) == 0
    assert len(calls) == steps + 1  # curvature does not depend on the directions


@pytest.mark.slow
def test_the_curvature_of_a_checkpoint_is_that_of_the_pure_functions(tiny, tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    rows = load(tmp_path / "modular-addition-p7.npz").meta["table"]
    loss = modular.FAMILY.loss(modular.network(TINY.config), TINY.config, "train")
    for row in rows[:: len(rows) - 1]:
        theta = loss.layout.ravel(modular.checkpoint(TINY.config, tmp_path / TINY.config.name, row["step"]).params)
        values = torch.linalg.eigvalsh(dense(hessian(loss, theta), theta))
        found, residual = row["hessian_max_eigenvalue"], row["hessian_max_eigenvalue_residual"]
        assert abs(found - float(values[-1])) <= residual + 1e-4 * found
        assert abs(row["hessian_trace"] - float(values.sum())) < 5 * row["hessian_trace_stderr"]
        wanted = curvature.sam_sharpness(loss, theta, epsilon=0.01)
        assert row["sam_relative"] == pytest.approx(wanted.relative)
        assert row["sam_relative_stderr"] == pytest.approx(wanted.relative_stderr)


def test_ctrl_c_in_a_real_process_keeps_checkpoints_that_the_next_run_picks_up(tmp_path):
    code = f"""
        import signal, sys, time
        from pathlib import Path
        from funcscope import cli
        from funcscope.core import store

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it with the signal ignored
        write = store.write
        def held(path, data):
            write(path, data)
            if len(list(path.parent.glob("step_*.safetensors"))) == 3:
                Path({str(tmp_path / "third")!r}).touch()
                time.sleep(600)  # until the signal
        store.write = held
        sys.exit(cli.main(["demo", "--quick", "--out", {str(tmp_path)!r}]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while not (tmp_path / "third").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    kept = sorted(tmp_path.rglob("step_*.safetensors"))
    assert process.returncode == 130
    assert re.search(rf"interrupted; {len(kept)} checkpoints are kept", out)
    assert len(kept) >= 3
    assert not list(tmp_path.rglob("*.tmp"))
    last = load(kept[-1]).meta["step"]
    run = modular.train(modular.QUICK, kept[0].parent.parent, modular.schedule(modular.QUICK))
    assert [point.step for _, point in zip(range(last // 10 + 1), run, strict=False)][-1] == last


@pytest.mark.slow
def test_landscapes_of_other_weights_are_not_reused(tiny, tmp_path, capsys):
    """A checkpoint that was made again, elsewhere or otherwise, makes its landscape again."""
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    first = load(tmp_path / "modular-addition-p7.npz").arrays["losses"]
    run = tmp_path / TINY.config.name
    step = modular.path(run, 100)
    arrays, meta, _ = load(step)
    save(step, {name: value * 1.01 for name, value in arrays.items()}, meta)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    again = load(tmp_path / "modular-addition-p7.npz").arrays["losses"]
    assert np.array_equal(first[:-1], again[:-1])
    assert not np.array_equal(first[-1], again[-1])


def fails(args, capsys, message):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--samples", "0"], "`samples` must be an integer of at least 1, got 0"),
        (["--span", "0"], "`--span` must be a finite number above 0, got 0.0"),
        (["--span", "-1"], "`--span` must be a finite number above 0, got -1.0"),
        (["--span", "nan"], "`--span` must be a finite number above 0, got nan"),
    ],
)
def test_bad_numbers_get_one_clear_line_and_leave_nothing(tiny, tmp_path, capsys, args, message):
    fails(["demo", "--quick", "--out", str(tmp_path / "out"), *args], capsys, message)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_gets_one_clear_line(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        fails(["demo", "--quick", "--out", str(bad)], capsys, r"cannot write to .*: choose another folder with --out")


def test_a_damaged_checkpoint_gets_one_clear_line(tiny, tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    victim = next(tmp_path.rglob("step_00100.safetensors"))
    victim.write_bytes(victim.read_bytes()[:100])
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert re.search(r"funcscope: .*step_00100.safetensors is damaged.*delete it", err.splitlines()[-1])
    victim.unlink()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0


def test_without_plotly_the_command_says_so_before_any_work(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.shared.importlib.util, "find_spec", lambda name: None)
    fails(["demo", "--out", str(tmp_path / "out")], capsys, r"plotly.*pip install 'funcscope\[view\]'")


def test_usage(capsys):
    for args in ([], ["unknown"], ["demo", "--samples", "many"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(args)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0


def test_the_table_says_undefined_where_a_number_is():
    row = dict.fromkeys(("train_loss", "test_loss", "train_accuracy", "test_accuracy"), 0.5) | {"step": 0}
    for name in ("landscape_roughness", "curvature_mean", "dir_grad_delta_corr"):
        row |= {name: None, f"{name}_stderr": None}
    assert demo.table({"table": [row]})[1][0][-3:] == ["undefined"] * 3
    one_sample = row | {"curvature_mean": 0.5}
    assert demo.table({"table": [one_sample]})[1][0][-2] == "0.500 ± undefined"  # never a bare number


def test_the_sampled_numbers_are_those_of_the_pure_function(tiny, tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    arrays, meta, _ = load(tmp_path / "modular-addition-p7.npz")
    loss = modular.FAMILY.loss(modular.network(TINY.config), TINY.config, "train")
    params = modular.checkpoint(TINY.config, tmp_path / TINY.config.name, 100).params
    result = directional.directional_losses(
        loss,
        params,
        key=directional.key(42),
        n_samples=4,
        span=0.1,
        two_sided=True,
        compute_gradient=True,
        compute_curvature=True,
    )
    np.testing.assert_allclose(arrays["curvatures"][-1], result.curvatures)
    assert meta["table"][-1]["curvature_mean"] == pytest.approx(float(result.estimates["curvature_mean"].value))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A tiny trained variant under `run`, and the current folder."""
    monkeypatch.chdir(tmp_path)
    tiny = modular.Config(p=5, d_model=8, num_heads=2, d_mlp=12, steps=20, train_fraction=0.6)
    monkeypatch.setitem(modular.FAMILY.variants, "tiny", Setup(tiny, (0, 10, 20)))
    assert cli.main(["train", "modular_addition", "tiny", "--out", "run", "--quiet"]) == 0
    capsys.readouterr()
    return Runs(Path("run")).variant("tiny")


FEW = ["analyze", "run", "--analyzer", "landscape_flatness", "--quiet", "--set", "n_directions=3"]


def test_settings_are_read_as_what_they_are(run, capsys):
    assert cli.main([*FEW, "--set", "relative=yes", "--set", "epsilon=0.2"]) == 0
    settings = run.settings("landscape_flatness")["settings"]
    assert settings["relative"] is True
    assert settings["epsilon"] == 0.2
    assert settings["n_directions"] == 3
    few = [
        "analyze",
        "run",
        "--analyzer",
        "flatness_profile",
        "--set",
        "epsilons=0.1,0.2",
        "--set",
        "n_directions=2",
        "--quiet",
    ]
    assert cli.main([*few, "--set", "products=3"]) == 0
    assert run.load("flatness_profile", 20)["epsilon"].tolist() == [0.1, 0.2]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--set", "relative=perhaps"], "`relative` must be true or false, got 'perhaps'"),
        (["--set", "n_directions=many"], "`n_directions` must be of the kind of 50, got 'many'"),
        (["--set", "epsilon"], "`--set` takes name=value, got 'epsilon'"),
        (["--set", "size=1"], "landscape_flatness has no setting 'size': it has n_directions"),
        (["--variant", "p113"], "no variant 'p113' in this run: it has modular-addition-p5"),
        (["--steps", "7"], "no checkpoint at step 7: there are 0, 10, 20"),
        (["--import", "no_such_module"], "No module named 'no_such_module'"),
        (["--analyzer", "loss_plane"], "`--set` is for one analyzer"),
    ],
)
def test_bad_arguments_of_analyze_get_one_clear_line(run, capsys, args, message):
    fails([*FEW, *args], capsys, message)


def test_one_bad_checkpoint_is_told_at_the_end_and_exits_with_2(run, capsys):
    path = modular.path(run.path, 10)
    path.write_bytes(path.read_bytes()[:300])
    assert cli.main(FEW) == 2
    out, err = capsys.readouterr()
    assert "2 of 3" in out
    assert re.search(r"funcscope: tiny: landscape_flatness: 1 of 3 checkpoints could not be analysed \(step 10", err)


def test_a_setting_that_is_used_at_one_step_counts_one(run, capsys):
    assert cli.main(FEW) == 0
    assert cli.main([*FEW, "--set", "epsilon=2", "--steps", "20"]) == 0
    assert "1 of 3" in capsys.readouterr().out.split("next")[1]


def test_the_table_times_only_what_cost_as_much(run, capsys):
    times = run.folder("landscape_flatness") / "times.jsonl"
    times.parent.mkdir(parents=True)
    old = {"step": 10, "seconds": 5000.0, "forwards": 102, "forward_seconds": 0.1}
    times.write_text(json.dumps(old) + "\n")
    assert cli.main(FEW) == 0
    assert "5000" not in capsys.readouterr().out


@pytest.mark.slow
def test_modules_of_the_current_folder_are_found(run, capsys):
    Path("mine.py").write_text(
        "from funcscope.study.analyzer import Analyzer\nfrom funcscope.study.analyzers import register\n"
        "register(Analyzer('mine', lambda subject: {'x': 1.0}, needs_loss=False))\n"
    )
    code = "import sys; from funcscope.cli import main; sys.path.remove(''); sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "analyze", str(run.path), "--import", "mine", "--analyzer", "mine", "--quiet"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert run.steps("mine") == (0, 10, 20)


@pytest.mark.slow
def test_demo_and_train_share_a_folder(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(modular.FAMILY.variants, "p7", Setup(TINY.config, (0, 100)))
    assert cli.main(["train", "modular_addition", "p7", "--out", str(tmp_path), "--quiet"]) == 0
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    assert Runs(tmp_path).variant("p7").head["variant"] == "p7"
