"""What a command starts from: models, data and prompts, whether each is there, and how to get it.

One list serves the command itself, its dry run, ``plan`` and ``doctor``. Nothing is loaded, downloaded or
written to make it, so it works on a machine that has none of the files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from anyflow_cli.data.clips import VIDEO_SUFFIXES
from anyflow_cli.data.dataset import no_noise
from anyflow_cli.data.published import recognize
from anyflow_cli.data.shards import MANIFEST, PROVENANCE, Manifest, read_manifest
from anyflow_cli.data.video import require_ffmpeg
from anyflow_cli.errors import AnyflowError, UsageError
from anyflow_cli.model.attention import backend_problem
from anyflow_cli.model.config import NetworkConfig
from anyflow_cli.model.encoders import VaeConfig, check_channels, check_scale
from anyflow_cli.model.known_models import KNOWN_MODELS
from anyflow_cli.model.layouts.components import component_config
from anyflow_cli.model.lora_formats import check_lora, split_loras
from anyflow_cli.model.pipeline_io import (
    BUILT_IN,
    component,
    components_of,
    has_components,
    read_config,
    resolve_pipeline,
)
from anyflow_cli.recipe.schema import ExpertGuidance, Recipe
from anyflow_cli.runs.checkpoint import is_checkpoint
from anyflow_cli.runs.latents import check_sizes
from anyflow_cli.runs.open import ModelChoice, describe_checkpoint, locate, model_problems
from anyflow_cli.runs.paths import MODEL, RunPaths
from anyflow_cli.utils.distributed import default_device
from anyflow_cli.utils.hub import cached_snapshot, is_hub_name

ResourceState = Literal["ready", "to download", "missing", "optional", "unusable"]
log = logging.getLogger(__name__)

TEACHER_METHODS = (None, "euler", "unipc")  # samplers of a model with one time that is guided
UNTRAINED = "not trained yet"
TUNE = "anyflow train-flowmap --objective flow-matching"


class Resource(NamedTuple):
    """Something a command reads before it starts.

    Attributes:
        name: Its part in the command, e.g. teacher or data set.
        place: Path or address.
        state: ``missing`` and ``unusable`` stop the command; ``optional`` is missing and may be.
        how_to_get_it: The next step; empty where there is nothing to do.
        problem: For ``unusable``, what is wrong, as a sentence.
    """

    name: str
    place: str
    state: ResourceState
    how_to_get_it: str = ""
    problem: str = ""

    def __str__(self) -> str:
        """Place, state, problem and next step in one line."""
        return "; ".join(filter(None, (f"{self.place}: {self.state}", self.problem, self.how_to_get_it)))


class Given(NamedTuple):
    """What the command line names outside the recipe.

    Attributes:
        model: Address of ``--model``, where that does not set a recipe key.
        data: Directory of videos or latents (``--data``, ``--from-videos``, ``--videos``).
        prompts: Whether prompts are given, so that those of the recipe are not read.
        pictures: Whether the pictures are given that videos start with, or start and end with.
        guided: Whether a model with one time is sampled with guidance, as a teacher.
    """

    model: str | None = None
    data: Path | None = None
    prompts: bool = False
    pictures: bool = False
    guided: bool = True


NOTHING = Given()


def inputs(recipe: Recipe, paths: RunPaths, command: str, given: Given = NOTHING) -> list[Resource]:
    """List everything a command reads before it starts; a verb that reads nothing has an empty list."""
    find = _INPUTS.get(command)
    return find(recipe, paths, given) if find else []


def require_inputs(resources: Iterable[Resource]) -> dict[str, str]:
    """Return the place of each resource by name, without optional ones; refuse if a command cannot start.

    Logs the licenses of published models, and what will be downloaded.
    """
    found = [resource for resource in resources if resource.state != "optional"]
    blocking = [resource for resource in found if resource.state in ("missing", "unusable")]
    if not blocking:
        for resource in found:
            if resource.place in KNOWN_MODELS or resource.state == "to download":
                log.info("%s: %s", resource.name, resource)
        return {resource.name: resource.place for resource in found}
    sentences = [one.problem or f"There is no {one.name} at {one.place}." for one in blocking]
    hint = ", then ".join(dict.fromkeys(one.how_to_get_it for one in blocking if one.how_to_get_it))
    raise UsageError(" ".join(dict.fromkeys(sentences)), f"{hint[:1].upper()}{hint[1:]}.")


def is_ready(resources: Iterable[Resource]) -> bool:
    """Whether everything a command starts from is on this machine."""
    return all(resource.state in ("ready", "optional") for resource in resources)


def can_start(resources: Iterable[Resource]) -> bool:
    """Whether a command could start, if need be with a download."""
    return all(resource.state not in ("missing", "unusable") for resource in resources)


def check_usable(resources: Iterable[Resource]) -> None:
    """Refuse what is there and cannot be used; a dry run accepts what is still missing."""
    require_inputs(resource for resource in resources if resource.state == "unusable")


def find_model(recipe: Recipe, paths: RunPaths, address: str | None, *, teacher: bool = False) -> ModelChoice:
    """Choose the model: the given one, else the furthest one trained here, else the pretrained one.

    Without any of these, the choice is the place where ``train-flowmap`` will put its model.
    """
    if address is not None:
        return ModelChoice(address, "given with --model")
    if teacher:
        return ModelChoice(recipe.model.teacher, f"the teacher of recipe {recipe.name}")
    for trained in (paths.stage_2(recipe.distill.simulation) / MODEL, _stage_1(recipe, paths)):
        if trained.is_dir():
            return ModelChoice(str(trained), f"the furthest model trained with recipe {recipe.name}")
    pretrained = recipe.model.pretrained_any_step
    if pretrained is None:
        return ModelChoice(str(_stage_1(recipe, paths)), UNTRAINED)
    why = f"the recipe's pretrained model; {paths.home} has no trained one"
    known = KNOWN_MODELS.get(pretrained)
    return ModelChoice(pretrained, why if known is None else f"{why}; license: {known.license}")


def _stage_1(recipe: Recipe, paths: RunPaths) -> Path:
    """Where the recipe's stage 1 puts its any-step model; tuning the teacher makes none."""
    objective = recipe.train_flowmap.objective
    return paths.stage_1("flow-map" if objective == "flow-matching" else objective) / MODEL


