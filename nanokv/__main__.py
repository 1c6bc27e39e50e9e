"""Print the README's table of methods: python -m nanokv"""

from nanokv.methods import available

AXES = ("token", "head", "layer", "channel", "bits", "none")


def table() -> str:
    """Return a Markdown table of the methods, made from the headers of their files."""
    lines = ["| method | kind | shrinks | in one sentence | parameters |", "|---|---|---|---|---|"]
    for i in sorted(available(), key=lambda i: (AXES.index(i.axis.split(", ")[0]), i.name)):
        params = ", ".join(f"{k}={v!r}" for k, v in i.parameters.items())
        name = f"[{i.name}](nanokv/methods/{i.name}.py)"
        lines.append(f"| {name} | {i.kind} | {i.axis} | {i.header.splitlines()[0]} | {params} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
