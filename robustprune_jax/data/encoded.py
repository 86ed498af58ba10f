"""Images too large to hold decoded: JPEG or PNG bytes, decoded and cut to one size on demand."""

import dataclasses
import functools
import io
import math
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

# Random-resized crop of Szegedy et al. (2015), with the constants that all of ImageNet uses.
AREA = (0.08, 1.0)  # of the image
ASPECT = (3 / 4, 4 / 3)
CENTRE = 224 / 256  # evaluation: the side of the central square, of the image's shorter side


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Stands for uint8 [N, size, size, 3] as the `images` of a Split; np.asarray decodes it.

    source[i] -> (name, bytes of a file that PIL reads). corrupt: 'stop' raises ValueError with the
    name of a file that cannot be decoded; 'skip' reports it on stderr and, in training, puts the
    next readable image of the batch in its place.
    """

    source: Sequence[tuple[str, bytes]]
    size: int
    corrupt: str = 'stop'
    indices: np.ndarray | None = None  # into source; all of it if None

    def __post_init__(self):
        if self.indices is None:
            object.__setattr__(self, 'indices', np.arange(len(self.source)))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.indices), self.size, self.size, 3

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, selection) -> 'EncodedImages':
        """Returns the images of a slice or of an array of indices, still encoded."""
        return dataclasses.replace(self, indices=self.indices[selection])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Returns the central squares, uint8 [N, size, size, 3]: what evaluation sees.

        As resizing the shorter side to size * 256 / 224 and cropping. A file that cannot be decoded
        stops it in any case: a result is about all images.
        """
        pixels = np.empty(self.shape, np.uint8)
        for place, i in enumerate(self.indices):
            pixels[place] = _decode(*self.source[i], centre_box, self.size)
        return pixels if dtype is None else pixels.astype(dtype)

    def random(self, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns random-resized crops, uint8 [N, size, size, 3], and whose they are, int [N].

        seeds: int [N]; a crop depends on its seed alone. The second is 0..N-1, but for skipped
        images the place of the image that stands in.
        """
        pixels, good = np.empty(self.shape, np.uint8), []
        for place, (i, seed) in enumerate(zip(self.indices, seeds, strict=True)):
            box_of = functools.partial(random_box, np.random.default_rng(seed))
            try:
                pixels[place] = _decode(*self.source[i], box_of, self.size)
                good.append(place)
            except ValueError as error:
                if self.corrupt == 'stop':
                    raise
                _report_skipped(self.source[i][0], error)
        if not good:
            raise ValueError(f'no image of a whole batch can be decoded, as {self.source[i][0]}')
        every = np.arange(len(pixels))
        places = np.array(good)[np.searchsorted(good, every) % len(good)]
        return pixels if len(good) == len(pixels) else pixels[places], places


_skipped: set[str] = set()  # by this process: each file is reported once


def _report_skipped(name, error):
    if name not in _skipped:
        _skipped.add(name)
        print(f'skipped ({len(_skipped)} so far): {error}', file=sys.stderr, flush=True)


def centre_box(width: int, height: int) -> tuple[float, float, float, float]:
    """Returns left, upper, right, lower of the central square that evaluation cuts."""
    side = min(width, height) * CENTRE
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


def random_box(
    rng: np.random.Generator, width: int, height: int
) -> tuple[float, float, float, float]:
    """Returns left, upper, right, lower of a random crop in a width x height image.

    Its area is uniform in AREA, the logarithm of its aspect ratio in ASPECT. When ten draws reach
    beyond the image: its central part, of the nearest aspect ratio.
    """
    for _ in range(10):
        area = rng.uniform(*AREA) * width * height
        aspect = math.exp(rng.uniform(*np.log(ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def _decode(name: str, data: bytes, box_of, size: int) -> np.ndarray:
    """Returns the part box_of(width, height) of an image, resized, uint8 [size, size, 3]."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            full = image.size
            box = box_of(*full)
            # JPEG decodes at a half, quarter or eighth where the crop keeps more than `size`.
            zoom = max(size / (box[2] - box[0]), size / (box[3] - box[1]))
            if zoom < 1:
                image.draft(None, (math.ceil(full[0] * zoom), math.ceil(full[1] * zoom)))
            sx, sy = image.size[0] / full[0], image.size[1] / full[1]
            scaled = (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
            rgb = image if image.mode == 'RGB' else image.convert('RGB')  # a copy even of RGB
            return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR, scaled))
    except UnidentifiedImageError as error:
        raise ValueError(f'{name}: cannot be decoded (no image format)') from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'{name}: cannot be decoded ({error})') from error
