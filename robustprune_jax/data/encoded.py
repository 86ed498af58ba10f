"""Images too large to hold decoded: JPEG or PNG bytes, decoded and cut to one size on demand."""

import contextlib
import dataclasses
import functools
import io
import math
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

# Random-resized crop of Szegedy et al. (2015), with the constants that all of ImageNet uses.
AREA = (0.08, 1.0)  # of the image
ASPECT = (3 / 4, 4 / 3)
CENTRE = 224 / 256  # evaluation: the side of the central square, of the image's shorter side
# Whatever a file is called. PIL knows more, and starts Ghostscript for one of them.
FORMATS = ('JPEG', 'PNG', 'PPM', 'BMP', 'GIF', 'TIFF', 'WEBP')
DRAWS = 100  # unreadable images in a row, after which the data set counts as unreadable


@dataclasses.dataclass(frozen=True)
class EncodedImages:
    """Stands for uint8 [N, size, size, 3] as the `images` of a Split; np.asarray decodes it.

    source[i] -> (name, bytes of a file in one of FORMATS). corrupt: 'stop' raises ValueError with
    the name of a file that cannot be decoded; 'skip' reports it on stderr and, in training, puts
    another image in its place.
    """

    source: Sequence[tuple[str, bytes]]
    size: int
    corrupt: str = 'stop'
    indices: np.ndarray | None = None  # into source; all of it if None
    skipped: set[int] = dataclasses.field(default_factory=set)  # by this process, reported once

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

    def random(self, indices: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns random-resized crops, uint8 [N, size, size, 3], and whose they are, int [N].

        seeds: int [N]; an image's crop depends on its seed alone, and so does, with corrupt='skip',
        what stands in for it: any image here. The second is `indices`, but for those.
        """
        pixels, shown = np.empty((len(indices), *self.shape[1:]), np.uint8), np.array(indices)
        for place, seed in enumerate(seeds):
            pixels[place], shown[place] = self._random(indices[place], np.random.default_rng(seed))
        return pixels, shown

    def _random(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        for _ in range(DRAWS):
            i = self.indices[index]
            try:
                box_of = functools.partial(random_box, rng)
                return _decode(*self.source[i], box_of, self.size), index
            except (ValueError, OSError) as error:
                if self.corrupt == 'stop':
                    raise
                last = error
                if i not in self.skipped:
                    self.skipped.add(i)
                    count = len(self.skipped)
                    print(f'skipped ({count} so far): {error}', file=sys.stderr, flush=True)
            index = rng.integers(len(self))
        raise ValueError(f'none of {DRAWS} images in a row can be decoded; the last: {last}')


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


@contextlib.contextmanager
def opened(name: str, data: bytes) -> Iterator[Image.Image]:
    """Gives an image to the body, which may raise anything PIL does: ValueError names the image."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f'{name}: cannot be decoded (no image format)') from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'{name}: cannot be decoded ({error})') from error


def converted(image: Image.Image, mode: str) -> Image.Image:
    """Returns an image in a mode of 8 bits; raises ValueError where its own values have no range.

    Of 16 bits the high ones, as PIL reads 16-bit colours; its conversion of grey cuts off at 255.
    """
    if image.mode.startswith('I;16'):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError(f'its values, of mode {image.mode}, have no range: save them as 8 bits')
    return image if image.mode == mode else image.convert(mode)  # a copy even of the same mode


def _decode(name: str, data: bytes, box_of, size: int) -> np.ndarray:
    """Returns the part box_of(width, height) of an image, resized, uint8 [size, size, 3]."""
    with opened(name, data) as image:
        full = image.size
        box = box_of(*full)
        # JPEG decodes at a half, quarter or eighth where the crop keeps more than `size`.
        zoom = max(size / (box[2] - box[0]), size / (box[3] - box[1]))
        if zoom < 1:
            image.draft(None, (math.ceil(full[0] * zoom), math.ceil(full[1] * zoom)))
        sx, sy = image.size[0] / full[0], image.size[1] / full[1]
        scaled = (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
        rgb = converted(image, 'RGB')
        return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR, scaled))
