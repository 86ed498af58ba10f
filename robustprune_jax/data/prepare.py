"""Makes the TensorFlow Datasets folder of a public data set, without TensorFlow:

    python -m robustprune_jax.data.prepare NAME --data_dir=DIR [--from=ARCHIVE]

NAME: cifar10, cifar100, svhn_cropped, mnist, fashion_mnist or imagenet2012. The archives are
downloaded into DIR/downloads, or taken from where --from says: the archive, or a folder with its
files. Any program reads the result with `tfds.data_source(NAME, data_dir=DIR)`.
"""

import argparse
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from robustprune_jax.data import imagenet
from robustprune_jax.data.archives import ARCHIVES, Archive
from robustprune_jax.data.download import download
from robustprune_jax.data.registered import PREPARED, labels_of
from robustprune_jax.data.sources import checked


def prepare(
    name: str,
    data_dir: Path | str,
    source: Path | str | None = None,
    *,
    val_labels: Path | str | None = None,
    urls: dict[str, str] | None = None,
) -> Path:
    """Writes the array_record folder of data set `name`, whole or not at all, and returns it.

    source: the archive or the folder of its files; None downloads them. val_labels: for
    imagenet2012, where the labels of its validation archive are, in place of the list that comes
    with TFDS: the devkit archive, or a list of class names, one a line in the order of the files.
    urls: {url: sha256} in place of those registered in TFDS, for a mirror.

    Raises ValueError or OSError, in one line, on archives that are not what they should be.
    """
    import tensorflow_datasets as tfds

    data_dir = Path(data_dir).expanduser().absolute()
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    folder = Path(builder.data_path)
    if (folder / 'dataset_info.json').exists():
        return folder
    if folder.exists():
        raise ValueError(f'{folder} is there, but not whole: remove it first')
    if name == 'imagenet2012':
        if source is None:
            raise ValueError(f'imagenet2012 cannot be downloaded freely: {imagenet.SOURCES}')
        splits = imagenet.splits(Path(source), val_labels and Path(val_labels))
    else:
        if source is None:
            source = data_dir / 'downloads' / name
            registered = {url: info.checksum for url, info in builder.url_infos.items()}
            for url, sha256 in (urls or registered).items():
                if not url.endswith('extra_32x32.mat'):  # 1.3 GB of SVHN that nothing here uses
                    download(url, source / url.rsplit('/', 1)[1], sha256)
        archive = ARCHIVES[name](Path(source))
        _check(archive, builder.info.features, source)
        for label, names in archive.names.items():
            builder.info.features[label].names = names
        splits = {
            split: _examples(split, columns, builder) for split, columns in archive.splits.items()
        }
    builder._split_generators = lambda *_: splits  # what a builder defines; its own needs TF
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        builder.download_and_prepare(download_dir=data_dir / 'downloads')
    except RuntimeError as error:  # array_record's writer: a full disk
        raise OSError(f'{folder} was not written: {error}') from error
    if name == 'imagenet2012':
        for split in splits:
            labels_of(builder, split)  # here, so that no training has to wait for it
    return folder


def _check(archive: Archive, features, source) -> None:
    for split, columns in archive.splits.items():
        images, where = columns['image'], f'{source}: {split} split'
        for label in columns.keys() - {'image'}:
            checked(images, columns[label], features[label].num_classes, where)
        if images.shape[1:] != features['image'].shape:
            raise ValueError(
                f'{where}: images are {images.shape[1:]}, must be {features["image"].shape}'
            )
    for label, names in archive.names.items():
        classes = features[label].num_classes
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f'{source}: the names of its classes are no list of text')
        if not len(names) == len(set(names)) == classes:
            raise ValueError(f'{source}: {len(set(names))} names of {classes} classes')


def _examples(split: str, columns: dict, builder) -> Iterator[tuple[int, dict]]:
    """Yields the keys and examples that TFDS's own builder would, so in its order of records."""
    digits = 6 if builder.name == 'svhn_cropped' else 5
    for i in range(len(columns['image'])):
        example = {key: int(column[i]) for key, column in columns.items() if key != 'image'}
        if 'id' in builder.info.features:
            example['id'] = f'{split}_{i:0{digits}d}'
        yield i, {**example, 'image': _png(columns['image'][i])}


def _png(image: np.ndarray) -> io.BytesIO:
    # TFDS encodes arrays with TensorFlow, and takes files as they are.
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, 'png')
    file.seek(0)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('name', choices=PREPARED)
    parser.add_argument('--data_dir', required=True, help='where the folder NAME/VERSION is made')
    parser.add_argument('--from', dest='source', help='the archive, or the folder of its files')
    parser.add_argument(
        '--val_labels', help='imagenet2012: the devkit archive, or a list of class names'
    )
    arguments = vars(parser.parse_args())
    logging.getLogger('absl').setLevel(logging.ERROR)
    try:
        folder = prepare(arguments.pop('name'), arguments.pop('data_dir'), **arguments)
    except (ValueError, OSError) as error:
        sys.exit(f'error: {error}')
    print(folder)


if __name__ == '__main__':
    main()
