"""Data sets of TensorFlow Datasets, by name, from array_record folders; needs no TensorFlow."""

import io
from operator import itemgetter, methodcaller
from pathlib import Path

import numpy as np
from tqdm import tqdm

from robustprune_jax.data.archives import ARCHIVES
from robustprune_jax.data.encoded import EncodedImages, converted, opened
from robustprune_jax.runtime.files import write_atomically

PREPARED = (*ARCHIVES, 'imagenet2012')  # by robustprune_jax.data.prepare
CHUNK = 1000  # records that are read at once
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # PIL's, by the number of channels


def is_known(dataset) -> bool:
    """Returns whether TFDS has a builder of that name, or `dataset.dir` a folder that it wrote."""
    import tensorflow_datasets as tfds  # half a second; only these data sets need it

    name = dataset.name.split('/')[0]
    written = dataset.dir and (Path(dataset.dir) / name).is_dir()
    return bool(written) or name in tfds.list_builders(with_community_datasets=False)


def read(dataset) -> dict:
    """Returns {'train': (images, labels), 'test': ...} of TFDS's data set `dataset.name`.

    dataset.dir: the data_dir, TFDS's own default if ''. Images of one shape are decoded into
    memory, uint8 [N, H, W, C]; others become EncodedImages, cut to `dataset.image_size`. 'test' is
    the test split, or the validation split where there is none or, as in imagenet2012, it has no
    labels.

    Raises FileNotFoundError with the command that makes the folder; ValueError for a folder of
    another format, with files missing, or without images and labels.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset.name, data_dir=dataset.dir or None)
    except (ImportError, ValueError) as error:  # also for an unknown config of a known builder
        reason = ' '.join(str(error).split())
        raise ValueError(f'{dataset.name} data: TFDS cannot open it: {reason}') from error
    _check(builder, dataset.name)
    splits = builder.info.splits
    test = 'test' if 'test' in splits and builder.name != 'imagenet2012' else 'validation'
    for split in ('train', test):
        if split not in splits:
            raise ValueError(f'{builder.data_path}: no {split} split; it has {", ".join(splits)}')
        for path in splits[split].filepaths:
            if not path.exists():
                raise ValueError(
                    f'{path} is missing: the folder is not whole; remove it, and {_make(builder)}'
                )
    whole = None not in builder.info.features['image'].shape
    return {
        part: _in_memory(builder, split)
        if whole
        else (
            EncodedImages(Records(builder.data_path, split), dataset.image_size, dataset.corrupt),
            labels_of(builder, split),
        )
        for part, split in (('train', 'train'), ('test', test))
    }


def _check(builder, name):
    import tensorflow_datasets as tfds

    folder = builder.data_path
    if not (folder / 'dataset_info.json').exists():  # is_prepared() logs a warning
        state = 'is not whole: remove it, and' if folder.exists() else 'is not there;'
        raise FileNotFoundError(f'{name} data: {folder} {state} {_make(builder)}')
    form = builder.info.file_format.value
    if form != 'array_record':
        raise ValueError(
            f'{folder} is {form}, which only TensorFlow reads; convert it with: tfds '
            f'convert_format --dataset_dir={folder} --out_file_format=array_record'
        )
    missing = [key for key in ('image', 'label') if key not in builder.info.features]
    if missing:
        raise ValueError(
            f'{name} data: no {" and no ".join(missing)} among its features '
            f'{", ".join(builder.info.features)}; only image classification can be trained'
        )
    image = builder.info.features['image']
    if not isinstance(image, tfds.features.Image) or image.np_dtype == np.float32:
        raise ValueError(f'{name} data: its images are {image}, must be Image of uint8')


def _make(builder) -> str:
    """The one command that makes the builder's folder."""
    data_dir = builder.data_path.parents[1 + bool(builder.builder_config)]
    if builder.name in PREPARED:
        command = f'python -m robustprune_jax.data.prepare {builder.name} --data_dir={data_dir}'
        return f'make it with: {command}' + ' --from=FOLDER' * (builder.name == 'imagenet2012')
    return (
        'make it, where TensorFlow is installed, with: tfds build '
        f'{builder.info.full_name.rsplit("/", 1)[0]} --data_dir={data_dir} '
        '--file_format=array_record'
    )


class Records:
    """The encoded images of a split: [i] -> (name, bytes). Opened where it is first read, so that
    it can be sent to other processes.
    """

    def __init__(self, folder: Path, split: str):
        self.folder, self.split, self._source = str(folder), split, None

    def __getstate__(self):
        return {**self.__dict__, '_source': None}

    def _read(self, how):
        try:
            if self._source is None:
                import tensorflow_datasets as tfds

                self._source = tfds.builder_from_directory(self.folder).as_data_source(
                    self.split, decoders={'image': tfds.decode.SkipDecoding()}
                )
            return how(self._source)
        except RuntimeError as error:
            raise ValueError(
                f'{self.folder}: {self.split} records cannot be read ({error}); remove the folder, '
                'and make it again'
            ) from error

    def __len__(self):
        return self._read(len)

    def __getitem__(self, index: int) -> tuple[str, bytes]:
        example = self._read(itemgetter(int(index)))
        file = example.get('file_name', b'').decode()
        return f'{self.folder}, {self.split} record {index} {file}'.rstrip(), example['image']

    def chunks(self):
        """Yields lists of examples with their images still encoded."""
        count = len(self)
        with tqdm(total=count, desc=f'{self.split} split', unit='image', disable=None) as bar:
            for first in range(0, count, CHUNK):
                chunk = range(first, min(first + CHUNK, count))
                examples = self._read(methodcaller('__getitems__', chunk))
                yield examples
                bar.update(len(examples))


def _in_memory(builder, split) -> tuple[np.ndarray, np.ndarray]:
    records = Records(builder.data_path, split)
    shape = builder.info.features['image'].shape
    images, labels = np.empty((len(records), *shape), np.uint8), []
    for examples in records.chunks():
        for example in examples:
            name = f'{builder.data_path}, {split} record {len(labels)}'
            with opened(name, example['image']) as image:
                pixels = np.atleast_3d(converted(image, MODES[shape[-1]]))
            if pixels.shape != shape:
                raise ValueError(f'{name} is {pixels.shape}, must be {shape}')
            images[len(labels)] = pixels
            labels.append(example['label'])
    return images, np.array(labels)


def labels_of(builder, split: str) -> np.ndarray:
    """Returns the labels [N] of a split of encoded images.

    They lie among the images, so they are read once, as slowly as all images, and kept in the
    folder as labels-<split>.npy.
    """
    path = Path(builder.data_path) / f'labels-{split}.npy'
    try:
        labels = np.load(path)
        if len(labels) == builder.info.splits[split].num_examples:
            return labels
    except (FileNotFoundError, ValueError, EOFError):  # not there yet, or damaged
        pass
    chunks = Records(builder.data_path, split).chunks()
    labels = np.array([example['label'] for examples in chunks for example in examples])
    try:
        file = io.BytesIO()
        np.save(file, labels)
        write_atomically(path, file.getvalue())
    except OSError as error:  # a read-only folder: they are read again next time
        tqdm.write(f'{path}: {error}')
    return labels
