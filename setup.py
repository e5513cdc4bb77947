"""Compiles the native code's files at the same time; all the rest is in pyproject.toml."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext


class ParallelBuildExt(build_ext):
    """setuptools gives one extension's files to the compiler one by one."""

    def build_extensions(self) -> None:
        """Each file is compiled as before, one for every processor at a time."""
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], *arguments: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = pool.map(lambda one: compile_all([one], *arguments, **options), sources)
                return [each for objects in found for each in objects]

        self.compiler.compile = compile_each
        super().build_extensions()


setup(cmdclass={"build_ext": ParallelBuildExt})
