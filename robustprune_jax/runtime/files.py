"""Files that are never half-written, logs that survive a kill, and a lock on a folder."""

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError of writing to an open file what it lacks: the file's name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives the path of a file to write beside `path`, which takes its place at the end.

    A reader, or a crash, finds the old file or the new one, whole.
    """
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
    try:
        with naming(path):
            yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, and the folder that it is in, as `replacing` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def read_jsonl(path: Path, tell: Callable[[str], object] = print) -> list[dict]:
    """Returns the whole lines of a .jsonl file; [] where there is none. A cut last line is left.

    Lines that hold no object are left out, and `tell` gets a sentence on them.
    """
    if not path.exists():
        return []
    lines, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b'\n')[:-1], start=1):
        try:
            content = json.loads(line)
        except ValueError:  # also of text that is not UTF-8
            content = None
        if isinstance(content, dict):
            lines.append(content)
        else:
            damaged.append(number)
    if damaged:
        more = f' and {len(damaged) - 1} more' if damaged[1:] else ''
        tell(f'{path.name}: left out what is damaged, line {damaged[0]}{more}')
    return lines


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the file `lock` in a folder, made if need be: one line, this host and process.

    A lock that a process of this host left when it was killed is taken over. Raises ValueError
    where another process holds it.
    """
    path, host = folder / 'lock', socket.gethostname()
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():
        owner, _, process = path.read_text().strip().rpartition(' ')
        if owner != host or not process.isdigit() or _runs(int(process)):
            raise ValueError(
                f'{folder} is in use by process {process} on host {owner}: wait for it, or choose '
                f'another folder; if that process is gone, remove {path}'
            )
        path.unlink()
    path.touch(exist_ok=False)
    try:
        with naming(path):
            path.write_text(f'{host} {os.getpid()}\n')
        yield
    finally:
        path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    """Returns whether another process of this host has the number."""
    if process == os.getpid():  # numbers begin again with a container
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


def differences(one: dict, other: dict, prefix: str = '') -> Iterable[str]:
    """Yields 'field: value in one, value in other' for every leaf in which two dicts differ."""
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f'{prefix}{key}.')
        elif a != b:
            yield f'{prefix}{key}: {a!r}, {b!r}'
