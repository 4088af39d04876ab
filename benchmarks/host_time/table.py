"""The results as Markdown tables."""


def markdown(data: dict) -> str:
    """The table, and what it was measured with."""
    head = ["", "timm, us", "least", "spread", "ours, us", "least", "spread", "ours / timm",
            "launches left out"]  # fmt: skip
    lines = [head, ["---"] + ["---:"] * 8]
    for one in data["rows"]:
        ours = one["ours_launches"]
        counts = "" if ours is None else f"{one['timm_launches'] or '-'}; {_sum(ours)}"
        ratio = "-" if one["ratio"] is None else f"{one['ratio']:.2f}"
        name = f"DeiT-{one['network']}: {one['call']}"
        lines.append([name, *_times(one["timm_us"]), *_times(one["ours_us"]), ratio, counts])
    return _with_settings(data, lines)


def stages_markdown(data: dict) -> str:
    """The table of an engine's call in its parts, and what it was measured with."""
    lines = [["an engine's call", "us", "least"], ["---", "---:", "---:"]]
    for one in data["rows"]:
        us = one["us"]
        name = f"DeiT-{one['network']}: {one['stage']}"
        lines.append([name, f"{us['median']:.1f}", f"{us['least']:.1f}"])
    return _with_settings(data, lines)


def where_markdown(data: dict) -> str:
    """The table of where the host time of operations goes, and what it was measured with."""
    parts = list(data["rows"][0]["shares"])
    lines = [["", "launches", "in Python, us", *parts, "as a plan, us"]]
    lines.append(["---"] + ["---:"] * (len(parts) + 3))
    for one in data["rows"]:
        python, plan = one["python_us"]["median"], one["plan_us"]["median"]
        shares = [f"{one['shares'][part] * python:.0f}" for part in parts]
        last = one["why_not"] or f"{plan:.1f}"
        lines.append([one["call"], str(one["launches"]), f"{python:.0f}", *shares, last])
    return _with_settings(data, lines)


def _with_settings(data, lines):
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join(
        "| " + " | ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                          enumerate(zip(line, widths, strict=True))) + " |"
        for line in lines
    )  # fmt: skip
    on, settings = data["hardware"], data["settings"]
    kind = f"autocast to {settings['dtype']}" if settings["autocast"] else settings["dtype"]
    return (
        f"{on['cpu']}, one thread; Python {on['python']}, PyTorch {on['torch']}, Triton "
        f"{on['triton']}, timm {on['timm']}; batch 1, {kind}, {settings['rounds']} rounds; "
        f"launch plans: {settings['plans']}. No GPU was there; launches are no-ops.\n\n{table}"
    )


def _times(us):
    if us is None:
        return ["-"] * 3
    if us["least"] < 0:  # a difference
        return [f"{us['median']:,.0f}", "-", "-"]
    return [f"{us['median']:,.0f}", f"{us['least']:,.0f}", f"{us['spread']:.0%}"]


def _sum(launches):
    return f"{launches['triton']} + {launches['pytorch']}"
