"""Section 1: what the first cell installs, what it keeps, and what it says."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
from conftest import code_cells


@pytest.fixture
def installed(monkeypatch):
    """The versions of the packages that the first cell finds. torch is not imported."""
    versions = {"torch": "1.0", "untouched": "1.0", "outdated": "1.0"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return versions


@pytest.fixture
def install(installed, monkeypatch):
    """Run the first cell for other requirements; return what pip was told to install.

    pip installs version 2.0 of anything.
    """
    told = []

    def run(command, **options):
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        wanted = [word for word in command[4:] if not word.startswith("-")]
        told.extend(wanted)
        for line in wanted:
            installed[re.split("[>=]", line)[0]] = "2.0"

    monkeypatch.setattr(subprocess, "run", run)

    def install(requirements):
        told.clear()
        cell = code_cells()[0].source
        own = cell.split('"""')[1]
        exec(cell.replace(own, requirements), {})
        return list(told)

    return install


def test_nothing_is_installed_where_all_is_new_enough(install):
    assert install("torch>=1.0,<3 untouched>=0.5,<1.0 outdated>=1.0") == []


def test_only_what_is_missing_or_too_old_is_installed(install):
    told = install("untouched>=1.0,<2 outdated>=2.0,<3 missing>=1.0,<3")
    assert told == ["outdated>=2.0,<3", "missing>=1.0,<3", "torch==1.0"]


def test_torch_is_kept_whatever_its_version(install):
    assert install("torch>=2.0") == []
    assert install("torch>=2.0 missing>=1.0") == ["missing>=1.0", "torch==1.0"]


def test_torch_is_installed_where_there_is_none(install, installed):
    del installed["torch"]
    assert "torch>=2.0,<3" in install("torch>=2.0,<3")


def test_an_old_torchao_is_replaced(install, installed):
    installed["torchao"] = "0.15"
    assert install("untouched>=1.0") == ["torchao>=0.16", "torch==1.0"]


def test_a_torchao_that_is_new_enough_is_kept(install, installed):
    installed["torchao"] = "0.17.0rc1"
    assert install("untouched>=1.0") == []


def test_what_pip_could_not_install_is_named(install):
    with pytest.raises(RuntimeError, match="could not install.*outdated>=3.0"):
        install("outdated>=3.0")


def test_a_restart_is_asked_for_where_a_loaded_package_was_replaced(
    install, monkeypatch
):
    monkeypatch.setitem(sys.modules, "outdated", object())
    with pytest.raises(RuntimeError, match="Restart.*outdated"):
        install("outdated>=2.0")
