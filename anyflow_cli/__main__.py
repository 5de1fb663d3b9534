"""``python -m anyflow_cli``; also what ``torchrun -m`` and ``accelerate launch -m`` start."""

from __future__ import annotations

import sys

from anyflow_cli.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
