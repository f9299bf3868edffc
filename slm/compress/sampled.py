"""Text written by a teacher, to train on: sequence-level distillation (Kim & Rush 2016), for which teacher and student
need no common tokens.

    slm.sample_teacher("teachers/big", prompts, "samples.jsonl", held_out=texts)
    python train.py configs/student.py --data.source samples.jsonl
"""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slm.errors import ConfigError, DataError
from slm.models.language_model import LanguageModel

BATCH = 32
"""Prompts that the teacher continues at once."""


def sample_teacher(
    teacher: Any,
    prompts: Sequence[str],
    path: str | Path,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float | None = None,
    seed: int = 0,
    form: str = "{prompt}{reply}",
    model: str | None = None,
    held_out: Iterable[str] = (),
    ngram: int = 8,
    progress: Callable[[int, int], None] = lambda done, prompts: None,
) -> dict[str, float]:
    """Writes one JSON line {"text", "prompt"} for each prompt, which data.source reads; goes on where it stopped.

    Args:
      teacher: a LanguageModel, the path of one, an slm.interop.endpoint.Endpoint, or the address of one
        (https://.../v1), whose replies are kept beside `path`.
      prompts: beginnings of texts; for an endpoint, what is said to it.
      path: a .jsonl file.
      max_new_tokens, temperature, top_p: of the samples.
      seed: sample i is drawn from stream seed + i, whatever was drawn before.
      form: of "text", made of {prompt} and {reply}.
      model: name of the model behind an address.
      held_out: texts that the student will be judged by.
      ngram: words in a row that count as copied where held-out text has them too.
      progress: called with (samples done, prompts).

    Returns:
      What `overlap` says of the file, and "samples". It is also written to PATH.report.json.

    Raises:
      ConfigError: no prompt, no .jsonl, or an address without `model`.
      DataError: the file holds answers to other prompts, or the endpoint fails.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ConfigError(f"path = {str(path)!r}: samples are JSON lines, which data.source knows by .jsonl")
    if not prompts:
        raise ConfigError("prompts is empty: give at least one beginning of a text")
    if "{reply}" not in form:
        raise ConfigError(f"form = {form!r} lacks {{reply}}: the teacher's text would be lost")
    settings = {"temperature": temperature, "top_p": top_p}
    write = _writer(teacher, model, path, max_new_tokens, {k: v for k, v in settings.items() if v is not None}, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _written(path, prompts)
    with open(path, "a", encoding="utf-8") as file:
        while done < len(prompts):
            some = prompts[done : done + BATCH]
            for prompt, reply in zip(some, write(some, done), strict=True):
                text = form.format(prompt=prompt, reply=reply)
                file.write(json.dumps({"text": text, "prompt": prompt}, ensure_ascii=False) + "\n")
            file.flush()
            done += len(some)
            progress(done, len(prompts))
    report = {"samples": done} | overlap((json.loads(line)["text"] for line in _lines(path)), held_out, ngram)
    path.with_name(path.name + ".report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def overlap(texts: Iterable[str], held_out: Iterable[str], ngram: int = 8) -> dict[str, float]:
    """How much of some texts stands in others too.

    Returns:
      {"ngram", "ngrams": runs of so many words in `texts`, "overlap": share of them that `held_out` has, "copying":
      share of the texts that have any of these}.
    """
    known = {run for text in held_out for run in _runs(text, ngram)}
    counts = [(sum(run in known for run in runs), len(runs)) for runs in (_runs(text, ngram) for text in texts)]
    found, total = (sum(column) for column in zip(*counts)) if counts else (0, 0)
    return {
        "ngram": ngram,
        "ngrams": total,
        "overlap": found / max(total, 1),
        "copying": sum(one > 0 for one, _ in counts) / max(len(counts), 1),
    }


def _runs(text: str, n: int) -> list[int]:
    words = text.split()
    return [hash(tuple(words[i : i + n])) for i in range(len(words) - n + 1)]


def _writer(teacher, model, path, max_new_tokens, settings, seed) -> Callable[[Sequence[str], int], Sequence[str]]:
    """(prompts, number of the first) -> replies."""
    from slm.evaluation.generate import generate
    from slm.evaluation.opening import open_model
    from slm.interop.endpoint import Endpoint

    if isinstance(teacher, str) and teacher.startswith(("http://", "https://")):
        if model is None:
            raise ConfigError(f"teacher = {teacher!r} is an address: say which model of it, with model=NAME")
        teacher = Endpoint(teacher, model, path.with_name(path.name + ".replies.jsonl"))
    if isinstance(teacher, Endpoint):

        def ask(prompts, first):
            # A seed of its own for each sample: the same prompt twice is two questions, and two lines of the cache.
            def one(prompt, number):
                how = settings | {"max_tokens": max_new_tokens, "seed": number}
                return teacher.chat([[{"role": "user", "content": prompt}]], **how)[0].text

            with ThreadPoolExecutor(teacher.workers) as pool:
                return list(pool.map(one, prompts, range(seed + first, seed + first + len(prompts))))

        return ask
    opened = teacher if isinstance(teacher, LanguageModel) else open_model(teacher)
    return lambda prompts, first: generate(opened, list(prompts), max_new_tokens, seed=seed + first, **settings)


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _written(path: Path, prompts: Sequence[str]) -> int:
    """Samples that are in the file, from which a line that was cut off is removed."""
    lines = _lines(path)
    if path.exists():
        whole = b"".join(line + b"\n" for line in lines)
        if len(whole) < path.stat().st_size:
            path.write_bytes(whole)
    if len(lines) > len(prompts):
        raise DataError(f"{path} holds {len(lines)} samples, more than the {len(prompts)} prompts: name another file")
    for number, (line, prompt) in enumerate(zip(lines, prompts)):
        try:
            found = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            found = None
        if found != prompt:
            raise DataError(f"line {number + 1} of {path} is no sample of prompt {number + 1}: name another file")
    return len(lines)
