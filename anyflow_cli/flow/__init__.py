"""The mathematics of the paper, as pure functions of tensors and callables. Imports nothing but torch.

No recipes, devices, ranks (a reduction is a callable passed in), networks or causality. The one contract is
``velocity.Velocity``: ``u = model(z, t, r)`` with the condition already bound.

    Alg. 1   losses.flow_map_loss          forward flow-map training (Eq. 3, 4, 6, 7) and its baselines
    Alg. 2   simulation.flow_map_rollout   a sample in three jumps, all with gradient; its baseline
    Eq. 5    matching                      distribution matching on that sample, and the fake score's loss
             times                         shift, grids, the sampler of (t, r), the weight w(t)
             samplers                      from noise to data at any number of steps, with one signature
             velocity                      the contract, guidance, the flow map f = z - (t - r) u (Eq. 2)
             noise                         Gaussian noise that depends on its seed only
"""
