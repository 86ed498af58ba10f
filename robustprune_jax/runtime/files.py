"""Files that are never half-written, and logs that survive a kill."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, finds the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o644)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read_jsonl(path: Path) -> list[dict]:
    """Returns the whole lines of a .jsonl file; [] where there is none. A cut last line is left."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind('\n') + 1].splitlines()]


def differences(one: dict, other: dict, prefix: str = '') -> Iterable[str]:
    """Yields 'field: value in one, value in other' for every leaf in which two dicts differ."""
    for key in sorted(one.keys() | other.keys()):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f'{prefix}{key}.')
        elif a != b:
            yield f'{prefix}{key}: {a!r}, {b!r}'
