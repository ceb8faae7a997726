"""
Learning the constants of a known system
========================================

Sometimes the differential equation is known and only its constants are not. :func:`skode.solver.solve` is
differentiable, so they can be learned with a torch module of a few lines. The data are the furs that the Hudson's Bay
Company bought each year: 21 years of hares and of the lynx that eat them.
"""

# %%
# The data
# --------
# Thousands of pelts (Elton and Nicholson, 1942; the table of Howard, 2009).

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from skode.solver import solve

# fmt: off
HARE = [30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1, 40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6,
        16.2, 24.7]
LYNX = [4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4, 8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7,
        10.1, 8.6]
# fmt: on
years = np.arange(1900, 1921)
observed = torch.tensor([HARE, LYNX], dtype=torch.float64).T  # (21, 2)
times = torch.arange(21, dtype=torch.float64)

# %%
# The equation as a module
# ------------------------
# Lotka and Volterra: hares multiply and are eaten, lynx starve and grow by eating. A field for ``solve`` maps times
# ``(n, 1)`` and states ``(n, d)`` to derivatives ``(n, d)``. Constants are kept as logarithms, which makes them
# positive; so is the state.


class LotkaVolterra(nn.Module):
    """Growth rates of hares and lynx; the state is the logarithm of both."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(torch.tensor([0.5, 0.02, 1.0, 0.02], dtype=torch.float64).log())
        self.log_start = nn.Parameter(observed[:1].log().clone())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        birth, eaten, death, fed = self.log_rates.exp()
        hare, lynx = y.exp().T
        return torch.stack([birth - eaten * lynx, fed * hare - death], dim=1)


def run(field: LotkaVolterra, t: Tensor) -> Tensor:
    """Logarithms of both populations at times t."""
    return solve(field, field.log_start, t, rtol=1e-6, atol=1e-6).y[0]


# %%
# The fit
# -------
# An ordinary torch loop: solve, compare in logarithms, step. Gradients are exact derivatives of the steps the solver
# took. The first years are fitted first, then more and more of them: a path that is out of phase years ahead would pull
# the constants the wrong way.

field = LotkaVolterra()
losses: list[float] = []
for n_years in (6, 11, 16, 21):
    optimizer = torch.optim.LBFGS(field.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def closure(optimizer: torch.optim.Optimizer = optimizer, n: int = n_years) -> Tensor:
        """Mean squared error of the logarithms, over the first n years."""
        optimizer.zero_grad()
        loss = (run(field, times[:n]) - observed[:n].log()).square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    optimizer.step(closure)
    print(f"first {n_years} years: root mean square error of the logarithms {closure().item() ** 0.5:.3f}")

birth, eaten, death, fed = field.log_rates.exp().tolist()
print(f"hares multiply at {birth:.2f} a year without lynx; lynx starve at {death:.2f} a year without hares")
print(f"balance at {death / fed:.0f} thousand hares and {birth / eaten:.0f} thousand lynx")

# %%
# Left: the fitted paths, run ten years past the data. Right: the same in the plane of both populations. The arrows are
# the learned field; the solution is a closed loop, the data wander around it.

HARE_COLOR, LYNX_COLOR = "#0072B2", "#D55E00"
with torch.no_grad():
    ahead = torch.linspace(0, 30, 301, dtype=torch.float64)
    paths = run(field, ahead).exp().numpy()
    side = torch.linspace(3, 87, 15, dtype=torch.float64)
    plane = torch.cartesian_prod(side, side)
    arrows = (plane * field(plane.new_zeros(len(plane), 1), plane.log())).numpy()

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2))
for i, (name, color, marker) in enumerate((("hares", HARE_COLOR, "o"), ("lynx", LYNX_COLOR, "s"))):
    left.plot(1900 + ahead, paths[:, i], color=color)
    left.plot(years, observed[:, i], marker, color=color, markersize=5, label=name)
left.axvspan(1920, 1930, color="0.93", zorder=0)
left.text(1925, 96, "not seen", ha="center", va="top", color="0.35")
left.set(xlabel="year", ylabel="thousands of pelts", title="Fitted and run on", ylim=(0, 100), xlim=(1899, 1930))
left.legend(frameon=False, loc="upper left", ncols=2)

lengths = np.linalg.norm(arrows, axis=1, keepdims=True)
right.quiver(*plane.T, *(arrows / lengths).T, color="0.75", angles="xy", pivot="mid", width=0.004)
right.plot(*paths.T, color="black", linewidth=1.5, label="learned path")
right.plot(*observed.T, "o", color=HARE_COLOR, markersize=4, label="data")
right.plot(death / fed, birth / eaten, "*", color=LYNX_COLOR, markersize=12, label="balance")
right.set(xlabel="hares, thousands", ylabel="lynx, thousands", title="The learned field", xlim=(0, 90), ylim=(0, 90))
right.legend(loc="upper right", fontsize=8)
plt.show()
