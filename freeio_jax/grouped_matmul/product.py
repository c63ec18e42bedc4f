"""The three products of groups of rows, which are each other's derivatives.

With rows ``a`` ``[M, K]``, cotangents ``b`` ``[M, N]`` and weights ``w`` ``[G, K, N]``, and
``g(m)`` the group of row m, let

    phi(a, b, w) = sum over the rows m of a group of  a[m] @ w[g(m)] @ b[m]

The products are its derivatives by one of the three. So each is linear in both of its operands,
the transpose of each is another one, and derivatives of any order, in both modes, stay among them.
"""

from __future__ import annotations

import enum

import jax


class Product(enum.Enum):
    """A product, by what it is in training; the value is how it is called in words."""

    FORWARD = "forward"  # (rows, weights) -> b: a[m] @ w[g(m)]
    ROWS_GRADIENT = "gradient of rows"  # (cotangents, weights) -> a: b[m] @ w[g(m)].T
    WEIGHTS_GRADIENT = "gradient of weights"  # (rows, cotangents) -> w: a_g.T @ b_g

    @property
    def operands(self) -> tuple[str, str]:
        """Which of a, b and w it takes, in order."""
        return _OPERANDS[self]

    @property
    def result(self) -> str:
        """Which of a, b and w it has the shape of."""
        return next(name for name in "abw" if name not in self.operands)

    def shape(self, left, right, num_groups: int) -> tuple[int, ...]:
        """Shape of the result."""
        shapes = dict(zip(self.operands, (left.shape, right.shape), strict=True))
        match self.result:
            case "a":
                return shapes["b"][0], shapes["w"][1]
            case "b":
                return shapes["a"][0], shapes["w"][2]
        return num_groups, shapes["a"][1], shapes["b"][1]

    def widths(self, left, right) -> tuple[int, int]:
        """K and N."""
        shapes = dict(zip(self.operands, (left.shape, right.shape), strict=True))
        if "w" in shapes:
            return shapes["w"][1:]
        return shapes["a"][1], shapes["b"][1]

    def transpose(self, operand: int, cotangent: jax.Array, other: jax.Array):
        """The product that gives the cotangent of an operand, and its two operands.

        Args:
          operand: 0 or 1, whose cotangent is asked for.
          cotangent: of the result.
          other: the other operand.
        """
        given = {self.result: cotangent, self.operands[1 - operand]: other}
        product = next(p for p in Product if p.result == self.operands[operand])
        return product, tuple(given[name] for name in product.operands)


_OPERANDS = {
    Product.FORWARD: ("a", "w"),
    Product.ROWS_GRADIENT: ("b", "w"),
    Product.WEIGHTS_GRADIENT: ("a", "b"),
}
