"""What a kill at any file operation of a save may leave behind; the killing is in `crash_points.py`."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT, run_program

pytestmark = pytest.mark.slow

if sys.platform != "linux":
    pytest.skip("the paths of open files are read from Linux's /proc", allow_module_level=True)

MEMORY = Path("/dev/shm")  # a kill loses nothing that the disk has not got yet: no need to wait for it 20,000 times
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}  # no thread before a fork


@pytest.fixture(scope="module")
def rows():
    """Each point: its kind and name, and the steps that a kill there left or what was wrong."""
    in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2**29
    with tempfile.TemporaryDirectory(dir=MEMORY if in_memory else None) as root:
        done = run_program("tests/crash_points.py", root, env=os.environ | ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("kind", "fewest"), [("python", 70), ("system calls", 110)])
def test_a_kill_at_any_file_operation_loses_nothing_committed_and_the_run_goes_on(rows, kind, fewest):
    rows = [row for row in rows if row["kind"] == kind]
    if reasons := [row["refused"] for row in rows if "refused" in row]:
        pytest.skip(reasons[0])
    assert [f"{row['point']}: {row['failure']}" for row in rows if "failure" in row] == []
    left = {row["point"]: row["steps"] for row in rows}
    print(f"{len(left)} points")
    assert len(left) == len(rows) >= fewest
    # the kills came before the operations, and in every stage of a save
    assert [left[name] for name in left if name.endswith("rename .staging-*-iteration-3 #1")] == [[1, 2]]
    assert [left[name] for name in left if name.endswith("rename *-iteration-1 #1")] == [[1, 2, 3]]
    assert [left[name] for name in left if name.endswith("rename *-iteration-2 #1")] == [[2, 3]]
    assert [3] in left.values()
