"""The command line in this process, and how its outcome is read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result


@pytest.fixture(scope="session")
def salr() -> Callable[..., Result]:
    """Return a function that runs one command line in this process."""
    from salr.cli import app

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return run


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny Llama in a directory of its own name."""
    return shutil.copytree(llama, tmp_path / "tiny-llama")


@pytest.fixture
def fails(salr: Callable[..., Result]) -> Callable[..., str]:
    """Return a function that runs a command, expects one line on stderr and an exit status, and returns the line."""

    def run(*arguments: object, status: int = 1) -> str:
        result = salr(*arguments)
        assert result.exit_code == status, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("salr: ") and result.stdout == ""
        return lines[0]

    return run
