"""A plan as people read it."""

from rich.console import Console, Group
from rich.table import Table

from vllama2_jax.parallel.collectives import totals
from vllama2_jax.parallel.mesh import axes_in_words
from vllama2_jax.parallel.published import ASSUMED, published_rows
from vllama2_jax.parallel.roofline import Roofline
from vllama2_jax.plan.result import Memory, Plan, ProgramPlan
from vllama2_jax.plan.search import mesh_and_batch
from vllama2_jax.plan.serving_result import ServingPlan

_RANKED = 12  # plans that a table shows


def show(plan: Plan, console: Console) -> None:
    """Print a plan, and everything that it takes for granted."""
    console.print(_summary(plan))
    _show_program(plan, console)


def show_serving(plan: ServingPlan, console: Console) -> None:
    """Print what answering takes, and everything that is taken for granted."""
    serving, memory, roof = plan.serving, plan.memory, plan.roofline
    prompt = serving.program == "prefill"
    rows = [
        ("on", _place(plan)),
        (
            "rows",
            f"{serving.rows}, prompts of {serving.length:,} slots, room for {serving.room:,} "
            "new tokens",
        ),
        ("fits", "yes" if plan.fits else "NO: take more chips, fewer rows, or another mesh"),
        ("parameters", f"{plan.parameters.total:,}"),
        ("arguments", f"{size(memory.arguments)} a chip: parameters and the cache"),
        ("the cache", f"{size(plan.cache[0])} a chip of {size(plan.cache[1])} in all"),
        *_memory_rows(memory),
        ("compiled in", _compiled(plan)),
        (
            "FLOPs of all prompts" if prompt else "FLOPs of a token of each row",
            f"{plan.flops.model:.4g} model, {plan.flops.hardware:.4g} hardware",
        ),
    ]
    if plan.sent:
        rows.append(("sent", f"{size(plan.wire_bytes)} by each chip"))
    if roof:
        what = "of prompts" if prompt else "of answers"
        rows += [
            *_roofline_rows(roof),
            ("prompts read in" if prompt else "a token takes", duration(roof.step_seconds)),
            ("all rows", f"{plan.tokens_per_second:,.0f} tokens/s {what}, by a model"),
        ]
    console.print(_two_columns(f"{plan.network.name}, {serving.program}", rows))
    _show_program(plan, console)


def _show_program(plan: ProgramPlan, console: Console) -> None:
    """What the compiler made, or why it made nothing; and what is taken for granted."""
    if plan.refusal:
        console.print(f"The compiler: {plan.refusal}", highlight=False, markup=False)
    if plan.sent and plan.sent.collectives:
        console.print(_collectives(plan))
    if plan.sent and plan.sent.kernels:
        kernels = ", ".join(f"{name} x{count}" for name, count in plan.sent.kernels.items())
        console.print(f"Kernels of a step: {kernels}", highlight=False)
    if plan.sent and plan.sent.uncounted_loops:
        loops = ", ".join(plan.sent.uncounted_loops)
        console.print(f"Loops of an unknown number of turns count as one: {loops}")
    if plan.sent and plan.roofline is None:
        console.print(_without_roofline(plan))
    for sentence in plan.assumptions:
        console.print(f"- {sentence}", highlight=False)


def _without_roofline(plan: ProgramPlan) -> str:
    if plan.topology.chip.peak_flops(plan.dtype) is None:
        return "No roofline: no peak is stated for these chips."
    return "No roofline: nothing says how these devices are joined; --estimate takes them in order."


def show_ranked(plans: list[Plan], console: Console) -> None:
    """Print plans of one topology beside each other, in their order."""
    table = Table(title="Best first" + (", by formulas alone" if plans[0].estimated else ""))
    table.add_column("mesh and batch")
    for name in ("fits", "peak", "step", "samples/s", "utilisation", "sent"):
        table.add_column(name, justify="right")
    for plan in plans[:_RANKED]:
        roof = plan.roofline
        table.add_row(
            mesh_and_batch(plan),
            "yes" if plan.fits else "NO",
            size(plan.memory.peak),
            duration(roof.step_seconds) if roof else "-",
            f"{plan.samples_per_second:,.1f}" if roof else "-",
            f"{roof.utilisation:.1%}" if roof else "-",
            size(plan.wire_bytes),
        )
    console.print(table)
    if len(plans) > _RANKED:
        fitting = sum(plan.fits for plan in plans)
        console.print(f"{len(plans) - _RANKED} more; {fitting} of all {len(plans)} fit.")


