"""TFDS data sets by name, read at random from ArrayRecord files, without TensorFlow."""

from collections.abc import Iterator
from typing import Any

from slm.config import DataConfig
from slm.data.cache import digest
from slm.data.files import missing_field
from slm.data.sources import Source
from slm.errors import DataError


def tfds_source(spec: str, data: DataConfig) -> Source:
    """Opens `tfds:NAME/SPLIT`. What is not prepared is downloaded only with data.download.

    `tfds:cpython_corpus/train` prepares itself, needing no network.
    Raises DataError for an unknown name, split or field, and for data that is not there or not in ArrayRecord format.
    """
    name, _, split = spec.removeprefix("tfds:").rpartition("/")
    if not name or not split:
        raise DataError(f"{spec}: write tfds:NAME/SPLIT, such as tfds:cpython_corpus/train")
    import tensorflow_datasets as tfds

    builder = _builder(spec, name, data)
    if not builder.is_prepared():
        _prepare(spec, builder, data)
        builder = _builder(spec, name, data)  # one that waited for another process knows nothing of its result
    try:
        records = builder.as_data_source(split=split)
    except NotImplementedError as error:  # prepared earlier, as tfrecord
        raise DataError(
            f"{spec}: {builder.data_path} is not in ArrayRecord format; prepare it again with "
            "file_format='array_record', or give another data.tfds_dir"
        ) from error
    except (ValueError, KeyError) as error:
        splits = ", ".join(builder.info.splits) or "none"
        raise DataError(f"{spec}: no split '{split}'; it has {splits}") from error
    fields = sorted(builder.info.features)
    if data.text_field not in fields:
        raise DataError(missing_field(spec, data.text_field, fields))
    if not isinstance(builder.info.features[data.text_field], tfds.features.Text):
        raise DataError(f"{spec}: field '{data.text_field}' is not text")
    return Source(spec, _fingerprint(builder, split, data.text_field), lambda: _read(spec, records, data.text_field))


def _builder(spec: str, name: str, data: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    from slm.data import tfds_builders  # importing registers them with TFDS

    if name == tfds_builders.CpythonCorpus.name:  # else TFDS takes whichever Python's it finds on disk
        name += f"/{tfds_builders.CPYTHON_CONFIG}"
    try:
        return tfds.builder(name, data_dir=data.tfds_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        near = _nearest(name.split("/")[0])
        hint = f"; did you mean {near}?" if near else ""
        raise DataError(f"{spec}: TFDS knows no data set '{name}'{hint}") from error
    except DataError as error:  # only a folder's path can make a TextFolder
        command = f"python -m slm.data.tfds_builders text FOLDER --data-dir {data.tfds_dir or 'DIR'}"
        raise DataError(f"{spec} is not prepared: run `{command}`, and name it as that says") from error
    except (ValueError, AssertionError) as error:  # an unknown config or version
        reason = str(error).strip().splitlines()[0].split('}": ')[-1]
        raise DataError(f"{spec}: {reason}") from error


def _nearest(name: str) -> str | None:
    import difflib

    import tensorflow_datasets as tfds

    near = difflib.get_close_matches(name, tfds.core.registered.list_imported_builders(), n=1)
    return near[0] if near else None


def _prepare(spec: str, builder: Any, data: DataConfig) -> None:
    from slm.data import tfds_builders

    if isinstance(builder, tfds_builders.CpythonCorpus):
        tfds_builders.prepare(builder)
        return
    if not data.download:
        raise DataError(
            f"{spec} is not prepared in {builder.data_path}: set data.download to let TFDS download it, "
            "or data.tfds_dir to the folder where it is"
        )
    try:
        builder.download_and_prepare()
    except Exception as error:  # whatever a server, a parser of the data set, or the disk may raise
        raise DataError(f"{spec}: TFDS could not prepare it: {type(error).__name__}: {str(error)[:300]}") from error


def _fingerprint(builder: Any, split: str, text_field: str) -> str:
    files = sorted((path.name, path.stat().length) for path in builder.data_path.iterdir())
    return digest(builder.info.full_name, sorted(dict(builder.info.metadata or {}).items()), files, split, text_field)


def _read(spec: str, records: Any, text_field: str) -> Iterator[str]:
    for number in range(len(records)):
        try:
            yield records[number][text_field].decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{spec}: record {number} is not UTF-8 (byte {error.start})") from error
