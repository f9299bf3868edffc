"""The delta rules token by token in numpy float64, with hand-written gradients: what the engines are compared with."""

import numpy as np


def delta(q, k, v, beta, log_decay, initial_state, reset_state, segment_ids, scale, d_out, d_final):
    """(out, final state, gradients of <out, d_out> + <final state, d_final>, by name)."""
    none = log_decay is None
    a, e = _decays(k, log_decay)
    # S_t = e S + beta k (v - e S^T k)^T is the general form with a = e k, b = -beta k, and beta k in the place of k.
    out, final, d = dplr(
        q, k * beta[..., None], v, np.zeros_like(beta) if none else log_decay, a, -k * beta[..., None],
        initial_state, reset_state, segment_ids, scale, d_out, d_final,
    )  # fmt: skip
    d_scaled = d["k"] - d["b"]
    d_e = d["a"] * k
    gradients = {"q": d["q"], "k": d_scaled * beta[..., None] + d["a"] * e, "v": d["v"]}
    gradients["beta"] = (d_scaled * k).sum(-1)
    if not none:
        through_a = d_e * e
        gradients["log_decay"] = d["log_decay"] + (through_a.sum(-1) if log_decay.ndim == 3 else through_a)
    return out, final, gradients | {name: d[name] for name in ("initial_state", "reset_state")}


def _decays(k, log_decay):
    e = np.ones_like(k) if log_decay is None else np.exp(log_decay)
    e = np.broadcast_to(e[..., None] if e.ndim == 3 else e, k.shape)
    return e * k, e


def dplr(q, k, v, log_decay, a, b, initial_state, reset_state, segment_ids, scale, d_out, d_final):
    """(out, final state, gradients of <out, d_out> + <final state, d_final>, by name)."""
    B, T, _, K = q.shape
    e = np.exp(log_decay)
    e = np.broadcast_to(e[..., None] if e.ndim == 3 else e, q.shape)
    starts = np.zeros((B, T), bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = starts[:, :, None, None, None]
    scale = K**-0.5 if scale is None else scale
    states, entered, outs = [initial_state], [], []
    for t in range(T):
        state = np.where(starts[:, t], reset_state, states[-1])
        entered.append(state)
        state = (
            e[:, t, ..., None] * state
            + b[:, t, ..., None] * _read(a[:, t], state)[..., None, :]
            + k[:, t, ..., None] * v[:, t, ..., None, :]
        )
        states.append(state)
        outs.append(scale * _read(q[:, t], state))
    d = {name: np.zeros(q.shape) for name in ("q", "k", "log_decay", "a", "b")}
    d |= {"v": np.zeros(v.shape), "reset_state": np.zeros(reset_state.shape)}
    d_state = d_final
    for t in reversed(range(T)):
        d_state = d_state + scale * q[:, t, ..., None] * d_out[:, t, ..., None, :]
        d["q"][:, t] = scale * (states[t + 1] * d_out[:, t, ..., None, :]).sum(-1)
        d["k"][:, t] = (d_state * v[:, t, ..., None, :]).sum(-1)
        d["v"][:, t] = _read(k[:, t], d_state)
        d["b"][:, t] = (d_state * _read(a[:, t], entered[t])[..., None, :]).sum(-1)
        d["a"][:, t] = (entered[t] * _read(b[:, t], d_state)[..., None, :]).sum(-1)
        d["log_decay"][:, t] = e[:, t] * (d_state * entered[t]).sum(-1)
        d_state = e[:, t, ..., None] * d_state + a[:, t, ..., None] * _read(b[:, t], d_state)[..., None, :]
        d["reset_state"] += np.where(starts[:, t], d_state, 0).sum(0)
        d_state = np.where(starts[:, t], 0, d_state)
    if log_decay.ndim == 3:
        d["log_decay"] = d["log_decay"].sum(-1)
    return np.stack(outs, 1), states[-1], d | {"initial_state": d_state}


def _read(x, state):
    return (x[..., None] * state).sum(-2)


def relative(ours, reference):
    """max |ours - reference| / max |reference|."""
    return np.abs(np.asarray(ours, np.float64) - reference).max() / max(np.abs(reference).max(), 1e-30)
