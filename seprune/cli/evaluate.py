"""`seprune evaluate`: how good a network is on the reporting images."""

from __future__ import annotations

from seprune.cli import console, options


def evaluate(
    network: options.NetworkOptions, data: options.DataSource, *, work: options.WorkOptions
) -> None:
    """Score a network on the reporting images (val).

    Example:
      seprune evaluate small --data D --json
    """
    recipe = options.recipe(network, work, data)
    from seprune.cli import open_inputs
    from seprune.measure.metric_names import metric_title
    from seprune.measure.metrics import evaluate as score
    from seprune.report import words

    context = open_inputs.context(recipe, loader=open_inputs.permission(network), glance=[])
    images, runtime = context.images().reporting(), context.runtime
    result = score(context.network.model, images, device=runtime.device, track=runtime.track)
    for line in words.published(context.network.published, result.metrics):
        console.tell(line)
    if work.json:
        console.give(result.plain())
        return
    metrics = "  ".join(f"{metric_title(n)} {v:.4f}" for n, v in result.metrics.items())
    console.tell(f"{metrics}  loss {result.loss:.4f}  on {result.count:,} images")
    if result.nonfinite:
        console.tell(f"note: {result.nonfinite:,} images gave NaN or infinity")
