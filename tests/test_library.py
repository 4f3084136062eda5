"""The names that `import vir` gives."""

import ast

import pytest

import vir
from support.launchers import ROOT


def test_each_name_is_there_and_typed():
    stub = ast.parse((ROOT / "vir" / "__init__.pyi").read_text())
    typed = {alias.name: node.module for node in ast.walk(stub) if isinstance(node, ast.ImportFrom)
             for alias in node.names}
    assert typed == vir._HOME_OF and "predict_images" in typed
    stated, = (ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(stated) == sorted(vir.__all__) == sorted(["__version__", *typed])
    for name, home in typed.items():
        found = getattr(vir, name)
        assert found.__name__ == name and found.__module__.startswith("vir.") and found.__doc__, (name, home)
        assert name in dir(vir)


def test_another_name_is_an_error():
    with pytest.raises(AttributeError, match="module 'vir' has no attribute 'predicted'"):
        vir.predicted
