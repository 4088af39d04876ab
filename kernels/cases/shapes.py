"""Shapes that each operation is tested at: DeiT's, cut down, and awkward ones.

Each list holds dicts of keyword arguments for the operation's `<op>_inputs`.
D features, H heads, N tokens, C channels, B images.
"""

LAYER_NORM = [
    {"shape": (1, 192)},
    {"shape": (7, 384)},
    {"shape": (5, 768)},
    {"shape": (30, 768)},  # several rows for a program of backward
    {"shape": (13, 100)},
    {"shape": (2, 3, 33)},
    {"shape": (3, 1)},
    {"shape": (2, 3000)},
    {"shape": (0, 64)},
]

# M rows in S samples, K -> N features
LINEAR = [
    {"M": 2 * 198, "S": 2, "K": 192, "N": 576},  # DeiT-Ti qkv
    {"M": 130, "S": 2, "K": 192, "N": 192},
    {"M": 6, "S": 3, "K": 384, "N": 1536},
    {"M": 1, "S": 1, "K": 33, "N": 7},
    {"M": 65, "S": 5, "K": 100, "N": 130},
    {"M": 0, "S": 1, "K": 64, "N": 32},
]

# (..., K), each row in equal groups (`parts`)
QUANTIZE = [
    {"shape": (2, 99, 192)},
    {"shape": (7, 768), "parts": 12},  # as the outputs of attention (heads) and GELU have them
    {"shape": (1, 100)},
    {"shape": (13, 99), "parts": 3},
    {"shape": (3, 1)},
    {"shape": (40,)},
    {"shape": (2, 6000), "parts": 2},
    {"shape": (0, 64), "parts": 2},
]

# M rows in S samples, K -> N features; x's in groups (`parts`)
QUANTIZED_LINEAR = [
    {"M": 2 * 99, "S": 2, "K": 192, "N": 576},  # DeiT-Ti qkv
    {"M": 130, "S": 2, "K": 192, "N": 192, "parts": 3},
    {"M": 6, "S": 3, "K": 384, "N": 320, "parts": 6},
    {"M": 65, "S": 5, "K": 96, "N": 130, "parts": 3},
    {"M": 9, "S": 1, "K": 100, "N": 33},
    {"M": 1, "S": 1, "K": 33, "N": 7},
    {"M": 1, "S": 1, "K": 64, "N": 64, "parts": 2},
    {"M": 0, "S": 1, "K": 64, "N": 64},
]

# N queries, L keys
ATTENTION = [
    {"B": 2, "H": 3, "N": 198, "L": 198, "d": 64},  # DeiT-Ti distilled
    {"B": 1, "H": 1, "N": 578, "L": 578, "d": 64},  # DeiT-B-384 distilled
    {"B": 3, "H": 2, "N": 49, "L": 49, "d": 32},  # a TinyViT window
    {"B": 1, "H": 2, "N": 197, "L": 197, "d": 64},
    {"B": 2, "H": 6, "N": 2, "L": 198, "d": 64},  # prefix tokens of the last block
    {"B": 1, "H": 1, "N": 1, "L": 1, "d": 32},
    {"B": 1, "H": 2, "N": 65, "L": 128, "d": 32},
    {"B": 1, "H": 2, "N": 70, "L": 70, "d": 80},  # ViT-H
    {"B": 2, "H": 3, "N": 1, "L": 50, "d": 48},  # CaiT's class token
    {"B": 1, "H": 1, "N": 20, "L": 260, "d": 48},
    {"B": 0, "H": 2, "N": 5, "L": 5, "d": 32},
]

# a map of Y x X tokens in windows
WINDOW_ATTENTION = [
    {"B": 2, "Y": 14, "X": 7, "H": 2, "window": 7},
    {"B": 1, "Y": 14, "X": 14, "H": 1, "window": 14},  # the whole map
    {"B": 1, "Y": 12, "X": 12, "H": 1, "window": 12},
    {"B": 1, "Y": 9, "X": 9, "H": 1, "window": 9},
    {"B": 2, "Y": 8, "X": 12, "H": 2, "window": 4},
    {"B": 1, "Y": 3, "X": 6, "H": 2, "window": 3},
    {"B": 0, "Y": 7, "X": 7, "H": 2, "window": 7},
]

