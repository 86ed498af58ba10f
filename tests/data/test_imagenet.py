"""ImageNet from its archives and from a folder per class: the same images, labels and batches."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from robustprune_jax import data, pipeline
from robustprune_jax.config import default
from robustprune_jax.data import batches, encoded, imagenet
from robustprune_jax.data.prepare import prepare
from robustprune_jax.runtime.files import read_jsonl

CLASSES = ['n01440764', 'n01443537', 'n01484850', 'n01491361']  # ImageNet's first four
SIZE = 32


def jpeg(seed, size=(60, 45), mode='RGB'):
    """A smooth random picture."""
    channels = {'RGB': 3, 'L': 1, 'CMYK': 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, channels)).astype(np.uint8)
    image = Image.fromarray(pixels.squeeze(), mode).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, 'jpeg', quality=90)
    return file.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope='session')
def archives(tmp_path_factory):
    """48 training and 16 validation JPEGs as ImageNet's two archives, and as an ImageFolder."""
    root = tmp_path_factory.mktemp('imagenet')
    inner = {}
    for i in range(48):
        name, mode = CLASSES[i % 4], {5: 'L', 6: 'CMYK'}.get(i, 'RGB')
        inner.setdefault(name, {})[f'{name}_{i}.JPEG'] = jpeg(i, (60 + i, 45 + 2 * i), mode)
    with tarfile.open(root / imagenet.TRAIN, 'w') as outer:
        for name, files in inner.items():
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode='w') as tar:
                for file, image in files.items():
                    add(tar, file, image)
                    path = root / 'folder' / 'train' / name / file
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(image)
            add(outer, f'{name}.tar', content.getvalue())
    with tarfile.open(root / imagenet.VALIDATION, 'w') as tar:
        for i in range(16):
            file, image = f'ILSVRC2012_val_{i + 1:08d}.JPEG', jpeg(100 + i)
            add(tar, file, image)
            path = root / 'folder' / 'val' / CLASSES[i % 4] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    (root / 'labels.txt').write_text('\n'.join(CLASSES * 4))
    return root


