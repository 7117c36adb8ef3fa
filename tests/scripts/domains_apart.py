"""dann_at_scale.py with a batch sorted by domain: a device has one domain, or neither.

The first half of the devices gets the source, the second half the target. Losses are
those of the global batch, so the number of devices must not matter here either.
"""

import jax.numpy as jnp
import numpy as np
import optax
from run_script import load

import jaxgrl

example = load("examples/dann_at_scale.py")
make_input = example.make_input


def loss_fn(model, batch, scale):
    """Returns what the example's returns; the domains are data."""
    images = batch["images"].astype(jnp.float32) / 255
    label_logits, domain_logits = model(images, scale)
    wide = jnp.promote_types(label_logits.dtype, jnp.float32)
    label_losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        label_logits.astype(wide), batch["labels"]
    )
    of_source = (batch["domains"] == 0).astype(wide)
    label_loss = (label_losses * of_source).sum() / of_source.sum()
    metrics = {
        "label_loss": label_loss,
        "domain_loss": jaxgrl.domain_loss(domain_logits, batch["domains"]),
        "domain_accuracy": jaxgrl.domain_accuracy(domain_logits, batch["domains"]),
    }
    metrics["loss"] = label_loss + metrics["domain_loss"]
    return metrics["loss"], metrics


class Apart:
    """The example's global batches, sorted by domain, and this process's rows."""

    def __init__(self, domains, batch_size, seed, process, processes):
        self.whole = make_input(domains, batch_size, seed, 0, 1)
        self.get_state, self.set_state = self.whole.get_state, self.whole.set_state
        size = 2 * batch_size // processes
        self.rows = slice(process * size, (process + 1) * size)

    def __next__(self):
        """Returns images [2 n, ...], domains [2 n] and labels [2 n]."""
        batch = next(self.whole)
        n = len(batch["labels"])
        sorted_by_domain = {
            "images": np.concatenate([batch["images"][:, 0], batch["images"][:, 1]]),
            "domains": np.repeat(np.int32([0, 1]), n),
            "labels": np.concatenate([batch["labels"], np.zeros(n, np.int32)]),
        }
        return {name: array[self.rows] for name, array in sorted_by_domain.items()}


if __name__ == "__main__":
    example.loss_fn, example.make_input = loss_fn, Apart
    example.run_to_end(example.main)
