"""The house keeps its shape: imports go one way and stay light, files stay small, configs and public names work."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slm
from slm.config import check, load_config
from slm.models.counts import abstract_parameters
from slm.training.optimizers import make_optimizer

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "slm").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
LONGEST = 450
HEAVY = {
    "grain", "tensorflow", "tensorflow_datasets", "array_record", "pyarrow", "tokenizers", "transformers", "torch",
    "orbax", "tyro", "safetensors", "huggingface_hub", "gguf", "jinja2", "rich", "matplotlib", "tensorboardX", "wandb",
    "starlette", "uvicorn", "httpx", "onnx", "onnxruntime", "pandas",
}  # fmt: skip

# Room (a folder of slm/, or a file directly in it) to what its files may import of slm besides their own room: at the
# top of a file, and only inside functions, that is when needed. An entry allows a room, or one module of it.
# Whatever has no row here may be imported by nobody: a new room gets its own row, and a place in those above it.
MAY_IMPORT: dict[str, tuple[set[str], set[str]]] = {
    "__init__": (set(), set()),  # names its modules as strings
    "errors": (set(), set()),
    "compression": (set(), set()),
    "refusals": ({"compression", "errors"}, set()),
    "experiment": ({"compression"}, set()),
    "config": ({"errors", "experiment", "compression", "refusals"}, set()),
    "attention": (set(), set()),
    "models": ({"config", "errors", "attention"}, set()),
    "data": ({"config", "errors"}, set()),
    # The parts of training that are pure JAX must not drag the data libraries in; the loop opens the data when it runs.
    "training": ({"config", "errors", "attention", "models"}, {"data", "evaluation", "interop", "compress"}),
    # Never training.loop: the loop evaluates, so that would be a circle.
    "evaluation": (
        {"config", "errors", "models", "training.step", "training.loss", "training.precision", "training.mesh"},
        {"data", "training.run", "training.compilation", "interop", "compress", "study.comparing"},
    ),
    "interop": ({"config", "errors", "models"}, {"data"}),
    # What training knows of it are values of slm.training.transforms and slm.training.objective.
    "compress": (
        {
            "attention",
            "compression",
            "config",
            "errors",
            "models",
            "refusals",
            "interop.starting",
            "training.transforms",
            "training.objective",
            "training.loss",
            "training.precision",
            "training.step",
            "training.rules",
            "training.state",
        },
        {"data", "evaluation", "interop"},
    ),
    "cli": ({"config", "errors"}, {"training", "study.sweep"}),
    "serve": ({"errors", "evaluation", "models"}, {"data", "training.compilation", "compress"}),
    # The notebook's face: above everything, so in no other row but those of commands.
    "study": (
        {"config", "errors", "attention", "models", "evaluation", "training", "data.cache"},
        {"data", "compress"},
    ),
}


def module_name(path: Path) -> str:
    """`training.loop` for slm/training/loop.py; `attention` for slm/attention/__init__.py."""
    parts = path.relative_to(ROOT / "slm").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(source: str):
    """(module of slm without the prefix, line, whether inside a function) of every import of slm in `source`."""

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            targets = []
            if isinstance(child, ast.ImportFrom):
                if child.level:
                    raise SyntaxError(f"line {child.lineno}: relative import; write it from slm on")
                # `from slm.training import mesh` imports a module, `from slm.training.mesh import make_mesh` a name.
                targets = [f"{child.module}.{alias.name}" for alias in child.names]
            elif isinstance(child, ast.Import):
                targets = [alias.name for alias in child.names]
            for target in targets:
                if target.split(".")[0] == "slm":
                    inner = target.split(".")[1:]
                    while inner and ".".join(inner) not in MODULES:
                        inner.pop()
                    yield ".".join(inner) or "__init__", child.lineno, inside
            yield from visit(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    return visit(ast.parse(source), False)


def violations(module: str, source: str) -> list[str]:
    """Sentences about the imports of `source`, as the text of `module`, that its room does not allow."""
    room = module.split(".")[0]
    if room not in MAY_IMPORT:
        return [f"slm/{room} has no row in MAY_IMPORT: say there what it may import"]
    found = []
    top, lazy = MAY_IMPORT[room]
    for target, line, inside in imports(source):
        own = target.split(".")[0] == room
        allowed = {room} | top | (lazy if inside else set())
        if own or any(target == entry or target.startswith(f"{entry}.") for entry in allowed):
            continue
        if any(target == entry or target.startswith(f"{entry}.") for entry in lazy):
            rule = "may import that only inside a function"
        else:
            rule = f"may import at most {', '.join(sorted(top | lazy)) or 'nothing'}"
        found.append(f"{module} line {line} imports slm.{target}: slm/{room} {rule}")
    return found


def test_imports_go_one_way():
    found = [sentence for module, path in MODULES.items() for sentence in violations(module, path.read_text())]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("attention.softmax", "from slm.config import ModelConfig", "imports slm.config: slm/attention .* nothing"),
        ("models.blocks", "import slm.training.step", "line 1 imports slm.training.step: slm/models may import"),
        ("models.blocks", "def f():\n  from slm.training import mesh", "line 2 imports slm.training.mesh"),
        ("training.step", "from slm.data.packing import Batch", "slm.data.packing: .* only inside a function"),
        ("training.step", "if True:\n  from slm import data", "slm.data: .* only inside a function"),
        ("evaluation.cli", "def f():\n  from slm.training.loop import train", "imports slm.training.loop: .*at most"),
        ("data.cache", "from slm import train", "imports slm.__init__"),
        ("attic.grid", "", "slm/attic has no row"),
    ],
)  # fmt: skip
def test_the_rule_sees_what_breaks_it(module, source, message):
    (sentence,) = violations(module, source)
    assert re.search(message, sentence), sentence


def test_the_rule_names_what_exists():
    assert set(MAY_IMPORT) == {module.split(".")[0] for module in MODULES}
    for room, allowed in MAY_IMPORT.items():
        for entry in set().union(*allowed):
            assert entry in MAY_IMPORT or entry in MODULES, f"MAY_IMPORT[{room!r}] names {entry}, which does not exist"


def test_no_circle_of_imports():
    """Files that import each other at the top work or fail by the order in which they happen to be loaded."""
    graph = {
        module: {target for target, _, inside in imports(path.read_text()) if not inside}
        for module, path in MODULES.items()
    }
    done = set()

    def walk(module, trail):
        assert module not in trail, f"imported in a circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for target in graph[module]:
                walk(target, [*trail, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    assert done == set(MODULES)


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in memory after `statement`, in a fresh interpreter."""
    program = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_slm_costs_nothing():
    loaded = loaded_by("import slm, slm.config; slm.Experiment, slm.SlmError")
    assert "slm" in loaded
    assert not loaded & (HEAVY | {"jax", "jaxlib", "flax", "optax", "chex", "einops"})


