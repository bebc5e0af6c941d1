"""From what the user names to the folder of each part: a pipeline, a transformer, or a single file and its base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from adatsq_trt.checkpoints.weights import refuse_pickle
from adatsq_trt.errors import MismatchError, MissingFileError, UnknownNameError, UserError
from adatsq_trt.files import read_json_model
from adatsq_trt.models.families import families, family_of_pipeline, family_of_transformer, known_families
from adatsq_trt.models.family import AGAIN, Family, JsonObject
from adatsq_trt.schedule import EXPERTS, FIRST_EXPERT, SECOND_EXPERT
from adatsq_trt.zoo import zoo_models

INDEX = "model_index.json"
_REPOSITORY, _SLASH = "models--", "--"  # OWNER/NAME as the hub's cache writes it: models--OWNER--NAME
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LIBRARIES = ("diffusers", "transformers")  # of a pipeline's parts; anything else would be code from the checkpoint
_EXPECTED = "the folder of a diffusers pipeline or transformer, a .safetensors file, or a hub id such as OWNER/NAME"


@dataclass(frozen=True)
class Source:
    """Where the parts lie.

    Attributes:
        name: the model's name in files and folders.
        family: of the pipeline.
        folder: of the pipeline with text encoders, VAE and scheduler.
        transformer: folder of the transformer, or a single file.
        config: the transformer's configuration.
        boundary_ratio: of a pipeline with two transformers, the second of which has the steps below it; else None.
    """

    name: str
    family: Family
    folder: Path
    transformer: Path
    config: Path
    boundary_ratio: float | None = None

    @property
    def transformers(self) -> dict[str, Path]:
        """The transformers' folders, or the single file, by the names that the pipeline has for them."""
        places = {FIRST_EXPERT: self.transformer}
        return places if self.boundary_ratio is None else {**places, SECOND_EXPERT: self.folder / SECOND_EXPERT}

    @property
    def configs(self) -> list[Path]:
        """Configurations of the transformers."""
        second = [] if self.boundary_ratio is None else [self.folder / SECOND_EXPERT / "config.json"]
        return [self.config, *second]

    @property
    def single_file(self) -> bool:
        """Whether the transformer is one file, in any of the layouts that diffusers converts."""
        return self.transformer.is_file()


def find_source(text: str, base: str | None) -> Source:
    """Find the parts.

    Args:
        text: path or hub id of a pipeline; path of a transformer or of a single file.
        base: path or hub id of the pipeline that a transformer or a single file belongs to.

    Raises:
        MissingFileError: a folder lacks what it should hold, or the hub cannot be asked.
        MismatchError: an architecture that has no adapter, or a base of another one.
        UserError: a base where none belongs or none where one is needed; a pickle.
    """
    place = _locate(text)
    if place.is_file():
        refuse_pickle(place)
        if place.suffix != ".safetensors":
            raise UserError(f"'{place}': got a {place.suffix or 'nameless'} file, expected {_EXPECTED}")
        folder, family = find_base(base, place, "a single file holds the transformer alone")
        return Source(_place_name(place.with_suffix("")), family, folder, place, folder / "transformer" / "config.json")
    if (place / INDEX).is_file():
        if base is not None:
            raise UserError(f"--base {base}: '{place}' is a whole pipeline already; leave --base out")
        return Source(
            _place_name(place),
            _pipeline_family(place),
            place,
            place / FIRST_EXPERT,
            place / FIRST_EXPERT / "config.json",
            boundary_ratio(place),
        )
    if (place / "config.json").is_file():
        own = _transformer_family(place / "config.json")
        folder, family = find_base(base, place, "a transformer alone has no text encoders")
        if family.transformer != own.transformer:
            raise MismatchError(
                f"'{place}' is a {own.transformer}, --base '{folder}' a {family.pipeline} with a "
                f"{family.transformer}; name a {own.pipeline}"
            )
        return Source(_place_name(place), family, folder, place, place / "config.json")
    for file in sorted(place.glob("*")):
        refuse_pickle(file)
    raise MissingFileError(f"'{place}' has neither {INDEX} nor config.json; expected {_EXPECTED}")


def _locate(text: str) -> Path:
    """A path as it is, a hub id as the folder that it was downloaded to."""
    path = Path(text)
    if path.exists():
        return path.absolute()
    if _HUB_ID.fullmatch(text):
        return _download(text)
    if "/" in text:
        raise MissingFileError(f"'{text}' does not exist; expected {_EXPECTED}")
    raise UnknownNameError("model", text, zoo_models())


