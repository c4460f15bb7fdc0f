"""What a conversion will write, planned down to every byte."""

from dataclasses import dataclass, field
from pathlib import Path

from .checkpoint import Repeat
from .remote import Remote
from .writer import Job


@dataclass(frozen=True)
class Conversion:
    """One planned conversion: every header of `source` was read and checked, and nothing is written to `out` yet.

    fused: which adapter goes into it, in words; '' for none; remote: where the weights are that `source` lacks;
    repeats: what could not be checked without them.
    """

    source: Path
    out: Path
    config: dict
    jobs: list[Job]
    fused: str = ""
    remote: Remote | None = None
    repeats: list[Repeat] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(job.nbytes for job in self.jobs)

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.config['model_type']}, {len(self.jobs)} tensors, {self.nbytes / 1e9:.3f} GB{self.fused}"
        )
