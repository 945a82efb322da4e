"""The command line as a user meets it."""

import argparse
import html
import json
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from folders import folder, texts

import funcscope as fs
from funcscope import cli
from funcscope.cli.commands import COMMANDS
from funcscope.cli.options import Flag, changed, with_flags
from funcscope.core.store import load, save
from funcscope.families import modular
from funcscope.families.family import Setup, family
from funcscope.study import demo
from funcscope.study.catalogue import CATALOGUE
from funcscope.study.results import Results
from funcscope.study.training import trained

TINY = demo.Settings(
    modular.Config(p=7, d_model=8, num_heads=2, d_mlp=16, steps=100, train_fraction=0.6),
    num_checkpoints=6, n_samples=4, plane_points=4,
)  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(demo, "QUICK", TINY)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained variant of three checkpoints."""
    out = tmp_path_factory.mktemp("run")
    trained(modular.FAMILY, Setup(TINY.config, (0, 50, 100)), out, name="p7", quiet=True)
    return out


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of one shape, and texts."""
    root = tmp_path_factory.mktemp("models")
    return [str(folder(root / name, scale=scale)) for name, scale in (("a", 1.0), ("b", 1.1))], texts(root / "t.jsonl")


FEW = "--num-samples 4 --max-seq-length 8 --quiet"
SMALL = {
    "directional": "--samples 3", "compare": "--samples 3", "path": "--points 3",
    "landscape": "--points 3 --lines 2 --directions 2",
    "curvature": "--num 1 --probes 2 --steps 4 --trace-products 4 --block-products 2",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: one.name)
def test_every_command_measures_its_list_and_writes_a_page(command, models, tmp_path, capsys):
    paths, data = models
    given = paths if command.models != "MODEL" else paths[:1]
    call = [command.name, *given, "--data", data, "--out", str(tmp_path), *SMALL[command.name].split(), *FEW.split()]
    status = cli.main(call)
    shown = capsys.readouterr().out
    results = Results.open(tmp_path)
    assert {o.metric for o in results.outcomes} == set(command.preset)
    assert [o.error for o in results.outcomes if not o.ok and o.error_type != "builtins.ValueError"] in ([], [""])
    assert status == (1 if results.failed else 0)
    assert all(f"{o.metric} of {o.subject}" in shown for o in results.outcomes if o.ok)
    assert "<html" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: one.name)
def test_every_option_is_a_setting_and_has_its_default(command):
    parser = argparse.ArgumentParser()
    cli.studies.add_command(parser.add_subparsers(), command)
    given = {"MODEL": ["m"], "A B": ["a", "b"], "MODEL...": ["m"]}[command.models]
    assert changed(parser.parse_args([command.name, *given]), command.flags) == ({}, {})
    for name, flag in command.flags.items():
        value = flag.default
        dashed = name.replace("_", "-")
        words = (
            [f"--no-{dashed}" if value else f"--{dashed}"] if isinstance(value, bool) else [f"--{dashed}", str(value)]
        )
        _, settings = changed(parser.parse_args([command.name, *given, *words]), command.flags)
        expected = (not value) if isinstance(value, bool) else value
        for target in flag.settings:
            metric, _, setting = target.partition(".")
            assert metric in command.preset or command.name == "compare"
            assert setting in {**CATALOGUE[metric].settings, **CATALOGUE[metric].plan}
            assert settings[metric][setting] == expected


def test_the_numbers_are_those_of_the_pure_function(models, tmp_path, capsys):
    (path, _), data = models
    call = [
        "directional",
        path,
        "--data",
        data,
        "--out",
        str(tmp_path),
        "--samples",
        "3",
        "--span",
        "0.05",
        *FEW.split(),
    ]
    assert cli.main([*call, "--seed", "7", "--normalize", "layer"]) == 0
    got = Results.open(tmp_path).models[path].metrics["directional_losses"].result
    subject = fs.Pretrained(
        path, fs.UnifiedConfig(dataset_name=data, num_samples=4, batch_size=8).tasks(), length=8
    ).open()
    loss = subject.loss("data")
    direct = fs.directional_losses(
        loss, loss.net.params, key=fs.key(7), n_samples=3, span=0.05, normalize="layer",
        two_sided=True, compute_gradient=True, compute_curvature=True,
    )  # fmt: skip
    assert got == direct


