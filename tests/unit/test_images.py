"""Every way in which images go wrong, with real bytes; and pixels equal to Hugging Face's, to the bit."""

from __future__ import annotations

import random
import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, PngImagePlugin

from ray_ministral.config import ImageLimits
from ray_ministral.data.images import ImagePreprocessor, open_image
from ray_ministral.errors import BadImageError, ModelError, RowError, TooLargeError
from tests.unit.model_directory import make_model_directory, write_json

LIMITS = ImageLimits()


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows, 9)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + extra + body


def pixels(data: bytes) -> np.ndarray:
    image = open_image(data, LIMITS)
    assert image.mode == "RGB"
    return np.asarray(image)


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95})]
)
def test_opens_the_allowed_formats(kind: str, options: dict[str, object]) -> None:
    data = encode(picture(), kind, **options)
    reference = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
    assert np.array_equal(pixels(data), reference)


def test_gif_is_allowed() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50] + [0] * 762)
    assert pixels(encode(image, "GIF"))[3, 3].tolist() == [200, 100, 50]


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM", "TGA", "PCX", "AVIF"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(BadImageError, match="allowed format"):
        open_image(encode(picture(), kind), LIMITS)


def test_eps_never_reaches_ghostscript(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(picture(), "EPS")
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: called.append(args))
    with pytest.raises(BadImageError, match="allowed format") as caught:
        open_image(data, LIMITS)
    assert caught.value.stage == "decode"
    assert called == []


@pytest.mark.parametrize("data", [b"hello, this is text and no image at all", b"\xff", b"RIFF....WAVE", b"\x00" * 100])
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(BadImageError, match="allowed format"):
        open_image(data, LIMITS)


def test_no_bytes() -> None:
    with pytest.raises(BadImageError, match="no bytes"):
        open_image(b"", LIMITS)


# --- what the header says --------------------------------------------------------------------------------------------


@pytest.fixture
def never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise AssertionError("decoded, though the header was enough to refuse")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)


def test_a_small_png_of_9400_x_9400_is_not_decoded(never_decoded: None) -> None:
    compressor = zlib.compressobj(9)
    row = b"\x00" * (1 + 3 * 9400)
    body = b"".join(compressor.compress(row) for _ in range(9400)) + compressor.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 9400, 9400, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    assert len(data) < 300_000
    with pytest.raises(TooLargeError, match=r"9400 x 9400 has 88360000 pixels, at most 64000000.*--max-image-pixels"):
        open_image(data, LIMITS)


def test_a_strip_of_1_x_5000000_is_not_decoded(never_decoded: None) -> None:
    with pytest.raises(TooLargeError, match="side above 32768"):
        open_image(png(1, 5_000_000, rows=b"\x00" * 100), LIMITS)


def test_a_thin_image_is_not_decoded(never_decoded: None) -> None:
    with pytest.raises(TooLargeError, match="200 times"):
        open_image(png(2010, 10), LIMITS)


