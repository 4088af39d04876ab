"""The shapes that tests and benchmarks share: DeiT's own, and awkward ones.

Each list holds dicts of keyword arguments for one operation's `make_inputs` in the tests.
D features, H heads, N tokens, C channels, B images.
"""

LAYER_NORM = [
    {"shape": (1, 192)},
    {"shape": (7, 384)},
    {"shape": (5, 768)},
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

# N queries, L keys
ATTENTION = [
    {"B": 2, "H": 3, "N": 198, "L": 198, "d": 64},  # DeiT-Ti distilled
    {"B": 1, "H": 2, "N": 197, "L": 197, "d": 64},
    {"B": 1, "H": 1, "N": 578, "L": 578, "d": 64},  # DeiT-B-384 distilled
    {"B": 2, "H": 6, "N": 2, "L": 198, "d": 64},  # prefix tokens of the last block
    {"B": 3, "H": 2, "N": 49, "L": 49, "d": 32},  # a TinyViT window
    {"B": 1, "H": 1, "N": 1, "L": 1, "d": 32},
    {"B": 1, "H": 2, "N": 65, "L": 128, "d": 32},
    {"B": 0, "H": 2, "N": 5, "L": 5, "d": 32},
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

LAYER_NORM_MLP = [
    {"M": 2 * 66, "S": 2, "D": 192, "hidden": 768},
    {"M": 7, "S": 7, "D": 100, "hidden": 40},
    {"M": 1, "S": 1, "D": 33, "hidden": 50},
]

CLASSIFIER = [
    {"B": 3, "N": 198, "D": 192, "classes": 1000},
    {"B": 17, "N": 2, "D": 100, "classes": 10},
    {"B": 1, "N": 5, "D": 384, "classes": 65},
    {"B": 0, "N": 2, "D": 64, "classes": 10},
]
