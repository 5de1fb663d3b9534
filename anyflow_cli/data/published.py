"""Published data sets as sources of samples: recognized by their files, indexed once, read where they are.

    index-KEY/      index.json, rows.npy, shapes.npy: the samples of every file; KEY follows from the files
    text-KEY/       embeddings that the data set lacks: of the negative prompt, of captions without text

Both are in a directory beside the run, never in the data set's own. The index is what random access needs;
it is built by one process and read by the others. Files that change make another key, hence a new index.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from anyflow_cli.data.published_formats import (
    DOWNLOAD,
    PUBLISHED_FORMATS,
    FileIndex,
    PublishedFormat,
    PublishedSample,
)
from anyflow_cli.data.shards import (
    MANIFEST,
    PROVENANCE,
    AxisSize,
    CorruptSampleError,
    LatentSample,
    Natural,
    StoredShape,
    tensor_problem,
)
from anyflow_cli.data.storage import PARALLEL_REQUESTS, Storage
from anyflow_cli.errors import UsageError
from anyflow_cli.utils.files import atomic_directory, atomic_write, json_sha256, write_json
from anyflow_cli.utils.records import read_record

INDEX_RECORD, INDEX_ARRAYS = "index.json", ("rows.npy", "shapes.npy")
KEY_LENGTH = 16  # of hashes in names
CAPTIONS_PER_FILE = 256
FILES_PER_LINE = 500  # of the log
MAX_TRIED = 16
REBUILD = "Remove it; the next start makes it again."

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSide:
    """What a data set lacks and the model of a recipe supplies.

    Attributes:
        cache: Directory for the index and for embeddings.
        mean: Mean of each latent channel, by the VAE.
        std: Standard deviation of each latent channel.
        embed: Embeds batches of captions, (L, D) each without padding; loads the text encoder once.
        encoder: What the embeddings follow from besides the captions, e.g. the text encoder's address.
        negative_prompt: The recipe's.
    """

    cache: Path
    mean: Sequence[float]
    std: Sequence[float]
    embed: Callable[[Iterable[Sequence[str]]], Iterator[list[Tensor]]]
    encoder: str
    negative_prompt: str


class PublishedFiles(NamedTuple):
    """A published data set before it is indexed: its format, and bytes of its files by name."""

    storage: Storage
    kind: PublishedFormat
    sizes: Mapping[str, int]

    @property
    def sha256(self) -> str:
        """Hash of what tells data sets apart without reading them: names and sizes."""
        return json_sha256([self.kind.title, dict(self.sizes)])

    def first_shapes(self) -> list[StoredShape]:
        """Latent shapes in the first file of each folder, the largest first; other files are not opened.

        Raises:
            UsageError: A file is damaged, or none of its first samples can be read.
        """
        first: dict[str, str] = {}
        for name in self.sizes:
            first.setdefault(name.rpartition("/")[0], name)
        found: set[StoredShape] = set()
        for name in list(first.values())[:MAX_TRIED]:
            index = self.kind.index(*self.storage.below(name))
            shapes: Any = index.shapes or [tuple(self.first_sample(name, index.rows).latents.shape)]
            found |= set(shapes)
        return sorted(found, key=math.prod, reverse=True)

    def first_sample(self, name: str, rows: NDArray[Any]) -> PublishedSample:
        """The first sample of a file that can be read."""
        storage, file = self.storage.below(name)
        for row in rows[:MAX_TRIED]:
            try:
                return self.kind.read(storage, file, row)
            except CorruptSampleError as error:
                last = error
        raise UsageError(last.message, DOWNLOAD) from last

    def __str__(self) -> str:
        """Format and number of files, for people."""
        count = len(self.sizes)
        return f"{self.kind.title}, {count} file{'s' * (count > 1)}"


def recognize(address: str | Path) -> PublishedFiles | None:
    """Find the published data set at an address; None for one of ours, or none."""
    storage = Storage.at(address)
    if storage.exists(MANIFEST) or storage.exists(PROVENANCE):
        return None
    found = storage.find()
    for kind in PUBLISHED_FORMATS:
        sizes = {name: size for name, size in found.items() if name.endswith(kind.suffix)}
        if sizes:
            return PublishedFiles(storage, kind, sizes)
    return None


@dataclass(frozen=True)
class IndexedFile:
    """A file of the data set, and its number of samples."""

    name: str
    samples: Natural


@dataclass(frozen=True)
class IndexRecord:
    """``index.json``: the files in order, the latent shapes that occur, and the width of text."""

    files: list[IndexedFile]
    shapes: list[StoredShape]
    text_dim: AxisSize | None


class PublishedData:
    """Samples of a published data set by position: file after file, each in its own order.

    Args:
        files: The data set.
        model: What the model supplies; None: for checks only, latents stay as stored, no index is kept.
    """

    def __init__(self, files: PublishedFiles, model: ModelSide | None) -> None:
        self.storage, self.kind, self._model = files.storage, files.kind, model
        self.files = files
        record, self._rows, self._shape_of = self._indexed()
        self.names = [file.name for file in record.files]
        self._ends = list(accumulate(file.samples for file in record.files))
        self._shapes = record.shapes
        self._text_dim = record.text_dim

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def text_dim(self) -> int:
        """Width D of the text."""
        return self._text_dim or self.negative().shape[-1]

    def positions_by_shape(self) -> dict[StoredShape, Sequence[int]]:
        """Positions of the samples of each latent shape."""
        if len(self._shapes) == 1:
            return {self._shapes[0]: range(len(self))}
        return {shape: np.flatnonzero(self._shape_of == i).tolist() for i, shape in enumerate(self._shapes)}

    def positions_by_file(self) -> dict[str, range]:
        """Positions of the samples of each file."""
        starts = [0, *self._ends]
        return {name: range(*starts[i : i + 2]) for i, name in enumerate(self.names)}

    def read(self, position: int) -> LatentSample:
        """Read one sample, normalized.

        Raises:
            CorruptSampleError: It cannot be read, or differs in shape from what the index states.
        """
        found = self._raw(position)
        name = self.names[bisect_right(self._ends, position)]
        where = f"Sample {self._rows[position]['key']} of {self.storage.address_of(name)}"
        shape = self._shapes[self._shape_of[position]]
        if tuple(found.latents.shape) != shape:
            raise CorruptSampleError(
                f"{where} has latents {tuple(found.latents.shape)} instead of {shape}.", DOWNLOAD
            )
        text = found.text if found.text is not None else self._stored_text(position)
        if self._text_dim not in (None, text.shape[-1]):
            raise CorruptSampleError(
                f"{where} has text of width {text.shape[-1]} instead of {self._text_dim}.", DOWNLOAD
            )
        return LatentSample(position, found.caption, self._normalized(found.latents), text, {"source": where})

    def negative(self) -> Tensor:
        """The negative prompt's embedding (L, D), made by the model on first use."""
        assert self._model is not None, "only a model has a negative prompt"
        prompt = self._model.negative_prompt
        file = self._text_file(f"negative-{json_sha256(prompt)[:KEY_LENGTH]}")
        self._embed({file: lambda: {"text": prompt}})
        return _stored(file, "text")

    def prepare(self) -> None:
        """Make what is missing in the cache: the index, and the embeddings that the data set lacks."""
        self.negative()
        if not self.kind.has_text:
            starts = range(0, len(self), CAPTIONS_PER_FILE)
            self._embed({self._caption_file(start): partial(self._captions, start) for start in starts})

    # --- normalization and text

    def _normalized(self, latents: Tensor) -> Tensor:
        if self.kind.normalized or self._model is None:
            return latents
        if len(self._model.mean) != latents.shape[1]:
            raise UsageError(
                f"{self.storage} has latents of {latents.shape[1]} channels, and the model's VAE has "
                f"{len(self._model.mean)}.",
                "Set model.teacher to a model with the VAE that the data set was encoded with.",
            )
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self._model.mean, self._model.std))
        return (latents.float() - mean) / std

    def _stored_text(self, position: int) -> Tensor:
        """Text of a sample whose caption alone is stored."""
        if self._model is None:  # nothing to check
            return torch.zeros(1, 1)
        return _stored(self._caption_file(position), str(position))

    def _captions(self, start: int) -> dict[str, str]:
        """Captions of one file of embeddings, by position."""
        positions = range(start, min(start + CAPTIONS_PER_FILE, len(self)))
        return {str(position): self._raw(position).caption for position in positions}

    def _caption_file(self, position: int) -> Path:
        return self._text_file(f"{position // CAPTIONS_PER_FILE:05d}-{self.files.sha256[:KEY_LENGTH]}")

    def _text_file(self, name: str) -> Path:
        assert self._model is not None, "captions are embedded for a model"
        encoder = json_sha256(self._model.encoder)[:KEY_LENGTH]
        return self._model.cache / f"text-{encoder}" / f"{name}.safetensors"

    def _embed(self, files: Mapping[Path, Callable[[], Mapping[str, str]]]) -> None:
        """Write the embeddings of captions to each file that is missing."""
        missing = {file: captions for file, captions in files.items() if not file.exists()}
        if not missing or self._model is None:
            return
        log.info(
            "The text encoder embeds the texts that %s does not store (%d files).", self.storage, len(missing)
        )
        pending: deque[tuple[Path, Iterable[str]]] = deque()

        def batches() -> Iterator[list[str]]:
            for file, captions in missing.items():
                found = captions()
                pending.append((file, found))
                yield list(found.values())

        for texts in self._model.embed(batches()):
            file, keys = pending.popleft()
            with atomic_write(file) as temporary:
                stored = {key: text.contiguous() for key, text in zip(keys, texts, strict=True)}
                temporary.write_bytes(safetensors.torch.save(stored))

    # --- index

    def _indexed(self) -> tuple[IndexRecord, NDArray[Any], NDArray[Any]]:
        """The record of the index, a row per sample, and the number of its shape."""
        if self._model is None:
            return self._build()
        folder = self._model.cache / f"index-{self.files.sha256[:KEY_LENGTH]}"
        if not (folder / INDEX_RECORD).exists():
            record, rows, shape_of = self._build()
            with atomic_directory(folder) as new:
                write_json(new / INDEX_RECORD, asdict(record))
                for file, array in zip(INDEX_ARRAYS, (rows, shape_of), strict=True):
                    np.save(new / file, array)
        record = read_record(folder / INDEX_RECORD, IndexRecord, REBUILD)
        try:
            rows, shape_of = (np.load(folder / name, allow_pickle=False) for name in INDEX_ARRAYS)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"The index {folder} is damaged ({error}).", REBUILD) from error
        count = sum(file.samples for file in record.files)
        if not len(rows) == len(shape_of) == count or int(shape_of.max(initial=0)) >= len(record.shapes):
            raise UsageError(f"The index {folder} is damaged.", REBUILD)
        return record, rows, shape_of

    def _build(self) -> tuple[IndexRecord, NDArray[Any], NDArray[Any]]:
        names = list(self.files.sizes)
        found: list[FileIndex] = []
        log.info("Indexing %s (%s), once.", self.storage, self.files)
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            for number, one in enumerate(pool.map(self._index_file, names), 1):
                found.append(one)
                if number % FILES_PER_LINE == 0:
                    log.info("%d of %d files are indexed.", number, len(names))
        if not any(len(one.rows) for one in found):
            raise UsageError(f"{self.storage} holds no samples.", DOWNLOAD)
        shapes: dict[StoredShape, int] = {}
        first: dict[str, PublishedSample] = {}  # of each folder
        text_dim, shape_of = None, []
        for name, one in zip(names, found, strict=True):
            folder = name.rpartition("/")[0]
            if folder not in first and len(one.rows):
                first[folder] = self.files.first_sample(name, one.rows)
            sample = first.get(folder)
            if sample is not None and sample.text is not None:
                text_dim = text_dim or sample.text.shape[-1]
            same: Any = () if sample is None else tuple(sample.latents.shape)
            listed = one.shapes if one.shapes is not None else [same] * len(one.rows)
            shape_of += [shapes.setdefault(shape, len(shapes)) for shape in listed]
        files = [IndexedFile(name, len(one.rows)) for name, one in zip(names, found, strict=True)]
        rows = np.concatenate([one.rows for one in found])
        return IndexRecord(files, list(shapes), text_dim), rows, np.array(shape_of, "<u2")

    def _index_file(self, name: str) -> FileIndex:
        storage, file = self.storage.below(name)
        return self.kind.index(storage, file)

    def _raw(self, position: int) -> PublishedSample:
        """Read a sample as it is stored."""
        storage, name = self.storage.below(self.names[bisect_right(self._ends, position)])
        return self.kind.read(storage, name, self._rows[position])


def _stored(file: Path, key: str) -> Tensor:
    """One tensor (L, D) of a file of the cache."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            text: Tensor = opened.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} is damaged ({error}).", REBUILD) from error
    problem = tensor_problem(text, 2)
    if problem is not None:
        raise UsageError(f"{file} {problem}.", REBUILD)
    return text
