"""What the forward pass of training keeps for the backward pass, in closed form, in bytes per image.

Counted are the tensors autograd keeps for an encoder with a fused attention kernel and no autocast. Every linear map keeps its
input; a norm its input and two statistics in float32 (RMSNorm, which torch composes on a CPU, one statistic and its normalised
input too); an activation its input; the kernel q, k, v, its output and a logarithm per head and token in float32. What an
allocator rounds up, and what the backward pass itself needs, come on top. Blocks that are recomputed whole keep their input
only; selective recomputation keeps the input of a block and the results of its products. Dropout keeps a byte per element.

S tokens   D width   M feed-forward width   H heads   L depth   b bytes of an element
"""

from vitscale.model.config import ModelConfig, Recompute


def saved_bytes(model: ModelConfig, recompute: Recompute, *, element_bytes: int, dropout: float = 0.0) -> int:
    """Bytes per image kept between forward and backward; parameters, images and logits are not counted."""
    whole, selective, entry = (_block_bytes(model, kind, element_bytes) for kind in ("whole", "selective", "entry"))
    if dropout:
        whole += model.tokens * (2 * model.width + model.feedforward_width)  # masks behind W_O, f and W_2
    if recompute == "selective":
        blocks = model.depth * selective
    elif recompute == 0:
        blocks = model.depth * whole
    else:
        assert isinstance(recompute, int)
        recomputed = -(-model.depth // recompute)
        blocks = recomputed * entry + (model.depth - recomputed) * whole
    positions_mask = model.tokens * model.width if dropout else 0
    return blocks + positions_mask + _ends_bytes(model, element_bytes)


def _block_bytes(model: ModelConfig, kind: str, b: int) -> int:
    S, D, M, H = model.tokens, model.width, model.feedforward_width, model.heads
    statistics = 4 if model.norm_kind == "rmsnorm" else 8
    gates = 2 * M if model.activation == "swiglu" else M  # rows of W_1
    if kind == "entry":
        return S * D * b
    if kind == "selective":
        # input | qkv, kernel and its logarithms, W_O, W_1, W_2
        return S * b * (D + 3 * D + D + D + gates + D) + S * H * 4
    elements = D  # the input
    elements += 3 * D + D  # qkv, and the kernel's output, which is also the input of W_O
    elements += 2 * D if model.qk_norm or model.position == "rotary" else 0  # q and k as the kernel sees them
    elements += D if model.qk_norm else 0  # normalised q is laid out head by head, so the input of W_O is a copy
    elements += gates + (2 * M if model.activation == "swiglu" else M)  # W_1's output; what enters W_2 (and silu's output)
    elements += 2 * D if model.layer_scale is not None else 0  # each branch before its factors
    norms = 1 if model.parallel else 2
    # pre-norm: what the norms give to W_qkv and W_1, and Z'; post-norm: the sums, which the norms take, and Z' for W_1
    elements += D * norms + (0 if model.parallel else D)
    elements += D * norms if model.norm_kind == "rmsnorm" else 0
    per_token = norms * statistics + H * 4
    if model.qk_norm:
        per_token += 2 * H * statistics
    return S * (elements * b + per_token)


def _ends_bytes(model: ModelConfig, b: int) -> int:
    """Patches, which enter E; the last tokens, where the norm, the class token or MAP keeps them; what enters the head."""
    N, S, D, M = model.patches, model.tokens, model.width, model.feedforward_width
    patches = N * model.channels * model.patch_size**2 * b
    averages_first = model.pool == "average" and (model.is_post_norm or model.pool_norm == "after")
    last = 0 if averages_first else S * D * b
    pool = S * b * 3 * D + b * (5 * D + 2 * M) if model.pool == "map" else 0  # normalised tokens, k and v; one token behind
    return patches + last + pool + D * b
