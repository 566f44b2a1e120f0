"""The recipes of the recorded scenarios: what was asked of real kernels, by subject, for any page size.

The published files are what `build(4096)` and `build(16384)` give; a host with 64K pages gets its scenarios from here.

>>> [scenario.name for scenario in build(65536)[:3]]
['sys/api', 'sys/check_ext_system', 'sys/check_ext_vm']
"""

from __future__ import annotations

from kvm2.lab.scenarios import Scenario


def build(page: int) -> tuple[Scenario, ...]:
    """Every scenario for hosts with pages of `page` bytes, in the published order."""
    from kvm2.lab.recipes import gic, registers, running, slots, sve, system, vcpus

    recipes = (
        *system.recipes(page),
        *slots.recipes(page),
        *vcpus.recipes(),
        *sve.recipes(),
        *registers.recipes(),
        *vcpus.capability_recipes(),
        *gic.recipes(page),
        *running.recipes(),
    )
    return tuple(recipe.scenario() for recipe in recipes)