# image size, patch size, channels, features, prefix tokens; positions for the prefix tokens too?
PATCH_EMBED = [
    {"B": 2, "size": (64, 96), "patch": (16, 16), "C": 3, "D": 192, "T": 2, "prefix_pos": True},
    {"B": 1, "size": (48, 48), "patch": (16, 16), "C": 1, "D": 100, "T": 1, "prefix_pos": False},
    {"B": 3, "size": (28, 42), "patch": (14, 14), "C": 4, "D": 64, "T": 0, "prefix_pos": False},
    {"B": 2, "size": (32, 64), "patch": (32, 32), "C": 2, "D": 33, "T": 2, "prefix_pos": True},
    {"B": 5, "size": (8, 12), "patch": (4, 3), "C": 3, "D": 48, "T": 5, "prefix_pos": True},
    {"B": 0, "size": (16, 16), "patch": (16, 16), "C": 3, "D": 32, "T": 1, "prefix_pos": True},
]

LAYER_NORM_LINEAR = [
    {"M": 2 * 198, "K": 192, "N": 576},  # DeiT-Ti qkv
    {"M": 70, "K": 384, "N": 128, "activation": "gelu"},
    {"M": 3, "K": 100, "N": 33},
    {"M": 0, "K": 64, "N": 32},
]

LAYER_NORM_MLP = [
    {"M": 2 * 66, "S": 2, "D": 192, "hidden": 768},
    {"M": 7, "S": 7, "D": 100, "hidden": 40},
    {"M": 1, "S": 1, "D": 33, "hidden": 50},
]

# B samples, H heads, N tokens, d features a head
LAYER_NORM_ATTENTION = [
    {"B": 2, "H": 3, "N": 70, "D": 192, "d": 64},
    {"B": 3, "H": 2, "N": 5, "D": 100, "d": 32},
    {"B": 1, "H": 1, "N": 3, "D": 33, "d": 32},
]

# B samples, H heads, N tokens, d features a head
TALKING_HEADS = [
    {"B": 2, "H": 4, "N": 37, "d": 48},  # CaiT-XXS's heads
    {"B": 1, "H": 8, "N": 49, "d": 48},  # CaiT-S's
    {"B": 1, "H": 6, "N": 20, "d": 48},  # CaiT-XS's
    {"B": 1, "H": 16, "N": 33, "d": 48},  # CaiT-M's
    {"B": 3, "H": 3, "N": 5, "d": 32},
    {"B": 2, "H": 2, "N": 65, "d": 32},
    {"B": 2, "H": 5, "N": 1, "d": 48},
    {"B": 0, "H": 4, "N": 5, "d": 48},
]

CLASSIFIER = [
    {"B": 3, "N": 198, "D": 192, "classes": 1000},
    {"B": 17, "N": 2, "D": 100, "classes": 10},
    {"B": 1, "N": 5, "D": 384, "classes": 65},
    {"B": 0, "N": 2, "D": 64, "classes": 10},
]

# B images of C channels, D output channels, k x k taps
CONV_NORM = [
    {"B": 2, "C": 64, "D": 96, "Y": 14, "X": 9, "k": 1},
    {"B": 1, "C": 40, "D": 24, "Y": 5, "X": 5, "k": 1, "activation": "gelu", "residual": True},
    {"B": 2, "C": 48, "D": 48, "Y": 14, "X": 11, "k": 3, "padding": 1, "groups": 48},
    {"B": 1, "C": 33, "D": 33, "Y": 9, "X": 17, "k": 3, "padding": 1, "groups": 33, "stride": 2,
     "activation": "gelu"},
    {"B": 1, "C": 8, "D": 8, "Y": 1, "X": 2, "k": 3, "padding": 1, "groups": 8, "residual": True,
     "activation": "gelu"},
    {"B": 2, "C": 3, "D": 32, "Y": 16, "X": 12, "k": 3, "padding": 1, "stride": 2,
     "activation": "gelu"},
    {"B": 1, "C": 12, "D": 24, "Y": 7, "X": 7, "k": 3, "padding": 1, "groups": 3, "residual": True},
    {"B": 0, "C": 32, "D": 32, "Y": 7, "X": 7, "k": 3, "padding": 1, "groups": 32},
]  # fmt: skip

DISTILLATION_LOSS = [
    {"B": 5, "C": 1000},
    {"B": 3, "C": 33},
    {"B": 1, "C": 10},
    {"B": 2, "C": 1},
    {"B": 2, "C": 21841},  # ImageNet-21k
    {"B": 2, "C": 8192},
]

SPARSE_CROSS_ENTROPY = [
    {"B": 5, "C": 1000, "K": 10},  # TinyViT's for ImageNet-1k
    {"B": 2, "C": 21841, "K": 100},  # and for ImageNet-21k
    {"B": 3, "C": 33, "K": 7},
    {"B": 1, "C": 10, "K": 1},
    {"B": 3, "C": 10, "K": 10},  # no other class is left
    {"B": 2, "C": 1, "K": 1},
    {"B": 2, "C": 5000, "K": 1500},
]
