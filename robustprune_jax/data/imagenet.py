"""ImageNet (ILSVRC 2012) as its users have it: the two archives, or a folder per class."""

import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from robustprune_jax.data import image_folder
from robustprune_jax.data.archives import tar_members
from robustprune_jax.data.encoded import converted, opened

TRAIN, VALIDATION = 'ILSVRC2012_img_train.tar', 'ILSVRC2012_img_val.tar'
SOURCES = (
    f'give --from=FOLDER, with {TRAIN} and {VALIDATION} from image-net.org, or with train/<class>/ '
    'and val/<class>/'
)
TRUTH = 'ILSVRC2012_validation_ground_truth.txt'


def splits(source: Path, val_labels: Path | None = None) -> dict[str, Iterator[tuple[str, dict]]]:
    """Returns {'train': its examples, 'validation': ...} as (key, example) of TFDS imagenet2012.

    source: a folder of the two archives, or of train/<class>/ and val/<class>/. The validation
    archive has no labels: they are those of `val_labels` (see validation_labels).
    """
    train, validation = source / TRAIN, source / VALIDATION
    if train.is_file() and validation.is_file():
        return {
            'train': _train_archive(train),
            'validation': _validation_archive(validation, validation_labels(val_labels)),
        }
    if not (source / 'train').is_dir():
        raise FileNotFoundError(f'{source} has not the files of ImageNet: {SOURCES}')
    parts, classes = image_folder.folders(str(source))
    return {
        split: _folder(*image_folder.scan(parts[part], classes), classes)
        for split, part in (('train', 'train'), ('validation', 'test'))
    }


def validation_labels(path: Path | None) -> list[str]:
    """Returns the class names (n01440764, ...) of the validation images 1, 2, ...

    path: None takes the list that comes with TFDS; a text file has one name a line; the devkit
    archive (ILSVRC2012_devkit_t12.tar.gz) has numbers, and a table of what they mean.
    """
    if path is None:
        import tensorflow_datasets as tfds

        path = tfds.core.tfds_path('datasets/imagenet2012/validation_labels.txt')
    elif tarfile.is_tarfile(path):
        return _devkit(path)
    names = path.read_text().split()
    wrong = [name for name in names if not re.fullmatch(r'n\d{8}', name)]
    if wrong:
        raise ValueError(
            f'{path}: {wrong[0]!r} is no class name such as n01440764, one a line; or give the '
            'archive of the devkit'
        )
    return names


def _devkit(path: Path) -> list[str]:
    from scipy.io import loadmat

    files = dict(tar_members(path, ('meta.mat', TRUTH)))
    missing = [name for name in ('meta.mat', TRUTH) if name not in files]
    if missing:
        raise ValueError(f'{path}: no {" and no ".join(missing)} in it')
    synsets = loadmat(io.BytesIO(files['meta.mat']), squeeze_me=True)['synsets']
    names = {int(row['ILSVRC2012_ID']): str(row['WNID']) for row in synsets}
    return [names[int(number)] for number in files[TRUTH].split()]


def _train_archive(path: Path) -> Iterator[tuple[str, dict]]:
    for member, archive in tar_members(path):
        name = member.removesuffix('.tar')
        for file, image in tar_members(path / member, data=archive):
            yield file, _example(file, image, name)


def _validation_archive(path: Path, labels: list[str]) -> Iterator[tuple[str, dict]]:
    for file, image in tar_members(path):
        number = re.fullmatch(r'.*_(\d+)\.JPEG', file)
        if not number or not 0 < int(number[1]) <= len(labels):
            raise ValueError(f'{path}: {file} is not one of {len(labels)} numbered images')
        yield file, _example(file, image, labels[int(number[1]) - 1])


def _folder(files, labels, classes) -> Iterator[tuple[str, dict]]:
    for i, label in enumerate(labels):
        path, data = files[i]
        yield Path(path).name, _example(Path(path).name, data, classes[label])


def _example(file: str, data: bytes, name: str) -> dict:
    return {'file_name': file, 'image': io.BytesIO(_as_rgb_jpeg(file, data)), 'label': name}


def _as_rgb_jpeg(file: str, data: bytes) -> bytes:
    """Returns the data as it is, but for the 23 images that are PNG or CMYK (read as RGB JPEG by
    everyone who trains on them, and by TFDS).
    """
    with opened(file, data) as image:
        if image.format == 'JPEG' and image.mode in ('RGB', 'L'):
            return data
        encoded = io.BytesIO()
        converted(image, 'RGB').save(encoded, 'jpeg', quality=95)
        return encoded.getvalue()
