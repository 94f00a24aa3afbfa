"""Modules without compiled code get it in the image, so that no kernel compiles them at each start."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from small_environments import site_of

from sandbox_gateway.images import bytecode, host_env
from sandbox_gateway.images.interpreter import probe


def test_missing_code_is_compiled_for_the_environments_interpreter_and_is_valid(small_venv: Path) -> None:
    interpreter = probe(str(small_venv / "bin/python"))
    package = site_of(small_venv) / "uncompiled"
    package.mkdir()
    for number in range(30):
        (package / f"m{number}.py").write_text(f"x = {number}\n")
    (package / "broken.py").write_text("print 'python 2'\n")
    layer = next(x for x in host_env.plan(interpreter).layers if x.path == str(small_venv))
    before = sorted(small_venv.rglob("*"))
    recipe = host_env.build(layer, interpreter)
    try:
        cached = recipe.tree.get(f"/{package.relative_to(small_venv)}/__pycache__")
        assert cached is not None
        assert len(cached.children) == 30, "what does not compile stays as it is"
        node = cached.children[f"m7.{interpreter.cache_tag}.pyc"]
        assert node.source is not None
        content = Path(node.source).read_bytes()
    finally:
        assert recipe.release is not None
        recipe.release()
    source = (package / "m7.py").stat()
    flags, mtime, size = struct.unpack_from("<III", content, 4)
    assert (flags, mtime, size) == (0, int(source.st_mtime), source.st_size), "checked against the source as usual"
    assert str(package / "m7.py").encode() in content, "tracebacks name the real path"
    assert not os.path.exists(node.source)
    assert sorted(small_venv.rglob("*")) == before, "the host's environment is not touched"


def test_a_compiled_environment_starts_no_interpreter(small_venv: Path) -> None:
    interpreter = probe(str(small_venv / "bin/python"))
    layer = next(x for x in host_env.plan(interpreter).layers if x.path == str(small_venv))
    recipe = host_env.build(layer, interpreter)
    assert recipe.release is None
    assert len(bytecode.missing(recipe.tree, interpreter.cache_tag)) == 1
