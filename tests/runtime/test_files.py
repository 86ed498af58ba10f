"""Files that are whole, the lock on a folder, and logs with damaged lines."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from robustprune_jax.runtime.files import locked, naming, read_jsonl, replacing, write_atomically


def test_a_file_is_the_new_one_whole_or_the_old_one(tmp_path):
    path = tmp_path / 'run' / 'result.json'
    write_atomically(path, 'old')
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text('ne')
        raise KeyboardInterrupt
    assert path.read_text() == 'old'
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_is_locked_until_the_run_ends_however_it_does(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / 'run'):
        assert (tmp_path / 'run/lock').read_text() == f'{socket.gethostname()} {os.getpid()}\n'
        raise KeyboardInterrupt
    assert not list((tmp_path / 'run').iterdir())


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    (tmp_path / 'lock').write_text(f'{socket.gethostname()} {gone.pid}\n')
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / 'lock').read_text()


@pytest.mark.parametrize('owner', [f'{socket.gethostname()} {os.getppid()}', 'elsewhere 1'])
def test_what_another_run_holds_is_refused(tmp_path, owner):
    (tmp_path / 'lock').write_text(f'{owner}\n')
    host, process = owner.split()
    message = f'in use by process {process} on host {host}.*remove {tmp_path / "lock"}'
    with pytest.raises(ValueError, match=message), locked(tmp_path):
        pass
    assert (tmp_path / 'lock').read_text() == f'{owner}\n'


def test_damaged_lines_are_told_of_and_the_others_kept(tmp_path):
    path, told = tmp_path / 'log.jsonl', []
    path.write_bytes(b'{"step": 1}\n[]\n{"st\xff": 2}\n{"step": 3}\n{"st')
    assert read_jsonl(path, told.append) == [{'step': 1}, {'step': 3}]
    assert told == ['log.jsonl: left out what is damaged, line 2 and 1 more']


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full here')
def test_a_full_disk_names_the_file_that_it_had_no_room_for():
    log = Path('run/pretrain/metrics.jsonl')
    with (
        pytest.raises(OSError, match=f"No space left on device: '{log}'"),
        naming(log),
        open('/dev/full', 'w') as file,
    ):
        file.write('{}')
