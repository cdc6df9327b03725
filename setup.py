"""Packages and package data; the metadata and every tool's settings are in pyproject.toml.

`kernels/` is a folder of the repository and, through the relative link `python/logitless/kernels`, of the package. It
holds no `__init__.py`: `kernels/triton` would then shadow the real `triton` wherever `kernels/` is on the path.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

LINK = Path(__file__).parent / "python" / "logitless" / "kernels"

if not LINK.is_dir():
    raise SystemExit(
        "logitless: python/logitless/kernels should lead to the folder kernels/ but does not. Git writes links as text "
        "files where core.symlinks is false: run 'git config core.symlinks true', then "
        "'git checkout -- python/logitless/kernels', and install again."
    )

setup(
    packages=find_namespace_packages("python", include=["logitless", "logitless.*"]),
    package_dir={"": "python"},
    package_data={"": ["py.typed", "*.cu", "*.cuh", "*.md"]},
    include_package_data=False,
    zip_safe=False,
)
