"""Saving and restoring: complete or refused, never partial, and never at the cost of older checkpoints."""

import errno
import os
import shutil
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from slm.config import CheckpointConfig
from slm.errors import CheckpointError
from slm.training.checkpoint import Checkpoints, compare
from slm.training.state import TrainState

META = {"config": {}, "data": "d", "tokens": 1.0}


def make_state(layers=2, scale=1.0, ema=True):
    key = jax.random.key(0)
    params = {
        "embed": {"embedding": scale * jax.random.normal(key, (64, 8))},
        "blocks": {"0": {"mixer": {"query": {"kernel": scale * jax.random.normal(key, (layers, 8, 8))}}}},
    }
    # A chain with an empty state and a masked one: both must survive the comparison of trees.
    decay = optax.add_decayed_weights(0.1, mask=jax.tree.map(lambda a: a.ndim > 2, params))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), decay)
    return TrainState(
        step=jnp.int32(3), params=params, opt_state=optimizer.init(params), ema=params if ema else None, loss_scale=None
    )


def abstract(state, sharding=None):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding or a.sharding), state)


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


@pytest.fixture
def open_checkpoints():
    opened = []

    def make(folder, **fields):
        opened.append(Checkpoints(folder, CheckpointConfig(**fields)))
        return opened[-1]

    yield make
    for checkpoints in opened:
        checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 3 and 6 of a state, with metrics."""
    folder = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(folder, CheckpointConfig())
    for step in (3, 6):
        checkpoints.save(make_state(), step, META, {"loss": 1.0, "bits_per_byte": 2.0})
    checkpoints.close()
    return folder


def test_round_trip_keeps_every_bit_and_the_meta(saved, open_checkpoints):
    state, meta = open_checkpoints(saved).restore(abstract(make_state()))
    assert same(state, make_state())
    assert jax.tree.structure(state) == jax.tree.structure(make_state())
    assert meta == META | {"step": 6, "metrics": {"loss": 1.0, "bits_per_byte": 2.0}}


def test_restored_state_can_be_donated_and_stays_right(saved, open_checkpoints):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    # Large enough that the CPU backend would share one buffer among the replicas.
    state, _ = open_checkpoints(saved).restore(abstract(make_state(), NamedSharding(mesh, P())))
    step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    new = step(step(state))
    assert state.params["embed"]["embedding"].is_deleted()
    for shard in new.params["embed"]["embedding"].addressable_shards:
        assert np.array_equal(shard.data, make_state().params["embed"]["embedding"] + 1 + 1)


def test_restores_onto_another_mesh(tmp_path, open_checkpoints):
    devices = np.array(jax.devices()[:4])
    column = NamedSharding(Mesh(devices, ("a",)), P())
    state = jax.device_put(make_state(), column)
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(state, 3, META)
    target = abstract(state)
    rows = NamedSharding(Mesh(devices.reshape(2, 2), ("x", "y")), P("x", "y"))
    target.params["embed"]["embedding"] = jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=rows)
    restored, _ = checkpoints.restore(target)
    assert restored.params["embed"]["embedding"].sharding == rows
    assert same(restored, state)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (make_state(layers=3), "params/blocks/0/mixer/query/kernel is (2, 8, 8) float32, the model wants (3, 8, 8)"),
        (make_state(ema=False), "ema/embed/embedding has no place in the model"),
        (make_state().replace(loss_scale=jnp.float32(1)), "loss_scale is missing"),
        (make_state().replace(step=jnp.float32(1)), "step is () int32, the model wants () float32"),
    ],
)
def test_another_tree_is_refused_naming_the_leaf(saved, open_checkpoints, target, named):
    with pytest.raises(CheckpointError) as error:
        open_checkpoints(saved).restore(abstract(target))
    assert named in str(error.value)


def test_compare_accepts_equal_trees_only():
    compare(abstract(make_state()), make_state(), "here")
    with pytest.raises(CheckpointError, match="and 3 more"):
        compare(make_state(layers=3), make_state().replace(ema=None, step=jnp.float32(1)), "here")


def test_keeps_the_latest_and_the_best(tmp_path, open_checkpoints):
    checkpoints = open_checkpoints(tmp_path, keep=2)
    losses = {10: 3.0, 20: 2.0, 30: None, 40: 2.5, 50: None, 60: 2.4}
    for step, loss in losses.items():
        checkpoints.save(make_state(), step, META, None if loss is None else {"loss": loss})
    checkpoints.wait()
    assert checkpoints.all_steps() == [20, 50, 60]
    assert sorted(os.listdir(tmp_path)) == ["20", "50", "60"]
    # What was best is still known after a restart.
    again = open_checkpoints(tmp_path, keep=1)
    again.save(make_state(), 70, META, {"loss": 2.2})
    again.wait()
    assert again.all_steps() == [20, 70]


def test_without_best_only_the_latest_stay(tmp_path, open_checkpoints):
    checkpoints = open_checkpoints(tmp_path, keep=1, keep_best=False)
    for step, loss in {1: 1.0, 2: 2.0, 3: 3.0}.items():
        checkpoints.save(make_state(), step, META, {"loss": loss})
    checkpoints.wait()
    assert checkpoints.all_steps() == [3]


def test_a_step_is_saved_once(tmp_path, open_checkpoints):
    checkpoints = open_checkpoints(tmp_path)
    assert checkpoints.save(make_state(), 1, META)
    assert not checkpoints.save(make_state(scale=2.0), 1, META)
    assert same(checkpoints.restore(abstract(make_state()))[0], make_state())


def test_missing_checkpoints_are_named(tmp_path, saved, open_checkpoints):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        open_checkpoints(tmp_path / "empty").restore(abstract(make_state()))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 .*there are \[3, 6\]"):
        open_checkpoints(saved).restore(abstract(make_state()), step=4)


def test_find_latest_best_or_a_step(tmp_path, saved, open_checkpoints):
    checkpoints = open_checkpoints(tmp_path, keep=3)
    for step, loss in {10: 2.0, 20: 1.5, 30: None, 40: 1.8}.items():
        checkpoints.save(make_state(), step, META, None if loss is None else {"loss": loss})
    checkpoints.wait()
    again = open_checkpoints(tmp_path, keep=3)
    assert [again.find(which) for which in ("latest", "best", "30", 20)] == [40, 20, 30, 20]
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 10 .*there are \[20, 30, 40\]"):
        again.find("10")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint 'bset' .* latest, best or one of the steps \[20, 30, 40\]"
    ):
        again.find("bset")
    for which in ("latest", "best", 1):
        with pytest.raises(CheckpointError, match="no checkpoint in"):
            open_checkpoints(tmp_path / "empty").find(which)


def test_without_an_evaluation_there_is_no_best(tmp_path, open_checkpoints):
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(make_state(), 1, META)
    with pytest.raises(CheckpointError, match=r"no best checkpoint .* there are \[1\]"):
        checkpoints.find("best")


@pytest.mark.parametrize(
    ("failure", "damaged"),
    [
        (MemoryError(), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (OSError(errno.EIO, "Input/output error"), False),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), True),
        (ValueError("DATA_LOSS: checksum"), True),
    ],
)
def test_what_is_not_about_the_files_is_not_called_damage(saved, open_checkpoints, failure, damaged):
    with pytest.raises(CheckpointError) as error, open_checkpoints(saved)._reading(6):
        raise failure
    assert ("is damaged" in str(error.value)) == damaged
    assert ("could not be read" in str(error.value)) == (not damaged)
    assert "othing was changed" in str(error.value)


def test_parts_for_inference(saved, open_checkpoints):
    parts = open_checkpoints(saved).restore_parts(("params", "ema", "loss_scale"))
    assert same(parts["params"], make_state().params)
    assert same(parts["ema"], make_state().params)
    assert parts["loss_scale"] is None


def files_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def restore_error(folder):
    """What restoring says; "" if it gave the state that was saved."""
    checkpoints = None
    try:
        checkpoints = Checkpoints(folder, CheckpointConfig())
        assert same(checkpoints.restore(abstract(make_state()))[0], make_state())
    except CheckpointError as error:
        return str(error)
    finally:
        if checkpoints:
            checkpoints.close()
    return ""


# Orbax leaves the reads that it gave up unawaited.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")
def test_any_truncated_file_is_noticed_or_harmless(saved, tmp_path, capfd):
    """Some files repeat what others say; without them the state must still come back bit-equal."""
    noticed = []
    for file in files_of(saved / "6"):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        os.truncate(folder / "6" / file, os.path.getsize(folder / "6" / file) // 2)
        before = files_of(folder)
        error = restore_error(folder)
        if error:
            noticed.append(file)
            assert f"{folder / '6'} is damaged" in error
            assert "continue from step 3" in error
        assert files_of(folder) == before
    assert {"meta/metadata", "metrics/metrics", "state/_METADATA", "state/manifest.ocdbt"} <= set(noticed)
    assert any(file.startswith("state/d/") for file in noticed)
    assert "Traceback" not in capfd.readouterr().err


def test_what_threads_print_after_a_failed_read_is_kept_off_the_terminal(saved, open_checkpoints, capsys):
    straggler = threading.Timer(0.05, lambda: print("Event loop is closed", file=sys.stderr))

    def fail():
        straggler.start()
        raise ValueError("DATA_LOSS")

    checkpoints = open_checkpoints(saved)
    with pytest.raises(CheckpointError, match="DATA_LOSS"), checkpoints._reading(6):
        fail()
    straggler.join()
    assert capsys.readouterr().err == ""


def test_older_checkpoint_serves_when_the_damaged_one_is_gone(saved, tmp_path, open_checkpoints):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "6")
    checkpoints = open_checkpoints(folder)
    assert checkpoints.latest() == 3
    assert same(checkpoints.restore(abstract(make_state()))[0], make_state())


def test_what_a_killed_save_left_is_ignored_and_cleared(saved, tmp_path, open_checkpoints):
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    shutil.copytree(saved / "6", folder / "9.orbax-checkpoint-tmp")
    checkpoints = open_checkpoints(folder)
    assert checkpoints.latest() == 6
    checkpoints.save(make_state(), 9, META)
    checkpoints.wait()
    assert checkpoints.latest() == 9
    assert not list(folder.glob("*tmp*"))


def test_full_disk_is_one_error_and_older_checkpoints_stay(saved, tmp_path, monkeypatch, capfd):
    """The write of the arrays fails in orbax's background thread, as it does on a full disk."""
    from orbax.checkpoint import JsonCheckpointHandler

    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    checkpoints = Checkpoints(folder, CheckpointConfig(keep=1, keep_best=False))

    async def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonCheckpointHandler, "_save_fn", no_space)
    checkpoints.save(make_state(), 9, META)  # returns: the failure comes later
    with pytest.raises(CheckpointError, match="no space left on the device") as error:
        checkpoints.close()
    assert str(folder) in str(error.value)
    assert {"3", "6"} <= set(os.listdir(folder))
    monkeypatch.undo()
    again = Checkpoints(folder, CheckpointConfig())
    assert again.all_steps() == [3, 6]
    assert same(again.restore(abstract(make_state()))[0], make_state())
    again.close()
    assert "Traceback" not in capfd.readouterr().err
