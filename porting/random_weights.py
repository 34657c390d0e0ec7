"""Name-seeded random weights: a parameter's values are a pure function of its name and shape.

Two implementations that agree on names and shapes hold equal weights with no file to exchange, at any size. The generator is splitmix64,
which is four lines in any language, and one multiplication makes a weight of it, so that the values are the same to the bit.
"""
import zlib

import numpy as np

GAMMA, MIX1, MIX2 = np.array([0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
SMALL = ("embed_tokens.weight", "_pos_embed_learned", "fake_latent", "mask_token")


def uniform(name, count):
    """`count` float32 values in [-1, 1): element i is splitmix64 number i of the stream crc32(name), its upper 24 bits."""
    z = np.uint64(zlib.crc32(name.encode())) + np.arange(1, count + 1, dtype=np.uint64) * GAMMA     # modulo 2⁶⁴
    z = (z ^ z >> np.uint64(30)) * MIX1
    z = (z ^ z >> np.uint64(27)) * MIX2
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2 ** -23) - np.float32(1)


def random_weight(name, shape):
    """float32 array of `shape`; `name` as in the checkpoint, "mar.encoder_blocks.0.attn.qkv.weight". With w of unit variance, √3 · uniform:

    norms (1-D, .weight)                            1 + 0.1 · w
    biases (other 1-D)                              0.05 · w
    embeddings, fake_latent, mask_token             0.02 · w; the norms after them then show a wrong eps
    matrices and convolutions                       w / √fan_in
    adaLN_modulation.1.weight                       0.3 of that
    final_layer.linear.weight                       0.3 of that, and (C / W) · input_proj.weight.T is added to its first C rows: the noise
                                                    prediction of a head that sees white noise, so that sampled latents stay of order 1
    """
    fan_in = int(np.prod(shape[1:])) or 1
    if name.endswith(SMALL):
        scale = 0.02
    elif len(shape) <= 1:
        scale = 0.1 if name.endswith(".weight") else 0.05
    else:
        scale = (0.3 if name.endswith(("adaLN_modulation.1.weight", "final_layer.linear.weight")) else 1) / fan_in ** 0.5
    w = (uniform(name, int(np.prod(shape))) * np.float32(3 ** 0.5 * scale)).reshape(shape)
    if len(shape) <= 1 and name.endswith(".weight"):
        w += 1
    if name.endswith("final_layer.linear.weight"):
        C, W = shape[0] // 2, shape[1]
        w[:C] += np.float32(C / W) * random_weight(name.replace("final_layer.linear", "input_proj"), (W, C)).T
    return w
