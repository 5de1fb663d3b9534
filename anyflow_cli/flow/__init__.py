"""The mathematics of the paper, as pure functions of tensors and callables. Imports torch alone.

Nothing here knows of recipes, devices, ranks (a reduction is a callable passed in), networks or causality.
The one contract is ``velocity.Velocity``: ``u = model(z, t, r)`` with the condition already bound.

    Alg. 1   objective.flow_map_loss       forward flow-map training (Eq. 3, 4, 6, 7) and its baselines
    Alg. 2   simulation.flow_map_rollout   a sample in three jumps, all with gradient (Eq. 8); its baseline
             matching                      what that sample is for: distribution matching (Eq. 5), fake score
             times                         shift, grids, the sampler of (t, r), the weight w(t)
             samplers                      noise to data at any number of steps, one signature for all
             velocity                      the contract, guidance, the flow map f = z - (t - r) u
"""
