r"""Put a tiny model into the package: weights stored in half precision, so that the wheel stays small.

    python scripts/tiny/pack.py --model build/teacher --vae build/tiny/vae --out anyflow_cli/assets/tiny
    python scripts/tiny/pack.py --model runs/tiny-long/distill/model --vae build/tiny/vae \
        --out anyflow_cli/assets/tiny-anyflow

Every loader computes in fp32 or bf16 whatever the file holds. The lineage of a trained model comes along,
without the folders of the machine that trained it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


def main() -> None:
    """Copy what is small, halve what is large."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shutil.copytree(args.model, args.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS, "vae"))
    shutil.copytree(args.vae, args.out / "vae", dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS))
    for source, part in ((args.vae, "vae"), (args.model / "transformer", "transformer")):
        weights = {name: value.half() for name, value in load_file(source / WEIGHTS).items()}
        save_file(weights, args.out / part / WEIGHTS, metadata={"format": "pt"})
    lineage = args.out / "lineage.json"
    if lineage.exists():
        content = json.dumps(json.loads(lineage.read_text()), indent=2)
        lineage.write_text(re.sub(r'"/[^"]*/((assets|runs|bin)[/"])', r'"\1', content) + "\n")


if __name__ == "__main__":
    main()
