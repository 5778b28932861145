"""All roles that a plan can give, by name: a room that offers roles has a line here."""

from torch import nn

from pypar.context_parallel import roles as context_parallel
from pypar.mesh import Axis, Mesh
from pypar.role import ROLES as EVERYWHERE
from pypar.role import Role
from pypar.tensor_parallel import roles as tensor_parallel

ROLES: dict[str, Role] = {
    **EVERYWHERE,
    **tensor_parallel.ROLES,
    **context_parallel.ROLES,
}
AXES = tuple(dict.fromkeys(name for role in ROLES.values() for name in role.axes))  # that some role is about


def axes_of(mesh: Mesh) -> list[Axis]:
    """The axes of a mesh that some role is about."""
    return [mesh.axis(name) for name in AXES if name in mesh.grid.names]


def kinds() -> tuple[type[nn.Module], ...]:
    """The classes of modules that roles take, but for those that take any."""
    return tuple(dict.fromkeys(role.kind for role in ROLES.values() if role.kind is not nn.Module))
