"""Nothing that the package, its benches or examples read from a file can run code."""

import ast

import pytest

from tests import ROOT

# What turns the content of a file into code that runs, or may: by the module that has it, or as a builtin.
UNPICKLING = {
    "pickle": {"load", "loads", "Unpickler"},
    "dill": {"load", "loads"},
    "cloudpickle": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
    "builtins": {"eval", "exec", "compile"},
    "dcp": {"FileSystemReader", "FileSystemWriter", "async_save"},
    "checkpoint": {"FileSystemReader", "FileSystemWriter", "async_save"},
}
RUNNING_MODULES = {
    "pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
    "cPickle",
    "_pickle",
}


def _code_from_files(tree):
    """The calls and imports of a file that could run what another file holds."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            )
            yield from (f"import {name}" for name in modules if name.split(".")[0] in RUNNING_MODULES)
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        module, _, name = ast.unparse(node.func).rpartition(".")
        last = module.rpartition(".")[2] or "builtins"
        if name in UNPICKLING.get(last, ()):
            yield ast.unparse(node.func)
        if (last, name) == ("torch", "load") and given.get("weights_only") is not True:
            yield "torch.load without weights_only=True"
        if name == "load" and last in ("np", "numpy") and given.get("allow_pickle") is not False:
            yield "np.load without allow_pickle=False"  # its default, but said where it is relied on
        if given.get("allow_pickle") is True or given.get("trust_remote_code") is True:
            yield f"{name} that trusts a file"


@pytest.mark.parametrize("folder", ["pypar", "kernels", "bench", "examples"])
def test_nothing_that_is_read_can_run_code(folder):
    found = [
        f"{path.relative_to(ROOT)}: {what}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for what in _code_from_files(ast.parse(path.read_text()))
    ]
    assert not found, found


def test_the_rule_of_code_from_files_sees_what_it_must():
    bad = (
        "import pickle",
        "from _pickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f)",
        "numpy.load(f, allow_pickle=True)",
        "eval(text)",
        "exec(f.read())",
        "dcp.FileSystemReader(path)",
        "torch.distributed.checkpoint.FileSystemReader(p)",
        "from_pretrained(x, trust_remote_code=True)",
    )
    for source in bad:
        assert list(_code_from_files(ast.parse(source))), source
    for source in ("torch.load(f, weights_only=True)", "model.eval()", "json.load(f)", "re.compile(x)"):
        assert not list(_code_from_files(ast.parse(source))), source
