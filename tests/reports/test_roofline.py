"""The reader of compiled programs, on small texts, against sums by hand."""

import pytest

from outside_in.reports import hlo, roofline
from outside_in.reports.cards import CARDS
from outside_in.reports.roofline import ATTENTION, COPIES, PASSES, PRODUCTS, Bound, Rates

RATES = Rates(bytes=1000.0, flops=100.0, float32_flops=50.0, link=10.0)


def account(text, calls=1):
    return roofline.account(hlo.parse(text), calls)


def only_kernel(body, computations=""):
    """The single kernel of a program with this entry."""
    [kernel] = account(f"{computations}\nENTRY %main (p: f32[1]) -> f32[1] {{\n{body}\n}}\n").kernels
    return kernel


def fused(body):
    """Bytes of a kernel that is a fusion with this body."""
    kernel = only_kernel(
        "  ROOT %f = f32[1]{0} fusion(), kind=kLoop, calls=%fused", f"%fused (p: f32[1]) -> f32[1] {{\n{body}\n}}\n"
    )
    assert kernel.kind == PASSES and kernel.flops == 0
    return kernel.bytes


def test_an_elementwise_fusion_reads_its_inputs_and_writes_its_output():
    bytes_moved = fused("""
  %a = f32[8,16]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %wide = f32[8,16]{1,0} convert(%b)
  ROOT %sum = f32[8,16]{1,0} add(%a, %wide)""")
    assert bytes_moved == 128 * 4 + 128 * 2 + 128 * 4


def test_a_reduction_reads_all_and_writes_its_result_and_every_other_output():
    bytes_moved = fused("""
  %a = f32[8,16]{1,0} parameter(0)
  %zero = f32[] constant(0)
  %row = f32[8]{0} reduce(%a, %zero), dimensions={1}, to_apply=%add
  %half = bf16[8,16]{1,0} convert(%a)
  ROOT %both = (f32[8]{0}, bf16[8,16]{1,0}) tuple(%row, %half)""")
    assert bytes_moved == 128 * 4 + 8 * 4 + 128 * 2


def test_a_slice_reads_what_it_takes_also_behind_elementwise_operations():
    bytes_moved = fused("""
  %a = f32[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %half = bf16[8,16]{1,0} convert(%a)
  ROOT %one = bf16[1,16]{1,0} dynamic-slice(%half, %i, %i), dynamic_slice_sizes={1,16}""")
    assert bytes_moved == 16 * 4 + 4 + 16 * 2


def test_two_slices_of_an_array_read_no_more_than_all_of_it():
    bytes_moved = fused("""
  %a = f32[4]{0} parameter(0)
  %left = f32[3]{0} slice(%a), slice={[0:3]}
  %right = f32[3]{0} slice(%a), slice={[1:4]}
  ROOT %sum = f32[3]{0} add(%left, %right)""")
    assert bytes_moved == 4 * 4 + 3 * 4


def test_a_gather_reads_as_many_rows_as_it_has_indices():
    bytes_moved = fused("""
  %table = f32[1000,16]{1,0} parameter(0)
  %rows = s32[5,1]{1,0} parameter(1)
  ROOT %found = f32[5,16]{1,0} gather(%table, %rows), offset_dims={1}, slice_sizes={1,16}""")
    assert bytes_moved == 5 * 16 * 4 + 5 * 4 + 5 * 16 * 4


def test_an_update_in_place_touches_what_it_writes():
    bytes_moved = fused("""
  %whole = f32[100,16]{1,0} parameter(0)
  %part = f32[1,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = f32[100,16]{1,0} dynamic-update-slice(%whole, %part, %i, %i)""")
    assert bytes_moved == 16 * 4 + 4 + 16 * 4


def test_an_update_of_what_is_read_elsewhere_is_a_whole_copy():
    bytes_moved = fused("""
  %whole = f32[100,16]{1,0} parameter(0)
  %part = f32[1,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %new = f32[100,16]{1,0} dynamic-update-slice(%whole, %part, %i, %i)
  ROOT %sum = f32[100,16]{1,0} add(%new, %whole)""")
    assert bytes_moved == 1600 * 4 + 16 * 4 + 4 + 1600 * 4


def test_a_scatter_in_place_reads_and_writes_its_updates():
    bytes_moved = fused("""
  %table = f32[1000,16]{1,0} parameter(0)
  %rows = s32[5,1]{1,0} parameter(1)
  %updates = f32[5,16]{1,0} parameter(2)
  ROOT %new = f32[1000,16]{1,0} scatter(%table, %rows, %updates), to_apply=%add""")
    assert bytes_moved == 5 * 4 + 5 * 16 * 4 + 2 * 5 * 16 * 4


