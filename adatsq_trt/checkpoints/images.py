"""The images that calibration draws beside its prompts, and what the pipeline's own VAE makes of them.

They come from a folder (`--images`), where NAME.mask.png is the mask of NAME.png, or are made here. Prompt i goes with
image i, and again from the first where there are fewer images than prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw
from torch import Tensor

from adatsq_trt.checkpoints.prompts import load_encoder
from adatsq_trt.checkpoints.weights import find_weights, verified_sha256
from adatsq_trt.errors import AdatsqError, DamagedFileError, MissingFileError, UserError, one_line
from adatsq_trt.loading import PLAIN_LOADING, one_loader
from adatsq_trt.models.family import AGAIN, Canvas, Family

PREFIX = "image."  # of the stored tensors' names; the graph input follows
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MASK = ".mask"
_UPRIGHT = 4  # the last of the orientations of a camera whose rows are rows
_DEEP = ("I", "F")  # modes of integers and of floats, in Pillow
_EXPECTED = f"expected a folder with images ({', '.join(_SUFFIXES)})"
# Of the images and masks that are made here: another number is another set.
_MADE = "made here, 1"
_SHAPES = 5
Picture = tuple[Image.Image, Image.Image | None]


@dataclass(frozen=True)
class ImageSet:
    """The images of a run.

    Attributes:
        files: each with its mask's, where it has one; none for images that are made here.
    """

    files: tuple[tuple[Path, Path | None], ...] = ()

    @classmethod
    def of(cls, folder: Path | None, masked: bool) -> ImageSet:
        """The images of a folder, by their names; without a folder those that are made here.

        Args:
            folder: of images.
            masked: whether the family takes masks.

        Raises:
            MissingFileError: no such folder.
            UserError: no image in it, a mask without an image, two of one, or a mask for a family that takes none.
        """
        if folder is None:
            return cls()
        if not folder.is_dir():
            raise MissingFileError(f"--images '{folder}': there is no such folder; {_EXPECTED}")
        found = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in _SUFFIXES and file.is_file()]
        images = [file for file in found if not file.stem.lower().endswith(_MASK)]
        masks: dict[str, Path] = {}
        for file in found:
            if file.stem.lower().endswith(_MASK):
                other = masks.setdefault(file.stem[: -len(_MASK)], file)
                if other is not file:
                    raise UserError(f"--images: '{other}' and '{file}' are masks of one image; keep one of them")
        lonely = masks.keys() - {file.stem for file in images}
        if lonely or (masks and not masked):
            mask = masks[min(lonely or masks)]
            why = "there is no image of that name" if lonely else "the pipeline takes no mask"
            raise UserError(f"--images: '{mask}' is a mask, and {why}; take it out of the folder")
        if not images:
            raise UserError(f"--images '{folder}' holds no image; {_EXPECTED}")
        return cls(tuple((file, masks.get(file.stem)) for file in images))

    def lines(self, count: int) -> list[str]:
        """Lines that identify the images of so many prompts, for a hash."""
        files = [file for pair in self.files[:count] for file in pair]
        return [_MADE if file is None else verified_sha256(file) for file in files] or [_MADE]

    def pictures(self, count: int, canvas: Canvas, masked: bool) -> Iterator[Picture]:
        """An image and, for a family that takes one, a mask for each of so many prompts.

        Raises:
            DamagedFileError: a file is no image.
        """
        for index in range(count):
            image, mask = self.files[index % len(self.files)] if self.files else (None, None)
            opened = made_image(index, canvas) if image is None else read_image(image)
            if not masked:
                yield opened, None
            elif mask is None:
                yield opened, made_mask(index, opened.size)
            else:
                yield opened, read_image(mask)


def read_image(file: Path) -> Image.Image:
    """An image in RGB, turned as its camera says.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: it is no image, or one of more than 8 bits per channel, which Pillow would cut off at white.
    """
    from diffusers.utils import load_image

    with _opened(file) as opened:
        if opened.mode.startswith(_DEEP):
            raise DamagedFileError(
                f"'{file}' has more than 8 bits per channel (Pillow's mode {opened.mode}); save it with 8"
            )
        image: Image.Image = load_image(opened)
    return image


def image_size(file: Path) -> tuple[int, int]:
    """Width and height of an image that is turned as its camera says; its pixels are not read.

    Raises:
        MissingFileError: no such file.
        DamagedFileError: it is no image.
    """
    with _opened(file) as opened:
        width, height = opened.size
        sideways = opened.getexif().get(ExifTags.Base.Orientation, 1) > _UPRIGHT
    return (height, width) if sideways else (width, height)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """A file as Pillow opens it."""
    if not file.is_file():
        raise MissingFileError(f"'{file}' does not exist; give an image ({', '.join(_SUFFIXES)})")
    try:
        with closing(Image.open(file)) as opened:
            yield opened
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DamagedFileError(f"'{file}' is not a complete image ({one_line(error)}); save it again") from error


def made_image(index: int, canvas: Canvas) -> Image.Image:
    """An image of a gradient, some shapes and noise: the same for an index and a size."""
    numbers = np.random.default_rng([index, canvas.height, canvas.width])
    corners = Image.fromarray(numbers.integers(0, 256, (2, 2, 3), dtype=np.uint8))
    image = corners.resize((canvas.width, canvas.height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for shape in range(_SHAPES):
        left, right = sorted(numbers.integers(0, canvas.width, 2).tolist())
        top, bottom = sorted(numbers.integers(0, canvas.height, 2).tolist())
        color = tuple(numbers.integers(0, 256, 3).tolist())
        (draw.ellipse if shape % 2 else draw.rectangle)((left, top, right, bottom), fill=color)
    grain = numbers.integers(-12, 13, (canvas.height, canvas.width, 3))
    return Image.fromarray(np.clip(np.asarray(image, np.int64) + grain, 0, 255).astype(np.uint8))


def made_mask(index: int, size: tuple[int, int]) -> Image.Image:
    """A white rectangle on black, a quarter to three quarters of either side long.

    Args:
        index: of the image.
        size: width and height of it.
    """
    numbers = np.random.default_rng([index, *size, 1])
    mask = Image.new("L", size)
    box = []
    for side in size:
        length = max(int(numbers.integers(side // 4, max(3 * side // 4, side // 4 + 1))), 1)
        first = int(numbers.integers(0, side - length + 1))
        box.append((first, first + length - 1))
    (left, right), (top, bottom) = box
    ImageDraw.Draw(mask).rectangle((left, top, right, bottom), fill=255)
    return mask


def load_image_pipeline(family: Family, vae: Path, folder: Path, parts: Mapping[str, str]) -> Any:
    """The pipeline with what encodes images, in float32, and nothing else.

    Args:
        family: of the pipeline, which has an image condition.
        vae: the VAE's folder.
        folder: of the pipeline.
        parts: folders in there of what encodes images beside the VAE → their classes (`ImageCondition.encoders`).

    Raises:
        DamagedFileError: diffusers or transformers cannot load a part.
        MissingFileError: a part has no weights.
    """
    common: dict[str, Any] = {"torch_dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    loaded = {}
    for part, place in {"vae": vae, **{part: folder / part for part in parts}}.items():
        try:
            with one_loader(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of a newer name for torch_dtype, which older ones lack
                loaded[part] = _load_part(place, parts.get(part), common)
        except AdatsqError:
            raise
        except Exception as error:  # what is raised depends on the part and the library
            raise DamagedFileError(f"'{place}' does not load ({one_line(error)}); {AGAIN}") from error
    kind = family.load_pipeline_class()
    return kind(**{**dict.fromkeys(kind._get_signature_keys(kind)[0]), **loaded})


def _load_part(folder: Path, kind: str | None, common: Mapping[str, Any]) -> Any:
    """A VAE, or a part of a class of transformers."""
    import transformers
    from diffusers import AutoModel

    if kind is not None and kind.endswith("Processor"):
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    common = {**common, "variant": find_weights(folder).variant}
    if kind is None:
        return AutoModel.from_pretrained(str(folder), **common, **PLAIN_LOADING).eval()
    return load_encoder(folder, ["transformers", kind], common).eval()


def encode_images(
    family: Family, pipe: Any, pictures: Iterator[Picture], canvas: Canvas, on_image: Callable[[], None]
) -> dict[str, Tensor]:
    """Encode images with a pipeline's own VAE.

    Args:
        family: with an image condition.
        pipe: its pipeline; neither transformer nor text encoders are used.
        pictures: images and masks.
        canvas: size that is drawn.
        on_image: called after each.

    Returns:
        Graph input → [images, ...], float32.

    Raises:
        DamagedFileError: the VAE gives numbers that are not finite.
    """
    condition = family.image_condition
    assert condition is not None, "only families with an image condition are asked"
    rows: list[Mapping[str, Tensor]] = []
    with torch.no_grad():
        for image, mask in pictures:
            encoded = condition.encode(pipe, image, mask, canvas)
            for name, value in encoded.items():
                if not bool(value.isfinite().all()):
                    raise DamagedFileError(
                        f"'{name}' of image {len(rows)} has NaN or infinite numbers; the VAE is damaged; {AGAIN}"
                    )
            rows.append(encoded)
            on_image()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
