"""The command line of eval.py: scores on held-out text or any source, samples, and chats."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from slm.errors import DataError, SlmError, exit_code
from slm.evaluation.bits_per_byte import check_sizes, eval_step_of, evaluate_batches
from slm.evaluation.generate import check_draft, generate
from slm.evaluation.held_out import text_of
from slm.evaluation.opening import open_model
from slm.evaluation.terminal import converse
from slm.models.language_model import LanguageModel

DESCRIPTION = """Score a trained model, let it write, or chat with it. Without --prompt: bits per byte with its standard
error, perplexity and accuracy on the text that the run held out from training, or on --source. With --prompt: samples,
and scores only if --source is given too. With --chat: a conversation, if the model was tuned for them."""


@dataclass(frozen=True)
class Arguments:
    """What eval.py was asked to do."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = ""
    """Folder of a run, such as runs/quickstart, or of a saved model; or a Hugging Face folder, or
    a .gguf file."""
    compare: tuple[str, ...] = ()
    """Instead of MODEL: score all of these on the same text and print a table of what differs, with intervals. Runs
    that differ in their seed alone are one row. The first is what the others are compared with."""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="latest|best|STEP")] = "latest"
    """Which of the run's checkpoints; best: the one of lowest validation loss."""
    source: str | None = None
    """Score on this instead of the run's held-out data: whatever data.source can name, such as cpython, a text file or
    folder, FILE.jsonl, FILE.parquet, a TFDS data set (tfds:NAME/SPLIT), or synthetic:TASK for a run trained on such."""
    by_position: bool = False
    """Also print the loss by the number of tokens of context."""
    sequence_length: int | None = None
    """Tokens in a window; None: as in the run's own evaluations. Windows do not overlap."""
    batch_size: int = 16
    """Windows scored, or prompts continued, at a time; changes memory and speed, not scores."""
    json: Path | None = None
    """Also write the scores and samples to this file."""
    prompt: tuple[str, ...] = ()
    """Print the model's continuation of each of these; "" lets it begin a document."""
    prompts: Path | None = None
    """Continue each prompt in this file too: one a line, or the field `prompt` of each line of FILE.jsonl."""
    samples: int = 1
    """Continuations of each prompt."""
    max_new_tokens: int | None = None
    """Most tokens to add; the end of the document may come before. None: 128, in a chat 512."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation, and do not become part of it; in bash, $'\\n\\n' is an empty line."""
    temperature: float = 1.0
    """Below 1 more predictable, above 1 more daring; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw only among the k likeliest tokens."""
    top_p: float | None = None
    """Draw only among the likeliest tokens that together reach this probability, such as 0.95."""
    min_p: float | None = None
    """Draw only among tokens at least this many times as likely as the likeliest, such as 0.05."""
    quantize: Literal["int8", "int4", "int3", "int2", "nf4", "ternary", "fp8"] | None = None
    """Round the weights to this grid once they are loaded, the embedding to 8 bits. On a CPU, one text at a time comes
    somewhat sooner with int8. slm.quantize in Python has better methods than rounding."""
    group_size: int | None = None
    """Inputs that share a scale, for --quantize; None: all of an output."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Of cached keys and values; each is about half of the one before. None: that of computation."""
    save: Path | None = None
    """Write the model, quantized if --quantize says so: a folder, or FILE.gguf for llama.cpp. Nothing is scored unless
    --source is given."""
    draft: str | None = None
    """A smaller model of the same vocabulary, named like MODEL, that proposes tokens which MODEL then judges: the same
    distribution of texts, sooner where it is much faster and mostly right."""
    draft_tokens: int = 4
    """How many tokens the draft proposes at a time."""
    seed: int = 0
    """Of the first sample or answer; the next ones count up from it."""
    chat: bool = False
    """Talk with the model in this terminal, or by lines on stdin: /reset begins anew, /quit or Ctrl-D ends the chat,
    Ctrl-C the answer."""
    system: str | None = None
    """What the model is told about its role before a chat begins."""


def evaluate_command(arguments: Sequence[str]) -> int:
    """Runs `eval.py ARGUMENTS` and returns its exit code.

    0: done. 2: an error that the user can fix, printed in one line on stderr. 130: Ctrl-C.
    Raises SystemExit, after printing, for --help (0) and unknown or ill-typed arguments (2).
    """
    return exit_code(lambda: run(tyro.cli(Arguments, prog="eval.py", description=DESCRIPTION, args=list(arguments))))


