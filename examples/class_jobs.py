"""Jobs as objects: a class with `priority` and `run()`, the shape that many batch scripts already have.

Phase 1 compresses files of Python's own standard library and, on a pool of its own, takes their checksums.
Phase 2 packs what phase 1 wrote. The objects travel to a worker and do not come back: they write files.

    python examples/class_jobs.py
"""

import hashlib
import sysconfig
import tarfile
import tempfile
import zlib
from pathlib import Path

from bulkhead import Dispatcher, Pool

SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


class Compress:
    """Write a compressed copy of one file."""

    priority = 0

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self.target = folder / f"{source.name}.z"

    def run(self) -> None:
        self.target.write_bytes(zlib.compress(self.source.read_bytes(), level=9))


class Checksum:
    """Write the SHA-256 of one file."""

    priority = 1

    def __init__(self, source: Path, folder: Path) -> None:
        self.source = source
        self.target = folder / f"{source.name}.sha256"

    def run(self) -> None:
        self.target.write_text(hashlib.sha256(self.source.read_bytes()).hexdigest())


class Pack:
    """Write everything in a folder to one archive. What run() returns is the job's result."""

    priority = 1

    def __init__(self, folder: Path, archive: Path) -> None:
        self.folder = folder
        self.archive = archive

    def run(self) -> int:
        with tarfile.open(self.archive, "w") as archive:
            for path in sorted(self.folder.iterdir()):
                archive.add(path, arcname=path.name)
        return self.archive.stat().st_size


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "files"
        folder.mkdir()

        disp = Dispatcher([Pool(priority=0, n_workers=2), Pool(priority=1, n_workers=1)])
        for source in SOURCES:
            disp.dispatch(Compress(source, folder))  # waits until a worker of pool 0 is free
            disp.dispatch(Checksum(source, folder))  # waits for pool 1 only
        disp.barrier()  # every file is written
        packed = disp.dispatch(Pack(folder, Path(scratch) / "all.tar"))
        disp.barrier()
        disp.finalize()

        compressed = [path.stat().st_size for path in folder.glob("*.z")]
        print(f"files       {len(compressed):>10,}")
        print(f"bytes       {sum(source.stat().st_size for source in SOURCES):>10,}")
        print(f"compressed  {sum(compressed):>10,}")
        print(f"checksums   {len(list(folder.glob('*.sha256'))):>10,}")
        print(f"archive     {packed.result():>10,}")


if __name__ == "__main__":
    main()
