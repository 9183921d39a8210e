"""Memory and traffic of small programs against counts by hand."""

import jax
import jax.numpy as jnp

from asa_jax.training.plan_fusion import LAYERS, demand
from asa_jax.training.plan_program import GRADIENTS, KEPT, read_program

ROWS, SIZE = 64, 32
X, W = (jax.ShapeDtypeStruct((rows, SIZE), jnp.float32) for rows in (ROWS, SIZE))
OF_X, OF_W = 4 * ROWS * SIZE, 4 * SIZE * SIZE


def demand_of(function, *arguments, weights=()):
    return demand(read_program(jax.make_jaxpr(function)(*arguments).jaxpr, dict(weights)))


def test_elementwise_work_is_stored_where_it_ends():
    """One pass over x, however many operations there are."""
    found = demand_of(lambda x: jnp.tanh(2 * x + 1).reshape(SIZE, ROWS), X)
    assert (found.peak, found.moved, found.copied) == (OF_X, 2 * OF_X, 0)


def test_a_product_takes_arrays():
    """tanh(x) lies in memory beside the result, of which the sum is computed on the way."""
    found = demand_of(lambda x, w: jnp.sum(jnp.tanh(x) @ w), X, W)
    assert found.peak == 2 * OF_X
    # x is read, tanh(x) written, the product read, and one number written.
    assert found.moved == 3 * OF_X + 4


def test_equal_operations_are_one_and_views_none():
    found = demand_of(lambda x: (jnp.sin(x) @ jnp.sin(x).T, jnp.sin(x[None])[0].T @ x), X)
    assert found.moved == 2 * OF_X
    assert found.peak == OF_X + 4 * ROWS * ROWS + OF_W


def test_a_scan_keeps_stacks_and_sums_weights_last():
    """Of x -> tanh(x w) the backward pass needs x, or tanh(x w), of each of the layers."""
    layers = 5
    stack = jax.ShapeDtypeStruct((layers, SIZE, SIZE), jnp.float32)

    def loss(stack, x):
        def body(x, w):
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, stack)[0])

    found = demand_of(jax.grad(loss), stack, X, weights={stack.shape: layers * OF_W / 2})
    assert found.causes[KEPT] == layers * OF_X
    assert found.causes[GRADIENTS] == layers * OF_W / 2
    # x w computed anew, its gradient through tanh, the gradient of x, and that of w.
    assert OF_X + OF_W <= found.causes[LAYERS] <= 4 * OF_X + OF_W
