"""bench/on_disk.py runs, and finds the disk to be the limit of an update or says how far it is from it."""

import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.slow  # a process of its own
def test_a_small_run(tmp_path):
    command = [sys.executable, str(ROOT / "bench" / "on_disk.py"), "--directory", str(tmp_path)]
    command += ["--parameters", "13", "--part", "33", "--rounds", "1"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert "13 M parameters: on disk" in found.stdout and "% of the disk alone" in found.stdout