# --- by command


def _synthesize(recipe: Recipe, paths: RunPaths, given: Given) -> list[Resource]:
    if given.data is not None:  # real videos are encoded, which takes the model's own VAE and text encoder
        return [
            *_broken_ffmpeg(),
            _videos(given.data),
            model_resource("teacher", recipe.model.teacher, recipe),
        ]
    teacher = model_resource("teacher", recipe.synthesize.teacher or recipe.model.teacher, recipe)
    broken = _broken_ffmpeg() if recipe.synthesize.previews else []
    scales = _guidance(teacher, {"synthesize.guidance": recipe.synthesize.guidance})
    return [*broken, *_attention(recipe), *_prompts(recipe), teacher, *scales]


def _train(recipe: Recipe, paths: RunPaths, given: Given) -> list[Resource]:
    stage = recipe.train_flowmap
    paired = stage.objective == "flow-map" and stage.flow_map.noise == "paired"
    found = _training(recipe, paths, paired or stage.objective == "consistency-ode")
    return [*found, *_guidance(found[1], {"train_flowmap.flow_map.guidance": stage.flow_map.guidance})]


def _training(recipe: Recipe, paths: RunPaths, paired: bool) -> list[Resource]:
    """The data set, the teacher and the attention of both stages; ``paired``: videos whose noise is known."""
    latents = _latents(recipe.data.path or str(paths.data), recipe, paired)
    teacher = model_resource("teacher", recipe.model.teacher, recipe)
    return [latents, teacher, *_attention(recipe, trains=True)]


def _distill(recipe: Recipe, paths: RunPaths, given: Given) -> list[Resource]:
    settings = recipe.distill
    ode = paths.stage_1("consistency-ode") / MODEL
    from_ode = settings.simulation == "consistency" and ode.is_dir()
    start = _trained(
        recipe,
        "stage-1 model",
        settings.init_from,
        ode if from_ode else _stage_1(recipe, paths),
        "anyflow train-flowmap",
    )
    tuned = paths.stage_1("flow-matching") / MODEL
    real = _trained(recipe, "tuned teacher", settings.real_score, tuned, TUNE)
    if real.state == "missing":
        how = f"`{TUNE} -r {recipe.name}` makes it; without it the teacher is the real score"
        real = real._replace(state="optional", how_to_get_it=how)
    teacher = real if real.state == "ready" else model_resource("teacher", recipe.model.teacher, recipe)
    scales = _guidance(start, {"distill.flow_map.guidance": settings.flow_map.guidance})
    scales += _guidance(teacher, {"distill.real_guidance": settings.real_guidance})
    paired = settings.joint and settings.flow_map.noise == "paired"
    return [*_training(recipe, paths, paired), start, real, *scales]


