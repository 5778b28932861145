"""Runs tests of torch's own suite for process groups on the backend "pypar": three ranks, CPU.

    python tests/torch_process_group.py test_all_reduce_sum test_send_recv ...

The suite decides while it is imported, by the name in BACKEND, what a backend must be able to do. It is imported as for
gloo, and then runs with the name of this backend: so all that gloo must pass is asked of it.
"""

import importlib.util
import os
import sys
import tempfile
import types
import unittest


class _LikeGloo(str):
    """A name that takes gloo's branches inside a test too."""

    def __eq__(self, other: object) -> bool:
        return other == "gloo" or str(self) == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def load_suite(folder: str) -> types.ModuleType:
    os.environ.update(BACKEND=os.environ.get("PYPAR_TEST_AS", "gloo"), TEMP_DIR=folder, OMP_NUM_THREADS="1")
    os.environ["INIT_METHOD"] = f"file://{folder}/store"
    os.environ.setdefault("WORLD_SIZE", "3")
    if importlib.util.find_spec("expecttest") is None:  # torch's test classes inherit from its TestCase
        sys.modules["expecttest"] = types.ModuleType("expecttest")
        sys.modules["expecttest"].TestCase = unittest.TestCase  # type: ignore[attr-defined]
    from torch.testing._internal.distributed import distributed_test

    import pypar.comm

    distributed_test.BACKEND = _LikeGloo(pypar.comm.cpu_group.NAME)
    return distributed_test


def make_case(suite: types.ModuleType) -> type[unittest.TestCase]:
    class TorchProcessGroupTest(suite.TestDistBackend, suite.DistributedTest._DistTestBase):  # type: ignore
        def setUp(self) -> None:
            super().setUp()
            self._fork_processes()

        def _fork_processes(self) -> None:
            """As torch's suite did before it was spawned: a start costs milliseconds, not the import of torch."""
            suite.torch.multiprocessing.set_start_method("fork", force=True)
            self._start_processes(suite.torch.multiprocessing.get_context("fork").Process)

        def _spawn_processes(self) -> None:
            pass

    return TorchProcessGroupTest


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        suite = load_suite(folder)
        case = make_case(suite)
        names = sys.argv[1:] or sorted(name for name in dir(case) if name.startswith("test_"))
        result = unittest.TextTestRunner(verbosity=2).run(unittest.TestSuite(map(case, names)))
        # Forked ranks end with sys.exit: they never come here.
        sys.exit(0 if result.wasSuccessful() else 1)


if __name__ == "__main__":
    main()
