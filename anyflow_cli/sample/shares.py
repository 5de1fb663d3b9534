"""Which videos of a call each of several processes samples, and which processes share a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from anyflow_cli.utils.distributed import from_all, join_group, rank, world_size

Item = TypeVar("Item")


@dataclass(frozen=True)
class VideoShare:
    """Processes in groups of ``size`` that share each video; a group samples every ``groups``-th video."""

    size: int = 1
    group: int = 0
    groups: int = 1
    writes: bool = True

    @classmethod
    def of_process(cls, videos: int, size: int | None = None, world: int | None = None) -> VideoShare:
        """The share of this process among ``world``, by default as many as there are.

        Without a size, groups are the smallest of which ``videos`` keep all busy.
        """
        world = world or world_size()
        if size is None:
            size = min(n for n in range(1, world + 1) if world % n == 0 and world // n <= max(videos, 1))
        return cls(size, rank() // size, world // size, rank() % size == 0)

    def __str__(self) -> str:
        """How the processes work, in words."""
        groups = (
            f"{self.groups} groups of {self.size}, which share" if self.groups > 1 else f"{self.size} share"
        )
        together = f"{groups} the tokens of each video"
        return f"{self.groups}, each with videos of its own" if self.size == 1 else together

    def agreed(self, found: Item) -> Item:
        """What the first process of each group found; with groups of several, all processes call this."""
        if self.size == 1:
            return found
        join_group()
        return from_all(found)[self.group * self.size]

    def own(self, items: Sequence[Item]) -> list[Item]:
        """Those of all videos that this process's group samples."""
        return list(items[self.group :: self.groups])

    def joined(self, own: list[Item], count: int) -> list[Item]:
        """What all groups made of ``count`` videos, in the order of the videos; all processes call this."""
        if self.size * self.groups == 1:
            return own
        by_group = from_all(own)[:: self.size]
        return [by_group[number % self.groups][number // self.groups] for number in range(count)]


ALL_VIDEOS = VideoShare()
