"""Still images through Pillow: size without decoding, and upright RGB pixels. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from verl.data.media_files import BadMedia, check_first_bytes, check_regular
from verl.data.video import MAX_FRAME_PIXELS

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_EXIF_ORIENTATION = 0x0112
_LYING_ON_THEIR_SIDE = (5, 6, 7, 8)


def probe_image(path: str) -> tuple[int, int]:
    """(height, width) as shown, after the turn that EXIF asks for. Raises BadMedia."""
    check_regular(path)
    check_first_bytes(path)
    with _opened(path) as image:
        width, height = image.size
        if width * height > MAX_FRAME_PIXELS:
            detail = f"{width}x{height} pixels, more than {MAX_FRAME_PIXELS}"
            raise BadMedia("too_large", path, detail)
        on_its_side = image.getexif().get(_EXIF_ORIENTATION) in _LYING_ON_THEIR_SIDE
    return (width, height) if on_its_side else (height, width)


def load_image(path: str) -> np.ndarray:
    """Upright (H, W, 3) uint8 pixels; an alpha channel is dropped, as the HF processors do."""
    probe_image(path)
    with _opened(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except BadMedia:
        raise
    except UnidentifiedImageError:
        raise BadMedia("not_media", path, "Pillow does not take it for an image") from None
    except Exception as error:
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others on
        # damaged files; the original stays attached.
        reason = "truncated" if "truncated" in str(error).lower() else "decode_error"
        raise BadMedia(reason, path, f"{type(error).__name__}: {error}") from error