LOOP = """
%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %copy.1 = f32[8]{0} copy(%x)
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %copy.1)
}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %loop = (s32[], f32[8]{0}) while(%p), condition=%test, body=%body TRIPS
}
"""


@pytest.mark.parametrize(
    ("trips", "times", "endless"), [(', backend_config={"known_trip_count":{"n":"6"}}', 6, 0), ("", 1, 1)]
)
def test_the_body_of_a_loop_counts_as_often_as_it_runs(trips, times, endless):
    found = account(LOOP.replace(" TRIPS", trips), calls=2)
    [kernel] = found.kernels
    assert (kernel.kind, kernel.times, kernel.bytes) == (COPIES, 2 * times, 2 * 8 * 4)
    assert found.endless == endless
    assert found.total("times") == 2 * times and found.total("bytes") == 2 * times * 64


def test_of_a_conditional_the_branch_that_moves_most_counts():
    text = """
%little (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  ROOT %copy.1 = f32[2]{0} copy(%a)
}

%much (b: f32[9]) -> f32[2] {
  %b = f32[9]{0} parameter(0)
  ROOT %copy.2 = f32[9]{0} copy(%b)
}

ENTRY %main (p: pred[]) -> f32[2] {
  %p = pred[] parameter(0)
  ROOT %if = f32[2]{0} conditional(%p, %p, %p), branch_computations={%little, %much}
}
"""
    assert [kernel.bytes for kernel in account(text).kernels] == [2 * 9 * 4]


@pytest.mark.parametrize(("dtype", "width", "float32"), [("bf16", 2, False), ("f32", 4, True)])
def test_a_product_takes_two_operations_for_each_pair_and_float32_ones_count_apart(dtype, width, float32):
    kernel = only_kernel(f"""
  %a = {dtype}[3,5,7]{{2,1,0}} parameter(0)
  %b = {dtype}[3,7,11]{{2,1,0}} parameter(1)
  ROOT %c = {dtype}[3,5,11]{{2,1,0}} dot(%a, %b), lhs_batch_dims={{0}}, lhs_contracting_dims={{2}}""")
    flops = 2 * 3 * 5 * 7 * 11
    assert (kernel.kind, kernel.flops, kernel.float32_flops) == (PRODUCTS, flops, flops if float32 else 0)
    assert kernel.bytes == width * 3 * (5 * 7 + 7 * 11 + 5 * 11)
    computing, moving = RATES.seconds(kernel)
    assert computing == pytest.approx(flops / (50 if float32 else 100)) and moving == pytest.approx(kernel.bytes / 1000)


def test_a_product_inside_a_fusion_counts_with_the_fusion_s_bytes():
    kernel = only_kernel(
        "  ROOT %f = f32[4,6]{1,0} fusion(), kind=kCustom, calls=%gemm",
        """%gemm (a: bf16[4,5], b: bf16[5,6]) -> f32[4,6] {
  %a = bf16[4,5]{1,0} parameter(0)
  %b = bf16[5,6]{1,0} parameter(1)
  ROOT %c = f32[4,6]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""",
    )
    assert (kernel.kind, kernel.flops, kernel.float32_flops) == (PRODUCTS, 2 * 4 * 5 * 6, 0)
    assert kernel.bytes == 2 * (20 + 30) + 4 * 24


GEMM = (
    'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],'
    '"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}'
)


def test_cublas_is_a_product_without_its_workspace():
    kernel = only_kernel(
        """
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %bias = bf16[16]{0} parameter(2)
  ROOT %c = (bf16[64,16]{1,0}, s8[4194304]{0}) custom-call(%a, %b, /*index=2*/%bias), """
        + GEMM
    )
    assert (kernel.kind, kernel.flops, kernel.float32_flops) == (PRODUCTS, 2 * 64 * 32 * 16, 0)
    assert kernel.bytes == 2 * (64 * 32 + 32 * 16 + 16 + 64 * 16)


FMHA = (
    'custom_call_target="{target}", backend_config={{"cudnn_fmha_backend_config": {{"fmha_scale": 0.125, '
    '"intermediate_tensor_shape": {{"element_type": "BF16", "dimensions": ["2", "3", "16", "16"]}}, '
    '"mask_type": "{mask}"{window}}}}}'
)
HEADS = "bf16[2,16,3,8]{3,2,1,0}"