def test_more_pixels_than_pillow_ever_allows_can_be_asked_for() -> None:
    # Image.open refuses above 178 956 970 pixels, whatever the limits say
    width, height = 30_000, 6_000
    rows = b"".join([b"\x00" + b"\xff" * (width // 8)] * height)
    data = png(width, height, depth=1, colour=0, rows=rows)
    with pytest.raises(TooLargeError):
        open_image(data, LIMITS)
    with pytest.raises(BadImageError, match="cannot be decoded"):  # truncated on purpose, so that nothing large is made
        open_image(data[:200], ImageLimits(max_pixels=200_000_000))


def test_limits_are_inclusive() -> None:
    data = encode(picture(40, 30), "PNG")
    assert open_image(data, ImageLimits(max_pixels=1200, max_side=40, max_aspect=4 / 3)).size == (40, 30)
    for tighter in (ImageLimits(max_pixels=1199), ImageLimits(max_side=39), ImageLimits(max_aspect=1.3)):
        with pytest.raises(TooLargeError):
            open_image(data, tighter)


# --- damaged ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("GIF", {}), ("BMP", {})],
)
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_truncated(kind: str, options: dict[str, object], kept: float) -> None:
    data = encode(picture(120, 90), kind, **options)
    assert pixels(data).shape == (90, 120, 3)
    with pytest.raises(BadImageError):
        open_image(data[: int(len(data) * kept)], LIMITS)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_bomb_in_a_text_or_profile_chunk(kind: bytes) -> None:
    bomb = png_chunk(kind, b"name\x00\x00" + zlib.compress(b"\x00" * 50_000_000, 9))
    assert len(bomb) < 60_000
    with pytest.raises(BadImageError, match="too large"):
        open_image(png(1, 1, rows=b"\x00\x00\x00\x00", extra=bomb), LIMITS)


def test_a_bomb_behind_the_pixels() -> None:
    bomb = png_chunk(b"zTXt", b"name\x00\x00" + zlib.compress(b"\x00" * 50_000_000, 9))
    whole = png(1, 1, rows=b"\x00\x00\x00\x00")
    data = whole[: -len(png_chunk(b"IEND", b""))] + bomb + png_chunk(b"IEND", b"")
    with pytest.raises(BadImageError, match="too large"):
        open_image(data, LIMITS)


def test_damaged_bytes_give_row_errors_and_nothing_else() -> None:
    rng = random.Random(0)
    animated = BytesIO()
    picture(20, 16).save(animated, "GIF", save_all=True, append_images=[picture(20, 16, 1)])
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [
        encode(picture(33, 21), "PNG"),
        encode(picture(33, 21).convert("P"), "PNG", transparency=3),
        encode(picture(33, 21), "JPEG", exif=exif, progressive=True),
        encode(picture(33, 21), "WEBP", exif=exif),
        encode(picture(33, 21), "BMP"),
        animated.getvalue(),
    ]
    opened = refused = 0
    kinds = set()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(250):
            for data in whole:
                damaged = bytearray(data)
                for _ in range(rng.randint(1, 6)):
                    damaged[rng.randrange(2, len(damaged))] = rng.randrange(256)
                try:
                    assert open_image(bytes(damaged), LIMITS).mode == "RGB"
                    opened += 1
                except RowError as error:
                    kinds.add((error.status, error.stage))
                    refused += 1
    assert opened > 100
    assert refused > 100
    assert kinds <= {("bad_image", "decode"), ("too_large", "decode")}
    assert seen == []


# --- colours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(16, 8), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    assert np.array_equal(pixels(data), np.asarray(expected))
    assert (open_image(data, LIMITS).size == (8, 16)) == (orientation >= 5)


def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    data = encode(picture(16, 8), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff garbage")
    assert pixels(data).shape == (8, 16, 3)


def test_sixteen_bit_grey_is_scaled() -> None:
    grey = np.array([[0, 128, 129, 257, 1000, 32768, 65407, 65535]], dtype=np.uint16)
    result = pixels(encode(Image.fromarray(grey), "PNG"))
    assert result[0, :, 0].tolist() == [0, 0, 1, 1, 4, 128, 255, 255]
    assert (result[..., 0] == result[..., 1]).all()
    assert (result[..., 0] == result[..., 2]).all()


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    grey = np.array([[0, 1000, 65535]], dtype=">u2")
    data = png(
        3, 1, depth=16, colour=0, rows=b"\x00" + grey.tobytes(), extra=png_chunk(b"tRNS", struct.pack(">H", 1000))
    )
    assert pixels(data)[0, :, 0].tolist() == [0, 255, 255]


def test_sixteen_bit_colour() -> None:
    colour = np.array([[[0, 0x8000, 0xFFFF], [0x1234, 0, 0]]], dtype=">u2")
    data = png(2, 1, depth=16, colour=2, rows=b"\x00" + colour.tobytes())
    assert pixels(data)[0].tolist() == [[0, 0x80, 0xFF], [0x12, 0, 0]]


def test_cmyk() -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    r, g, b = pixels(encode(red, "JPEG", quality=100))[4, 4]
    assert (int(r) > 250, int(g) < 5, int(b) < 5) == (True, True, True)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_on_white(mode: str) -> None:
    image = Image.new(mode, (3, 1))
    colour = (0, 0, 0) if mode == "RGBA" else (0,)
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (*colour, alpha))
    assert pixels(encode(image, "PNG"))[0, :, 0].tolist() == [255, 127, 0]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_alpha_is_laid_on_white(kind: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60] + [0] * 762)
    image.putpixel((1, 0), 1)
    result = pixels(encode(image, kind, transparency=0))
    assert result[0].tolist() == [[255, 255, 255], [40, 50, 60]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    stream = BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(stream.getvalue())[4, 4].tolist() == [255, 0, 0]


def test_one_bit() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(encode(image, "PNG"))[0, :, 0].tolist() == [0, 255]


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_directory(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def preprocessor(model_dir: Path) -> ImagePreprocessor:
    return ImagePreprocessor(model_dir)


@pytest.mark.parametrize(
    ("width", "height"), [(1, 1), (28, 28), (29, 27), (112, 112), (113, 40), (300, 211), (97, 500), (60, 60), (5, 100)]
)
def test_pixels_are_hugging_faces_to_the_bit(preprocessor: ImagePreprocessor, width: int, height: int) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    image = picture(width, height, seed=width)
    theirs = PixtralImageProcessorPil(patch_size=28, size={"longest_edge": 112}).preprocess(image)["pixel_values"][0]
    ours = preprocessor.resize(image)
    assert ours.dtype == np.uint8
    assert ours.flags.c_contiguous
    assert ours.shape[1] % 28 == 0
    assert ours.shape[2] % 28 == 0
    table = preprocessor.normalisation_table()
    looked_up = np.stack([table[channel][ours[channel]] for channel in range(3)])
    assert theirs.dtype == looked_up.dtype == np.float32
    assert np.array_equal(theirs.view(np.uint32), looked_up.view(np.uint32))


def test_the_table_is_a_copy(preprocessor: ImagePreprocessor) -> None:
    table = preprocessor.normalisation_table()
    assert table.shape == (3, 256)
    table[:] = 0
    assert preprocessor.normalisation_table().any()


@pytest.mark.parametrize(("size", "expected"), [((2000, 10), (3, 28, 112)), ((10, 2000), (3, 112, 28))])
def test_a_very_thin_image_keeps_one_patch(
    preprocessor: ImagePreprocessor, size: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    assert preprocessor.resize(Image.new("RGB", size, (9, 8, 7))).shape == expected


def test_the_longest_edge_is_the_vision_towers_where_the_processor_has_none(tmp_path: Path) -> None:
    preprocessor = ImagePreprocessor(make_model_directory(tmp_path, longest_edge=None))
    assert preprocessor.longest_edge == 140
    assert preprocessor.resize(picture(500, 250)).shape == (3, 84, 140)


def test_the_older_preprocessor_config(tmp_path: Path) -> None:
    make_model_directory(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    options = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 56}, "image_mean": [0, 0, 0]}
    write_json(tmp_path, "preprocessor_config.json", options | {"image_std": [1, 1, 1]})
    preprocessor = ImagePreprocessor(tmp_path)
    assert preprocessor.resize(picture(100, 100)).shape == (3, 56, 56)
    assert preprocessor.normalisation_table()[0, 255] == 1.0


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, value: object) -> Callable[[Path], None]:
    return lambda folder: write_json(folder, name, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("config.json"), "no config.json"),
        (_remove("processor_config.json"), "neither a processor_config.json"),
        (_write("config.json", []), "wanted an object"),
        (_write("config.json", {"text_config": {}}), "no vision_config"),
        (_write("config.json", {"vision_config": {"patch_size": 0}}), "positive whole number, got 0"),
        (_write("processor_config.json", {"image_processor": {"image_processor_type": "CLIPImageProcessor"}}), "CLIP"),
        (_write("processor_config.json", {"image_processor": {"do_resize": False}}), "does not resize"),
        (_write("processor_config.json", {"image_processor": {"size": {"longest_edge": "x"}}}), "got 'x'"),
        (_write("processor_config.json", {"image_processor": {"image_mean": [1.0]}}), "cannot be used"),
        (lambda folder: (folder / "processor_config.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_a_model_directory_that_cannot_be_used(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(make_model_directory(tmp_path))
    with pytest.raises(ModelError, match=message):
        ImagePreprocessor(tmp_path)


def test_a_model_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a directory"):
        ImagePreprocessor(tmp_path / "nowhere")
