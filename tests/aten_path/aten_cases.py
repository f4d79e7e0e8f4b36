"""Sizes and arguments that both directions of the ATen path are tested with."""

# length, channels, hidden, and what else the call has
PLAIN = [
    (1, 16, 16, {}),
    (2, 48, 48, {"direction": "incoming", "batch": 3}),
    (24, 48, 48, {"mask": "bool"}),
    (33, 16, 16, {"direction": "incoming", "mask": "expanded"}),
    (20, 128, 128, {"direction": "incoming", "mask": "float", "batch": 2}),
]
FULL = [
    (1, 1, 1, {"biases": True}),
    (9, 7, 11, {"mask": "soft", "drop_mask": True}),
    (17, 24, 40, {"direction": "incoming", "residual": True}),
    (
        15,
        40,
        24,
        {
            "direction": "incoming",
            "batch": 2,
            "mask": "expanded",
            "residual": True,
            "drop_mask": True,
            "biases": True,
        },
    ),
]
