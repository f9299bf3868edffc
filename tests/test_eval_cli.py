import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny, use_devices

from slm.config import Experiment, ModelConfig, override
from slm.data.pipeline import open_data
from slm.data.synthetic import synthetic_tokenizer
from slm.data.tokenizers import build_tokenizer
from slm.evaluation.bits_per_byte import evaluate
from slm.evaluation.cli import evaluate_command
from slm.evaluation.generate import generate
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer
from slm.training.loop import train
from slm.training.run import load


def random_model(tokenizer, folder, changes):
    cfg = ModelConfig(vocab_size=tokenizer.vocab_size, layers=1, width=16, heads=2)
    shapes = jax.eval_shape(Transformer(cfg).init, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.5, a.shape), jnp.float32), shapes)
    changes = {"data.sequence_length": 32, "data.cache": str(folder / "cache"), **changes}
    return LanguageModel(params, override(Experiment(model=cfg), changes), tokenizer)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"document number {i}. " * (i + 1))
    return folder


@pytest.fixture(scope="module")
def model(texts, tmp_path_factory):
    changes = {"data.source": (str(texts),), "data.validation_fraction": 0.5}
    return random_model(build_tokenizer("bytes", lambda: iter(())), tmp_path_factory.mktemp("bytes"), changes)


@pytest.fixture
def command(model, monkeypatch, capsys):
    """arguments -> (exit code, stdout, stderr) of `eval.py RUN ARGUMENTS`, where RUN holds `model`."""
    monkeypatch.setattr("slm.training.compilation.enable_compilation_cache", lambda folder: None)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments, model=model):
        monkeypatch.setattr("slm.training.run.load", lambda folder, checkpoint: model)
        trained_on = open_data(model.config.data, model.config.seed, model.tokenizer).fingerprint
        monkeypatch.setattr("slm.training.run.data_fingerprint", lambda folder, cfg: trained_on)
        code = evaluate_command(["runs/some", *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_held_out_text_is_scored(command, model, texts, tmp_path):
    code, out, _ = command("--json", tmp_path / "scores.json", "--by-position")
    assert code == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert f"bits per byte       │ {scores['bits_per_byte']:.4f} ± {scores['bits_per_byte_stderr']:.4f}" in out
    assert "tokens of context" in out
    assert scores["run"] == "runs/some"
    assert scores["source"] == f"held out from {texts}"
    assert 0 < scores["documents"] < 12
    assert sum(scores["tokens_by_position"]) == scores["tokens"] == scores["bytes"]
    assert "samples" not in scores


def test_a_trained_run_by_checkpoint_until_its_data_changes(tmp_path, monkeypatch, capsys):
    use_devices(monkeypatch, 1)
    monkeypatch.setattr("slm.training.compilation.enable_compilation_cache", lambda folder: None)
    cfg = tiny(tmp_path, {"data.tokenizer": "bpe:300", "checkpoint.keep": 2})
    run = train(cfg)
    steps = {row["step"]: row["validation_loss"] for row in run.history if row["step"] in (4, 8)}
    best = min(steps, key=steps.get)
    for which, step in {"4": 4, "latest": 8, "best": best}.items():
        assert evaluate_command([str(run.dir), "--checkpoint", which, "--json", str(tmp_path / "scores.json")]) == 0
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert scores["checkpoint"] == which
        params = load(run.dir, step).params
        assert jax.tree.all(jax.tree.map(np.array_equal, load(run.dir, which).params, params))
    assert evaluate_command([str(run.dir), "--sequence-length", "8"]) == 0
    capsys.readouterr()
    assert evaluate_command([str(run.dir), "--checkpoint", "5"]) == 2
    assert "no checkpoint of step 5" in capsys.readouterr().err

    text = tmp_path / "text.txt"
    text.write_text("One more line.\n" + text.read_text())
    assert evaluate_command([str(run.dir)]) == 2
    assert "has changed since training" in capsys.readouterr().err
    assert evaluate_command([str(run.dir), "--source", str(text)]) == 0


def test_a_disk_error_is_one_line(command, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "some/file")

    monkeypatch.setattr("slm.evaluation.cli.score", denied)
    code, _, err = command()
    assert (code, err) == (2, "error: Permission denied: some/file\n")


def test_a_source_is_scored(command, model, texts, tmp_path):
    code, out, _ = command("--source", texts / "7.txt", "--json", tmp_path / "scores.json", "--sequence-length", 16)
    assert code == 0
    got = json.loads((tmp_path / "scores.json").read_text())
    want = evaluate(model, (texts / "7.txt").read_text(), sequence_length=16)
    assert got["bits_per_byte"] == pytest.approx(want["bits_per_byte"], rel=1e-6)
    assert "perplexity" in out


def test_prompts_are_continued_and_nothing_is_scored(command, model, tmp_path):
    settings = ["--max-new-tokens", 5, "--temperature", 0.7, "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01]
    code, out, _ = command(
        "--prompt", "[b]", "", "--samples", 2, "--seed", 4, *settings, "--json", tmp_path / "samples.json"
    )
    assert code == 0
    report = json.loads((tmp_path / "samples.json").read_text())
    assert "bits_per_byte" not in report
    assert [(s["prompt"], s["seed"]) for s in report["samples"]] == [("[b]", 4), ("[b]", 5), ("", 6), ("", 7)]
    sampling = {"max_new_tokens": 5, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01}
    assert [s["text"] for s in report["samples"]] == generate(model, ["[b]"] * 2 + [""] * 2, seed=4, **sampling)
    assert "[b]" in out  # not taken for markup


def test_a_synthetic_task_is_scored_by_accuracy(command, tmp_path):
    changes = {"data.source": ("synthetic:copy",)}
    synthetic = random_model(synthetic_tokenizer(), tmp_path, changes)
    code, out, _ = command("--batch-size", 128, model=synthetic)
    assert code == 0
    assert "accuracy" in out
    assert "bits per byte" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "cpythn"], "did you mean cpython"),
        (["--source", "no/such/file.txt"], "no source 'no/such/file.txt'"),
        (["--prompt", "a", "--temperature", "-1"], "temperature = -1"),
        (["--prompt", "a", "--samples", "0"], "--samples 0"),
        (["--batch-size", "0"], "batch_size = 0"),
        (["--sequence-length", "0"], "sequence_length = 0"),
        (["--json", "no/such/folder/scores.json"], "no folder no/such/folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(command, arguments, message):
    code, _, err = command(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_folder_that_is_no_run(capsys, tmp_path):
    assert evaluate_command([str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_an_unknown_option_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate_command(["runs/some", "--sorce", "x"])
    assert stop.value.code == 2
    assert "--source" in capsys.readouterr().err
