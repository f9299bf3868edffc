"""The command line of train.py: a config file, then `--section.field VALUE` for any field of the Experiment."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from slm.config import HOW_IT_RUNS, DataConfig, Experiment, ModelConfig, check, load_config
from slm.errors import ConfigError, exit_code


def train_command(arguments: Sequence[str]) -> int:
    """Runs `train.py ARGUMENTS` and returns its exit code.

    0: done, or stopped by a signal and saved. 2: an error that the user can fix, printed in one line on stderr.
    130: Ctrl-C before training, or a second one.
    """
    # Where in the source a warning was raised says nothing to who reads it here.
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    return exit_code(lambda: _run(parse(arguments)))


def _run(command: "Command") -> None:
    if command.sweep is not None:
        from slm.study.sweep import sweep

        sweep(command.experiment, command.sweep, command.seeds, command.processes)
    elif command.dry_run:
        from slm.training.dry_run import dry_run

        dry_run(command.experiment, command.devices)
    else:
        from slm.training.loop import train

        train(command.experiment)


@dataclass(frozen=True)
class Command:
    """What train.py was asked to do."""

    experiment: Experiment
    dry_run: bool = False
    """Compile the train step for `devices` devices, print parameters, memory and FLOPs, and train nothing."""
    devices: int = 1
    """Number of devices that --dry-run pretends to have."""
    sweep: str | None = None
    """Train every combination of these instead, as slm.study.ablate does, and print their table: "FIELD=VALUE,VALUE
    FIELD=VALUE,VALUE"; + joins the values of one field, as in model.attention=softmax,gla+gla+softmax."""
    seeds: int = 3
    """Seeds of each combination of --sweep, from 0."""
    processes: int = 0
    """Runs of --sweep at a time, in processes of their own; 0: all in this one."""


def parse(arguments: Sequence[str]) -> Command:
    """The command in `train.py ARGUMENTS`.

    Raises ConfigError for a bad config file or fields that contradict each other; SystemExit, after printing, for
    --help (0) and for unknown or ill-typed fields (2), with the nearest names that exist.
    """
    import tyro

    arguments = list(arguments)
    config_file = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    if config_file is None and not {"-h", "--help"} & set(arguments):
        raise ConfigError(f"which config? python train.py CONFIG [--section.field VALUE ...]; {_configs()}")
    default = Experiment() if config_file is None else load_config(config_file)
    if any(argument.replace("_", "-").startswith("--model.init-from") for argument in arguments):
        default = _without_model(default)
    # Every field takes a value, also the boolean ones: one rule to remember, and the same text works in a sweep.
    fields = Annotated[Experiment, tyro.conf.FlagConversionOff, tyro.conf.arg(name="")]

    @dataclass(frozen=True)
    class Arguments(Command):
        experiment: fields

    parsed = tyro.cli(
        Arguments,
        prog=f"train.py {config_file or 'CONFIG'}",
        description=f"Train {config_file or 'a config, a Python file'}. Defaults shown are the config's. {_configs()}",
        default=Arguments(default),
        args=arguments,
    )
    return replace(parsed, experiment=check(parsed.experiment))


def _without_model(cfg: Experiment) -> Experiment:
    """`cfg` for a model that the command line names: the config's own sizes and tokenizer give way to that model's."""
    kept = {name: getattr(cfg.model, name) for name in HOW_IT_RUNS}
    data = replace(cfg.data, tokenizer=DataConfig().tokenizer)
    return replace(cfg, model=ModelConfig(**kept), data=data)


def _configs() -> str:
    found = sorted(str(path) for path in Path("configs").glob("*.py"))
    return f"Configs here: {', '.join(found)}" if found else "no configs/*.py in this folder"
