"""What a conversion will write, planned down to every byte."""

from dataclasses import dataclass
from pathlib import Path

from .writer import Job


@dataclass(frozen=True)
class Conversion:
    """One planned conversion: every header of `source` was read and checked, and nothing is written to `out` yet.

    fused: which adapter goes into it, in words; '' for none.
    """

    source: Path
    out: Path
    config: dict
    jobs: list[Job]
    fused: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(job.nbytes for job in self.jobs)

    def __str__(self) -> str:
        return (
            f"{self.out}: {self.config['model_type']}, {len(self.jobs)} tensors, {self.nbytes / 1e9:.3f} GB{self.fused}"
        )
