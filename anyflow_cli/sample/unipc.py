"""UniPC, the multistep solver that Wan's own pipeline folders name, for teachers: diffusers' scheduler.

Legend: B batch, F latent frames, C channels, H W latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_cli.flow.velocity import Velocity, at_times, batch_time


@torch.no_grad()
def sample_unipc(model: Velocity, z: Tensor, steps: int, shift: float, *, overwrites: bool = False) -> Tensor:
    """Solve a teacher's ODE from noise z (B, F, C, H, W) with second-order UniPC at diffusers' own times.

    ``overwrites`` repeats what the code of SkyReels-V2 does: it writes each state over the one before, which
    the first correction of UniPC still reads.
    """
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)  # on the host, where they are read
    for timestep in scheduler.timesteps:
        time = timestep.item() / scheduler.config.num_train_timesteps
        t = batch_time(time, z)
        (after,) = scheduler.step(at_times(model, time, time)(z, t, t), timestep, z, return_dict=False)
        z = z.copy_(after) if overwrites else after
    return z
