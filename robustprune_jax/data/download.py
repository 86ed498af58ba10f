"""Downloads that resume, and are what their checksum says."""

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

BLOCK = 1 << 20  # bytes
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
ATTEMPTS = 5  # at a connection that breaks; each goes on where the last one stopped


def download(url: str, path: Path, sha256: str) -> None:
    """Downloads `url` into the file `path`, unless it is there already.

    What has arrived lies in `<path>.part` until it is whole, and a later call goes on from there.
    Raises OSError when the connection fails or the disk is full; ValueError when the file is not
    the one that the checksum belongs to, which is then removed.
    """
    if path.exists():
        _verify(path, sha256, url)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.part')
    problem = None
    for _ in range(ATTEMPTS):
        try:
            if _is_whole(url, part):
                break
            problem = 'the connection was closed'
        except urllib.error.HTTPError as error:
            raise OSError(f'{url}: {error.code} {error.reason}') from error
        except BROKEN as error:
            problem = getattr(error, 'reason', error)
        except OSError as error:  # the disk is full
            raise OSError(f'{part}: {error}; the same command goes on from there') from error
    else:
        size = part.stat().st_size if part.exists() else 0
        raise OSError(
            f'{url}: {problem} ({size} bytes are in {part}; the same command goes on from there)'
        )
    _verify(part, sha256, url)
    part.rename(path)


def _is_whole(url: str, part: Path) -> bool:
    """Appends what the server sends to `part`; returns whether that is all there is."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is left to send
            return True
        raise
    with response:
        resumes = response.status == 206
        left = response.headers['Content-Length']
        total = have * resumes + int(left) if left else None
        with (
            part.open('ab' if resumes else 'wb') as file,
            tqdm(
                desc=part.stem,
                initial=have * resumes,
                total=total,
                unit='B',
                unit_scale=True,
                disable=None,
            ) as bar,
        ):
            while block := response.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    return total is None or part.stat().st_size == total


def _verify(path: Path, sha256: str, url: str) -> None:
    with path.open('rb') as file:
        found = hashlib.file_digest(file, 'sha256').hexdigest()
    if found != sha256:
        path.unlink()
        raise ValueError(
            f'{url}: the sha256 of what arrived is {found}, must be {sha256}; removed, try again'
        )
