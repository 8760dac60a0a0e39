"""Code that is compiled at first use: once, whoever asks at the same time, and with the compiler's own words if not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.engine.simd import c_library
from pipeline.engine.simd.c_library import compiler, load_library

needs_compiler = pytest.mark.skipif(compiler() is None, reason="install gcc or clang")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(c_library, "FOLDER", tmp_path / "compiled")
    return tmp_path / "compiled"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    path = tmp_path / "sources"
    path.mkdir()
    (path / "more.h").write_text("enum { MORE = 0 };\n")
    (path / "answer.c").write_text('#include "more.h"\nint answer(void) { return ANSWER + MORE; }\n')
    (path / "other.c").write_text("int other(void) { return -1; }\n")
    return path


def answer(sources: Path, *flags: str) -> int:
    library = load_library(sources, "answer", flags)
    assert library.other() == -1
    found: int = library.answer()
    return found


@needs_compiler
def test_code_is_compiled_once_for_each_version_and_its_flags(
    folder: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answer(sources, "-DANSWER=42") == 42
    with monkeypatch.context() as patch:
        patch.setattr(c_library, "_compile", lambda *_: pytest.fail("compiled again"))
        assert answer(sources, "-DANSWER=42") == 42
    assert answer(sources, "-DANSWER=43") == 43
    (sources / "more.h").write_text("enum { MORE = 1 };\n")
    assert answer(sources, "-DANSWER=42") == 43
    assert len(list(folder.glob("answer-*.so"))) == len(list(folder.iterdir())) == 3


@needs_compiler
def test_engines_that_start_together_all_get_whole_libraries(folder: Path, sources: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: answer(sources, "-DANSWER=7"), range(8))) == {7}
    assert len(list(folder.iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("home", ["a file", "none", "damaged"])
def test_where_no_library_can_be_kept_the_code_is_compiled_for_this_process_alone(
    folder: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    if home == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setattr(c_library, "FOLDER", tmp_path / "file" / "compiled")
    elif home == "none":
        monkeypatch.setattr(c_library, "FOLDER", Path("~no-such-user/compiled"))
    else:
        monkeypatch.setattr(c_library.os, "replace", lambda _, kept: Path(kept).write_bytes(b"half"))
    assert answer(sources, "-DANSWER=5") == 5


@needs_compiler
def test_code_that_does_not_compile_says_what_the_compiler_says(folder: Path, sources: Path) -> None:
    with pytest.raises(RuntimeError, match=r"fails with code \d+: .*ANSWER.* undeclared"):
        load_library(sources, "answer", [])
    assert not list(folder.iterdir())


def test_the_compiler_is_the_one_that_cc_names_and_without_one_the_error_says_what_to_install(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert compiler() is None
    with pytest.raises(RuntimeError, match="no C compiler is installed; install gcc or clang"):
        load_library(sources, "answer", [])
    mine = tmp_path / "my-cc"
    mine.touch(mode=0o755)
    monkeypatch.setenv("CC", "my-cc -m64")
    assert compiler() == ["my-cc", "-m64"]
    for nonsense in (" ", 'my-cc "', "no-such-compiler"):
        monkeypatch.setenv("CC", nonsense)
        assert compiler() is None
