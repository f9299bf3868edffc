"""Chat templates render as transformers renders them, and a foreign template cannot do harm."""

import dataclasses
import datetime
import json
import os
import time

import pytest
from oracle.weights import ORACLE
from tiny_talker import SETTINGS, random_talker

from slm.config import Experiment
from slm.errors import CheckpointError, ConfigError, DataError
from slm.evaluation import chat, rendering
from slm.evaluation.borders import end_ids, prompt_ids
from slm.evaluation.generate import generate_tokens, make_sampling
from slm.models.language_model import LanguageModel, Origin

RECORD = json.loads((ORACLE / "chats.json").read_text())
USER = [{"role": "user", "content": "Hi"}]


def with_files(folder, model=None, config=None, **files):
    """A model whose folder holds these files: a dict becomes JSON; FILE_json is FILE.json, FILE_jinja FILE.jinja."""
    paths = {}
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        path = folder / f"{stem}.{ending}"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        paths[path.name] = str(path)
    model = model or LanguageModel(None, Experiment(name="toy"), None)
    return dataclasses.replace(model, origin=Origin("llama", config or {}, "float32", paths))


def with_template(folder, template, **tokens):
    return with_files(folder, tokenizer_config_json={"chat_template": template, **tokens})


@pytest.mark.parametrize("name", RECORD["templates"])
def test_renderings_are_those_of_transformers(name, tmp_path):
    model = with_files(tmp_path, tokenizer_config_json=RECORD["templates"][name])
    cases = [case for case in RECORD["renderings"] if case["template"] == name]
    assert len(cases) >= 6
    for case in cases:
        messages = RECORD["chats"][case["chat"]]
        how = {"add_generation_prompt": case["add_generation_prompt"], "variables": case["variables"]}
        if "error" in case:
            with pytest.raises(DataError, match=case["error"]):
                chat.render(model, messages, **how)
        else:
            assert chat.render(model, messages, **how) == case["text"]
    assert len({case.get("text") for case in cases}) >= 4


def test_today_is_known_to_templates(tmp_path):
    model = with_files(tmp_path, tokenizer_config_json=RECORD["templates"]["llama3.2"])
    before = datetime.datetime.now().strftime("%d %b %Y")
    text = chat.render(model, USER)
    assert any(f"Today Date: {day}\n" in text for day in (before, datetime.datetime.now().strftime("%d %b %Y")))


def test_where_templates_are_found(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain {{ bos_token }}"}]
    settings = {"chat_template": named, "bos_token": {"content": "<s>", "lstrip": False}, "eos_token": None}
    assert chat.render(with_files(tmp_path, tokenizer_config_json=settings), USER) == "plain <s>"
    both = with_files(tmp_path, tokenizer_config_json=settings, chat_template_jinja="file {{ bos_token }}")
    assert chat.render(both, USER) == "file <s>"  # as in transformers, the file wins


@pytest.mark.parametrize("settings", [None, {}, {"chat_template": None}, {"chat_template": []}])
def test_a_model_without_a_template_is_told_so(settings, tmp_path):
    model = with_files(tmp_path, **({} if settings is None else {"tokenizer_config_json": settings}))
    with pytest.raises(ConfigError, match=r"toy has no chat template.*prompt to continue"):
        chat.render(model, USER)
    with pytest.raises(ConfigError, match="no chat template"):
        chat.render(dataclasses.replace(model, origin=None), USER)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
        ({"chat_template": 3}, "must be a text"),
        ("[" * 9999, "not JSON"),
    ],
)
def test_damaged_settings_are_named(content, message, tmp_path):
    with pytest.raises(CheckpointError, match=rf"tokenizer_config.json.*{message}"):
        chat.render(with_files(tmp_path, tokenizer_config_json=content), USER)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only\n verse') }}", "only verse"),
        ("{{ messages[7].content }}", "no element 7|UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        ("{% include 'x' %}", "TypeError|no loader"),
        ("{{ 'a' * 10**10 }}", "MiB"),
        ("{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "MiB"),
        ("{{ 'a' * 5000000 }}", "5,000,000 characters, more than"),
    ],
)
def test_bad_and_hostile_templates_end_in_one_error(template, message, tmp_path):
    with pytest.raises(DataError, match=f"chat template .*({message})") as found:
        chat.render(with_template(tmp_path, template), USER)
    assert "\n" not in str(found.value)


