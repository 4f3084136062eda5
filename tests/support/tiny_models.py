"""A ViR small enough for unit tests, and how its results are compared."""

import torch

from vir.models import VisionRetention, retention_decay

IMAGES = torch.randn(3, 3, 32, 24, generator=torch.Generator().manual_seed(1))


def tiny(seed=0, **kwargs):
    """4 x 3 patches and a class token; 5 classes."""
    torch.manual_seed(seed)
    args = dict(img_size=(32, 24), patch_size=8, num_classes=5, embed_dim=32, depth=3, num_heads=2)
    return VisionRetention(**args | kwargs)


def logits_and_gradients(model, images=IMAGES):
    model.zero_grad()
    logits = model(images)
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def largest_difference(found, expected):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def by_definition(weights, images, patch_size, num_heads, dims, norm="none", kept=None):
    """Tokens after the final norm, written from the paper's equations in float64, one token and head at a time."""
    w = {name: x.double() for name, x in weights.items()}
    width = w["cls_token"].shape[-1]
    head = width // num_heads

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return x * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    tokens = []
    for r in range(rows):
        for c in range(columns):
            patch = images.double()[:, :, r * patch_size:(r + 1) * patch_size, c * patch_size:(c + 1) * patch_size]
            tokens.append(patch.flatten(1) @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"])
    x = torch.stack(tokens, dim=1) + w["pos_embed"]
    places = [(r, c) for r in range(rows) for c in range(columns)]
    if kept is not None:
        x, places = x[:, kept], [places[n] for n in kept]
    x = torch.cat([x, w["cls_token"].expand(len(x), -1, -1)], dim=1)
    places.append((rows, columns - 1))
    if "dist_token" in w:
        x = torch.cat([x, w["dist_token"].expand(len(x), -1, -1)], dim=1)

    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for block in (f"blocks.{i}." for i in range(depth)):
        q, k, v = linear(layer_norm(x, block + "norm1"), block + "retention.qkv").split(width, dim=-1)
        out = torch.zeros_like(x)
        for h, decay in enumerate(retention_decay(num_heads).double()):
            part = slice(h * head, (h + 1) * head)
            if dims == 1:
                state = torch.zeros(len(x), head, head, dtype=torch.float64)
                for n in range(x.shape[1]):
                    state = decay * state + k[:, n, part, None] * v[:, n, None, part]
                    out[:, n, part] = (q[:, n, None, part] @ state)[:, 0] * head**-0.5
            else:
                for n, (r, c) in enumerate(places):
                    for m, (r2, c2) in enumerate(places[:n + 1]):
                        if r2 <= r and c2 <= c:
                            score = (q[:, n, part] * k[:, m, part]).sum(-1, keepdim=True) * head**-0.5
                            out[:, n, part] += decay ** (r - r2 + c - c2) * score * v[:, m, part]
        if norm != "none":
            out = layer_norm(out, block + "retention.norm")
        if norm == "layernorm_gelu":
            out = 0.5 * out * (1 + torch.erf(out / 2**0.5))
        x = x + w[block + "ls1.gamma"] * linear(out, block + "retention.out_proj")
        hidden = linear(layer_norm(x, block + "norm2"), block + "mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        x = x + w[block + "ls2.gamma"] * linear(hidden, block + "mlp.fc2")
    return layer_norm(x, "norm")
