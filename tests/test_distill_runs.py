"""Whole runs with a teacher: online, cached, on the student's own text; resumed bit-equal; refused in time."""

import jax
import numpy as np
import pytest
from test_resume import assert_same_state
from tiny_run import curve, stop_at, tiny, use_devices

import slm
from slm.compress.cache_teacher import cache_teacher
from slm.config import override
from slm.errors import ConfigError
from slm.training.dry_run import dry_run
from slm.training.loop import train

WIDE = {"name": "teacher", "model.width": 48, "model.layers": 3, "train.steps": 30, "train.evaluate_every": 0,
        "checkpoint.every": 0}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        use_devices(patch, 1)
        train(tiny(home, WIDE))
    return home


def student(home, name, **changes):
    always = {"name": name, "distill.teacher": str(home / "runs" / "teacher"), "train.log_every": 1}
    return tiny(home, always | {path.replace("__", "."): value for path, value in changes.items()})


@pytest.mark.parametrize(
    ("devices", "changes"),
    [
        (1, {"distill.hidden": 0.2, "distill.on_policy": 0.4, "distill.prompt_tokens": 3, "distill.alpha_end": 0.5}),
        (4, {"mesh.fsdp": 2, "distill.relations": 0.2, "distill.on_policy": 0.4, "distill.prompt_tokens": 5,
             "prune.sparsity": 0.5, "prune.every": 2, "train.precision": "bfloat16", "train.accumulation": 2,
             "train.batch_size": 8}),
    ],
)  # fmt: skip
def test_stopping_and_resuming_changes_nothing(home, monkeypatch, devices, changes):
    use_devices(monkeypatch, devices)
    cfg = override(student(home, f"student{devices}"), changes)
    whole = train(override(cfg, {"name": f"whole{devices}"}))
    assert {"divergence", "hidden" if "distill.hidden" in changes else "relations"} <= set(whole.history[0])
    stop_at(monkeypatch, 5)
    assert not train(cfg).finished
    stop_at(monkeypatch, None)
    last = train(cfg)
    assert last.finished
    assert curve(last.history) == curve(whole.history)
    assert_same_state(cfg.run_dir, whole.dir, 8)
    # What was learned beside the model is no part of it.
    assert set(last.model.params) == {"embed", "blocks", "final_norm"}


def test_a_cached_teacher_teaches_as_the_teacher_does(home, monkeypatch):
    use_devices(monkeypatch, 1)
    cfg = student(home, "online")
    online = train(cfg)
    folder = home / "cache_of_teacher"
    cache_teacher(cfg.distill.teacher, cfg, folder, top_k=257, dtype="float32")
    cached = train(override(cfg, {"name": "cached", "distill.teacher": None, "distill.cached": str(folder)}))
    for one, other in zip(online.history, cached.history, strict=True):
        np.testing.assert_allclose(one["divergence"], other["divergence"], rtol=2e-5)
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=2e-5)


def test_a_teacher_with_another_tokenizer(home, monkeypatch):
    use_devices(monkeypatch, 1)
    how = {"data__tokenizer": "bpe:280", "distill__loss": "uld", "distill__alpha": 1.0, "train__steps": 30}
    run = train(student(home, "foreign", **how, train__evaluate_every=0, checkpoint__every=0))
    assert run.model.tokenizer.vocab_size == 280
    rows = run.history
    assert all(0.3 < row["aligned"] <= 1 for row in rows)
    first, last = (np.mean([row["divergence"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert last < 0.8 * first, (first, last)


def test_a_teacher_is_no_part_of_the_saved_state(home, monkeypatch):
    """Nor of the compiled step: its parameters are an argument, so that another teacher compiles nothing anew."""
    use_devices(monkeypatch, 1)
    whole = train(student(home, "small"))
    size = sum(path.stat().st_size for path in (whole.dir / "checkpoints" / "8").rglob("*") if path.is_file())
    plain = train(override(tiny(home), {"name": "plain"}))
    without = sum(path.stat().st_size for path in (plain.dir / "checkpoints" / "8").rglob("*") if path.is_file())
    assert size < 1.02 * without


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__tokenizer": "chars"},
            r"with 257 ids .* data.tokenizer to the teacher's, or distill.loss = uld.*sample_teacher",
        ),
        ({"model__vocab_size": 300}, r"model.vocab_size = 257 and the student 300"),
        ({"distill__attention": 1.0, "model__heads": 4}, r"has 4 heads and layer 2 of the teacher 2"),
    ],
)
def test_what_does_not_fit_leaves_no_run_folder(home, monkeypatch, changes, message):
    use_devices(monkeypatch, 1)
    cfg = student(home, "refused", **changes)
    with pytest.raises(ConfigError, match=message):
        train(cfg)
    assert not cfg.run_dir.exists()


def test_a_dry_run_counts_the_teacher(home):
    with_teacher = dry_run(student(home, "dry"), 1)
    alone = dry_run(student(home, "dry", distill__teacher=None), 1)
    theirs = sum(leaf.nbytes for leaf in jax.tree.leaves(slm.load(student(home, "dry").distill.teacher).params))
    assert with_teacher.memory.arguments - alone.memory.arguments == pytest.approx(theirs, rel=0.02)
    with pytest.raises(ConfigError, match=r"distill\.cached belongs to some"):
        dry_run(student(home, "dry", distill__teacher=None, distill__cached="somewhere"), 1)
