"""Where a block begins and ends, in both variants."""

import onnx
import pytest
from onnx import helper

from adatsq_trt.engines.accuracy.block_cut import Cut, GraphView, find_cut, find_pieces
from adatsq_trt.engines.bundle import BundleFiles
from adatsq_trt.errors import AdatsqError


def views(bundle: BundleFiles, assignment: int = 1) -> tuple[GraphView, GraphView]:
    target, cpu = (GraphView(bundle.graph_path(bundle.graph(v, assignment))) for v in ("target", "cpu"))
    return target, cpu


def cut_out(target: GraphView, cpu: GraphView, block: str) -> Cut:
    (piece,) = (piece for piece in find_pieces(target, cpu, [block]) if piece.name == block)
    return find_cut(target, cpu, piece)


def test_the_border_is_what_enters_and_leaves(tiny_bundle: BundleFiles) -> None:
    target, cpu = views(tiny_bundle)
    first, second = (cut_out(target, cpu, block) for block in ("blocks.0", "blocks.1"))
    assert first.inputs == ("blocks.0.linear.scale", "embedded")
    assert first.outputs == ("blocks.0.output",)
    assert second.inputs == ("blocks.0.output", "blocks.1.linear.scale")
    assert second.outputs == ("velocity",)


def test_a_renamed_value_moves_the_border_up(own_bundle: BundleFiles) -> None:
    """Lowering may drop a Cast, so the value that enters the target block can be missing in the cpu graph."""
    path = own_bundle.graph_path(own_bundle.graph("cpu", 1))
    path.write_bytes(path.read_bytes().replace(b"embedded", b"renamed!"))
    target, cpu = views(own_bundle)
    assert cut_out(target, cpu, "blocks.0").inputs == ("blocks.0.linear.scale", "column", "hidden_states")


def test_a_cast_that_the_cpu_graph_lacks_moves_the_border_up(own_bundle: BundleFiles) -> None:
    """A block's last value, as Wan computes it: in float32, then rounded to 16 bit, which lowering leaves out."""
    rounded = own_bundle.graph_path(own_bundle.graph("target", 1))
    model = onnx.load(rounded, load_external_data=False)
    place, last = next((i, node) for i, node in enumerate(model.graph.node) if "blocks.0.output" in node.output)
    last.output[0] = "blocks.0.wide"
    cast = helper.make_node("Cast", ["blocks.0.wide"], ["blocks.0.output"], to=onnx.TensorProto.BFLOAT16)
    cast.metadata_props.extend(last.metadata_props)
    model.graph.node.insert(place + 1, cast)
    rounded.write_bytes(model.SerializeToString())
    path = own_bundle.graph_path(own_bundle.graph("cpu", 1))
    lowered = onnx.load(path, load_external_data=False)
    for node in lowered.graph.node:
        for names in (node.input, node.output):
            names[:] = ["blocks.0.wide" if name == "blocks.0.output" else name for name in names]
    path.write_bytes(lowered.SerializeToString())
    target, cpu = views(own_bundle)
    assert cut_out(target, cpu, "blocks.0").outputs == ("blocks.0.wide",)
    assert cut_out(target, cpu, "blocks.1").inputs == ("blocks.0.wide", "blocks.1.linear.scale")


def test_a_prefix_is_a_whole_path_component(own_bundle: BundleFiles) -> None:
    target, cpu = views(own_bundle)
    with pytest.raises(AdatsqError, match="0 nodes belong"):
        cut_out(target, cpu, "block")


def test_no_value_in_common(own_bundle: BundleFiles) -> None:
    path = own_bundle.graph_path(own_bundle.graph("cpu", 1))
    path.write_bytes(path.read_bytes().replace(b"blocks.0.output", b"blocks.0.OUTPUT"))
    target, cpu = views(own_bundle)
    with pytest.raises(AdatsqError, match=r"no value leaves 'blocks\.0'"):
        cut_out(target, cpu, "blocks.0")


def test_an_extracted_block_holds_its_weights_and_nothing_else(tiny_bundle: BundleFiles) -> None:
    target, cpu = views(tiny_bundle)
    cut = cut_out(target, cpu, "blocks.0")
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 3) for name in cut.inputs]
    block = cpu.extract(inputs, cut.outputs)
    assert {"blocks.0.linear.weight", "blocks.0.linear.weight_scale", "blocks.0.linear.bias"} <= {
        tensor.name for tensor in block.graph.initializer
    }
    assert not any("blocks.1" in name for node in block.graph.node for name in node.output)


def test_modules_outside_of_the_blocks_are_pieces_of_their_own(tiny_bundle: BundleFiles) -> None:
    target, cpu = views(tiny_bundle)
    pieces = find_pieces(target, cpu, ["blocks.1"])
    assert [piece.name for piece in pieces] == ["embed", "blocks.0.linear", "blocks.0", "blocks.1"]
    assert find_cut(target, cpu, pieces[0]).outputs == ("embedded",)
    assert find_cut(target, cpu, pieces[2]).inputs == ("blocks.0.linear.output", "embedded")
