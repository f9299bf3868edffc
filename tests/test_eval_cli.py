import errno
import io
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny, use_devices
from tiny_talker import write_talker

import slm
from slm.config import Experiment, ModelConfig, override
from slm.data.pipeline import open_data
from slm.data.synthetic import synthetic_tokenizer
from slm.data.tokenizers import build_tokenizer
from slm.errors import DataError
from slm.evaluation import chat, terminal
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
    assert evaluate_command([str(run.dir), "--sequence-length", "8", "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    for way in (run, run.dir, str(run.dir)):
        assert evaluate(way, sequence_length=8).items() <= scores.items()
    capsys.readouterr()
    assert evaluate_command([str(run.dir), "--checkpoint", "5"]) == 2
    assert "no checkpoint of step 5" in capsys.readouterr().err

    text = tmp_path / "text.txt"
    text.write_text("One more line.\n" + text.read_text())
    assert evaluate_command([str(run.dir)]) == 2
    assert "has changed since training" in capsys.readouterr().err
    with pytest.raises(DataError, match="has changed since training"):
        evaluate(run)
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
        (["--prompts", "no/such/prompts.txt"], "cannot read no/such/prompts.txt"),
        (["--prompt", "a", "--stop", ""], "stop = "),
        (["--chat", "--prompt", "a"], "--chat cannot go with --prompt"),
        (["--system", "Be brief."], "--system belongs to --chat"),
        (["--chat"], "has no chat template"),
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


def test_prompts_from_a_file_are_continued_in_batches(command, model, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n  two\nthree\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": ""}\n')
    settings = ["--max-new-tokens", 6, "--seed", 2, "--json", tmp_path / "samples.json"]
    for name, prompts in {"prompts.txt": ["one", "  two", "three"], "prompts.jsonl": ["a\nb", ""]}.items():
        code, *_ = command("--prompts", tmp_path / name, "--prompt", "zero", "--batch-size", 2, *settings)
        assert code == 0
        samples = json.loads((tmp_path / "samples.json").read_text())["samples"]
        assert [one["prompt"] for one in samples] == ["zero", *prompts]
        assert [one["text"] for one in samples] == generate(model, ["zero", *prompts], seed=2, max_new_tokens=6)
    code, *_ = command("--prompt", "zero", "--stop", samples[0]["text"][2], "q", *settings)
    stopped = json.loads((tmp_path / "samples.json").read_text())["samples"]
    assert stopped[0]["text"] == samples[0]["text"][: samples[0]["text"].index(samples[0]["text"][2])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b" \n\n", "has no prompts"),
        ("p.txt", b"\xff\xfe", "cannot read"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"promt": 1}', "line 3: must be a JSON object with a field prompt"),
        ("p.jsonl", b"[1]", "line 1: must be a JSON object"),
        ("p.jsonl", b'{"prompt": 1}', "line 1: prompt must be a text"),
    ],
)
def test_damaged_prompt_files_are_named(command, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    code, _, err = command("--prompts", tmp_path / name)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture
def shell(talker, monkeypatch, capsys):
    """(arguments, stdin) -> (exit code, stdout, stderr) of `eval.py talker ARGUMENTS`."""
    monkeypatch.setattr("slm.training.compilation.enable_compilation_cache", lambda folder: None)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = evaluate_command([str(talker), *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_a_hugging_face_folder_is_scored_and_writes(shell, talker, texts, tmp_path):
    file = tmp_path / "report.json"
    code, out, _ = shell("--source", texts / "7.txt", "--prompt", "ab", "--max-new-tokens", 5, "--json", file)
    assert code == 0
    report = json.loads(file.read_text())
    model = slm.from_pretrained(talker)
    assert report["bits_per_byte"] == pytest.approx(evaluate(model, str(texts / "7.txt"))["bits_per_byte"], rel=1e-6)
    assert report["samples"][0]["text"] == generate(model, "ab", max_new_tokens=5)
    assert "perplexity" in out


def test_a_draft_and_a_small_cache_write_the_same_text(shell, talker, texts, tmp_path):
    written = []
    for extra in ([], ["--draft", talker, "--draft-tokens", 2], ["--cache-dtype", "float32"]):
        code, _, err = shell(
            "--prompt", "ab", "--max-new-tokens", 9, "--temperature", 0, "--json", tmp_path / "x", *extra
        )
        assert code == 0, err
        written.append(json.loads((tmp_path / "x").read_text())["samples"][0]["text"])
    assert len(set(written)) == 1
    assert shell("--prompt", "ab", "--max-new-tokens", 9, "--cache-dtype", "int8", "--quantize", "int8")[0] == 0
    assert shell("--prompt", "ab", "--max-new-tokens", 3, "--draft", talker, "--chat")[0] == 2
    code, out, _ = shell("--chat", "--draft", talker, "--max-new-tokens", 3, stdin="hello\n")
    assert code == 0
    # Before anything is scored.
    for wrong, message in (([tmp_path / "nowhere", "--prompt", "ab"], "nowhere"), ([talker], "--draft belongs to")):
        code, out, err = shell("--source", texts / "7.txt", "--draft", *wrong)
        assert code == 2
        assert message in err
        assert "bits per byte" not in out


def test_a_model_in_8_bits_is_scored(shell, texts):
    code, out, _ = shell("--source", texts / "7.txt", "--quantize", "int8")
    assert code == 0
    assert "bits per byte" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "is no run of ours.*--source"), (["--checkpoint", "best", "--prompt", "a"], "has no checkpoint best")],
)
def test_what_only_a_run_has_is_refused(shell, arguments, message):
    code, _, err = shell(*arguments)
    assert code == 2
    assert re.search(message, err)


def test_weights_without_a_config_are_named(capsys, tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert evaluate_command([str(tmp_path), "--prompt", "a"]) == 2
    assert "cannot read" in capsys.readouterr().err


def replies(model, turns, system=None, **settings):
    """What a chat with these messages answers."""
    messages, answers = [{"role": "system", "content": system}] if system else [], []
    for seed, turn in enumerate(turns, settings.pop("seed", 0)):
        messages.append({"role": "user", "content": turn})
        answers.append("".join(chat.reply(model, messages, seed=seed, **settings)))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def shown(texts):
    return "".join(terminal._CONTROL.sub("\ufffd", text) + "\n" for text in texts)


def test_a_chat_remembers_until_it_is_reset(shell, talker):
    model = slm.from_pretrained(talker)
    settings = {"max_new_tokens": 12, "temperature": 0.9}
    how = ["--chat", "--system", "Be brief.", "--max-new-tokens", 12, "--temperature", 0.9, "--seed", 3]
    code, out, err = shell(*how, stdin="Hi\n\nWhy?\n/reset\nWhy?\n/rest now\n/quit\nnever read\n")
    first, second = replies(model, ["Hi", "Why?"], "Be brief.", seed=3, **settings)
    (fresh,) = replies(model, ["Why?"], "Be brief.", seed=5, **settings)
    help_line = f"no command /rest; {terminal.HELP}\n"
    assert (code, err) == (0, "")
    assert out.endswith(shown([first, second]) + "a new conversation\n" + shown([fresh]) + help_line)
    assert len({first, second, fresh}) == 3


def test_an_interrupted_answer_is_kept_as_far_as_it_came(shell, talker, monkeypatch):
    seen = []

    def interrupted(model, messages, **settings):
        seen.append([dict(message) for message in messages])
        yield "Well\x1b[2J"
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "reply", interrupted)
    code, out, _ = shell("--chat", stdin="Hi\nGo on\n")
    assert code == 0
    assert "\x1b" not in out  # a model must not steer the terminal
    assert out.count("Well\ufffd[2J [stopped]\n") == 2
    assert [message["content"] for message in seen[1]] == ["Hi", "Well\x1b[2J", "Go on"]


def test_a_bad_message_does_not_end_a_chat(shell, talker):
    code, out, err = shell("--chat", "--max-new-tokens", 3, stdin="\udcff\nHi\n")
    assert code == 0
    assert err.startswith("error: ")
    assert "surrogate" in err
    assert out.endswith(shown(replies(slm.from_pretrained(talker), ["Hi"], max_new_tokens=3)))


def test_a_folder_that_is_no_run(capsys, tmp_path):
    assert evaluate_command([str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_an_unknown_option_is_refused_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate_command(["runs/some", "--sorce", "x"])
    assert stop.value.code == 2
    assert "--source" in capsys.readouterr().err
