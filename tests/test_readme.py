"""The README's code runs, and its commands are those that CI runs."""

import re
from pathlib import Path

import pytest
from folders import folder, texts
from problems import problem

from funcscope import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_commands_about_ones_own_model_run(tmp_path, monkeypatch, capsys):
    """With folders of those names, and then the code that shows the page in a notebook."""
    monkeypatch.chdir(tmp_path)
    for name in ("my-model", "base", "finetuned"):
        folder(tmp_path / name, scale=1.2 if name == "finetuned" else 1.0)
    texts(tmp_path / "texts.jsonl")
    commands = re.findall(r"^funcscope (directional .*)$", README, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert cli.main([*command.split(), "--samples", "3", "--max-seq-length", "8", "--quiet"]) == 0
    assert "paired over 3" in capsys.readouterr().out
    (command,) = re.findall(r"^funcscope (curvature .*)$", README, re.MULTILINE)
    few = "--num 2 --steps 4 --trace-products 4 --no-blocks --max-seq-length 8 --quiet"
    assert cli.main([*command.split(), *few.split()]) == 0
    assert "trace" in capsys.readouterr().out
    (shown,) = [block for block in BLOCKS if "show(" in block]
    scope: dict = {}
    exec(shown.replace("\nshow(", "\npage = show("), scope)
    assert "<iframe" in scope["page"]._repr_html_()


def test_the_code_runs_from_top_to_bottom(capsys):
    blocks = [block for block in BLOCKS if "show(" not in block]
    assert len(blocks) >= 2
    model, batches, _ = problem("gpt2")
    scope = {"model": model.float(), "batches": batches}
    for block in blocks:
        exec(block.replace("n_samples=50", "n_samples=3").replace("grid(25", "grid(3").replace("25, 25", "3, 3"), scope)
    assert "gradient" in capsys.readouterr().out or "loss_mean" in str(scope["result"])
    assert scope["plane"].shape == (3, 3)


@pytest.mark.parametrize("end", ["funcscope demo", "-m pytest"])
def test_two_commands_do_all_the_set_up(end):
    lines = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(lines) == 2
    assert sum(line.endswith(end) for line in lines) == 1
    assert all("torch==2.13.0" in line for line in lines)


def test_ci_takes_the_test_command_from_the_readme():
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