@pytest.fixture(scope='session')
def tfds_folder(archives, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp('tfds')
    prepare('imagenet2012', data_dir, archives, val_labels=archives / 'labels.txt')
    return data_dir


def load(name, directory, **fields):
    dataset = default().dataset
    dataset.update(name=name, dir=str(directory), num_classes=1000, validation=0, image_size=SIZE)
    dataset.update(**fields)
    return data.load(dataset)


@pytest.fixture(scope='session')
def folder(archives):
    return load('image_folder', archives / 'folder')


def by_content(split):
    """{central square: label}: how the images of two forms are compared."""
    pixels = np.asarray(split.images)
    return {image.tobytes(): label for image, label in zip(pixels, split.labels, strict=True)}


# --- two forms of one data set ----------------------------------------------------------------


def test_tfds_and_image_folder_hold_the_same(tfds_folder, folder):
    tfds = load('imagenet2012', tfds_folder)
    assert folder.train.labels.tolist() == [0, 1, 2, 3] * 12
    assert tfds.train.images.shape == folder.train.images.shape == (48, SIZE, SIZE, 3)
    for part in ('train', 'test'):
        expected = by_content(getattr(folder, part))
        found = by_content(getattr(tfds, part))
        if part == 'train':  # the CMYK image is encoded once more, as RGB
            assert len(found.keys() & expected.keys()) == 47
            expected = {image: label for image, label in expected.items() if image in found}
        assert {image: found[image] for image in expected} == expected
    assert (tfds_folder / 'imagenet2012/5.1.0/labels-train.npy').exists()


def test_the_folder_can_be_prepared_too(archives, tmp_path, tfds_folder):
    prepare('imagenet2012', tmp_path, archives / 'folder')
    found, expected = load('imagenet2012', tmp_path), load('imagenet2012', tfds_folder)
    assert by_content(found.test) == by_content(expected.test)
    assert by_content(found.train) == by_content(expected.train)


def test_labels_are_read_from_the_records_where_no_list_of_them_is(tfds_folder):
    expected = load('imagenet2012', tfds_folder).train.labels
    path = tfds_folder / 'imagenet2012/5.1.0/labels-train.npy'
    whole = path.read_bytes()
    path.unlink()
    np.testing.assert_array_equal(load('imagenet2012', tfds_folder).train.labels, expected)
    path.write_bytes(whole[: len(whole) // 2])  # damaged: made again
    np.testing.assert_array_equal(load('imagenet2012', tfds_folder).train.labels, expected)
    assert path.read_bytes() == whole


def test_labels_of_the_validation_archive(tmp_path):
    names = imagenet.validation_labels(None)
    assert len(names) == 50_000 and names[0] == 'n01751748'  # a sea snake
    synsets = np.array(
        [(i + 1, name) for i, name in enumerate(reversed(CLASSES))],
        dtype=[('ILSVRC2012_ID', object), ('WNID', object)],
    )
    savemat(tmp_path / 'meta.mat', {'synsets': synsets})
    devkit = tmp_path / 'ILSVRC2012_devkit_t12.tar.gz'
    with tarfile.open(devkit, 'w:gz') as tar:
        tar.add(tmp_path / 'meta.mat', 'ILSVRC2012_devkit_t12/data/meta.mat')
        add(tar, f'ILSVRC2012_devkit_t12/data/{imagenet.TRUTH}', b'4\n1\n3\n')
    assert imagenet.validation_labels(devkit) == [CLASSES[0], CLASSES[3], CLASSES[1]]
    (tmp_path / 'numbers.txt').write_text('4\n1\n')
    with pytest.raises(ValueError, match=r"numbers\.txt: '4' is no class name such as n01440764"):
        imagenet.validation_labels(tmp_path / 'numbers.txt')


# --- batches ----------------------------------------------------------------------------------


def stream(split, **kw):
    return batches.train_batches(*split, **{'batch_size': 12, 'seed': 3, **kw})


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one['image'], other['image'])
        np.testing.assert_array_equal(one['label'], other['label'])


def test_every_epoch_has_every_image_once_differently_cropped(folder):
    seen = take(stream(folder.train), 8)
    assert seen[0]['image'].shape == (12, SIZE, SIZE, 3) and seen[0]['image'].dtype == np.uint8
    for epoch in (seen[:4], seen[4:]):
        labels = np.concatenate([batch['label'] for batch in epoch])
        assert np.bincount(labels).tolist() == [12] * 4
    crops = {image.tobytes() for batch in seen for image in batch['image']}
    assert len(crops) == 96


def test_resume_in_the_middle_of_an_epoch(folder):
    iterator = stream(folder.train)
    take(iterator, 2)
    state = iterator.get_state()
    expected = take(iterator, 4)
    again = stream(folder.train)
    again.set_state(state)
    assert_same(take(again, 4), expected)


def test_worker_processes_give_the_same_batches(folder):
    expected = take(stream(folder.train), 4)
    iterator = stream(folder.train, workers=2)
    assert_same(take(iterator, 2), expected[:2])
    state = iterator.get_state()
    iterator.close()
    one = stream(folder.train, workers=1)
    one.set_state(state)  # another number of workers goes on
    assert_same(take(one, 2), expected[2:])
    one.close()


def test_records_can_be_sent_to_other_processes(tfds_folder):
    images = load('imagenet2012', tfds_folder).train.images[:4]
    expected = np.asarray(images)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(images)), expected)


