"""From encoded bytes to the pixels that the model sees.

`open_image` is the gate: it takes bytes that anyone may have made, and decides from the header, before anything is
decoded, whether they are let in. `ImagePreprocessor` then resizes exactly as Hugging Face's processor does.

Memory of one image while it is decoded and resized: 14 bytes a pixel (measured at 64 million), so 0.9 GiB at the
default limit. A decoder that takes more, that never ends or that crashes is the caller's to hold: `data.limits` has a
limit on memory (what comes of it, MemoryError, is passed on from here) and a deadline that ends the process, and
`driver.feeder` goes on after a process that died.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from ray_ministral.config import ImageLimits
from ray_ministral.data.model_files import merged_patch, read_config, read_json, vision_image_size
from ray_ministral.errors import BadImageError, ModelError, TooLargeError

ALLOWED = "JPEG, PNG, WEBP, GIF or BMP"

_EXIF_ORIENTATION = 0x0112
_ORIENTATIONS = {  # EXIF 2.3, tag 274, as the operation that turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """Decodes `data` to an upright RGB image.

    Only formats in `ALLOWED` are tried, told by their first bytes; no other decoder (Ghostscript for EPS, libtiff) is
    ever reached. Pixels, sides and aspect are checked on the header. Of an animation the first frame is taken, of a
    multi-picture JPEG the first picture; transparency is laid on white; 16-bit grey is scaled to 8 bits (16-bit colour
    is by Pillow); EXIF orientation is followed, and ignored where the EXIF block itself is damaged.

    Raises BadImageError for what is not a whole image of an allowed format, TooLargeError for what is above `limits`,
    MemoryError.
    """
    with warnings.catch_warnings():
        # Pillow warns of damaged metadata and odd palettes. The picture counts, and what spoils that is an exception.
        warnings.simplefilter("ignore")
        image = _open_header(data)
        _check_size(image, limits)
        try:
            image.load()
            return _upright(_to_rgb(image), image)
        except MemoryError:
            raise
        except Exception as error:  # these bytes are foreign: whatever a decoder raises is about them
            raise BadImageError(f"{_kind(image)} cannot be decoded: {_reason(error)}", stage="decode") from error


def _plugin(data: bytes) -> type[ImageFile.ImageFile] | None:
    """The one decoder that may see `data`.

    Pillow's classes are used directly and not through `Image.open`, whose own limit on pixels is a global of the
    process that could not follow `ImageLimits`.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile
    return None