def run(arguments: Arguments) -> None:
    """Loads, scores, samples, prints, writes. Raises SlmError."""
    from slm.data.cache import cache_folder
    from slm.training.compilation import enable_compilation_cache

    check(arguments)
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise SlmError(f"cannot write {arguments.json}: there is no folder {arguments.json.parent}")
    if arguments.compare:
        from slm.study.comparing import compare_runs

        table = compare_runs(arguments.compare, arguments.source, arguments.batch_size)
        print(table)
        if arguments.json is not None:
            arguments.json.write_text(table.json())
        return
    model = open_model(arguments.run, arguments.checkpoint)
    if arguments.quantize is not None:
        from slm.compress.quantize import quantize

        model = quantize(model, arguments.quantize, group_size=arguments.group_size, embedding=True)
    draft = None if arguments.draft is None else open_model(arguments.draft)
    if draft is not None:
        check_draft(model, draft)
    enable_compilation_cache(cache_folder(model.config.data.cache) / "xla")
    console = Console(highlight=False)
    console.print(Text(repr(model), style="dim"), soft_wrap=True)
    if arguments.chat:
        converse(model, settings_of(arguments, 512) | {"draft": draft}, arguments.system)
        return
    report: dict[str, Any] = {"run": arguments.run, "checkpoint": arguments.checkpoint}
    writes = arguments.prompt or arguments.prompts is not None
    if arguments.save is not None:
        console.print(f"written: {write(model, arguments.save)}", soft_wrap=True)
    if arguments.source is not None or not (writes or arguments.save):
        source, scores = score(model, arguments)
        console.print(score_table(source, scores))
        if "by_source" in scores:
            console.print(source_table(scores))
        if arguments.by_position:
            console.print(position_table(scores))
        report |= {"source": source} | scores
    if writes:
        report["samples"] = sample(model, arguments, draft)
        for one in report["samples"]:
            console.rule(f"seed {one['seed']}", style="dim")
            console.print(Text(one["prompt"], style="bold") + Text(one["text"], style="not bold"), soft_wrap=True)
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise SlmError(f"cannot write {arguments.json}: {error.strerror}") from error


def write(model: LanguageModel, path: Path) -> Path:
    """Saves the model as what the path names. Raises SlmError."""
    if path.suffix == ".gguf":
        from slm.interop.gguf_save import save_gguf

        return save_gguf(model, path)
    from slm.interop.saved import save

    save(model, path)
    return path


def score(model: LanguageModel, arguments: Arguments) -> tuple[str, dict[str, Any]]:
    """(name of what was scored, its scores); see slm.evaluation.bits_per_byte.evaluate_batches."""
    check_sizes(model, arguments.batch_size, arguments.sequence_length)
    name, evaluation = text_of(model, arguments.run, arguments.source, arguments.sequence_length)
    batches = track(
        evaluation.batches(arguments.batch_size),
        total=math.ceil(evaluation.sequences / arguments.batch_size),
        description=f"scoring {name}",
        console=Console(stderr=True),
        transient=True,
    )
    return name, evaluate_batches(
        eval_step_of(model), model.params, batches, by_position=arguments.by_position, sources=evaluation.sources
    )


def sample(model: LanguageModel, arguments: Arguments, draft: LanguageModel | None) -> list[dict[str, Any]]:
    """All samples of all prompts, in order: dicts of prompt, seed, text."""
    given = [*arguments.prompt, *(read_prompts(arguments.prompts) if arguments.prompts else ())]
    prompts = [prompt for prompt in given for _ in range(arguments.samples)]
    size, texts = arguments.batch_size, []
    starts, settings = range(0, len(prompts), size), settings_of(arguments, 128) | {"draft": draft}
    if len(starts) > 1:
        starts = track(starts, description="writing", console=Console(stderr=True), transient=True)
    for start in starts:
        # Row r of a call draws from stream seed + r, so that samples do not depend on how many are drawn at a time.
        texts += generate(model, prompts[start : start + size], **settings | {"seed": arguments.seed + start})
    return [
        {"prompt": prompt, "seed": arguments.seed + row, "text": text}
        for row, (prompt, text) in enumerate(zip(prompts, texts))
    ]


def settings_of(arguments: Arguments, length: int) -> dict[str, Any]:
    """What slm.generate takes, but for the draft; `length`: of a continuation if the user gave none."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "cache_dtype", "draft_tokens")
    chosen = length if arguments.max_new_tokens is None else arguments.max_new_tokens
    return {"max_new_tokens": chosen} | {name: getattr(arguments, name) for name in names}


def read_prompts(path: Path) -> list[str]:
    """The prompts in a file. Raises DataError if it cannot be read, is empty, or a line of FILE.jsonl has no prompt."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"{path} has no prompts: write one a line")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{path} line {number}: must be a JSON object with a field prompt") from error
        if not isinstance(prompts[-1], str):
            raise DataError(f"{path} line {number}: prompt must be a text")
    return prompts


