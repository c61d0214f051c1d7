"""What pyproject.toml cannot say: a wheel holds the native library for ONNX Runtime where a compiler is there.

With it the wheel is for one platform and any Python 3; without it, for all of them: the library is then compiled at its
first use. An editable install compiles nothing.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from salr.formats.errors import SalrError

from salr.onnx.library import LIBRARY_NAME, put_library


class BuildPackage(build_py):
    """The package, with the library that the wheel command compiled."""

    def run(self) -> None:
        """Copy the sources, then the library."""
        super().run()
        library = getattr(self.distribution, "native_library", None)
        target = Path(self.build_lib) / "salr" / "onnx" / "native" / LIBRARY_NAME
        target.unlink(missing_ok=True)  # of an earlier build
        if library is not None:
            shutil.copyfile(library, target)


class BuildWheel(bdist_wheel):
    """A wheel for this platform and every Python 3, or one for all platforms where nothing can be compiled."""

    def run(self) -> None:
        """Compile the library first: whether that succeeds decides what the wheel is called."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                if "universal2" in self.plat_name:
                    raise SalrError("this Python is for two processors", needed="one", fix="build with another one")
                self.distribution.native_library = put_library(Path(folder))
                self.distribution.has_ext_modules = lambda: True  # else setuptools takes it for plain Python
                self.root_is_pure = False
            except SalrError as error:
                self.warn(f"the wheel holds no native library for ONNX Runtime: {error}")
            super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag: the library does not depend on Python's version."""
        return self.python_tag, "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": BuildWheel})
