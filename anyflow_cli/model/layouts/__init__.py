"""Weight files in the layouts of other projects, read as the parameters of this package's network.

Each layout is data: a table of names, a list of prefixes, a rule for scaled weights.
``transformer.open_transformer`` opens any of them; ``components`` does so for the VAE and the text encoder.
"""
