"""The README's code runs, and its commands are those that CI runs."""

import re
from pathlib import Path

import pytest
from problems import problem

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_code_runs_from_top_to_bottom(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
