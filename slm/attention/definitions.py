"""What each mechanism is, in NumPy, float64 and one token after the other: what `slm.attention.check` compares with.

Written from the papers, to be read, and sharing nothing with the engines. Arrays are (B, T, heads, dim) as everywhere,
B of them documents of their own; what has no batch axis elsewhere (sink_logits, bonus) has one here. Every function
returns (out (B, T, H, V), the state after the last token or None).
"""

import numpy as np


def softmax(q, k, v, *, sink_logits=None, log_forget=None, window=None, sinks=0, softcap=None, seen=None):
    """Vaswani et al. 2017. seen(t, j) -> which keys j = 0 ... t token t sees, if not those of `window` and `sinks`."""
    k, v = _for_every_head(q, k, v)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for t in range(q.shape[1]):
        j = np.arange(t + 1)
        keep = (t - j < (window or t + 1)) | (j < sinks) if seen is None else seen(t, j)
        added = 0.0
        if log_forget is not None:
            added = np.moveaxis(np.cumsum(log_forget[:, t:0:-1], 1)[:, ::-1], 1, 2)
            added = np.concatenate([added, np.zeros_like(q[:, 0, :, :1])], -1)
        out[:, t] = _attend(q[:, t], k[:, j], v[:, j], keep, sink_logits, softcap, added)
    return out, None


def _for_every_head(q, *arrays):
    return (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in arrays)


def _attend(q_BxHxK, k_BxSxHxK, v_BxSxHxV, keep, sink_logits=None, softcap=None, added=0.0):
    """One query of every head; `keep` broadcasts against (B, H, S)."""
    logits = np.einsum("BHK,BSHK->BHS", q_BxHxK, k_BxSxHxK) * q_BxHxK.shape[-1] ** -0.5
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    weights = np.where(keep, np.exp(logits + added), 0)
    total = weights.sum(-1) + (0 if sink_logits is None else np.exp(sink_logits))
    return np.einsum("BHS,BSHV->BHV", weights, v_BxSxHxV) / total[..., None]


def moba(q, k, v, *, block, top_k):
    """Lu et al. 2025, section 2.2: the own block, and those of the past whose mean keys match best."""
    k, v = _for_every_head(q, k, v)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for t in range(q.shape[1]):
        own, gates = t // block, []
        for n in range(own):
            gates.append((q[:, t] * k[:, n * block : (n + 1) * block].mean(1)).sum(-1))
        keep = _seen_blocks(t, block, own, gates, top_k - 1)
        out[:, t] = _attend(q[:, t], k[:, : t + 1], v[:, : t + 1], keep)
    return out, None


def _seen_blocks(t, block, own, scores, n):
    """(B, H, t + 1): the keys of the own block and of the n past ones with the highest scores, each (B, H)."""
    keep = np.arange(t + 1) >= own * block
    if not own or not n:
        return keep
    scores = np.stack(scores, -1)
    best = np.argsort(-scores, -1)[..., :n]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, best, True, -1)
    chosen = np.repeat(chosen, block, -1)
    return np.concatenate([chosen, np.ones((*chosen.shape[:2], t + 1 - own * block), bool)], -1)