@pytest.mark.parametrize(
    ("mask", "window", "share"),
    [("CAUSAL", "", 0.5), ("CAUSAL", 0, 0.5), ("CAUSAL", 16, 0.5), ("CAUSAL", 4, 0.25 * 0.875), ("NO_MASK", "", 1)],
)
def test_attention_by_cudnn_is_two_products_forward_and_five_backward(mask, window, share):
    window = f', "sliding_window_length": {window}' if window != "" else ""
    one_product = 2 * (2 * 3 * 16 * 16) * 8 * share
    qkv = "\n".join(f"  %{name} = {HEADS} parameter({i})" for i, name in enumerate("qkvod"))
    forward = only_kernel(
        f"{qkv}\n  ROOT %a = ({HEADS}, f32[2,3,16]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %v), "
        + FMHA.format(target="__cudnn$fmhaSoftmax", mask=mask, window=window)
    )
    backward = only_kernel(
        f"{qkv}\n  %s = f32[2,3,16]{{2,1,0}} parameter(5)\n"
        f"  ROOT %a = ({HEADS}, {HEADS}, {HEADS}, u8[0]{{0}}) custom-call(%q, %k, %v, %s, %d, /*index=5*/%o), "
        + FMHA.format(target="__cudnn$fmhaSoftmaxBackward", mask=mask, window=window)
    )
    assert (forward.kind, forward.flops, backward.kind, backward.flops) == (
        ATTENTION, 2 * one_product, ATTENTION, 5 * one_product,
    )  # fmt: skip
    array, sums = 2 * 2 * 16 * 3 * 8, 4 * 2 * 3 * 16
    assert forward.bytes == 4 * array + sums
    assert backward.bytes == 5 * array + sums + 3 * array


COLLECTIVE = """
ENTRY %main (x: f32[40], y: f32[50]) -> f32[40] {{
  %x = f32[40]{{0}} parameter(0)
  %y = f32[50]{{0}} parameter(1)
  %start = f32[{out}]{{0}} {kind}-start(%x), channel_id=1, replica_groups={groups}, to_apply=%add
  %copy.1 = f32[50]{{0}} copy(%y)
  %done = f32[{out}]{{0}} {kind}-done(%start)
  ROOT %copy.2 = f32[50]{{0}} copy(%y)
}}
"""


@pytest.mark.parametrize(
    ("kind", "groups", "out", "sent"),
    [
        ("all-reduce", "{{0,1,2,3}}", 40, 2 * 160 * 3 / 4),
        ("all-reduce", "[1,4]<=[4]", 40, 2 * 160 * 3 / 4),
        ("all-gather", "{{0,1,2,3}}", 160, 160 * 3),
        ("reduce-scatter", "{{0,1},{2,3}}", 20, 160 / 2),
    ],
)
def test_a_collective_sends_what_a_ring_does_and_waits_only_for_what_runs_beside_it(kind, groups, out, sent):
    found = account(COLLECTIVE.format(kind=kind, groups=groups, out=out))
    [send] = found.sends
    assert (send.kind, send.times, send.bytes) == (kind, 1, sent)
    assert [kernel.name for kernel in send.beside] == ["copy.1"]
    assert [kernel.name for kernel in found.kernels] == ["copy.1", "copy.2"]
    moving = 2 * 50 * 4 / RATES.bytes
    bound = Bound.of(found, RATES)
    assert bound.moving == pytest.approx(2 * moving) and bound.computing == 0
    assert bound.sending == pytest.approx(sent / RATES.link - moving)


def test_a_collective_without_a_start_runs_beside_nothing():
    text = COLLECTIVE.format(kind="all-reduce", groups="{{0,1}}", out=40).replace("-start(", "(")
    [send] = account("\n".join(line for line in text.splitlines() if "-done" not in line)).sends
    assert send.beside == () and send.bytes == 160


def test_an_asynchronous_fusion_counts_once():
    text = """
%fused (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %b = f32[4]{0} negate(%a)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %start = ((f32[4]{0}), f32[4]{0}) fusion-start(%p), kind=kLoop, calls=%fused
  ROOT %done = f32[4]{0} fusion-done(%start)
}
"""
    assert [kernel.bytes for kernel in account(text).kernels] == [32]


def test_a_bound_takes_the_longer_of_operations_and_bytes_of_each_kernel():
    computing = roofline.Kernel(PRODUCTS, "a", "", 2, bytes=1000, flops=500, float32_flops=0)
    moving = roofline.Kernel(PASSES, "b", "", 3, bytes=2000, flops=0, float32_flops=0)
    bound = Bound.of(roofline.Account([computing, moving], [], 0), RATES)
    assert (bound.computing, bound.moving, bound.sending, bound.total) == (10, 6, 0, 16)


def test_rates_are_those_of_the_data_sheet_or_shares_of_them():
    assert Rates.of(CARDS["h100"]) == Rates(3.35e12, 989.5e12, 494.5e12, 450e9)
    assert Rates.of(CARDS["l4"], 0.5, 0.25).bytes == 150e9
    assert Rates.of(CARDS["l4"], 0.5, 0.25).flops == pytest.approx(121e12 / 4)


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="expected the text of a compiled program"):
        hlo.parse("nothing of the kind\n}\n")