@pytest.mark.slow
def test_the_demo_prints_a_table_and_writes_its_story(tiny, tmp_path, capsys):
    call = ["demo", "--quick", "--out", str(tmp_path / "new" / "folder")]
    assert cli.main(call) == 0
    out, err = capsys.readouterr()
    results = Results.open(tmp_path / "new" / "folder")
    assert not results.failed
    (run,) = results.groups.values()
    for model in run:
        losses = model.metrics["directional_losses"]
        assert re.search(rf"^\s*{model.step} ", out, re.MULTILINE)
        assert len(losses["losses"]) == 4
    assert "<html" in (tmp_path / "new" / "folder" / "modular-addition-p7.html").read_text()
    assert "training" in err  # the progress bar
    assert all(o.reused for o in demo.run(TINY, tmp_path / "new" / "folder", quiet=True).outcomes)
    other = demo.run(demo.adjusted(TINY, n_samples=5), tmp_path / "new" / "folder", quiet=True)
    anew = {o.metric for o in other.outcomes if not o.reused}
    assert anew == {"directional_losses", "landscape_flatness", "flatness_profile", "directional_comparison"}


def test_a_checkpoint_that_changed_is_measured_anew_and_only_that(run, tmp_path, capsys):
    call = ["analyze", str(run), "--out", str(tmp_path), "--metrics", "mean_loss", "linear_path", "--quiet"]
    assert cli.main(call) == 0
    first = {o.subject: o.result for o in Results.open(tmp_path).outcomes if o.metric == "mean_loss"}
    (step,) = run.rglob("step_00050.safetensors")
    arrays, meta, _ = load(step)
    save(step, {name: value * 1.01 for name, value in arrays.items()}, meta)
    try:
        assert cli.main(call) == 0
    finally:
        save(step, arrays, meta)
    again = {o.subject: o.result for o in Results.open(tmp_path).outcomes if o.metric == "mean_loss"}
    assert [name for name in first if first[name] != again[name]] == [name for name in first if name.endswith("@50")]


def test_a_run_is_analysed_in_parts_and_its_list_grows(run, tmp_path, capsys):
    call = ["analyze", str(run), "--out", str(tmp_path), "--quiet"]
    assert cli.main([*call, "--metrics", "mean_loss", "--at-steps", "0", "100", "--split", "test"]) == 0
    assert cli.main([*call, "--metrics", "effective_dimensionality", "--variant", "p7"]) == 0
    results = Results.open(tmp_path)
    steps = {m: [o.step for o in results.outcomes if o.metric == m] for m in ("mean_loss", "effective_dimensionality")}
    assert steps == {"mean_loss": [0, 100], "effective_dimensionality": [0, 50, 100]}
    (tests,) = {o.task for o in results.outcomes if o.metric == "mean_loss"}
    assert tests == "test"
    config = TINY.config
    kind = family("modular_addition")
    net = kind.network(config)
    (path,) = run.glob("*/checkpoints")
    params = kind.checkpoint(config, path.parent, 100).params
    expected = float(kind.loss(net, config, "test")(params))
    assert results.outcomes[1].result.loss.value.item() == pytest.approx(expected, rel=1e-6)


def test_a_metric_of_a_module_of_the_current_folder(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import funcscope as fs\n\nclass Size(fs.Result):\n    size: float = fs.quantity('size')\n\n"
        "def size(theta, *, power=2.0):\n    return Size(float(theta.norm(p=power)))\n\n"
        "fs.register(fs.Metric('size_of_mine', size, ('theta',), {'power': 2.0}))\n"
    )
    call = [
        "analyze",
        str(run),
        "--import",
        "mine",
        "--metrics",
        "size_of_mine",
        "--set",
        "size_of_mine.power=1",
        "--quiet",
    ]
    try:
        assert cli.main([*call, "--out", "out"]) == 0
        outcomes = Results.open("out").outcomes
        assert [o.settings for o in outcomes] == [{"power": 1}] * 3
        assert all(o.result.size > 1 for o in outcomes)
        assert torch.is_tensor(torch.as_tensor(outcomes[0].result.size))
    finally:
        CATALOGUE.pop("size_of_mine", None)


