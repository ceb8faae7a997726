"""A train step of a flow in FFJORD's way (Grathwohl et al., ICLR 2019, arXiv:1810.01367), on torchdiffeq.

The trace is made by autograd, the gradient by the adjoint equation. The network is a FlowField's function in torch's
own layers, each a matrix with gate and shift in time as FFJORD's "concatsquash" layers, the gate being a line instead
of a sigmoid: both then solve the same equation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skode.fields import FlowField, draw_probe
from skode.models.flow import ContinuousFlow
from skode.training.flow import BETAS


class GatedLayer(nn.Module):
    """A matrix, gate and shift: lines in time. The last layer has no gate."""

    def __init__(self, n_in: int, n_out: int, gated: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=False)
        self.gate = nn.Linear(1, n_out, bias=False) if gated else None
        self.shift = nn.Linear(1, n_out)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Of states (n, n_in) at a time (1, 1)."""
        x = self.linear(x)
        if self.gate is not None:
            x = x * (1 + self.gate(t))
        return x + self.shift(t)


class GatedNet(nn.Module):
    """The function of a FlowField with tanh, in layers as FFJORD has them."""

    def __init__(self, field: FlowField) -> None:
        super().__init__()
        own = field.flow_layers
        self.layers = nn.ModuleList(GatedLayer(*layer.weight.T.shape, layer is not own[-1]) for layer in own)
        with torch.no_grad():
            for layer, source in zip(self.layers, own, strict=True):
                layer.linear.weight.copy_(source.weight)
                layer.shift.weight.copy_(source.drift.unsqueeze(1))
                layer.shift.bias.copy_(source.bias)
                if layer.gate is not None:
                    layer.gate.weight.copy_(source.gate.unsqueeze(1))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Velocity (n, d) at a time ()."""
        t = t.view(1, 1)
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(t, x))
        return self.layers[-1](t, x)


class WithTrace(nn.Module):
    """Velocity and trace, the latter from autograd: with a probe Hutchinson's estimate, else D calls."""

    def __init__(self, net: GatedNet) -> None:
        super().__init__()
        self.net, self.probe, self.n_evals = net, None, 0

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Derivatives of the state (n, d) and the integral (n, 1)."""
        self.n_evals += 1
        x = state[0]
        with torch.enable_grad():
            x = x.requires_grad_() if x.is_leaf else x
            v = self.net(t, x)
            if self.probe is not None:
                (row,) = torch.autograd.grad(v, x, self.probe, create_graph=True)
                return v, (row * self.probe).sum(dim=1, keepdim=True)
            trace = torch.zeros_like(v[:, :1])
            for i in range(v.shape[1]):
                (row,) = torch.autograd.grad(v[:, i].sum(), x, create_graph=True)
                trace = trace + row[:, i : i + 1]
        return v, trace


class FFJORDStep:
    """A train step by torchdiffeq's adjoint."""

    def __init__(self, flow: ContinuousFlow, method: str, rtol: float, atol: float, hutchinson: bool) -> None:
        import torchdiffeq

        self._odeint, self._base = torchdiffeq.odeint_adjoint, flow.base
        self.dynamics = WithTrace(GatedNet(flow.field))
        self._options = {"method": method, "rtol": rtol, "atol": atol}
        self._hutchinson, self._generator = hutchinson, torch.Generator().manual_seed(0)
        self._start = [p.detach().clone() for p in self.dynamics.parameters()]
        self._adam = torch.optim.Adam(self.dynamics.parameters(), lr=1e-4, betas=BETAS, fused=True)

    def load(self, x: Tensor) -> None:
        """Take a round's rows, and the first weights again."""
        self._x = x
        if self._hutchinson:
            self.dynamics.probe = draw_probe(*x.shape, generator=self._generator)
        with torch.no_grad():
            torch._foreach_copy_(list(self.dynamics.parameters()), self._start)

    def log_densities(self) -> Tensor:
        """Of the rows."""
        start = (self._x.clone(), self._x.new_zeros((len(self._x), 1)))
        z, integral = self._odeint(self.dynamics, start, torch.tensor([1.0, 0.0]), **self._options)
        return self._base.log_density(z[-1]) + integral[-1, :, 0]

    def __call__(self) -> tuple[float, float]:
        self._adam.zero_grad(set_to_none=True)
        self.dynamics.n_evals = 0
        loss = -self.log_densities().mean()
        forward = self.dynamics.n_evals
        loss.backward()
        self._adam.step()
        return forward, self.dynamics.n_evals - forward