def _finetune(recipe: Recipe, paths: RunPaths, given: Given) -> list[Resource]:
    start = _any_step(recipe, paths, Given(recipe.finetune.init_from))
    start += _guidance(start[0], {"finetune.flow_map.guidance": recipe.finetune.flow_map.guidance})
    start += _attention(recipe, trains=True)
    data = given.data
    if data is not None and _has_latents(data):
        return [*start, _latents(str(data), recipe)]
    if data is not None:
        videos = _videos(data)
    elif recipe.finetune.world is not None:
        videos = Resource("videos", f"clips of the world '{recipe.finetune.world}'", "ready")
    else:
        how = "name a directory of videos with --data DIR"
        videos = Resource("videos", "--data", "missing", how, "finetune needs videos.")
    encoders = model_resource("teacher", recipe.model.teacher, recipe)
    return [*_broken_ffmpeg(), *start, videos, encoders]


def _has_latents(data: Path) -> bool:
    """Whether a directory is a data set of latents, complete or not, and not one of videos."""
    is_own = (data / MANIFEST).exists() or (data / PROVENANCE).exists()
    if is_own or not data.is_dir() or recognize(data) is None:
        return is_own
    return not any(file.suffix.lower() in VIDEO_SUFFIXES for file in data.rglob("*"))


def _sample(recipe: Recipe, paths: RunPaths, given: Given) -> list[Resource]:
    prompts = [] if given.prompts else _prompts(recipe)
    models = _any_step(recipe, paths, given)
    if given.guided:
        scales = {"sample.teacher_guidance": recipe.sample.teacher_guidance}
        models += _guidance(models[0], scales, sampled=True)
    needs = [*_broken_ffmpeg(), *_attention(recipe), *models, *prompts]
    if recipe.model.needs_pictures and not given.pictures:
        options = "--image FILE" + " and --last-image FILE" * (recipe.model.pictures == "first-last")
        needs.append(Resource("pictures", "the first frame", "missing", f"give {options}"))
    return needs


def _evaluate(recipe: Recipe, paths: RunPaths, given: Given) -> list[Resource]:
    if given.data is not None:
        return [*_broken_ffmpeg(), _videos(given.data)]
    teacher = [model_resource("teacher", recipe.model.teacher, recipe)] if recipe.evaluates_teacher else []
    models = [*_any_step(recipe, paths, given), *teacher]
    scales = {"sample.teacher_guidance": recipe.sample.teacher_guidance}
    for one in tuple(models) if given.guided else teacher:
        models += _guidance(one, scales, sampled=True)
    return [*_broken_ffmpeg(), *_attention(recipe), *models]


def _any_step(recipe: Recipe, paths: RunPaths, given: Given) -> list[Resource]:
    choice = find_model(recipe, paths, given.model)
    if choice.why == UNTRAINED:
        how = f"run `anyflow train-flowmap -r {recipe.name}`, or name a model with --model"
        return [Resource("any-step model", choice.address, "missing", how)]
    return [model_resource("any-step model", choice.address, recipe)]


_INPUTS: dict[str, Callable[[Recipe, RunPaths, Given], list[Resource]]] = {
    "synthesize": _synthesize,
    "train-flowmap": _train,
    "distill": _distill,
    "finetune": _finetune,
    "sample": _sample,
    "evaluate": _evaluate,
    "export": _any_step,
}


# --- by kind


