"""Tasks of EleutherAI's lm-evaluation-harness on an slm model: the adapter that `lm_eval.simple_evaluate` takes.

    from slm.evaluation.harness import Harness
    lm_eval.simple_evaluate(model=Harness(model), tasks=["arc_easy"])

Needs lm-eval (`pip install lm-eval`), so nothing else imports this file.
"""

from collections.abc import Sequence
from typing import Any

import lm_eval.utils
import numpy as np
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from slm.errors import ConfigError
from slm.evaluation.bits_per_byte import eval_step_of
from slm.evaluation.generate import generate
from slm.models.language_model import LanguageModel

BUCKET = 64
"""Rows are padded to multiples of this many tokens, so that near lengths share a compilation."""


class Harness(TemplateLM):
    """loglikelihood, loglikelihood_rolling and generate_until of a decoder.

    Documents begin with the end-of-text token, as in training here. Contexts longer than `max_length` lose their
    beginning, as in the harness's own models.
    """

    def __init__(self, model: LanguageModel, batch_size: int = 8, max_length: int | None = None):
        """Raises ConfigError for a model whose tokenizer has no token to begin a document with."""
        super().__init__()
        if model.tokenizer is None or model.tokenizer.end_of_text is None:
            raise ConfigError("the harness needs a tokenizer with an end-of-text token")
        self.model, self.batch_size = model, batch_size
        self.max_length = max_length or model.config.data.sequence_length

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of the text; what looks like a marker of a chat is one."""
        return [int(i) for i in self.model.tokenizer.encode(string, markers=True)]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any) -> list[tuple[float, bool]]:
        return self.score([(context, continuation) for _, context, continuation in requests], not disable_tqdm)

    def score(self, pairs: Sequence[tuple[list[int], list[int]]], progress: bool = False) -> list[tuple[float, bool]]:
        """(sum of log p of the continuation, whether greedy decoding would give it) of (context, continuation) ids."""
        rows = []
        for context, continuation in pairs:
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            rows.append((tokens, min(len(continuation), len(tokens) - 1)))
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        step = eval_step_of(self.model)
        for start in tqdm(range(0, len(order), self.batch_size), disable=not progress, desc="scoring"):
            group = order[start : start + self.batch_size]
            scores = step(self.model.params, self._batch([rows[i][0] for i in group]))
            nats, correct = (np.asarray(scores[name], np.float64) for name in ("nats", "correct"))
            for row, i in enumerate(group):
                tokens, scored = rows[i]
                where = slice(len(tokens) - 1 - scored, len(tokens) - 1)
                found[i] = -float(nats[row, where].sum()), bool(correct[row, where].all())
        return found

    def _batch(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
        longest = max(len(tokens) - 1 for tokens in rows)
        B, T = self.batch_size, -(-longest // BUCKET) * BUCKET
        batch = {name: np.zeros((B, T), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        batch["positions"][:] = np.arange(T)
        for row, tokens in enumerate(rows):
            n = len(tokens) - 1
            batch["tokens"][row, :n], batch["targets"][row, :n] = tokens[:-1], tokens[1:]
            batch["segment_ids"][row, :n] = 1
        return batch

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of max_length that do not overlap."""
        pairs, owners = [], []
        for number, request in enumerate(requests):
            windows = lm_eval.utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(lm_eval.utils.make_disjoint_window, windows):
                pairs.append(window)
                owners.append(number)
        totals = np.zeros(len(requests))
        np.add.at(totals, owners, [score for score, _ in self.score(pairs, not disable_tqdm)])
        return [float(total) for total in totals]

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its stop strings."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for group in groups.values():
            settings = requests[group[0]].args[1]
            until = settings.get("until") or ()
            most = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256)
            sampling = {"temperature": 0.0}
            if settings.get("do_sample"):
                sampling = {"temperature": float(settings.get("temperature", 1.0)), "top_p": settings.get("top_p")}
            for start in tqdm(range(0, len(group), self.batch_size), disable=disable_tqdm, desc="writing"):
                rows = group[start : start + self.batch_size]
                prompts = [self._end(requests[i].args[0], most) for i in rows]
                stop = (until,) if isinstance(until, str) else tuple(until)
                new = generate(self.model, prompts, max_new_tokens=most, stop=stop, **sampling)
                for i, text in zip(rows, new, strict=True):
                    texts[i] = text
        return texts

    def _end(self, prompt: str, most: int) -> str:
        """As much of the prompt's end as leaves room for `most` tokens."""
        room = max(self.max_length - most - 1, 1)
        ids = self.model.tokenizer.encode(prompt)
        return prompt if len(ids) <= room else self.model.tokenizer.decode(ids[-room:])
