"""A folder with one folder per class: train/<class>/*.JPEG and val/<class>/*.JPEG."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from robustprune_jax.data.encoded import EncodedImages

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.webp', '.tif', '.tiff')
TEST_NAMES = ('val', 'validation', 'test')


def read(dataset) -> dict:
    """Returns {'train': (EncodedImages, labels), 'test': ...} of the folder `dataset.dir`.

    'test' is its folder val, validation or test. Labels are the places of the classes in sorted
    order, as torchvision's ImageFolder. The first image of every class comes first, then the
    second, so that the first N are of all classes.
    """
    parts, classes = folders(dataset.dir)
    return {
        part: (EncodedImages(files, dataset.image_size, dataset.corrupt), labels)
        for part, (files, labels) in ((p, scan(folder, classes)) for p, folder in parts.items())
    }


def folders(directory: str) -> tuple[dict[str, Path], list[str]]:
    """Returns {'train': its folder, 'test': its folder} and the names of the classes.

    Raises FileNotFoundError or ValueError when one is missing, or their classes differ.
    """
    root = Path(directory)
    test = next((root / name for name in TEST_NAMES if (root / name).is_dir()), None)
    if not directory or test is None or not (root / 'train').is_dir():
        raise FileNotFoundError(
            f'image_folder data: dataset.dir={directory!r} must be a folder with the folders train '
            f'and {" or ".join(TEST_NAMES)}, each with a folder per class'
        )
    parts = {'train': root / 'train', 'test': test}
    classes = {
        part: sorted(e.name for e in os.scandir(p) if e.is_dir()) for part, p in parts.items()
    }
    different = sorted(set(classes['train']) ^ set(classes['test']))
    if different:
        raise ValueError(
            f'{root}: class {different[0]!r} is not in both train and {test.name} '
            f'({len(different)} such classes)'
        )
    return parts, classes['train']


def scan(folder: Path, classes: list[str]) -> tuple['Files', np.ndarray]:
    """Returns the images of folder/<class>/ and their labels, int32 [N].

    Raises ValueError for a class without images, and for links that make no sense (see _below).
    """
    rows = []
    for label, name in enumerate(classes):
        found = sorted(os.path.relpath(path, folder) for path in _below(folder / name, set()))
        if not found:
            raise ValueError(f'{folder / name}: no images ({", ".join(EXTENSIONS)}) in it')
        rows += [(place, label, file) for place, file in enumerate(found)]
    rows.sort()
    return Files(folder, [file for *_, file in rows]), np.array([r[1] for r in rows], np.int32)


def _below(folder: str | Path, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Yields the paths of the images below a folder, through links too.

    seen: the folders that were read before. Raises ValueError for a link to one of them, which
    would never end, or count images twice, and for an image that is no file.
    """
    stat = os.stat(folder)
    if (stat.st_dev, stat.st_ino) in seen:
        raise ValueError(f'{str(folder)!r} is a link to a folder whose images are counted already')
    seen.add((stat.st_dev, stat.st_ino))
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _below(entry.path, seen)
        elif entry.name.lower().endswith(EXTENSIONS):
            if not entry.is_file():
                raise ValueError(f'{entry.path!r} is no file, or a link to none')
            yield entry.path


class Files:
    """Files below a folder: [i] -> (path, fit for a message of one line, bytes)."""

    def __init__(self, folder: Path, names: list[str]):
        self.folder = folder
        # One array, not a million strings: it is sent to every decoding process.
        self.names = np.array([os.fsencode(name) for name in names])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        path = self.folder / os.fsdecode(bytes(self.names[index]))
        return repr(str(path))[1:-1], path.read_bytes()