def test_the_model_and_the_train_step_need_only_jax_and_its_near_ones():
    loaded = loaded_by("import slm.attention, slm.models.transformer, slm.models.counts, slm.training.step")
    assert {"jax", "flax", "optax"} <= loaded
    assert not loaded & HEAVY - {"rich"}  # flax.linen imports rich itself


def test_attention_does_not_know_flax():
    assert not loaded_by("import slm.attention") & (HEAVY | {"flax", "optax"})


def test_a_study_is_described_and_judged_without_jax():
    """Its arms and its statistics; what counts or trains models is imported when it is asked to."""
    names = ("grids", "matching", "statistics", "learning_rate", "scaling", "table")
    loaded = loaded_by("import " + ", ".join(f"slm.study.{name}" for name in names))
    assert "numpy" in loaded
    assert not loaded & (HEAVY | {"jax", "flax", "optax", "scipy"})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST, f"{path.relative_to(ROOT)} has {lines} lines, more than {LONGEST}: split it by its nouns"


def test_public_names_resolve():
    assert len(slm.__all__) == len(set(slm.__all__)) > 15
    for name in slm.__all__:
        assert getattr(slm, name) is not None
        assert name in dir(slm)
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        slm.tarin  # noqa: B018


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_load_and_agree_with_the_code(path):
    cfg = check(load_config(path))
    assert cfg.name == path.stem
    # Of what only the code knows: the mechanisms, a rule for each parameter, optimizer and schedule that fit together.
    model = dataclasses.replace(
        cfg.model,
        vocab_size=cfg.model.vocab_size or 512,
        max_length=cfg.model.max_length or cfg.data.sequence_length,
    )
    make_optimizer(cfg.optim, cfg.train.steps, abstract_parameters(model))
    text = ast.get_docstring(ast.parse(path.read_text()))
    for field in ("Command:", "Hardware:", "Time:", "Expected:"):
        assert field in text, f"the docstring of {path.name} lacks a line `{field}`"
    assert f"configs/{path.name}" in text


def test_there_are_configs():
    assert {"quickstart", "shakespeare_char"} <= {path.stem for path in CONFIGS}
