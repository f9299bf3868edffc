"""The CPython corpus and text folders as real TFDS data sets, so that the TFDS path can be walked without a network.

    python -m slm.data.tfds_builders cpython --data-dir D         then read   tfds:cpython_corpus/train
    python -m slm.data.tfds_builders text FOLDER --data-dir D     then read   tfds:text_folder/NAME/train

NAME is the folder's name. ArrayRecord needs no TensorFlow (tfrecord, TFDS's default, would).
Importing this module registers both with TFDS.
"""

import argparse
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from slm.config import DataConfig
from slm.data.cache import disk_errors, locked
from slm.data.cpython import cpython_documents, cpython_source
from slm.data.files import folder_paths, read_text
from slm.data.sources import open_source
from slm.errors import DataError, SlmError

# One config a Python version: its library is another data set, and TFDS tells configs apart on disk.
CPYTHON_CONFIG = platform.python_version()


def _describe(builder: tfds.core.DatasetBuilder, description: str, fingerprint: str) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict({"name": tfds.features.Text(), "text": tfds.features.Text()}),
        metadata=tfds.core.MetadataDict({"fingerprint": fingerprint}),
    )


class CpythonCorpus(tfds.core.GeneratorBasedBuilder):
    """Documentation topics and standard library of the running interpreter: `cpython_corpus`, split `train`."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=CPYTHON_CONFIG, description="named by Python version")]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return _describe(self, "Help topics and library sources of CPython.", cpython_source().fingerprint)

    def _split_generators(self, dl_manager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        for name, text in cpython_documents():
            if text:
                yield name, {"name": name, "text": text}


class TextFolder(tfds.core.GeneratorBasedBuilder):
    """The text files of one folder: `text_folder/NAME`, split `train`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, path: str | Path | None = None, config=None, **kwargs):
        """Raises DataError without `path`: TFDS then looks for data that nobody has prepared."""
        if path is None:
            raise DataError("text_folder is prepared from a folder: slm.data.tfds_builders.prepare_text(FOLDER)")
        self._path = Path(path).expanduser().resolve()
        name = re.sub(r"[^\w+.-]", "_", self._path.name)
        super().__init__(config=config or tfds.core.BuilderConfig(name=name, description="named by folder"), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _describe(self, f"Text files of the folder {self._path.name}.", self.source_fingerprint())

    def source_fingerprint(self) -> str:
        return open_source(str(self._path), DataConfig()).fingerprint

    def _split_generators(self, dl_manager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict]]:
        for path in folder_paths(self._path):
            name = str(path.relative_to(self._path))
            if text := read_text(path):
                yield name, {"name": name, "text": text}


def prepare(builder: CpythonCorpus | TextFolder) -> str:
    """Writes the builder's data set unless it is there; returns the spec that reads it.

    Raises DataError if the one that is there was made from other files, or the disk is full.
    """
    folder = Path(builder.data_dir)
    with disk_errors(folder), locked(folder.parent / f"{builder.name}-{folder.name}"):
        builder.download_and_prepare()
    return f"tfds:{builder.name}/{builder.builder_config.name}/train"


def prepare_text(folder: str | Path, data_dir: str | Path | None = None) -> str:
    """Prepares `text_folder/NAME` from a folder of text files; returns the spec that reads it.

    Raises DataError if the folder holds no text, or if NAME is there already with other content.
    """
    if not Path(folder).expanduser().is_dir():
        raise DataError(f"no folder {folder}")
    builder = TextFolder(path=folder, data_dir=data_dir, file_format="array_record")
    made_from = dict(builder.info.metadata or {}).get("fingerprint")
    if builder.is_prepared() and made_from != builder.source_fingerprint():
        raise DataError(
            f"{builder.data_dir} was prepared from other files than those now in {folder}: "
            "remove it, rename the folder, or give another data dir"
        )
    return prepare(builder)


def prepare_cpython(data_dir: str | Path | None = None) -> str:
    """Prepares `cpython_corpus`; returns the spec that reads it."""
    return prepare(CpythonCorpus(data_dir=data_dir, file_format="array_record"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m slm.data.tfds_builders", description="Prepare a TFDS data set.")
    corpora = parser.add_subparsers(dest="corpus", required=True)
    for name, meaning in (("cpython", "help topics and standard library"), ("text", "the text files of a folder")):
        command = corpora.add_parser(name, help=meaning)
        if name == "text":
            command.add_argument("folder")
        command.add_argument("--data-dir", help="folder of prepared data sets (default: TFDS's own)")
    arguments = parser.parse_args()
    try:
        if arguments.corpus == "cpython":
            spec = prepare_cpython(arguments.data_dir)
        else:
            spec = prepare_text(arguments.folder, arguments.data_dir)
    except SlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    where = f" --data.tfds-dir {arguments.data_dir}" if arguments.data_dir else ""
    print(f"prepared: use --data.source {spec}{where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
