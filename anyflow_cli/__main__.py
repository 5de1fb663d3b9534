"""``python -m anyflow_cli``; also what ``torchrun -m`` and ``accelerate launch -m`` start."""

from __future__ import annotations

from anyflow_cli.cli.app import run_command_line

if __name__ == "__main__":
    run_command_line()
