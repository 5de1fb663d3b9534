"""The network, its token layouts and adapters, the roles of training, and model folders with encoders.

One network serves every mode: a bidirectional pass, teacher forcing and a sampling step differ in their
``Layout``. Imports ``flow`` (velocities, samplers) and ``recipe`` (its sections); knows nothing of losses,
data or runs.

    network, blocks, rotary, layout     the transformer, and the token layouts that it runs over
    config                              sizes, from and to the configuration of the diffusers classes
    causal, kv_cache, chunk_sampling    the causal model: chunks, the cache of finished ones, sampling
    conditioned                         a network with its text bound, the ``u(z, t, r)`` of ``flow``
    lora, backbone                      adapters of one network; student, real and fake score on one base
    parallelize, precision              checkpointing, compilation, FSDP2; autocast
    pipeline_io, weights_io             folders in diffusers' layout and adapters in PEFT's; safetensors
    folder_check                        problems of a folder, found without loading a weight
    encoders                            text encoder and VAE
"""
