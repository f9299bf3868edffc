"""The same decoder as slm's in plain PyTorch: RMSNorm, RoPE, SDPA, SwiGLU, tied embeddings, AdamW. One worker."""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from turns import serve

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
torch.manual_seed(0)
L, D, H, FF, V, T, B = (job[k] for k in ("layers", "width", "heads", "mlp_width", "vocab", "length", "batch"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(D, FF, bias=False), nn.Linear(D, FF, bias=False),
                                         nn.Linear(FF, D, bias=False))  # fmt: skip

    def forward(self, x, cos, sin):
        h = self.norm1(x)
        q, k, v = (f(h).view(B, T, H, D // H).transpose(1, 2) for f in (self.q, self.k, self.v))

        def rope(u):
            a, b = u.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(u.dtype)

        a = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(B, T, D))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.norm = nn.RMSNorm(D, eps=1e-6)
        angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(0, D // H, 2) / (D // H))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.float().view(-1, V), targets.reshape(-1))  # inside what is compiled


model = Llama()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
run = torch.compile(model) if job["compile"] else model
data = torch.randint(0, V, (B, T + 1))


def step():
    with torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bfloat16"):
        loss = run(data[:, :-1], data[:, 1:])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


start = time.perf_counter()
step()
first = time.perf_counter() - start
for _ in range(2):
    step()


def turn():
    for _ in range(job["steps"]):
        loss = step()
    return {"loss": loss}


serve({"first_step_seconds": first, "parameters": sum(p.numel() for p in model.parameters()),
       "version": f"torch {torch.__version__}"}, turn)  # fmt: skip
