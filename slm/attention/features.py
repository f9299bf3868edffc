"""Feature maps of linear attention: phi(q) . phi(k) takes the place of exp(q . k).

A map takes (..., K) to (..., M). `FEATURE_MAPS` names those that need nothing besides queries or keys. Random,
positional and learned maps are functions of what they need.
"""

import math

import jax
import jax.numpy as jnp


def identity(x):
    """x itself (M = K). Weights q . k have either sign: not for normalised attention."""
    return x


def elu1(x):
    """elu(x) + 1 > 0, M = K (Katharopoulos et al. 2020, equation 7)."""
    # exp(x), not (exp(x) - 1) + 1, which rounds small features away.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.where(x > 0, 0, x)))


def relu(x):
    """max(x, 0), M = K (Kasai et al. 2021 with an identity projection)."""
    return jax.nn.relu(x)


def silu(x):
    """x sigmoid(x), M = K (DeltaNet's and TransNormer's map). Weights have either sign."""
    return jax.nn.silu(x)


def dpfp(x, nu: int = 1):
    """Deterministic parameter-free projection, M = 2 K nu (Schlag et al. 2021, section 5.3).

    r_i r_{i+n} for n = 1 ... nu, indices modulo 2 K, of r = [relu(x), relu(-x)]; some libraries took -relu(x) there.
    """
    r = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], -1)
    return jnp.concatenate([r * jnp.roll(r, n, -1) for n in range(1, nu + 1)], -1)


def taylor2(x):
    """phi(q) . phi(k) = 1 + s + s^2/2 > 0 with s = q . k (Based, Arora et al. 2024, section 4.1).

    M = 1 + K + K (K + 1) / 2: each product x_i x_j stands once, instead of twice as in the paper's 1 + K + K^2.
    """
    squares, *others = _products(x)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, squares * math.sqrt(0.5), *others], -1)


def quadratic(x):
    """phi(q) . phi(k) = (q . k)^2, M = K (K + 1) / 2: ReBased without its affine map (Aksenov et al. 2024)."""
    squares, *others = _products(x)
    return jnp.concatenate([squares, *(product * math.sqrt(2) for product in others)], -1)


def _products(x):
    """x_i x_{i+n} for n = 0 ... K-1. Slices, since gathering pairs by index is slow and its gradient is a scatter."""
    K = x.shape[-1]
    return [x[..., : K - n] * x[..., n:] for n in range(K)]


def hedgehog(x, map_HxKxF=None):
    """[softmax(x W), softmax(-x W)] over the features, M = 2 F (Zhang et al. 2024, section 4.2).

    Args:
      x: (B, T, H, K).
      map_HxKxF: W of each head; None: the identity, which learning starts from.

    The paper's exp(x W) overflows; this is the form of the authors' code. fla's is another map: one softmax over both
    signs of 2 (x W + b).
    """
    x32 = x.astype(jnp.float32)
    if map_HxKxF is not None:
        x32 = jnp.einsum("BTHK,HKF->BTHF", x32, map_HxKxF.astype(jnp.float32))
    return _like(x, jnp.concatenate([jax.nn.softmax(x32, -1), jax.nn.softmax(-x32, -1)], -1))


def cosformer(x, positions_BxT, horizon: int):
    """relu(x) times cos and sin of pi/2 position/horizon, M = 2 K (cosFormer, Qin et al. 2022).

    phi(q_i) . phi(k_j) = relu(q_i) . relu(k_j) cos(pi/2 (i - j)/horizon), which is >= 0 while i - j <= horizon.

    Args:
      x: (B, T, H, K).
      positions_BxT: position of each token in its document.
      horizon: fixed, at least the longest document. The authors' code takes the length of each call, so that every
        decoded token would change the weights of all earlier ones.
    """
    angle = (math.pi / 2 / horizon) * positions_BxT.astype(jnp.float32)[..., None, None]
    positive = jax.nn.relu(x)
    return jnp.concatenate([positive * jnp.cos(angle).astype(x.dtype), positive * jnp.sin(angle).astype(x.dtype)], -1)


def random_features(key, K: int, M: int):
    """(M, K) float32 Gaussian directions for FAVOR+, orthogonal within each block of K rows (2009.14794, section 2.4).

    Each row by itself is a standard normal vector, which keeps estimates unbiased; orthogonality lowers their variance.
    """
    blocks = -(-M // K)
    key_directions, key_lengths = jax.random.split(key)
    q, r = jnp.linalg.qr(jax.random.normal(key_directions, (blocks, K, K)))
    # Signs of r's diagonal make q uniform over rotations; without them it depends on the library that factorises.
    q *= jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    lengths = jnp.linalg.norm(jax.random.normal(key_lengths, (blocks, K, K)), axis=-1)
    return (jnp.swapaxes(q, -1, -2) * lengths[..., None]).reshape(-1, K)[:M]


def favor_queries(q, projection_MxK):
    """Positive random features of queries: exp(w . q) up to a factor per query (FAVOR+, 2009.14794, lemma 1).

    With `favor_keys`, E[phi(q) . phi(k)] = c(q) exp(q . k): c(q) cancels in normalised attention, and only there. Scale
    q and k by K**-1/4 each for softmax's exp(q . k / sqrt(K)).
    """
    exponent = _exponents(q, projection_MxK)
    return _like(q, jnp.exp(exponent - jax.lax.stop_gradient(exponent.max(-1, keepdims=True))))


def favor_keys(k, projection_MxK):
    """Positive random features of keys: exp(w . k - |k|^2/2) (FAVOR+, 2009.14794, lemma 1).

    Unlike queries, keys cannot each be divided by their largest feature: that would change the weights. Public versions
    divide by the largest of the whole sequence, the future included, and add an epsilon to every feature, which makes
    that visible and biases early tokens by up to 5%. Here is neither: the exponent is at most |w|^2/2, about K/2, and
    that only where k = w; a key of |k|^2 > 200, whose estimate has no meaning anyway, weighs nothing.
    """
    squared = jnp.square(k.astype(jnp.float32)).sum(-1, keepdims=True)
    return _like(k, jnp.exp(_exponents(k, projection_MxK) - squared / 2))


def _exponents(x, projection_MxK):
    x32, w = x.astype(jnp.float32), projection_MxK.astype(jnp.float32)
    return jnp.einsum("...K,MK->...M", x32, w, precision=jax.lax.Precision.HIGHEST)


def _like(x, features):
    """`features` in x's dtype, or in float32 where x is float16, which exponentials would leave."""
    return features if x.dtype == jnp.float16 else features.astype(x.dtype)


FEATURE_MAPS = {
    "identity": identity,
    "elu1": elu1,
    "relu": relu,
    "silu": silu,
    "dpfp": dpfp,
    "taylor2": taylor2,
    "quadratic": quadratic,
    "hedgehog": hedgehog,
}
"""Name in `linear_attention(feature_map=...)` and `model.mixer.feature_map` to map."""

SIGNED = frozenset({"identity", "silu"})
"""Those whose weights can be negative, so that their sum may vanish and cannot normalise."""
