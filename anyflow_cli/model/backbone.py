"""Student, real score and fake score on as few weights as possible, and the one way to switch between them.

With LoRA, all roles share one frozen base; without, the student and the fake score own a copy each. A role is
active only inside ``with backbone.role(name)``.

The student takes two times, ``u(z, t, r)``. The scores take one and are evaluated at ``r = t``, where a
two-time network whose second embedder is an untouched copy equals the pretrained one; scores therefore do not
adapt the embedders. A tuned teacher is the student of a one-time network; its adapter, or its network,
becomes the real score of stage 2.

Of a model with two experts (Wan 2.2 A14B) every role has both; ``model.expert`` says which one is trained.

The student of a causal network also trains the compressed patch embedding, in full and in place: the other
roles run bidirectionally and never use it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from anyflow_cli.errors import UsageError
from anyflow_cli.flow.condition import Condition
from anyflow_cli.flow.noise import fold_seed
from anyflow_cli.flow.velocity import Velocity
from anyflow_cli.model.base_storage import store_base
from anyflow_cli.model.causal import FAR, as_causal
from anyflow_cli.model.config import CausalConfig
from anyflow_cli.model.experts import bind, each_expert, networks_of
from anyflow_cli.model.lora import LoraAdapters, LoraSize
from anyflow_cli.model.network import FlowMapTransformer, two_time_from
from anyflow_cli.model.parallelize import shard_like
from anyflow_cli.model.precision import DTYPES_OF_PRECISION, Precision
from anyflow_cli.recipe.schema import ModelSection

Role = Literal["student", "real", "fake"]
LoadNetwork = Callable[[Path, torch.dtype], FlowMapTransformer]


@dataclass(frozen=True)
class BackboneSources:
    """Where the weights of a backbone come from.

    Attributes:
        network: Model that the student starts from; with LoRA, the base of its adapter.
        roles: Roles that the backbone has.
        two_time: Whether the student is a flow map. False keeps a teacher as it is, for its own tuning.
        scores: Model of the real and fake score; None: ``network``.
        student_adapter: Adapter that the student starts from; None: a new one, which changes nothing yet.
        real_adapter: Adapter of a tuned teacher; None: the real score is the model itself.
    """

    network: Path
    roles: tuple[Role, ...] = ("student",)
    two_time: bool = True
    scores: Path | None = None
    student_adapter: Mapping[str, Tensor] | None = None
    real_adapter: Mapping[str, Tensor] | None = None


class Backbone(nn.Module):
    """The networks and adapters of a training stage.

    With ``lora`` everything but adapters is frozen; without, the student trains ``network`` itself, and the
    scores start as copies of their origin: the teacher, or ``network`` where none is given. The fake score
    starts as the real one.

    Args:
        network: The student's network.
        roles: The roles to hold.
        lora: Rank and alpha of the adapters; None trains whole networks.
        teacher: Origin of the scores, where it is not ``network``.
        real_adapter: Adapter of a tuned teacher; without it the real score is the origin.
        precision: Of the arithmetic: a frozen network without adapters is stored in it.
        expert: Which of two experts student and fake score train.
        seed: Seed of the adapters' first weights.
    """

    def __init__(
        self,
        network: FlowMapTransformer,
        roles: Sequence[Role] = ("student",),
        *,
        lora: LoraSize | None = None,
        teacher: FlowMapTransformer | None = None,
        real_adapter: Mapping[str, Tensor] | None = None,
        precision: Precision = "fp32",
        expert: Literal["both", "high", "low"] = "both",
        seed: int = 0,
    ) -> None:
        super().__init__()
        assert lora is not None or real_adapter is None, "a real_adapter needs lora"
        self.lora, self.expert = lora, expert
        self.roles = tuple(roles)
        self._networks: dict[Role, FlowMapTransformer] = {"student": network}
        self._adapters: dict[FlowMapTransformer, LoraAdapters] = {}
        self._adapted: set[Role] = set()  # roles with an adapter, whose name is the role's
        if lora is None:
            self._copy_networks(network, teacher, DTYPES_OF_PRECISION[precision])
        else:
            self._share_network(network, teacher or network, lora, real_adapter, seed)
        # One object per role, so that conditions can tell whether they run in the same role.
        self._scopes = {name: partial(self.role, name) for name in self._networks}

    # --- construction

    @classmethod
    def build(
        cls,
        model: ModelSection,
        sources: BackboneSources,
        load: LoadNetwork,
        *,
        precision: Precision = "fp32",
        seed: int = 0,
    ) -> Backbone:
        """Build the backbone of a training stage.

        Args:
            model: Section of the recipe: LoRA or all weights, bidirectional or causal, how r conditions.
            sources: Where the weights come from.
            load: Opens a model in the given type. It may give weights on the meta device, which have shapes
                but no values: then so are the backbone's, built inside ``torch.device("meta")``.
            precision: Of the arithmetic. Weights that train are fp32; a frozen base is stored in this.
            seed: Of new adapters.
        """
        lora = LoraSize(model.lora.rank, model.lora.alpha) if model.lora else None
        dtype = torch.bfloat16 if lora is not None and precision == "bf16" else torch.float32
        backbone = cls(
            start_network(load(sources.network, dtype), model, two_time=sources.two_time),
            sources.roles,
            lora=lora,
            teacher=None if sources.scores is None else load(sources.scores, dtype),
            real_adapter=sources.real_adapter,
            precision=precision,
            expert=model.expert,
            seed=seed,
        )
        if model.base_weights != "full":
            for network in backbone.networks():
                store_base(network, model.base_weights)
        if sources.student_adapter is not None:
            backbone.load_state_dict_of("student", sources.student_adapter)
        return backbone

    def _copy_networks(
        self, network: FlowMapTransformer, teacher: FlowMapTransformer | None, frozen_dtype: torch.dtype
    ) -> None:
        self.student = self._trainable(network.requires_grad_(False), "student" in self.roles)
        if set(self.roles) == {"student"}:
            return
        self.origin = (teacher or copy.deepcopy(network)).requires_grad_(False)
        self._networks["real"] = self.origin
        if "fake" in self.roles:
            self.fake = self._trainable(copy.deepcopy(self.origin))
            self._networks["fake"] = self.fake
        self.origin.store_as(frozen_dtype)

    def _trainable(self, network: FlowMapTransformer, trains: bool = True) -> FlowMapTransformer:
        """Let gradient reach a network, or the expert that is trained."""
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(trains and self._is_trained(network, name))
        return network

    def _is_trained(self, network: FlowMapTransformer, name: str) -> bool:
        """Whether a parameter is of the expert that is trained; those of one network all are."""
        of_experts = network.config.boundary is not None and self.expert != "both"
        return not of_experts or name.startswith(f"{self.expert}.")

    def _share_network(
        self,
        network: FlowMapTransformer,
        origin: FlowMapTransformer,
        lora: LoraSize,
        real_adapter: Mapping[str, Tensor] | None,
        seed: int,
    ) -> None:
        self.student, self.origin = network, origin
        self._networks |= {"real": origin, "fake": origin}
        self._adapters = {shared: LoraAdapters(shared) for shared in (network, origin)}
        with torch.random.fork_rng(devices=[]):  # the same adapters on every rank
            torch.manual_seed(fold_seed(seed))
            for name in self.roles:
                if name != "real" or real_adapter is not None:
                    self._add_adapter(name, lora)
        for name in [role for role in self.roles if role in self._adapted]:
            if real_adapter is not None and name != "student":
                self.load_state_dict_of(name, real_adapter)
            for parameter in self.named_parameters_of(name).values():
                parameter.requires_grad_(name != "real")

    def _add_adapter(self, name: Role, lora: LoraSize) -> None:
        network = self._networks[name]
        adapt_times = name == "student" and network.config.two_time
        self._adapters[network].add(name, lora, adapt_times=adapt_times, expert=self.expert)
        self._adapted.add(name)
        if name == "student" and network.config.causal is not None:
            network.far_patch_embedding.float()  # as adapters are

    # --- switching

    def role(self, name: Role) -> AbstractContextManager[None]:
        """Activate a role inside the block; afterwards the role that was active before."""
        network = self._networks[name]
        if network not in self._adapters:
            return nullcontext()
        return self._adapters[network].use(name if name in self._adapted else None)

    def velocity(self, name: Role, condition: Condition) -> Velocity:
        """``u(z, t, r)`` of a role under a condition; each call activates the role."""
        return bind(self._networks[name], condition, self._scopes[name])

    def network_of(self, name: Role) -> FlowMapTransformer:
        """The network of a role, to be called inside ``role(name)``."""
        return self._networks[name]

    def networks(self) -> list[FlowMapTransformer]:
        """All networks, each once; two experts are two."""
        return list(dict.fromkeys(one for pair in self._networks.values() for one in networks_of(pair)))

    # --- weights

    def named_parameters_of(self, name: Role) -> dict[str, nn.Parameter]:
        """Weights of a role only: its adapter and what it trains in full, or its copy of the network."""
        network = self._networks[name]
        if network not in self._adapters:
            named = {} if name == "real" else dict(network.named_parameters())
            return {key: weight for key, weight in named.items() if self._is_trained(network, key)}
        if name not in self._adapted:
            return {}
        own = self._adapters[network].parameters(name)
        if name == "student" and network.config.causal is not None:
            own |= network.far_patch_embedding.named_parameters(prefix=FAR)
        return own

    def parameters_of(self, name: Role) -> list[nn.Parameter]:
        """Weights of a role that an optimizer trains."""
        return [parameter for parameter in self.named_parameters_of(name).values() if parameter.requires_grad]

    def state_dict_of(self, name: Role) -> dict[str, Tensor]:
        """Weights of a role by name, as views."""
        return {key: parameter.detach() for key, parameter in self.named_parameters_of(name).items()}

    @torch.no_grad()
    def load_state_dict_of(self, name: Role, state: Mapping[str, Tensor]) -> None:
        """Copy weights into a role; names and shapes must match ``state_dict_of``."""
        own = self.named_parameters_of(name)
        _check_fit(own, state, name)
        for key, parameter in own.items():
            parameter.copy_(shard_like(state[key], parameter))


def start_network(network: FlowMapTransformer, model: ModelSection, *, two_time: bool) -> FlowMapTransformer:
    """Network that a student starts from: a flow map if ``two_time``, causal where the recipe is.

    Args:
        network: The model that the stage starts from.
        model: Section of the recipe.
        two_time: Whether the student is a flow map; without, the network stays as it is.
    """
    if two_time and not network.config.two_time:
        network = each_expert(network, lambda one: two_time_from(one, model.gate, model.conditioning))
    if two_time and model.causal is not None:
        if network.config.boundary is not None:
            raise UsageError(
                "A model with two experts (Wan 2.2 A14B) cannot be made causal.", "Set model.causal=null."
            )
        network = as_causal(network, CausalConfig.from_recipe(model.causal))
    return network


def _check_fit(own: Mapping[str, Tensor], given: Mapping[str, Tensor], role: str) -> None:
    """Refuse weights of other names or shapes than the role's."""
    hint = "Use a checkpoint of the same model, with the same LoRA rank and targets."
    for name in sorted(own.keys() | given.keys()):
        if name not in given:
            problem = f"{name} is missing"
        elif name not in own:
            problem = f"{name} is unexpected"
        elif own[name].shape != given[name].shape:
            problem = f"{name} has shape {tuple(given[name].shape)} instead of {tuple(own[name].shape)}"
        else:
            continue
        raise UsageError(f"The weights do not fit the {role}: {problem}.", hint)
