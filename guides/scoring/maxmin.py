"""The max-min combination of rewards: MaxMin-RLHF's objective, solved over the candidates by its convex dual.

MaxMin-RLHF (arXiv 2402.08925) asks for the policy that maximises min_u E_pi[r_u] - beta KL(pi || pi0) over groups u
of people, each with a reward r_u. With C candidates drawn from pi0 that is a problem over q on their simplex,
    max_q  min_u sum_c q_c r_cu - beta KL(q || uniform)  =  min_w  g(w),   g(w) = beta log mean_c e^((r w)_c / beta),
for w on the simplex of groups, and q* ~ e^((r w*) / beta): the weighted sum of rewards that serves the worst-off.
The gradient of g is sum_c q_c r_c at q = softmax(r w / beta), so the gap between the two problems at w is
w . grad - min(grad): it certifies the solution.
"""

import numpy as np

from guiderail.guides.scoring.transforms import Array, weighted_sum

MAX_NEWTON = 50
MAX_HALVINGS = 40


def maxmin_dual(values: Array, beta: float) -> tuple[Array, float]:
    """Minimises g over the simplex: (w [U], duality gap in the rewards' unit) for values [C, U].

    Newton's method on g with a logarithmic barrier, while the temperature falls to beta and then the barrier to
    nothing. All is scaled by the rewards' spread first, so their unit does not matter.
    """
    groups = values.shape[1]
    low, high = float(values.min()), float(values.max())
    spread = high - low
    w = np.full(groups, 1 / groups)
    if groups == 1 or spread == 0:
        return w, 0.0
    scaled = (values - low) / spread
    target = min(max(beta / spread, 1e-6), 1e9)  # beyond these nothing changes but rounding
    enough = max(1e-9 * min(target, 1.0), 1e-14 / target)  # the gap in units of beta, and what rounding leaves of it
    temperature = max(target, 1.0)
    barrier = 0.01
    while True:
        w = _newton(scaled, w, temperature, barrier)
        if temperature > target:
            temperature = max(target, temperature / 4)
            barrier = 0.01 * temperature
        elif barrier * groups > enough:
            barrier /= 10
        else:
            break
    gradient, _ = _derivatives(scaled, w, target)
    return w, spread * float(w @ gradient - gradient.min())


def _derivatives(values: Array, w: Array, temperature: float) -> tuple[Array, Array]:
    """Gradient and Hessian of g at w."""
    exponent = weighted_sum(values, w) / temperature
    mass = np.exp(exponent - exponent.max())
    q = mass / mass.sum()
    gradient = q @ values
    centred = values - gradient
    return gradient, (centred * q[:, None]).T @ centred / temperature


def _newton(values: Array, w: Array, temperature: float, barrier: float) -> Array:
    """The minimum of g(w) - barrier * sum(log w) on the simplex, from w > 0.

    The line search looks at slopes alone: near the minimum differences of g drown in rounding long before these do.
    """
    groups = len(w)
    for _ in range(MAX_NEWTON):
        gradient, hessian = _derivatives(values, w, temperature)
        # In units of w the barrier's Hessian is a multiple of the identity, however close to zero w comes.
        residual = w * (gradient - w @ gradient) - barrier * (1 - groups * w)
        if np.abs(residual).max() <= 0.1 * barrier:
            break
        curve = w[:, None] * hessian * w
        curve += (barrier + 1e-15 * np.trace(curve)) * np.eye(groups)
        solved = np.linalg.solve(curve, np.stack([residual, w], axis=1))
        step = solved[:, 1] * (w @ solved[:, 0]) / (w @ solved[:, 1]) - solved[:, 0]
        slope = float(residual @ step)
        low, high = 0.0, min(1.0, 0.99 / max(1e-300, float(-step.min())))
        rate = high
        for _ in range(MAX_HALVINGS):
            trial = w * (1 + rate * step)
            trial /= trial.sum()
            gradient, _ = _derivatives(values, trial, temperature)
            there = float((w * (gradient - trial @ gradient) - barrier / (1 + rate * step)) @ step)
            if abs(there) <= -0.1 * slope or (there < 0 and rate == high):
                break
            low, high = (rate, high) if there < 0 else (low, rate)
            rate = (low + high) / 2
        w = trial
    return w
