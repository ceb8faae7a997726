"""A convolutional vector field on images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from skode.fields.activations import get_activation
from skode.solver.dynamics import OffersVjp


class ConvField(OffersVjp, nn.Module):
    """3x3 convolutions with the time as one more channel of every layer (Chen et al. 2018, section 3).

    Parameters
    ----------
    state_shape : (channels, height, width)
        The state's rows are such images, flattened.
    hidden_channels : sequence of int, default=(32,)
        Channels between the convolutions.
    activation : str, default="tanh"
        As for :class:`MLPField`.
    time_dependent : bool, default=True
        Whether every layer sees the time.
    n_outputs : int, optional
        Channels of the value; the state's if not given.
    generator : torch.Generator, optional
        Draws the initial weights; fresh entropy if not given.

    Examples
    --------
    >>> import torch
    >>> from skode.fields import ConvField
    >>> field = ConvField((4, 8, 8), generator=torch.Generator().manual_seed(0))
    >>> field(torch.zeros(3, 1), torch.ones(3, 4 * 8 * 8)).shape
    torch.Size([3, 256])
    """

    def __init__(
        self,
        state_shape: tuple[int, int, int],
        hidden_channels: Sequence[int] = (32,),
        activation: str = "tanh",
        time_dependent: bool = True,
        *,
        n_outputs: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.state_shape, self.time_dependent = tuple(state_shape), time_dependent
        self._activation = get_activation(activation)
        sizes = [state_shape[0], *hidden_channels, n_outputs or state_shape[0]]
        self.layers = nn.ModuleList(
            nn.utils.skip_init(nn.Conv2d, n_in + int(time_dependent), n_out, 3, padding=1)
            for n_in, n_out in pairwise(sizes)
        )
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        for layer in self.layers:
            draw_convolution(layer, generator)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Value ``(n, d)`` at times ``(n, 1)`` and flattened images ``(n, d)``."""
        x = y.reshape(-1, *self.state_shape)
        for i, layer in enumerate(self.layers):
            if i:
                x = self._activation.forward(x)
            if self.time_dependent:
                x = torch.cat([x, t.reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], dim=1)
            x = layer(x)
        return x.flatten(1)


def draw_convolution(layer: nn.Module, generator: torch.Generator) -> None:
    """Uniform weights of variance 1 / fan_in, zero bias."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bound = (3.0 / weight[0].numel()) ** 0.5
    with torch.no_grad():
        weight.copy_(torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 * bound - bound)
        layer.bias.zero_()  # type: ignore[operator]
