"""The part of the build that pyproject.toml cannot say: the native CPU library.

The library has no Python interface, so one build serves every Python and the wheel is tagged
py3-none-<platform>. Without a compiler, or when it fails, the package installs all the same and
computes attention on the CPU with torch operators.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CPU = Path("pisa_compile/kernels/cpu")

spec = importlib.util.spec_from_file_location("pisa_cpu_build", CPU / "build.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildNative(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        try:
            native.build(Path(self.get_ext_fullpath(extension.name)))
        except native.BuildError as error:
            warnings.warn(f"installing without the native CPU library: {error}", stacklevel=1)


class BuildPython(build_py):
    def finalize_options(self) -> None:
        super().finalize_options()
        # The sources, so that the library can also be built after the installation.
        self.package_data = {**(self.package_data or {}), "pisa_compile.kernels.cpu": ["src/*"]}


class PlatformWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "pisa_compile.kernels.cpu._pisa_cpu",
            sources=[str(path) for path in sorted((CPU / "src").glob("*.cpp"))],
            depends=[str(path) for path in sorted((CPU / "src").glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython, "bdist_wheel": PlatformWheel},
)
