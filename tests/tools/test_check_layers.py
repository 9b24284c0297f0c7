"""The layering check finds each kind of planted violation, and none in the tree as it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("check_layers", ROOT / "tools" / "check_layers.py")
check_layers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_layers)

CLEAN = {
    "include/thunder/thunder.h": "#include <stdint.h>\nint th_version(void);\n",
    "src/base/arena.h": '#include "thunder/thunder.h"\n/* dlopen(x), PyObject: fine in a comment */\n',
    "src/base/dylib.c": '#include <dlfcn.h>\nvoid *f(void) { return dlopen("x", 0); }\n',
    "src/base/env.c": '#include <stdlib.h>\nchar *f(void) { return getenv("X"); }\n',
    "src/ir/trace.h": '#include "base/arena.h"\n',
    "src/passes/dce.c": '#include "ir/trace.h"\nconst char *s = "getenv(PyObject)";\n',
    "src/ops/list.c": '#include "ops_families.inc"\n',
    "ext/module.c": '#include <Python.h>\n#include "ir/trace.h"\nPyObject *x;\n',
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("name", "text", "line", "says"),
    [
        ("src/base/bad.c", '#include <stdint.h>\n#include "ir/trace.h"\n', 2, "base must not include ir"),
        ("src/ir/bad.c", '#include "../passes/dce.c"\n', 1, "ir must not include passes"),
        ("src/runtime/bad.c", "#include <Python.h>\n", 1, "knows no Python"),
        ("src/ir/bad.h", "struct a;\nvoid f(struct PyObject *);\n", 2, "PyObject"),
        ("src/ir/bad.h", "\nvoid f(void) { Py_INCREF(x); }\n", 2, "Py_INCREF"),
        ("src/executors/torch/bad.c", "int f(void) {\n    return dlopen(0, 0) != 0;\n}\n", 2, "src/base/dylib.c"),
        ("src/passes/bad.c", 'int x;\n\nchar *f(void) { return getenv("A"); }\n', 3, "src/base/env.c"),
        ("src/ir/bad.c", '#include "ir/absent.h"\n', 1, "is in neither"),
        ("include/thunder/bad.h", '#include "ir/trace.h"\n', 1, "only public headers"),
        ("src/ir/bad.c", '#include "../../ext/module.c"\n', 1, "must not include ext/module.c"),
        ("ext/bad.c", "#include <dlfcn.h>\nvoid *f(void) { return dlopen(0, 0); }\n", 2, "src/base/dylib.c"),
        ("src/misc/bad.c", "int x;\n", 1, "lives in one of"),
    ],
)
def test_planted_violation_is_reported_at_its_line(tmp_path, capsys, name, text, line, says):
    root = plant(tmp_path, {**CLEAN, name: text})
    assert check_layers.main(["check_layers", str(root)]) == 1
    report = capsys.readouterr().out.splitlines()
    assert len(report) == 1
    assert report[0].startswith(f"{name}:{line}: ")
    assert says in report[0]


def test_clean_tree_passes(tmp_path, capsys):
    assert check_layers.main(["check_layers", str(plant(tmp_path, CLEAN))]) == 0
    assert capsys.readouterr().out == ""


def test_this_repository_keeps_its_layers():
    assert [f"{path}:{line}: {message}" for path, line, message in check_layers.violations(ROOT)] == []
