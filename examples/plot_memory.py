"""
Memory against depth: three ways to a gradient
==============================================

Training needs the gradient of the loss through every step that the solver took. Keeping all of them costs memory that
grows with the depth. This example measures what the three values of ``gradient=`` keep, and how exact they are.
"""

# %%
# The three ways
# --------------
# - ``"discrete"`` (the default) keeps the steps and differentiates them exactly. ``memory_budget`` bounds what it may
#   keep; beyond it only states are kept, and the rest is computed again.
# - ``"adjoint"`` keeps nothing and solves a second equation back in time, as in `Chen et al. 2018
#   <https://arxiv.org/abs/1806.07366>`_. Its gradient is as exact as the tolerance.
# - ``"reversible"`` (experimental) takes steps that can be undone, and is exact, too. It needs twice the evaluations.
#
# Estimators take ``gradient=`` as well; here we ask the solver itself.

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from skode.fields import MLPField
from skode.solver import solve

GRADIENTS = {"discrete": ("#0072B2", "o-"), "adjoint": ("#D55E00", "s--"), "reversible": ("#009E73", "^-.")}
SPAN = 2.0

# %%
# Memory
# ------
# torch's profiler tells what a solve has allocated and not given back while the loss waits for its ``backward``. The
# depth is the number of equal steps. The solver takes buffers up again that are no longer needed, which would not be
# counted; so all losses stay alive.

field = MLPField(16, hidden_layer_sizes=(32,), generator=torch.Generator().manual_seed(0))
y0 = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
waiting: list[Tensor] = []


def kept_bytes(gradient: str, n_steps: int) -> int:
    """Bytes that stand between a forward and its backward pass."""
    options = {"method": "rk4", "step_size": SPAN / n_steps, "step_control": "batch", "gradient": gradient}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss = solve(field, y0, [0.0, SPAN], **options).y1.square().sum()
    waiting.append(loss)
    return sum(event.self_cpu_memory_usage for event in record.key_averages())


kept_bytes("adjoint", 5)  # the first use of anything allocates more
depths = [10, 30, 100, 200]
kept = {name: [kept_bytes(name, depth) / 1024 for depth in depths] for name in GRADIENTS}
print(f"{'steps':<12}" + "".join(f"{depth:>8}" for depth in depths))
for name, sizes in kept.items():
    print(f"{name:<12}" + "".join(f"{size:>8,.0f}" for size in sizes) + "  KiB")
waiting.clear()

# %%
# Exactness
# ---------
# Now with an adaptive method, in double precision: how far is the gradient of the start from the derivative of what was
# computed? Finite differences along the same steps (``steps=``) tell the latter.

double = MLPField(16, hidden_layer_sizes=(32,), generator=torch.Generator().manual_seed(0)).double()
start = y0[:8].double()
start.requires_grad_()
(steepest,) = torch.autograd.grad(solve(double, start, [0.0, SPAN], rtol=1e-9).y1.square().sum(), start)
start.requires_grad_(False)
direction = steepest / steepest.norm()


def gradient_error(gradient: str, rtol: float) -> float:
    """Relative error of the loss's derivative in the steepest direction."""
    options = {"rtol": rtol, "atol": rtol, "gradient": gradient}
    moving = start.clone().requires_grad_()
    solution = solve(double, moving, [0.0, SPAN], **options)
    (slope,) = torch.autograd.grad(solution.y1.square().sum(), moving)

    def loss(shift: float) -> Tensor:
        """The loss of a shifted start, by the same steps."""
        with torch.no_grad():
            return (
                solve(double, start + shift * direction, [0.0, SPAN], steps=solution.steps, **options).y1.square().sum()
            )

    # Five points: the error is of fourth order.
    h = 1e-3
    difference = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    return float(((slope * direction).sum() - difference).abs() / difference.abs())


tolerances = [1e-1, 1e-2, 1e-3, 1e-4, 1e-6]
errors = {name: [gradient_error(name, rtol) for rtol in tolerances] for name in GRADIENTS}
print(f"{'rtol':<12}" + "".join(f"{rtol:>10.0e}" for rtol in tolerances))
for name, found in errors.items():
    print(f"{name:<12}" + "".join(f"{error:>10.1e}" for error in found))

# %%
# Left: what a solve keeps. Right: how exact the gradients are; the finite differences themselves end near the bottom.
# Take ``"discrete"`` unless memory is what you lack.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.3), layout="constrained")
for name, (color, style) in GRADIENTS.items():
    left.loglog(depths, kept[name], style, color=color, label=name)
    right.loglog(tolerances, errors[name], style, color=color, label=name)
left.set(xlabel="steps", ylabel="kept for the backward pass, KiB", title="Memory against depth")
left.set_xticks(depths, [str(depth) for depth in depths])
left.minorticks_off()
right.set(xlabel="rtol", ylabel="relative error of the gradient", title="Exactness against tolerance")
right.invert_xaxis()
right.minorticks_off()
left.legend(frameon=False)
plt.show()
