"""The whole TFDS path without a network and without TensorFlow, in processes of its own."""

import subprocess
import sys

import pytest

READ = """
import json, sys
from slm.config import DataConfig
from slm.data.sources import open_source
from slm.errors import DataError
answers = []
for spec, settings in json.loads(sys.argv[1]):
    try:
        source = open_source(spec, DataConfig(**settings))
        texts = list(source.documents())
        answers.append([len(texts), sorted(texts)[0], source.fingerprint])
    except DataError as error:
        answers.append(str(error))
assert "tensorflow" not in sys.modules
print(json.dumps(answers))
"""


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


def read(*requests):
    import json

    result = python("-c", READ, json.dumps(requests))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def prepare_text(folder, data_dir):
    return python("-m", "slm.data.tfds_builders", "text", str(folder), "--data-dir", str(data_dir))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    (root / "my texts").mkdir()
    for name, text in {"a.txt": "Grüße", "b.md": "two", "empty.txt": ""}.items():
        (root / "my texts" / name).write_text(text)
    result = prepare_text(root / "my texts", root / "data")
    assert result.returncode == 0, result.stderr
    assert "tfds:text_folder/my_texts/train" in result.stdout
    return root


def test_text_folder_and_everything_that_can_be_wrong(prepared):
    here = {"tfds_dir": str(prepared / "data")}
    whole, part, split, field, unprepared, unknown, shapeless, config = read(
        ("tfds:text_folder/my_texts/train", here),
        ("tfds:text_folder/my_texts/train[:50%]", here),
        ("tfds:text_folder/my_texts/test", here),
        ("tfds:text_folder/my_texts/train", {**here, "text_field": "body"}),
        ("tfds:ag_news_subset/train", here),
        ("tfds:ag_news_subsett/train", here),
        ("tfds:mnist", here),
        ("tfds:text_folder/other/train", here),
    )
    assert whole[:2] == [2, "Grüße"]
    assert part[0] == 1
    assert part[2] != whole[2]
    assert "no split 'test'; it has train" in split
    assert "no field 'body'; it has name, text" in field
    assert "is not prepared in" in unprepared
    assert "data.download" in unprepared
    assert "did you mean ag_news_subset?" in unknown
    assert "write tfds:NAME/SPLIT" in shapeless
    assert "python -m slm.data.tfds_builders text FOLDER" in config


def test_preparing_again_is_safe_and_other_content_is_refused(prepared):
    again = prepare_text(prepared / "my texts", prepared / "data")
    assert again.returncode == 0, again.stderr
    (prepared / "elsewhere" / "my texts").mkdir(parents=True)
    (prepared / "elsewhere" / "my texts" / "a.txt").write_text("other")
    other = prepare_text(prepared / "elsewhere" / "my texts", prepared / "data")
    assert other.returncode == 2
    assert "was prepared from other files" in other.stderr
    assert "Traceback" not in other.stderr


def test_cpython_corpus_prepares_itself(prepared):
    here = {"tfds_dir": str(prepared / "data")}
    through_tfds, direct = read(("tfds:cpython_corpus/train", here), ("cpython", {}))
    assert through_tfds[0] == direct[0] > 300
    assert through_tfds[1] == direct[1]
    assert through_tfds[2] != direct[2]
    assert read(("tfds:cpython_corpus/train", here))[0] == through_tfds  # prepared now, and read as it lies
