"""Student, real score and fake score on as few weights as possible, and the one way to switch between them.

With adapters, all roles share one frozen base; without, the student and the fake score own a copy each. A
role is only ever active inside ``with backbone.role(name)``.

The student takes two times, ``u(z, t, r)``. The scores take one and are asked at ``r = t``, where a two-time
network whose second embedder is an untouched copy equals the pretrained one: scores therefore do not adapt
the embedders. A tuned teacher is the student of a one-time network; its adapter, or its network, becomes the
real score of stage 2.

The student of a causal network also trains the compressed patch embedding, whole and in place: the other
roles see videos bidirectionally and never use it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from anyflow_cli.errors import UsageError
from anyflow_cli.model.causal import FAR
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.lora import Adapters, LoraSize
from anyflow_cli.model.network import FlowMapTransformer, on_meta
from anyflow_cli.model.parallelize import shard_like

__all__ = ["Backbone", "LoraSize", "Role"]

Role = Literal["student", "real", "fake", "base"]


class Backbone(nn.Module):
    """Networks and adapters of the roles in ``roles``.

    ``network`` is the student's and, unless a ``teacher`` is given, the origin of the scores. With ``lora``
    everything but adapters is frozen; without, the student trains ``network`` itself and the scores start as
    copies of the origin. The fake score starts as the real one. ``real_adapter`` is the tuned teacher's
    adapter; without, the real score is the origin.
    """

    def __init__(
        self,
        network: FlowMapTransformer,
        roles: Sequence[Role] = ("student",),
        *,
        lora: LoraSize | None = None,
        teacher: FlowMapTransformer | None = None,
        real_adapter: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert lora is not None or real_adapter is None, "an adapter needs the LoRA mode"
        self.lora = lora
        self.roles = tuple(roles)
        self._networks: dict[Role, FlowMapTransformer] = {"student": network}
        self._adapters: dict[FlowMapTransformer, Adapters] = {}
        self._adapter_names: dict[Role, str] = {}
        self._whole: dict[Role, nn.Module] = {}  # trained beside the role's adapter
        if lora is None:
            self._own_copies(network, teacher)
        else:
            self._share(network, teacher or network, lora, real_adapter, seed)
        # One object a role, so that conditions can tell whether they run in the same one.
        self._scopes = {name: partial(self.role, name) for name in self._networks}

    # --- construction

    def _own_copies(self, network: FlowMapTransformer, teacher: FlowMapTransformer | None) -> None:
        self.student = network.requires_grad_("student" in self.roles)
        if set(self.roles) == {"student"}:
            return
        self.origin = (teacher or copy.deepcopy(network)).requires_grad_(False)
        self._networks |= {"base": self.origin, "real": self.origin}
        if "fake" in self.roles:
            self.fake = copy.deepcopy(self.origin).requires_grad_(True)
            self._networks["fake"] = self.fake

    def _share(
        self,
        network: FlowMapTransformer,
        origin: FlowMapTransformer,
        lora: LoraSize,
        real_adapter: Mapping[str, Tensor] | None,
        seed: int,
    ) -> None:
        self.student, self.origin = network, origin
        self._networks |= {"base": origin, "real": origin, "fake": origin}
        self._adapters = {shared: Adapters(shared) for shared in (network, origin)}
        with torch.random.fork_rng(devices=[]):  # the same adapters on every rank, whatever was drawn before
            torch.manual_seed(seed)
            for name in self.roles:
                if name in ("student", "fake") or (name == "real" and real_adapter is not None):
                    self._add_adapter(name, lora)
        for name, adapter in self._adapter_names.items():
            if real_adapter is not None and adapter in ("real", "fake"):
                self.load_state_dict_of(name, real_adapter)
            for parameter in self.named_parameters_of(name).values():
                parameter.requires_grad_(name != "real")

    def _add_adapter(self, name: Role, lora: LoraSize) -> None:
        network = self._networks[name]
        adapt_times = name == "student" and network.config.two_time
        self._adapters[network].add(name, lora, adapt_times=adapt_times)
        self._adapter_names[name] = name
        if name == "student" and network.config.causal is not None:
            self._whole[name] = network.far_patch_embedding.float()  # as adapters are

    # --- switching

    def role(self, name: Role) -> AbstractContextManager[None]:
        """Run the role's network as this role inside the block, then as what was active before."""
        network = self._networks[name]
        if network not in self._adapters:
            return nullcontext()
        return self._adapters[network].under(self._adapter_names.get(name))

    def velocity(self, name: Role, text: Tensor) -> Conditioned:
        """``u(z, t, r)`` of a role under text embeddings (B, L, D); it switches to the role itself."""
        return Conditioned(self._networks[name], text, self._scopes[name])

    def network_of(self, name: Role) -> FlowMapTransformer:
        """The network that a role runs. Call it inside ``role(name)``."""
        return self._networks[name]

    def networks(self) -> list[FlowMapTransformer]:
        """Each network once, whatever roles it has."""
        return list(dict.fromkeys(self._networks.values()))

    # --- weights

    def named_parameters_of(self, name: Role) -> dict[str, nn.Parameter]:
        """The role's own weights: its adapter (``...lora_A.weight``) and what it trains whole, or a copy."""
        network = self._networks[name]
        if network in self._adapters:
            adapter = self._adapter_names.get(name)
            own = {} if adapter is None else self._adapters[network].parameters(adapter)
            whole = self._whole[name].named_parameters() if name in self._whole else ()
            return own | {f"{FAR}.{key}": parameter for key, parameter in whole}
        return {} if name in ("real", "base") else dict(network.named_parameters())

    def parameters_of(self, name: Role) -> list[nn.Parameter]:
        """What an optimizer of the role trains."""
        return [parameter for parameter in self.named_parameters_of(name).values() if parameter.requires_grad]

    def state_dict_of(self, name: Role) -> dict[str, Tensor]:
        """The role's own weights, by name; views, not copies."""
        return {key: parameter.detach() for key, parameter in self.named_parameters_of(name).items()}

    @torch.no_grad()
    def load_state_dict_of(self, name: Role, state: Mapping[str, Tensor]) -> None:
        """Copy weights into a role; names and shapes must be those of ``state_dict_of``."""
        own = self.named_parameters_of(name)
        _check_same(own, state, name)
        for key, parameter in own.items():
            parameter.copy_(shard_like(state[key], parameter))

    def merged(self, name: Role, dtype: torch.dtype = torch.float32) -> FlowMapTransformer:
        """A plain frozen network that computes what the role does, for export.

        Adapters are added in fp32 before ``dtype`` is taken: in bf16 a small one would vanish in the rounding
        of a large weight. Weights that are neither adapted nor cast are shared with the base.
        """
        network = self._networks[name]
        weights = {key: tensor.detach() for key, tensor in network.state_dict().items()}
        if network in self._adapters:
            weights = self._adapters[network].merged(weights, self._adapter_names.get(name))
        else:
            weights = {key: tensor.clone() for key, tensor in weights.items()}
        plain = on_meta(network.config)
        plain.load_state_dict(weights, assign=True)
        return plain.store_as(dtype).requires_grad_(False)


def _check_same(own: Mapping[str, Tensor], given: Mapping[str, Tensor], role: str) -> None:
    hint = "Use a checkpoint of the same model, with the same LoRA rank and targets."
    if own.keys() != given.keys():
        name = sorted(own.keys() ^ given.keys())[0]
        raise UsageError(f"The weights given for the {role} do not fit: {name} is on one side only.", hint)
    for name, parameter in own.items():
        if parameter.shape != given[name].shape:
            wanted, got = tuple(parameter.shape), tuple(given[name].shape)
            raise UsageError(
                f"The weights given for the {role} do not fit: {name} is {got} instead of {wanted}.", hint
            )