def model_resource(name: str, address: str, recipe: Recipe) -> Resource:
    """A model at an address that the user or the recipe names, with the LoRA files merged into it."""
    try:
        model, loras = split_loras(address)
    except AnyflowError as error:
        return _unusable(name, address, error)
    on_hub = model not in BUILT_IN and is_hub_name(model)
    snapshot = cached_snapshot(model) if on_hub else None
    if on_hub and snapshot is None:
        return _on_hub(name, model)._replace(place=address)
    try:
        problems = [] if model in BUILT_IN else model_problems(str(snapshot or model))
        if problems and on_hub:  # an interrupted download, which the command completes
            return _on_hub(name, model)._replace(place=address)
        if problems:
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            problem = f"{problems[0].rstrip('.')}{more}."
            read_config(locate(model))  # another architecture is refused with what to use instead
            return Resource(name, address, "unusable", "fetch or save the model again", problem)
        path = locate(str(snapshot or model))
        for lora in loras if not is_checkpoint(path) else ():
            check_lora(lora, read_config(path))
    except AnyflowError as error:
        return _unusable(name, address, error)
    except OSError as error:
        return _unusable(name, address, UsageError(f"{address} cannot be read: {error.strerror}."))
    if model in BUILT_IN:
        return Resource(name, address, "ready", "part of anyflow")
    known = KNOWN_MODELS.get(model)
    found = Resource(name, address, "ready", f"license: {known.license}" if known else "")
    return found if name == "tuned teacher" else _whole(found, path, recipe)  # that is a score only


def _whole(found: Resource, path: Path, recipe: Recipe) -> Resource:
    """A model whose VAE, text encoder and tokenizer are used too, or saved with what is trained from it."""
    other = recipe.model.components or recipe.model.teacher
    if is_checkpoint(path):
        return found
    own = has_components(path)
    is_here = own or other in BUILT_IN or has_components(Path(other).expanduser())
    if is_here:
        try:
            pipeline = path if own else resolve_pipeline(other)
            for name in components_of(read_config(path)):
                component(pipeline, name)  # refuses one that is not there, such as CLIP
            _check_vae(path, pipeline, recipe.model.vae_scale)
        except AnyflowError as error:
            return _unusable(found.name, found.place, error)
    if own:
        return found
    if is_here or is_hub_name(other):
        return found._replace(how_to_get_it=f"VAE, text encoder and tokenizer: those of {other}")
    how = (
        "set model.components to a pipeline folder or Hub name, or put Wan's own files beside it, or run "
        f"`anyflow export --model {path} --out DIR` and name that directory"
    )
    problem = f"{other} has no VAE, text encoder and tokenizer."
    if other == found.place:
        problem = f"{path} has a transformer but no VAE, text encoder and tokenizer."
    return Resource(found.name, found.place, "unusable", how, problem)


def _check_vae(network: Path, pipeline: Path, scale: int) -> None:
    """Refuse the VAE of a pipeline whose configuration does not fit a network or the recipe's scale."""
    vae, defaults = component_config(component(pipeline, "vae")), VaeConfig.model_fields
    channels, factor = (vae.get(n, defaults[n].default) for n in ("z_dim", "scale_factor_spatial"))
    check_channels(read_config(network).out_channels, channels)
    check_scale(factor, scale)


def _on_hub(name: str, address: str) -> Resource:
    """A model that is not, or not completely, in the Hub's local cache."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false"):
        how = f"unset HF_HUB_OFFLINE, or copy the folder of `hf download {address}` here and name its path"
        return Resource(name, address, "missing", how, f"{address} is not in the cache, and the Hub is off.")
    known = KNOWN_MODELS.get(address)
    facts = f"about {known.download} GB, license: {known.license}; " if known else ""
    return Resource(name, address, "to download", f"{facts}`hf download {address}` downloads it beforehand")


def _trained(recipe: Recipe, name: str, given: str | None, place: Path, command: str) -> Resource:
    """A model that the recipe names, else the one that a command leaves."""
    if given is not None or place.is_dir():
        return model_resource(name, given or str(place), recipe)
    return Resource(name, str(place), "missing", f"run `{command} -r {recipe.name}`")


def _latents(address: str, recipe: Recipe, paired: bool = False) -> Resource:
    """A data set of latents; ``paired``: of videos whose noise is known."""
    if "://" in address:
        return Resource("data set", address, "ready", "read over the network while training")
    try:
        published = recognize(address)
    except AnyflowError as error:
        return _unusable("data set", address, error)
    if published is not None:
        try:
            if paired:
                raise no_noise(address)
            shapes = published.first_shapes()
            if len(shapes) == 1 and not recipe.data.truncate:
                check_sizes(recipe.model, address, shapes)
        except AnyflowError as error:
            return _unusable("data set", address, error)
        return Resource("data set", address, "ready", f"{published}, read where it is")
    if not (Path(address) / MANIFEST).is_file():
        begun = " to complete it" if (Path(address) / PROVENANCE).exists() else ""
        return Resource("data set", address, "missing", f"run `anyflow synthesize -r {recipe.name}`{begun}")
    try:
        manifest = read_manifest(address)
        _check_given(recipe, manifest, address)
        if paired and manifest.provenance.get("kind") == "videos":
            raise no_noise(address)
        if manifest.version == 1 and not recipe.data.truncate:
            check_sizes(recipe.model, address, [manifest.latent_shape])
    except AnyflowError as error:
        return _unusable("data set", address, error)
    return Resource("data set", address, "ready")


def _check_given(recipe: Recipe, manifest: Manifest, address: str) -> None:
    """Refuse a data set whose samples lack the pictures that the recipe's model needs, or have others."""
    there, wanted = manifest.provenance.get("pictures"), recipe.model.pictures
    if there != (wanted if recipe.model.needs_pictures else None):
        raise UsageError(
            f"The data set {address} has pictures of the kind {there or 'none'}; the recipe's model.pictures "
            f"is {wanted}.",
            "Make one with this recipe: `anyflow synthesize`.",
        )


