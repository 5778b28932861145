"""What a run's configuration says about who holds parameters, gradients and states: the section ``memory``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pypar.grid import SAMPLES
from pypar.settings import Run, Section, check_num_bytes, setting


@dataclass(frozen=True)
class MemoryConfig(Section):
    """What each rank holds of parameters, gradients and optimizer states."""

    zero: int = setting(
        0,
        at_least=0,
        at_most=3,
        help="what is cut over the data ranks: 0: nothing; 1: optimizer states and masters; 2: gradients too; "
        "3: parameters too",
        resumed=None,
    )
    shard_size: int = setting(
        0, at_least=0, help="ranks of dp over which it is cut, a divisor of dp; 0: all of them", resumed=None
    )
    reshard: bool | int = setting(
        True,
        at_least=1,
        help="with zero = 3, a block's parameters after its forward: true: freed; false: whole until its backward is "
        "over; a number: cut over so many ranks",
        resumed=None,
    )
    offload: str = setting(
        "none",
        choices=("none", "nvme", "chunks"),
        help="where states lie between uses: none: on the device; nvme: optimizer states on the disk of "
        "offload_directory, by io_uring or threads past the page cache; chunks: rows of parameters, gradients and "
        "optimizer states on the host, and on the device as far as device_bytes leaves room",
        resumed=None,
    )
    offload_directory: str = setting(
        "", help="a folder of a local disk, the same on every node; nothing stays in it", resumed=None
    )
    offload_part_bytes: int = setting(
        64 << 20, above=0, help="of optimizer states that are in memory at once, three times", resumed=None
    )

    activation_bytes: str = setting(
        "",
        refuse=check_num_bytes,
        help='the most that the layers of a rank may hold of activations, like "2GB": each is kept, computed again or '
        'moved to the host, as takes the least time; "": as the section recompute says',
        resumed=None,
    )
    device_bytes: str = setting(
        "",
        refuse=check_num_bytes,
        help='with offload = chunks, the most that the store takes of the device, like "2GB", without activations',
        resumed=None,
    )

    def check(self, run: Run) -> Sequence[str]:
        """What is cut over ranks of dp divides them, and what is said of parameters is for parameters that are cut."""
        num_samples = run.axes[SAMPLES]
        if self.shard_size and num_samples % self.shard_size:
            raise ValueError(
                f"memory.shard_size ({self.shard_size}) must divide {SAMPLES} ({num_samples}); use 0 for all "
                "of its ranks"
            )
        for key, is_default, least in (
            ("shard_size", self.shard_size == 0, 1),
            ("reshard", self.reshard is True, 3),
        ):
            if not is_default and self.zero < least:
                raise ValueError(
                    f"memory.{key} is for memory.zero of at least {least}, and it is {self.zero}; leave {key} out, or "
                    f"set memory.zero={least}"
                )
        shard = self.shard_size or num_samples
        if type(self.reshard) is int and shard % self.reshard:
            raise ValueError(
                f"memory.reshard ({self.reshard}) must divide the ranks of {SAMPLES} over which parameters are cut "
                f"({shard}); use true to cut a block again over all of them"
            )
        self._check_offload()
        return ()

    def _check_offload(self) -> None:
        """The folder that states are to lie in can be used, and is named where it is to be; so are bytes."""
        if (self.offload == "chunks") != bool(self.device_bytes):
            raise ValueError(
                f"memory.device_bytes ({self.device_bytes!r}) is what the store may take of the device with "
                f"memory.offload='chunks', and it is {self.offload!r}; set both, or neither"
            )
        if self.offload != "nvme":
            if self.offload_directory:
                raise ValueError(
                    f"memory.offload_directory ({self.offload_directory!r}) is for memory.offload='nvme', and it is "
                    f"{self.offload!r}; leave the directory out, or set memory.offload=nvme"
                )
            return
        if not self.offload_directory:
            raise ValueError(
                "memory.offload='nvme' needs memory.offload_directory, a folder of a local disk in which optimizer "
                "states lie; name one"
            )
        from pypar.files.disk import check_folder

        check_folder(Path(self.offload_directory))
