"""Runs tests of torch's own suite for process groups on the backend "pypar": CPU, forked ranks.

    python tests/comm/process_group/torch_suite.py LIKE RANKS [test_all_reduce_sum ...]

The suite decides by the backend's name what a backend must be able to do. So it is imported as for LIKE (gloo or mpi),
and then runs with our name in LIKE's place: all that LIKE must pass is asked of us. Without names all tests run. The
last line is a JSON object: what passed, what was skipped and why, what failed.
"""

import importlib.util
import json
import os
import sys
import tempfile
import types
import unittest


class Alias(str):
    """A name that takes another one's branches where it is compared with that."""

    like: str

    def __eq__(self, other: object) -> bool:
        return other == self.like or str.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def load_suite(like: str, num_ranks: int, folder: str) -> types.ModuleType:
    os.environ.update(BACKEND=like, WORLD_SIZE=str(num_ranks), TEMP_DIR=folder, OMP_NUM_THREADS="1")
    os.environ["INIT_METHOD"] = f"file://{folder}/store"
    if importlib.util.find_spec("expecttest") is None:  # torch's test classes inherit from its TestCase
        sys.modules["expecttest"] = types.ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
    import torch._dynamo  # noqa: F401 - here once, instead of in each rank that makes a DistributedDataParallel
    from torch.testing._internal.distributed import distributed_test

    import pypar.comm

    distributed_test.BACKEND = Alias(pypar.comm.cpu_group.NAME)
    Alias.like = like
    return distributed_test


def make_case(suite: types.ModuleType) -> type[unittest.TestCase]:
    class TorchProcessGroupTest(suite.TestDistBackend, suite.DistributedTest._DistTestBase):  # type: ignore
        def setUp(self) -> None:
            super().setUp()
            # Forked, a rank starts in milliseconds; spawned, it imports torch first.
            self._start_processes(suite.torch.multiprocessing.get_context("fork").Process)

        def _spawn_processes(self) -> None:
            pass

    return TorchProcessGroupTest


class Result(unittest.TextTestResult):
    """Also remembers the names of what passed."""

    def startTestRun(self) -> None:  # noqa: N802
        self.passed: list[str] = []

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().addSuccess(test)
        self.passed.append(test._testMethodName)


def main() -> None:
    like, num_ranks, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        case = make_case(load_suite(like, int(num_ranks), folder))
        names = names or sorted(name for name in dir(case) if name.startswith("test_"))
        runner = unittest.TextTestRunner(sys.stdout, resultclass=Result, verbosity=2)
        result = runner.run(unittest.TestSuite(case(name) for name in names))
        # A forked rank ends with sys.exit and does not come here.
        report = {
            "passed": result.passed,
            "skipped": {test._testMethodName: reason for test, reason in result.skipped},
            "failed": [test._testMethodName for test, _ in result.errors + result.failures],
        }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
