"""The curriculum of the training: phases, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """A phase of the curriculum.

    `single_share` is the extra share of scenes with one object; batches are per process.
    """

    image_side: int
    steps: int
    batch_size: int
    single_share: float
    clutter_share: float
    neutral_share: float
    learning_rate: float
    stuff_share: float = 0.0


@dataclass(frozen=True)
class Plan:
    """All settings of a training.

    One that warm-starts goes on from the weights of the first training. Its exported weights have a share of
    these mixed in, which keeps more of what the first training learnt.
    """

    phases: tuple[Phase, ...]
    seed: int = 1
    processes: int = 2
    warmup_steps: int = 150
    cosine_start: float = 0.5
    average_decay: float = 0.995
    weight_decay: float = 0.05
    decorrelation_weight: float = 0.3
    is_warm_start: bool = False
    exported_first_share: float = 0.0

    @property
    def shows_stuff(self) -> bool:
        """Whether any phase has scenes with named stuff."""
        return any(phase.stuff_share > 0 for phase in self.phases)

    @property
    def total_steps(self) -> int:
        """Number of steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def phase_of(self, step: int) -> Phase:
        """Return the phase of a step.

        Raises:
            IndexError: the plan has no such step.
        """
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise IndexError(f"the plan has {self.total_steps} steps only")


# Small images of single objects first: from scratch on crowded scenes almost nothing is learnt for minutes.
FULL_PLAN = Plan(
    phases=(
        Phase(48, 700, 96, single_share=1.0, clutter_share=0.0, neutral_share=0.04, learning_rate=1e-3),
        Phase(64, 340, 96, single_share=0.3, clutter_share=0.0, neutral_share=0.08, learning_rate=1e-3),
        Phase(48, 950, 96, single_share=0.6, clutter_share=0.35, neutral_share=0.08, learning_rate=1.2e-3),
        Phase(64, 2200, 72, single_share=0.25, clutter_share=0.35, neutral_share=0.08, learning_rate=1.2e-3),
        Phase(96, 1000, 60, single_share=0.0, clutter_share=0.35, neutral_share=0.08, learning_rate=1.2e-3),
    )
)

# Goes on from the weights that FULL_PLAN came to, which know things alone.
STUFF_PLAN = Plan(
    phases=(
        Phase(
            64,
            2000,
            96,
            single_share=0.25,
            clutter_share=0.3,
            neutral_share=0.14,
            learning_rate=6e-4,
            stuff_share=0.5,
        ),
        Phase(
            96,
            1700,
            48,
            single_share=0.0,
            clutter_share=0.3,
            neutral_share=0.14,
            learning_rate=6e-4,
            stuff_share=0.5,
        ),
    ),
    processes=1,
    warmup_steps=200,
    cosine_start=0.3,
    is_warm_start=True,
    exported_first_share=0.25,
)


def scaled(plan: Plan, scale: float) -> Plan:
    """Return the plan with the steps of every phase scaled, at least one step each."""
    phases = tuple(replace(phase, steps=max(1, round(phase.steps * scale))) for phase in plan.phases)
    return replace(plan, phases=phases, warmup_steps=max(1, min(plan.warmup_steps, phases[0].steps // 2)))


def schedule(plan: Plan) -> Iterator[tuple[int, Phase, float]]:
    """Yield each step, its phase and its learning rate: warm-up, constant, then a cosine to 1 %."""
    step, cosine_from = 0, plan.cosine_start * plan.total_steps
    for phase in plan.phases:
        for _ in range(phase.steps):
            warmth = min(1.0, (step + 1) / plan.warmup_steps)
            progress = max(0.0, (step - cosine_from) / (plan.total_steps - cosine_from))
            decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))
            yield step, phase, phase.learning_rate * warmth * decay
            step += 1
