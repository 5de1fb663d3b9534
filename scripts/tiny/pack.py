r"""Copy a tiny model into the package, its large weights in half precision, so that the wheel stays small.

    python scripts/tiny/pack.py --model build/teacher --vae build/tiny/vae --out anyflow_cli/assets/tiny
    python scripts/tiny/pack.py --model runs/tiny-best/distill-consistency/model \
        --out anyflow_cli/assets/tiny-anyflow

Loading converts to the precision of the recipe. The built-in models share one VAE, text encoder and
tokenizer, stored with the teacher; without ``--vae`` they are left out. The lineage of a trained model is
copied without the directories of the machine that trained it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from anyflow_cli.model.pipeline_io import FROZEN

WEIGHTS = "diffusion_pytorch_model.safetensors"


def main() -> None:
    """Copy small files as they are and store large weights in half precision."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vae", type=Path, help="the VAE in full precision; also copies the text encoder")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    left_out = ("vae",) if args.vae else FROZEN
    shutil.copytree(
        args.model, args.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS, *left_out)
    )
    parts = [(args.model / "transformer", "transformer")]
    if args.vae:
        shutil.copytree(
            args.vae, args.out / "vae", dirs_exist_ok=True, ignore=shutil.ignore_patterns(WEIGHTS)
        )
        parts.append((args.vae, "vae"))
    for source, part in parts:
        weights = {name: value.half() for name, value in load_file(source / WEIGHTS).items()}
        save_file(weights, args.out / part / WEIGHTS, metadata={"format": "pt"})
    lineage = args.out / "lineage.json"
    if lineage.exists():
        content = json.dumps(json.loads(lineage.read_text()), indent=2)
        lineage.write_text(re.sub(r'"/[^"]*/((assets|runs|bin)[/"])', r'"\1', content) + "\n")


if __name__ == "__main__":
    main()
