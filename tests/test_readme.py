"""The README's code runs, and its commands are those that CI runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import TEXTS, folder, texts
from problems import problem

import funcscope as fs
from funcscope import cli
from funcscope.families import modular
from funcscope.families.family import Setup
from funcscope.study.catalogue import CATALOGUE
from funcscope.study.results import Results

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PARTS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE))
GUIDE = PARTS["Extending"]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = PYTHON.findall(README.replace(GUIDE, ""))


@pytest.mark.slow
def test_the_commands_about_ones_own_model_run(tmp_path, monkeypatch, capsys):
    """With folders of those names, and then the code that shows the page in a notebook."""
    monkeypatch.chdir(tmp_path)
    for name in ("my-model", "base", "finetuned"):
        folder(tmp_path / name, scale=1.2 if name == "finetuned" else 1.0)
    texts(tmp_path / "texts.jsonl")
    few = {
        "directional": "--samples 3", "compare": "--samples 3", "path": "--points 3",
        "landscape": "--points 3 --lines 2 --directions 2",
        "curvature": "--num 1 --probes 2 --steps 4 --trace-products 4 --block-products 2",
    }  # fmt: skip
    commands = re.findall(r"^funcscope ((?:directional|curvature|landscape|path|compare) .*)$", README, re.MULTILINE)
    assert {command.split()[0] for command in commands} == set(few)
    for command in commands:
        small = f"{few[command.split()[0]]} --num-samples 6 --max-seq-length 8 --quiet"
        assert cli.main([*command.split(), *small.split()]) == 0, command
    assert "paired over 3" in capsys.readouterr().out
    (shown,) = [block for block in BLOCKS if "show(" in block]
    scope: dict = {}
    exec(shown.replace("\nshow(", "\npage = show("), scope)
    assert "<iframe" in scope["page"]._repr_html_()


@pytest.mark.slow
def test_the_code_about_two_tasks_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "my-model")
    texts(tmp_path / "prose.jsonl")
    texts(tmp_path / "code.jsonl", [" ".join(text.split()[::-1]) for text in TEXTS[1:]])
    (block,) = [block for block in BLOCKS if "cross_task_conflicts" in block]
    few = "num_samples=4, verbose=False, max_seq_length=8, compute_fisher_eigenvalues=False, settings=few, fisher_n_samples=4"
    short = block.replace("num_samples=64, fisher_n_samples=64", few)
    assert short != block
    spectrum = {"num": 1, "num_probes": 2, "steps": 4, "trace_matvecs": 4}
    scope = {"fs": fs, "few": {"fisher_information": spectrum}}
    exec(short, scope)
    made = scope["results"].models["./my-model on prose and code"].metrics
    assert set(made) == {"fisher_overlap", "cross_task_conflicts", "qkov_interference"}


@pytest.mark.slow
def test_the_commands_about_studies_run(tmp_path, monkeypatch, capsys):
    """On two checkpoints, and then the same from Python, with a metric of one's own."""
    monkeypatch.chdir(tmp_path)
    for step in (10, 20):
        folder(tmp_path / "runs" / f"checkpoint-{step}", scale=1 + step / 100)
    texts(tmp_path / "texts.jsonl")
    commands = re.findall(r"^funcscope (analyze .*--data .*)$", PARTS["Your own model"], re.MULTILINE)
    (command,) = (one for one in commands if "--executor" not in one)  # those of workers are in test_cluster.py
    paths = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("runs/*"))
    few = ["--set", "num_samples=4", "--set", "directional_losses.n_samples=3", "--quiet"]
    asked = [part for word in command.split() for part in (paths if "*" in word else [word])]
    assert cli.main(asked + few) == 0
    assert cli.main(["report"]) == 0
    assert cli.main(["metrics"]) == 0
    assert "sam_sharpness" in capsys.readouterr().out
    study, own = (
        next(block for block in found if "analyze_models" in block or "class Sparsity" in block)
        for found in (BLOCKS, PYTHON.findall(GUIDE))
    )
    scope = {"fs": fs, "paths": paths, "__name__": "readme"}
    study = study.replace("UnifiedConfig(", "UnifiedConfig(num_samples=2, loss_landscape_n_points=3, verbose=False, ")
    try:
        exec(own, scope)
        exec(study.replace("UnifiedConfig(", "UnifiedConfig(metrics=('sparsity',), "), scope)
        assert len(scope["results"].outcomes) == 4
        assert not scope["results"].failed
        (swept,) = (block for block in BLOCKS if "fs.sweep" in block)
        few = 'UnifiedConfig(num_samples=2, verbose=False, settings={"directional_losses": {"n_samples": 3}}, '
        exec(swept.replace("UnifiedConfig(", few), scope)
        assert set(scope["swept"]["num"]) == {3}
    finally:
        CATALOGUE.pop("sparsity", None)


