"""Small published data sets in the layouts of rCM, FastVideo and CausVid, and the same samples in ours."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow_cli.data.published import ModelSide
from anyflow_cli.data.shards import LatentSample, shard_path, write_manifest, write_negative, write_shard

FRAMES, CHANNELS, HEIGHT, WIDTH = 3, 8, 4, 4
TOKENS, TEXT_DIM = 8, 32
MEAN, STD = [0.1 * i for i in range(CHANNELS)], [1 + 0.1 * i for i in range(CHANNELS)]
NEGATIVE = torch.full((2, TEXT_DIM), 0.5)


def stored_latents(index: int, dtype: torch.dtype = torch.float32, frames: int = FRAMES) -> Tensor:
    """Latents (C, F, H, W) of a sample."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(CHANNELS, frames, HEIGHT, WIDTH, generator=generator).to(dtype)


def stored_text(index: int, dtype: torch.dtype = torch.float32, length: int | None = None) -> Tensor:
    """Text of 3 + index % 3 tokens, padded with zeros to ``length``."""
    generator = torch.Generator().manual_seed(100 + index)
    text = torch.randn(3 + index % 3, TEXT_DIM, generator=generator).to(dtype)
    return torch.nn.functional.pad(text, (0, 0, 0, (length or len(text)) - len(text)))


def pickled(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def make_rcm(directory: Path, count: int = 12, size: int = 5, frames: int = FRAMES) -> Path:
    """``shard_000000.tar``, ...: bf16, normalized, text padded to the full length."""
    directory.mkdir(parents=True)
    for shard, start in enumerate(range(0, count, size)):
        with tarfile.open(directory / f"shard_{shard:06d}.tar", "w") as archive:
            for index in range(start, min(start + size, count)):
                latents = stored_latents(index, torch.bfloat16, frames)
                add_member(archive, f"{index:09d}.latent.pt", pickled(latents))
                text = stored_text(index, torch.bfloat16, TOKENS)
                add_member(archive, f"{index:09d}.embed.pt", pickled(text))
                add_member(archive, f"{index:09d}.prompt.txt", f"clip {index}".encode())
    return directory


def fastvideo_row(index: int, latents: Tensor, text: Tensor) -> dict[str, Any]:
    """A row of FastVideo's schema: frames of latents as num_frames, width and height swapped."""
    return {
        "id": f"video_{index}", "file_name": f"{index}.mp4", "caption": f"clip {index}",
        "media_type": "video",
        "vae_latent_bytes": latents.numpy().tobytes(), "vae_latent_shape": list(latents.shape),
        "vae_latent_dtype": "float32", "text_embedding_bytes": text.numpy().tobytes(),
        "text_embedding_shape": list(text.shape), "text_embedding_dtype": "float32",
        "width": 8 * HEIGHT, "height": 8 * WIDTH, "num_frames": latents.shape[1], "duration_sec": 0.5,
        "fps": 16.0,
    }  # fmt: skip


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], group: int = 4) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=group)


def make_fastvideo(directory: Path, count: int = 12, size: int = 8, frames: int = FRAMES) -> Path:
    """``Part_0/latents_chunk_0000.parquet``, ...: fp32 means of the VAE, text of each prompt's own length."""
    for file, start in enumerate(range(0, count, size)):
        rows = [
            fastvideo_row(index, stored_latents(index, frames=frames), stored_text(index))
            for index in range(start, min(start + size, count))
        ]
        write_parquet(directory / f"Part_{file}" / f"latents_chunk_{file:04d}.parquet", rows)
    return directory


def make_lmdb(directory: Path, count: int = 12, steps: int = 2) -> Path:
    """One LMDB of trajectories (S, F, C, H, W) in float16, whose last step is clean; no text embeddings."""
    import lmdb

    with lmdb.open(str(directory), map_size=1 << 24) as environment, environment.begin(write=True) as writer:
        for index in range(count):
            clean = stored_latents(index, torch.float16).transpose(0, 1)
            trajectory = torch.stack([*[torch.zeros_like(clean)] * (steps - 1), clean])
            writer.put(f"latents_{index}_data".encode(), trajectory.contiguous().numpy().tobytes())
            writer.put(f"prompts_{index}_data".encode(), f"clip {index}".encode())
        shape = f"{count} {steps} {FRAMES} {CHANNELS} {HEIGHT} {WIDTH}"
        writer.put(b"latents_shape", shape.encode())
    return directory


def make_own(directory: Path, kind: str, count: int = 12) -> Path:
    """The samples of ``make_rcm`` or ``make_fastvideo`` as a data set of ours."""
    directory.mkdir(parents=True)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (MEAN, STD))
    samples = []
    for index in range(count):
        dtype = torch.bfloat16 if kind == "rcm" else torch.float32
        latents = stored_latents(index, dtype)
        latents = latents if kind == "rcm" else (latents - mean) / std
        samples.append(
            LatentSample(index, f"clip {index}", latents.transpose(0, 1), stored_text(index, dtype))
        )
    record = write_shard(shard_path(directory, 0), samples)
    write_negative(directory, NEGATIVE)
    write_manifest(directory, [record], {"source": "test"})
    return directory


def embedded(captions: Sequence[str]) -> list[Tensor]:
    """Text of a caption's own length; that of the negative prompt is ``NEGATIVE``."""
    return [
        torch.full((1 + len(caption) % 3, TEXT_DIM), float(len(caption))) if caption else NEGATIVE
        for caption in captions
    ]


def model_side(cache: Path, embed: Any = embedded) -> ModelSide:
    return ModelSide(cache, MEAN, STD, lambda batches: map(embed, batches), "test", "")
