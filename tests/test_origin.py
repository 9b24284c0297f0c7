"""Whose code a file is decides what is watched: the user's wholly, that of installed packages as it is."""

from __future__ import annotations

import contextlib
import importlib
import sys
import textwrap

import pytest
import torch

import thunder

X = torch.linspace(-1, 1, 6)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Writes modules below a folder that is on the path, and imports one."""

    def write_and_import(name: str, files: dict[str, str]):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend((tmp_path / next(iter(files))).parent)
        importlib.invalidate_caches()
        imported.append(name)
        return importlib.import_module(name)

    imported: list[str] = []
    yield write_and_import
    for name in imported:
        sys.modules.pop(name, None)


PRINTS = """
    def fn(x):
        print("called")
        return x * 2
"""


@pytest.mark.parametrize("folder", ["torch", "thunder/_mine", "thunder/extend"])
def test_program_in_a_folder_that_is_called_like_a_library_is_the_users(place, folder):
    module = place("prints_in_a_folder", {f"{folder}/prints_in_a_folder.py": PRINTS})
    with pytest.raises(thunder.CaptureError, match=r"prints_in_a_folder\.py:3, in fn.*print"):
        thunder.jit(module.fn)(X)


READS = """
    import numpy as np

    def fn(x, s):
        return x * s if np.sqrt(s) < 3.5 else x + s
"""


def test_number_that_such_a_program_lets_c_code_read_is_a_constant(place):
    fn = place("reads_in_a_folder", {"torch/reads_in_a_folder.py": READS}).fn
    compiled = thunder.jit(fn)
    for s in (4.0, 9.0, 16.0, 25.0):
        torch.testing.assert_close(compiled(X, s), fn(X, s))


COUNTS = """
    FACTOR = 2.0

    def numbers():
        yield from range(10)

    LEFT = numbers()

    def fn(x):
        return x * FACTOR if LEFT is not None else x
"""


def test_package_outside_the_usual_folders_is_taken_as_it_is(place):
    record = "counts_installed.py,sha256=x,10\ncounts_installed-1.0.dist-info/RECORD,,\n"
    files = {"counts_installed.py": COUNTS, "counts_installed-1.0.dist-info/RECORD": record}
    module = place("counts_installed", files)
    compiled = thunder.jit(module.fn)
    torch.testing.assert_close(compiled(X), X * 2)


def test_file_beside_installed_packages_is_the_users(place):
    record = "something_else.py,sha256=x,10\n"
    module = place("counts_beside", {"counts_beside.py": COUNTS, "other-1.0.dist-info/RECORD": record})
    with pytest.raises(thunder.CaptureError, match="an iterator"):
        thunder.jit(module.fn)(X)
    module.LEFT = True
    compiled = thunder.jit(module.fn)
    torch.testing.assert_close(compiled(X), X * 2)
    module.FACTOR = 3.0
    torch.testing.assert_close(compiled(X), X * 3)


# ---- managers that decorate ----

SCALES = [2.0]


@contextlib.contextmanager
def scaling(by):
    SCALES.append(SCALES[-1] * by)
    try:
        yield
    finally:
        SCALES.pop()


def test_function_that_a_manager_of_a_generator_decorates():
    @scaling(3.0)
    def fn(x):
        return x * SCALES[-1]

    compiled = thunder.jit(fn)
    for _ in range(2):
        torch.testing.assert_close(compiled(X), X * 6)
    assert SCALES == [2.0]
    SCALES[0] = 5.0
    try:
        torch.testing.assert_close(compiled(X), X * 15)
    finally:
        SCALES[0] = 2.0


def test_what_a_decorating_manager_is_made_of_is_guarded():
    factors = [3.0]

    @contextlib.contextmanager
    def scaling_all(by):
        with scaling(by[0]):
            yield

    manager = scaling_all(factors)

    @manager
    def fn(x):
        return x * SCALES[-1]

    compiled = thunder.jit(fn)
    torch.testing.assert_close(compiled(X), X * 6)
    factors[0] = 4.0
    torch.testing.assert_close(compiled(X), X * 8)
    manager.args = ([7.0],)
    torch.testing.assert_close(compiled(X), X * 14)


def test_manager_that_is_entered_itself_is_refused():
    manager = scaling(3.0)

    @manager
    def inner(x):
        return x * SCALES[-1]

    def fn(x):
        y = inner(x)
        with manager:
            return y + x * SCALES[-1]

    with pytest.raises(thunder.CaptureError, match="an iterator"):
        thunder.jit(fn)(X)
    torch.testing.assert_close(fn(X), X * 12)  # it was not used up


def test_error_of_a_kernel_outlives_the_question_whose_code_may_catch_it(place):
    """The inner file, in which no operation is recorded, is looked at for the first time when the kernel has raised."""
    files = {
        "site-packages/outer_part.py": """
            from inner_part import same

            def call(x, i):
                return x[same(i)] * 2
            """,
        "site-packages/inner_part.py": """
            def same(i):
                try:
                    return i
                finally:
                    pass
            """,
    }
    call = place("outer_part", files).call
    compiled = thunder.jit(lambda x, i: call(x, i) + 1)
    with pytest.raises(IndexError, match="out of bounds"):
        compiled(X, torch.tensor([9]))
    assert torch.equal(compiled(X, torch.tensor([2])), X[[2]] * 2 + 1)
