"""Text that a teacher writes to train on: resumable, readable as a source, checked for copies of held-out text."""

import json

import jax
import pytest
from tiny_teacher import sharp

from slm.compress import sampled
from slm.compress.sampled import overlap, sample_teacher
from slm.config import DataConfig, Experiment, ModelConfig
from slm.data.pipeline import open_data
from slm.data.tokenizers import build_tokenizer
from slm.errors import ConfigError, DataError
from slm.interop.endpoint import Endpoint, Reply
from slm.models.language_model import LanguageModel
from slm.models.transformer import Transformer

PROMPTS = [f"number {i} ü: " for i in range(7)]


@pytest.fixture(scope="module")
def teacher():
    model = ModelConfig(vocab_size=257, layers=1, width=16, heads=2)
    params = sharp(Transformer(model).init(jax.random.key(0)))
    return LanguageModel(params, Experiment(name="teacher", model=model), build_tokenizer("bytes", list))


def write(teacher, path, **settings):
    return sample_teacher(teacher, PROMPTS, path, max_new_tokens=12, **settings)


def test_a_killed_writer_goes_on_with_the_same_text(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(sampled, "BATCH", 3)
    path = tmp_path / "samples.jsonl"
    report = write(teacher, path)
    whole = path.read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(row["text"].startswith(row["prompt"]) for row in rows)
    assert len({row["text"][12:] for row in rows}) > 3
    assert report["samples"] == 7
    assert json.loads((tmp_path / "samples.jsonl.report.json").read_text()) == report
    asked = []
    for cut in (whole[: whole.rindex("ü".encode()) + 1], whole[:-5], whole):
        path.write_bytes(cut)
        write(teacher, path, progress=lambda done, of: asked.append((done, of)))
        assert path.read_bytes() == whole
    assert asked == [(7, 7), (7, 7)]


def test_it_is_a_source(teacher, tmp_path):
    write(teacher, tmp_path / "samples.jsonl")
    cfg = DataConfig(source=(str(tmp_path / "samples.jsonl"),), validation_split="tail", validation_fraction=0.2,
                     sequence_length=8, cache=str(tmp_path / "cache"))  # fmt: skip
    data = open_data(cfg, 0)
    assert data.train_sequences > 3


def test_files_of_other_prompts_stay(teacher, tmp_path):
    path = tmp_path / "samples.jsonl"
    write(teacher, path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"line 1 of .* is no sample of prompt 1: name another file"):
        sample_teacher(teacher, PROMPTS[::-1], path)
    with pytest.raises(DataError, match="holds 7 samples, more than the 2 prompts"):
        sample_teacher(teacher, PROMPTS[:2], path)
    path.write_text('["no object"]\n')
    with pytest.raises(DataError, match="line 1 of"):
        sample_teacher(teacher, PROMPTS, path)
    assert before != path.read_bytes()


class Canned(Endpoint):
    """Answers without a server, and remembers what it was asked."""

    def chat(self, conversations, **settings):
        self.asked = [*getattr(self, "asked", []), settings]
        return [Reply(f"heard {messages[0]['content']}", "stop", None) for messages in conversations]


def test_an_endpoint_writes_too(tmp_path):
    endpoint = Canned("http://localhost:1/v1", "big", tmp_path / "replies.jsonl")
    sample_teacher(
        endpoint, ["a", "a"], tmp_path / "said.jsonl", max_new_tokens=5, seed=3, form="Q: {prompt}\nA: {reply}"
    )
    texts = [json.loads(line)["text"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert texts == ["Q: a\nA: heard a"] * 2
    assert sorted(endpoint.asked, key=lambda one: one["seed"]) == [
        {"temperature": 1.0, "max_tokens": 5, "seed": seed} for seed in (3, 4)
    ]
    with pytest.raises(ConfigError, match=r"is an address: say which model of it, with model=NAME"):
        sample_teacher("https://somewhere/v1", ["a"], tmp_path / "more.jsonl")


def test_copies_of_held_out_text_are_counted(teacher, tmp_path):
    held_out = ["the quick brown fox jumps over the lazy dog"]
    texts = ["a quick brown fox jumps far", "quick brown fox jumps over", "nothing"]
    found = overlap(texts, held_out, 4)
    # 3 runs of four words in the first, 2 in the second: of them "quick brown fox jumps" twice, "brown ... over" once.
    assert found == {"ngram": 4, "ngrams": 5, "overlap": 3 / 5, "copying": 2 / 3}
    assert overlap(texts, [], 4)["overlap"] == 0
    assert overlap([], held_out)["copying"] == 0
    report = write(teacher, tmp_path / "samples.jsonl", held_out=[PROMPTS[2] + "and"], ngram=2)
    assert report["copying"] == pytest.approx(1 / 7)


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([], {}, "prompts is empty"),
        (["a"], {"form": "{prompt}"}, r"form = '\{prompt\}' lacks \{reply\}"),
        (["a"], {"path": "samples.txt"}, "samples are JSON lines"),
    ],
)
def test_what_cannot_be_is_refused(teacher, tmp_path, prompts, changes, message):
    path = tmp_path / changes.pop("path", "samples.jsonl")
    with pytest.raises(ConfigError, match=message):
        sample_teacher(teacher, prompts, path, **changes)
    assert not path.exists()
