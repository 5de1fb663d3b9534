"""What goes in: prompts, shards of latents, real clips, the shapes world. No model is trained here."""