def show_published(console: Console) -> None:
    """Print the same roofline beside what others have measured."""
    table = Table("model", "chips", "batch", "measured", "hidden", "exposed", "source")
    for row in published_rows():
        table.add_row(
            row.name,
            row.topology,
            row.batch,
            f"{row.measured:.1%}",
            f"{row.hidden.utilisation:.1%}",
            f"{row.exposed.utilisation:.1%}",
            row.source,
        )
    console.print(Group("The same roofline beside MaxText's measured utilisation:", table))
    for sentence in ASSUMED:
        console.print(f"- {sentence}", highlight=False)


def size(count: float | None) -> str:
    """Bytes, in units of 10^9 or, where they are few, 10^6."""
    if count is None:
        return "-"
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    """In seconds or, where they are few, milliseconds or microseconds."""
    if seconds >= 0.1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.1f} µs"


def _summary(plan: Plan) -> Table:
    memory, roof, stage = plan.memory, plan.roofline, plan.stage
    shape = plan.shape
    media = f"{shape.clips} clips and {shape.sounds} sounds"
    parts = plan.config.micro_batches
    batches = f"; in {parts} micro-batches" if parts > 1 else ""
    parameters = f"{plan.parameters.total:,}, of which {plan.parameters.trainable:,} train"
    rows = [
        ("on", _place(plan)),
        ("parameters", parameters),
        ("batch", f"{shape.rows} rows of {shape.length} slots, {media} each{batches}"),
        ("fits", "yes" if memory.fits else "NO: take more chips, fewer rows, or another mesh"),
        ("arguments", f"{size(memory.arguments)} a chip: parameters, moments, the batch"),
        *_memory_rows(memory),
        ("compiled in", _compiled(plan)),
        ("FLOPs of a step", f"{plan.flops.model:.4g} model, {plan.flops.hardware:.4g} hardware"),
    ]
    if plan.sent:
        rows.append(("sent", f"{size(plan.wire_bytes)} by each chip and step"))
    if roof:
        speed = f"{plan.tokens_per_second:,.0f} tokens/s, padding among them"
        rows += [
            *_roofline_rows(roof),
            ("step", f"{duration(roof.step_seconds)}, {speed}"),
            ("utilisation", f"{roof.utilisation:.1%}, by a model and not measured"),
        ]
    if plan.useful_fraction is not None:
        rows.append(("not padding", f"{plan.useful_fraction:.0%} of the slots of rows"))
    if roof and stage:
        hours = plan.hours
        rows.append(
            (
                "whole stage",
                f"{stage.samples:,} samples, {stage.steps:,} steps: {hours:,.1f} hours, "
                f"{hours * plan.topology.num_chips:,.0f} chip-hours at this speed, if every row "
                "were as long",
            )
        )
    return _two_columns(f"{plan.network.name}, {plan.config.name}", rows)


def _place(plan: ProgramPlan) -> str:
    chips = plan.topology.num_chips
    count = f"{chips} chips" if chips > 1 else "1 chip"
    return f"{plan.topology.name}, {count}; {axes_in_words(plan.mesh)}"


def _memory_rows(memory: Memory) -> list[tuple[str, str]]:
    return [
        ("temporaries", size(memory.temporaries)),
        ("peak", f"{size(memory.peak)} of {size(memory.limit)}"),
    ]


def _roofline_rows(roof: Roofline) -> list[tuple[str, str]]:
    links = duration(roof.ici_seconds)
    if roof.dcn_seconds:
        links += f", and {duration(roof.dcn_seconds)} between slices or nodes"
    return [
        ("compute", duration(roof.compute_seconds)),
        ("memory", duration(roof.hbm_seconds)),
        ("links", f"{links}; {duration(roof.exposed_seconds)} exposed"),
    ]


def _two_columns(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table(show_header=False, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def _compiled(plan: ProgramPlan) -> str:
    if plan.estimated:
        return "not at all: everything here is estimated by formulas"
    return "-" if plan.compile_seconds is None else f"{plan.compile_seconds:.0f} s"


def _collectives(plan: ProgramPlan) -> Table:
    table = Table(title="Collectives of a chip and step")
    for name in ("kind", "axis"):
        table.add_column(name)
    for name in ("runs", "results", "on the wire", "overlapped"):
        table.add_column(name, justify="right")
    for total in totals(plan.sent.collectives):
        table.add_row(
            total.kind,
            total.axis,
            f"{total.count:,}",
            size(total.bytes),
            size(total.wire_bytes),
            size(total.overlapped_bytes),
        )
    return table
