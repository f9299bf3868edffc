"""Scaling laws: loss = E + A / N^alpha + B / D^beta fitted to runs, with intervals.

Hoffmann et al. 2022 ("Training compute-optimal large language models", section 3.3 and appendix D.2): least squares of
log loss with Huber's loss, from many starting points. Intervals resample the runs (Besiroglu et al. 2024, "Chinchilla
scaling: a replication attempt"). In NumPy, because it needs float64, which JAX has only if it is switched on for all.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from slm.errors import ConfigError

DELTA = 1e-3
"""Where Huber's loss turns from squares to distances, in log loss (Hoffmann et al. 2022)."""
_STARTS = {"E": (0.1, 0.5, 0.9), "exponent": (0.1, 0.3, 0.6, 1.0), "share": (0.3, 1.0, 3.0)}


@dataclass(frozen=True)
class ScalingLaw:
    """What `fit_scaling_law` returns. Where only N varied there is no B, beta, and the others hold at that D."""

    parameters: dict[str, float]
    """`E`, `A`, `alpha`, and with D `B`, `beta`."""
    intervals: dict[str, tuple[float, float]]
    """Of each, percentiles of the resampled fits."""
    samples: np.ndarray
    """(resamplings, 3 or 5): the resampled fits, in the order of `parameters`."""
    residual: float
    """Root of the mean square of log loss less log fit: about the relative error of the law."""
    level: float

    def loss(self, N, D=None) -> np.ndarray:
        """The law at N parameters and D tokens, arrays that broadcast."""
        return _law(np.array([list(self.parameters.values())]), N, D)[0]

    def interval(self, N, D=None) -> tuple[np.ndarray, np.ndarray]:
        """Of `loss`, at each point; of the law, not of a single run, whose noise comes on top."""
        tail = 100 * self.level / 2
        low, high = np.percentile(_law(self.samples, N, D), [tail, 100 - tail], axis=0)
        return low, high

    def __str__(self) -> str:
        parts = [
            f"{name} = {value:.4g} ({self.intervals[name][0]:.4g} to {self.intervals[name][1]:.4g})"
            for name, value in self.parameters.items()
        ]
        return f"{', '.join(parts)}; {1 - self.level:.0%} intervals, residual {self.residual:.2%}"


def fit_scaling_law(
    N, loss, D=None, *, level: float = 0.05, resamplings: int = 1000, seed: int = 0, delta: float = DELTA
) -> ScalingLaw:
    """Fits loss = E + A / N^alpha, or with tokens loss = E + A / N^alpha + B / D^beta.

    Args:
      N, loss, D: (n,) of n runs: parameters, loss in any unit that has a true zero (nats, bits per byte), tokens.
      level: of the intervals, which cover 1 - level.
      resamplings: of the runs, with replacement; those with fewer different sizes than the law needs are drawn again.
      seed: of the resamplings.
      delta: of Huber's loss.

    Raises:
      ConfigError: values that are not above 0; fewer different N, or D, than 3, or fewer runs than constants.
    """
    names = ("E", "A", "alpha") if D is None else ("E", "A", "alpha", "B", "beta")
    columns = [np.asarray(x, np.float64).reshape(-1) for x in ((N, loss) if D is None else (N, loss, D))]
    if len({len(x) for x in columns}) != 1 or not all((np.isfinite(x) & (x > 0)).all() for x in columns):
        raise ConfigError("a scaling law needs as many N, losses (and D), all of them finite and above 0")
    n, sizes = len(columns[0]), [columns[0], *columns[2:]]
    if n < len(names) or any(len(np.unique(x)) < 3 for x in sizes):
        raise ConfigError(
            f"{n} runs with {' and '.join(str(len(np.unique(x))) for x in sizes)} different sizes: a law of "
            f"{len(names)} constants needs as many runs, and three different sizes of each kind"
        )
    # In units of the geometric mean, so that constants and exponents are known nearly independently of each other.
    centres = [np.log(x).mean() for x in sizes]
    x = np.stack([np.log(x) - c for x, c in zip(sizes, centres)])
    y = np.log(columns[1])
    every = np.ones((1, n))
    starts = _starts(columns[1], len(sizes))
    found, objective = _minimise(starts, x, y, np.repeat(every, len(starts), 0), delta)
    best = found[objective.argmin()]
    samples = np.zeros((0, len(best)))
    if resamplings:
        weights = _resampled(sizes, len(names), resamplings, seed)
        samples, _ = _minimise(np.repeat(best[None], resamplings, 0), x, y, weights, delta)
    residual = _residual(best[None], x, y)[0]
    values, draws = _natural(best[None], centres)[0], _natural(samples, centres)
    tail = 100 * level / 2
    ends = np.percentile(draws, [tail, 100 - tail], axis=0) if resamplings else np.full((2, len(best)), np.nan)
    return ScalingLaw(
        parameters=dict(zip(names, map(float, values))),
        intervals={name: (float(low), float(high)) for name, low, high in zip(names, *ends)},
        samples=draws,
        residual=float(np.sqrt((residual**2).mean())),
        level=level,
    )


