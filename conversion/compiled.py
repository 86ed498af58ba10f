"""A network's C file, compiled here and called from Python."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from robustprune_jax import zoo
from robustprune_jax.models import create_model
from robustprune_jax.runtime.files import replacing

from .c import Source, c_source
from .compact import compact
from .graph import Graph
from .to_c import is_large

FLAGS = ('-std=c99', '-O3', '-march=native', '-shared', '-fPIC')
_CONSTANTS: dict[Path, np.ndarray] = {}
CACHE = Path.home() / '.cache' / 'robustprune_jax' / 'c'


def compiled(network: Graph | str | os.PathLike) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a network's C file as a function: float32 images [B, C, H, W] in [0, 1] -> logits.

    network: a folder of a run, a PyTorch file or a name of the zoo; or a graph. The machine's
    compiler ($CC, else cc) makes a library in ~/.cache/robustprune_jax/c, once for the same file.
    Raises FileNotFoundError where there is no compiler, NotImplementedError as `compact` and
    `c_source` do, and what zoo.read does. Images of another shape are a ValueError.
    """
    if not isinstance(network, Graph):
        variables, meta = zoo.read(network)
        module = create_model(meta['arch'], meta['num_classes'])
        network = compact(variables, module, meta['image_shape'])
    source = c_source(network, separate=is_large(network))
    function = _loaded(_library(source), source.data).net_logits
    pointer = ctypes.c_void_p
    function.argtypes, function.restype = (pointer, ctypes.c_int, pointer, pointer), None

    def logits(images: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(images, np.float32)
        if images.shape[1:] != source.image_shape:
            raise ValueError(f'images are {images.shape}: expected [batch, *{source.image_shape}]')
        found = np.empty((len(images), source.classes), np.float32)
        workspace = np.empty(source.workspace, np.float32)
        function(images.ctypes.data, len(images), found.ctypes.data, workspace.ctypes.data)
        return found

    return logits


def _loaded(path: Path, data: bytes) -> ctypes.CDLL:
    """The library, with its constants where it reads them: a second one of the same file is the
    first, and never leaves the process."""
    if path not in _CONSTANTS:
        library, _CONSTANTS[path] = ctypes.CDLL(str(path)), np.frombuffer(data, np.uint8)
        if data:
            address = _CONSTANTS[path].ctypes.data
            ctypes.c_void_p.in_dll(library, 'net_data').value = address
    return ctypes.CDLL(str(path))


def _library(source: Source) -> Path:
    compiler = shutil.which(os.environ.get('CC', 'cc'))
    if compiler is None:
        raise FileNotFoundError('no C compiler: install gcc or clang, or name one in $CC')
    version = subprocess.run([compiler, '--version'], capture_output=True, text=True).stdout
    # With the constants, which one library holds of one network.
    key = '\n'.join([version, *FLAGS, source.text]).encode() + source.data
    key = hashlib.sha256(key).hexdigest()[:32]
    library = CACHE / f'{key}.so'
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        file = CACHE / f'{key}.c'
        with replacing(file) as temporary:
            temporary.write_text(source.text)
        with replacing(library) as temporary:
            made = subprocess.run(
                [compiler, *FLAGS, '-o', str(temporary), str(file), '-lm'],
                capture_output=True,
                text=True,
            )
            if made.returncode:
                raise RuntimeError(f'{compiler} does not compile {file}: {made.stderr[-2000:]}')
    return library
