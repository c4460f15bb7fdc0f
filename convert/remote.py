"""A source on the hub whose weight files come when they are needed, and go when they are not."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_gemma_mtp.errors import UserError
from mlx_gemma_mtp.files import foreign
from mlx_gemma_mtp.files.folder import INDEX, is_plain, weight_names
from mlx_gemma_mtp.files.headers import joined
from mlx_gemma_mtp.files.safetensors import Tensor, read_header, read_object

from . import source
from .blocks import Source


@dataclass(frozen=True)
class Remote:
    """A repository at one commit.

    folder: its small files, in the hub's cache, which names it by the commit; place: where weight files are downloaded
    to; headers: what each weight file holds, in order; those that lie in the cache already are read there.
    """

    repo: str
    folder: Path
    place: Path
    headers: dict[Path, dict[str, Tensor]]

    @classmethod
    def open(cls, repo: str, revision: str | None, place: Path) -> "Remote":
        """Returns a repository, of whose weights the headers alone were read. Raises UserError."""
        from mlx_gemma_mtp.files import hub  # as in source.find

        folder = hub.find(repo, revision, converting=True, weights=False)
        headers = {}
        for name in weight_names(folder):
            if not is_plain(name):
                raise UserError(f"{folder / INDEX} names {name!r}; expected a plain NAME.safetensors beside it")
            if (folder / name).is_file():
                headers[folder / name] = read_header(folder / name)
                continue
            try:
                header = hub.read_header(repo, name, folder.name)
            except UserError:
                raise
            except Exception as error:  # the client's errors have no common base
                raise hub.foreign_repo(repo, revision) or hub.refusal(repo, error, revision, [name]) from error
            path = place / name
            headers[path] = {key: replace(tensor, path=path) for key, tensor in header.items()}
        return cls(repo, folder, place, headers)

    def read(self) -> tuple[dict, dict[str, Source]]:
        """Returns config.json and the tensors, as source.read does. Raises UserError."""
        config = read_object(self.folder / "config.json")
        found = foreign.of_folder(self.folder, config)
        return source.of_headers(self.repo, config, found, joined(self.folder, self.headers))

    def nbytes(self, paths: Iterable[Path]) -> int:
        """Returns how many bytes some weight files take in `place`."""
        return sum(
            max((tensor.offset + tensor.nbytes for tensor in self.headers[path].values()), default=0)
            for path in paths
            if path.parent == self.place
        )

    def fetch(self, path: Path) -> None:
        """Downloads a weight file, unless it is here. Raises UserError; half a file is never left under its name."""
        if path.parent != self.place:
            return
        from huggingface_hub import hf_hub_download

        from mlx_gemma_mtp.files import hub

        try:
            hf_hub_download(self.repo, path.name, revision=self.folder.name, local_dir=self.place)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in hub.FULL:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path.name} of {self.repo!r} cannot be downloaded ({reason})") from error
        if read_header(path) != self.headers[path]:
            path.unlink()
            raise UserError(f"{path.name} of {self.repo!r} came with another header than the hub told before")

    def keep(self, needed: set[Path]) -> None:
        """Removes all downloaded weight files but those that are needed, and what was left of downloads."""
        for path in self.headers:
            if path.parent == self.place and path not in needed:
                path.unlink(missing_ok=True)
        for part in self.place.rglob("*.incomplete"):
            part.unlink(missing_ok=True)
