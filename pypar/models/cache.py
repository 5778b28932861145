"""Keys and values of the positions that a decoder has seen, for generation one token at a time."""

from torch import Tensor, nn


class KeyValueCache:
    """Preallocated keys and values [B, capacity, G, H] of each attention layer.

    The layer is its own key, so one cache serves any model; ``advance`` is called once per forward of the model.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self._stored: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def append(self, layer: nn.Module, k_BTGH: Tensor, v_BTGH: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new positions of ``layer``; returns all of its keys and values so far."""
        end = self.length + k_BTGH.shape[1]
        if end > self.capacity:
            raise ValueError(
                f"the cache holds {self.capacity} positions but {end} were asked for; make it larger"
            )
        if layer not in self._stored:
            self._stored[layer] = (self._allocate(k_BTGH), self._allocate(v_BTGH))
        k_all, v_all = self._stored[layer]
        k_all[:, self.length : end] = k_BTGH
        v_all[:, self.length : end] = v_BTGH
        return k_all[:, :end], v_all[:, :end]

    def _allocate(self, x_BTGH: Tensor) -> Tensor:
        return x_BTGH.new_empty((x_BTGH.shape[0], self.capacity, *x_BTGH.shape[2:]))

    def advance(self, num_positions: int) -> None:
        self.length += num_positions
