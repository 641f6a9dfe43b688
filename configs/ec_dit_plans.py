"""The plans in the table of configs/README.md: `python -m ecdit.plan --config=configs/ec_dit.py --table` makes it."""

# What `ecdit.plan --table` plans: each size on the slice that it is meant for, and with 32 GB a chip.
SLICES = {"XL": "v5p:4x4x4", "XXL": "v5p:4x4x4", "3XL": "v5p:4x4x8", "M": "v5p:4x4x8"}
# With mesh.expert = 16 XL is faster wherever there are 16 chips; 4 goes on every slice.
WIDE = {"mesh.expert": 16}
PLANS = (
    ("M-64E", SLICES["M"]),
    *((f"{size}-dense", SLICES[size]) for size in ("XL", "XXL", "3XL")),
    *((f"XL-{kind}", SLICES["XL"], WIDE) for kind in ("32E", "16E", "64E")),
    *((f"{size}-32E", SLICES[size]) for size in ("XL", "XXL", "3XL")),
    ("M-64E", "v4:4x4x8", {"model.remat": "attention_out"}),
    *((f"{size}-64E", SLICES[size]) for size in ("XXL", "3XL")),
    ("M-dense", SLICES["M"]),
    ("XL-64E", "v4:4x4x8", WIDE),
    *((f"{size}-64E", "v4:4x4x8") for size in ("XXL", "3XL")),
    *((f"{size}-dense", "v4:4x4x8") for size in ("XL", "XXL", "3XL")),
    ("M-dense", "v4:4x4x8"),
)
