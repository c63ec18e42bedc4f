"""The tables of docs/checkpoints.md have the families of the table in the code."""

from pathlib import Path

from freeio_jax.hf.families import FAMILIES, INEXPRESSIBLE

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def rows(table):
    """The rows of a table of the page, without its head."""
    start = f"<!-- {table}: freeio_jax/hf/families.py -->\n"
    text = PAGE.read_text().split(start)[1].split("<!-- end -->")[0]
    return text.splitlines()[2:]


def first_tensor(family):
    name = next(name for name in ("gate_up", "up") if name in family.weights)
    return family.weights[name][0].names[0]


def test_the_families():
    assert rows("families") == [
        f"| {family.title} | {', '.join(f'`{t}`' for t in family.model_types)} | "
        f"`{first_tensor(family)}` |"
        for family in FAMILIES
    ]


def test_what_cannot_be_expressed():
    assert rows("inexpressible") == [f"| `{t}` | {reason} |" for t, reason in INEXPRESSIBLE.items()]
