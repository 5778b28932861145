"""No room says the names of another: axes of the mesh, roles of a plan, schedules."""

import ast

import pytest

from pypar.mesh_shape import AXIS_NAMES, FOLDS
from pypar.parallel.roles import ROLES
from pypar.pipeline_parallel import schedules
from tests import ROOT
from tests.test_structure import PACKAGE, ROOM_FILES, _room_of_file

AXES = {*AXIS_NAMES, *FOLDS}
AXIS_ROOMS = {  # which axes a room may name; the mesh itself names all
    **dict.fromkeys(("grid", "mesh_shape", "mesh"), AXES),
    "tensor_parallel": {"tp"},
    "context_parallel": {"cp"},
    "pipeline_parallel": {"pp"},
    "data_parallel": {"dp"},
    "expert_parallel": {"ep"},
    "bench": AXES,  # programs
}
SCHEDULES = set(schedules.names()) - {"interleaved"}  # a word of rotary embeddings and gates, too


def _said(tree, *, attributes=False):
    """The texts that stand in a file as a whole, and the names of attributes that it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif attributes and isinstance(node, ast.Attribute):
            yield node.attr


def _names_of_others(room, source):
    """What a file of a room says that belongs to another room: axes, schedules, and, where it works with roles, roles.

    Models say roles of their modules, hugging_face the names of modules, and other files words that happen to be roles.
    """
    tree = ast.parse(source)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found = AXES.intersection(_said(tree, attributes=True)) - AXIS_ROOMS.get(room, set())
    if room != "pipeline_parallel":
        found |= SCHEDULES.intersection(_said(tree))
    works_with_roles = any(f"{name}.".startswith(("pypar.role.", "pypar.parallel.")) for name in imported)
    if room == "parallel" or (works_with_roles and room != "hugging_face"):
        homes = {name: role.replace.__module__.split(".")[1] for name, role in ROLES.items()}
        found |= {name for name in set(ROLES).intersection(_said(tree)) if homes[name] != room}
    return sorted(found)


@pytest.mark.parametrize("path", ROOM_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_does_not_say_the_names_of_another(path):
    """What another room must know of an axis, a role or a schedule is a property whose name says what is meant."""
    found = _names_of_others(_room_of_file(path), path.read_text())
    assert not found, f"{path.relative_to(ROOT)} says {found}: ask for a property of theirs"


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("train", "size = mesh.tp.size\nother = run.axes['cp']", ["cp", "tp"]),
        ("tensor_parallel", "AXES = ('tp',)\nsize = mesh.cp.size", ["cp"]),
        ("train", "if schedule == 'gpipe': pass", ["gpipe"]),
        ("parallel", "axis = ROLES['column'].axes\nis_norm = role == 'norm'", ["column", "norm"]),
        ("train", "from pypar.parallel import parallelize\nROLE = 'attention'", ["attention"]),
        ("context_parallel", "from pypar.role import Role\nROLES = {'attention': 1}", []),
        ("ops", "choose('attention')", []),
    ],
)
def test_the_rule_of_names_finds_them(room, source, found):
    assert _names_of_others(room, source) == found
