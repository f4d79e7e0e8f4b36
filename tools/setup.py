"""Puts the kernel into the distribution, as the package `esmfold2_trimul_kernel`.

Its only copy is build/torch-universal of the repository, outside this folder. A source distribution
can't refer to what is outside, so it carries a copy, `kernel/`, from which its wheel is built.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

PACKAGE = "esmfold2_trimul_kernel"
CARRIED = "kernel"
REPOSITORY = Path("..")


class SourceDistribution(sdist):
    """Without the files of the kernel by their paths outside, and with `kernel/`."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        outside = Path(built).resolve()
        own = [name for name in files if not Path(name).resolve().is_relative_to(outside)]
        super().make_release_tree(base_dir, own)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(built, Path(base_dir, CARRIED), ignore=ignored)


if Path(CARRIED).is_dir():
    built = CARRIED
else:
    built = (REPOSITORY / "build" / "torch-universal").as_posix()
    shutil.copy(REPOSITORY / "LICENSE", ".")  # which a wheel must have, and finds here alone
if not Path(built, "metadata.json").is_file():
    raise FileNotFoundError(f"{Path(built).resolve()} must hold the kernel's build; it does not")
# A wheel would have what an earlier one left there, too.
shutil.rmtree(Path("build", "lib"), ignore_errors=True)
setup(
    packages=[
        *find_packages("src"), PACKAGE, *[f"{PACKAGE}.{name}" for name in find_packages(built)]
    ],
    package_dir={"": "src", PACKAGE: built},
    cmdclass={"sdist": SourceDistribution},
)  # fmt: skip
