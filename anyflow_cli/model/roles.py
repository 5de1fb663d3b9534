"""Student, real score and fake score on as few weights as possible, and the one way to switch between them.

With adapters, all roles share one frozen base; without, the student and the fake score own a copy each. A
role is only ever active inside ``with backbone.role(name)``, and a checkpointed block is recomputed under the
role of its forward.

The student takes two times, ``u(z, t, r)``. The scores take one and are asked at ``r = t``, where a two-time
network whose second embedder is an untouched copy equals the pretrained one: scores therefore do not adapt
the embedders. A tuned teacher is a student of a one-time network; its adapter, or its weights, become the
real score of stage 2.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anyflow_cli.errors import UsageError
from anyflow_cli.model.conditioned import Conditioned
from anyflow_cli.model.network import Contexts, FlowMapTransformer, on_meta

Role = Literal["student", "real", "fake", "base"]

ADAPTED = r"blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ffn\.net\.(0\.proj|2))"
ADAPTED_TIMES = r"condition_embedder\.((time|delta)_embedder\.linear_[12]|delta_proj)"


@dataclass(frozen=True)
class LoraSize:
    """Rank and alpha of the adapters; their output is scaled by ``alpha / rank``."""

    rank: int
    alpha: float


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
        self._active: dict[FlowMapTransformer, str | None] = {}
        if lora is None:
            self._own_copies(network, teacher)
        else:
            self._share(network, teacher or network, lora, real_adapter, seed)
        self._scopes = {name: partial(self.role, name) for name in self.roles}

    # --- construction

    def _own_copies(self, network: FlowMapTransformer, teacher: FlowMapTransformer | None) -> None:
        self.student = network.requires_grad_("student" in self.roles)
        self._networks: dict[Role, FlowMapTransformer] = {"student": network}
        self._adapters: dict[Role, str] = {}
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
        self.student, self.origin = network.requires_grad_(False), origin.requires_grad_(False)
        self._networks = {"student": network, "real": origin, "fake": origin, "base": origin}
        adapted: list[Role] = [role for role in self.roles if role in ("student", "fake")]
        if "real" in self.roles and real_adapter is not None:
            adapted.append("real")
        self._adapters = {role: role for role in adapted}
        with torch.random.fork_rng(devices=[]):  # the same adapters on every rank, whatever was drawn before
            torch.manual_seed(seed)
            for role in adapted:
                _add_adapter(self._networks[role], role, lora)
        self._freeze_all_but_trained()
        for shared in {network, origin}:
            self._active[shared] = None
            _activate(shared, None)
            shared.checkpoint_contexts = partial(self._contexts, shared)
        for role in ("real", "fake"):
            if real_adapter is not None and role in self._adapters:
                self.load_state_dict_of(role, real_adapter)

    def _freeze_all_but_trained(self) -> None:
        """Adding an adapter makes peft freeze the others: settle what trains once all are there."""
        self.requires_grad_(False)
        for role in self.roles:
            if role in ("student", "fake"):
                for parameter in self.named_parameters_of(role).values():
                    parameter.requires_grad_(True)

    # --- switching

    @contextmanager
    def role(self, name: Role) -> Iterator[None]:
        """Run the role's network as this role inside the block, whatever was active before."""
        with self._adapter(self._networks[name], self._adapters.get(name)):
            yield

    def velocity(self, name: Role, text: Tensor) -> Conditioned:
        """``u(z, t, r)`` of a role under text embeddings (B, L, D); it switches to the role itself."""
        return Conditioned(self._networks[name], text, self._scopes[name])

    def network_of(self, name: Role) -> FlowMapTransformer:
        """The network that a role runs. Call it inside ``role(name)``."""
        return self._networks[name]

    @contextmanager
    def _adapter(self, network: FlowMapTransformer, adapter: str | None) -> Iterator[None]:
        before = self._active.get(network)
        if adapter == before:
            yield
            return
        self._set(network, adapter)
        try:
            yield
        finally:
            self._set(network, before)

    def _set(self, network: FlowMapTransformer, adapter: str | None) -> None:
        _activate(network, adapter)
        self._active[network] = adapter

    def _contexts(self, network: FlowMapTransformer) -> Contexts:
        """Around a checkpointed block: nothing in the forward, the forward's adapter in the recomputation."""
        recompute: AbstractContextManager[None] = self._adapter(network, self._active[network])
        return nullcontext(), recompute

    # --- weights

    def named_parameters_of(self, name: Role) -> dict[str, nn.Parameter]:
        """The role's own weights: its adapter (``...lora_A.weight``), its whole copy, or none."""
        network = self._networks[name]
        if self.lora is None:
            return {} if name in ("real", "base") else dict(network.named_parameters())
        adapter = self._adapters.get(name)
        return {
            f"{path}.lora_{side}.weight": layer[adapter].weight
            for path, module in _adapted_layers(network)
            for side, layer in (("A", module.lora_A), ("B", module.lora_B))
            if adapter in layer
        }

    def parameters_of(self, name: Role) -> list[nn.Parameter]:
        """What an optimiser of the role trains."""
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
            parameter.copy_(state[key])

    @contextmanager
    def weights(self, name: Role, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Run a role with other weights (its moving average) inside the block, without copying them."""
        own = self.named_parameters_of(name)
        _check_same(own, state, name)
        before = {key: parameter.data for key, parameter in own.items()}
        try:
            for key, parameter in own.items():
                parameter.data = state[key].to(parameter.device, parameter.dtype)
            yield
        finally:
            for key, parameter in own.items():
                parameter.data = before[key]

    @torch.no_grad()
    def merged(self, name: Role) -> FlowMapTransformer:
        """A plain frozen network that computes what the role does, for export; other weights are shared."""
        network, adapter = self._networks[name], self._adapters.get(name)
        weights = {
            key.replace(".base_layer", ""): tensor.detach() for key, tensor in network.state_dict().items()
        }
        weights = {key: tensor for key, tensor in weights.items() if ".lora_" not in key}
        if self.lora is None:
            weights = {key: tensor.clone() for key, tensor in weights.items()}
        for path, layer in _adapted_layers(network):
            if adapter in layer.lora_A:
                base = weights[f"{path}.weight"]
                weights[f"{path}.weight"] = (base.float() + layer.get_delta_weight(adapter).float()).to(
                    base.dtype
                )
        plain = on_meta(network.config)
        plain.load_state_dict(weights, assign=True)
        return plain.requires_grad_(False)


def _add_adapter(network: FlowMapTransformer, name: Role, size: LoraSize) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    student_of_two_times = name == "student" and network.config.two_time
    targets = f"({ADAPTED}|{ADAPTED_TIMES})" if student_of_two_times else ADAPTED
    config = LoraConfig(r=size.rank, lora_alpha=size.alpha, target_modules=targets)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config`"
        )  # several adapters are meant
        inject_adapter_in_model(config, network, adapter_name=name)
    for _, layer in _adapted_layers(network):
        for side in (layer.lora_A, layer.lora_B):
            if name in side:  # peft gives them the base's type; what is trained is held in fp32
                side[name].weight.data = side[name].weight.data.float()


def _adapted_layers(network: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(path, module) for path, module in network.named_modules() if isinstance(module, LoraLayer)]


def _activate(network: nn.Module, adapter: str | None) -> None:
    """Choose the adapter that the forward uses. peft's own ``set_adapter`` would also switch what trains."""
    for _, layer in _adapted_layers(network):
        layer._active_adapter = [] if adapter is None else [adapter]
        layer._disable_adapters = adapter is None


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