def test_processes_see_disjoint_parts_of_the_whole(folder):
    whole = take(stream(folder.train), 4)
    parts = [take(stream(folder.train, process=(i, 2)), 4) for i in range(2)]
    joined = [
        {key: np.concatenate([one[key], other[key]]) for key in one}
        for one, other in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_evaluation_sees_every_image_once(folder):
    seen = list(batches.eval_batches(*folder.test, 6))
    assert [int(batch['mask'].sum()) for batch in seen] == [6, 6, 4]
    pixels = np.concatenate([batch['image'][batch['mask']] for batch in seen])
    np.testing.assert_array_equal(pixels, folder.test.images)


def test_a_part_held_out_for_validation(archives):
    train, validation, *_ = load('image_folder', archives / 'folder', validation=8)
    assert len(train.labels) == 40 and np.bincount(validation.labels).tolist() == [2] * 4
    assert not by_content(train).keys() & by_content(validation).keys()


def test_a_run_on_a_folder(archives, tiny_config, tmp_path):
    config = tiny_config()
    config.dataset.update(
        name='image_folder', dir=str(archives / 'folder'), num_classes=4, validation=0
    )
    config.dataset.update(image_size=12, augment='flip')
    config.update(objective='natural', phases='pretrain,evaluate')
    config.pretrain.update(epochs=1, batch_size=16)
    result = pipeline.run(config, tmp_path)
    assert result['networks'][0]['examples'] == 16
    assert read_jsonl(tmp_path / 'pretrain' / 'metrics.jsonl')[-1]['step'] == 3


# --- crops ------------------------------------------------------------------------------------


def test_the_central_square_by_hand():
    # 224 of 256 parts of the shorter side, 160: 140 each way, from (320 - 140) / 2.
    assert encoded.centre_box(320, 160) == (90, 10, 230, 150)


def test_random_boxes_have_the_area_and_aspect_they_should():
    rng = np.random.default_rng(0)
    boxes = np.array([encoded.random_box(rng, 400, 400) for _ in range(4000)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 400).all()
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    aspect, area = width / height, width * height / 400**2
    assert aspect.min() > 0.74 and aspect.max() < 1.35
    assert abs(np.median(np.log(aspect))) < 0.02
    # Uniform from 0.08 on; below 3/4 every aspect fits into a square.
    assert 0.079 < area.min() < 0.085 and area.max() > 0.95
    assert abs(np.mean(area[area < 0.7] < 0.39) - 0.5) < 0.03


def test_an_image_too_long_for_any_draw_is_cut_in_its_middle():
    # 1000x10: no draw of at least 0.08 of the area fits. The nearest aspect is 4/3: 13x10.
    assert encoded.random_box(np.random.default_rng(0), 1000, 10) == (493, 0, 506, 10)


def image_of(array, quality=None):
    file = io.BytesIO()
    Image.fromarray(array).save(file, 'jpeg' if quality else 'png', quality=quality or 0)
    return file.getvalue()


def test_the_crop_is_where_its_box_is():
    # Sixteen 8x8 squares of one grey each; the central four fill the box exactly.
    greys = (np.arange(16, dtype=np.uint8) * 15).reshape(4, 4)
    squares = np.repeat(np.kron(greys, np.ones((8, 8), np.uint8))[..., None], 3, axis=2)
    cut = encoded._decode('x', image_of(squares), lambda w, h: (8, 8, 24, 24), 2)
    assert np.abs(cut[..., 0].astype(int) - greys[1:3, 1:3]).max() <= 8  # bilinear borders
    np.testing.assert_array_equal(cut[..., 0], cut[..., 2])


def test_decoding_at_a_fraction_changes_little():
    pixels = np.asarray(Image.open(io.BytesIO(jpeg(0, (640, 480)))))
    box = (100, 50, 500, 450)
    fast = encoded._decode('x', image_of(pixels, quality=95), lambda w, h: box, 64)
    slow = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BILINEAR, box)
    assert np.abs(fast.astype(int) - np.asarray(slow)).mean() < 2


def test_flip_mirrors_about_half():
    images = jax.random.uniform(jax.random.key(1), (200, 3, 4, 3))
    flipped = data.augment.flip(jax.random.key(0), images)
    mirrored = np.asarray((flipped == images[:, :, ::-1]).all((1, 2, 3)))
    same = np.asarray((flipped == images).all((1, 2, 3)))
    assert (mirrored ^ same).all() and 70 < mirrored.sum() < 130


# --- what is wrong ----------------------------------------------------------------------------


@pytest.fixture
def damaged(archives, tmp_path):
    """The folder with one training JPEG cut off, and one that is no image."""
    for path in (archives / 'folder').rglob('*.JPEG'):
        copy = tmp_path / path.relative_to(archives / 'folder')
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    bad = sorted((tmp_path / 'train' / CLASSES[1]).iterdir())[:2]
    content = bad[0].read_bytes()
    for path, data_ in zip(bad, (content[: len(content) // 2], b'no image'), strict=True):
        path.unlink()
        path.write_bytes(data_)
    return tmp_path, bad


def test_a_corrupt_image_stops_training_with_its_name(damaged):
    root, bad = damaged
    train = load('image_folder', root).train
    with pytest.raises(ValueError, match=rf'{CLASSES[1]}_\d+\.JPEG: cannot be decoded \('):
        take(stream(train), 4)
    with pytest.raises(ValueError, match=rf'{CLASSES[1]}_\d+\.JPEG: cannot be decoded \('):
        take(stream(train, workers=1), 4)
    for path in bad:
        i = [train.images.source[i][0] for i in range(48)].index(str(path))
        with pytest.raises(ValueError, match=f'{path}: cannot be decoded'):
            train.images.random(np.array([i]), np.zeros(1, int))


def test_corrupt_images_are_skipped_when_asked_to(damaged, capfd):
    root, bad = damaged
    train = load('image_folder', root, corrupt='skip').train
    _, shown = train.images.random(np.arange(6), np.arange(6))
    assert shown[[0, 2, 3, 4]].tolist() == [0, 2, 3, 4]
    assert not {1, 5} & set(shown.tolist())  # of the second class, the bad ones
    seen = take(stream(train), 8)
    labels = np.concatenate([batch['label'] for batch in seen[:4]])
    assert len(labels) == 48
    error = capfd.readouterr().err
    assert 'skipped (2 so far)' in error and all(error.count(str(path)) == 1 for path in bad)
    with pytest.raises(ValueError, match='none of 100 images in a row can be decoded; the last:'):
        train.images[[1, 5]].random(np.arange(2), np.arange(2))


def test_what_stands_in_does_not_depend_on_the_number_of_processes(damaged):
    train = load('image_folder', damaged[0], corrupt='skip').train
    whole = take(stream(train), 4)
    parts = [take(stream(train, process=(i, 3)), 4) for i in range(3)]
    joined = [
        {key: np.concatenate([part[key] for part in step]) for key in ('image', 'label')}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_evaluation_never_skips(damaged):
    train = load('image_folder', damaged[0], corrupt='skip').train
    with pytest.raises(ValueError, match='cannot be decoded'):
        list(batches.eval_batches(*train, 16))


def picture(array, form='png', **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


GREY = np.full((40, 40), 77, np.uint8)


@pytest.mark.parametrize(
    'content',
    [
        picture(GREY.astype(np.uint16) * 257),
        picture(GREY.astype(np.uint16) * 257, 'tiff'),
        picture(np.full((1, 2**16), 77, np.uint8)),
        picture(np.stack([GREY, 255 - GREY], axis=2)),  # with alpha
        picture(GREY, 'gif', save_all=True, append_images=[Image.fromarray(255 - GREY)]),
    ],
    ids=['16 bits', '16 bits, tiff', 'very long', 'half transparent', 'animated'],
)
def test_unusual_pictures_keep_their_grey(content):
    images = encoded.EncodedImages([('x', content)], SIZE)
    for pixels in (np.asarray(images), images.random(np.zeros(1, int), np.zeros(1, int))[0]):
        assert pixels.shape == (1, SIZE, SIZE, 3) and (pixels == 77).all()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'no image format'),
        (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n', 'no image format'),
        (picture(GREY.astype(np.float32), 'tiff'), 'of mode F, have no range: save them as 8 bits'),
        (picture(GREY.astype(np.int32), 'tiff'), 'of mode I, have no range: save them as 8 bits'),
    ],
    ids=['empty', 'eps', 'floats', 'integers'],
)
def test_pictures_whose_meaning_is_unclear_are_refused(content, message):
    with pytest.raises(ValueError, match=rf'x: cannot be decoded \(.*{message}'):
        np.asarray(encoded.EncodedImages([('x', content)], SIZE))


@pytest.fixture
def small_folder(tmp_path):
    for part in ('train', 'val'):
        (tmp_path / part / 'cat').mkdir(parents=True)
        (tmp_path / part / 'cat' / '1.png').write_bytes(picture(GREY))
    return tmp_path


@pytest.mark.parametrize(
    ('link', 'target', 'message'),
    [
        ('train/cat/loop', 'train/cat', 'loop. is a link to a folder whose images are counted'),
        ('train/cat/up', 'train', r'up/cat. is a link to a folder whose images are counted'),
        ('train/cat/2.png', 'nowhere', r'2\.png. is no file, or a link to none'),
        ('train/cat/2.png', '/dev/null', r'2\.png. is no file, or a link to none'),
    ],
)
def test_links_that_make_no_sense_are_refused_at_once(small_folder, link, target, message):
    (small_folder / link).symlink_to(small_folder / target)
    with pytest.raises(ValueError, match=message):
        load('image_folder', small_folder, num_classes=1)


def test_files_of_any_name_are_read_and_named_in_one_line(small_folder):
    cat = os.fsencode(small_folder / 'train' / 'cat')
    for name, content in ((b'caf\xe9\n.png', picture(GREY)), (b'new\nline.png', b'')):
        with open(cat + b'/' + name, 'wb') as file:
            file.write(content)
    (small_folder / 'train' / 'cat' / 'folder.png').mkdir()
    train = load('image_folder', small_folder, num_classes=1).train
    assert len(train.labels) == 3 and (np.asarray(train.images[:2]) == 77).all()
    with pytest.raises(ValueError, match=r'/train/cat/new\\nline\.png: cannot be decoded'):
        np.asarray(train.images[2:])


def test_folders_that_are_not_whole(archives, tmp_path):
    with pytest.raises(FileNotFoundError, match="dir='' must be a folder with the folders train"):
        load('image_folder', '')
    (tmp_path / 'train' / 'cat').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='folders train and val or validation or test'):
        load('image_folder', tmp_path)
    (tmp_path / 'val' / 'dog').mkdir(parents=True)
    with pytest.raises(ValueError, match="class 'cat' is not in both train and val"):
        load('image_folder', tmp_path)
    (tmp_path / 'val' / 'dog').rename(tmp_path / 'val' / 'cat')
    with pytest.raises(ValueError, match=r'train/cat: no images \(\.jpg, \.jpeg'):
        load('image_folder', tmp_path)
    with pytest.raises(ValueError, match=r'label 2 at index 2 is outside 0\.\.1'):
        load('image_folder', archives / 'folder', num_classes=2)


def test_imagenet_archives_that_are_not_whole(archives, tmp_path):
    with pytest.raises(
        FileNotFoundError, match='has not the files of ImageNet: give --from=FOLDER'
    ):
        prepare('imagenet2012', tmp_path, tmp_path)
    with pytest.raises(ValueError, match='cannot be downloaded freely: give --from=FOLDER'):
        prepare('imagenet2012', tmp_path)
    train = (archives / imagenet.TRAIN).read_bytes()
    (tmp_path / imagenet.VALIDATION).symlink_to(archives / imagenet.VALIDATION)
    (tmp_path / imagenet.TRAIN).write_bytes(train[: len(train) // 2])
    with pytest.raises(ValueError, match='not a whole tar archive'):
        prepare('imagenet2012', tmp_path / 'out', tmp_path)
    noisy = bytearray(train)
    noisy[train.index(CLASSES[2].encode() + b'.tar')] = 0  # the header of a class
    (tmp_path / imagenet.TRAIN).write_bytes(noisy)
    with pytest.raises(ValueError, match=r'not a whole tar archive \(noise at byte'):
        prepare('imagenet2012', tmp_path / 'out', tmp_path)
    (tmp_path / imagenet.TRAIN).write_bytes(train)
    (tmp_path / 'short.txt').write_text('\n'.join(CLASSES))
    with pytest.raises(ValueError, match=r'val_0*5\.JPEG is not one of 4 numbered images'):
        prepare('imagenet2012', tmp_path / 'out', tmp_path, val_labels=tmp_path / 'short.txt')
    assert not list(Path(tmp_path / 'out').rglob('*.array_record*'))