def test_a_template_that_loops_is_stopped_and_the_next_call_works(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 3.0)
    nested = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    render = rendering.Renderer("{% if slow %}" + nested + "{% endif %}done")
    began = time.monotonic()
    with pytest.raises(DataError, match="took more than 3 seconds"):
        render({"slow": True})
    assert time.monotonic() - began < 30
    assert render({"slow": False}) == "done"


def test_the_template_has_a_process_of_its_own_without_our_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SLM_SECRET", "hush")
    render = rendering.Renderer("{{ x }}")
    assert render({"x": 1}) == "1"
    child = render._child
    assert child.pid != os.getpid()
    if os.path.exists(f"/proc/{child.pid}/environ"):
        with open(f"/proc/{child.pid}/environ", "rb") as file:
            assert b"hush" not in file.read()
    assert render({"x": 2}) == "2"
    assert render._child is child
    del render
    assert child.poll() is not None  # gone with its renderer


def test_messages_must_be_plain(tmp_path):
    model = with_template(tmp_path, "{{ messages[0].content }}")
    with pytest.raises(DataError, match="must be dicts"):
        chat.render(model, ["Hi"])
    with pytest.raises(DataError, match="what JSON has"):
        chat.render(model, [{"role": "user", "content": object()}])


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model of bytes with ChatML's markers, which ends texts with <|endoftext|> and turns with <|im_end|>."""
    return with_files(tmp_path_factory.mktemp("talker"), random_talker(), tokenizer_config_json=SETTINGS)


def test_a_reply_continues_the_rendered_chat_until_the_turn_ends(talker):
    ids = chat.encode(talker, USER)
    assert ids.tolist() == [257, *b"user\nHi", 258, *b"\n", 257, *b"assistant\n"]
    assert set(chat.reply_ends(talker)) == {256, 258}
    (want,) = generate_tokens(
        talker.transformer,
        talker.params,
        [ids],
        max_new_tokens=300,
        sampling=make_sampling(3.0),
        end_of_text=[256, 258],
    )
    free, *_ = generate_tokens(
        talker.transformer, talker.params, [ids], max_new_tokens=300, sampling=make_sampling(3.0), end_of_text=256
    )
    assert len(want) < len(free)  # the turn's end matters
    text = "".join(chat.reply(talker, USER, max_new_tokens=300, temperature=3.0))
    assert text == talker.tokenizer.decode(want)


@pytest.mark.parametrize(
    ("stored", "config", "ends"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 9}, (5,)),
        ({"eos_token_id": [5, 7, 5]}, {}, (5, 7)),
        ({}, {"eos_token_id": 9}, (9,)),
        (None, {"eos_token_id": [9, 3]}, (9, 3)),
        (None, {}, (256,)),
        ({"eos_token_id": -1}, {}, ()),
    ],
)
def test_which_ids_end_a_text(talker, tmp_path, stored, config, ends):
    files = {} if stored is None else {"generation_config_json": stored}
    assert end_ids(with_files(tmp_path, talker, config, **files)) == ends
    assert end_ids(dataclasses.replace(talker, origin=None)) == (256,)


def test_damaged_ends_are_named(talker, tmp_path):
    with pytest.raises(CheckpointError, match="eos_token_id = 'x' must be"):
        end_ids(with_files(tmp_path, talker, generation_config_json={"eos_token_id": "x"}))


def test_a_model_from_elsewhere_begins_as_its_tokenizer_says(talker, tmp_path):
    from tokenizers.processors import TemplateProcessing

    assert prompt_ids(talker, "ab").tolist() == [97, 98]
    assert prompt_ids(talker, "").tolist() == [256]
    assert prompt_ids(dataclasses.replace(talker, origin=None), "ab").tolist() == [256, 97, 98]
    tokenizer = type(talker.tokenizer)(type(talker.tokenizer.backend).from_str(talker.tokenizer._json))
    tokenizer.backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 257), ("<|im_end|>", 258)]
    )
    assert prompt_ids(dataclasses.replace(talker, tokenizer=tokenizer), "ab").tolist() == [257, 97, 98]


def test_no_tokenizer_is_told(talker):
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        list(chat.reply(dataclasses.replace(talker, tokenizer=None), USER))
