"""What a configuration says of the job itself: the sections ``data`` and ``train``."""

from collections.abc import Sequence
from dataclasses import dataclass

from pypar.grid import SAMPLES
from pypar.settings import Run, Section, check_divides, setting
from pypar.tensor_parallel.config import check_sequence_parallel
from pypar.train.data.tokens import SPECIAL_TOKENS, check_text


@dataclass(frozen=True)
class DataConfig(Section):
    """Where the text comes from and how it becomes tokens."""

    path: str = setting(
        "python-stdlib",
        help="a folder, a glob, a text file, a .jsonl file, or Python's own library",
        resumed="the same tokens",
    )
    pattern: str = setting("*", help="which files of a folder, at any depth; hidden ones never")
    tokenizer: str = setting(
        "bytes", help="bytes, or the path of a Hugging Face tokenizer.json", resumed="the same tokens"
    )
    # Documents end where records and files do, whatever tokens they hold.
    special_tokens: str = setting(
        "text",
        choices=SPECIAL_TOKENS,
        help='"text": `</s>` in the data or a prompt is text like any other; "parse": it is the token of that name, as '
        "where a chat template wrote it",
    )
    validation_fraction: float = setting(
        0.05,
        above=0,
        below=1,
        help="share of the documents that is held back; a single document is split by position",
    )
    cache_directory: str = setting(
        "", help='where tokens are kept; "": `$XDG_CACHE_HOME/pypar` or `~/.cache/pypar`'
    )


def _precisions() -> Sequence[str]:
    from pypar.train.precision import PRECISIONS

    return tuple(PRECISIONS)


@dataclass(frozen=True)
class TrainConfig(Section):
    """How long, how much at a time, and what to write on the way."""

    steps: int = setting(
        500,
        at_least=1,
        help="updates of the whole run",
        resumed="the learning rate now falls until the new last step",
    )
    batch_size: int = setting(
        8,
        at_least=1,
        help="sequences a step, over all ranks",
        resumed="the samples go on in their order",
    )
    microbatch_size: int = setting(2, at_least=1, help="sequences of one forward pass of one rank")
    sequence_length: int = setting(256, at_least=1, help="tokens")
    packed_documents: bool = setting(
        False, help="tokens see their own document only, and do not predict the next one's first"
    )
    precision: str = setting(
        "fp32",
        choices=_precisions,
        help="of weights and activations; master weights and gradients are fp32 always",
    )
    evaluate_every: int = setting(50, at_least=0, help="steps; 0: only at the end")
    evaluate_batches: int = setting(4, at_least=1, help="validation batches on the way")
    final_evaluate_batches: int = setting(32, at_least=1, help="validation batches at the end of the run")
    checkpoint_every: int = setting(100, at_least=0, help="steps; 0: only at the end")
    keep_checkpoints: int = setting(2, at_least=0, help="the newest so many; 0: all")
    resume: str = setting(
        "",
        help='"": start anew; "auto" (or true): from the newest checkpoint of this run; or the path of a checkpoint',
        resumed=None,
    )
    resume_data: str = setting(
        "same",
        choices=("same", "restart"),
        help='"restart": of data, sequence length or seed that are not the checkpoint\'s',
        resumed=None,
    )
    sequence_parallel: bool = setting(False, help="activations between layers are cut over tp by position")
    threads: int = setting(0, at_least=0, help="of one rank; 0: the machine's cores divided by its ranks")
    sample_prompt: str = setting("class ", refuse=check_text, help="what the sample at the end begins with")
    sample_tokens: int = setting(200, at_least=0, help="length of the sample; 0: none")
    bucket_bytes: int = setting(25 << 20, at_least=1, help="of gradients that are reduced at once")
    log_every: int = setting(25, at_least=1, help="steps; where there is no terminal for a bar")

    def num_microbatches(self, num_ranks: int) -> int:
        """Microbatches of one of the ranks that share a batch, in a step."""
        return self.batch_size // num_ranks // self.microbatch_size

    def check(self, run: Run) -> Sequence[str]:
        """Every data rank has the same number of whole microbatches, and sequence parallelism whole parts."""
        unit = run.axes[SAMPLES] * self.microbatch_size
        check_divides(
            "train.batch_size", self.batch_size, unit, f"the {SAMPLES} size x train.microbatch_size"
        )
        if self.sequence_parallel:
            check_sequence_parallel(run)
        return ()
