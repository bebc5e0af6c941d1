import onnx_ir as ir

from adatsq_trt.export.name_nodes import MODULE, NameNodes

SCOPES = "pkg.torch.onnx.name_scopes"


def model() -> ir.Model:
    made = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]>
        g (float[2,2] x) => (float[2,2] y) <float[2] bias = {1, 2}> {
            [n0] u = Add(x, bias)
            [n1] v = Relu(u)
            [n2] w = Relu(v)
            [n3] y = Identity(w)
        }"""
    )
    made.graph.initializers["bias"].name = "transformer.a.bias"
    scopes = [
        "['', 'transformer', 'transformer.a', 'add']",
        "['', 'transformer', 'transformer.b.0', 'relu']",
        None,
        None,
    ]
    for node, scope in zip(made.graph, scopes, strict=True):
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "/somewhere/model.py"
        if scope:
            node.metadata_props[SCOPES] = scope
    return made


def nodes() -> list[ir.Node]:
    made = model()
    NameNodes("transformer.")(made)
    return list(made.graph)


def test_rule_1_metadata_is_the_module_path_alone():
    assert [dict(node.metadata_props) for node in nodes()[:2]] == [{MODULE: "a"}, {MODULE: "b.0"}]


def test_rule_1_what_the_exporter_added_belongs_to_no_module():
    made = model()
    scope = "['', '_empty_nn_module_stack_from_metadata_hook', 'sym_size_int']"
    next(iter(made.graph)).metadata_props[SCOPES] = scope
    NameNodes("transformer.")(made)
    assert next(iter(made.graph)).metadata_props[MODULE] == ""


def test_rule_2_a_node_without_scope_belongs_to_its_input():
    assert [node.metadata_props[MODULE] for node in nodes()[2:]] == ["b.0", "b.0"]


def test_rule_3_names_are_path_and_operator_and_unique():
    assert [node.name for node in nodes()] == ["a/Add", "b.0/Relu", "b.0/Relu_2", "b.0/Identity"]


def test_rule_4_parameters_lose_the_wrapper():
    made = model()
    NameNodes("transformer.")(made)
    assert list(made.graph.initializers) == ["a.bias"]


def test_without_a_wrapper_names_stay():
    made = model()
    NameNodes("")(made)
    assert next(iter(made.graph)).name == "transformer.a/Add"