def check(arguments: Arguments) -> None:
    """Raises SlmError for what contradicts itself, before a model is loaded."""
    if bool(arguments.run) == bool(arguments.compare):
        raise SlmError("which model? python eval.py MODEL, or python eval.py --compare MODEL MODEL ...")
    if arguments.compare:
        plain, goes = Arguments(), ("compare", "source", "json", "batch_size")
        for field in fields(Arguments):
            if field.name not in goes and getattr(arguments, field.name) != getattr(plain, field.name):
                raise SlmError(
                    f"--{field.name.replace('_', '-')} cannot go with --compare, which takes --source, --batch-size "
                    "and --json: leave it out"
                )
    if arguments.samples < 1:
        raise SlmError(f"--samples {arguments.samples}: must be at least 1")
    if arguments.batch_size < 1:
        raise SlmError(f"batch_size = {arguments.batch_size}: must be at least 1")
    asked = [("--prompt", arguments.prompt), ("--prompts", arguments.prompts), ("--source", arguments.source)]
    asked += [("--json", arguments.json)]
    if arguments.chat and (also := [name for name, value in asked if value]):
        raise SlmError(f"--chat cannot go with {also[0]}: leave one of them out")
    if arguments.draft is not None and not (arguments.chat or arguments.prompt or arguments.prompts):
        raise SlmError("--draft belongs to --prompt, --prompts or --chat: leave it out, or add one of them")
    if arguments.group_size is not None and arguments.quantize is None:
        raise SlmError("--group-size belongs to --quantize: leave it out, or say which grid")
    if arguments.system is not None and not arguments.chat:
        raise SlmError("--system belongs to --chat: leave it out, or add --chat")


def score_table(source: str, scores: dict[str, Any]) -> Table:
    """Scores for people; the headline first, which is accuracy for a synthetic task."""
    lines = {
        "bits per byte": _with_error(scores, "bits_per_byte"),
        "loss (nats/token)": _with_error(scores, "loss"),
        "perplexity": f"{scores['perplexity']:.4g}",
        "accuracy": _with_error(scores, "accuracy"),
        "exact match": f"{scores.get('exact_match', math.nan):.4f}",
        "scored": f"{scores['tokens']:,} tokens, {scores['bytes']:,} bytes, {scores['documents']:,} documents",
        "standard error over": f"{scores['stderr_clusters']:,} {scores['stderr_clustered_by']}s",
    }
    if "synthetic:" in source or "bits_per_byte" not in scores:
        del lines["bits per byte"]  # of answers alone, in a made-up vocabulary
        lines = {"accuracy": lines.pop("accuracy")} | lines
    if "exact_match" not in scores:
        del lines["exact match"]
    table = Table(title=source, title_justify="left", show_header=False)
    for row, (name, value) in enumerate(lines.items()):
        table.add_row(name, value, style="bold" if row == 0 else None)
    return table


def source_table(scores: dict[str, Any]) -> Table:
    """Loss and accuracy of each source."""
    table = Table("source", "loss (nats/token)", "accuracy", "exact match", title="by source", title_justify="left")
    for name, part in scores["by_source"].items():
        exact = f"{part['exact_match']:.4f}" if "exact_match" in part else ""
        table.add_row(Text(name), _with_error(part, "loss"), _with_error(part, "accuracy"), exact)
    return table


def position_table(scores: dict[str, Any]) -> Table:
    """Mean loss by tokens of context, in ranges that double."""
    table = Table("tokens of context", "loss (nats/token)", "tokens", title="loss by position", title_justify="left")
    losses, counts = scores["loss_by_position"], scores["tokens_by_position"]
    first = 1
    while first <= len(losses):
        last = min(2 * first - 1, len(losses))
        span = slice(first - 1, last)
        tokens = sum(counts[span])
        if tokens:
            nats = sum(loss * count for loss, count in zip(losses[span], counts[span]) if count)
            table.add_row(f"{first}" if first == last else f"{first}–{last}", f"{nats / tokens:.4f}", f"{tokens:,}")
        first = last + 1
    return table


def _with_error(scores: dict[str, Any], name: str) -> str:
    if name not in scores:
        return ""
    error = scores[f"{name}_stderr"]
    return f"{scores[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")