def test_a_damaged_checkpoint_is_an_outcome_and_the_others_are_measured(tmp_path, capsys):
    trained(modular.FAMILY, Setup(TINY.config, (0, 50)), tmp_path, name="p7", quiet=True)
    victim = next(tmp_path.rglob("step_00050.safetensors"))
    victim.write_bytes(victim.read_bytes()[:100])
    assert cli.main(["analyze", str(tmp_path), "--metrics", "mean_loss", "--quiet"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"step_00050.safetensors is damaged", " ".join(shown.split()))
    results = Results.open(tmp_path)
    assert [(o.step, o.ok) for o in results.outcomes] == [(0, True), (50, False)]


@pytest.mark.slow
def test_ctrl_c_in_a_real_process_keeps_checkpoints_that_the_next_run_picks_up(tmp_path):
    code = f"""
        import signal, sys, time
        from pathlib import Path
        from funcscope import cli
        from funcscope.core import store

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs behind it with the signal ignored
        write = store.write
        def held(path, data, **options):
            write(path, data, **options)
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
    assert re.search(r"interrupted; what was made is kept", out)
    assert len(kept) >= 3
    assert not list(tmp_path.rglob("*.tmp"))
    last = load(kept[-1]).meta["step"]
    run = modular.train(modular.QUICK, kept[0].parent.parent, modular.schedule(modular.QUICK))
    assert [point.step for _, point in zip(range(last // 10 + 1), run, strict=False)][-1] == last


def fails(args, capsys, message):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--samples", "0"], "`--samples` must be an integer of at least 1, got 0"),
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


def test_a_damaged_checkpoint_gets_one_clear_line(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "RUN", {"training_curves": {}, "mean_loss": {}})
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["analyze", "RUN", "--metrics", "mean_los"], "no metric 'mean_los': did you mean 'mean_loss'"),
        (["analyze", "RUN", "--at-steps", "7"], "has no checkpoint at step 7: it has 0, 50, 100"),
        (["analyze", "RUN", "--variant", "p8"], "no variant 'p8'"),
        (["analyze", "RUN", "--set", "mean_loss"], "takes name=value or metric.setting=value"),
        (["analyze", "RUN", "--set", "sede=1"], "has a field 'sede'.*did you mean 'seed'"),
        (
            ["analyze", "RUN", "--metrics", "sam_sharpness", "--set", "sam_sharpness.epsilom=1"],
            "did you mean 'epsilon'",
        ),
        (["analyze", "RUN", "--set", "metrics=mean_loss"], "`--set metrics=mean_loss` does not choose.*--metrics NAME"),
        (["analyze", "MODEL", "--data", "TEXTS", "--field", "say"], "line 1: no field 'say'; it has 'text'"),
        (["analyze", "RUN", "MODEL"], "have different data: analyse them in two calls"),
        (["analyze", "MODEL"], "need texts: `--data FILE`"),
        (["compare", "MODEL", "MODEL", "--data", "x"], "given twice"),
        (
            ["directional", "/nowhere", "--data", "x"],
            "funcscope: a model is a local Hugging Face folder, and there is no",
        ),
        (["report", "/nowhere"], "holds no study"),
        (["cache", "/nowhere"], "no stored results"),
        (["dashboard", "/nowhere"], "holds no study"),
    ],
)
def test_bad_arguments_get_one_clear_line(run, models, capsys, args, message):
    places = {"RUN": str(run), "MODEL": models[0][0], "TEXTS": str(models[1])}
    assert cli.main([places.get(word, word) for word in args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert re.search(message, err)


def test_the_configuration_comes_from_file_then_options(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "study.json").write_text(
        json.dumps({"metrics": ["mean_loss"], "seed": 3, "output_dir": str(tmp_path / "o")})
    )
    monkeypatch.setenv("FUNCSCOPE_SPLIT", "test")
    monkeypatch.setenv("FUNCSCOPE_SEED", "1")
    call = ["analyze", str(run), "--config", str(tmp_path / "study.json"), "--out", str(tmp_path / "o"), "--quiet"]
    assert cli.main([*call, "--set", "timeout_seconds=60"]) == 0
    config = json.loads((tmp_path / "o" / "study.json").read_text())["config"]
    assert (config["split"], config["seed"], config["timeout_seconds"]) == ("test", 3, 60)


@pytest.mark.parametrize("setting", ["fisher_method=x", "fisher_n_samples=-1", "num_samples=-1", "split=x"])
def test_every_option_in_a_message_is_an_option_of_the_command(setting, models, tmp_path, capsys):
    paths, data = models
    for command in (["directional", paths[0]], ["analyze", paths[0], "--metrics", "mean_loss"]):
        assert cli.main([*command, "--data", data, "--out", str(tmp_path), "--set", setting]) == 2
        said = capsys.readouterr().err
        named = set(re.findall(r"--[a-z][a-z-]*", said.splitlines()[-1]))
        with pytest.raises(SystemExit):
            cli.main([command[0], "--help"])
        assert named, said
        assert named <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


def test_what_failed_names_options(models, tmp_path, capsys):
    path = folder(tmp_path / "masked", "bert")
    few = ["--packing", "--data", models[1], "--out", str(tmp_path / "out"), *FEW.split()]
    assert cli.main(["analyze", str(path), "--metrics", "mean_loss", *few]) == 1
    assert "`--packing` is for" in capsys.readouterr().out


def test_one_reason_of_several_metrics_is_said_once(models, tmp_path, capsys):
    path = folder(tmp_path / "broken", scale=float("nan"))
    names = ["sam_sharpness", "critical_sharpness", "mean_loss"]
    few = ["--data", models[1], "--out", str(tmp_path / "out"), *FEW.split()]
    assert cli.main(["analyze", str(path), "--metrics", *names, *few]) == 1
    out = capsys.readouterr().out
    assert out.count("more of the weights have") == 1
    assert "the same" in out


HEAD = "--metrics hessian_trace --set hessian_trace.head_chunk=4 --set hessian_trace.keep=false"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (HEAD, "`--set hessian_trace.head_chunk` needs `--set hessian_trace.keep=true`"),
        ("--metrics mean_loss --packing --task masked", "`--packing` is for.*pass `--no-packing`"),
    ],
)
def test_what_failed_has_no_words_of_python(models, tmp_path, capsys, args, words):
    few = [*args.split(), "--data", models[1], "--out", str(tmp_path / "out"), *FEW.split()]
    path = str(folder(tmp_path / "masked", "bert")) if "masked" in args else models[0][0]
    cli.main(["analyze", path, *few])
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(words, said), said
    assert not re.search(r"\w=(True|False)", said)


def test_values_of_python_are_said_as_they_are_typed():
    options = ["changes", "attention", "dataset_name", "trainable", "dtype", "curvature"]
    flags = {"curvature": Flag(["directional_losses.curvature"], "")}
    for text, wanted in (
        ("with `attention='keep'`", "with `--attention keep`"),
        ("`dtype=torch.float32` in `functional`", "`--dtype float32`"),
        ("`dataset_name={'a': 'a.jsonl', 'b': 'b.jsonl'}`", "`--data a=a.jsonl b=b.jsonl`"),
        ("`compute_all=True`", "`--set compute_all=true`"),
        ("`curvature='exact'`, `chunk=1`", "`--curvature exact`, `--set directional_losses.chunk=1`"),
        ("`theta.clone()`, `unknown=True`, theta", "`theta.clone()`, `unknown=True`, theta"),
    ):
        assert with_flags(text, options, flags, "directional_losses") == wanted
    assert (
        with_flags("`curvature=False`", ["changes"], {}, "hessian_trace") == "`curvature=False`"
    )  # not one of its own


def test_an_option_that_there_is_not_has_a_nearest_one(capsys):
    for args, words in (
        (["landscape", "m", "--max-memry-gb", "1"], "no option --max-memry-gb: did you mean --max-memory-gb"),
        (["merge", "a", "b", "--out", "c", "--metod=ties"], "no option --metod: did you mean --method"),
        (["demo", "--zzz"], "no option --zzz$"),
        (["path", "a", "b", "c"], "unrecognized arguments: c"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(args)
        assert stop.value.code == 2
        assert re.search(words, capsys.readouterr().err.strip().splitlines()[-1])


def test_variants_of_one_name_in_two_runs_are_told_apart(run, tmp_path, capsys):
    for name, factor in (("one", 1.0), ("two", 1.1)):
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("cache", "study.json"))
        for step in (tmp_path / name).rglob("step_00100.safetensors"):
            arrays, meta, _ = load(step)
            save(step, {key: factor * value for key, value in arrays.items()}, meta)
    call = [
        "analyze",
        str(tmp_path / "one"),
        str(tmp_path / "two"),
        "--out",
        str(tmp_path),
        "--metrics",
        "mean_loss",
        "--quiet",
    ]
    assert cli.main(call) == 0
    first, second = Results.open(tmp_path).groups.values()
    assert [model.step for model in first] == [model.step for model in second] == [0, 50, 100]
    assert first[0].metrics["mean_loss"].result == second[0].metrics["mean_loss"].result
    assert first[2].metrics["mean_loss"].result != second[2].metrics["mean_loss"].result


def test_a_length_that_somebody_chose_is_refused_and_the_usual_one_gives_way_and_says_so(models, tmp_path, capsys):
    paths, data = models
    call = ["analyze", paths[0], "--data", data, "--out", str(tmp_path / "out"), "--metrics", "mean_loss", "--quiet"]
    assert cli.main([*call, "--max-seq-length", "17"]) == 1
    assert "`--max-seq-length` is 17, and the GPT2LMHeadModel has 16 positions" in capsys.readouterr().out
    assert cli.main(["check", paths[0], "--data", data, "--max-seq-length", "17"]) == 2
    assert "has 16 positions: pass at most 16" in capsys.readouterr().err
    for length in ([], ["--max-seq-length", "16"]):  # with 16 asked for, nothing has given way
        assert cli.main([*call, *length]) == 0
        notes = Results.open(tmp_path / "out").models[paths[0]].metrics["mean_loss"].result.notes
        assert ("the model has 16 positions: texts end there, and not at 128 tokens" in str(notes)) is (not length)
    values = asdict(fs.UnifiedConfig(dataset_name=data, max_seq_length=17))
    assert fs.UnifiedConfig.of(values).tasks()["data"].max_seq_length == 17
    assert (
        pickle.loads(pickle.dumps(fs.UnifiedConfig.of(asdict(fs.UnifiedConfig())))).tasks()["data"].max_seq_length
        is None
    )


def test_a_study_that_grew_says_every_command_that_made_it(models, tmp_path, capsys, monkeypatch):
    (path, _), data = models
    call = ["funcscope", "analyze", path, "--data", data, "--out", str(tmp_path), *FEW.split(), "--metrics"]
    first, second, third = (
        [*call, "mean_loss"],
        [*call, "effective_dimensionality"],
        [*call, "mean_loss", "--seed", "5"],
    )
    for typed, known in (
        (first, [first]),
        (second, [first, second]),
        (second, [first, second]),
        (third, [second, third]),  # nothing is left of the first
    ):
        monkeypatch.setattr("sys.argv", typed)
        assert cli.main(typed[1:]) == 0
        assert cli.main(["report", str(tmp_path)]) == 0
        page = html.unescape((tmp_path / "report.html").read_text())
        assert [each["command"] for each in Results.open(tmp_path).studies] == [shlex.join(each) for each in known]
        assert [each for each in (first, second, third) if f"{shlex.join(each)}<" in page] == known


def test_two_architectures_have_no_path_and_are_called_by_their_names(models, tmp_path, capsys):
    (first, _), data = models
    other = str(folder(tmp_path / "llama", "llama"))
    assert cli.main(["path", first, other, "--data", data, "--out", str(tmp_path / "out"), *FEW.split()]) == 1
    said = Results.open(tmp_path / "out").models[f"{first} to {other}"].metrics["linear_path"]["error"]
    assert said.startswith(f"{first} is a net of other parameters than {other} (")
    assert said.endswith("of others, compare losses.")
