"""run.json's versions: the commit of the code, wherever the code is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipeline.results.run_record import COMMIT_VARIABLE, code_commit


def git(folder: Path, *args: str) -> str:
    person = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    return subprocess.run(
        ["git", "-C", str(folder), *person, *args], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text("1\n")
    git(folder, "add", "code.py")
    git(folder, "commit", "--quiet", "-m", "first")
    git(folder, "tag", "-a", "v1", "-m", "a name that is not the commit")
    return folder


def test_a_checkout_is_known_by_its_commit_also_with_packed_references_and_as_a_worktree(
    checkout: Path, tmp_path: Path
) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert code_commit(checkout) == head
    git(checkout, "pack-refs", "--all")
    assert code_commit(checkout) == head
    git(checkout, "worktree", "add", "--quiet", str(tmp_path / "second"))
    assert code_commit(tmp_path / "second") == head


def test_changed_code_is_told_from_the_commit_and_new_files_are_not_code(checkout: Path) -> None:
    (checkout / "out.txt").write_text("results")
    head = git(checkout, "rev-parse", "HEAD")
    assert code_commit(checkout) == head
    (checkout / "code.py").write_text("2\n")
    assert code_commit(checkout) == f"{head}-dirty"


def test_code_without_its_history_has_the_commit_that_its_sender_set(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = checkout / "site-packages"
    installed.mkdir()
    assert code_commit(installed) is None, "the checkout around it is another project"
    monkeypatch.setenv(COMMIT_VARIABLE, "a" * 40)
    assert code_commit(installed) == "a" * 40
    assert code_commit(checkout) == git(checkout, "rev-parse", "HEAD"), "history wins"
