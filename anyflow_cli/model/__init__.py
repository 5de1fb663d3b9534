"""The network, its token layouts and adapter roles, and the folders, encoders and VAE around it.

One network serves every mode: what differs between a bidirectional pass, teacher forcing and a sampling step
is a ``Layout``. Nothing here knows of losses, samplers or recipes.
"""
