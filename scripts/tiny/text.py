"""Step 2 of 4 of the tiny assets: a byte-level BPE tokenizer and a small ``UMT5EncoderModel``.

    python scripts/tiny/text.py --out build/tiny

The tokenizer is trained on captions of the shapes worlds: each of their words is one token, and any other
text falls back to bytes. The encoder is trained so that the output at every token describes the whole
sentence: at each position, linear heads (discarded afterwards) predict every attribute, or that it is not
named. The training sentences vary in wording and order, so that the encoder also understands a user's
wording.

Legend: B sentences, L tokens, D width.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from anyflow_cli.data.shapes_world import (
    BACKGROUNDS,
    DIRECTIONS,
    RGB,
    SHAPE_RADII,
    SHAPES,
    SPEEDS,
    WORLDS,
    parse_caption,
)

ATTRIBUTES = {
    "shape": list(SHAPES), "colour": list(RGB), "size": list(SHAPE_RADII),
    "direction": list(DIRECTIONS), "speed": list(SPEEDS), "background": list(BACKGROUNDS),
}  # fmt: skip
PREFIXES = (
    "",
    "",
    "",
    "",
    "a video of ",
    "an animation of ",
    "please show ",
    "there is ",
    "the picture shows ",
)
SUFFIXES = ("", "", "", "", ".", ", high quality", ", sharp and clean", " in a short clip")


def sentence(rng: random.Random, seed: int) -> str:
    """A caption of one of the worlds, often rephrased; one in twenty is empty."""
    scene = WORLDS[rng.choice(("shapes", "shapes", "shapes-shifted"))].scene(seed)
    if rng.random() < 0.05:
        return ""
    if rng.random() < 0.5:
        return scene.caption
    parts = [f"moving {scene.direction}", f"on a {scene.background} background", scene.speed]
    rng.shuffle(parts)
    parts = parts[: rng.randint(0, 3)]
    size = rng.choice((f"{scene.size} ", ""))
    subject = f"{rng.choice(('a', 'one', 'the'))} {size}{scene.color} {scene.shape}"
    parts.insert(rng.randint(0, len(parts)) if rng.random() < 0.3 else 0, subject)
    return rng.choice(PREFIXES) + rng.choice((" ", ", ")).join(parts) + rng.choice(SUFFIXES)


def make_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ``<pad>`` 0 and ``</s>`` 1 after each sentence, as UMT5 expects."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((sentence(rng, seed) for seed in range(4000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", model_max_length=512
    )


def labels(sentences: list[str]) -> Tensor:
    """Class of each attribute, (B, 6); 0 if the sentence does not name it."""
    named = [parse_caption(text) for text in sentences]
    return torch.tensor(
        [
            [values.index(found[name]) + 1 if name in found else 0 for name, values in ATTRIBUTES.items()]
            for found in named
        ]
    )


def main() -> None:
    """Train, print progress, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = make_tokenizer(rng)
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, relative_attention_num_buckets=16,
    )  # fmt: skip
    encoder = UMT5EncoderModel(config)
    heads = nn.ModuleList(nn.Linear(config.d_model, len(values) + 1) for values in ATTRIBUTES.values())
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    for step in range(args.steps):
        sentences = [sentence(rng, rng.randrange(2**31)) for _ in range(64)]
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        mask = tokens.attention_mask.bool()
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state[mask]  # (all tokens, D)
        targets = labels(sentences)[:, None].expand(-1, mask.shape[1], -1)[mask]
        loss = sum(F.cross_entropy(head(hidden), targets[:, i]) for i, head in enumerate(heads)) / len(heads)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == args.steps - 1:
            right = torch.stack(
                [head(hidden).argmax(-1) == targets[:, i] for i, head in enumerate(heads)]
            ).float()
            print(f"step {step} loss {loss.item():.4f} right {right.mean():.4f}", flush=True)
    encoder.save_pretrained(args.out / "text_encoder")
    tokenizer.save_pretrained(args.out / "tokenizer")


if __name__ == "__main__":
    main()
