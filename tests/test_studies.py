"""The commands of studies, as a new user types them."""

import json
import re

import pytest
from folders import folder, texts

import funcscope as fs
from funcscope import cli
from funcscope.study.catalogue import CATALOGUE


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two models, measured by the command."""
    root = tmp_path_factory.mktemp("study")
    models = [str(folder(root / f"checkpoint-{step}", scale=1 + step / 100)) for step in (10, 20)]
    data, out = texts(root / "texts.jsonl"), root / "out"
    few = ["--set", "num_samples=4", "--set", "loss_landscape_n_points=3", "--set", "directional_losses.n_samples=3"]
    few += ["--metrics", "mean_loss", "directional_losses", "loss_landscape_2d", "effective_dimensionality"]
    return ["analyze", *models, "--data", data, "--out", str(out), "--quiet", *few], out, models


@pytest.fixture(scope="module")
def made(study):
    command, out, _ = study
    assert cli.main(command) == 0
    return out


@pytest.mark.slow
def test_a_study_prints_its_outcomes_and_writes_a_page(study, made, capsys):
    command, out, models = study
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert shown.count("reused") == 8
    assert all(model in shown for model in models)
    page = (out / "report.html").read_text()
    for title in ("Mean loss", "Directional losses", "Loss landscape 2D", "Effective dimensionality"):
        assert f"{title}</h2>" in page
    assert page.count("<figure>") >= 8
    assert "http" not in page.split("</script>")[-1].replace("https://doi", "")


def test_the_page_is_made_again_without_models(made, capsys):
    (made / "report.html").unlink()
    assert cli.main(["report", str(made), "--metrics", "mean_loss", "--title", "a < b"]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (made / "report.html").read_text()
    assert "<h1>a &lt; b</h1>" in page
    assert "Directional losses" not in page


def test_the_catalogue_is_listed(capsys):
    assert cli.main(["metrics"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in CATALOGUE)


def test_a_configuration_file_says_what_is_measured(study, tmp_path, capsys):
    command, _, models = study
    values = {"dataset_name": command[command.index("--data") + 1], "num_samples": 4, "metrics": ["mean_loss"]}
    (tmp_path / "study.json").write_text(json.dumps(values))
    asked = ["analyze", models[0], "--config", str(tmp_path / "study.json"), "--out", str(tmp_path / "out"), "--quiet"]
    assert cli.main(asked) == 0
    assert "mean_loss" in capsys.readouterr().out


def test_the_cache_is_counted_and_cleared(study, tmp_path, capsys):
    command, _, models = study
    out = str(tmp_path / "out")
    assert cli.main(["analyze", models[0], *command[3:5], "--out", out, "--quiet", "--metrics", "mean_loss"]) == 0
    assert cli.main(["cache", out]) == 0
    assert "1 result, " in capsys.readouterr().out
    assert cli.main(["cache", out, "--clear"]) == 0
    assert "1 result removed" in capsys.readouterr().out
    assert cli.main(["cache", out]) == 2
    assert "no stored results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--set", "seeed=3"], "did you mean 'seed'"),
        (["--set", "seed"], "name=value"),
        (["--set", "mean_los.x=1"], "did you mean 'mean_loss'"),
        (["--set", "directional_losses.spam=1"], "did you mean 'span'"),
        (["--metrics", "mean_los"], "did you mean 'mean_loss'"),
        (["--data", "nowhere.txt"], "there is no file 'nowhere.txt'"),
    ],
)
def test_what_does_not_fit_is_a_line_on_stderr(study, tmp_path, change, said, capsys):
    command, _, models = study
    asked = ["analyze", models[0], "--data", command[4], "--out", str(tmp_path), "--quiet", "--metrics", "mean_loss"]
    assert cli.main([*asked, *change]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_several_paths_without_texts_are_refused(study, capsys):
    assert cli.main(["analyze", *study[2]]) == 2
    assert "--data FILE" in capsys.readouterr().err


def test_what_hangs_on_the_batches_is_measured_anew_for_others(study, tmp_path):
    command, _, models = study
    data = command[command.index("--data") + 1]

    def sharpness(batch_size, out):
        few = {"num_samples": 8, "max_seq_length": 8, "batch_size": batch_size, "verbose": False}
        config = fs.UnifiedConfig(
            dataset_name=data, output_dir=str(tmp_path / out), metrics=("m_sharpness",),
            settings={"m_sharpness": {"m": 3}}, **few,
        )  # fmt: skip
        return fs.analyze_models(models[:1], config).models[models[0]].metrics["m_sharpness"].result

    whole = sharpness(8, "a")
    assert (whole.num_left_out, sharpness(4, "a").num_left_out) == (2, 2)
    assert sharpness(4, "a") == sharpness(4, "b") != whole == sharpness(8, "a")


@pytest.mark.slow
def test_one_of_a_thing_is_called_by_its_singular(study, tmp_path, capsys):
    command, _, models = study
    metrics = ["mean_loss", "hessian_largest_eigenvalues", "hessian_eigenvalues", "directional_losses", "loss_lines"]
    one = ["num_samples=1", "directional_losses.n_samples=2", "loss_lines.num_directions=1", "loss_lines.num=3"]
    one += ["hessian_eigenvalues.num_probes=2", "hessian_eigenvalues.steps=2", "hessian_eigenvalues.trace_matvecs=4"]
    changes = [word for change in one for word in ("--set", change)]
    asked = ["analyze", models[0], *command[3:5], "--out", str(tmp_path), "--quiet", "--metrics", *metrics, *changes]
    assert cli.main(asked) == 0
    results = [o.result for o in fs.Results.open(tmp_path).outcomes]
    said = " ".join(text for each in results for text in (each.head, *each.notes))
    assert re.findall(r"(?<![\d.,])1 [a-z]+(?:s|ces)\b", said) == [], said
    assert {"1 sequence ", "1 batch:", "1 eigenvalue ", "1 line "} <= set(re.findall(r"\b1 \w+[ :]", said))
    page = (tmp_path / "report.html").read_text()
    assert "on the same data" in page
    assert "data data" not in page