def _prompts(recipe: Recipe) -> list[Resource]:
    """The recipe's file of prompts, if it has one."""
    file = recipe.data.prompts
    if file is None:
        return []
    if Path(file).expanduser().is_file():
        return [Resource("prompt file", file, "ready")]
    return [Resource("prompt file", file, "missing", "give a file with one prompt per line, --prompts FILE")]


def _videos(directory: Path) -> Resource:
    if directory.is_dir():
        return Resource("videos", str(directory), "ready")
    problem = f"{directory} is not a directory."
    return Resource("videos", str(directory), "unusable", "name a directory of videos", problem)


def _broken_ffmpeg() -> list[Resource]:
    """The resource ffmpeg if it does not work; a working one needs no line."""
    try:
        require_ffmpeg()
    except UsageError as error:
        return [_unusable("ffmpeg", "IMAGEIO_FFMPEG_EXE or imageio-ffmpeg", error)]
    return []


def _guidance(
    model: Resource, scales: Mapping[str, float | ExpertGuidance], *, sampled: bool = False
) -> list[Resource]:
    """Scales for each of two experts that a model of one network cannot take; others need no line.

    Args:
        model: The model, whose network is looked up where it is here or known.
        scales: Scales of guidance by the recipe's key.
        sampled: Whether they are for sampling, which guides only models with one time.
    """
    pairs = {key: scale for key, scale in scales.items() if isinstance(scale, ExpertGuidance)}
    known = KNOWN_MODELS.get(model.place)
    if not pairs or not (known or model.state == "ready"):
        return []
    config = known.network if known else _network(model.place)
    if config.boundary is not None or (sampled and config.two_time):
        return []
    problem = "{} has a scale for each of two experts ({:g} and {:g}), and {} is one network."
    return [
        Resource("guidance", key, "unusable", f"set {key} to one number",
                 problem.format(key, pair.high, pair.low, model.place))
        for key, pair in pairs.items()
    ]  # fmt: skip


def _network(address: str) -> NetworkConfig:
    """The network of a model that is here."""
    model = split_loras(address)[0]
    on_hub = model not in BUILT_IN and is_hub_name(model)
    path = locate(str(cached_snapshot(model)) if on_hub else model)
    if not is_checkpoint(path):
        return read_config(path)
    info = describe_checkpoint(path)
    return replace(read_config(info.pipeline if info.run is None else info.run.base), two_time=info.two_time)


def _attention(recipe: Recipe, *, trains: bool = False) -> list[Resource]:
    """The attention backend if the recipe names one that cannot run here; others need no line."""
    name = recipe.model.attention
    problem = None if name == "auto" else backend_problem(name, default_device().type, trains=trains)
    return [Resource("attention", name, "unusable", problem[1], problem[0])] if problem else []


def _unusable(name: str, place: str, error: AnyflowError) -> Resource:
    hint = (error.hint or "choose another one").rstrip(".")
    return Resource(name, place, "unusable", f"{hint[0].lower()}{hint[1:]}", error.message)
