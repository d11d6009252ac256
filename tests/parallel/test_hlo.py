"""Instructions as they stand in a program's text, and forms that no test compiles."""

import pytest

from vllama2_jax.parallel.collectives import communication
from vllama2_jax.parallel.hlo import parse, shape_bytes


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[]", 4),
        ("bf16[1,2048,8192]{2,1,0:T(8,128)(2,1)S(1)}", 2 * 2048 * 8192),
        ("(f32[8]{0}, (s32[2,2]{1,0}, pred[3]), token[], /*index=3*/u8[5])", 32 + 16 + 3 + 5),
        ("f8e4m3fn[10]", 10),
        ("s4[10]", 5),
        ("c64[2]", 16),
        ("f32[0,4]", 0),
    ],
)
def test_bytes_of_shapes(shape, size):
    assert shape_bytes(shape) == size


def test_attributes_may_run_over_lines_and_operands_may_carry_their_shapes():
    call = (
        "%k = (f32[8], f32[8]) custom-call(f32[8]{0:T(8,128)} %a, /*index=1*/f32[8] %a), "
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"blocks":"{128}"\n'
        '}}, metadata={op_name="jit(f)/vmap(jit(my_kernel))/pallas_call"}'
    )
    module = parse(
        f"""HloModule m, num_partitions=4

ENTRY %main (a: f32[8]) -> f32[8] {{
  %a = f32[8]{{0:T(8,128)}} parameter(0)
  {call}
  ROOT %r = f32[8] get-tuple-element(%k), index=1
}}
"""
    )
    kernel, result = list(module.computations["main"].values())[1:]
    assert module.num_partitions == 4
    assert (kernel.operands, kernel.kernel, kernel.bytes) == (["a", "a"], "my_kernel", 64)
    assert (result.element, result.root) == (1, True)


def test_no_program_is_one_clear_line():
    with pytest.raises(ValueError, match="no text of an XLA program"):
        parse("module @jit_f {}")


def sent(lines, extra=""):
    text = f"""HloModule m, num_partitions=4
{extra}
%product (x: f32[8,8]) -> f32[8,8] {{
  %x = f32[8,8] parameter(0)
  ROOT %xx = f32[8,8] dot(%x, %x), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%elementwise (y: f32[8,8]) -> f32[8,8] {{
  %y = f32[8,8] parameter(0)
  ROOT %yy = f32[8,8] negate(%y)
}}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8] parameter(0)
  {lines}
}}
"""
    found = communication(text, {"fsdp": 4}).collectives
    return [(one.kind, one.bytes, one.overlapped, one.axis) for one in found]


GROUPS = "replica_groups={{0,1,2,3}}"


@pytest.mark.parametrize(
    ("between", "overlapped"),
    [("", False), ("%n = f32[8,8] fusion(%a), calls=%elementwise", False)]
    + [("%n = f32[8,8] fusion(%a), calls=%product", True)]
    + [('%n = f32[8,8] custom-call(%a), custom_call_target="tpu_custom_call"', True)],
    ids=["nothing", "elementwise", "product", "kernel"],
)
def test_only_products_and_kernels_hide_what_is_sent(between, overlapped):
    lines = f"""%s = (f32[8,8], f32[32,8]) all-gather-start(%a), {GROUPS}, dimensions={{0}}
  {between}
  %d = f32[32,8] all-gather-done(%s)
  %late = f32[8,8] fusion(%a), calls=%product
  ROOT %r = f32[8,8] slice(%d), slice={{[0:8], [0:8]}}"""
    assert sent(lines) == [("all-gather", 32 * 8 * 4, overlapped, "fsdp")]


def test_collectives_inside_asynchronous_calls_and_of_loops_next_turns():
    wrapped = f"""
%wrapped (w: f32[8,8]) -> f32[2,8] {{
  %w = f32[8,8] parameter(0)
  ROOT %rs = f32[2,8] reduce-scatter(%w), {GROUPS}, dimensions={{0}}, to_apply=%add
}}
"""
    pairs = "source_target_pairs={{0,1},{1,0}}"
    lines = f"""%s = ((f32[8,8]), f32[2,8], s32[]) async-start(%a), calls=%wrapped
  %n = f32[8,8] fusion(%a), calls=%product
  %d = f32[2,8] async-done(%s)
  ROOT %p = (f32[8,8], f32[8,8], u32[]) collective-permute-start(%n), {pairs}"""
    assert sent(lines, wrapped) == [
        ("reduce-scatter", 2 * 8 * 4, True, "fsdp"),
        ("collective-permute", 8 * 8 * 4, True, "fsdp"),
    ]


def test_groups_of_one_device_send_nothing_and_every_branch_counts():
    branches = "".join(
        f"""
%branch{index} (v{index}: f32[8,8]) -> f32[8,8] {{
  %v{index} = f32[8,8] parameter(0)
  ROOT %ar{index} = f32[8,8] all-reduce(%v{index}), replica_groups={groups}, to_apply=%add
}}
"""
        for index, groups in enumerate(["{{0,1,2,3}}", "{{0},{1},{2},{3}}", "{{0,1,2,3}}"])
    )
    called = "branch_computations={%branch0, %branch1, %branch2}"
    lines = f"""%which = s32[] constant(0)
  ROOT %c = f32[8,8] conditional(%which, %a, %a, %a), {called}"""
    assert sent(lines, branches) == [("all-reduce", 256, False, "fsdp")] * 2


def test_a_kernel_inside_a_fusion_is_named():
    text = """HloModule m, num_partitions=4

%carrier (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %gmm.3 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %f = f32[8]{0} fusion(%a), kind=kCustom, calls=%carrier
}
"""
    assert communication(text, {"fsdp": 4}).kernels == {"gmm": 1}
