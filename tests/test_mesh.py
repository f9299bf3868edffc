import dataclasses
import re
import socket
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from slm.config import MeshConfig, MixerConfig, ModelConfig, OptimConfig, TrainConfig
from slm.errors import ConfigError
from slm.models.transformer import Transformer
from slm.training import mesh as meshes
from slm.training import rules
from slm.training.optimizers import make_optimizer
from slm.training.state import LossScale, TrainState

MODEL = ModelConfig(vocab_size=12, layers=6, width=8, heads=4, kv_heads=2, mlp_width=16, tied=False)


def mesh_of(data, fsdp, tensor):
    return meshes.make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def by_path(tree):
    return dict(zip(rules.paths(tree), jax.tree.leaves(tree)))


def abstract_state(optim, model=MODEL):
    params = jax.eval_shape(Transformer(model).init, jax.random.key(0))
    opt_state = jax.eval_shape(make_optimizer(optim, 200, params).init, params)
    return TrainState(jnp.int32(0), params, opt_state, params, LossScale.create())


def test_minus_one_takes_what_is_left_and_all_devices_are_used():
    assert jax.device_count() == 8
    assert dict(meshes.make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(meshes.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(meshes.make_mesh(MeshConfig(data=1, fsdp=-1)).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (4, 1, 1), (8, 2, 1), (-1, 16, 1)])
def test_sizes_that_do_not_multiply_to_the_devices_are_refused_with_a_choice_that_works(sizes):
    with pytest.raises(ConfigError, match=r"mesh.data = .*the 8 devices") as error:
        meshes.make_mesh(MeshConfig(*sizes))
    offered = [int(part.split(" = ")[1]) for part in str(error.value).split("possible: ")[1].split(", ")]
    assert meshes.make_mesh(MeshConfig(*offered)).size == 8


def test_batch_and_model_must_divide():
    mesh = mesh_of(2, 2, 2)
    meshes.check_mesh(mesh, MODEL, TrainConfig(batch_size=16, accumulation=4))
    with pytest.raises(ConfigError, match=r"train.batch_size / train.accumulation = 8 / 4 = 2 .*multiple of 16.* 16$"):
        meshes.check_mesh(mesh, MODEL, TrainConfig(batch_size=8, accumulation=4))
    for fields in ({"heads": 3, "kv_heads": 3}, {"kv_heads": 1}, {"mlp_width": 15}):
        name = next(iter(fields))
        with pytest.raises(ConfigError, match=f"model.{name} = .*mesh.tensor = 2"):
            meshes.check_mesh(mesh, dataclasses.replace(MODEL, **fields), TrainConfig(batch_size=16))


def test_kernels_that_cannot_be_divided_are_refused():
    model = dataclasses.replace(MODEL, attention=("simple_gla",), mixer=MixerConfig(implementation="pallas"))
    meshes.check_mesh(mesh_of(1, 1, 1), model, TrainConfig(batch_size=16))
    with pytest.raises(ConfigError, match=r"implementation = pallas: .* 2 devices"):
        meshes.check_mesh(mesh_of(2, 1, 1), model, TrainConfig(batch_size=16))


@pytest.mark.parametrize("name", ["delta_product", "differential", "moba", "dsa", "mla", "rwkv6"])
def test_heads_stay_on_their_device(name):
    """Data and heads are split four ways, and no layer gathers or exchanges any of it: sums are all it needs."""
    cfg = ModelConfig(vocab_size=8, layers=1, width=16, heads=4, attention=(name,), mlp="none")
    mesh, transformer = mesh_of(2, 1, 2), Transformer(cfg)
    params = jax.eval_shape(transformer.init, jax.random.key(0))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    params = jax.tree.map(place, params, meshes.param_shardings(params, mesh))
    tokens = jax.ShapeDtypeStruct((4, 300), jnp.int32, sharding=NamedSharding(mesh, P("data")))
    loss = lambda params, tokens, ids: transformer.hidden(params, tokens, segment_ids=ids)[0].sum()  # noqa: E731
    program = jax.jit(jax.grad(loss)).lower(params, tokens, tokens).compile().as_text()
    assert "all-reduce" in program
    assert not re.findall(r"(?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)


def test_parameters_are_split_by_name_and_never_along_the_stack():
    params = jax.eval_shape(Transformer(MODEL).init, jax.random.key(0))
    specs = {
        path: sharding.spec for path, sharding in by_path(meshes.param_shardings(params, mesh_of(2, 2, 2))).items()
    }
    assert specs["blocks/0/mixer/key/kernel"] == specs["blocks/0/mlp/gate/kernel"] == P(None, "fsdp", "tensor")
    assert specs["blocks/0/mixer/out/kernel"] == specs["blocks/0/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    assert specs["embed/embedding"] == P("tensor", "fsdp")
    assert specs["head/kernel"] == P("fsdp", "tensor")
    assert specs["blocks/0/mlp_norm/scale"] == specs["final_norm/scale"] == P()
    # Axes of size 1 are left out, so that the table of a one-device run is not full of them.
    alone = by_path(meshes.param_shardings(params, mesh_of(1, 1, 1)))
    assert {sharding.spec for sharding in alone.values()} == {P()}


def test_a_dimension_that_does_not_divide_stays_whole_aloud():
    params = jax.eval_shape(Transformer(dataclasses.replace(MODEL, vocab_size=11)).init, jax.random.key(0))
    with pytest.warns(UserWarning, match=r"embed/embedding \(11, 8\) on tensor = 2; head/kernel \(8, 11\)"):
        shardings = by_path(meshes.param_shardings(params, mesh_of(2, 2, 2)))
    assert shardings["embed/embedding"].spec == P(None, "fsdp")
    assert shardings["head/kernel"].spec == P("fsdp", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        meshes.param_shardings(params, mesh_of(2, 2, 1))


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "schedule_free_adamw"])
def test_optimizer_state_lives_where_its_parameter_lives(name):
    optim = OptimConfig(name=name, schedule="constant")
    # Wide enough that Adafactor factors the feed-forward.
    state = abstract_state(optim, dataclasses.replace(MODEL, width=128, mlp_width=256))
    shardings, leaves = by_path(meshes.state_shardings(state, mesh_of(2, 2, 2))), by_path(state)
    followers = {
        path for path in leaves if path.endswith("blocks/0/mlp/down/kernel") and leaves[path].shape == (6, 256, 128)
    }
    # params, ema, and one or two moments; z and the second moment of schedule-free; the first moment of Adafactor.
    assert len(followers) == {"adamw": 4, "lion": 3, "adafactor": 3, "muon": 3, "schedule_free_adamw": 4}[name]
    assert {shardings[path].spec for path in followers} == {P(None, "tensor", "fsdp")}
    assert shardings["params/blocks/0/mlp/up/kernel"].spec == P(None, "fsdp", "tensor")
    others = {path for path in leaves if "kernel" not in path and "embedding" not in path}
    assert {"step", "loss_scale/scale"} < others
    assert {shardings[path].spec for path in others} == {P()}
    if name == "adafactor":
        factored = {path for path in leaves if path.endswith("v_row/blocks/0/mlp/down/kernel")}
        assert {shardings[path].spec for path in factored} == {P()}
        assert {leaves[path].shape for path in factored} == {(6, 128)}


def test_a_matrix_is_shared_out_over_the_devices():
    params = jax.eval_shape(Transformer(MODEL).init, jax.random.key(0))
    sharding = by_path(meshes.param_shardings(params, mesh_of(1, 4, 2)))["blocks/0/mlp/up/kernel"]
    up = jax.device_put(np.zeros((6, 8, 16), np.float32), sharding)
    assert {shard.data.shape for shard in up.addressable_shards} == {(6, 8 // 4, 16 // 2)}


def test_batch_rows_are_split_over_data_and_fsdp():
    batch = {"tokens": np.arange(16).reshape(8, 2), "weights": np.ones((8, 2), np.float32)}
    placed = meshes.place_batch(batch, mesh_of(2, 2, 2))
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed["tokens"], batch["tokens"])
    assert placed["weights"].sharding == meshes.batch_sharding(mesh_of(2, 2, 2))


def test_several_processes_are_recognised_and_contradictions_refused():
    def arguments(environ=(), **fields):
        return meshes._distributed_arguments(MeshConfig(**fields), dict(environ))

    assert arguments() is None
    assert arguments(coordinator="auto") == {}
    assert arguments(coordinator="host:1234", processes=2, process_id=1) == {
        "coordinator_address": "host:1234",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }
    assert arguments({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}) == {}
    assert arguments({"SLURM_NTASKS": "4"}) is None  # a batch script outside srun
    assert arguments({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert arguments({"TPU_WORKER_HOSTNAMES": "a,b"}) == arguments({"MEGASCALE_NUM_SLICES": "2"}) == {}
    assert arguments({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}) is None
    with pytest.raises(ConfigError, match=r"need mesh.coordinator"):
        arguments(processes=2, process_id=0)
    with pytest.raises(ConfigError, match=r"need mesh.coordinator"):
        arguments(coordinator="auto", process_id=0)
    with pytest.raises(ConfigError, match=r"also needs mesh.processes"):
        arguments(coordinator="host:1234", processes=2)
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        arguments(coordinator="host", processes=2, process_id=0)
    with pytest.raises(ConfigError, match=r"from 0 to mesh.processes - 1 = 1"):
        arguments(coordinator="host:1234", processes=2, process_id=2)


def test_joining_after_devices_are_in_use_is_a_config_error():
    jax.devices()
    with pytest.raises(ConfigError, match="must be called before any JAX"):
        meshes.initialise_distributed(MeshConfig(coordinator="localhost:1", processes=2, process_id=0))
    assert meshes.initialise_distributed(MeshConfig()) is None


def test_two_processes_join_and_share_a_batch():
    script = textwrap.dedent("""
        import sys
        import jax, numpy as np
        from slm.config import MeshConfig
        from slm.training import mesh as meshes

        process = int(sys.argv[2])
        cfg = MeshConfig(tensor=2, coordinator=sys.argv[1], processes=2, process_id=process)
        print(meshes.initialise_distributed(cfg), meshes.initialise_distributed(cfg))
        mesh = meshes.make_mesh(cfg)
        batch = meshes.place_batch({"x": np.arange(4).reshape(2, 2) + 10 * process}, mesh)["x"]
        total = jax.jit(lambda x: (x * np.arange(4)[:, None]).sum(), out_shardings=jax.NamedSharding(mesh, jax.P()))
        print(dict(mesh.shape), batch.shape, int(total(batch)))
        try:
            meshes.make_mesh(MeshConfig(tensor=4))
        except Exception as error:
            print(error)
        jax.distributed.shutdown()
    """)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environ = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environ["PYTHONPATH"] = ":".join(sys.path)
    command = [sys.executable, "-c", script, address]
    processes = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for i, (out, err) in enumerate(outputs):
        assert [line for line in out.splitlines() if "Gloo" not in line] == [
            f"process {i} of 2, at {address} None",
            "{'data': 2, 'fsdp': 1, 'tensor': 2} (4, 2) 122",
            "mesh.tensor = 4 must divide the 2 devices of a process, which reads rows of its own",
        ], err


@pytest.mark.parametrize(
    ("kind", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756.5e12, 378e12),
        ("NVIDIA H200", 989.4e12, 494.7e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 156e12),
        ("NVIDIA L4", 121e12, 60e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("TPU v4", 275e12, 275e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5", 459e12, 459e12),
        ("TPU v5p", 459e12, 459e12),
        ("TPU v6e", 918e12, 918e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("TPU7x", 1153.5e12, 1153.5e12),
        ("cpu", None, None),
        ("NVIDIA L40S", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("TPU v4 lite", None, None),
    ],
)
def test_peak_is_known_or_none(kind, half, single):
    assert meshes.peak_flops(kind, jnp.bfloat16) == meshes.peak_flops(kind, jnp.float16) == half
    assert meshes.peak_flops(kind, jnp.float32) == single
