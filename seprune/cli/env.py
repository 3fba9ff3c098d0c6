"""`seprune env`: versions, devices, extras, free disk."""

from __future__ import annotations

from seprune.cli import console, options


def env(json: options.Json = False) -> None:
    """Versions, devices, extras, free disk.

    Also whether torch and torchvision are a pair.

    Example:
      seprune env --json
    """
    from seprune.runtime.environment import environment

    facts = environment()
    if json:
        console.give(facts)
        return
    for name in ("python", "platform", "cpus", "usable_cores"):
        console.write(f"{name.replace('_', ' '):20s} {facts[name]}")
    console.write(f"{'free disk':20s} {facts['disk_free'] / 1e9:,.1f} GB here")
    pair = facts["pair"]
    console.write(f"{'torch, torchvision':20s} {pair['torch']}, {pair['torchvision']}: "
                  + ("they fit" if pair["fits"] else f"do not fit ({pair['reason']})"))  # fmt: skip
    if pair["install"]:
        console.write(f"{'':20s} {pair['install']}")
    for device in facts["devices"]:
        more = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("device", "name"))
        console.write(f"{device['device']:20s} {device['name']}{', ' if more else ''}{more}")
    for name, extra in facts["extras"].items():
        console.write(
            f"{name + ', extra':20s} {'present' if extra['present'] else extra['install']}"
        )
    for name, version in facts["packages"].items():
        console.write(f"  {name:18s} {version or 'missing'}")
