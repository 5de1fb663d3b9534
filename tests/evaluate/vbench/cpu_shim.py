"""Let a CUDA-built torchvision be imported beside a CPU-built torch, in an environment that tests use.

It declares two operators that torchvision wants to see and VBench never calls. Only for machines whose index
has no CPU build of torchvision: ``python cpu_shim.py ENVIRONMENT``.
"""

from __future__ import annotations

import sys
from pathlib import Path

CODE = '''import sys


class Declare:
    """Declares the operators just before torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            torch._declared_for_torchvision = library
        return None


sys.meta_path.insert(0, Declare())
'''


def install(environment: Path) -> None:
    """Put it where the environment's Python runs it at its start."""
    (packages,) = environment.glob("lib/python3.*/site-packages")
    (packages / "cpu_torchvision.py").write_text(CODE)
    (packages / "cpu_torchvision.pth").write_text("import cpu_torchvision\n")


if __name__ == "__main__":
    install(Path(sys.argv[1]))