def _open_header(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise BadImageError("the image has no bytes", stage="decode")
    plugin = _plugin(data)
    if plugin is None:
        raise BadImageError(
            f"not an image of an allowed format ({len(data)} bytes beginning with {data[:8]!r}); wanted {ALLOWED}",
            stage="decode",
        )
    try:
        image = plugin(BytesIO(data))
    except MemoryError:
        raise
    except Exception as error:  # as above
        kind = plugin.format or plugin.__name__
        raise BadImageError(f"{kind} with a header that cannot be read: {_reason(error)}", stage="decode") from error
    if min(image.size) < 1:
        raise BadImageError(f"{_kind(image)} of {image.width} x {image.height} has no pixels", stage="decode")
    return image


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    long, short = max(width, height), min(width, height)
    shape = f"{width} x {height}"
    if long > limits.max_side:
        raise TooLargeError(f"an image of {shape} has a side above {limits.max_side}: make it smaller", stage="decode")
    if width * height > limits.max_pixels:
        raise TooLargeError(
            f"an image of {shape} has {width * height} pixels, at most {limits.max_pixels} are decoded: make it "
            "smaller, or raise --max-image-pixels",
            stage="decode",
        )
    if long > limits.max_aspect * short:
        raise TooLargeError(
            f"an image of {shape} is more than {limits.max_aspect:g} times as long as wide: crop it", stage="decode"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _sixteen_bit_grey(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not transparent:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _sixteen_bit_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow's own conversion would clip to white at 255."""
    values = np.asarray(image).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257, rounded to the nearest
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _upright(rgb: Image.Image, opened: Image.Image) -> Image.Image:
    try:
        operation = _ORIENTATIONS.get(opened.getexif().get(_EXIF_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 a damaged EXIF block says nothing of the picture, which is decoded already
        return rgb
    return rgb if operation is None else rgb.transpose(operation)


def _kind(image: ImageFile.ImageFile) -> str:
    return image.format or type(image).__name__


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


class ImagePreprocessor:
    """Hugging Face's Pixtral preprocessing in two halves: resizing here, rescaling and normalising as a table.

    So that pixels travel as bytes (a quarter of float32), the stage that needs floats looks them up in
    `normalisation_table`, which gives Hugging Face's `pixel_values` to the bit.
    """

    def __init__(self, model_dir: str | Path) -> None:
        """Reads config.json and processor_config.json (or preprocessor_config.json) of `model_dir`.

        Raises ModelError where they are not there, or ask for something that Ministral 3's preprocessing is not.
        """
        # Imported here, since it takes seconds and brings torch along.
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        config = read_config(model_dir)
        self.merged_patch = merged_patch(config, model_dir)
        options = _processor_options(model_dir)
        _refuse_other_preprocessing(options, model_dir)
        options["patch_size"] = self.merged_patch
        options["size"] = {"longest_edge": _longest_edge(options, config, model_dir)}
        try:
            self._processor = PixtralImageProcessorPil(**options)
            self._table = self._compute_table()
        except (TypeError, ValueError, KeyError) as error:
            raise ModelError(f"{model_dir}: the image processor's configuration cannot be used: {error}") from error
        self.longest_edge: int = options["size"]["longest_edge"]

    def resize(self, image: Image.Image) -> np.ndarray:
        """`image` (RGB) as uint8 `[3, H, W]`; H and W are multiples of `merged_patch`, at least one each.

        The pixels are those of `PixtralImageProcessorPil` before it rescales and normalises.
        """
        from transformers.image_utils import SizeDict
        from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

        processor = self._processor
        pixels = np.moveaxis(np.asarray(image), -1, 0)
        height, width = get_resize_output_image_size(
            pixels, size=self.longest_edge, patch_size=self.merged_patch, input_data_format="channels_first"
        )
        if min(height, width) > 0:
            side = SizeDict(height=self.merged_patch, width=self.merged_patch)
            size = SizeDict(longest_edge=self.longest_edge)
            resized = processor.resize(pixels, size=size, patch_size=side, resample=processor.resample)
        else:
            # A side so thin that it is rounded to no patch at all, where Hugging Face's processor fails: keep one.
            target = SizeDict(height=max(height, self.merged_patch), width=max(width, self.merged_patch))
            resized = super(type(processor), processor).resize(pixels, size=target, resample=processor.resample)
        return np.ascontiguousarray(resized, dtype=np.uint8)

    def normalisation_table(self) -> np.ndarray:
        """What each byte value becomes in each channel, float32 `[3, 256]`.

        `table[c, pixels[c]]` equals Hugging Face's rescaled and normalised `pixel_values[c]` to the bit.
        """
        return self._table.copy()

    def _compute_table(self) -> np.ndarray:
        every_value = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (3, 16, 16))
        result = self._processor.preprocess(
            np.ascontiguousarray(every_value), do_resize=False, input_data_format="channels_first"
        )
        values = np.asarray(result["pixel_values"][0], dtype=np.float32)
        return np.ascontiguousarray(values.reshape(3, 256))


def _processor_options(model_dir: str | Path) -> dict[str, Any]:
    """The image processor's options: newer saves nest them in processor_config.json, older have their own file."""
    nested = (read_json(model_dir, "processor_config.json") or {}).get("image_processor")
    options = nested if isinstance(nested, dict) else read_json(model_dir, "preprocessor_config.json")
    if options is None:
        raise ModelError(
            f"{model_dir} has neither a processor_config.json with an image_processor nor a preprocessor_config.json: "
            "take them from where the model came from"
        )
    return {key: value for key, value in options.items() if key not in ("processor_class", "data_format", "device")}


def _refuse_other_preprocessing(options: dict[str, Any], model_dir: str | Path) -> None:
    kind = options.pop("image_processor_type", "PixtralImageProcessor")
    if not str(kind).startswith("PixtralImageProcessor"):
        raise ModelError(f"{model_dir}: images would be processed by {kind}, wanted PixtralImageProcessor")
    if options.get("do_resize", True) is False or options.get("do_center_crop"):
        raise ModelError(f"{model_dir}: the image processor does not resize, or crops: wanted do_resize without a crop")


def _longest_edge(options: dict[str, Any], config: dict[str, Any], model_dir: str | Path) -> int:
    size = options.get("size")
    edge = size.get("longest_edge") if isinstance(size, dict) else None
    if edge is None:
        edge = vision_image_size(config, model_dir)
    if not isinstance(edge, int) or isinstance(edge, bool) or edge < 1:
        raise ModelError(f"{model_dir}: the longest edge of an image must be a positive whole number, got {edge!r}")
    return edge
