"""How often instructions of hand-written programs run."""

import pytest

from vllama2_jax.parallel.hlo import parse
from vllama2_jax.parallel.loops import runs


def loop(start="0", limit="6", step="1", direction="LT", change="add(%i, %step)", extra=""):
    """A loop around one marked instruction; its counter is the first thing that it carries."""
    return f"""HloModule m, num_partitions=1

%condition (p: (s32[], s32[], f32[8])) -> pred[] {{
  %p = (s32[], s32[], f32[8]) parameter(0)
  %counter = s32[] get-tuple-element(%p), index=0
  %bound = s32[] get-tuple-element(%p), index=1
  ROOT %test = pred[] compare(%counter, %bound), direction={direction}
}}

%body (q: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %q = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %n = s32[] get-tuple-element(%q), index=1
  %x = f32[8] get-tuple-element(%q), index=2
  %step = s32[] constant({step})
  %next = s32[] {change}
  %marked = f32[8] negate(%x)
  {extra}
  ROOT %out = (s32[], s32[], f32[8]) tuple(%next, %n, %marked)
}}

ENTRY %main (a: f32[8], b: s32[]) -> f32[8] {{
  %a = f32[8] parameter(0)
  %b = s32[] parameter(1)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %limit = s32[] {limit if "(" in limit else f"constant({limit})"}
  %carried = (s32[], s32[], f32[8]) tuple(%copied, %limit, %a)
  %loop = (s32[], s32[], f32[8]) while(%carried), condition=%condition, body=%body
  ROOT %result = f32[8] get-tuple-element(%loop), index=2
}}
"""


def times(text, name="marked"):
    found = [run for run in runs(parse(text)) if run.instruction.name == name]
    assert len(found) == 1
    return found[0].times


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        (dict(), len(range(0, 6))),
        (dict(start="2", limit="17", step="4"), len(range(2, 17, 4))),
        (dict(limit="16", direction="LE", step="4"), len(range(0, 16 + 1, 4))),
        (dict(start="9", limit="0", step="-2", direction="GT"), len(range(9, 0, -2))),
        (dict(start="9", limit="1", step="2", direction="GE", change="subtract(%i, %step)"), 5),
        (dict(start="5", limit="8", direction="NE"), 3),
        (dict(start="8", limit="8"), 0),
        # XLA's unrolled loops add twice.
        (dict(change="add(%once, %step)", extra="%once = s32[] add(%i, %step)"), 3),
    ],
)
def test_turns_follow_from_start_step_and_limit(options, turns):
    assert times(loop(**options)) == turns


def test_what_xla_notes_about_a_loop_comes_first():
    text = loop(limit="parameter(1)").replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"11"}}'
    )
    assert times(text) == 11


@pytest.mark.parametrize(
    "options",
    [dict(limit="parameter(1)"), dict(change="multiply(%i, %step)", start="1", step="2")],
    ids=["limit", "step"],
)
def test_a_loop_that_does_not_tell_counts_once_and_is_named(options):
    text = loop(**options)
    assert times(text) == 1
    assert [r.instruction.name for r in runs(parse(text)) if r.uncounted] == ["loop"]


def test_loops_in_loops_and_calls_multiply_and_limits_may_come_from_outside():
    inner = loop().split("ENTRY")[0]
    outer = """
%outer_condition (p2: (s32[], s32[], f32[8])) -> pred[] {
  %p2 = (s32[], s32[], f32[8]) parameter(0)
  %counter2 = s32[] get-tuple-element(%p2), index=0
  %four = s32[] constant(4)
  ROOT %test2 = pred[] compare(%counter2, %four), direction=LT
}

%called (r: f32[8]) -> f32[8] {
  %r = f32[8] parameter(0)
  ROOT %twice_called = f32[8] add(%r, %r)
}

%outer (q2: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %q2 = (s32[], s32[], f32[8]) parameter(0)
  %i2 = s32[] get-tuple-element(%q2), index=0
  %n2 = s32[] get-tuple-element(%q2), index=1
  %x2 = f32[8] get-tuple-element(%q2), index=2
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %carried2 = (s32[], s32[], f32[8]) tuple(%zero, %n2, %x2)
  %within = (s32[], s32[], f32[8]) while(%carried2), condition=%condition, body=%body
  %y2 = f32[8] get-tuple-element(%within), index=2
  %z2 = f32[8] call(%y2), to_apply=%called
  %i3 = s32[] add(%i2, %one)
  ROOT %out2 = (s32[], s32[], f32[8]) tuple(%i3, %n2, %z2)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %start = s32[] constant(0)
  %limit = s32[] constant(7)
  %carried = (s32[], s32[], f32[8]) tuple(%start, %limit, %a)
  %loop = (s32[], s32[], f32[8]) while(%carried), condition=%outer_condition, body=%outer
  ROOT %result = f32[8] get-tuple-element(%loop), index=2
}
"""
    assert times(inner + outer) == 4 * 7
    assert times(inner + outer, "twice_called") == 4