def _download(hub_id: str) -> Path:
    """Diffusers' own download, which knows the parts of a pipeline and leaves pickles and code where they are."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import is_offline_mode

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True, trust_remote_code=False))
    except Exception as error:  # what is raised depends on the network, the hub and the repository
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else reason
        raise MissingFileError(
            f"'{hub_id}' is neither a model of the zoo nor a path here, and it could not be downloaded ({why}); run "
            f"'hf download {hub_id}' where the hub can be reached, or give the folder of a saved pipeline"
        ) from error


def find_base(base: str | None, place: object, why: str) -> tuple[Path, Family]:
    """The pipeline that a transformer belongs to.

    Args:
        base: path or hub id.
        place: the transformer, as messages name it.
        why: reason that it needs a base.

    Raises:
        UserError: there is no base.
        MissingFileError: it is not there.
        MismatchError: it has no adapter.
    """
    if base is None:
        raise UserError(f"'{place}': {why}; pass --base with the folder or hub id of the pipeline that it belongs to")
    folder = _locate(base)
    if not (folder / INDEX).is_file():
        raise MissingFileError(f"--base '{folder}' has no {INDEX}; name the folder or hub id of a diffusers pipeline")
    if boundary_ratio(folder) is not None:
        raise MismatchError(
            f"--base '{folder}' has two transformers, and '{place}' is one: name the folder of the whole pipeline alone"
        )
    return folder, _pipeline_family(folder)


def boundary_ratio(folder: Path) -> float | None:
    """The part of the timesteps at and above which the first of two transformers denoises; None where there is one.

    Raises:
        MismatchError: the pipeline has a second transformer and no boundary, or the reverse.
    """
    index = read_json_model(folder / INDEX, JsonObject, AGAIN).root
    ratio, second = index.get("boundary_ratio"), _class_of(index.get(SECOND_EXPERT))
    if ratio is None and second is None:
        return None
    if second is None or not isinstance(ratio, float | int) or not 0 < ratio < 1:
        there = "no second transformer" if second is None else f"a {second} as its second transformer"
        raise MismatchError(
            f"'{folder / INDEX}': boundary_ratio is {ratio!r} and there is {there}, expected a ratio between 0 and 1 "
            f"with a second transformer, or neither; {AGAIN}"
        )
    return float(ratio)


def _pipeline_family(folder: Path) -> Family:
    """The family of a pipeline, every part of which is a class of a library; the family has the transformer's.

    Raises:
        MismatchError: another pipeline, or a part with code of its own.
    """
    index = read_json_model(folder / INDEX, JsonObject, AGAIN).root
    got = index.get("_class_name")
    family = family_of_pipeline(got)
    if family is None:
        model = _class_of(index.get("transformer") or index.get("unet"))
        raise MismatchError(
            f"'{folder}' is a {got} with a {model}, which has no adapter; supported are {known_families()}; "
            "choose such a checkpoint, or write an adapter (docs/adapters.md)"
        )
    for part, place in index.items():
        if part not in EXPERTS and isinstance(place, list) and place[0] not in (*_LIBRARIES, None):
            raise MismatchError(
                f"'{folder / INDEX}': part '{part}' is made by '{place[0]}', which would be code from the checkpoint "
                f"and is never run; expected a class of {' or '.join(_LIBRARIES)}"
            )
    if _class_of(index.get("transformer")) != family.transformer:
        raise MismatchError(
            f"'{folder}': got the transformer {_class_of(index.get('transformer'))}, expected {family.transformer}; "
            "choose another checkpoint"
        )
    second = _class_of(index.get(SECOND_EXPERT))
    if second is not None and not (family.experts and second == family.transformer):
        raise MismatchError(
            f"'{folder}' has a {second} as its second transformer, expected "
            f"{f'a {family.transformer}' if family.experts else 'one that denoises all steps'}; {family.instead}"
        )
    for option, value in family.pipeline_options.items():
        if option in index and index[option] != value:
            raise MismatchError(
                f"'{folder / INDEX}': {option} is {index[option]!r}, expected {value!r}; its pipeline treats the "
                f"transformer in another way; {family.instead}"
            )
    return family.configured(index)


def _transformer_family(config: Path) -> Family:
    got = read_json_model(config, JsonObject, AGAIN).root.get("_class_name")
    family = family_of_transformer(got)
    if family is None:
        known = ", ".join(family.transformer for family in families())
        raise MismatchError(
            f"'{config}' is of a {got}, which has no adapter; supported are {known}; choose such a checkpoint, or "
            "write an adapter (docs/adapters.md)"
        )
    return family


def _class_of(place: JsonValue) -> JsonValue:
    return place[1] if isinstance(place, list) and len(place) == 2 else place


def _place_name(place: Path) -> str:
    """Name a folder or file; a snapshot in the hub's cache by its repository, since its own name is a hash."""
    if place.parent.name == "snapshots" and place.parent.parent.name.startswith(_REPOSITORY):
        return safe_name(place.parent.parent.name.removeprefix(_REPOSITORY).rpartition(_SLASH)[2])
    return safe_name(place.name)


def safe_name(text: str) -> str:
    """The last part of a path or hub id, in letters that folders, files and servers take."""
    name = re.sub(r"[^\w.+-]+", "-", Path(text).absolute().name, flags=re.ASCII).lstrip(".-+")
    return name[:100] or "model"
