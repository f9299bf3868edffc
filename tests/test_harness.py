"""The adapter for lm-evaluation-harness: scores by hand, and a whole task from local files (where lm-eval is there)."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager

import slm
from slm.config import DataConfig, Experiment, ModelConfig
from slm.data.tokenizers import build_tokenizer
from slm.evaluation.harness import Harness
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer


@pytest.fixture(scope="module")
def model():
    cfg = ModelConfig(vocab_size=257, layers=2, width=32, heads=2)
    params = jax.tree.map(lambda x: 4 * x, Transformer(cfg).init(jax.random.key(0)))
    tokenizer = build_tokenizer("bytes", lambda: iter(()))
    return LanguageModel(params, Experiment(model=cfg, data=DataConfig(sequence_length=48)), tokenizer)


def log_probabilities(model, tokens):
    return np.asarray(jax.nn.log_softmax(slm.logits(model, jnp.asarray(tokens)[None])[0]), np.float64)


def request(*arguments):
    return SimpleNamespace(args=arguments)


def test_log_likelihoods_are_sums_of_log_softmax(model):
    pairs = [("the cat", " sat"), ("", "hello"), ("a b", " c"), ("x" * 70, " yes"), ("the", " end of it")]
    found = Harness(model, batch_size=2).loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found):
        tokens = [256] * (not context) + list((context + continuation).encode())
        tokens = tokens[-49:]
        table = log_probabilities(model, tokens[:-1])
        last = range(len(tokens) - 1 - len(continuation), len(tokens) - 1)
        assert score == pytest.approx(sum(table[i, tokens[i + 1]] for i in last), abs=1e-4)
        assert greedy == all(table[i].argmax() == tokens[i + 1] for i in last)


def test_rolling_scores_count_every_token_once(model):
    text = "".join(chr(97 + i * 7 % 26) for i in range(100))
    (found,) = Harness(model).loglikelihood_rolling([request(text)], disable_tqdm=True)
    tokens, total, start = [256, *text.encode()], 0.0, 0
    while start < len(text):
        end = min(start + 48, len(text))
        # The last window takes as much of what was before it as fits.
        first = max(end - 48, 0)
        table = log_probabilities(model, tokens[first:end])
        total += sum(table[i - first, tokens[i + 1]] for i in range(start, end))
        start = end
    assert found == pytest.approx(total, abs=1e-3)


def test_generation_stops_where_it_is_told(model):
    free, stopped = Harness(model).generate_until(
        [request("abc", {"until": [], "max_gen_toks": 12}), request("abc", {"until": ["q"], "max_gen_toks": 12})],
        disable_tqdm=True,
    )
    assert free == slm.generate(model, "abc", max_new_tokens=12, temperature=0.0)
    assert stopped == free.split("q")[0]


def test_a_task_from_local_files(model, tmp_path):
    rows = [{"question": "2 + 2 =", "choices": [" 4", " five"], "answer": 0}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: answer\n"
        "doc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    )
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    report = lm_eval.simple_evaluate(model=Harness(model), tasks=["sums"], task_manager=tasks, bootstrap_iters=0)
    table = log_probabilities(model, list(b"2 + 2 = 4")[:-1])
    right = sum(table[i, b"2 + 2 = 4"[i + 1]] for i in (6, 7))
    other = list(b"2 + 2 = five")
    table = log_probabilities(model, other[:-1])
    wrong = sum(table[i, other[i + 1]] for i in range(6, 11))
    assert report["results"]["sums"]["acc,none"] == float(right > wrong)