@pytest.mark.slow
def test_the_commands_about_runs_run(tmp_path, monkeypatch, capsys):
    """With a smaller variant of that name."""
    monkeypatch.chdir(tmp_path)
    tiny = modular.Config(p=5, d_model=8, num_heads=2, d_mlp=12, steps=20, train_fraction=0.6)
    monkeypatch.setitem(modular.FAMILY.variants, "p37", Setup(tiny, (0, 10, 20)))
    served = []
    monkeypatch.setattr("funcscope.view.dashboard.serve", lambda folder, **options: served.append((folder, options)))
    commands = re.findall(r"^funcscope ((?:train|analyze|dashboard) .*)$", README, re.MULTILINE)
    commands = [command for command in commands if "--data" not in command]
    assert [command.split()[0] for command in commands] == ["dashboard", "train", "analyze", "dashboard"]
    few = "--metrics landscape_flatness linear_path --set landscape_flatness.n_directions=3 --quiet"
    for command in commands[1:]:
        more = {"train": ["--quiet"], "analyze": few.split(), "dashboard": []}[command.split()[0]]
        assert cli.main([*command.split(), *more]) == 0
    assert served[0][0] == Path("runs")
    assert served[0][1]["host"] == "127.0.0.1"
    results = Results.open("runs")
    flat = [outcome for outcome in results.outcomes if outcome.metric == "landscape_flatness"]
    assert [outcome.step for outcome in flat] == [0, 10, 20]
    assert all(outcome.settings["epsilon"] == 0.05 for outcome in flat)


OTHERS = ("show(", "analyze_models", "fs.sweep", "init_process_group")
"""Of blocks that other tests run."""


@pytest.mark.slow
def test_the_script_for_several_ranks_runs_by_torchrun(tmp_path):
    (block,) = [block for block in BLOCKS if "init_process_group" in block]
    (tmp_path / "ranks.py").write_text(block)
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 ranks.py"
    told = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, *command.split()], cwd=tmp_path, env={**os.environ, **told}, capture_output=True, text=True
        )
        if "terminate called without an active exception" not in done.stderr:
            break  # else gloo's own threads, once in some fifty ends of a rank on a busy machine, when all is done
    assert done.returncode == 0, done.stderr
    first, second = re.findall(r"^1 {2,}([0-9.e+-]+)", done.stdout, re.MULTILINE)
    assert float(first) == pytest.approx(float(second), rel=1e-4)


@pytest.mark.slow
def test_the_code_runs_from_top_to_bottom(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # it saves a result
    blocks = [block for block in BLOCKS if not any(part in block for part in OTHERS)]
    assert len(blocks) >= 2
    model, batches, _ = problem("gpt2")
    scope = {"model": model.float(), "batches": batches}
    small = {
        "n_samples=50": "n_samples=3", "grid(25": "grid(3", "25, 25": "3, 3", "num=25": "num=3", "steps=20": "steps=2",
        "n_directions=20": "n_directions=3",
    }  # fmt: skip
    for block in blocks:
        for large, few in small.items():
            block = block.replace(large, few)
        exec(block, scope)
    assert scope["surface"].grid_losses.shape == (3, 3)
    assert scope["path"].barrier_linear.value >= 0
    assert "gradient" in capsys.readouterr().out or "loss_mean" in str(scope["result"])
    assert scope["plane"].shape == (3, 3)


def test_its_parts_are_in_the_order_in_which_one_needs_them():
    assert list(PARTS) == ["Start", "Your own model", "Your own code", "Metrics", "Extending", "Scale"]


ENDS = {"first": 1.0, "second": 1.5}
"""Two models of the same directions, by their lengths."""


@pytest.mark.slow
def test_the_guide_to_extending_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In its order, the first block as the module that its command imports, too; every metric in it is then measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    folder(tmp_path / "my-model")
    texts(tmp_path / "texts.jsonl")
    model, batches, _ = problem("gpt2")
    net = fs.functional(model.float())
    scope = {
        "fs": fs,
        "torch": torch,
        "net": net,
        "loss": fs.objective(net, batches, fs.causal_lm),
        "__name__": "guide",
    }
    known, blocks = set(CATALOGUE), PYTHON.findall(GUIDE)
    (tmp_path / "my_metrics.py").write_text(f"import funcscope as fs\n\n{blocks[0]}")
    (command,) = re.findall(r"^funcscope (.*)$", GUIDE, re.MULTILINE)
    try:
        with torch.random.fork_rng():  # the guide makes a layer of its own
            for block in blocks:
                exec(block.replace("UnifiedConfig(", "UnifiedConfig(verbose=False, "), scope)
        own = set(CATALOGUE) - known
        assert own == {"sparsity", "block_noise", "distance"}
        assert 0 <= scope["results"].models["mine"].metrics["sparsity"]["share"] <= 1
        plain = fs.eigenpairs(scope["H"], scope["line"].theta, key=fs.key(0), num=1)
        assert float(scope["damped"].values[0] - plain.values[0]) == pytest.approx(0.1, abs=1e-3)
        sources = [fs.InMemory({"data": scope["loss"]}, name, theta=net.theta * scale) for name, scale in ENDS.items()]
        made = fs.analyze_models(sources, fs.UnifiedConfig(metrics=tuple(own), verbose=False))
        assert not made.failed
        (length,) = (outcome.result.length for outcome in made.outcomes if outcome.metric == "distance")
        assert length == pytest.approx(0.5)
        CATALOGUE.pop("sparsity")
        assert cli.main([*command.split(), "--num-samples", "4", "--max-seq-length", "8", "--quiet"]) == 0
        assert "weights below the threshold" in (tmp_path / "analysis_results" / "report.html").read_text()
    finally:
        for name in set(CATALOGUE) - known:
            CATALOGUE.pop(name)


@pytest.mark.parametrize("end", ["funcscope demo", "-m pytest"])
def test_two_commands_do_all_the_set_up(end):
    lines = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(lines) == 2
    assert sum(line.endswith(end) for line in lines) == 1
    assert all("torch==2.13.0" in line for line in lines)


def test_ci_takes_the_test_command_from_the_readme():
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