def native_sparse(q, k, v, gates, *, block, top_k, window):
    """Yuan et al. 2025, equations 5 to 12, with mean compression and equal blocks."""
    (B, T, H, K), G = q.shape, k.shape[2]
    keys, values = _for_every_head(q, k, v)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for t in range(T):
        own, whole = t // block, (t + 1) // block
        means = [x[:, : whole * block].reshape(B, whole, block, H, x.shape[3]).mean(2) for x in (keys, values)]
        logits = np.einsum("BHK,BNHK->BHN", q[:, t], means[0]) * K**-0.5
        p = np.exp(logits)
        p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
        compressed = np.einsum("BHN,BNHV->BHV", p, means[1])
        shared = np.repeat(p.reshape(B, G, H // G, whole).sum(2), H // G, 1)
        scores = [np.full((B, H), np.inf) if n in (0, own - 1) else shared[..., n] for n in range(own)]
        keep = _seen_blocks(t, block, own, scores, top_k - 1)
        selected = _attend(q[:, t], keys[:, : t + 1], values[:, : t + 1], keep)
        near = t - np.arange(t + 1) < window
        local = _attend(q[:, t], keys[:, : t + 1], values[:, : t + 1], near)
        out[:, t] = sum(gates[:, t, :, i, None] * x for i, x in enumerate((compressed, selected, local)))
    return out, None


def indexed(q, k, v, *, index_q, index_k, index_w, top_k):
    """DeepSeek-V3.2 (2512.02556), equations 1 and 2. The index arrays are (1, T, ...)."""
    k, v = _for_every_head(q, k, v)
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for t in range(q.shape[1]):
        products = np.maximum(np.einsum("BIK,BSK->BIS", index_q[:, t], index_k[:, : t + 1]), 0)
        scores = (products * index_w[:, t, :, None]).sum(1)
        keep = np.zeros((1, 1, t + 1), bool)
        keep[:, :, np.argsort(-scores[0], kind="stable")[:top_k]] = True
        out[:, t] = _attend(q[:, t], k[:, : t + 1], v[:, : t + 1], keep)
    return out, None


def _recurrence(step, q, arrays, state, scale=None):
    """out_t = scale q_t^T S_t, read after the write: S_t = step(S_{t-1}, arrays of t)."""
    scale, out = q.shape[-1] ** -0.5 if scale is None else scale, []
    for t in range(q.shape[1]):
        state = step(state, *(x[:, t] for x in arrays))
        out.append(scale * _read(q[:, t], state))
    return np.stack(out, 1), state


def _read(x_BxHxK, state_BxHxKxV):
    return np.einsum("BHK,BHKV->BHV", x_BxHxK, state_BxHxKxV)


def _outer(x_BxHxK, y_BxHxV):
    return x_BxHxK[..., None] * y_BxHxV[..., None, :]


def _keep(state, log_decay):
    """The state times its decay, of a head (B, H) or of a channel (B, H, K)."""
    return np.exp(log_decay.reshape(*log_decay.shape[:2], -1, 1)) * state


def linear(q, k, v, *, initial_state):
    """Katharopoulos et al. 2020, equations 16 to 20, with elu + 1; the last column of the state is the normaliser."""
    q, k = (np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))) for x in (q, k))
    v = np.concatenate([v, np.ones_like(v[..., :1])], -1)
    out, state = _recurrence(lambda state, k, v: state + _outer(k, v), q, (k, v), initial_state)
    return out[..., :-1] / out[..., -1:], state


def decay(q, k, v, log_decay, *, initial_state):
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T."""
    q, k = _for_every_head(v, q, k)
    step = lambda state, k, v, log_decay: _keep(state, log_decay) + _outer(k, v)  # noqa: E731
    return _recurrence(step, q, (k, v, log_decay), initial_state)


def rwkv6(q, k, v, log_decay, bonus, *, initial_state):
    """Peng et al. 2024: the token is read with a bonus, before the state takes it."""
    state, out = initial_state, []
    for t in range(q.shape[1]):
        now = _outer(k[:, t], v[:, t])
        out.append(q.shape[-1] ** -0.5 * _read(q[:, t], state + bonus[..., None] * now))
        state = _keep(state, log_decay[:, t]) + now
    return np.stack(out, 1), state


def delta(q, k, v, beta, log_decay=None, *, initial_state):
    """S~ = exp(log_decay_t) S_{t-1};  S_t = S~ + beta_t k_t (v_t - S~^T k_t)^T."""
    log_decay = np.zeros_like(beta) if log_decay is None else log_decay

    def step(state, k, v, beta, log_decay):
        state = _keep(state, log_decay)
        return state + _outer(beta[..., None] * k, v - _read(k, state))

    return _recurrence(step, q, (k, v, beta, log_decay), initial_state)


def dplr(q, k, v, log_decay, a, b, *, initial_state):
    """S_t = exp(log_decay_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T."""

    def step(state, k, v, log_decay, a, b):
        return _keep(state, log_decay) + _outer(b, _read(a, state)) + _outer(k, v)

    return _recurrence(step, q, (k, v, log_decay, a, b), initial_state)


def log_linear(q, k, v, log_decay, level_scale):
    """Guo et al. 2025, equation 8; token j is at level floor(log2(t xor j)) + 1 of token t, t itself at level 0."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for t in range(q.shape[1]):
        left = np.ones_like(log_decay[:, 0])
        for j in range(t, -1, -1):
            weight = (q[:, t] * k[:, j]).sum(-1) * level_scale[:, t, :, (t ^ j).bit_length()] * left
            out[:, t] += q.shape[-1] ** -0.5 * weight[..., None] * v[:, j]
            left = left * np.exp(log_decay[:, j])
    return out, None