def _law(constants, N, D):
    """(R, ...) losses of (R, 3 or 5) constants."""
    if (constants.shape[1] == 5) != (D is not None):
        raise ConfigError("this law was fitted " + ("without D: leave it out" if D is not None else "with D: give it"))
    terms = [np.asarray(x, np.float64)[None] for x in ((N,) if D is None else (N, D))]
    ndim = np.broadcast_shapes(*(x.shape for x in terms))
    c = constants.T.reshape(constants.shape[1], -1, *(1,) * (len(ndim) - 1))
    return c[0] + sum(c[1 + 2 * i] / x ** c[2 + 2 * i] for i, x in enumerate(terms))


def _starts(loss, kinds: int) -> np.ndarray:
    """(R, 1 + 2 kinds): log E, then log A and alpha of each kind, in units of the centres."""
    rest = [(s, e) for s in _STARTS["share"] for e in _STARTS["exponent"]]
    rows = []
    for share, *terms in itertools.product(_STARTS["E"], *[rest] * kinds):
        E = share * loss.min()
        left = max(np.median(loss) - E, 1e-3 * E) / kinds
        rows.append([np.log(E), *itertools.chain(*((np.log(s * left), e) for s, e in terms))])
    return np.array(rows)


def _terms(theta, x):
    """(R, 1 + kinds, n) logs of the law's terms."""
    n = x.shape[1]
    e = np.broadcast_to(theta[:, :1, None], (len(theta), 1, n))
    return np.concatenate([e, theta[:, 1::2, None] - theta[:, 2::2, None] * x[None]], 1)


def _residual(theta, x, y):
    """(R, n): log of the law less log loss."""
    return np.logaddexp.reduce(_terms(theta, x), 1) - y


def _minimise(theta, x, y, weights, delta, steps: int = 200):
    """Huber's loss by Levenberg and Marquardt's damped Gauss-Newton steps, all R problems at once.

    theta: (R, P); x: (kinds, n); y: (n,); weights: (R, n). Returns the best (R, P) and its (R,) objective.
    """
    P = theta.shape[1]

    def objective(theta):
        r = np.abs(_residual(theta, x, y))
        return (weights * np.where(r < delta, r * r / 2, delta * (r - delta / 2))).sum(1)

    value, damping = objective(theta), np.full(len(theta), 1e-2)
    for _ in range(steps):
        logs = _terms(theta, x)
        total = np.logaddexp.reduce(logs, 1)
        share = np.exp(logs - total[:, None])
        J = np.empty((*total.shape, P))
        J[..., 0] = share[:, 0]
        J[..., 1::2] = np.moveaxis(share[:, 1:], 1, 2)
        J[..., 2::2] = -np.moveaxis(share[:, 1:] * x[None], 1, 2)
        r = total - y
        w = weights * np.minimum(1, delta / np.maximum(np.abs(r), 1e-300))
        gradient = np.einsum("rnp,rn->rp", J, w * r)
        hessian = np.einsum("rnp,rn,rnq->rpq", J, w, J)
        diagonal = np.einsum("rpp->rp", hessian)
        damped = hessian + np.einsum("rp,pq->rpq", damping[:, None] * (diagonal + 1e-9), np.eye(P))
        step = -np.linalg.solve(damped, gradient[..., None])[..., 0]
        trial = theta + np.clip(step, -2, 2)
        new = objective(trial)
        better = new < value
        theta, value = np.where(better[:, None], trial, theta), np.where(better, new, value)
        damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-12, 1e12)
        if np.abs(step).max() < 1e-10:
            break
    return theta, value


def _resampled(sizes, constants: int, resamplings: int, seed: int) -> np.ndarray:
    """(resamplings, n) counts of the runs in each resampling."""
    rng, n, rows = np.random.default_rng(seed), len(sizes[0]), []
    groups = [np.unique(x, return_inverse=True)[1] for x in sizes]
    while len(rows) < resamplings:
        for counts in rng.multinomial(n, np.full(n, 1 / n), resamplings):
            present = counts > 0
            if present.sum() >= constants and all(len(np.unique(g[present])) >= 3 for g in groups):
                rows.append(counts)
    return np.array(rows[:resamplings], np.float64)


def _natural(theta, centres):
    """(R, P): E, A, alpha (B, beta) in units of parameters and tokens."""
    out = theta.copy()
    out[:, 0] = np.exp(theta[:, 0])
    for i, centre in enumerate(centres):
        out[:, 1 + 2 * i] = np.exp(theta[:, 1 + 2 * i] + theta[:, 2 + 2 * i] * centre)
    return out
